//! Sending a guest home: stop, capture, send, and only when home runs it, forget it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use linklayer::frame::Header;
use linklayer::image::{Area, AreaKind, ProcessImage};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind};
use shim::memory::ProcessMemory;

use super::shared::{Command, Shared};
use super::tracer::{Hold, Tracer};

/// Most bytes of pages in one frame.
const PAGES_BYTES: usize = 256 << 10;

impl Tracer {
    /// Goes on with stopping a guest when all its threads have stopped.
    pub(super) fn all_held(&mut self, pid: i32) -> anyhow::Result<()> {
        let Some(Hold::Home(reason)) = self.holds.get(&pid) else {
            return Ok(());
        };
        let reason = reason.clone();
        let mut threads = self
            .threads
            .values()
            .filter(|t| t.thread.guest.pid == pid)
            .peekable();
        let Some(first) = threads.peek().map(|t| t.thread.clone()) else {
            return Ok(());
        };
        let leader_ended = first.guest.ended.lock().contains(&first.guest.outer);
        if !leader_ended && threads.any(|t| t.held.is_none()) {
            return Ok(());
        }
        if leader_ended {
            return self.went_home(pid, Err("its first thread has ended".into()));
        }
        match self.capture(pid) {
            Ok(image) => {
                let Some(outer) = self.shared.guests.read().get(&pid).map(|g| g.outer) else {
                    return Ok(());
                };
                send_home(&self.shared, pid, outer, image, reason)
            }
            Err(e) => self.went_home(pid, Err(format!("capture: {e:#}"))),
        }
    }

    fn capture(&mut self, pid: i32) -> anyhow::Result<ProcessImage> {
        let (outer, key) = self
            .shared
            .guests
            .read()
            .get(&pid)
            .map_or((0, 0), |g| (g.outer, g.pass_key));
        let ids: HashMap<i32, i32> = self
            .threads
            .iter()
            .filter(|(_, t)| t.thread.guest.pid == pid)
            .map(|(outer, t)| (*outer, t.thread.tid))
            .collect();
        let mut order: Vec<i32> = ids.keys().copied().collect();
        order.sort_by_key(|o| (*o != outer, *o));
        let mut tokens = order
            .iter()
            .filter_map(|o| self.threads.get_mut(o).and_then(|t| t.held.take()))
            .collect::<Vec<_>>();
        // Nothing but our memfds backs files here, and they carry their number.
        let described = shim::capture::describe(outer, &mut tokens, key, |file| {
            Err(format!(
                "{} is no file of home",
                String::from_utf8_lossy(file.path)
            ))
        });
        for token in tokens {
            if let Some(traced) = self.threads.get_mut(&token.tid()) {
                traced.held = Some(token);
            }
        }
        let mut image = described?;
        self.shares_nothing(pid, &image)?;
        image.pid = pid;
        for thread in &mut image.threads {
            if let Some(own) = self.threads.get(&thread.tid) {
                super::deadline::keep(&own.thread, thread);
            }
            thread.tid = ids.get(&thread.tid).copied().unwrap_or(thread.tid);
        }
        Ok(image)
    }

    /// Whether no other guest sees the memory of this one: at home it would be another memory.
    fn shares_nothing(&self, pid: i32, image: &ProcessImage) -> anyhow::Result<()> {
        let guests = self.shared.guests.read();
        for guest in guests.values() {
            let with = *guest.shares_with.lock();
            anyhow::ensure!(
                with.is_none() || (guest.pid != pid && with != Some(pid)),
                "its memory is that of another process (CLONE_VM)"
            );
        }
        let mut shared: Vec<(u64, u64, u64)> = image
            .areas
            .iter()
            .filter_map(|a| match a.kind {
                AreaKind::SharedAnon { id, offset, .. } => Some((id, offset, offset + (a.end - a.start))),
                _ => None,
            })
            .collect();
        if shared.is_empty() {
            return Ok(());
        }
        shared.sort_unstable();
        anyhow::ensure!(
            shared.windows(2).all(|w| w[0].0 != w[1].0 || w[0].2 <= w[1].1),
            "it maps the same shared memory twice"
        );
        for guest in guests.values().filter(|g| g.pid != pid) {
            let lines = shim::capture::map_lines(guest.memory.pid(), false).unwrap_or_default();
            anyhow::ensure!(
                !lines.iter().any(|l| l.shared
                    && l.path.starts_with(b"/dev/zero")
                    && shared.iter().any(|s| s.0 == l.ino)),
                "it shares memory with process {}",
                guest.pid
            );
        }
        Ok(())
    }

    /// Home runs the process now, or it goes on here.
    pub(super) fn went_home(&mut self, pid: i32, result: Result<(), String>) -> anyhow::Result<()> {
        match result {
            Ok(()) => {
                let Some(guest) = self.shared.guests.read().get(&pid).cloned() else {
                    return Ok(());
                };
                guest.leaving.store(true, Ordering::Release);
                // What is left of it dies thread by thread, and must not be taken for a guest that is to be captured.
                self.holds.remove(&pid);
                let outer = nix::unistd::Pid::from_raw(guest.outer);
                nix::sys::signal::kill(outer, nix::sys::signal::Signal::SIGKILL)?;
                Ok(())
            }
            Err(why) => {
                tracing::error!(pid, why, "does not go home; it goes on here");
                if matches!(self.holds.get(&pid), Some(Hold::Home(StayReason::Call { .. })))
                    && let Some(guest) = self.shared.guests.read().get(&pid)
                {
                    guest.refused.store(true, Ordering::Release);
                }
                let body = wire::MoveFailed { pid, why };
                self.shared.tell(pid, Kind::MoveFailed, &wire::encode(&body));
                self.release(pid)
            }
        }
    }
}

fn send_home(
    shared: &Arc<Shared>,
    pid: i32,
    outer: i32,
    image: ProcessImage,
    reason: StayReason,
) -> anyhow::Result<()> {
    let shared = shared.clone();
    std::thread::Builder::new()
        .name("homeward".into())
        .spawn(move || {
            let result = transfer(&shared, pid, outer, image, reason).map_err(|e| format!("{e:#}"));
            shared.post(Command::WentHome(pid, result));
        })?;
    Ok(())
}

fn transfer(
    shared: &Shared,
    pid: i32,
    outer: i32,
    image: ProcessImage,
    reason: StayReason,
) -> anyhow::Result<()> {
    let areas = image.areas.clone();
    let body = wire::Homecoming {
        image,
        reason,
        group: vec![pid],
    };
    let wire::Errno(errno) = wire::decode(&shared.ask(pid, pid, Kind::Homecoming, &wire::encode(&body))?)?;
    anyhow::ensure!(
        errno == 0,
        "layout at home: {}",
        nix::errno::Errno::from_raw(errno).desc()
    );
    send_pages(shared, pid, outer, &areas)?;
    let commit = wire::encode(&wire::Pid(pid));
    let wire::Errno(errno) = wire::decode(&shared.ask(pid, pid, Kind::HomeCommit, &commit)?)?;
    anyhow::ensure!(
        errno == 0,
        "resuming at home: {}",
        nix::errno::Errno::from_raw(errno).desc()
    );
    Ok(())
}

fn send_pages(shared: &Shared, pid: i32, outer: i32, areas: &[Area]) -> anyhow::Result<()> {
    let link = shared.link()?;
    let memory = ProcessMemory::new(outer);
    for area in areas.iter().filter(|a| !a.is_kernel()) {
        for run in shim::capture::page_runs(outer, area)? {
            let mut at = run.start;
            while at < run.end {
                let len = ((run.end - at) as usize).min(PAGES_BYTES);
                let mut data = vec![0; len];
                memory.read_forced(at, &mut data)?;
                if matches!(area.kind, AreaKind::SharedAnon { .. }) && data.iter().all(|b| *b == 0) {
                    at += len as u64;
                    continue;
                }
                let header = Header::new(Kind::Pages as u16, pid, link.next_seq());
                link.send(pid as u32, header, &[&at.to_le_bytes(), &data])?;
                at += len as u64;
            }
        }
    }
    Ok(())
}
