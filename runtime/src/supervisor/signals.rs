//! Signals that arrived at home, on their way to guests.
//!
//! A signal is queued for one guest thread with a siginfo that the kernel accepts from us, and gets its own siginfo at
//! the signal-delivery-stop.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use linklayer::image::SigInfo;
use linklayer::memory::GuestMemory;
use linklayer::wire::{self, Kind};
use shim::ptrace::Stopped;

use super::guest::{Guest, InCall, SignalStatus, Thread, Wait};
use super::tracer::{Hold, RESTARTNOHAND, Tracer};

/// The first token: no program's own values of sigqueue(3) look like it.
pub(super) const FIRST_TOKEN: u64 = 0x6d6f_7372_0000_0001;
/// The signals of job control that can be blocked. What is pending of them ends with a SIGCONT, also with one that is ignored.
pub(super) const STOPS: [i32; 3] = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
/// How many signals may be known as queued while none is pending.
const FIXES_MAX: usize = 256;
/// Most signals that are kept for children that are not made here yet.
const EARLY_MAX: usize = 256;

/// A queued signal that has not been taken yet.
pub(super) struct Fix {
    /// Its value while it is queued; 0 when it was queued with a siginfo of its own.
    token: u64,
    signal: i32,
    info: SigInfo,
    /// It was queued for the very thread that it is kept with, which counts it.
    counted: bool,
}

impl Fix {
    /// Of a signal that its guest has brought along.
    pub(super) fn brought(info: &SigInfo) -> Fix {
        Fix {
            token: 0,
            signal: info.signo(),
            info: *info,
            counted: false,
        }
    }

    /// Whether a queued signal is this one.
    fn is(&self, signal: i32, info: &SigInfo) -> bool {
        if self.token != 0 {
            return info.code() == libc::SI_QUEUE && shim::signal::info_value(info) == self.token;
        }
        if timer(info).is_some() {
            // Its count may have grown since it was queued.
            return self.signal == signal && same_timer(&self.info, info);
        }
        // Others of the same number may wait with other values. The sender is not compared: the kernel clears what is queued into
        // another pid namespace (kernel/signal.c, send_signal_locked).
        self.signal == signal
            && self.info.code() == info.code()
            && shim::signal::info_value(&self.info) == shim::signal::info_value(info)
    }
}

/// si_timerid and si_overrun of a siginfo with SI_TIMER (sigaction(2)).
fn timer(info: &SigInfo) -> Option<(i32, i32)> {
    let word = |i: usize| i32::from_ne_bytes([info.0[i], info.0[i + 1], info.0[i + 2], info.0[i + 3]]);
    (info.code() == libc::SI_TIMER).then(|| (word(16), word(20)))
}

/// What a thread waits for in rt_sigtimedwait(2), which takes it out of the mask meanwhile.
#[derive(Clone, Copy, Debug)]
pub(super) struct SignalWait {
    set: u64,
    /// Where the siginfo goes, or 0.
    info_at: u64,
}

impl SignalWait {
    fn is_for(&self, signal: i32) -> bool {
        self.set >> (signal - 1) & 1 == 1
    }
}

fn same_timer(a: &SigInfo, b: &SigInfo) -> bool {
    timer(a).map(|t| t.0) == timer(b).map(|t| t.0)
}

impl Tracer {
    /// Gives a signal that arrived at home to the guest.
    pub(super) fn relay(&mut self, signal: &wire::Signal) -> anyhow::Result<()> {
        let sig = signal.signal;
        if !(1..=64).contains(&sig) {
            return Ok(());
        }
        let Some(guest) = self.shared.guests.read().get(&signal.pid).cloned() else {
            // Home's child may have got it before there is one here.
            if self.threads.values().any(|t| t.cloning.is_some()) && self.early.len() < EARLY_MAX {
                self.early.push(signal.clone());
            }
            return Ok(());
        };
        // A guest that has left, and come back since, may not be quite dead yet: its threads have the same numbers.
        let own = |t: &&super::tracer::Traced| Arc::ptr_eq(&t.thread.guest, &guest);
        let named = self
            .threads
            .values()
            .filter(own)
            .find(|t| t.thread.tid == signal.tid);
        let named = named.map(|t| t.thread.clone());
        if signal.tid != 0
            && named.is_none()
            && self.threads.values().filter(own).any(|t| t.cloning.is_some())
        {
            // Home's thread may have got it before there is one here.
            if self.early.len() < EARLY_MAX {
                self.early.push(signal.clone());
            }
            return Ok(());
        }
        let mut relayed = guest.relayed.lock();
        if !relayed.admits(signal) {
            return Ok(());
        }
        if signal.tid != 0 && named.is_none() {
            // What is for one thread alone ends with that.
            return Ok(());
        }
        let info = shim::signal::info_from_bytes(&signal.info);
        let target = named.or_else(|| self.taker(&guest, sig));
        let waits = |t: &Arc<Thread>| {
            let traced = self.threads.get(&t.outer);
            traced.is_some_and(|t| t.waits.is_some_and(|w| w.is_for(sig)))
        };
        // Blocked everywhere, or waited for: it is pending for the process until somebody takes it; who waits may be stopped without
        // it. What is to be known of it is kept with the leader.
        let target = target.filter(|t| signal.tid != 0 || !waits(t));
        let keeper = target.as_ref().map_or(guest.outer, |t| t.outer);
        let status = SignalStatus::read(keeper).unwrap_or_default();
        if let Some(thread) = &target
            && guest.ignores(sig)
            && !(sig == libc::SIGCONT && status.pends(&STOPS))
            && thread.deliverable(None) >> (sig - 1) & 1 == 0
            && !thread.blocks(sig)
            && !waits(thread)
        {
            return Ok(());
        }
        let pending = match target {
            Some(_) => status.pending_thread,
            None => status.pending_process,
        } >> (sig - 1)
            & 1
            == 1;
        if let Some(traced) = self.threads.get_mut(&keeper) {
            if status.pending_thread | status.pending_process == 0 && traced.fixes.len() > FIXES_MAX {
                // Ignored while they were pending.
                traced.fixes.clear();
                traced.thread.queued.store(0, Ordering::Release);
            }
            if pending
                && let Some((_, more)) = timer(&info)
                && let Some(fix) = traced
                    .fixes
                    .iter_mut()
                    .find(|f| f.signal == sig && same_timer(&f.info, &info))
            {
                // A timer whose signal waits counts instead of queueing another one (timer_getoverrun(2)).
                let sum = timer(&fix.info)
                    .map_or(0, |(_, n)| n)
                    .saturating_add(more)
                    .saturating_add(1);
                fix.info.0[20..24].copy_from_slice(&sum.to_ne_bytes());
                return Ok(());
            }
        }
        if sig < 32 && pending {
            // Standard signals do not queue.
            if let Some(thread) = &target {
                self.interrupt_call(thread, Some(sig));
            }
            return Ok(());
        }
        // The kernel takes negative codes as they are from anybody, but for this one.
        let direct = info.code() < 0 && info.code() != libc::SI_TKILL;
        let (token, queued) = if direct {
            (0, info)
        } else {
            self.next_token += 1;
            (self.next_token, shim::signal::queued_info(sig, self.next_token))
        };
        if let Some(traced) = self.threads.get_mut(&keeper) {
            traced.fixes.push(Fix {
                token,
                signal: sig,
                info,
                counted: target.is_some(),
            });
        }
        let Some(thread) = target else {
            shim::signal::queue_process(guest.outer, sig, &queued)?;
            return Ok(());
        };
        thread.queued.fetch_add(1, Ordering::AcqRel);
        shim::signal::queue_thread(guest.outer, thread.outer, sig, &queued)?;
        self.interrupt_call(&thread, Some(sig));
        Ok(())
    }

    /// Relays what came for a child, or a thread, before it was there.
    pub(super) fn relay_early(&mut self, id: i32) {
        let all = std::mem::take(&mut self.early);
        let (its, others) = all
            .into_iter()
            .partition(|s: &wire::Signal| s.pid == id || s.tid == id);
        if self.threads.values().any(|t| t.cloning.is_some()) {
            self.early = others;
        }
        for signal in its {
            if let Err(e) = self.relay(&signal) {
                tracing::debug!(id, error = format!("{e:#}"), "early signal");
            }
        }
    }

    /// Gives a signal that a thread is about to take the siginfo that it had at home.
    pub(super) fn true_siginfo(&mut self, outer: i32, sig: i32, stopped: &mut Stopped) -> anyhow::Result<()> {
        let info = stopped.siginfo()?;
        if let Some(known) = self.take_fix(outer, |f| f.is(sig, &info))
            && known != info
        {
            stopped.set_siginfo(&known)?;
        }
        Ok(())
    }

    /// A thread takes a signal: gives what is delivered to it. What stops the process does so at home, and the guest is frozen to
    /// match.
    pub(super) fn stops_at_home(&self, outer: i32, sig: i32) -> i32 {
        let Some(traced) = self.threads.get(&outer) else {
            return sig;
        };
        let guest = &traced.thread.guest;
        if !STOPS.contains(&sig) || guest.action(sig).handler != 0 {
            return sig;
        }
        let body = wire::Stop {
            pid: guest.pid,
            signal: sig,
        };
        self.shared.tell(guest.pid, Kind::Stops, &wire::encode(&body));
        0
    }

    /// What is known of a signal that a thread takes.
    fn take_fix(&mut self, outer: i32, is: impl Fn(&Fix) -> bool) -> Option<SigInfo> {
        let traced = self.threads.get_mut(&outer)?;
        let guest = traced.thread.guest.clone();
        let own = traced.fixes.iter().position(&is).map(|at| {
            let fix = traced.fixes.remove(at);
            if fix.counted {
                traced.thread.queued.fetch_sub(1, Ordering::AcqRel);
            }
            fix
        });
        // A process-directed signal that was blocked everywhere is kept with the leader.
        let fix = own.or_else(|| {
            let leader = self.threads.get_mut(&guest.outer)?;
            let at = leader.fixes.iter().position(&is)?;
            Some(leader.fixes.remove(at))
        })?;
        if let Some((id, overrun)) = timer(&fix.info) {
            guest.overruns.lock().put(id, overrun);
        }
        Some(fix.info)
    }

    /// A thread is about to wait in rt_sigtimedwait(2), which takes a signal without a signal-delivery-stop.
    pub(super) fn wait_begins(&mut self, outer: i32, stopped: Stopped) -> anyhow::Result<()> {
        let Some(traced) = self.threads.get_mut(&outer) else {
            return Ok(());
        };
        let regs = stopped.regs()?;
        let set = traced.thread.guest.memory.read_u64(regs.rdi).unwrap_or(0);
        traced.waits = Some(SignalWait {
            set,
            info_at: regs.rsi,
        });
        let wait = Wait::begin(
            libc::SYS_rt_sigtimedwait as u32,
            &regs.call_args(),
            &traced.thread.guest.memory,
        );
        *traced.thread.sleep.lock() = Some(wait);
        Ok(stopped.syscall(0)?)
    }

    /// It has waited: what it took gets its siginfo before the thread can look at it.
    pub(super) fn wait_ends(&mut self, outer: i32, mut stopped: Stopped) -> anyhow::Result<()> {
        let mut regs = stopped.regs()?;
        let Some(traced) = self.threads.get_mut(&outer) else {
            return Ok(());
        };
        let (thread, at) = (
            traced.thread.clone(),
            traced.waits.take().map_or(0, |w| w.info_at),
        );
        let memory = &thread.guest.memory;
        let sig = regs.rax as i32;
        let mut bytes = [0; 128];
        if sig > 0 && at != 0 && memory.read(at, &mut bytes).is_ok() {
            let info = SigInfo(bytes);
            if let Some(known) = self.take_fix(outer, |f| f.is(sig, &info)) {
                // The kernel has written there just now.
                let _ = memory.write(at, &known.0);
            }
        } else if sig > 0 {
            let _ = self.take_fix(outer, |f| f.signal == sig);
        } else if regs.rax as i64 == -i64::from(libc::EINTR)
            && !matches!(self.holds.get(&thread.guest.pid), Some(Hold::Stopped))
        {
            // Interrupted for a capture, which may be over by now: it is waited again, here or elsewhere, unless a handler runs.
            regs.rax = RESTARTNOHAND as u64;
            stopped.set_regs(&regs)?;
        }
        Ok(stopped.cont(0)?)
    }

    /// What is pending for a thread and for its process.
    pub(super) fn pending(&self, outer: i32) -> Vec<SigInfo> {
        let Some(traced) = self.threads.get(&outer) else {
            return Vec::new();
        };
        let status = SignalStatus::read(outer).unwrap_or_default();
        let set = status.pending_thread | status.pending_process;
        let guest = &traced.thread.guest;
        let leader = self.threads.get(&guest.outer).filter(|_| guest.outer != outer);
        // What was for the leader alone ends with it.
        let of_leader = leader.into_iter().flat_map(|t| &t.fixes).filter(|f| !f.counted);
        let mut infos: Vec<SigInfo> = (traced.fixes.iter().chain(of_leader))
            .filter(|f| set >> (f.signal - 1) & 1 == 1)
            .map(|f| f.info)
            .collect();
        for signal in (1..=64).filter(|s| set >> (s - 1) & 1 == 1) {
            if !infos.iter().any(|info| info.signo() == signal) {
                // From this kernel.
                infos.push(SigInfo::user(signal, libc::SI_KERNEL, 0, 0));
            }
        }
        infos
    }

    /// Signals that are pending in an image get the siginfo that they had at home.
    pub(super) fn true_pending(&self, outer: i32, pending: &mut [SigInfo]) {
        let Some(traced) = self.threads.get(&outer) else {
            return;
        };
        for info in pending {
            if let Some(fix) = traced.fixes.iter().find(|f| f.is(info.signo(), info)) {
                *info = fix.info;
            }
        }
    }

    /// The thread the kernel would choose for a process-directed signal: the leader if it does not block it, else any
    /// that does not.
    fn taker(&self, guest: &Guest, sig: i32) -> Option<Arc<Thread>> {
        let leader = self.threads.get(&guest.outer).map(|t| &t.thread);
        leader
            .into_iter()
            .chain(
                self.threads
                    .values()
                    .map(|t| &t.thread)
                    .filter(|t| t.guest.outer == guest.outer),
            )
            .find(|t| !guest.ended.lock().contains(&t.outer) && !t.blocks(sig))
            .cloned()
    }

    /// Asks home to interrupt the thread's call, if one is in progress there.
    pub(super) fn interrupt_call(&self, thread: &Thread, sig: Option<i32>) {
        if let Some(sig) = sig
            && thread.blocks(sig)
        {
            return;
        }
        if let InCall::Forwarded(f) = &*thread.call.lock() {
            let body = wire::encode(&wire::Interrupt {
                tid: thread.tid,
                seq: f.seq,
            });
            self.shared.tell(thread.tid, Kind::Interrupt, &body);
        }
    }
}
