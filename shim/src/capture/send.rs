//! Sending a process that stands still to where it is built.

use std::io;
use std::ops::Range;
use std::time::Instant;

use linklayer::image::ProcessImage;
use linklayer::pages::Writer;
use linklayer::pages::known::Known;
use linklayer::quic::{Link, LinkError};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, Launch, LaunchReady, Malformed, MoveReport, Place};
use thiserror::Error;

use super::{all_runs, write_pages};
use crate::postcopy::divide;
use crate::track::Tracker;

/// How often pages that the other end turned out not to have are sent as they are.
const MOST_REPEATS: u32 = 16;

/// Why a process does not stand ready at the other end.
#[derive(Debug, Error)]
pub enum SendError {
    /// It died, or its memory cannot be read.
    #[error("its memory: {0}")]
    Memory(#[from] io::Error),
    /// The link is lost.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The answer makes no sense.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The other end does not take it.
    #[error("refused by the node: {0}")]
    Refused(StayReason),
    /// The other end breaks the protocol.
    #[error("the node lacks pages again and again")]
    Lacks,
}

/// Asks the other end of a link that was made for a process which pages it has already, if it has any. Without an answer all are sent.
pub fn learn_known(link: &Link, pid: i32, place: &Place, writer: &mut Writer) {
    if !place.knows {
        return;
    }
    let answer = link.ask(pid, Kind::Known, &[]).map_err(|e| e.to_string());
    match answer.and_then(|known| Known::decode(&known).map_err(|e| e.to_string())) {
        Ok(known) => writer.knows(known),
        Err(why) => tracing::warn!(pid, why, "the other end does not say which pages it has"),
    }
}

/// Sends a process, of which some pages may have been sent while it ran (`tracker` tells which have changed since), and waits
/// until it stands ready. `report` gets what that took. With `lazy`, only what cannot come later is sent; given back are the pages
/// that are to be sent when it runs.
///
/// # Errors
/// See [`SendError`].
pub fn send_process(
    link: &Link,
    launch: &Launch,
    reached_by: i32,
    tracker: Option<&Tracker>,
    lazy: bool,
    writer: &mut Writer,
    report: &mut MoveReport,
) -> Result<Vec<Range<u64>>, SendError> {
    let pid = launch.image.pid;
    let begun = Instant::now();
    let all = all_runs(reached_by, &launch.image.areas)?;
    link.tell(pid, pid, Kind::Launch, &[&wire::encode(launch)])?;
    let mut sink = |kind: Kind, parts: &[&[u8]]| link.tell(pid, pid, kind, parts).map_err(io::Error::other);
    // Also of what was sent while it ran in vain nothing counts that does not exist any more.
    let early = tracker.is_some() || writer.counts.pages > 0;
    let later = send_pages(
        &launch.image,
        reached_by,
        (&all, tracker),
        (lazy, early),
        writer,
        &mut sink,
    )?;
    report.times.pages_us = begun.elapsed().as_micros() as u64;
    report.pages = writer.counts;
    let asked = Instant::now();
    let build = || -> Result<LaunchReady, SendError> {
        let answer = link.ask(pid, Kind::LaunchBuild, &wire::encode(&wire::Pid(pid)))?;
        Ok(wire::decode(&answer)?)
    };
    let mut ready = build()?;
    let mut repeats = 0;
    while !ready.missing.is_empty() {
        repeats += 1;
        if repeats > MOST_REPEATS {
            return Err(SendError::Lacks);
        }
        tracing::debug!(
            pid,
            runs = ready.missing.len(),
            "pages that were not in the page store"
        );
        writer.was_missing(&ready.missing);
        let runs: Vec<_> = ready.missing.iter().map(|(start, end)| *start..*end).collect();
        write_pages(reached_by, &runs, writer, &mut sink)?;
        report.pages = writer.counts;
        ready = build()?;
    }
    if let Some(reason) = ready.refused {
        return Err(SendError::Refused(reason));
    }
    let waited = asked.elapsed().as_micros() as u64;
    report.times.restore_us = ready.restore_us.min(waited);
    report.times.transfer_us = waited - report.times.restore_us;
    Ok(later)
}

/// Sends the pages of a process that stands still, of which `all` are all; those that have not changed since they were sent while it
/// ran are left out (`tracker`). With `lazy`, so are those that can come later, which are given back. With `early`, pages may have been
/// sent while it ran, and the other end hears which of them count.
///
/// # Errors
/// The process is gone, or `sink`'s.
pub fn send_pages(
    image: &ProcessImage,
    reached_by: i32,
    (all, tracker): (&[Range<u64>], Option<&Tracker>),
    (lazy, early): (bool, bool),
    writer: &mut Writer,
    sink: &mut impl FnMut(Kind, &[&[u8]]) -> io::Result<()>,
) -> io::Result<Vec<Range<u64>>> {
    let changed = tracker.map(Tracker::round).transpose()?;
    let (mut first, mut later) = (changed.as_deref().unwrap_or(all).to_vec(), Vec::new());
    if lazy {
        let divided = divide(image, &first);
        (first, later) = (divided.first, divided.later);
    }
    write_pages(reached_by, &first, writer, sink)?;
    if early {
        // What was sent before of those that come later is not true any more.
        let there = without(all, &later);
        wire::present(&there, &mut |body| sink(Kind::Present, &[body]))?;
    }
    if lazy {
        wire::present(&later, &mut |body| sink(Kind::Later, &[body]))?;
    }
    Ok(later)
}

/// The ranges but what of them is in others. Both are in the order of addresses.
fn without(ranges: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out = Vec::new();
    for range in ranges {
        let mut at = range.start;
        let first = others.partition_point(|other| other.end <= range.start);
        for other in others[first..].iter().take_while(|other| other.start < range.end) {
            if at < other.start {
                out.push(at..other.start);
            }
            at = other.end;
        }
        if at < range.end {
            out.push(at..range.end);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_later_is_taken_out() {
        let all = [1..10, 20..30, 40..50];
        assert_eq!(without(&all, &[]), all);
        assert_eq!(without(&all, &[0..30, 30..60]), []);
        assert_eq!(
            without(&all, &[3..4, 8..22, 29..41]),
            [1..3, 4..8, 22..29, 41..50]
        );
    }
}
