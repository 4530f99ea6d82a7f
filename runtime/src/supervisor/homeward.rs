//! Sending guests home: stop, capture, send, and only when home runs them, forget them.
//!
//! Guests that share memory go together, all or none: those that map the same anonymous memory shared, and those that have
//! one address space (vfork(2), CLONE_VM). Who belongs to a group is found when its first members stand still; whoever is
//! found then is stopped too, until there is nobody left who could see the memory change.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use linklayer::image::ProcessImage;
use linklayer::stay::StayReason;
use linklayer::wire::{Phase, Times, Vfork};
use shim::capture::{held_by, shared_objects};

use super::departure::{self, Departure, Failure};
use super::guest::Guest;
use super::shared::{Command, Shared};
use super::tracer::{Hold, RESTARTNOINTR, Tracer};
use super::transfer::{self, Member};
use shim::faults::{self, Point};

impl Tracer {
    /// Goes on with stopping a guest when all its threads have stopped.
    pub(super) fn all_held(&mut self, pid: i32) -> anyhow::Result<()> {
        if self.is_incomplete(pid) {
            // It is looked at again when it has all of its memory.
            return Ok(());
        }
        match self.holds.get(&pid) {
            Some(Hold::Home { first, .. }) => {
                let first = *first;
                self.group_held(first)
            }
            Some(Hold::Node | Hold::Track) => self.alone_held(pid),
            Some(Hold::Stopped) | None => Ok(()),
        }
    }

    /// Goes on with a guest that does not go home.
    fn alone_held(&mut self, pid: i32) -> anyhow::Result<()> {
        let Some(guest) = self.shared.guests.read().get(&pid).cloned() else {
            return Ok(());
        };
        if !self.stands_still(&guest) {
            return Ok(());
        }
        if matches!(self.holds.get(&pid), Some(Hold::Track)) {
            return self.track_held(pid);
        }
        if !self.is_quiet(&[pid]) {
            return Ok(());
        }
        self.departure_held(&guest)
    }

    /// Goes on with a group when everybody in it stands still.
    pub(super) fn group_held(&mut self, first: i32) -> anyhow::Result<()> {
        let members: Vec<Arc<Guest>> = {
            let guests = self.shared.guests.read();
            self.group(first)
                .iter()
                .filter_map(|pid| guests.get(pid).cloned())
                .collect()
        };
        let ready = |guest: &Arc<Guest>| self.stands_still(guest) && guest.memory.pager().is_none();
        if members.is_empty() || !members.iter().all(ready) || self.is_homing(&members) {
            return Ok(());
        }
        let pids: Vec<i32> = members.iter().map(|guest| guest.pid).collect();
        let wanted = |pid: &i32| matches!(self.holds.get(pid), Some(Hold::Home { reason, .. }) if *reason != StayReason::SharedMemory);
        if !pids.iter().any(wanted) {
            // Who had a reason to go home has ended.
            return pids.into_iter().try_for_each(|pid| self.release(pid));
        }
        let more = self.relatives(&members);
        if !more.is_empty() {
            for pid in &more {
                self.join(*pid, first);
            }
            for pid in more {
                self.stop_threads(pid)?;
            }
            return self.group_held(first);
        }
        if !self.is_quiet(&pids) {
            return Ok(());
        }
        let since = self.since.remove(&first).unwrap_or_else(Instant::now);
        let mut times = Times {
            seize_us: since.elapsed().as_micros() as u64,
            ..Times::default()
        };
        let begun = Instant::now();
        let captured = self.capture_group(&members);
        let number = self.next_homing;
        self.next_homing += 1;
        match captured {
            Ok(captured) => {
                times.dump_us = begun.elapsed().as_micros() as u64;
                transfer::start(&self.shared, number, (captured, members.clone()), times);
                self.homing.insert(number, members);
                Ok(())
            }
            Err(e) => {
                self.homing.insert(number, members);
                self.went_home(number, Err(Failure::new(Phase::Dump, format!("{e:#}"))))
            }
        }
    }

    /// Whether one of these guests, and not an earlier one of its pid, is on its way home.
    fn is_homing(&self, guests: &[Arc<Guest>]) -> bool {
        let mut on_the_way = self.homing.values().flatten();
        on_the_way.any(|one| guests.iter().any(|guest| Arc::ptr_eq(guest, one)))
    }

    fn group(&self, group: i32) -> Vec<i32> {
        let mut pids: Vec<i32> = self
            .holds
            .iter()
            .filter(|(_, hold)| matches!(hold, Hold::Home { first, .. } if *first == group))
            .map(|(pid, _)| *pid)
            .collect();
        pids.sort_unstable();
        pids
    }

    /// Takes a guest into a group, with those who were going home with it.
    fn join(&mut self, pid: i32, group: i32) {
        let before = match self.holds.get(&pid) {
            Some(Hold::Home { first, .. }) => Some(*first),
            _ => None,
        };
        match before {
            Some(before) => {
                for hold in self.holds.values_mut() {
                    match hold {
                        Hold::Home { first, .. } if *first == before => *first = group,
                        _ => {}
                    }
                }
            }
            None => {
                let reason = StayReason::SharedMemory;
                self.holds.insert(pid, Hold::Home { first: group, reason });
            }
        }
    }

    /// Whether no thread of a guest runs.
    fn stands_still(&self, guest: &Guest) -> bool {
        let mut threads = self
            .threads
            .values()
            .filter(|t| t.thread.guest.pid == guest.pid)
            .peekable();
        let ended = |outer: i32| guest.ended.lock().contains(&outer) && shim::process::has_ended(outer);
        threads.peek().is_some()
            && threads.all(|t| t.held.is_some() || t.vfork.is_some() || ended(t.thread.outer))
    }

    /// The guests outside of a group that share memory with one inside.
    pub(super) fn relatives(&self, members: &[Arc<Guest>]) -> Vec<i32> {
        let spaces: HashSet<u64> = members.iter().map(|guest| guest.space).collect();
        let objects_of = |guest: &Guest| shared_objects(guest.memory.pid());
        let objects: HashSet<(u64, u64)> = members.iter().flat_map(|guest| objects_of(guest)).collect();
        let held: HashSet<u64> = members.iter().flat_map(|guest| self.held_of(guest)).collect();
        self.shared
            .guests
            .read()
            .values()
            .filter(|guest| !members.iter().any(|member| member.pid == guest.pid))
            .filter(|guest| {
                spaces.contains(&guest.space)
                    || (!held.is_empty() && self.held_of(guest).iter().any(|id| held.contains(id)))
                    || (!objects.is_empty() && objects_of(guest).iter().any(|id| objects.contains(id)))
            })
            .map(|guest| guest.pid)
            .collect()
    }

    /// The held files that a guest maps, has mapped, or is about to map.
    fn held_of(&self, guest: &Guest) -> Vec<u64> {
        let mut ids = self.shared.held.of(guest.pid);
        if !self.shared.held.is_empty() {
            ids.extend(held_by(guest.memory.pid()));
        }
        ids
    }

    fn capture_group(&mut self, members: &[Arc<Guest>]) -> anyhow::Result<Vec<Member>> {
        let mut captured = Vec::new();
        for guest in members {
            faults::at(Point::SourceDump, guest.pid).map_err(anyhow::Error::msg)?;
            let (image, vforks) = self
                .capture(guest)
                .map_err(|e| e.context(format!("process {}", guest.pid)))?;
            let reason = match self.holds.get(&guest.pid) {
                Some(Hold::Home { reason, .. }) => reason.clone(),
                _ => StayReason::SharedMemory,
            };
            captured.push(Member {
                pid: guest.pid,
                reached_by: guest.memory.pid(),
                space: guest.space,
                image,
                reason,
                vforks,
                // What was made ready for another node is of no use.
                own: self.departures.remove(&guest.pid).filter(Departure::goes_home),
            });
        }
        Ok(captured)
    }

    /// Describes a guest that stands still.
    pub(super) fn capture(&mut self, guest: &Guest) -> anyhow::Result<(ProcessImage, Vec<Vfork>)> {
        let pid = guest.pid;
        let ids: HashMap<i32, i32> = self
            .threads
            .iter()
            .filter(|(_, t)| t.thread.guest.pid == pid)
            .map(|(outer, t)| (*outer, t.thread.tid))
            .collect();
        let mut order: Vec<i32> = ids.keys().copied().collect();
        order.sort_by_key(|o| (*o != guest.outer, *o));
        let mut vforks = HashMap::new();
        let mut tokens = Vec::new();
        for outer in order {
            let Some(traced) = self.threads.get_mut(&outer) else {
                continue;
            };
            if let Some((child, token)) = traced.vfork.take() {
                vforks.insert(outer, child);
                tokens.push(token);
            } else if let Some(token) = traced.held.take() {
                tokens.push(token);
            }
        }
        // Nothing but our memfds backs files here, and they carry their number. Whoever watches its memory is one of us, be it for
        // another process with the same memory: userfaultfd(2) runs at home.
        let described =
            shim::capture::describe_tracked(guest.outer, &mut tokens, guest.pass_key, true, |file| {
                let path = String::from_utf8_lossy(file.path).into_owned();
                Err(StayReason::LostFile(path))
            });
        for token in tokens {
            let outer = token.tid();
            if let Some(traced) = self.threads.get_mut(&outer) {
                match vforks.get(&outer) {
                    Some(child) => traced.vfork = Some((*child, token)),
                    None => traced.held = Some(token),
                }
            }
        }
        let mut image = described?;
        image.pid = pid;
        self.true_pending(guest.outer, &mut image.pending);
        let ahead = self.shared.known_ahead();
        for thread in &mut image.threads {
            self.true_pending(thread.tid, &mut thread.pending);
            if let Some(own) = self.threads.get(&thread.tid) {
                match &mut thread.rewound {
                    Some(rewound)
                        if super::tracer::not_begun(&own.thread, rewound.nr, i64::from(rewound.code)) =>
                    {
                        rewound.code = RESTARTNOINTR as i32;
                        if i64::from(rewound.nr) != libc::SYS_restart_syscall {
                            // The last wait that is known was another one.
                            *own.thread.sleep.lock() = None;
                        }
                    }
                    _ => {}
                }
                super::deadline::keep(own, thread, ahead.monotonic_ns)?;
            }
            thread.tid = ids.get(&thread.tid).copied().unwrap_or(thread.tid);
            // One that has not begun anew since it came.
            let own = self.sleeps.get(&pid).into_iter().flatten();
            if let Some((_, sleep)) = own.into_iter().find(|(tid, _)| *tid == thread.tid) {
                thread.sleep = Some(*sleep);
            }
        }
        let vforks = vforks
            .into_iter()
            .filter_map(|(outer, child)| Some((*ids.get(&outer)?, child)))
            .map(|(tid, child)| Vfork { tid, child })
            .collect();
        Ok((image, vforks))
    }

    /// A guest runs elsewhere now.
    pub(super) fn forget_guest(&mut self, guest: &Guest) -> anyhow::Result<()> {
        guest.vacate();
        // What is left of it dies thread by thread, and must not be taken for a guest that is to be captured.
        self.holds.remove(&guest.pid);
        self.quiet.remove(&guest.pid);
        let outer = nix::unistd::Pid::from_raw(guest.outer);
        nix::sys::signal::kill(outer, nix::sys::signal::Signal::SIGKILL)?;
        Ok(())
    }

    /// Home runs a group now, or it goes on here.
    pub(super) fn went_home(&mut self, number: u64, result: Result<(), Failure>) -> anyhow::Result<()> {
        let members = self.homing.remove(&number).unwrap_or_default();
        for guest in members {
            let pid = guest.pid;
            if !self.is_here(&guest) {
                // It has ended; its process may have executed a program at home and be back with that already.
                continue;
            }
            match &result {
                Ok(()) => {
                    let _ = faults::at(Point::SourceAfter, pid);
                    self.shared.held.forget(self.held_of(&guest));
                    self.forget_guest(&guest)?;
                }
                Err(failure) => {
                    self.shared.held.stay(self.held_of(&guest));
                    let why = &failure.why;
                    if matches!(
                        self.holds.get(&pid),
                        Some(Hold::Home {
                            reason: StayReason::Call { .. },
                            ..
                        })
                    ) {
                        tracing::error!(
                            pid,
                            why,
                            "cannot go home for its call yet; it will be tried again"
                        );
                        guest.set_back();
                    }
                    departure::failed(&self.shared, pid, failure.clone(), None);
                    self.release(pid)?;
                }
            }
        }
        Ok(())
    }
}

/// Asks the tracer after a pause to send a guest home.
pub(super) fn go_home_after(shared: &Arc<Shared>, pid: i32, reason: StayReason, pause: Duration) {
    if pause.is_zero() {
        return shared.post(Command::GoHome(pid, reason));
    }
    let starter = shared.starter.clone();
    let shared = shared.clone();
    starter.start("again", move || {
        std::thread::sleep(pause);
        shared.post(Command::GoHome(pid, reason));
    });
}
