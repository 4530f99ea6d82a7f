//! Post-copy: a process runs at its new place before all of its memory is there.
//!
//! At the target a [`Pager`] puts the pages in as they come, and asks for those that somebody waits for; at the source a [`Pusher`]
//! sends those first, and all others until the end. What each knows of the pages is in [`linklayer::postcopy`].

mod pager;
mod pusher;

use std::ops::Range;

use linklayer::image::{AreaKind, PAGE, Place, ProcessImage};

pub use pager::{End, Pager};
pub use pusher::{Pushed, Pusher, SourceLink};

/// The pages of a process, by when they are sent. Both lists are in the order of addresses.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Division {
    /// Before it runs at its new place: those that cannot come later, and those that it uses at once.
    pub first: Vec<Range<u64>>,
    /// Afterwards.
    pub later: Vec<Range<u64>>,
}

/// Divides the pages (`runs`, in the order of addresses) of a captured process. Only anonymous memory of its own can come later:
/// of a private view of a file the kernel does not tell who waits for which page.
pub fn divide(image: &ProcessImage, runs: &[Range<u64>]) -> Division {
    let hot = hot_pages(image);
    let mut out = Division::default();
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            let area = image.areas.iter().find(|a| a.start <= at && at < a.end);
            let end = area.map_or(run.end, |a| a.end.min(run.end));
            let own = area.is_some_and(|a| a.kind == AreaKind::Anon && !a.shared());
            if !own {
                add(&mut out.first, at..end);
                at = end;
                continue;
            }
            let is_hot = hot.binary_search(&at).is_ok();
            let next = hot.partition_point(|page| *page <= at);
            let end = if is_hot {
                at + PAGE
            } else {
                hot.get(next).map_or(end, |page| end.min(*page))
            };
            add(if is_hot { &mut out.first } else { &mut out.later }, at..end);
            at = end;
        }
    }
    out
}

fn add(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == run.start => last.end = run.end,
        _ => runs.push(run),
    }
}

/// Pages that are used as soon as a process runs, by itself, by the kernel in its name, or by those who look at it.
fn hot_pages(image: &ProcessImage) -> Vec<u64> {
    /// What a thread may have below its stack pointer (the red zone of the x86-64 ABI).
    const RED_ZONE: u64 = 128;
    let mut bytes = Vec::new();
    for thread in &image.threads {
        let sp = thread.regs.rsp;
        bytes.extend([sp.saturating_sub(RED_ZONE), sp, sp.saturating_add(PAGE)]);
        bytes.extend([thread.regs.fs_base, thread.regs.rip]);
        bytes.extend([thread.clear_child_tid, thread.robust_list.0]);
        bytes.extend(thread.rseq.map(|rseq| rseq.pointer));
        // A timespec is 16 bytes.
        if let Some(Place::Timespec(at)) = thread.sleep.map(|sleep| sleep.place) {
            bytes.extend([at, at.saturating_add(15)]);
        }
    }
    // What ps(1) shows of it.
    let mm = &image.mm;
    let shown = mm.arg_start.min(mm.env_start)..mm.env_end.max(mm.arg_end);
    const MOST_SHOWN: usize = 64;
    bytes.extend(shown.step_by(PAGE as usize).take(MOST_SHOWN));
    bytes.push(mm.env_end.saturating_sub(1));
    let mut pages: Vec<u64> = bytes.into_iter().map(|at| at / PAGE * PAGE).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

/// The areas of an image that have pages which come later: they are to be watched.
pub fn watched<'a>(
    image: &'a ProcessImage,
    later: &'a [(u64, u64)],
) -> impl Iterator<Item = Range<u64>> + use<'a> {
    image
        .areas
        .iter()
        .filter(|area| area.kind == AreaKind::Anon && !area.shared())
        .map(|area| area.range())
        .filter(|range| {
            let next = later.partition_point(|(_, end)| *end <= range.start);
            later.get(next).is_some_and(|(start, _)| *start < range.end)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use linklayer::image::{Area, AreaFlags, Prot};

    #[test]
    fn only_memory_of_its_own_comes_later_and_what_is_used_at_once_does_not() {
        let area = |start: u64, end: u64, kind: AreaKind| Area {
            start,
            end,
            prot: Prot(3),
            flags: AreaFlags(0),
            kind,
        };
        let mut image = crate::test_image();
        image.areas = vec![
            area(
                0x1_0000,
                0x2_0000,
                AreaKind::File {
                    file_id: 1,
                    offset: 0,
                },
            ),
            area(0x2_0000, 0x4_0000, AreaKind::Anon),
            area(0x5_0000, 0x6_0000, AreaKind::Anon),
        ];
        image.mm.arg_start = 0x2_4000;
        image.mm.env_start = 0x2_4000;
        image.mm.arg_end = 0x2_4010;
        image.mm.env_end = 0x2_4010;
        let runs = [0x1_8000..0x3_0000, 0x3_8000..0x3_9000, 0x5_0000..0x5_1000];
        let found = divide(&image, &runs);
        assert_eq!(found.first, [0x1_8000..0x2_0000, 0x2_4000..0x2_5000]);
        assert_eq!(
            found.later,
            [
                0x2_0000..0x2_4000,
                0x2_5000..0x3_0000,
                0x3_8000..0x3_9000,
                0x5_0000..0x5_1000
            ]
        );
        let later: Vec<(u64, u64)> = found.later.iter().map(|r| (r.start, r.end)).collect();
        let watched: Vec<_> = watched(&image, &later).collect();
        assert_eq!(watched, [0x2_0000..0x4_0000, 0x5_0000..0x6_0000]);
        assert_eq!(super::watched(&image, &later[..3]).count(), 1);
    }
}
