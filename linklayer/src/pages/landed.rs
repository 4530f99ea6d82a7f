//! Pages that were put where they belong as they came, into a process that is being built.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::{BLOCK, present};
use crate::image::PAGE;

/// Memory of a process that is being built, into which pages can be put before it is known what else there is of it.
pub trait Place: Send {
    /// Where the part of it ends that has this page; `None` when it has no place for it, which never changes.
    fn end_of(&self, page: u64) -> Option<u64>;

    /// Puts whole pages into one part.
    ///
    /// # Errors
    /// The process is gone, or there is no memory.
    fn put(&self, address: u64, data: &[u8]) -> io::Result<()>;
}

/// Which pages were put into a [`Place`].
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Landed {
    /// Bits for the pages of each block.
    blocks: BTreeMap<u64, u64>,
    bytes: usize,
    stale: Vec<Range<u64>>,
}

impl Landed {
    /// Their bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// These pages were put.
    pub fn add(&mut self, pages: Range<u64>) {
        let mut at = pages.start;
        while at < pages.end {
            let number = at / BLOCK;
            let end = pages.end.min((number + 1) * BLOCK);
            let block = self.blocks.entry(number).or_default();
            let before = block.count_ones();
            *block |= bits(number, &(at..end));
            self.bytes += (block.count_ones() - before) as usize * PAGE as usize;
            at = end;
        }
    }

    /// How many of these pages are among them.
    pub fn count(&self, pages: &Range<u64>) -> u64 {
        let blocks = self.blocks.range(pages.start / BLOCK..pages.end.div_ceil(BLOCK));
        blocks
            .map(|(number, block)| u64::from((block & bits(*number, pages)).count_ones()))
            .sum()
    }

    /// Their runs in this range.
    pub fn runs(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (number, block) in self.blocks.range(range.start / BLOCK..range.end.div_ceil(BLOCK)) {
            for pages in present(block & bits(*number, range)) {
                add_run(
                    &mut runs,
                    number * BLOCK + pages.start * PAGE..number * BLOCK + pages.end * PAGE,
                );
            }
        }
        runs
    }

    /// Only those in these runs, which are in the order of addresses, count any more.
    pub fn retain(&mut self, runs: &[(u64, u64)]) {
        let mut stale = Vec::new();
        self.bytes = 0;
        for (number, block) in &mut self.blocks {
            let range = number * BLOCK..(number + 1) * BLOCK;
            let first = runs.partition_point(|(_, end)| *end <= range.start);
            let within = runs[first..].iter().take_while(|(start, _)| *start < range.end);
            let keep = within.fold(0, |word, (start, end)| word | bits(*number, &(*start..*end)));
            for pages in present(*block & !keep) {
                add_run(
                    &mut stale,
                    range.start + pages.start * PAGE..range.start + pages.end * PAGE,
                );
            }
            *block &= keep;
            self.bytes += block.count_ones() as usize * PAGE as usize;
        }
        self.stale.append(&mut stale);
    }

    /// The runs of pages that were put and do not count any more: they have to go.
    pub fn stale(&self) -> &[Range<u64>] {
        &self.stale
    }
}

fn add_run(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

/// The bits of a block for those of its pages that are in a range.
fn bits(number: u64, range: &Range<u64>) -> u64 {
    let (start, end) = (number * BLOCK, (number + 1) * BLOCK);
    let first = (range.start.clamp(start, end) - start) / PAGE;
    let last = (range.end.clamp(start, end) - start).div_ceil(PAGE);
    if first >= last {
        return 0;
    }
    (u64::MAX >> (BLOCK / PAGE - (last - first))) << first
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    fn set(runs: &[Range<u64>]) -> BTreeSet<u64> {
        runs.iter()
            .flat_map(|run| run.clone().step_by(PAGE as usize))
            .collect()
    }

    fn sorted(mut runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
        runs.sort_unstable();
        let mut last = 0;
        runs.retain_mut(|(start, end)| {
            *start = (*start).max(last);
            last = last.max(*end);
            start < end
        });
        runs
    }

    proptest! {
        #[test]
        fn as_a_set_of_pages(
            added in prop::collection::vec((0u64..400, 1u64..150), 0..12),
            kept in prop::collection::vec((0u64..400, 1u64..150), 0..8),
            asked in (0u64..400, 1u64..300),
        ) {
            let run = |(start, len): (u64, u64)| start * PAGE..(start + len) * PAGE;
            let mut landed = Landed::default();
            for pages in &added {
                landed.add(run(*pages));
            }
            let all = set(&added.iter().copied().map(run).collect::<Vec<_>>());
            let everywhere = 0..1000 * PAGE;
            prop_assert_eq!(set(&landed.runs(&everywhere)), all.clone());
            prop_assert_eq!(landed.bytes(), all.len() * PAGE as usize);
            let asked = run(asked);
            prop_assert_eq!(landed.count(&asked), all.range(asked.clone()).count() as u64);
            let kept = sorted(kept.into_iter().map(|k| (run(k).start, run(k).end)).collect());
            let keeps = set(&kept.iter().map(|(start, end)| *start..*end).collect::<Vec<_>>());
            landed.retain(&kept);
            prop_assert_eq!(set(&landed.runs(&everywhere)), &all & &keeps);
            prop_assert_eq!(set(landed.stale()), &all - &keeps);
            prop_assert_eq!(landed.bytes(), (&all & &keeps).len() * PAGE as usize);
        }
    }
}
