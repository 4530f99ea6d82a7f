//! The tracer thread: everything at home that needs ptrace.
//!
//! One OS thread owns every tracee (ptrace is per thread). It sleeps until a tracee reports something or another
//! thread posts a [`Command`]. Processes at home are only watched for fork, exec and exit; those whose guests are
//! away are vessels.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use shim::ptrace::{self, Status, Stop, Stopped, Target};
use shim::timed::{Looker, Timed};

use crate::process::{Mode, Process, Role, Task};
use crate::shared::{Command, Shared};

/// Whether processes at home go on when the deputy, of which there is one in a process, ends.
static OUTLIVE: AtomicBool = AtomicBool::new(false);

/// The tracer's own state.
pub struct Home {
    pub(crate) shared: Arc<Shared>,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    children: SignalFd,
    /// Processes of the job.
    pub(crate) processes: HashMap<i32, Process>,
    /// Their threads.
    pub(crate) tasks: HashMap<i32, Task>,
    /// Stopped children whose parent's event has not been seen yet.
    pub(crate) strays: HashMap<i32, Stopped>,
    pub(crate) arena: shim::vessel::Arena,
    /// Groups of processes that are being stopped to leave home, by the one that was asked for.
    pub(crate) together: HashMap<i32, crate::together::Together>,
    /// Threads at home that wait for the child of a vfork(2) that they made away, with their processes, by that child.
    pub(crate) vforked: HashMap<i32, (i32, Stopped)>,
    /// The process and thread whose call ends only when the signals that it sent have been relayed.
    pub(crate) settling: Option<(i32, i32)>,
    /// Who is told that the job was let go, while that is being done.
    pub(crate) releasing: Option<Sender<Result<(), String>>>,
}

impl Home {
    /// Takes over the calling thread as the tracer. SIGCHLD must be blocked in every thread of this process.
    ///
    /// # Errors
    /// When the kernel gives no signalfd or no arena.
    pub fn new(shared: Arc<Shared>, commands: Receiver<Command>, wake: Arc<EventFd>) -> anyhow::Result<Home> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        set.thread_block()?;
        let children = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Home {
            shared,
            commands,
            wake,
            children,
            processes: HashMap::new(),
            tasks: HashMap::new(),
            strays: HashMap::new(),
            arena: shim::vessel::Arena::new()?,
            together: HashMap::new(),
            vforked: HashMap::new(),
            settling: None,
            releasing: None,
        })
    }

    /// Options for processes at home. Those of a job whose processes may be away end with their deputy, so that no half of a job is
    /// left; those that were started to be at home, or were there before the deputy, go on.
    pub fn options() -> ptrace::Options {
        if OUTLIVE.load(Ordering::Acquire) {
            ptrace::usual_options()
        } else {
            Home::vessel_options()
        }
    }

    /// Whether processes at home go on when this deputy ends.
    pub(crate) fn outlived() -> bool {
        OUTLIVE.load(Ordering::Acquire)
    }

    /// Lets processes at home outlive this deputy. To be called before any is seized.
    pub fn let_outlive() {
        OUTLIVE.store(true, Ordering::Release);
    }

    /// Options for vessels: without its deputy one would wait for ever.
    pub fn vessel_options() -> ptrace::Options {
        ptrace::usual_options() | ptrace::Options::PTRACE_O_EXITKILL
    }

    /// Takes up the job's first process, which the caller has seized.
    pub fn adopt_first(&mut self, pid: i32) {
        self.add_process(pid, Mode::Native);
    }

    /// Serves the job until its last process has ended.
    ///
    /// # Errors
    /// Those of poll(2) and waitpid(2), which leave the job without a deputy: its processes are then killed, but for those at home that
    /// outlive it ([`Home::options`]).
    pub fn run(&mut self) -> anyhow::Result<()> {
        while !self.tasks.is_empty() {
            let mut fds = [
                PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            if fds[1].revents().is_some_and(|r| !r.is_empty()) {
                let _ = self.wake.read();
            }
            while let Ok(Some(_)) = self.children.read_signal() {}
            self.reports()?;
            while let Ok(command) = self.commands.try_recv() {
                self.command(command);
                self.reports()?;
            }
        }
        if let Some(done) = self.releasing.take() {
            let _ = done.send(Ok(()));
        }
        Ok(())
    }

    /// Handles what tracees have to report.
    pub(crate) fn reports(&mut self) -> anyhow::Result<()> {
        while let Some((tid, status)) = ptrace::wait(Target::Any, true)? {
            self.report(tid, status);
        }
        Ok(())
    }

    pub(crate) fn add_process(&mut self, pid: i32, mode: Mode) {
        self.processes.insert(pid, Process::new(pid, mode));
        self.tasks.insert(pid, Task::new(pid, pid, Role::Native));
        self.publish(pid);
    }

    fn report(&mut self, tid: i32, status: Status) {
        match status {
            Status::Exited(_) | Status::Signaled { .. } => self.gone(tid),
            Status::Stopped(stopped) => {
                if !self.tasks.contains_key(&tid) {
                    // The first stop of a child may come before the event of its parent.
                    self.strays.insert(tid, stopped);
                    if let Err(e) = self.stray_appears(tid) {
                        tracing::error!(tid, error = format!("{e:#}"), "new child not set up");
                    }
                    return;
                }
                if let Err(e) = self.stopped(tid, stopped)
                    && !e
                        .downcast_ref::<ptrace::PtraceError>()
                        .is_some_and(ptrace::PtraceError::is_gone)
                {
                    tracing::error!(tid, error = format!("{e:#}"), "tracee not handled");
                }
            }
        }
    }

    fn stopped(&mut self, tid: i32, stopped: Stopped) -> anyhow::Result<()> {
        let pid = self.tasks[&tid].pid;
        if let Stop::Exec { former_tid } = stopped.stop() {
            return self.executed(pid, former_tid, stopped);
        }
        let stop = stopped.stop();
        match self.tasks[&tid].role {
            Role::Native => self.native_stop(pid, tid, stopped)?,
            Role::Worker | Role::Catcher => self.vessel_stop(pid, tid, stopped)?,
        }
        self.interrupt_again(pid, tid, stop)
    }

    /// Any stop takes an interrupt away that was asked for and has not come about (kernel/signal.c, ptrace_stop): a thread that goes on
    /// is interrupted again when it is to stand still, or, in a vessel, to do something.
    fn interrupt_again(&mut self, pid: i32, tid: i32, stop: Stop) -> anyhow::Result<()> {
        let goes_on = !matches!(stop, Stop::Interrupt | Stop::Group(_) | Stop::Exit { .. });
        let Some(task) = self.tasks.get(&tid).filter(|_| goes_on) else {
            return Ok(());
        };
        let own = task.interrupting.is_some() || !task.unblocking.is_empty() || task.exposure.is_some();
        let process = self.processes.get(&pid);
        let wanted = match (task.role, process.map(|p| &p.mode)) {
            (Role::Native, Some(Mode::Native)) => process.is_some_and(Process::is_to_be_held),
            (Role::Native, _) => false,
            (Role::Catcher, Some(Mode::Away(away))) => own || away.exposed.waits(),
            _ => own,
        };
        if wanted {
            let native = self.tasks.get_mut(&tid).filter(|task| task.role == Role::Native);
            if let Some(task) = native {
                task.seen = Looker::default().look(tid);
            }
            return unless_gone(ptrace::interrupt(tid));
        }
        Ok(())
    }

    /// A thread of a process that runs at home.
    fn native_stop(&mut self, pid: i32, tid: i32, stopped: Stopped) -> anyhow::Result<()> {
        if self.releasing.is_some() {
            return self.detach(stopped);
        }
        if stopped.stop() != Stop::Interrupt
            && let Some(task) = self.tasks.get_mut(&tid)
        {
            // What it waits in from now on is not what was seen.
            (task.seen, task.timed) = (None, None);
        }
        match stopped.stop() {
            Stop::Signal(sig) => {
                if sig == nix::libc::SIGTRAP && self.at_entry(pid, &stopped)? {
                    return self.begin_launch(pid, stopped);
                }
                let mut stopped = stopped;
                if ![libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&sig) {
                    crate::restarts::make_restart(&mut stopped)?;
                }
                stopped.cont(sig)?;
            }
            Stop::Group(_) => {
                let leaves = self.processes.get(&pid).is_some_and(Process::stops_to_leave);
                if leaves {
                    return self.held(pid, stopped);
                }
                self.let_go(stopped)?;
            }
            Stop::Interrupt => {
                let mut stopped = stopped;
                let task = self.tasks.get_mut(&tid);
                if let Some(task) = task
                    && !std::mem::take(&mut task.group_stopped)
                {
                    task.timed = Timed::of(&stopped, task.seen.take(), task.timed)?;
                    crate::restarts::make_restart(&mut stopped)?;
                }
                self.held(pid, stopped)?;
            }
            Stop::VforkDone(_) => {
                self.vfork_done(pid);
                stopped.cont(0)?;
            }
            Stop::Fork(child) | Stop::Vfork(child) | Stop::Clone(child) => {
                if let (Stop::Vfork(_), Some(process)) = (stopped.stop(), self.processes.get_mut(&pid)) {
                    process.vforking += 1;
                }
                self.native_child(pid, child);
                stopped.cont(0)?;
                if let Some(first) = self.processes.get(&pid).and_then(|p| p.together) {
                    self.together_progress(first)?;
                }
            }
            _ => stopped.cont(0)?,
        }
        Ok(())
    }

    /// A child or thread of a process at home: it is at home too.
    fn native_child(&mut self, parent: i32, child: i32) {
        let owner = shim::process::of_thread(child).unwrap_or(child);
        if owner == parent {
            self.tasks.insert(child, Task::new(child, parent, Role::Native));
            if self.processes.get(&parent).is_some_and(Process::is_to_be_held) {
                // Its first stop may be over already.
                let _ = ptrace::interrupt(child);
            }
        } else {
            self.add_process(child, Mode::Native);
            self.inherit_pager(parent, child);
            if let Some(entry) = self.processes.get(&parent).and_then(|p| p.breakpoint.clone()) {
                // A copy of the parent before its entry point carries the breakpoint too; it does not move.
                let _ = entry.remove(child);
            }
        }
        if let Some(stray) = self.strays.remove(&child) {
            let _ = stray.cont(0);
        }
    }

    /// A thread or process has ended and was reaped by this tracer; its real parent can wait for it now.
    fn gone(&mut self, tid: i32) {
        self.strays.remove(&tid);
        let Some(mut task) = self.tasks.remove(&tid) else {
            return;
        };
        if let Some(worker) = self.shared.workers.write().remove(&tid) {
            worker.slot.abandon();
        }
        task.end_calls();
        self.exposed_gone(task.pid, tid);
        if let Some((reply, last)) = task.ending {
            reply.errno(i32::from(last));
        }
        let together = self.processes.get(&task.pid).and_then(|p| p.together);
        if self.tasks.values().any(|t| t.pid == task.pid) {
            if let Some(first) = together
                && let Err(e) = self.together_progress(first)
            {
                tracing::error!(error = format!("{e:#}"), "processes that leave");
            }
            if let Err(e) = self.leave_if_all_held(task.pid) {
                tracing::error!(error = format!("{e:#}"), "process that leaves");
            }
            return;
        }
        self.forget(task.pid);
        if let Some(first) = together
            && let Err(e) = self.together_progress(first)
        {
            tracing::error!(error = format!("{e:#}"), "processes that leave");
        }
    }

    /// The child of a vfork has given a process at home its memory back.
    pub(crate) fn vfork_done(&mut self, pid: i32) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        process.vforking = process.vforking.saturating_sub(1);
        if process.vforking == 0 {
            for (pid, wish) in process.after_vfork.drain(..) {
                self.shared.post(Command::Out(pid, Box::new(wish)));
            }
        }
    }

    /// The threads of a process that have not ended. A leader that ended before the others is still there for the kernel, and
    /// never stops.
    pub(crate) fn living(&self, pid: i32) -> Vec<i32> {
        let ended = |tid: i32| tid == pid && shim::process::has_ended(tid);
        self.tasks
            .values()
            .filter(|t| t.pid == pid && !ended(t.tid))
            .map(|t| t.tid)
            .collect()
    }

    /// Asks all threads of a process to stop.
    /// Takes a process out of the job.
    pub(crate) fn forget(&mut self, pid: i32) {
        if let Some(mut process) = self.processes.remove(&pid) {
            for (pid, wish) in process.after_vfork.drain(..) {
                self.shared.post(Command::Out(pid, Box::new(wish)));
            }
            process.discard_guest();
            process.fail_waiters(crate::outward::HAS_ENDED);
        }
        self.shared.table.lock().remove(&pid);
        self.shared.homecoming.lock().remove(&pid);
        self.shared.held.settle(pid);
        self.shared.incomplete.lock().remove(&pid);
        self.shared.progress.lock().remove(&pid);
        self.shared.coming.forget(pid);
        self.shared.objects.forget(pid);
        self.memory_returned(pid);
        self.shared.catchers.write().remove(&pid);
        for process in self.processes.values_mut() {
            process.works_on.retain(|other| *other != pid);
        }
    }

    pub(crate) fn publish(&self, pid: i32) {
        let Some(process) = self.processes.get(&pid) else {
            return;
        };
        let mut table = self.shared.table.lock();
        let forwarded = table.get(&pid).map_or(0, |v| v.forwarded);
        table.insert(pid, process.view(forwarded));
    }

    fn command(&mut self, command: Command) {
        let result = match command {
            Command::LaunchReady { pid, result } => self.launch_ready(pid, result),
            Command::Clone(reply, request) => self.clone_in_vessel(reply, request),
            Command::CloneEnded { tid, ret } => self.clone_ended(tid, ret),
            Command::Exec(reply, request) => self.exec_in_vessel(reply, request),
            Command::ExecFailed { tid, ret } => self.exec_failed(tid, ret),
            Command::ExitThread(reply, code) => self.exit_thread(reply, code),
            Command::ExitGroup(reply, code) => self.exit_group(reply, code),
            Command::Died(died) => self.die(died.pid, died.signal),
            Command::Dies(pid, signal) => self.die_now(pid, signal),
            Command::Stops(stop) => self.stop_as_guest(&stop),
            Command::Interrupt(i) => self.interrupt(i),
            Command::Homecoming(reply, body) => self.homecoming(reply, *body),
            Command::LaidOut(reply, body, result) => self.laid_out(&reply, *body, result),
            Command::HomeCommit(reply, body) => self.home_commit(reply, &body),
            Command::MoveFailed(from, m) => self.move_failed(from, m),
            Command::Action(a) => self.action(a),
            Command::Out(pid, wish) => self.send_out(pid, *wish),
            Command::Depart(pid, attempt, ready) => self.depart(pid, attempt, ready),
            Command::Track(pid, attempt, done) => self.track(pid, attempt, done),
            Command::HopReady(pid, attempt, ready) => self.hop_ready(pid, attempt, ready),
            Command::Moved(reply, from, moved) => self.moved(reply, from, *moved),
            Command::WorksOn(reply, body) => self.works_on(&reply, body),
            Command::KeepBack(reply, pid) => self.keep_back(reply, pid),
            Command::Empty(pid, catcher, done) => self.drop_pages(pid, catcher, done),
            Command::Room(pid, areas, done) => self.make_room(pid, areas, done),
            Command::Settled(settled) => self.settled(&settled),
            Command::Complete(pid, pager, end) => self.complete(pid, &pager, end),
            Command::Freeze(pid, stop, done) => self.freeze(pid, stop, &done),
            Command::Bring(pid, reason, mode, done) => self.bring(pid, reason, mode, done),
            Command::Release(done) => self.release_job(done),
            Command::Settle(pending, ret) => self.settle(*pending, ret),
            Command::Unblock(pending, ret) => self.unblock(*pending, ret),
            Command::Expose(pending) => self.expose(*pending),
            Command::Exposed(pending, reply) => self.cover(*pending, reply),
            Command::TogetherReady(sent, result) => self.together_ready(*sent, result),
            Command::Lost(node, number, why) => self.lost(node, number, &why),
        };
        if let Err(e) = result {
            tracing::error!(error = format!("{e:#}"), "command not carried out");
        }
    }

    /// The contact to a node is gone for good: what ran there has ended for us.
    fn lost(&mut self, node: u32, number: u64, why: &str) -> anyhow::Result<()> {
        let mut links = self.shared.links.lock();
        if links
            .get(&node)
            .is_none_or(|contacted| contacted.number != number)
        {
            // It was known already, and there may be another.
            return Ok(());
        }
        links.remove(&node);
        drop(links);
        self.shared.held.lost(node);
        let there: Vec<i32> = self
            .processes
            .values()
            .filter(|p| p.node() == node)
            .map(|p| p.pid)
            .collect();
        if !there.is_empty() {
            tracing::error!(
                node,
                why,
                processes = there.len(),
                "contact lost; its processes are killed"
            );
        }
        for pid in there {
            self.lost_before_whole(pid, why);
            if let Some(process) = self.processes.get_mut(&pid) {
                process.fail_moves(&format!("process {pid} is lost with node {node}: {why}"));
            }
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL)?;
        }
        Ok(())
    }
}

/// What was asked of a thread that may have been killed meanwhile.
pub(crate) fn unless_gone(result: Result<(), ptrace::PtraceError>) -> anyhow::Result<()> {
    match result {
        Err(e) if !e.is_gone() => Err(e.into()),
        _ => Ok(()),
    }
}
