//! Sending a process that stands still to where it is built.

use std::io;
use std::time::Instant;

use linklayer::pages::Writer;
use linklayer::quic::{Link, LinkError};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, Launch, LaunchReady, Malformed, MoveReport};
use thiserror::Error;

use super::{all_runs, write_pages};
use crate::track::Tracker;

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
    let answer = link.ask(pid, Kind::LaunchBuild, &wire::encode(&wire::Pid(pid)))?;
    let ready: LaunchReady = wire::decode(&answer)?;
    if let Some(reason) = ready.refused {
        return Err(SendError::Refused(reason));
    }
    let waited = asked.elapsed().as_micros() as u64;
    report.times.restore_us = ready.restore_us.min(waited);
    report.times.transfer_us = waited - report.times.restore_us;
    Ok(())
}
