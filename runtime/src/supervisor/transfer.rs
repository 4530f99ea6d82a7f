//! What a group of captured guests takes home with it, on its way.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use linklayer::frame::Header;
use linklayer::image::ProcessImage;
use linklayer::pages::Writer;
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, Phase, Times, Vfork};
use shim::capture::SharedObjects;

use super::departure;
use super::shared::{Command, Shared};

/// A captured guest.
pub(super) struct Member {
    pub(super) pid: i32,
    /// A thread of it, as seen here, by which its memory is reached.
    pub(super) reached_by: i32,
    /// Number of its address space.
    pub(super) space: u64,
    pub(super) image: ProcessImage,
    pub(super) reason: StayReason,
    pub(super) vforks: Vec<Vfork>,
}

/// Sends a group home on a thread of its own, and says so to the tracer.
pub(super) fn start(shared: &Arc<Shared>, first: i32, members: Vec<Member>, times: Times) {
    let starter = shared.starter.clone();
    let shared = shared.clone();
    starter.start("homeward", move || {
        let result = send(&shared, members, times).map_err(|e| format!("{e:#}"));
        shared.post(Command::WentHome(first, result));
    });
}

fn errno(answer: &[u8], what: &str) -> anyhow::Result<()> {
    let wire::Errno(errno) = wire::decode(answer)?;
    let why = nix::errno::Errno::from_raw(errno).desc();
    anyhow::ensure!(errno == 0, "{what} at home: {why}");
    Ok(())
}

fn send(shared: &Shared, members: Vec<Member>, times: Times) -> anyhow::Result<()> {
    let mut group: Vec<i32> = members.iter().map(|m| m.pid).collect();
    let shared_memory = SharedObjects::of(members.iter().map(|m| (m.reached_by, &m.image)));
    let lane = group.first().copied().unwrap_or_default();
    for member in &members {
        let body = wire::Homecoming {
            image: member.image.clone(),
            reason: member.reason.clone(),
            group: group.clone(),
            objects: shared_memory.named_by(&member.image),
            vforks: member.vforks.clone(),
        };
        let body = wire::encode(&body);
        let answer = shared.ask(lane, member.pid, Kind::Homecoming, &body)?;
        if wire::decode::<wire::Errno>(&answer)?.0 == libc::ESRCH {
            // Killed at home; it is about to be removed here.
            group.retain(|pid| *pid != member.pid);
            continue;
        }
        errno(&answer, "layout")?;
    }
    let begun = Instant::now();
    let mut writer = Writer::default();
    let mut spaces = HashSet::new();
    let coming = |m: &&Member| group.contains(&m.pid);
    for member in members.iter().filter(coming).filter(|m| spaces.insert(m.space)) {
        send_pages(shared, lane, member, &mut writer)?;
    }
    let link = shared.link()?;
    // Home's new objects are empty.
    shared_memory.read(&mut |id, offset, data| {
        let header = Header::new(Kind::SharedPages as u16, lane, link.next_seq());
        let parts = [&id.to_le_bytes()[..], &offset.to_le_bytes(), data];
        link.send(lane as u32, header, &parts)
            .map_err(std::io::Error::other)
    })?;
    let mut report = wire::MoveReport {
        times,
        pages: writer.counts,
        mode: wire::Mode::Freeze,
        ..wire::MoveReport::default()
    };
    report.times.pages_us = begun.elapsed().as_micros() as u64;
    for pid in &group {
        departure::tell_progress(shared, *pid, lane, Phase::Resume, report.clone(), 0);
    }
    let commit = wire::encode(&wire::HomeCommit { group });
    errno(&shared.ask(lane, lane, Kind::HomeCommit, &commit)?, "resuming")
}

fn send_pages(shared: &Shared, lane: i32, member: &Member, writer: &mut Writer) -> anyhow::Result<()> {
    let link = shared.link()?;
    let runs = shim::capture::all_runs(member.reached_by, &member.image.areas)?;
    shim::capture::write_pages(member.reached_by, &runs, writer, &mut |kind, parts| {
        let header = Header::new(kind as u16, member.pid, link.next_seq());
        link.send(lane as u32, header, parts)
            .map_err(std::io::Error::other)
    })?;
    Ok(())
}
