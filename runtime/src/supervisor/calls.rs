//! What becomes of a guest's system call.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use linklayer::frame::Header;
use linklayer::stay::StayReason;
use linklayer::syscall::{
    self, CacheClass, CallRequest, Disposition, GatherError, Gathered, HomeReason, Reply, Row, Scalar,
    SplitKind, Step, TerminalUse, Transfer,
};
use linklayer::wire::{self, IsHome, Kind, Named, WorksOn};
use shim::notify::{Notification, NotifyError};

use super::guest::{Forwarded, InCall, SignalStatus, Thread, Wait};
use super::shared::{Command, Shared};
use super::tracer::{RESTART_BLOCK, RESTARTNOHAND, RESTARTNOINTR, is_restart};

/// What to answer.
pub(super) enum Outcome {
    /// This result, or negative errno, or restart code.
    Value(i64),
    /// A result that may be a restart code of a call with its own mask (the mask and where it is in the guest).
    Masked(i64, u64, u64),
    /// Let the guest's kernel execute the call.
    Continue,
    /// It runs at home.
    GoHome(String),
    /// It runs at home, for a reason that is not the call's.
    Stay(StayReason),
    /// Somebody else answers, or nobody does because the guest ends.
    Handled,
}

/// One call.
pub(super) struct Call<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) thread: &'a Arc<Thread>,
    pub(super) notification: u64,
    pub(super) nr: u32,
    pub(super) args: [u64; 6],
}

/// Handles a notification to the end.
pub fn handle(shared: &Arc<Shared>, thread: &Arc<Thread>, n: &Notification) {
    let call = Call {
        shared,
        thread,
        notification: n.id,
        nr: n.nr as u32,
        args: n.args,
    };
    let outcome = match call.outcome() {
        Outcome::GoHome(why) if shared.refuse_homeward.load(Ordering::Acquire) => {
            tracing::warn!(pid = thread.guest.pid, why, "refused with ENOSYS");
            Outcome::Value(-i64::from(libc::ENOSYS))
        }
        Outcome::Stay(why) if shared.refuse_homeward.load(Ordering::Acquire) => {
            tracing::warn!(pid = thread.guest.pid, %why, "refused with ENOSYS");
            Outcome::Value(-i64::from(libc::ENOSYS))
        }
        outcome => outcome,
    };
    let guest = &thread.guest;
    let sent: Result<(), NotifyError> = match outcome {
        Outcome::Value(ret) => call.respond(ret, None),
        Outcome::Masked(ret, mask, address) => call.respond(ret, Some((mask, address))),
        Outcome::Continue => {
            *thread.call.lock() = InCall::Idle;
            guest.listener.send_continue(n.id)
        }
        Outcome::GoHome(note) => call.go_home(StayReason::Call {
            nr: n.nr as u32,
            note,
        }),
        Outcome::Stay(reason) => call.go_home(reason),
        Outcome::Handled => Ok(()),
    };
    if let Err(e) = sent {
        // Gone: the guest thread was killed meanwhile.
        if !e.is_gone() {
            tracing::error!(tid = thread.tid, nr = n.nr, error = %e, "notification not answered");
        }
    }
}

impl Call<'_> {
    fn outcome(&self) -> Outcome {
        let call = syscall::resolve(self.nr, &self.args);
        let Some(row) = call.row else {
            return Outcome::GoHome("not in the table".into());
        };
        tracing::trace!(tid = self.thread.tid, call = row.name, args = ?self.args, "notified");
        match call.disposition {
            Disposition::Forward => self.forward_cached(row),
            Disposition::Local => Outcome::Continue,
            Disposition::GoHome(reason @ HomeReason::OtherMemory) => {
                let first = self.args[0] as i32;
                match row.args.first().map(|arg| arg.kind) {
                    Some(syscall::Kind::Val(Scalar::Fd)) => self.works_on(Named::Descriptor(first), row.name),
                    // Its own is wherever it is.
                    _ if first == self.thread.guest.pid => {
                        Outcome::GoHome(format!("{}: {}", row.name, reason.text()))
                    }
                    _ => self.works_on(Named::Thread(first), row.name),
                }
            }
            Disposition::GoHome(reason) => Outcome::GoHome(format!("{}: {}", row.name, reason.text())),
            Disposition::Split(kind) => self.split(row, kind),
        }
    }

    /// Sends the result, by way of the tracer where the tracer is needed for it.
    fn respond(&self, ret: i64, mask: Option<(u64, u64)>) -> Result<(), NotifyError> {
        let guest = &self.thread.guest;
        let by_tracer = is_restart(ret)
            || guest.freezing.load(Ordering::Acquire)
            // What came from home before the answer takes effect before it.
            || guest.incoming.load(Ordering::Acquire) > 0
            || (mask.is_some() && ret == -i64::from(libc::EINTR));
        if by_tracer {
            let (outer, notification) = (self.thread.outer, self.notification);
            self.shared.post(Command::Reply {
                outer,
                notification,
                ret,
                mask,
            });
            return Ok(());
        }
        *self.thread.call.lock() = InCall::Idle;
        guest.listener.send_result(self.notification, ret)
    }

    /// Goes home for a call that works on the memory of another process, which is to be there first.
    pub(super) fn works_on(&self, other: Named, what: &str) -> Outcome {
        const PAUSE: Duration = Duration::from_millis(5);
        let guest = &self.thread.guest;
        let body = wire::encode(&WorksOn {
            pid: guest.pid,
            other,
        });
        while !self.shared.refuse_homeward.load(Ordering::Acquire) {
            match self.ask::<IsHome>(Kind::WorksOn, &body) {
                Ok(IsHome(true)) => break,
                Ok(IsHome(false)) => std::thread::sleep(PAUSE),
                Err(outcome) => return outcome,
            }
            if guest.freezing.load(Ordering::Acquire) {
                // It moves itself, perhaps with the other one: the call is made again where it is then.
                return Outcome::Value(RESTARTNOINTR);
            }
        }
        Outcome::GoHome(format!("{what}: {}", HomeReason::OtherMemory.text()))
    }

    /// Leaves the call unanswered: the tracer stops the guest, and the call is made again at home.
    fn go_home(&self, reason: StayReason) -> Result<(), NotifyError> {
        let guest = &self.thread.guest;
        let held = InCall::Held(self.notification);
        *self.thread.call.lock() = held.clone();
        let pause = guest.pause();
        if !pause.is_zero() {
            // It was tried just now. A signal for the thread, or another's going home, has the call made again meanwhile.
            std::thread::sleep(pause);
            if *self.thread.call.lock() != held {
                return Ok(());
            }
        }
        tracing::info!(pid = guest.pid, %reason, "goes home");
        self.shared.post(Command::GoHome(self.thread.guest.pid, reason));
        Ok(())
    }

    /// Forwards a call whose answer may be known already.
    fn forward_cached(&self, row: &'static Row) -> Outcome {
        let guest = &self.thread.guest;
        let own = self.args[0] as i32 == 0 || self.args[0] as i32 == guest.pid;
        let key = row.cache.and_then(|class| match class {
            CacheClass::Session => own.then_some((0, self.nr)),
            // Only calls that give all in their result register: what went to memory is not kept.
            CacheClass::Creds | CacheClass::Machine if row.args.is_empty() => {
                Some((self.thread.tid, self.nr))
            }
            _ => None,
        });
        if let Some(key) = key {
            if let Some(ret) = guest.identity.lock().get(&key) {
                self.shared.cache_hits.fetch_add(1, Ordering::Relaxed);
                return Outcome::Value(*ret);
            }
            self.shared.cache_misses.fetch_add(1, Ordering::Relaxed);
        }
        // A signal that is taken while home is asked comes after this call.
        let overrun = self.overrun();
        let outcome = self.timers(self.forward(row), overrun);
        if let (Outcome::Value(ret), Some(key)) = (&outcome, key)
            && *ret >= 0
        {
            guest.identity.lock().put(key, *ret);
        }
        if !row.clears.is_empty() {
            let mut cache = guest.identity.lock();
            self.shared
                .cache_invalidations
                .fetch_add(cache.len() as u64, Ordering::Relaxed);
            cache.clear();
        }
        outcome
    }

    /// The overrun count of the timer that the first argument names: home hands each signal on at once, and where it
    /// waits is here.
    fn overrun(&self) -> Option<i32> {
        if i64::from(self.nr) != libc::SYS_timer_getoverrun {
            return None;
        }
        self.thread
            .guest
            .overruns
            .lock()
            .get(&(self.args[0] as i32))
            .copied()
    }

    fn timers(&self, outcome: Outcome, overrun: Option<i32>) -> Outcome {
        match (i64::from(self.nr), &outcome) {
            (libc::SYS_timer_getoverrun, Outcome::Value(0..)) => {
                overrun.map_or(outcome, |n| Outcome::Value(i64::from(n)))
            }
            (libc::SYS_timer_settime | libc::SYS_timer_delete, _) => {
                self.thread.guest.overruns.lock().pop(&(self.args[0] as i32));
                outcome
            }
            _ => outcome,
        }
    }

    /// Executes the call at home as it is.
    pub(super) fn forward(&self, _row: &'static Row) -> Outcome {
        match syscall::gather(self.nr, &self.args, &self.thread.guest.memory) {
            Ok(gathered) => self.execute(&gathered, None).map_or_else(|o| o, Outcome::Value),
            Err(GatherError::TooBig(transfer)) => self.transfer(*transfer),
            Err(GatherError::GoHome(reason)) => Outcome::GoHome(reason.text().into()),
        }
    }

    /// Executes a call whose body is larger than a message, part by part.
    fn transfer(&self, mut transfer: Transfer) -> Outcome {
        let memory = &self.thread.guest.memory;
        loop {
            let steady = transfer.is_steady();
            let (ret, reply) = match transfer.next(memory) {
                Step::Done(ret) => return Outcome::Value(ret),
                Step::GoHome(reason) => return Outcome::GoHome(reason.text().into()),
                // Natively neither a signal nor a move comes between the parts of what nobody waits in.
                Step::Call(request) if steady => match self.make(request, None, 0, false) {
                    Ok(sent) => sent,
                    Err(outcome) => return outcome,
                },
                Step::Call(request) => match self.send(request, None) {
                    Ok(sent) => sent,
                    Err(outcome) => return outcome,
                },
            };
            if reply.is_empty() && is_restart(ret) {
                transfer.not_made(ret);
                continue;
            }
            if let Err(e) = transfer.reply(Reply::from_parts(ret, &reply), memory) {
                tracing::error!(error = %e, "home breaks the protocol");
                return Outcome::Handled;
            }
        }
    }

    /// Sends one gathered call, waits for its end and scatters what it gave. With `mask`, the call is made under this
    /// signal mask.
    pub(super) fn execute(&self, gathered: &Gathered, mask: Option<u64>) -> Result<i64, Outcome> {
        let (ret, outs) = self.send(&gathered.request, mask)?;
        if outs.is_empty() {
            return Ok(ret);
        }
        gathered
            .scatter(Reply::from_parts(ret, &outs), &self.thread.guest.memory)
            .map_err(|e| {
                tracing::error!(error = %e, "home breaks the protocol");
                Outcome::Handled
            })
    }

    /// Sends a call and waits for its end: its result and the encoded bytes that came with it.
    fn send(&self, request: &CallRequest, mask: Option<u64>) -> Result<(i64, Vec<u8>), Outcome> {
        let mut flags = match syscall::terminal_use(request.nr, &request.args) {
            Some(TerminalUse::Changes) => self.terminal_mask(),
            _ => 0,
        };
        loop {
            let (ret, outs) = self.send_once(request, mask, flags)?;
            if ret != wire::MASK_WANTED || flags & wire::MASK_KNOWN != 0 {
                return Ok((ret, outs));
            }
            flags = self.terminal_mask();
        }
    }

    /// What the calling thread blocks of the signals of terminals, as flags of a frame.
    fn terminal_mask(&self) -> u16 {
        let blocked = SignalStatus::read(self.thread.outer).unwrap_or_default().blocked;
        let flag = |signal: i32, flag: u16| if blocked >> (signal - 1) & 1 == 1 { flag } else { 0 };
        wire::MASK_KNOWN | flag(libc::SIGTTIN, wire::BLOCKS_TTIN) | flag(libc::SIGTTOU, wire::BLOCKS_TTOU)
    }

    fn send_once(
        &self,
        request: &CallRequest,
        mask: Option<u64>,
        flags: u16,
    ) -> Result<(i64, Vec<u8>), Outcome> {
        // A signal that was queued before home could be told to interrupt this call would wait for its end.
        self.make(request, mask, flags, true)
    }

    /// Has home make a call. One that is `hindered` by a signal that has arrived, or by a move, is not made: its result is then a
    /// restart code, without any bytes.
    fn make(
        &self,
        request: &CallRequest,
        mask: Option<u64>,
        flags: u16,
        hindered: bool,
    ) -> Result<(i64, Vec<u8>), Outcome> {
        let Ok(link) = self.shared.link() else {
            return Err(Outcome::Handled);
        };
        let mut body = Vec::with_capacity(request.encoded_len());
        request.encode(&mut body);
        let seq = link.next_seq();
        // What is known of an earlier call says nothing of this one.
        *self.thread.sleep.lock() = None;
        *self.thread.call.lock() = InCall::Forwarded(Forwarded {
            notification: self.notification,
            seq,
            mask,
            nr: self.nr,
            started: Instant::now(),
        });
        let pending = hindered && self.thread.must_return(mask);
        let moves = hindered && self.thread.guest.freezing.load(Ordering::Acquire);
        if moves || (pending && mask.is_none()) {
            return Ok((RESTARTNOINTR, Vec::new()));
        }
        self.thread.forwarded.fetch_add(1, Ordering::Relaxed);
        let tid = self.thread.tid;
        let mut header = Header::new(Kind::Call as u16, tid, seq);
        header.flags |= flags;
        if pending {
            // A signal that only the temporary mask unblocks: natively a call that need not wait ends before it.
            header.flags |= wire::INTERRUPT_AT_ONCE;
        }
        let (_, mut reply) = link
            .call(tid as u32, header, &[&body])
            .map_err(|_| Outcome::Handled)?;
        let before = std::mem::replace(&mut *self.thread.call.lock(), InCall::Busy(self.notification));
        if let InCall::Forwarded(f) = before {
            *self.thread.sleep.lock() = Some(Wait {
                nr: f.nr,
                args: self.args,
                started: f.started,
                timeout: None,
            });
        }
        let Some(ret) = reply.first_chunk::<8>().copied() else {
            return Err(Outcome::Handled);
        };
        reply.drain(..8);
        // restart_syscall(2) would find nothing to restart here: the call is made again with its arguments.
        let ret = match i64::from_le_bytes(ret) {
            RESTART_BLOCK => RESTARTNOHAND,
            ret => ret,
        };
        Ok((ret, reply))
    }

    /// Asks home for something that is not a call, on this thread's lane.
    pub(super) fn ask<T: bincode::Decode<()>>(&self, kind: Kind, body: &[u8]) -> Result<T, Outcome> {
        let tid = self.thread.tid;
        let bytes = self
            .shared
            .ask(tid, tid, kind, body)
            .map_err(|_| Outcome::Handled)?;
        wire::decode(&bytes).map_err(|e| {
            tracing::error!(error = %e, "home breaks the protocol");
            Outcome::Handled
        })
    }

    fn split(&self, row: &'static Row, kind: SplitKind) -> Outcome {
        super::split::split(self, row, kind).unwrap_or_else(|outcome| outcome)
    }

    /// Puts a file's content under the descriptor that the guest named and lets its own kernel map it.
    pub(super) fn map_file(&self, file: &wire::FileRef, fd: i32) -> Result<Outcome, Outcome> {
        let stored = self.shared.file(file);
        let stored = match stored {
            Ok(s) => s,
            Err(e) => {
                tracing::error!(error = %e, "file for a mapping");
                return Ok(Outcome::Value(-i64::from(e.raw_os_error().unwrap_or(libc::EIO))));
            }
        };
        let listener = &self.thread.guest.listener;
        if let Err(e) = listener.add_fd(self.notification, stored.fd.as_fd(), u32::try_from(fd).ok(), true) {
            tracing::error!(error = %e, "file for a mapping");
            return Ok(Outcome::Handled);
        }
        Ok(Outcome::Continue)
    }
}
