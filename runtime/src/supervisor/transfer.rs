//! What a group of captured guests takes home with it, on its way.

use std::collections::HashSet;
use std::sync::Arc;

use linklayer::frame::Header;
use linklayer::image::ProcessImage;
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, Vfork};
use shim::capture::SharedObjects;
use shim::memory::ProcessMemory;

use super::shared::{Command, Shared};

/// Most bytes of pages in one frame.
const PAGES_BYTES: usize = 256 << 10;

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
pub(super) fn start(shared: &Arc<Shared>, first: i32, members: Vec<Member>) {
    let starter = shared.starter.clone();
    let shared = shared.clone();
    starter.start("homeward", move || {
        let result = send(&shared, members).map_err(|e| format!("{e:#}"));
        shared.post(Command::WentHome(first, result));
    });
}

fn errno(answer: &[u8], what: &str) -> anyhow::Result<()> {
    let wire::Errno(errno) = wire::decode(answer)?;
    let why = nix::errno::Errno::from_raw(errno).desc();
    anyhow::ensure!(errno == 0, "{what} at home: {why}");
    Ok(())
}

fn send(shared: &Shared, members: Vec<Member>) -> anyhow::Result<()> {
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
    let mut spaces = HashSet::new();
    let coming = |m: &&Member| group.contains(&m.pid);
    for member in members.iter().filter(coming).filter(|m| spaces.insert(m.space)) {
        send_pages(shared, lane, member)?;
    }
    let link = shared.link()?;
    // Home's new objects are empty.
    shared_memory.read(&mut |id, offset, data| {
        let header = Header::new(Kind::SharedPages as u16, lane, link.next_seq());
        let parts = [&id.to_le_bytes()[..], &offset.to_le_bytes(), data];
        link.send(lane as u32, header, &parts)
            .map_err(std::io::Error::other)
    })?;
    let commit = wire::encode(&wire::HomeCommit { group });
    errno(&shared.ask(lane, lane, Kind::HomeCommit, &commit)?, "resuming")
}

fn send_pages(shared: &Shared, lane: i32, member: &Member) -> anyhow::Result<()> {
    let link = shared.link()?;
    let memory = ProcessMemory::new(member.reached_by);
    for area in member.image.areas.iter().filter(|a| !a.is_kernel()) {
        for run in shim::capture::page_runs(member.reached_by, area)? {
            let mut at = run.start;
            while at < run.end {
                let len = ((run.end - at) as usize).min(PAGES_BYTES);
                let mut data = vec![0; len];
                memory.read_forced(at, &mut data)?;
                let header = Header::new(Kind::Pages as u16, member.pid, link.next_seq());
                link.send(lane as u32, header, &[&at.to_le_bytes(), &data])?;
                at += len as u64;
            }
        }
    }
    Ok(())
}
