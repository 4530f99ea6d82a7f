//! Processes come home: their vessels take their layouts, their pages and their threads' state, and are the processes again.
//!
//! Processes that share memory come together. Each is announced and laid out by itself; one commit makes all of them run.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use linklayer::image::ProcessImage;
use linklayer::pages::Landed;
use linklayer::quic::ReplyTo;
use linklayer::stay::StayReason;
use linklayer::wire::{self, MoveReport, Times};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim::faults::{self, Point};
use shim::ptrace::{self, Stopped};
use shim::vessel::{Vessel, VesselError};

use crate::calls::{self, Worker};
use crate::home::{Home, unless_gone};
use crate::hop::Hop;
use crate::kept::Kept;
use crate::process::{Mode, Process, Role, Task};
use crate::shared::Command;

impl Home {
    /// Its image is there: the vessel's layout is made equal to it. The guest is stopped and stays the live copy until
    /// the commit.
    pub(crate) fn homecoming(&mut self, reply: ReplyTo, body: wire::Homecoming) -> anyhow::Result<()> {
        let pid = body.image.pid;
        if !self.processes.contains_key(&pid) {
            // Killed meanwhile: those who come with it come without it, as the supervisor will hear.
            reply.errno(libc::ESRCH);
            return Ok(());
        }
        let (shared, later) = (self.shared.clone(), reply.clone());
        let again = move |body| shared.post(Command::Homecoming(later, Box::new(body)));
        let Some(body) = crate::held::may_come(&self.shared, &reply, body, again) else {
            return Ok(());
        };
        match self.prepare_home(&body) {
            Ok(Some((worker, node))) => {
                let in_vessel = self.in_vessel(pid, body.early);
                self.lay_out(worker, node, reply, body, in_vessel)
            }
            Ok(None) => self.laid_out(&reply, body, Ok(Duration::ZERO)),
            Err(e) => self.laid_out(&reply, body, Err(e)),
        }
    }

    /// What was put into the memory of a vessel, and whether that is of an attempt that did not come about (or all of it is): then it has to
    /// go. With `early`, what came while the guest ran is of this one.
    fn in_vessel(&mut self, pid: i32, early: bool) -> (Landed, bool) {
        let memory = |process: &Process| match &process.mode {
            Mode::Away(away) => Some((away.vessel.memory, away.has_pages)),
            _ => None,
        };
        let own = self
            .processes
            .get(&pid)
            .and_then(memory)
            .map(|(memory, _)| memory);
        let same = self
            .processes
            .values()
            .filter_map(|process| match memory(process) {
                Some((its, true)) if Some(its) == own => Some(process.pid),
                _ => None,
            });
        let same: Vec<i32> = same.collect();
        let landed = same.iter().find_map(|pid| self.shared.coming.landed(*pid));
        match landed {
            Some(landed) if early => (landed, false),
            _ => {
                for pid in &same {
                    // Nothing more is put there.
                    self.shared.coming.leave_room(*pid);
                }
                (Landed::default(), !same.is_empty())
            }
        }
    }

    /// Has the vessel take the layout. This waits for the vessel, which may be stopped, and only this thread lets it go on:
    /// another waits. A group-stop does not hold up the thread that does it.
    fn lay_out(
        &mut self,
        worker: Arc<Worker>,
        node: u32,
        reply: ReplyTo,
        body: wire::Homecoming,
        (landed, stale): (Landed, bool),
    ) -> anyhow::Result<()> {
        let begun = Instant::now();
        let (shared, tid) = (self.shared.clone(), worker.tid);
        self.lend(tid, true)?;
        calls::in_turn(&self.shared, tid, move || {
            crate::contact::spawn("layout", move || {
                if let Err(why) = faults::at(Point::TargetRestore, body.image.pid) {
                    let failed = Err(anyhow::Error::msg(why));
                    return shared.post(Command::LaidOut(reply, Box::new(body), failed));
                }
                let (files, objects) = (&shared.files, &shared.objects);
                let dropped = if stale {
                    Vessel::drop_by_worker(body.image.reached_by(), &worker.slot)
                } else {
                    Ok(())
                };
                let file = |id| files.file(id);
                let object = |id| objects.file((node, id));
                let keeper = |id| shared.held.keeper(id);
                let adapted = dropped.and_then(|()| {
                    Vessel::adapt_layout(&body.image, &worker.slot, &file, &object, &keeper, &landed)
                });
                let watched = adapted.and_then(|()| {
                    if body.postcopy {
                        let made = Vessel::make_userfault(tid, &worker.slot)?;
                        shared.coming.userfault(body.image.pid, made);
                    }
                    Ok(())
                });
                let result = watched.map(|()| begun.elapsed()).map_err(anyhow::Error::from);
                shared.post(Command::LaidOut(reply, Box::new(body), result));
            });
        });
        Ok(())
    }

    /// Has a thread of a vessel work for us in spite of a group-stop, or not any more.
    fn lend(&mut self, tid: i32, lent: bool) -> anyhow::Result<()> {
        match self.tasks.get_mut(&tid) {
            Some(task) if task.lent != lent => {
                task.lent = lent;
                match task.group_stopped {
                    true => unless_gone(ptrace::interrupt(tid)),
                    false => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    /// The vessel has the layout of its image, for which it took some time, or could not take it.
    pub(crate) fn laid_out(
        &mut self,
        reply: &ReplyTo,
        body: wire::Homecoming,
        result: anyhow::Result<Duration>,
    ) -> anyhow::Result<()> {
        let (pid, tid) = (body.image.pid, body.image.reached_by());
        self.lend(tid, false)?;
        match result {
            Ok(took) => {
                self.shared.homecoming.lock().insert(pid, tid);
                if let Some(away) = self.processes.get_mut(&pid).and_then(|p| p.away()) {
                    away.has_pages = true;
                    away.coming = Some((Box::new(body), took));
                }
                reply.errno(0);
                Ok(())
            }
            Err(e) => {
                self.shared.objects.forget(pid);
                self.shared.held.settle(pid);
                reply.errno(libc::EIO);
                Err(e.context(format!("process {pid} cannot come home")))
            }
        }
    }

    /// Checks what is announced. Gives the worker that is to make the layout, and the node of its guest; nothing when it is
    /// made already.
    fn prepare_home(&mut self, body: &wire::Homecoming) -> anyhow::Result<Option<(Arc<Worker>, u32)>> {
        body.image.validate()?;
        let pid = body.image.pid;
        for thread in &body.image.threads {
            let worker = self
                .shared
                .worker(thread.tid)
                .context("a thread without a vessel thread")?;
            anyhow::ensure!(
                worker.pid == pid,
                "thread {} belongs to another process",
                thread.tid
            );
            anyhow::ensure!(
                worker.current.lock().is_none(),
                "thread {} is in a call",
                thread.tid
            );
        }
        let process = self.processes.get_mut(&pid).context("no such process")?;
        let away = process.away().context("it is at home")?;
        let (node, memory) = (away.node, away.vessel.memory);
        let laid_out = self.processes.values().any(|other| {
            let Mode::Away(away) = &other.mode else {
                return false;
            };
            other.pid != pid && away.vessel.memory == memory && away.coming.is_some()
        });
        if laid_out {
            // The memory is one, and its layout was made by whoever was announced first.
            return Ok(None);
        }
        for object in &body.objects {
            let reserved = shim::capture::reserves(&body.image, object.id);
            self.shared
                .objects
                .announce((node, object.id), pid, object.size, reserved)
                .context("shared memory")?;
        }
        let worker = self
            .shared
            .worker(body.image.reached_by())
            .context("a process without threads")?;
        Ok(Some((worker, node)))
    }

    /// All their pages are there: they run at home from now on.
    pub(crate) fn home_commit(&mut self, reply: ReplyTo, body: &wire::HomeCommit) -> anyhow::Result<()> {
        match self.resume_home(&body.group) {
            Ok(()) => {
                reply.errno(0);
                Ok(())
            }
            Err(e) => {
                reply.errno(libc::EIO);
                Err(e.context("processes cannot be resumed at home"))
            }
        }
    }

    fn resume_home(&mut self, group: &[i32]) -> anyhow::Result<()> {
        // First what can fail: afterwards there is no way back.
        let mut spaces = HashSet::new();
        for process in group.iter().filter_map(|pid| self.processes.get(pid)) {
            match &process.mode {
                Mode::Away(away) if away.coming.is_some() => spaces.insert(away.vessel.memory),
                _ => anyhow::bail!("process {} was not announced", process.pid),
            };
        }
        let left = self.processes.values().find(|process| {
            let Mode::Away(away) = &process.mode else {
                return false;
            };
            !group.contains(&process.pid) && spaces.contains(&away.vessel.memory)
        });
        if let Some(left) = left {
            anyhow::bail!("process {} has the same memory and does not come", left.pid);
        }
        let begun = Instant::now();
        for pid in group {
            faults::at(Point::TargetResume, *pid).map_err(anyhow::Error::msg)?;
            self.begin_to_run_early(*pid)?;
        }
        let mut layouts = HashMap::new();
        let mut vessels = Vec::new();
        for pid in group {
            self.shared.homecoming.lock().remove(pid);
            self.shared.held.settle(*pid);
            self.shared.objects.forget(*pid);
            self.shared.coming.forget(*pid);
            // One that was killed meanwhile does not come.
            let Some(process) = self.processes.get_mut(pid) else {
                continue;
            };
            let Mode::Away(mut away) = std::mem::replace(&mut process.mode, Mode::Native) else {
                continue;
            };
            // What was pending when it left is known no longer than for that: others may look alike.
            let carried = std::mem::take(&mut process.carried);
            // Whoever left a group-stop just now is stopped again, like the others.
            for worker in std::mem::take(&mut away.parked) {
                unless_gone(worker.cont(0))?;
            }
            if let Some((mut coming, layout_took)) = away.coming {
                if let Some(kept) = away.kept.take() {
                    add_kept(&mut coming.image, kept);
                }
                layouts.insert(*pid, layout_took);
                vessels.push(((away.vessel, carried), coming));
            }
        }
        let (vessels, coming): (Vec<_>, Vec<_>) = vessels.into_iter().unzip();
        for body in &coming {
            self.make_native(body.image.pid);
        }
        let mut gathered = Vec::new();
        for ((vessel, mut carried), body) in vessels.into_iter().zip(&coming) {
            let memory = vessel.memory;
            match vessel.gather(&body.image, &mut carried) {
                Ok(homebound) => gathered.push((homebound, memory, body)),
                Err(e) => lost(body.image.pid, &e),
            }
        }
        // Their content has been written, and they are mapped: whoever waits for them can have them.
        let held = coming.iter().flat_map(|body| body.held.iter().copied());
        self.shared.held.finish(held);
        let mut cleared = HashSet::new();
        let mut running = Vec::new();
        for (homebound, memory, body) in gathered {
            match homebound.finish(!cleared.contains(&memory)) {
                Ok(mut threads) => {
                    self.remember_waits(&body.image);
                    crate::vessel::set_options(&mut threads, Home::options());
                    cleared.insert(memory);
                    running.push((threads, body));
                }
                Err(e) => lost(body.image.pid, &e),
            }
        }
        for (threads, body) in running {
            let pid = body.image.pid;
            if let Some(process) = self.processes.get_mut(&pid) {
                process.sleeps = (body.image.threads.iter())
                    .filter_map(|t| Some((t.tid, t.sleep?)))
                    .collect();
            }
            for stopped in threads {
                self.resume_thread(stopped, body, group)?;
            }
        }
        // Whoever is told that one of them has come finds all of them here.
        for body in &coming {
            self.note_arrival(body.image.pid, &body.reason);
        }
        for body in coming {
            let times = Times {
                restore_us: layouts.get(&body.image.pid).map_or(0, |d| d.as_micros() as u64),
                resume_us: begun.elapsed().as_micros() as u64,
                ..Times::default()
            };
            self.came_home(body.image.pid, times);
        }
        Ok(())
    }

    /// The threads of a process are its own again, and its vessel's are no more.
    fn make_native(&mut self, pid: i32) {
        let tids: Vec<i32> = self
            .tasks
            .values()
            .filter(|t| t.pid == pid)
            .map(|t| t.tid)
            .collect();
        for tid in tids {
            if let Some(worker) = self.shared.workers.write().remove(&tid) {
                worker.slot.abandon();
            }
            let task = self.tasks.remove(&tid);
            // The catcher is about to end; the process does not wait for the report of that.
            if task.is_some_and(|t| t.role == Role::Worker) {
                self.tasks.insert(tid, Task::new(tid, pid, Role::Native));
            }
        }
    }

    /// Lets a thread of a process at home run, but for one that waits until the child of its vfork(2) gives the memory back.
    fn resume_thread(
        &mut self,
        stopped: Stopped,
        body: &wire::Homecoming,
        group: &[i32],
    ) -> anyhow::Result<()> {
        let (pid, tid) = (body.image.pid, stopped.tid());
        let borrowed = body
            .vforks
            .iter()
            .find(|v| v.tid == tid && group.contains(&v.child) && self.processes.contains_key(&v.child));
        match (borrowed, self.processes.get_mut(&pid)) {
            (Some(vfork), Some(process)) => {
                process.vforking += 1;
                self.vforked.insert(vfork.child, (pid, stopped));
                Ok(())
            }
            _ => {
                // If the vessel was stopped by job control, it goes on to be so.
                self.let_go_unless_gone(stopped)
            }
        }
    }

    /// A child that borrowed its parent's memory away has executed a program at home, or has ended.
    pub(crate) fn memory_returned(&mut self, child: i32) {
        let Some((parent, stopped)) = self.vforked.remove(&child) else {
            return;
        };
        self.vfork_done(parent);
        if let Err(e) = stopped.cont(0) {
            tracing::debug!(parent, error = %e, "parent of a vfork");
        }
    }

    fn note_arrival(&mut self, pid: i32, reason: &StayReason) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        match reason {
            StayReason::Asked => tracing::info!(pid, "came home: somebody asked"),
            StayReason::SharedMemory => tracing::info!(pid, "came home with those whose memory it shares"),
            reason => tracing::warn!(pid, %reason, "came home"),
        }
        process.stay = Some(reason.clone());
        process.how = "came home";
        process.moves_home += 1;
        self.publish(pid);
    }

    /// Tells those who wait for it, and sends it on if that was asked.
    fn came_home(&mut self, pid: i32, times: Times) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        let mut report = self
            .shared
            .progress
            .lock()
            .remove(&pid)
            .map(|p| p.report)
            .unwrap_or_default();
        report.times += times;
        if process.pager.is_some() {
            // It is told when the last page is here.
            let waiters = std::mem::take(&mut process.waiters);
            process.came = Some((waiters, report));
            return;
        }
        self.tell_of_homecoming(pid, report);
    }

    /// A process that came home is complete.
    pub(crate) fn tell_of_homecoming(&mut self, pid: i32, mut report: MoveReport) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        for waiter in process.waiters.drain(..) {
            let _ = waiter.done.send(Ok(report.clone()));
        }
        // It came home on its own before it could go to the other node.
        let next = process
            .next
            .take()
            .or_else(|| process.hop.take().map(Hop::cancel));
        if let Some(mut wish) = next {
            if let Some(before) = wish.before.take() {
                report.note = before.note;
            }
            wish.before = Some(report);
            self.shared.post(Command::Out(pid, Box::new(wish)));
        }
    }
}

/// Adds what arrived while the guest stood still to what is pending for it.
fn add_kept(image: &mut ProcessImage, kept: Kept) {
    for (tid, info) in kept.signals() {
        match image.threads.iter_mut().find(|t| t.tid == tid) {
            Some(thread) => thread.pending.push(info),
            None if tid == 0 => image.pending.push(info),
            // What is for one thread alone ends with that.
            None => {}
        }
    }
}

/// A vessel could not become its process after the commit. It was killed; if not, it is neither here nor away.
fn lost(pid: i32, error: &VesselError) {
    if error.is_gone() {
        tracing::debug!(pid, %error, "killed on its way home");
        return;
    }
    tracing::error!(pid, %error, "lost on its way home; it is killed");
    if let Err(e) = kill(Pid::from_raw(pid), Signal::SIGKILL) {
        tracing::debug!(pid, error = %e, "kill");
    }
}
