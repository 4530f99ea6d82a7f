//! The supervisor's tracer thread: everything on this node that needs ptrace.
//!
//! It builds guests, gives their children the ids that home chose, relays signals with their siginfo, answers
//! notifications with restart codes (KERNEL-FACTS A), stops and captures guests. It never waits for home: what must,
//! runs on threads of its own and posts a [`Command`] when it is done.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use linklayer::image::Regs;
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use shim::cage::Cage;
use shim::ptrace::{self, Status, Stop, Stopped, Target};
use shim::timed::{Look, Looker, Timed};

use super::guest::{Guest, InCall, SignalStatus, Thread};
use super::quiet::Quiet;
use super::shared::{Command, Shared};

/// ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK: include/linux/errno.h. They never reach user
/// code natively.
pub const RESTARTSYS: i64 = -512;
/// Restart always, unseen.
pub const RESTARTNOINTR: i64 = -513;
/// Restart unless a handler runs.
pub const RESTARTNOHAND: i64 = -514;
/// Restart by restart_syscall(2).
pub const RESTART_BLOCK: i64 = -516;

/// Whether a result is one of the kernel's restart codes.
pub fn is_restart(ret: i64) -> bool {
    (RESTART_BLOCK..=RESTARTSYS).contains(&ret) && ret != -515
}

/// Why a guest's threads are being stopped.
pub(super) enum Hold {
    /// Its vessel was stopped by job control.
    Stopped,
    /// It goes home, with all others that have the same `first`.
    Home {
        /// The process of the group for which it began.
        first: i32,
        /// Why this one goes.
        reason: StayReason,
    },
    /// It goes to another node.
    Node,
    /// Its memory is going to be watched.
    Track,
}

impl Hold {
    /// Whether its calls in progress are made again later.
    pub(super) fn captures(&self) -> bool {
        !matches!(self, Hold::Stopped)
    }
}

/// What to do at the stop that follows an interrupt.
pub(super) enum After {
    /// Nothing: the kernel sees to the signal.
    Go,
    /// Exchange the call for rt_sigsuspend(2) with the call's own mask, so that the kernel delivers under it.
    Suspend {
        /// Where the mask is in the guest's memory.
        address: u64,
        /// The call's result after the handler.
        ret: i64,
    },
    /// Keep it stopped, and send its guest home.
    GoHome(StayReason),
}

/// A guest thread as the tracer keeps it.
pub(super) struct Traced {
    pub(super) thread: Arc<Thread>,
    /// Signals queued for it, with the siginfo they are to have.
    pub(super) fixes: Vec<super::signals::Fix>,
    pub(super) after: Option<After>,
    /// Registers from before the exchange for rt_sigsuspend, with the result in them.
    suspended: Option<Box<Regs>>,
    /// It is kept stopped.
    pub(super) held: Option<Stopped>,
    pub(super) cloning: Option<super::clone::Cloning>,
    /// It waits in rt_sigtimedwait(2).
    pub(super) waits: Option<super::signals::SignalWait>,
    /// The wait of this kernel's that it was last seen in, which is restarted under another number, and what tells it again.
    pub(super) waiting: Option<(u32, [u64; 8])>,
    /// How it looked when it was interrupted so as to be described.
    pub(super) seen: Option<Look>,
    /// The wait with a relative timeout that it was then taken out of, and that nobody else knows the beginning of.
    pub(super) timed: Option<Timed>,
    /// It waits in vfork for this child; stopped just after its call.
    pub(super) vfork: Option<(i32, Stopped)>,
}

impl Traced {
    pub(super) fn new(thread: Arc<Thread>) -> Traced {
        Traced {
            thread,
            fixes: Vec::new(),
            after: None,
            suspended: None,
            held: None,
            cloning: None,
            waits: None,
            waiting: None,
            seen: None,
            timed: None,
            vfork: None,
        }
    }

    /// Takes note of a wait that the kernel will restart with restart_syscall(2).
    fn note_wait(&mut self, regs: &Regs) {
        if regs.rax as i64 == RESTART_BLOCK && regs.orig_rax != libc::SYS_restart_syscall as u64 {
            let call = Regs {
                rip: regs.rip.wrapping_sub(2),
                ..*regs
            };
            self.waiting = u32::try_from(regs.orig_rax).ok().map(|nr| (nr, call.marks()));
        }
    }
}

/// The tracer's own state.
pub struct Tracer {
    pub(super) shared: Arc<Shared>,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    pub(super) children: SignalFd,
    pub(super) cage: Option<Cage>,
    pub(super) config: super::SupervisorConfig,
    pub(super) threads: HashMap<i32, Traced>,
    pub(super) strays: HashMap<i32, Stopped>,
    pub(super) holds: HashMap<i32, Hold>,
    /// Guests whose vessels are stopped by job control, whatever else holds them.
    pub(super) frozen: HashSet<i32>,
    /// Groups that are on their way home, by number.
    pub(super) homing: HashMap<u64, Vec<Arc<Guest>>>,
    /// Number of the next one.
    pub(super) next_homing: u64,
    /// Number of the next request to keep back what arrives.
    pub(super) next_quiet: u64,
    /// When it began that a group (by its first process) is stopped.
    pub(super) since: HashMap<i32, Instant>,
    /// Guests that leave for another node.
    pub(super) departures: HashMap<i32, super::departure::Departure>,
    /// Guests that are being stopped so that their memory can be watched, and who waits for that.
    pub(super) tracking: HashMap<i32, Sender<Result<shim::track::Tracker, String>>>,
    /// Guests for which home was asked to keep back what arrives.
    pub(super) quiet: HashMap<i32, Quiet>,
    /// Processes whose building has begun.
    pub(super) begun: super::begun::AllBegun,
    /// Stopped and built, waiting for home's word to run.
    pub(super) built: HashMap<i32, Vec<Stopped>>,
    /// Sleeps whose length is set when they run.
    pub(super) sleeps: HashMap<i32, Vec<(i32, linklayer::image::Sleep)>>,
    pub(super) next_token: u64,
    /// Threads that stand before a fork until their guest has all of its memory.
    pub(super) forks: HashMap<i32, Stopped>,
    /// Signals for processes that have no guest yet.
    pub(super) early: Vec<wire::Signal>,
    /// The thread whose clone is in the kernel: the number of the next process is one word for the whole cage.
    pub(super) cloning_now: Option<i32>,
    /// Threads whose clone comes next.
    pub(super) clone_queue: std::collections::VecDeque<i32>,
}

impl Tracer {
    /// Makes the calling thread the tracer. SIGCHLD must be blocked in every thread of the process.
    ///
    /// # Errors
    /// When the kernel gives no signalfd.
    pub fn new(
        shared: Arc<Shared>,
        commands: Receiver<Command>,
        wake: Arc<EventFd>,
        config: super::SupervisorConfig,
    ) -> anyhow::Result<Tracer> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        set.thread_block()?;
        Ok(Tracer {
            shared,
            commands,
            wake,
            children: SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?,
            cage: None,
            config,
            threads: HashMap::new(),
            strays: HashMap::new(),
            holds: HashMap::new(),
            frozen: HashSet::new(),
            homing: HashMap::new(),
            next_homing: 0,
            next_quiet: 0,
            since: HashMap::new(),
            departures: HashMap::new(),
            tracking: HashMap::new(),
            quiet: HashMap::new(),
            begun: HashMap::new(),
            built: HashMap::new(),
            sleeps: HashMap::new(),
            next_token: super::signals::FIRST_TOKEN,
            forks: HashMap::new(),
            early: Vec::new(),
            cloning_now: None,
            clone_queue: std::collections::VecDeque::new(),
        })
    }

    /// Serves until the job has ended or the contact is lost for good; nothing of it is left then.
    ///
    /// # Errors
    /// Those of poll(2) and waitpid(2).
    pub fn run(&mut self) -> anyhow::Result<String> {
        loop {
            let guests: Vec<Arc<Guest>> = self.shared.guests.read().values().cloned().collect();
            let mut fds = vec![
                PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            fds.extend(
                guests
                    .iter()
                    .map(|g| PollFd::new(g.exited.as_fd(), PollFlags::POLLIN)),
            );
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
                if let Command::End(why) = command {
                    return Ok(why);
                }
                if let Err(e) = self.command(command)
                    && !gone(&e)
                {
                    tracing::error!(error = format!("{e:#}"), "command not carried out");
                }
                self.reports()?;
            }
        }
    }

    pub(super) fn reports(&mut self) -> anyhow::Result<()> {
        while let Some((outer, status)) = ptrace::wait(Target::Mine, true)? {
            match status {
                Status::Exited(code) => self.gone(outer, code << 8),
                Status::Signaled { sig, .. } => self.gone(outer, sig),
                Status::Stopped(stopped) => {
                    if !self.threads.contains_key(&outer) {
                        self.strays.insert(outer, stopped);
                        if let Err(e) = self.stray_appears(outer) {
                            tracing::error!(outer, error = format!("{e:#}"), "new child not set up");
                        }
                        continue;
                    }
                    if let Err(e) = self.stopped(outer, stopped).and_then(|()| self.hold_on(outer))
                        && !gone(&e)
                    {
                        tracing::error!(outer, error = format!("{e:#}"), "guest thread not handled");
                    }
                }
            }
        }
        Ok(())
    }

    fn command(&mut self, command: Command) -> anyhow::Result<()> {
        match command {
            Command::Build(build) => self.build(*build),
            Command::Begin(begin) => {
                self.begin(begin);
                Ok(())
            }
            Command::Abandon(pid, number) => {
                self.abandon(pid, Some(number));
                Ok(())
            }
            Command::LaunchGo(pid) => self.launch_go(pid),
            Command::Signal(signal, counted) => {
                let relayed = self.relay(&signal);
                if let Some(guest) = counted {
                    guest.incoming.fetch_sub(1, Ordering::AcqRel);
                }
                relayed
            }
            Command::Pending(outer, answer) => {
                let _ = answer.send(self.pending(outer));
                Ok(())
            }
            Command::Reply {
                outer,
                notification,
                ret,
                mask,
            } => self.reply(outer, notification, ret, mask),
            Command::Cloned { outer, reply } => self.cloned(outer, reply),
            Command::Freeze(pid, counted) => {
                self.frozen.insert(pid);
                let held = self.hold(pid, Hold::Stopped);
                if let Some(guest) = counted {
                    guest.incoming.fetch_sub(1, Ordering::AcqRel);
                }
                held
            }
            Command::Thaw(pid) => self.thaw(pid),
            Command::Discard(pid) => self.discard(pid),
            Command::GoHome(pid, reason) => self.hold(pid, Hold::Home { first: pid, reason }),
            Command::WentHome(number, result) => self.went_home(number, result),
            Command::Depart(departure) => self.depart(*departure),
            Command::Departed(guest, result) => self.departed(&guest, result),
            Command::Track(guest, done) => self.track(&guest, done),
            Command::Quiet(pid, number, kept) => self.home_keeps_back(pid, number, kept),
            Command::Settled => self.settled(),
            Command::End(_) => Ok(()),
        }
    }

    fn stopped(&mut self, outer: i32, mut stopped: Stopped) -> anyhow::Result<()> {
        match stopped.stop() {
            Stop::Signal(sig) => {
                let Some(traced) = self.threads.get_mut(&outer) else {
                    return Ok(());
                };
                let mut regs = stopped.regs()?;
                if let Some(original) = traced.suspended.take() {
                    // The handler must see the registers of the call it interrupts.
                    stopped.set_regs(&original)?;
                } else if u32::try_from(regs.orig_rax)
                    .is_ok_and(|nr| not_begun(&traced.thread, nr, regs.rax as i64))
                {
                    regs.rax = RESTARTNOINTR as u64;
                    stopped.set_regs(&regs)?;
                }
                if traced.thread.guest.action(sig).handler > 1 {
                    // Its handler ends the wait with EINTR.
                    traced.thread.sleeps_at_home.store(false, Ordering::Release);
                }
                traced.note_wait(&regs);
                self.true_siginfo(outer, sig, &mut stopped)?;
                stopped.cont(self.stops_at_home(outer, sig))?;
            }
            Stop::Seccomp(shim::filter::TRACE_WAIT) => self.wait_begins(outer, stopped)?,
            Stop::Seccomp(_) => self.clone_begins(outer, stopped)?,
            Stop::Syscall if self.threads.get(&outer).is_some_and(|t| t.waits.is_some()) => {
                self.wait_ends(outer, stopped)?;
            }
            Stop::Fork(_) | Stop::Vfork(_) | Stop::Clone(_) | Stop::Syscall => {
                self.clone_proceeds(outer, stopped)?
            }
            Stop::Interrupt | Stop::Group(_) => self.interrupted(outer, stopped)?,
            _ => stopped.cont(0)?,
        }
        Ok(())
    }

    /// Any stop takes an interrupt away that was asked for and has not come about (kernel/signal.c, ptrace_stop): a thread that is
    /// to stand still and goes on is interrupted again. One that makes a clone is left to it first, which would begin anew.
    fn hold_on(&self, outer: i32) -> anyhow::Result<()> {
        let Some(traced) = self.threads.get(&outer) else {
            return Ok(());
        };
        let runs = traced.held.is_none() && traced.vfork.is_none() && traced.cloning.is_none();
        if runs && self.holds.contains_key(&traced.thread.guest.pid) {
            ptrace::interrupt(outer)?;
        }
        Ok(())
    }

    fn interrupted(&mut self, outer: i32, mut stopped: Stopped) -> anyhow::Result<()> {
        let Some(traced) = self.threads.get_mut(&outer) else {
            return Ok(());
        };
        if traced.cloning.is_some() {
            return self.clone_proceeds(outer, stopped);
        }
        match traced.after.take() {
            Some(After::Suspend { address, ret }) => {
                let mut original = stopped.regs()?;
                let mut regs = original;
                regs.rip -= 2;
                regs.rax = libc::SYS_rt_sigsuspend as u64;
                regs.orig_rax = u64::MAX;
                regs.rdi = address;
                regs.rsi = 8;
                original.rax = ret as u64;
                traced.suspended = Some(Box::new(original));
                stopped.set_regs(&regs)?;
                stopped.cont(0)?;
                return Ok(());
            }
            Some(After::GoHome(reason)) => {
                let guest = traced.thread.guest.clone();
                traced.held = Some(stopped);
                if self.holds.contains_key(&guest.pid) {
                    return self.all_held(guest.pid);
                }
                super::homeward::go_home_after(&self.shared, guest.pid, reason, guest.pause());
                return Ok(());
            }
            Some(After::Go) | None => {}
        }
        let pid = traced.thread.guest.pid;
        if self.holds.get(&pid).is_some_and(Hold::captures)
            && let Some(mut original) = traced.suspended.take()
        {
            // It stands still before the handler: what it makes again is its own call.
            original.rax = interrupted_for_capture(original.rax as i64, false) as u64;
            stopped.set_regs(&original)?;
        }
        let regs = stopped.regs()?;
        traced.note_wait(&regs);
        let seen = traced.seen.take();
        // The others come by here, and home has begun them.
        let own = regs.rax as i64 == RESTART_BLOCK;
        traced.timed = if own {
            Timed::of(&stopped, seen, traced.timed)?
        } else {
            None
        };
        if self.holds.contains_key(&pid) {
            traced.held = Some(stopped);
            return self.all_held(pid);
        }
        stopped.cont(0)?;
        Ok(())
    }

    /// Answers a notification where more than the answer is needed.
    fn reply(
        &mut self,
        outer: i32,
        notification: u64,
        ret: i64,
        mask: Option<(u64, u64)>,
    ) -> anyhow::Result<()> {
        let Some(traced) = self.threads.get_mut(&outer) else {
            return Ok(());
        };
        let guest = traced.thread.guest.clone();
        let capturing = self.holds.get(&guest.pid).is_some_and(Hold::captures);
        *traced.thread.call.lock() = InCall::Idle;
        // epoll_wait(2) and its kind end with EINTR where others restart; no handler has run, so the guest must not see it.
        let interrupted = (mask.is_some() || capturing) && ret == -i64::from(libc::EINTR);
        if !is_restart(ret) && !interrupted {
            guest.listener.send_result(notification, ret)?;
            return Ok(());
        }
        traced.thread.answered.store(true, Ordering::Release);
        // Without the interrupt the kernel would hand the raw code to user code.
        ptrace::interrupt(outer)?;
        if capturing {
            // The call is made again elsewhere, unless the handler of a signal that comes meanwhile runs first.
            let masks_more = mask
                .is_some_and(|(mask, _)| mask & !SignalStatus::read(outer).unwrap_or_default().blocked != 0);
            let code = interrupted_for_capture(ret, masks_more);
            guest.listener.send_result(notification, code)?;
            return Ok(());
        }
        // A call that was interrupted before it began is made again, and ends then: natively it looks before it is interrupted.
        let begun = ret != RESTARTNOINTR;
        let suspend = mask.filter(|(mask, _)| begun && traced.thread.deliverable(Some(*mask)) != 0);
        match suspend {
            Some((_, address)) => {
                traced.after = Some(After::Suspend { address, ret });
                guest.listener.send_result(notification, RESTARTNOHAND)?;
            }
            None => {
                traced.after = Some(After::Go);
                let ret = if mask.is_some() { RESTARTNOINTR } else { ret };
                guest.listener.send_result(notification, ret)?;
            }
        }
        Ok(())
    }

    /// Whether a guest has not ended. There may be another one with its pid: a process that has executed another program, or has gone
    /// and come back.
    pub(super) fn is_here(&self, guest: &Arc<Guest>) -> bool {
        let guests = self.shared.guests.read();
        guests.get(&guest.pid).is_some_and(|one| Arc::ptr_eq(one, guest))
    }

    /// Stops all threads of a guest.
    pub(super) fn hold(&mut self, pid: i32, why: Hold) -> anyhow::Result<()> {
        if !self.shared.guests.read().contains_key(&pid) {
            return Ok(());
        }
        if self.holds.get(&pid).is_some_and(Hold::captures) {
            // Another of its threads made a call that takes it home, too.
            let threads = self.threads.values().filter(|t| t.thread.guest.pid == pid);
            threads.for_each(|t| make_again(&t.thread));
            return Ok(());
        }
        if let Hold::Home { first, .. } = why {
            self.since.insert(first, Instant::now());
        }
        self.holds.insert(pid, why);
        self.stop_threads(pid)?;
        self.all_held(pid)
    }

    /// Has all threads of a guest stop that are to be held.
    pub(super) fn stop_threads(&mut self, pid: i32) -> anyhow::Result<()> {
        let Some(guest) = self.shared.guests.read().get(&pid).cloned() else {
            return Ok(());
        };
        let captures = self.holds.get(&pid).is_some_and(Hold::captures);
        if captures {
            guest.freezing.store(true, Ordering::Release);
        }
        let threads: Vec<Arc<Thread>> = self
            .threads
            .values()
            .filter(|t| t.thread.guest.pid == pid && t.held.is_none() && t.vfork.is_none())
            .map(|t| t.thread.clone())
            .collect();
        let mut looker = Looker::default();
        for thread in threads {
            if captures && let Some(traced) = self.threads.get_mut(&thread.outer) {
                traced.seen = looker.look(thread.outer);
            }
            match ptrace::interrupt(thread.outer) {
                // A leader that ended before the others.
                Err(e) if e.is_gone() => continue,
                other => other?,
            }
            if !captures {
                continue;
            }
            self.interrupt_call(&thread, None);
            make_again(&thread);
        }
        Ok(())
    }

    fn thaw(&mut self, pid: i32) -> anyhow::Result<()> {
        self.frozen.remove(&pid);
        if !matches!(self.holds.get(&pid), Some(Hold::Stopped)) {
            return Ok(());
        }
        self.release(pid)
    }

    /// Lets all held threads of a guest run, unless the contact is lost: then it may run elsewhere already, and whatever is here
    /// ends.
    pub(super) fn release(&mut self, pid: i32) -> anyhow::Result<()> {
        if self.shared.is_cut_off() {
            return Ok(());
        }
        self.holds.remove(&pid);
        self.quiet.remove(&pid);
        self.departures.remove(&pid);
        if let Some(guest) = self.shared.guests.read().get(&pid) {
            guest.freezing.store(false, Ordering::Release);
        }
        if self.frozen.contains(&pid) {
            self.holds.insert(pid, Hold::Stopped);
            return Ok(());
        }
        if !self.built.contains_key(&pid) {
            self.begin_sleeps(pid);
        }
        for traced in self.threads.values_mut().filter(|t| t.thread.guest.pid == pid) {
            if let Some(stopped) = traced.held.take() {
                stopped.cont(0)?;
            }
        }
        Ok(())
    }

    pub(super) fn discard(&mut self, pid: i32) -> anyhow::Result<()> {
        let Some(guest) = self.shared.guests.read().get(&pid).cloned() else {
            return Ok(());
        };
        guest.vacate();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(guest.outer), Signal::SIGKILL)?;
        Ok(())
    }

    /// A guest thread ended (status as of waitpid(2)).
    fn gone(&mut self, outer: i32, status: i32) {
        self.strays.remove(&outer);
        let Some(traced) = self.threads.remove(&outer) else {
            return;
        };
        self.clone_left(outer);
        self.forks.remove(&outer);
        self.shared.threads.write().remove(&outer);
        let guest = traced.thread.guest.clone();
        self.vfork_ended(guest.pid);
        if self.threads.values().any(|t| t.thread.guest.pid == guest.pid) {
            if let Err(e) = self.all_held(guest.pid) {
                tracing::debug!(error = format!("{e:#}"), "hold");
            }
            return;
        }
        self.shared.guests.write().remove(&guest.pid);
        super::held::left(&self.shared, guest.pid);
        let alone = !self.shared.guests.read().values().any(|g| g.space == guest.space);
        if let Some(pager) = guest.memory.pager().filter(|_| alone) {
            pager.needless();
        }
        self.frozen.remove(&guest.pid);
        self.built.remove(&guest.pid);
        self.since.remove(&guest.pid);
        self.departures.remove(&guest.pid);
        self.tracking.remove(&guest.pid);
        self.quiet.remove(&guest.pid);
        self.sleeps.remove(&guest.pid);
        if let Some(Hold::Home { first, .. }) = self.holds.remove(&guest.pid)
            && let Err(e) = self.group_held(first)
        {
            // The others go on without it.
            tracing::debug!(error = format!("{e:#}"), "hold");
        }
        if !guest.leaving.load(Ordering::Acquire) {
            let signal = if status & 0x7f != 0 {
                status & 0x7f
            } else {
                libc::SIGKILL
            };
            self.shared.tell(
                guest.pid,
                Kind::Died,
                &wire::encode(&wire::Died {
                    pid: guest.pid,
                    signal,
                }),
            );
        }
    }
}

/// Answers the call that takes a guest home: it is made again there.
fn make_again(thread: &Thread) {
    let mut call = thread.call.lock();
    if let InCall::Held(notification) = *call {
        *call = InCall::Idle;
        if let Err(e) = thread.guest.listener.send_result(notification, RESTARTNOINTR) {
            tracing::debug!(tid = thread.tid, error = %e, "call that takes home");
        }
    }
}

/// The code with which a call ends that home interrupted so that its thread can be captured. `masks_more`: it has a mask of its own
/// that blocks more than the thread does, which does not hold before it is made again.
fn interrupted_for_capture(ret: i64, masks_more: bool) -> i64 {
    match ret {
        _ if masks_more => RESTARTNOINTR,
        // Where it goes there is no restart block, and here it would be another's.
        RESTART_BLOCK => RESTARTNOHAND,
        ret if ret == -i64::from(libc::EINTR) => RESTARTNOHAND,
        ret => ret,
    }
}

/// Whether a thread's call ended with this code as a notification that was withdrawn before anybody received it: natively the call
/// had not begun.
pub(super) fn not_begun(thread: &Thread, nr: u32, code: i64) -> bool {
    code == RESTARTSYS && shim::filter::is_notified(nr) && !thread.answered.load(Ordering::Acquire)
}

fn gone(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<ptrace::PtraceError>()
        .is_some_and(ptrace::PtraceError::is_gone)
        || error
            .downcast_ref::<nix::errno::Errno>()
            .is_some_and(|e| *e == nix::errno::Errno::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capture_leaves_it_to_the_handler_what_becomes_of_a_call() {
        let eintr = -i64::from(libc::EINTR);
        let codes = [RESTARTSYS, RESTARTNOINTR, RESTARTNOHAND, RESTART_BLOCK, eintr];
        let plain = codes.map(|code| interrupted_for_capture(code, false));
        let kept = [
            RESTARTSYS,
            RESTARTNOINTR,
            RESTARTNOHAND,
            RESTARTNOHAND,
            RESTARTNOHAND,
        ];
        assert_eq!(plain, kept);
        assert!(
            codes
                .iter()
                .all(|code| interrupted_for_capture(*code, true) == RESTARTNOINTR)
        );
    }
}
