//! Signals at home, on their way to guests.

use std::time::{Duration, Instant};

use anyhow::Context;
use linklayer::frame::Header;
use linklayer::image::{SigAction, SigInfo};
use linklayer::quic::Link;
use linklayer::wire::{self, Kind};
use shim::ptrace::{self, PendingQueue, Stopped};
use shim::vessel::Vessel;

use crate::calls;
use crate::home::Home;
use crate::process::{Away, Mode, Process, Role};

/// Sends a signal on a lane. A lost contact is noticed elsewhere.
pub fn send(link: &Link, lane: u32, signal: &wire::Signal) {
    let body = wire::encode(signal);
    if let Err(e) = link.send(
        lane,
        Header::new(Kind::Signal as u16, signal.pid, link.next_seq()),
        &[&body],
    ) {
        tracing::debug!(error = %e, "signal not sent");
    }
}

/// Whether a SIGCONT is pending for a single thread of the process: it is blocked there, and no catcher will report it.
pub fn continued_thread(pid: i32) -> bool {
    let bit = 1u64 << (libc::SIGCONT - 1);
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    tasks
        .flatten()
        .any(|task| pending(&task.path(), "SigPnd:") & bit != 0)
}

/// A set of pending signals of a thread, as its status file tells.
pub fn pending(task: &std::path::Path, which: &str) -> u64 {
    let status = std::fs::read_to_string(task.join("status")).unwrap_or_default();
    status
        .lines()
        .find_map(|l| l.strip_prefix(which))
        .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
        .unwrap_or(0)
}

/// A signal in a set of signals.
fn bit(signal: i32) -> u64 {
    1 << (signal - 1).clamp(0, 63)
}

/// Signals that were pending at once, in the order in which a thread that blocks none of them runs their handlers: the kernel makes
/// the frame of the one with the lowest number first, and those that are made later, as far as the handler's mask lets them, are
/// returned from first (kernel/signal.c, get_signal).
pub fn in_order<T>(mut pending: Vec<T>, actions: &[SigAction], number: impl Fn(&T) -> i32) -> Vec<T> {
    let mut done = Vec::new();
    let mut frames: Vec<(T, u64)> = Vec::new();
    let mut blocked = 0u64;
    loop {
        let bit = |one: &T| bit(number(one));
        let next = (pending.iter().enumerate())
            .filter(|(_, one)| blocked & bit(one) == 0)
            .min_by_key(|(_, one)| number(one))
            .map(|(at, _)| at);
        if let Some(at) = next {
            let one = pending.remove(at);
            match actions.get((number(&one) - 1).max(0) as usize) {
                Some(action) if action.handler > 1 => {
                    let before = blocked;
                    let own = if action.flags & libc::SA_NODEFER as u64 == 0 {
                        bit(&one)
                    } else {
                        0
                    };
                    blocked |= action.mask | own;
                    frames.push((one, before));
                }
                _ => done.push(one),
            }
        } else if let Some((one, before)) = frames.pop() {
            blocked = before;
            done.push(one);
        } else {
            return done;
        }
    }
}

/// Whether the default action of a signal is to stop the process.
pub fn stops(signal: i32) -> bool {
    [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal)
}

impl Away {
    /// Whether this signal has been taken and not relayed. Then it is another one of it, which comes later.
    fn has_gathered(&self, signal: i32) -> bool {
        self.gathered.iter().any(|(_, one)| one.signal == signal)
    }

    /// Whether one of these signals has not been taken yet.
    fn lacks(&self, signals: u64) -> bool {
        let taken = |set: u64, (_, one): &(u32, wire::Signal)| set | bit(one.signal);
        signals & !self.gathered.iter().fold(0, taken) != 0
    }
}

impl Process {
    /// Relays what its catcher has taken.
    pub(crate) fn give_gathered(&mut self) {
        let Mode::Away(away) = &mut self.mode else { return };
        let gathered = std::mem::take(&mut away.gathered);
        for (lane, signal) in in_order(gathered, &self.actions, |(_, s)| s.signal) {
            away.relay(lane, signal);
        }
    }
}

impl Home {
    pub(crate) fn vessel_signal(
        &mut self,
        pid: i32,
        tid: i32,
        sig: i32,
        mut stopped: Stopped,
    ) -> anyhow::Result<()> {
        let is_catcher = self.tasks.get(&tid).is_some_and(|t| t.role == Role::Catcher);
        if self.is_carried(pid, &stopped)? {
            if let Some(process) = self.processes.get_mut(&pid).filter(|_| is_catcher) {
                process.give_gathered();
            }
            return Ok(stopped.cont(0)?);
        }
        let process = self.processes.get(&pid).context("process of the vessel")?;
        let handler = process.actions.get(sig as usize - 1).map_or(0, |a| a.handler);
        let (default, handled) = (handler == 0, handler > 1);
        let others = if is_catcher && handled && sig != libc::SIGCONT {
            self.others_pending(pid, sig, &stopped)
        } else {
            0
        };
        let process = self.processes.get_mut(&pid).context("process of the vessel")?;
        // A program can tell in which order it gets what is pending at once.
        if is_catcher && (!handled || process.away().is_some_and(|away| away.has_gathered(sig))) {
            process.give_gathered();
        }
        let more = handled && process.away().is_some_and(|away| away.lacks(others));
        if process.dying == Some(sig) || sig == libc::SIGSTOP {
            // The kernel at home does what the signal does by default.
            return Ok(stopped.cont(sig)?);
        }
        if stops(sig) && default && self.would_stop(pid, tid, sig) {
            return Ok(stopped.cont(sig)?);
        }
        let info = stopped.siginfo()?;
        let calls = |w: &std::sync::Arc<calls::Worker>| w.current.lock().is_some();
        // In front of the answer to the call that the signal interrupts.
        let lane = match self.shared.worker(tid).filter(calls) {
            Some(_) => tid,
            None => self.lane_of_signals(pid),
        };
        // From a timer for this thread alone, or from another process to this thread.
        let for_thread = shim::signal::is_for_one_thread(&info)
            && self
                .tasks
                .get(&tid)
                .is_some_and(|t| t.role == Role::Worker && t.unblocked >> (sig - 1) & 1 == 1);
        let process = self.processes.get_mut(&pid).context("process of the vessel")?;
        if let Some(away) = process.away() {
            let body = wire::Signal {
                pid,
                tid: if for_thread { tid } else { 0 },
                signal: sig,
                info: info.0.to_vec(),
                counted: true,
            };
            if is_catcher {
                away.gathered.push((lane as u32, body));
            } else {
                away.relay(lane as u32, body);
            }
        }
        if is_catcher && !more {
            process.give_gathered();
        }
        if [libc::SIGTTIN, libc::SIGTTOU].contains(&sig)
            && let Some(worker) = self.shared.worker(tid)
            && worker.current.lock().is_some()
        {
            // The terminal would send it again and again while the call is restarted here.
            Vessel::abort_call(&mut stopped, &worker.slot)?;
        }
        stopped.cont(0)?;
        if sig == libc::SIGCONT && is_catcher {
            self.relayed_continue(pid)?;
        }
        Ok(())
    }

    /// Signals with handlers that the catcher of a vessel is going to take when it goes on, as a set without `sig`.
    fn others_pending(&self, pid: i32, sig: i32, stopped: &Stopped) -> u64 {
        let pending = stopped.first_pending(PendingQueue::Process).unwrap_or_default();
        let Some(process) = self.processes.get(&pid).filter(|_| !pending.is_empty()) else {
            return 0;
        };
        let workers = self
            .tasks
            .values()
            .filter(|t| t.pid == pid && t.role == Role::Worker);
        let elsewhere = workers.fold(0, |set, worker| set | worker.unblocked);
        let its = |info: &&SigInfo| {
            let at = (info.signo() - 1).max(0) as usize;
            let handled = process.actions.get(at).is_some_and(|action| action.handler > 1);
            let here = elsewhere & bit(info.signo()) == 0;
            handled && here && info.signo() != sig && !process.carried.contains(info)
        };
        let add = |set: u64, info: &SigInfo| set | bit(info.signo());
        pending.iter().filter(its).fold(0, add)
    }

    /// Whether a stop signal that is left to its default action stops the process. A guest can block it, which only its node
    /// knows; a node that does not say so in time is not waited for.
    fn would_stop(&mut self, pid: i32, tid: i32, sig: i32) -> bool {
        const PATIENCE: Duration = Duration::from_secs(2);
        if self.shared.worker(tid).is_some() {
            // Sent by the terminal for a call that was made under the guest thread's own mask.
            return true;
        }
        let Some(process) = self.processes.get_mut(&pid) else {
            return true;
        };
        if process.stopping.take() == Some(sig) {
            return true;
        }
        let Some(away) = process.away() else { return true };
        let link = away.link.clone();
        let (send, answer) = crossbeam_channel::bounded(1);
        crate::contact::spawn("stop", move || {
            let body = wire::encode(&wire::Stop { pid, signal: sig });
            let header = Header::new(Kind::WouldStop as u16, pid, link.next_seq());
            let answered = link.call(pid as u32, header, &[&body]);
            let would = answered.ok().and_then(|(_, body)| wire::decode(&body).ok());
            let _ = send.send(would.is_none_or(|wire::WouldStop(would)| would));
        });
        answer.recv_timeout(PATIENCE).unwrap_or(true)
    }

    /// A guest takes a stop signal that it had blocked: the vessel stops of it.
    pub(crate) fn stop_as_guest(&mut self, stop: &wire::Stop) -> anyhow::Result<()> {
        let Some(process) = self.processes.get_mut(&stop.pid) else {
            return Ok(());
        };
        if !stops(stop.signal) {
            return Ok(());
        }
        let Some(catcher) = process.away().map(|away| away.vessel.catcher()) else {
            return Ok(());
        };
        process.stopping = Some(stop.signal);
        Ok(shim::signal::kill_thread(stop.pid, catcher, stop.signal)?)
    }

    /// The lane on which a process's signals are sent: when one of its threads waits for an answer that must not come
    /// before them, that thread's.
    fn lane_of_signals(&self, pid: i32) -> i32 {
        let Some(Mode::Away(away)) = self.processes.get(&pid).map(|p| &p.mode) else {
            return pid;
        };
        if let Some((_, tid)) = self.settling.filter(|(settling, _)| *settling == pid) {
            return tid;
        }
        let calling = |s: &&Stopped| {
            self.shared
                .worker(s.tid())
                .is_some_and(|w| w.current.lock().is_some())
        };
        away.parked.iter().find(calling).map_or(pid, Stopped::tid)
    }

    /// The SIGCONT that ended a group-stop is on its way to the guest: its workers go on.
    fn relayed_continue(&mut self, pid: i32) -> anyhow::Result<()> {
        let process = self.processes.get_mut(&pid).context("process of the vessel")?;
        let Some(away) = process.away() else { return Ok(()) };
        away.continued = true;
        // It takes the signal before it does anything else.
        away.thaw(pid);
        for worker in std::mem::take(&mut away.parked) {
            let tid = worker.tid();
            if let Err(e) = self.leave_stop(pid, worker) {
                tracing::debug!(tid, error = format!("{e:#}"), "worker after a stop");
            }
        }
        Ok(())
    }

    /// A worker goes on after a group-stop. Natively a thread that was stopped in a call runs the handler of SIGCONT
    /// before anything that happened since can complete the call.
    pub(crate) fn leave_stop(&mut self, pid: i32, mut worker: Stopped) -> anyhow::Result<()> {
        let process = self.processes.get(&pid).context("process of the vessel")?;
        let handled = process
            .actions
            .get(libc::SIGCONT as usize - 1)
            .is_some_and(|a| a.handler > 1);
        if handled && let Some(known) = self.shared.worker(worker.tid()) {
            let interruptible = known.current.lock().is_some();
            if interruptible {
                Vessel::abort_call(&mut worker, &known.slot)?;
            }
        }
        Ok(worker.cont(0)?)
    }

    /// A call has sent a signal that its own process may be meant by. Natively its handler has run when the call
    /// returns: the answer goes behind everything that the catcher takes. So it does with a signal for another process that is away: it is
    /// pending there before the sender can do anything that this one hears of.
    pub(crate) fn settle(&mut self, pending: calls::Pending, ret: i64) -> anyhow::Result<()> {
        const PATIENCE: Duration = Duration::from_millis(200);
        let (pid, tid) = (pending.worker().pid, pending.worker().tid);
        let other = pending.signalled();
        self.settling = Some((pid, tid));
        let until = Instant::now() + PATIENCE;
        let drained = loop {
            if let Err(e) = self.reports() {
                break Err(e);
            }
            if !self.catcher_busy(other.unwrap_or(pid)) || Instant::now() > until {
                break Ok(());
            }
            std::thread::sleep(Duration::from_micros(20));
        };
        self.settling = None;
        pending.finish(ret);
        drained
    }

    /// Whether signals are on their way through a vessel's catcher.
    fn catcher_busy(&mut self, pid: i32) -> bool {
        let Some(away) = self.processes.get_mut(&pid).and_then(|p| p.away()) else {
            return false;
        };
        let task = format!("/proc/{pid}/task/{}", away.vessel.catcher());
        let Ok(status) = std::fs::read_to_string(format!("{task}/status")) else {
            return false;
        };
        let value = |name: &str| {
            status
                .lines()
                .find_map(|l| l.strip_prefix(name))
                .unwrap_or("")
                .trim()
        };
        // In a group-stop nothing more comes.
        let waits = value("State:").starts_with('S') || away.frozen;
        let signals = |name| u64::from_str_radix(value(name), 16).unwrap_or(0);
        // What it blocks it leaves to a worker in a call on a terminal.
        !waits || (!away.frozen && signals("ShdPnd:") & !signals("SigBlk:") != 0)
    }

    /// A call has made a timer whose signals are for one thread only, or has sent one a signal. They would stay pending in
    /// its worker, which blocks everything: it unblocks this one, and then the call ends.
    pub(crate) fn unblock(&mut self, pending: calls::Pending, ret: i64) -> anyhow::Result<()> {
        let Some((tid, signal)) = pending.unblocks() else {
            pending.finish(ret);
            return Ok(());
        };
        let Some(task) = self.tasks.get_mut(&tid).filter(|t| t.role == Role::Worker) else {
            pending.finish(ret);
            return Ok(());
        };
        task.unblocked |= 1 << (signal - 1);
        task.unblocking.push((pending, ret));
        Ok(ptrace::interrupt(tid)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handled(mask: u64, flags: i32) -> SigAction {
        SigAction {
            handler: 4096,
            flags: flags as u64,
            restorer: 0,
            mask,
        }
    }

    #[test]
    fn handlers_of_signals_that_were_pending_at_once_run_as_natively() {
        let mut actions = vec![SigAction::default(); 64];
        let order = |pending: &[i32], actions: &[SigAction]| in_order(pending.to_vec(), actions, |s| *s);
        // By default there is no handler, so that they take effect as they come.
        assert_eq!(order(&[10, 21], &actions), [10, 21]);
        for signal in [10, 21, 34] {
            actions[signal - 1] = handled(0, 0);
        }
        assert_eq!(order(&[10, 21], &actions), [21, 10]);
        // One that ends the process does so before a handler runs.
        assert_eq!(order(&[10, 15, 21], &actions), [15, 21, 10]);
        // The same one waits until its handler is done.
        assert_eq!(order(&[34, 10, 34], &actions), [34, 34, 10]);
        actions[9] = handled(1 << 20, 0);
        assert_eq!(order(&[10, 21], &actions), [10, 21]);
        actions[33] = handled(0, libc::SA_NODEFER);
        let twice = [(34, 'a'), (34, 'b')];
        let got = in_order(twice.to_vec(), &actions, |s| s.0);
        assert_eq!(got, [(34, 'b'), (34, 'a')]);
    }
}
