//! Children and threads of guests, with the ids that home gave them.
//!
//! The filter stops clone, clone3, fork and vfork with SECCOMP_RET_TRACE. Home creates the real child first; then the
//! guest's call is rewritten ([`shim::clone_rewrite`]) so that its child gets the same id. The id is chosen by a number
//! that is one for the whole cage, so one clone is made at a time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Context;
use linklayer::image::{Regs, SigAction};
use linklayer::memory::GuestMemory;
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind};
use shim::clone_rewrite::{CloneError, CloneRefusal, CloneRequest, CloneRewrite, CloneStep};
use shim::ptrace::Stopped;

use super::guest::{Guest, SignalStatus, Thread};
use super::shared::Command;
use super::tracer::{After, Traced, Tracer};

/// How often a clone is repeated because the dying guest that had the id before was not gone yet.
const TRIES: u32 = 10_000;

/// A clone in progress.
pub(super) struct Cloning {
    rewrite: CloneRewrite,
    /// Stopped before the call, while home is asked or another clone is made.
    waiting: Option<Stopped>,
    reply: Option<wire::CloneReply>,
    /// The child as this node sees it.
    child: Option<i32>,
    /// The parent's token after its call, while the child is not set up yet.
    returned: Option<Stopped>,
    child_ready: bool,
    /// The child that was made has another id than home's.
    wrong: bool,
    tries: u32,
}

impl Cloning {
    /// The child's id at home.
    fn home(&self) -> i32 {
        self.reply.map_or(0, |r| r.tid as i32)
    }
}

impl Tracer {
    /// A thread is about to clone.
    pub(super) fn clone_begins(&mut self, outer: i32, mut stopped: Stopped) -> anyhow::Result<()> {
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let regs = stopped.regs()?;
        if let Some(cloning) = traced.cloning.as_mut() {
            // It is made again; home has its child already.
            cloning.waiting = Some(stopped);
            return self.clone_here(outer);
        }
        let thread = traced.thread.clone();
        match CloneRequest::parse(&regs, &thread.guest.memory) {
            Err(CloneRefusal::Errno(errno)) => {
                let regs = Regs {
                    orig_rax: u64::MAX,
                    rax: -i64::from(errno) as u64,
                    ..regs
                };
                stopped.set_regs(&regs)?;
                stopped.cont(0)?;
            }
            Err(CloneRefusal::GoHome(note)) => {
                // Skip the call and stand before it again, still.
                let again = Regs {
                    orig_rax: u64::MAX,
                    rax: regs.orig_rax,
                    rip: regs.rip - 2,
                    ..regs
                };
                stopped.set_regs(&again)?;
                let reason = StayReason::Call {
                    nr: regs.orig_rax as u32,
                    note: note.into(),
                };
                traced.after = Some(After::GoHome(reason));
                shim::ptrace::interrupt(outer)?;
                stopped.cont(0)?;
            }
            Ok(request) if !request.shares_memory() && thread.guest.memory.pager().is_some() => {
                self.fork_later(outer, stopped);
            }
            Ok(request) => {
                let mask = SignalStatus::read(outer).unwrap_or_default().blocked;
                let body = wire::Clone {
                    flags: request.flags,
                    exit_signal: request.exit_signal,
                    sigmask: mask,
                };
                traced.cloning = Some(Cloning {
                    rewrite: CloneRewrite::new(request, &regs),
                    waiting: Some(stopped),
                    reply: None,
                    child: None,
                    returned: None,
                    child_ready: false,
                    wrong: false,
                    tries: 0,
                });
                let shared = self.shared.clone();
                let tid = thread.tid;
                self.shared.starter.start("clone", move || {
                    let failed = wire::CloneReply {
                        tid: -i64::from(libc::EAGAIN),
                        pidfd: -1,
                    };
                    let reply = shared
                        .ask(tid, tid, Kind::Clone, &wire::encode(&body))
                        .ok()
                        .and_then(|b| wire::decode(&b).ok())
                        .unwrap_or(failed);
                    shared.post(Command::Cloned { outer, reply });
                });
            }
        }
        Ok(())
    }

    /// Home answered.
    pub(super) fn cloned(&mut self, outer: i32, reply: wire::CloneReply) -> anyhow::Result<()> {
        let Some(traced) = self.threads.get_mut(&outer) else {
            return Ok(());
        };
        let Some(cloning) = traced.cloning.as_mut() else {
            return Ok(());
        };
        if reply.tid < 0 {
            let regs = Regs {
                orig_rax: u64::MAX,
                rax: reply.tid as u64,
                ..*cloning.rewrite.original()
            };
            let waiting = cloning.waiting.take();
            traced.cloning = None;
            if let Some(mut stopped) = waiting {
                stopped.set_regs(&regs)?;
                self.resume_or_hold(outer, stopped)?;
            }
            return Ok(());
        }
        if reply.pidfd >= 0 {
            let address = cloning.rewrite.request().pidfd;
            if traced
                .thread
                .guest
                .memory
                .write(address, &reply.pidfd.to_ne_bytes())
                .is_err()
            {
                tracing::debug!("pidfd's place is not writable");
            }
        }
        cloning.reply = Some(reply);
        self.clone_here(outer)
    }

    /// Makes the guest's own child, when it is this clone's turn.
    fn clone_here(&mut self, outer: i32) -> anyhow::Result<()> {
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let cloning = traced.cloning.as_mut().context("clone")?;
        if cloning.reply.is_none() || cloning.waiting.is_none() {
            return Ok(());
        }
        if self.cloning_now.is_some_and(|active| active != outer) {
            if !self.clone_queue.contains(&outer) {
                self.clone_queue.push_back(outer);
            }
            return Ok(());
        }
        self.cloning_now = Some(outer);
        let started = self.start_clone(outer);
        if started.is_err() {
            self.clone_left(outer);
        }
        started
    }

    fn start_clone(&mut self, outer: i32) -> anyhow::Result<()> {
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let cloning = traced.cloning.as_mut().context("clone")?;
        let last = cloning.home() - 1;
        self.cage.as_ref().context("cage")?.set_last_pid(last)?;
        cloning.wrong = false;
        cloning.child = None;
        if let Some(stopped) = cloning.waiting.take() {
            cloning.rewrite.start(stopped, &traced.thread.guest.memory)?;
        }
        Ok(())
    }

    /// The number that chooses ids is not needed by this thread (any more); the next may have it.
    pub(super) fn clone_left(&mut self, outer: i32) {
        self.clone_queue.retain(|queued| *queued != outer);
        if self.cloning_now != Some(outer) {
            return;
        }
        self.cloning_now = None;
        while self.cloning_now.is_none()
            && let Some(next) = self.clone_queue.pop_front()
        {
            if let Err(e) = self.clone_here(next) {
                tracing::debug!(next, error = format!("{e:#}"), "clone");
            }
        }
    }

    /// A stop of a thread that is in the middle of a clone.
    pub(super) fn clone_proceeds(&mut self, outer: i32, stopped: Stopped) -> anyhow::Result<()> {
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let Some(cloning) = traced.cloning.as_mut() else {
            stopped.cont(0)?;
            return Ok(());
        };
        match cloning
            .rewrite
            .parent_stop(stopped, &traced.thread.guest.memory)?
        {
            CloneStep::Running => Ok(()),
            CloneStep::Born(child) => {
                cloning.child = Some(child);
                self.clone_left(outer);
                self.clone_child(outer)
            }
            CloneStep::Again(stopped) => {
                stopped.cont(0)?;
                self.clone_left(outer);
                Ok(())
            }
            CloneStep::Returned(stopped, ret) if ret < 0 => {
                tracing::error!(ret, "this node could not make the child that home has");
                let born = cloning.home();
                traced.cloning = None;
                stopped.cont(0)?;
                self.clone_left(outer);
                self.never_born(born);
                Ok(())
            }
            CloneStep::Returned(stopped, _) => {
                cloning.returned = Some(stopped);
                self.clone_child(outer)
            }
        }
    }

    /// Ends a child at home that could not be made here.
    fn never_born(&self, pid: i32) {
        let died = wire::Died {
            pid,
            signal: libc::SIGKILL,
        };
        self.shared.tell(pid, Kind::Died, &wire::encode(&died));
    }

    /// Sets up the child when it has stopped for the first time, and lets both go when the parent's call is over too.
    fn clone_child(&mut self, outer: i32) -> anyhow::Result<()> {
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let parent = traced.thread.clone();
        let Some(cloning) = traced.cloning.as_mut() else {
            return Ok(());
        };
        let Some(child) = cloning.child else { return Ok(()) };
        if !cloning.child_ready && !cloning.wrong {
            let Some(mut stray) = self.strays.remove(&child) else {
                return Ok(());
            };
            match cloning.rewrite.child_stop(&mut stray, cloning.home()) {
                Ok(()) => {
                    cloning.child_ready = true;
                    let (home, request) = (cloning.home(), *cloning.rewrite.request());
                    self.adopt(&parent, home, request, stray)?;
                    self.relay_early(home);
                }
                Err(e @ CloneError::WrongId { .. }) => {
                    tracing::debug!(error = %e, "once more");
                    cloning.wrong = true;
                    cloning.rewrite.dismiss(stray, parent.guest.pass_key)?;
                }
                Err(e) => return Err(e.into()),
            }
        }
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let Some(cloning) = traced.cloning.as_mut() else {
            return Ok(());
        };
        let Some(mut stopped) = cloning.returned.take() else {
            return Ok(());
        };
        let home = cloning.home();
        if cloning.wrong {
            cloning.tries += 1;
            if cloning.tries < TRIES {
                cloning.rewrite.repeat(&mut stopped)?;
                stopped.cont(0)?;
                return Ok(());
            }
            tracing::error!(home, "the id of the child that home has is taken here");
            let back = Regs {
                rax: -i64::from(libc::EAGAIN) as u64,
                ..stopped.regs()?
            };
            stopped.set_regs(&back)?;
            traced.cloning = None;
            self.resume_or_hold(outer, stopped)?;
            self.never_born(home);
            return Ok(());
        }
        let vfork = cloning.rewrite.request().is_vfork();
        traced.cloning = None;
        if vfork && self.shared.guests.read().contains_key(&home) {
            traced.vfork = Some((home, stopped));
            // It stands still for whoever stops its guest.
            return self.all_held(parent.guest.pid);
        }
        self.resume_or_hold(outer, stopped)
    }

    /// Takes a child or thread in, and lets it run.
    fn adopt(
        &mut self,
        parent: &Arc<Thread>,
        home: i32,
        request: CloneRequest,
        stray: Stopped,
    ) -> anyhow::Result<()> {
        let child = stray.tid();
        let guest = if request.is_thread() {
            parent.guest.clone()
        } else {
            let mut actions = parent.guest.actions.lock().clone();
            if request.clears_handlers() {
                for action in actions.iter_mut().filter(|action| action.handler > 1) {
                    *action = SigAction::default();
                }
            }
            let mut guest = Guest::new(
                home,
                child,
                parent.guest.listener.clone(),
                parent.guest.turn.clone(),
                parent.guest.pass_key,
                actions,
            )?;
            if request.shares_memory() {
                guest.space = parent.guest.space;
                if let Some(pager) = parent.guest.memory.pager() {
                    guest.memory.comes_by(pager.clone());
                }
            }
            let guest = Arc::new(guest);
            self.shared.guests.write().insert(home, guest.clone());
            guest
        };
        let thread = Arc::new(Thread::new(home, child, guest));
        self.shared.threads.write().insert(child, thread.clone());
        self.threads.insert(child, Traced::new(thread));
        self.resume_or_hold(child, stray)
    }

    /// A stopped child whose parent may have told of it.
    pub(super) fn stray_appears(&mut self, child: i32) -> anyhow::Result<()> {
        let parent = self
            .threads
            .iter()
            .find(|(_, t)| t.cloning.as_ref().is_some_and(|c| c.child == Some(child)));
        match parent.map(|(outer, _)| *outer) {
            Some(outer) => self.clone_child(outer),
            None => Ok(()),
        }
    }

    /// The child of a vfork has executed something or ended: its parent goes on.
    pub(super) fn vfork_ended(&mut self, child: i32) {
        let waiting = self
            .threads
            .iter_mut()
            .find(|(_, t)| t.vfork.as_ref().is_some_and(|(c, _)| *c == child))
            .and_then(|(outer, t)| Some((*outer, t.vfork.take()?.1)));
        if let Some((outer, stopped)) = waiting
            && let Err(e) = self.resume_or_hold(outer, stopped)
        {
            tracing::debug!(error = format!("{e:#}"), "vfork parent");
        }
    }

    /// Lets a thread go on; one whose guest is being stopped stops again at once, outside of any call.
    fn resume_or_hold(&mut self, outer: i32, stopped: Stopped) -> anyhow::Result<()> {
        let held = self.threads.get(&outer).is_some_and(|t| {
            self.holds.contains_key(&t.thread.guest.pid) || t.thread.guest.freezing.load(Ordering::Acquire)
        });
        if held {
            shim::ptrace::interrupt(outer)?;
        }
        stopped.cont(0)?;
        Ok(())
    }
}
