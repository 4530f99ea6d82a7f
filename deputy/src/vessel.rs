//! The vessel's life: children, exec, exit, signals, interruption, as its guest asks for them.

use std::sync::Arc;

use anyhow::Context;
use linklayer::image::{AreaKind, ProcessImage, SigAction, SigInfo};
use linklayer::quic::ReplyTo;
use linklayer::stay::StayReason;
use linklayer::syscall::{self, CallView};
use linklayer::wire::{self, FileRef, Kind, MoveReport};
use shim::faults::{self, Point};
use shim::ptrace::{self, Stop, Stopped};
use shim::vessel::{Slot, Vessel};

use crate::calls::{self, Worker};
use crate::home::Home;
use crate::launch::Namer;
use crate::outward::{Done, reason_of};
use crate::process::{Away, Cloning, Mode, Process, Role, Task, Waiter, send};
use crate::signals;

/// A vessel, and the signals that were pending for single threads of its process.
type Emptied = (Vessel, Vec<(i32, SigInfo)>);

/// ERESTARTNOINTR: a call that was not begun is made again, unseen (include/linux/errno.h).
const NOT_BEGUN: i64 = -513;

impl Home {
    /// Describes a process, all of whose threads are stopped (the leader first), for another node.
    pub(crate) fn describe(
        &mut self,
        pid: i32,
        mut threads: Vec<Stopped>,
        tracked: bool,
    ) -> (Vec<Stopped>, anyhow::Result<(ProcessImage, Vec<FileRef>)>) {
        if self
            .processes
            .get(&pid)
            .and_then(|p| p.pager.as_ref())
            .is_some_and(|p| p.is_open())
        {
            let why = anyhow::anyhow!("its memory is still coming from where it was before");
            return (threads, Err(why));
        }
        if let Err(why) = faults::at(Point::SourceDump, pid) {
            return (threads, Err(anyhow::Error::msg(why)));
        }
        let shared = self.shared.clone();
        let mut namer = Namer::new(&shared, threads.first().map_or(pid, Stopped::tid));
        let described = shim::capture::describe_tracked(pid, &mut threads, 0, tracked, |f| {
            namer
                .name(f.start, f.end, f.dev, f.ino, f.path)
                .map_err(|e| reason_of(&e))
        });
        let described = described.map_err(anyhow::Error::from).and_then(|mut image| {
            if let Some(reason) = unmovable(&image) {
                return Err(reason.into());
            }
            self.carry(&image);
            // Those that have not begun anew since it came home.
            if let Some(process) = self.processes.get(&pid) {
                for (tid, sleep) in &process.sleeps {
                    let thread = image.threads.iter_mut().find(|t| t.tid == *tid);
                    thread.into_iter().for_each(|t| t.sleep = Some(*sleep));
                }
            }
            Ok((image, namer.files()))
        });
        if Home::outlived() {
            // They stand before the delivery of a SIGTRAP of ours, which would kill them if the deputy ended.
            for thread in threads.iter_mut().filter(|t| t.stop() == Stop::Interrupt) {
                if let Err(e) = thread.settle() {
                    tracing::debug!(pid, error = %e, "thread of a process that was described");
                }
            }
        }
        (threads, described)
    }

    /// Turns a process, all of whose threads are stopped (the leader first), into a vessel, whose pages may be kept for the moment
    /// (`keep`). When that fails while the process is whole, its threads are given back.
    pub(crate) fn empty(
        &mut self,
        pid: i32,
        mut threads: Vec<Stopped>,
        keep: bool,
    ) -> Result<Emptied, (Vec<Stopped>, shim::vessel::VesselError)> {
        set_options(&mut threads, Home::vessel_options());
        let prepared = Vessel::prepare(threads, &self.arena).map_err(|(mut whole, e)| {
            set_options(&mut whole, Home::options());
            (whole, e)
        })?;
        let (vessel, mut parts) = prepared.settle(keep).map_err(|e| (Vec::new(), e))?;
        let pending = std::mem::take(&mut parts.pending);
        self.furnish(pid, parts);
        Ok((vessel, pending))
    }

    /// Takes the threads of a new vessel into the books.
    pub(crate) fn furnish(&mut self, pid: i32, parts: shim::vessel::Parts) {
        for (tid, slot) in parts.workers {
            self.add_worker(pid, tid, slot);
        }
        self.shared.catchers.write().insert(pid, parts.catcher);
        self.tasks
            .insert(parts.catcher, Task::new(parts.catcher, pid, Role::Catcher));
        for (tid, signals) in parts.unblocked {
            if let Some(task) = self.tasks.get_mut(&tid) {
                task.unblocked |= signals;
            }
        }
        for tid in parts.listening {
            if let Some(task) = self.tasks.get_mut(&tid) {
                task.group_stopped = true;
            }
        }
        if let Some(process) = self.processes.get_mut(&pid) {
            process.actions = parts.actions;
        }
    }

    pub(crate) fn add_worker(&mut self, pid: i32, tid: i32, slot: Slot) {
        self.tasks.insert(tid, Task::new(tid, pid, Role::Worker));
        let worker = Arc::new(Worker::new(tid, pid, slot));
        self.shared.workers.write().insert(tid, worker);
    }

    /// A thread of a vessel stopped.
    pub(crate) fn vessel_stop(&mut self, pid: i32, tid: i32, mut stopped: Stopped) -> anyhow::Result<()> {
        if matches!(stopped.stop(), Stop::Interrupt | Stop::Group(_))
            && let Some(task) = self.tasks.get_mut(&tid)
        {
            if !task.unblocking.is_empty() {
                stopped.set_sigmask(shim::vessel::WORKER_MASK & !task.unblocked)?;
                for (pending, ret) in task.unblocking.drain(..) {
                    pending.finish(ret);
                }
            }
            self.expose_further(pid, tid, &mut stopped)?;
            stopped = self.catcher_acts(pid, tid, stopped)?;
        }
        match stopped.stop() {
            Stop::Signal(sig) => self.vessel_signal(pid, tid, sig, stopped),
            Stop::Group(_) => {
                let task = self.tasks.get_mut(&tid).context("thread of the vessel")?;
                task.group_stopped = true;
                if let Some(seq) = task.interrupting.take()
                    && let Some(worker) = self.shared.worker(tid)
                    && *worker.current.lock() == Some(seq)
                {
                    Vessel::withdraw_call(&mut stopped, &worker.slot)?;
                }
                if task.lent {
                    stopped.cont(0)?;
                } else {
                    stopped.listen()?;
                }
                let process = self.processes.get_mut(&pid).context("process of the vessel")?;
                let Some(away) = process.away() else { return Ok(()) };
                // Another thread's report of this stop may come late, when the catcher has taken the SIGCONT that ended it.
                let catcher = tid == away.vessel.catcher();
                away.continued &= !catcher;
                let parked = if catcher {
                    std::mem::take(&mut away.parked)
                } else {
                    Vec::new()
                };
                if !away.frozen {
                    away.frozen = true;
                    away.say_frozen(pid);
                }
                // Stopped anew before they could go on: the kernel stops them at once.
                for worker in parked {
                    if let Err(e) = worker.cont(0) {
                        tracing::debug!(error = %e, "worker that is stopped anew");
                    }
                }
                Ok(())
            }
            Stop::Fork(child) | Stop::Vfork(child) | Stop::Clone(child) => {
                let task = self.tasks.get_mut(&tid).context("thread that clones")?;
                if let Some(cloning) = task.cloning.as_mut() {
                    cloning.child = Some(child);
                }
                stopped.cont(0)?;
                self.child_appears(tid)
            }
            Stop::Interrupt => self.vessel_interrupted(pid, tid, stopped),
            _ => Ok(stopped.cont(0)?),
        }
    }

    fn vessel_interrupted(&mut self, pid: i32, tid: i32, mut stopped: Stopped) -> anyhow::Result<()> {
        if let Some(process) = self.processes.get_mut(&pid) {
            process.give_gathered();
        }
        let task = self.tasks.get_mut(&tid).context("thread of the vessel")?;
        let interrupting = task.interrupting.take();
        let resumed = std::mem::take(&mut task.group_stopped);
        if let Some(seq) = interrupting {
            let worker = self.shared.worker(tid).context("worker")?;
            if *worker.current.lock() == Some(seq) {
                Vessel::abort_call(&mut stopped, &worker.slot)?;
            }
        }
        if !resumed {
            return Ok(stopped.cont(0)?);
        }
        let catcher = task.role == Role::Catcher;
        let process = self.processes.get_mut(&pid).context("process of the vessel")?;
        let Some(away) = process.away() else {
            return Ok(stopped.cont(0)?);
        };
        if catcher {
            // It is about to take the SIGCONT.
            return Ok(stopped.cont(0)?);
        }
        if !away.continued && !signals::continued_thread(pid) {
            away.parked.push(stopped);
            return Ok(());
        }
        away.thaw(pid);
        self.leave_stop(pid, stopped)
    }

    /// Interrupts a call in progress: it ends in its slot with the kernel's raw restart code, or with its result when
    /// that was faster.
    pub(crate) fn interrupt(&mut self, request: wire::Interrupt) -> anyhow::Result<()> {
        let Some(worker) = self.shared.worker(request.tid) else {
            return Ok(());
        };
        if *worker.current.lock() != Some(request.seq) {
            return Ok(());
        }
        if let Some(pending) = self.not_exposed_yet(worker.pid, request.tid) {
            pending.finish(NOT_BEGUN);
            return Ok(());
        }
        if let Some(task) = self.tasks.get_mut(&request.tid) {
            task.interrupting = Some(request.seq);
            ptrace::interrupt(request.tid)?;
        }
        Ok(())
    }

    // --- children and threads

    pub(crate) fn clone_in_vessel(&mut self, reply: ReplyTo, request: wire::Clone) -> anyhow::Result<()> {
        let tid = reply.header.tid;
        let (Some(worker), Some(task)) = (self.shared.worker(tid), self.tasks.get_mut(&tid)) else {
            return Ok(());
        };
        let slot = match self.arena.allocate() {
            Ok(slot) => slot,
            Err(e) => {
                tracing::error!(error = %e, "no slot for a child");
                let body = wire::CloneReply {
                    tid: -i64::from(libc::EAGAIN),
                    pidfd: -1,
                };
                reply.send(&[&wire::encode(&body)]);
                return Ok(());
            }
        };
        worker.slot.post_clone(request.flags, request.exit_signal, &slot);
        task.cloning = Some(Cloning {
            reply,
            request,
            slot: Some(slot),
            child: None,
            ret: None,
            ready: false,
        });
        calls::watch_clone(&self.shared, worker);
        Ok(())
    }

    pub(crate) fn clone_ended(&mut self, tid: i32, ret: i64) -> anyhow::Result<()> {
        let Some(cloning) = self.tasks.get_mut(&tid).and_then(|t| t.cloning.as_mut()) else {
            return Ok(());
        };
        cloning.ret = Some(ret);
        self.child_appears(tid)
    }

    /// A stopped child whose parent may have told of it by now.
    pub(crate) fn stray_appears(&mut self, child: i32) -> anyhow::Result<()> {
        let parent = self
            .tasks
            .values()
            .find(|t| t.cloning.as_ref().is_some_and(|c| c.child == Some(child)));
        match parent.map(|t| t.tid) {
            Some(tid) => self.child_appears(tid),
            None => Ok(()),
        }
    }

    /// Goes on with a clone as far as the events that have been seen allow: the child is set up when its parent told
    /// its id and it has stopped; the answer is sent when also the parent's call has ended.
    fn child_appears(&mut self, tid: i32) -> anyhow::Result<()> {
        let Some(task) = self.tasks.get_mut(&tid) else {
            return Ok(());
        };
        let pid = task.pid;
        let Some(cloning) = task.cloning.as_mut() else {
            return Ok(());
        };
        if let Some(ret) = cloning.ret.filter(|r| *r < 0) {
            let body = wire::CloneReply { tid: ret, pidfd: -1 };
            cloning.reply.send(&[&wire::encode(&body)]);
            task.cloning = None;
            return Ok(());
        }
        if !cloning.ready {
            let Some(child) = cloning.child else { return Ok(()) };
            let Some(stray) = self.strays.remove(&child) else {
                return Ok(());
            };
            cloning.ready = true;
            let slot = cloning.slot.take().context("slot of the child")?;
            let flags = cloning.request.flags;
            let reply = cloning.reply.clone();
            self.set_up_child(pid, child, flags, stray, slot, &reply)?;
        }
        let Some(cloning) = self.tasks.get_mut(&tid).and_then(|t| t.cloning.as_mut()) else {
            return Ok(());
        };
        if let (Some(child), Some(_), true) = (cloning.child, cloning.ret, cloning.ready) {
            let pidfd = if cloning.request.flags & libc::CLONE_PIDFD as u64 != 0 {
                self.shared.worker(tid).map_or(-1, |w| w.slot.clone_pidfd())
            } else {
                -1
            };
            let body = wire::CloneReply {
                tid: i64::from(child),
                pidfd,
            };
            cloning.reply.send(&[&wire::encode(&body)]);
            if let Some(task) = self.tasks.get_mut(&tid) {
                task.cloning = None;
            }
        }
        Ok(())
    }

    fn set_up_child(
        &mut self,
        parent: i32,
        child: i32,
        flags: u64,
        stray: Stopped,
        slot: Slot,
        reply: &ReplyTo,
    ) -> anyhow::Result<()> {
        if flags & libc::CLONE_THREAD as u64 != 0 {
            self.add_worker(parent, child, slot);
            stray.cont(0)?;
            return Ok(());
        }
        let process = self.processes.get_mut(&parent).context("parent of the child")?;
        let mut actions = process.actions.clone();
        if flags & shim::clone_rewrite::CLONE_CLEAR_SIGHAND != 0 {
            for action in actions.iter_mut().filter(|action| action.handler > 1) {
                *action = Default::default();
            }
        }
        let away = process.away().context("vessel of the parent")?;
        let node = away.node;
        let memory = away.vessel.memory;
        let inherits = away.has_pages && flags & libc::CLONE_VM as u64 == 0;
        let (mut vessel, stray, catcher) = Vessel::adopt_child(stray, inherits)?;
        if flags & libc::CLONE_VM as u64 != 0 {
            vessel.memory = memory;
        }
        let mut born = Process::new(
            child,
            Mode::Away(Box::new(Away::new(vessel, node, reply.link.clone()))),
        );
        born.actions = actions;
        born.how = "forked there";
        self.processes.insert(child, born);
        self.add_worker(child, child, slot);
        self.shared.catchers.write().insert(child, catcher);
        self.tasks
            .insert(catcher, Task::new(catcher, child, Role::Catcher));
        self.publish(child);
        stray.cont(0)?;
        Ok(())
    }

    // --- exec and exit

    pub(crate) fn exec_in_vessel(&mut self, reply: ReplyTo, request: wire::Exec) -> anyhow::Result<()> {
        let tid = reply.header.tid;
        let Some(worker) = self.shared.worker(tid) else {
            return Ok(());
        };
        if !crate::held::may_exec(&self.shared, tid, worker.pid, &reply) {
            return Ok(());
        }
        let posted = CallView::parse(&request.call).map(|view| {
            let known = [libc::SYS_execve as u32, libc::SYS_execveat as u32].contains(&view.nr);
            let args = syscall::place(&view, &worker.slot, worker.slot.data_address());
            (known, view.nr, args)
        });
        match posted {
            Ok((true, nr, args)) => worker.slot.post(u64::from(nr), args),
            Ok((false, ..)) => {
                reply.errno(libc::EPROTO);
                return Ok(());
            }
            Err(e) => {
                tracing::error!(error = %e, "exec");
                reply.errno(libc::EPROTO);
                return Ok(());
            }
        }
        if let Some(task) = self.tasks.get_mut(&tid) {
            task.executing = Some((reply, request));
        }
        if let Some(away) = self.processes.get_mut(&worker.pid).and_then(|p| p.away()) {
            away.sent.hold();
        }
        calls::watch_exec(&self.shared, worker);
        Ok(())
    }

    pub(crate) fn exec_failed(&mut self, tid: i32, ret: i64) -> anyhow::Result<()> {
        let Some(task) = self.tasks.get_mut(&tid) else {
            return Ok(());
        };
        let pid = task.pid;
        self.shared.held.settle(pid);
        let Some((reply, _)) = task.executing.take() else {
            return Ok(());
        };
        self.send_held(pid);
        reply.errno(i32::try_from(-ret).unwrap_or(libc::EIO));
        Ok(())
    }

    pub(crate) fn exit_thread(&mut self, reply: ReplyTo, code: i32) -> anyhow::Result<()> {
        let tid = reply.header.tid;
        let Some(worker) = self.shared.workers.write().remove(&tid) else {
            return Ok(());
        };
        let last = !self
            .tasks
            .values()
            // A leader that ended before is still here.
            .any(|t| t.pid == worker.pid && t.tid != tid && self.shared.worker(t.tid).is_some());
        if last {
            // The catcher would keep the process alive.
            self.post_end(&worker, libc::SYS_exit_group, code);
        } else {
            self.post_end(&worker, libc::SYS_exit, code);
        }
        if let Some(task) = self.tasks.get_mut(&tid) {
            task.ends = Some(worker.clone());
        }
        if tid == worker.pid && !last {
            // A leader that ends first stays as a zombie, and its tracer is not told.
            reply.errno(0);
        } else if let Some(task) = self.tasks.get_mut(&tid) {
            task.ending = Some((reply, last));
        }
        Ok(())
    }

    pub(crate) fn exit_group(&mut self, reply: ReplyTo, code: i32) -> anyhow::Result<()> {
        let Some(worker) = self.shared.worker(reply.header.tid) else {
            return Ok(());
        };
        self.post_end(&worker, libc::SYS_exit_group, code);
        reply.errno(0);
        Ok(())
    }

    fn post_end(&self, worker: &Worker, nr: i64, code: i32) {
        worker.slot.post(nr as u64, [code as u64, 0, 0, 0, 0, 0]);
    }

    /// The guest was killed by a signal of its own: its process dies of the same.
    pub(crate) fn die(&mut self, pid: i32, signal: i32) -> anyhow::Result<()> {
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        if !(1..=64).contains(&signal) {
            return Ok(());
        }
        if process.away().is_none() {
            // It has executed something meanwhile, which handles nothing yet.
            return Ok(shim::signal::kill_process(pid, signal)?);
        }
        process.dying = Some(signal);
        let mut workers = self
            .tasks
            .values()
            .filter(|t| t.pid == pid && t.cloning.is_none() && t.executing.is_none())
            .filter_map(|t| self.shared.worker(t.tid));
        let idle = workers.find(|w| w.current.lock().is_none());
        match idle.filter(|_| signal != libc::SIGKILL) {
            // Not here: the vessel may be stopped, and only this thread lets it go on.
            Some(worker) => calls::set_default(&self.shared, worker, signal),
            None => self.die_now(pid, signal)?,
        }
        Ok(())
    }

    /// The vessel's disposition of the signal of which it dies is the default.
    pub(crate) fn die_now(&mut self, pid: i32, signal: i32) -> anyhow::Result<()> {
        let catcher = self
            .tasks
            .values()
            .find(|t| t.pid == pid && t.role == Role::Catcher)
            .map(|t| t.tid);
        let Some(catcher) = catcher else {
            return Ok(shim::signal::kill_process(pid, signal)?);
        };
        // Only the flag that a core was dumped is wanted, not the vessel's memory.
        let _ = std::fs::write(format!("/proc/{pid}/coredump_filter"), "0");
        Ok(shim::signal::kill_thread(pid, catcher, signal)?)
    }

    /// Keeps the vessel's disposition equal to the guest's: what is ignored decides what the kernel does with children,
    /// terminals and exec.
    pub(crate) fn action(&mut self, change: wire::Action) -> anyhow::Result<()> {
        let Some(process) = self.processes.get_mut(&change.pid) else {
            return Ok(());
        };
        let [handler, flags, restorer, mask] = change.action;
        if let Some(action) = process.actions.get_mut((change.signal - 1).max(0) as usize) {
            *action = SigAction {
                handler,
                flags,
                restorer,
                mask,
            };
        }
        // What is ignored from now on is not pending any more, and nothing may come after it.
        process.give_gathered();
        Ok(())
    }

    // --- coming home

    pub(crate) fn bring(
        &mut self,
        pid: i32,
        reason: StayReason,
        mode: wire::Mode,
        done: Done,
    ) -> anyhow::Result<()> {
        let Some(process) = self.processes.get_mut(&pid) else {
            let _ = done.send(Err(format!("process {pid} is not one of this job")));
            return Ok(());
        };
        match &process.mode {
            Mode::Native => {
                let _ = done.send(Ok(MoveReport::default()));
            }
            Mode::Launching(..) => {
                let _ = done.send(Err(format!("process {pid} is being moved at this moment")));
            }
            Mode::Away(_) if process.hop.is_some() => {
                let _ = done.send(Err(format!("process {pid} is being moved at this moment")));
            }
            Mode::Away(_) if let (true, Err(why)) = (mode.is_lazy(), crate::postcopy::possible_here()) => {
                let why = format!("process {pid} cannot run at home before its memory has come: {why}");
                let _ = done.send(Err(why));
            }
            Mode::Away(away) => {
                let attempt = crate::shared::next_id();
                send(
                    &away.link,
                    pid,
                    Kind::Bring,
                    &wire::encode(&wire::Bring {
                        pid,
                        attempt,
                        reason,
                        mode,
                        postcopy: mode.is_lazy() || crate::postcopy::possible_here().is_ok(),
                    }),
                );
                process.waiters.push(Waiter { attempt, done });
            }
        }
        Ok(())
    }
}

/// Gives threads these options. One that is gone needs none.
pub(crate) fn set_options(threads: &mut [Stopped], options: ptrace::Options) {
    for thread in threads {
        if let Err(e) = thread.set_options(options) {
            tracing::debug!(tid = thread.tid(), error = %e, "options");
        }
    }
}

/// What in an image forbids to build it elsewhere.
fn unmovable(image: &ProcessImage) -> Option<StayReason> {
    image.areas.iter().find_map(|area| match area.kind {
        AreaKind::SharedAnon { sysv: true, .. } => Some(StayReason::SharedMemory),
        _ if crate::launch::shared_writable(area) => Some(StayReason::SharedMapping),
        _ => None,
    })
}
