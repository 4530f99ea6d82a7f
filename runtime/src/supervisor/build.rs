//! Building guests, and letting them go.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;
use linklayer::image::{AreaKind, Place, ProcessImage, ThreadImage};
use linklayer::pages::Kept;
use linklayer::stay::StayReason;
use linklayer::wire;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use shim::cage::Cage;
use shim::ptrace::{self, Status, Stopped, Target};
use shim::restore::{Backing, Faults};
use shim::userfault::Source;

use super::contact::Build;
use super::guest::{Guest, Thread};
use super::notify::{Pool, Turn};
use super::signals::Fix;
use super::tracer::{RESTARTSYS, Traced, Tracer};
use shim::faults::{self, Point};

/// Most timers whose overruns come with a process.
const MAX_TIMERS: usize = 64;

impl Tracer {
    /// Builds a guest and says whether it could run.
    pub(super) fn build(&mut self, mut build: Build) -> anyhow::Result<()> {
        let answer = build.answer.clone();
        let pid = build.launch.image.pid;
        let begun = build.begun;
        let mut pages = std::mem::take(&mut build.pages);
        let (keep, landed) = (build.keep_pages, std::mem::take(&mut build.landed));
        // Nobody puts pages into it any more.
        pages.leave_place();
        let refused = match self.build_guest(build, &pages) {
            Ok(()) => None,
            Err(e) => {
                self.abandon(pid, None);
                self.remove_half_built(pid);
                Some(match e.downcast::<StayReason>() {
                    Ok(reason) => reason,
                    Err(e) => StayReason::NoNode(format!("{e:#}")),
                })
            }
        };
        let built = refused.is_none();
        self.shared.objects.forget(pid);
        answer.send(&[&wire::encode(&wire::LaunchReady {
            refused,
            restore_us: begun.elapsed().as_micros() as u64,
            missing: Vec::new(),
        })]);
        if keep && built {
            self.shared.stored.keep_memory(pages, landed);
        }
        Ok(())
    }

    fn build_guest(&mut self, build: Build, pages: &Kept) -> anyhow::Result<()> {
        anyhow::ensure!(!build.needless.load(Ordering::Acquire), "the move was given up");
        faults::at(Point::TargetRestore, build.launch.image.pid).map_err(anyhow::Error::msg)?;
        let Build {
            launch,
            files,
            ahead,
            later,
            begun_by,
            ..
        } = build;
        self.shared.remember_home(&launch);
        let image = launch.image;
        let pid = image.pid;
        self.make_cage(ahead, &launch.hostname)?;
        let lacks = self.shared.lacks.get().map_or("", String::as_str);
        anyhow::ensure!(lacks.is_empty(), StayReason::Cpu(lacks.into()));
        self.await_end(pid)?;
        let objects = self.objects_of(&image);
        let mut backings: Vec<(Backing, BorrowedFd<'_>)> = files
            .iter()
            .map(|(id, stored)| (Backing::File(*id), stored.fd.as_fd()))
            .chain(
                objects
                    .iter()
                    .map(|(id, file)| (Backing::Shared(*id), file.as_fd())),
            )
            .collect();
        backings.sort_unstable_by_key(|(backing, _)| *backing);
        let mut fds: Vec<_> = backings.iter().map(|(_, fd)| *fd).collect();
        let source = match &later {
            Some(_) => Some(shim::userfault::source().map_err(anyhow::Error::msg)?),
            None => None,
        };
        if let Some(Source::Device(device)) = &source {
            fds.push(device.as_fd());
        }
        let (outer_pid, shell, fds_inside) = self.shell(pid, begun_by, &fds)?;
        let inside: HashMap<Backing, i32> = backings
            .iter()
            .map(|(backing, _)| *backing)
            .zip(fds_inside.iter().copied())
            .collect();
        let inside = |backing| inside.get(&backing).copied();
        let faults = source.as_ref().map(|source| match source {
            Source::Call => Faults::Call,
            Source::Device(_) => Faults::Device(fds_inside.last().copied().unwrap_or(-1)),
        });
        let mut built = shell
            .rebuild(&image, &inside, pages.runs(), pages.landed(), faults)
            .context("rebuilding the process")?;
        let pid_here = built.pid();
        let installed =
            shim::filter::install(pid_here, false, |nr, args| built.raw(nr, args)).context("filter")?;
        let (listener, key) = (installed.listener, installed.pass.key());
        built.show(key);
        let others = if image.threads.len() > 1 || image.leader_ended() {
            self.start_threads(&mut built)?
        } else {
            Vec::new()
        };
        let userfault = built.take_userfault();
        let stopped = built.finish_all().context("rebuilding the process")?;
        let listener = Arc::new(listener);
        let turn = Arc::new(Turn::default());
        let guest = Arc::new(Guest::new(
            pid,
            outer_pid,
            listener.clone(),
            turn.clone(),
            key,
            image.actions.clone(),
        )?);
        for (timer, overrun) in launch.overruns.into_iter().take(MAX_TIMERS) {
            guest.overruns.lock().put(timer, overrun);
        }
        if let (Some(later), Some(userfault)) = (later, userfault) {
            super::postcopy::begin(&self.shared, &guest, &image, userfault, later)?;
            self.shared.arrivals.handed_over(pid);
        }
        self.shared.guests.write().insert(pid, guest.clone());
        if image.leader_ended() {
            guest.ended.lock().insert(outer_pid);
            guest.memory.set_pid(others.first().copied().unwrap_or(outer_pid));
        }
        let leader = image.leader_ended().then_some(pid);
        let tids = leader.into_iter().chain(image.threads.iter().map(|t| t.tid));
        for (outer, tid) in std::iter::once(outer_pid).chain(others).zip(tids) {
            let thread = Arc::new(Thread::new(tid, outer, guest.clone()));
            let state = image.threads.iter().find(|t| t.tid == tid);
            let at_home =
                state.is_some_and(|t| t.rewound.is_some() && t.regs.rax == libc::SYS_restart_syscall as u64);
            thread.sleeps_at_home.store(at_home, Ordering::Release);
            // Its restart code is none of this kernel's.
            let begun = |t: &ThreadImage| t.rewound.is_some_and(|r| i64::from(r.code) == RESTARTSYS);
            thread.answered.store(state.is_some_and(begun), Ordering::Release);
            self.shared.threads.write().insert(outer, thread.clone());
            let mut traced = Traced::new(thread);
            let own = state.into_iter().flat_map(|t| &t.pending);
            let all = image.pending.iter().filter(|_| outer == outer_pid);
            traced.fixes.extend(own.chain(all).map(Fix::brought));
            self.threads.insert(outer, traced);
        }
        let sleeps = image
            .threads
            .iter()
            .filter_map(|t| Some((t.tid, t.sleep?)))
            .collect();
        self.sleeps.insert(pid, sleeps);
        self.built.insert(pid, stopped);
        Pool::start(self.shared.clone(), listener, turn);
        Ok(())
    }

    /// The shared memory that a process maps, as far as it was announced.
    fn objects_of(&self, image: &ProcessImage) -> HashMap<u64, Arc<File>> {
        image
            .areas
            .iter()
            .filter_map(|area| match area.kind {
                AreaKind::SharedAnon { id, .. } => Some((id, self.shared.objects.file(id)?)),
                _ => None,
            })
            .collect()
    }

    /// Makes the threads of a process with several. No other clone may be in the kernel meanwhile: the number of the next
    /// thread is one word for the whole cage.
    fn start_threads(&mut self, built: &mut shim::restore::Rebuilt) -> anyhow::Result<Vec<i32>> {
        let until = Instant::now() + Duration::from_secs(2);
        while self.cloning_now.is_some() {
            anyhow::ensure!(Instant::now() < until, "a clone of another guest does not end");
            let mut fds = [PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, 5u8)?;
            while let Ok(Some(_)) = self.children.read_signal() {}
            self.reports()?;
        }
        let cage = self.cage.as_ref().context("cage")?;
        built
            .start_threads(&mut |tid| cage.set_last_pid(tid - 1).map_err(std::io::Error::other))
            .context("threads")
    }

    /// An earlier guest of this pid, which executed another program, has to be gone first.
    pub(super) fn await_end(&mut self, pid: i32) -> anyhow::Result<()> {
        let Some(old) = self.shared.guests.read().get(&pid).cloned() else {
            return Ok(());
        };
        self.discard(pid)?;
        let _never_ran = self.built.remove(&pid);
        let until = Instant::now() + Duration::from_secs(2);
        while self.shared.guests.read().contains_key(&pid) {
            anyhow::ensure!(Instant::now() < until, "the former guest does not end");
            let mut fds = [PollFd::new(old.exited.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, 5u8)?;
            self.reports()?;
        }
        Ok(())
    }

    /// Kills what a failed build left in the cage.
    pub(super) fn remove_half_built(&mut self, pid: i32) {
        if let Some(cage) = &self.cage
            && let Err(e) = cage.kill_blank(pid)
        {
            tracing::debug!(error = %e, "half-built process");
        }
    }

    /// Ends everything in the cage and reaps it.
    pub(super) fn tear_down(&mut self) {
        self.begun.clear();
        let Some(cage) = self.cage.take() else { return };
        cage.kill();
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            match ptrace::wait(Target::Mine, true) {
                Ok(Some((_, Status::Stopped(stopped)))) => {
                    let _ = stopped.cont(0);
                }
                Ok(Some(_)) => {}
                Ok(None) if cage_ended(&cage) => break,
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        cage.teardown(Duration::from_millis(200));
    }

    /// A guest goes on that was moved: its relative sleeps begin anew, for what is left of them.
    pub(super) fn begin_sleeps(&mut self, pid: i32) {
        let now_ns =
            (shim::capture::clocks().monotonic_ns).saturating_add(self.shared.known_ahead().monotonic_ns);
        for (tid, sleep) in self.sleeps.remove(&pid).unwrap_or_default() {
            let begun = match sleep.place {
                Place::Timespec(at) => {
                    let guests = self.shared.guests.read();
                    let memory = guests.get(&pid).map(|guest| &guest.memory);
                    memory.map_or(Ok(()), |memory| memory.write_forced(at, &sleep.left(now_ns)))
                }
                Place::Milliseconds(_) => self
                    .standing(pid, tid)
                    .map_or(Ok(()), |stopped| {
                        let mut regs = stopped.regs()?;
                        sleep.put_left(&mut regs, now_ns);
                        stopped.set_regs(&regs)
                    })
                    .map_err(io::Error::other),
            };
            if let Err(e) = begun {
                tracing::debug!(pid, error = %e, "rest of a sleep");
            }
        }
    }

    /// A thread of a guest, named by its tid at home, that stands still.
    fn standing(&mut self, pid: i32, tid: i32) -> Option<&mut Stopped> {
        let threads = &mut self.threads;
        // A guest that has left, and come back since, may not be quite dead yet: its threads have the same numbers.
        let is_it = |stopped: &&mut Stopped| threads.get(&stopped.tid()).is_some_and(|t| t.thread.tid == tid);
        let built = self.built.get_mut(&pid).into_iter().flatten().find(is_it);
        built.or_else(|| {
            let own = threads.values_mut().filter(|t| t.thread.tid == tid);
            own.filter_map(|t| t.held.as_mut()).next()
        })
    }

    /// Home has committed: the guest runs, unless it is to stand still.
    pub(super) fn launch_go(&mut self, pid: i32) -> anyhow::Result<()> {
        let _ = faults::at(Point::TargetResume, pid);
        if !self.frozen.contains(&pid) {
            self.begin_sleeps(pid);
        }
        for stopped in self.built.remove(&pid).unwrap_or_default() {
            stopped.cont(0)?;
        }
        Ok(())
    }
}

/// Whether everything inside is dead and reaped.
fn cage_ended(cage: &Cage) -> bool {
    let mut fds = [PollFd::new(cage.ended(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
}
