//! Sending a process that stands still to where it is built.

use std::io;
use std::time::Instant;

use linklayer::pages::Writer;
use linklayer::pages::known::Known;
use linklayer::quic::{Link, LinkError};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, Launch, LaunchReady, Malformed, MoveReport, Place};
use thiserror::Error;

use super::{all_runs, write_pages};
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
/// until it stands ready. `report` gets what that took.
///
/// # Errors
/// See [`SendError`].
pub fn send_process(
    link: &Link,
    launch: &Launch,
    reached_by: i32,
    tracker: Option<&Tracker>,
    writer: &mut Writer,
    report: &mut MoveReport,
) -> Result<(), SendError> {
    let pid = launch.image.pid;
    let begun = Instant::now();
    let all = all_runs(reached_by, &launch.image.areas)?;
    link.tell(pid, pid, Kind::Launch, &[&wire::encode(launch)])?;
    let mut sink = |kind, parts: &[&[u8]]| link.tell(pid, pid, kind, parts).map_err(io::Error::other);
    match tracker {
        Some(tracker) => {
            write_pages(reached_by, &tracker.round()?, writer, &mut sink)?;
            wire::present(&all, &mut |body| sink(Kind::Present, &[body]))?;
        }
        None => write_pages(reached_by, &all, writer, &mut sink)?,
    }
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
    Ok(())
}
