//! Post-copy: a process runs at its new place while pages of it are still at the old one. What each end knows of them.
//!
//! The target keeps [`Missing`], one for each address space: where which page of the source belongs. The source keeps [`Rest`]:
//! what it has not sent yet. Neither does any I/O.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::image::PAGE;

/// How many pages before and after one that is wanted are asked for with it.
const BEFORE_BYTES: u64 = 4 * PAGE;
const AFTER_BYTES: u64 = 12 * PAGE;

/// Part of a memory area that is still at the source: where it is here, and its first address there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The addresses here.
    pub here: Range<u64>,
    /// Where it begins there: the same, unless the process has moved its memory (mremap(2)).
    pub there: u64,
}

impl Part {
    /// The addresses there.
    pub fn source(&self) -> Range<u64> {
        self.there..self.there + (self.here.end - self.here.start)
    }
}

/// The pages of an address space that are still at the source. A page that is not among them is either here or fresh: nobody but
/// the process has ever written to it.
#[derive(Clone, Debug, Default)]
pub struct Missing {
    /// End and source, by the first address here.
    parts: BTreeMap<u64, (u64, u64)>,
    /// First address here, by the first address there; of the same parts.
    sources: BTreeMap<u64, u64>,
    bytes: u64,
}

fn page(address: u64) -> u64 {
    address / PAGE * PAGE
}

impl Missing {
    /// All of these are missing. They do not overlap, and both ends of each are at pages.
    pub fn new(runs: impl IntoIterator<Item = Range<u64>>) -> Missing {
        let mut missing = Missing::default();
        for run in runs {
            missing.cut(&run);
            missing.insert(Part {
                there: run.start,
                here: run,
            });
        }
        missing
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// How many there are.
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE
    }

    fn insert(&mut self, part: Part) {
        if part.here.start < part.here.end {
            self.bytes += part.here.end - part.here.start;
            self.parts.insert(part.here.start, (part.here.end, part.there));
            self.sources.insert(part.there, part.here.start);
        }
    }

    fn take(&mut self, start: u64) -> Option<Part> {
        let (end, there) = self.parts.remove(&start)?;
        self.sources.remove(&there);
        self.bytes -= end - start;
        let here = start..end;
        Some(Part { here, there })
    }

    /// Takes out what lies in a range here.
    fn cut(&mut self, range: &Range<u64>) -> Vec<Part> {
        let before = self.parts.range(..range.start).next_back();
        let first = before
            .filter(|(_, (end, _))| *end > range.start)
            .map(|(start, _)| *start);
        let inside = self.parts.range(range.start..range.end.max(range.start));
        let starts: Vec<u64> = first.into_iter().chain(inside.map(|(start, _)| *start)).collect();
        let mut out = Vec::new();
        for start in starts {
            let Some(Part { here, there }) = self.take(start) else {
                continue;
            };
            let part = |from: u64, to: u64| Part {
                here: from..to,
                there: there + (from - here.start),
            };
            let (from, to) = (here.start.max(range.start), here.end.min(range.end));
            self.insert(part(here.start, from));
            self.insert(part(to, here.end));
            out.push(part(from, to));
        }
        out
    }

    /// These pages are here, or the process has given them up (munmap(2), madvise(2)).
    pub fn forget(&mut self, range: &Range<u64>) {
        self.cut(range);
    }

    /// The process has moved a piece of its memory (mremap(2)). What was at its new place is no more.
    pub fn moved(&mut self, from: u64, to: u64, len: u64) {
        let parts = self.cut(&(from..from.saturating_add(len)));
        self.cut(&(to..to.saturating_add(len)));
        for Part { here, there } in parts {
            let start = to + (here.start - from);
            self.insert(Part {
                here: start..start + (here.end - here.start),
                there,
            });
        }
    }

    /// What of a range here is missing, in the order of addresses.
    pub fn within(&self, range: &Range<u64>) -> Vec<Part> {
        let before = self.parts.range(..range.start).next_back();
        before
            .into_iter()
            .chain(self.parts.range(range.start..range.end.max(range.start)))
            .filter_map(|(start, (end, there))| {
                let here = (*start).max(range.start)..(*end).min(range.end);
                (here.start < here.end).then(|| Part {
                    there: there + (here.start - start),
                    here,
                })
            })
            .collect()
    }

    /// Where pages that come from a range there belong.
    pub fn places(&self, source: &Range<u64>) -> Vec<Part> {
        let before = self.sources.range(..source.start).next_back();
        before
            .into_iter()
            .chain(self.sources.range(source.start..source.end.max(source.start)))
            .filter_map(|(there, start)| {
                let (end, _) = self.parts.get(start)?;
                let last = there + (end - start);
                let (from, to) = ((*there).max(source.start), last.min(source.end));
                (from < to).then(|| Part {
                    here: start + (from - there)..start + (to - there),
                    there: from,
                })
            })
            .collect()
    }

    /// What to ask the source for so that the page at this address here can be used: the page and some of its neighbours, as
    /// addresses there. `None`: it is not missing.
    pub fn wanted(&self, address: u64) -> Option<Range<u64>> {
        let at = page(address);
        let (start, (end, there)) = self
            .parts
            .range(..=at)
            .next_back()
            .filter(|(_, (end, _))| at < *end)?;
        let from = at.saturating_sub(BEFORE_BYTES).max(*start);
        let to = (at + PAGE + AFTER_BYTES).min(*end);
        Some(there + (from - start)..there + (to - start))
    }
}

/// The pages that the source has not sent yet.
#[derive(Clone, Debug, Default)]
pub struct Rest {
    /// End by start.
    runs: BTreeMap<u64, u64>,
    /// Where it goes on when nothing is wanted.
    next: u64,
}

impl Rest {
    /// All of these are to be sent.
    pub fn new(runs: impl IntoIterator<Item = Range<u64>>) -> Rest {
        let runs = runs.into_iter().filter(|run| run.start < run.end);
        Rest {
            runs: runs.map(|run| (run.start, run.end)).collect(),
            next: 0,
        }
    }

    /// Whether all has been sent.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many pages are left.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|(start, end)| (end - start) / PAGE).sum()
    }

    /// What is to be sent of a range that the target wants: the rest of it is there or on its way. Afterwards it goes on
    /// behind it, since what is used next is mostly near.
    pub fn take(&mut self, wanted: &Range<u64>) -> Vec<Range<u64>> {
        let before = self.runs.range(..wanted.start).next_back();
        let first = before
            .filter(|(_, end)| **end > wanted.start)
            .map(|(start, _)| *start);
        let inside = self.runs.range(wanted.start..wanted.end.max(wanted.start));
        let starts: Vec<u64> = first.into_iter().chain(inside.map(|(start, _)| *start)).collect();
        let mut out = Vec::new();
        for start in starts {
            let Some(end) = self.runs.remove(&start) else {
                continue;
            };
            let (from, to) = (start.max(wanted.start), end.min(wanted.end));
            if start < from {
                self.runs.insert(start, from);
            }
            if to < end {
                self.runs.insert(to, end);
            }
            out.push(from..to);
        }
        self.next = wanted.end;
        out
    }

    /// What is to be sent next, at most so much; `None` when all has been sent.
    pub fn next(&mut self, most_bytes: u64) -> Option<Range<u64>> {
        let inside = self.runs.range(..=self.next).next_back();
        let inside = inside
            .filter(|(_, end)| **end > self.next)
            .map(|(start, _)| *start);
        let start = inside
            .or_else(|| self.runs.range(self.next..).next().map(|(start, _)| *start))
            .or_else(|| self.runs.keys().next().copied())?;
        let end = self.runs.get(&start).copied()?;
        let from = if inside.is_some() { self.next } else { start };
        let wanted = from..end.min(from.saturating_add(most_bytes.max(PAGE)));
        self.take(&wanted).into_iter().next()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, len: u64) -> Range<u64> {
        start * PAGE..(start + len) * PAGE
    }

    /// What a set of pages here is, by where they come from.
    fn model_of(missing: &Missing) -> BTreeMap<u64, u64> {
        let all = missing.within(&(0..u64::MAX / 2));
        all.iter()
            .flat_map(|part| {
                let pages = (part.here.end - part.here.start) / PAGE;
                (0..pages).map(|i| (part.here.start / PAGE + i, part.there / PAGE + i))
            })
            .collect()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Forget(u64, u64),
        Move(u64, u64, u64),
        Came(u64, u64),
        Touch(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let at = 0u64..120;
        let len = 1u64..30;
        prop::collection::vec(
            prop_oneof![
                (at.clone(), len.clone()).prop_map(|(at, len)| Step::Forget(at, len)),
                (at.clone(), at.clone(), len.clone())
                    .prop_filter("apart", |(from, to, len)| from + len <= *to || to + len <= *from)
                    .prop_map(|(from, to, len)| Step::Move(from, to, len)),
                (at.clone(), len).prop_map(|(at, len)| Step::Came(at, len)),
                at.prop_map(Step::Touch),
            ],
            0..60,
        )
    }

    proptest! {
        /// Whatever the process does with its memory, each page is where a page by page account has it.
        #[test]
        fn pages_follow_their_memory(
            runs in prop::collection::btree_set(0u64..100, 0..60),
            steps in steps(),
        ) {
            let mut missing = Missing::new(runs.iter().map(|p| range(*p, 1)));
            let mut model: BTreeMap<u64, u64> = runs.iter().map(|p| (*p, *p)).collect();
            for step in steps {
                match step {
                    Step::Forget(at, len) => {
                        missing.forget(&range(at, len));
                        model.retain(|here, _| !(at..at + len).contains(here));
                    }
                    Step::Move(from, to, len) => {
                        missing.moved(from * PAGE, to * PAGE, len * PAGE);
                        let moved: Vec<(u64, u64)> = model
                            .range(from..from + len)
                            .map(|(here, there)| (here - from + to, *there))
                            .collect();
                        model.retain(|here, _| {
                            !(from..from + len).contains(here) && !(to..to + len).contains(here)
                        });
                        model.extend(moved);
                    }
                    Step::Came(at, len) => {
                        let places = missing.places(&range(at, len));
                        let mut found: Vec<u64> = places
                            .iter()
                            .flat_map(|part| part.here.start / PAGE..part.here.end / PAGE)
                            .collect();
                        found.sort_unstable();
                        let wanted: Vec<u64> = model
                            .iter()
                            .filter(|(_, there)| (at..at + len).contains(*there))
                            .map(|(here, _)| *here)
                            .collect();
                        prop_assert_eq!(found, wanted);
                        for part in places {
                            missing.forget(&part.here);
                        }
                        model.retain(|_, there| !(at..at + len).contains(there));
                    }
                    Step::Touch(at) => {
                        let wanted = missing.wanted(at * PAGE + 5);
                        prop_assert_eq!(wanted.is_some(), model.contains_key(&at));
                        if let Some(wanted) = wanted {
                            prop_assert!(wanted.contains(&(model[&at] * PAGE)));
                            let all: BTreeSet<u64> = model.values().copied().collect();
                            prop_assert!((wanted.start / PAGE..wanted.end / PAGE).all(|p| all.contains(&p)));
                        }
                    }
                }
                prop_assert_eq!(&model_of(&missing), &model);
                prop_assert_eq!(missing.pages(), model.len() as u64);
                prop_assert_eq!(missing.is_empty(), model.is_empty());
            }
        }

        /// Each page is sent once, whatever is wanted meanwhile.
        #[test]
        fn everything_is_sent_once(
            pages in prop::collection::btree_set(0u64..200, 0..120),
            wishes in prop::collection::vec((0u64..200, 1u64..20), 0..20),
            most in 1u64..9,
        ) {
            let mut rest = Rest::new(pages.iter().map(|p| range(*p, 1)));
            let mut sent = Vec::new();
            let mut note = |run: Range<u64>| sent.extend(run.start / PAGE..run.end / PAGE);
            for (at, len) in wishes {
                rest.take(&range(at, len)).into_iter().for_each(&mut note);
                rest.next(most * PAGE).into_iter().for_each(&mut note);
            }
            while let Some(run) = rest.next(most * PAGE) {
                prop_assert!(run.end - run.start <= most * PAGE && run.start < run.end);
                note(run);
            }
            prop_assert!(rest.is_empty() && rest.pages() == 0);
            sent.sort_unstable();
            prop_assert_eq!(sent, pages.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn neighbours_come_with_what_is_wanted() {
        let missing = Missing::new([range(0, 100), range(200, 1)]);
        assert_eq!(missing.wanted(50 * PAGE + 7), Some(range(46, 17)));
        assert_eq!(missing.wanted(0), Some(range(0, 13)));
        assert_eq!(missing.wanted(200 * PAGE), Some(range(200, 1)));
        assert_eq!(missing.wanted(150 * PAGE), None);
        let mut rest = Rest::new([range(0, 100)]);
        assert_eq!(rest.take(&range(46, 17)), [range(46, 17)]);
        assert_eq!(rest.next(2 * PAGE), Some(range(63, 2)), "it goes on behind it");
    }
}
