//! Signals across an exec.
//!
//! An exec that succeeds discards the guest, and with it what it was sent and has not taken. Natively that stays pending and
//! reaches the new program. So while the vessel executes, home keeps what arrives; of what it had sent before, the supervisor
//! says how much the guest has got, and which signals are pending there; the rest is queued for the new program.

use std::collections::VecDeque;

use linklayer::image::{ProcessImage, SigInfo};
use linklayer::wire;
use shim::ptrace::Stopped;

use crate::home::Home;
use crate::process::Mode;

/// Most signals that are remembered, or kept during an exec. Real-time signals beyond that are lost in it.
const MOST: usize = 1024;

/// The signals that a guest was sent.
#[derive(Default)]
pub struct Sent {
    count: u64,
    /// The last of them.
    last: VecDeque<wire::Signal>,
    /// What arrives while the vessel executes something.
    held: Option<Vec<wire::Signal>>,
}

impl Sent {
    /// Takes note of a signal; gives it back if it is to be sent now.
    pub fn sends(&mut self, signal: wire::Signal) -> Option<wire::Signal> {
        if let Some(held) = &mut self.held {
            if held.len() < MOST {
                held.push(signal);
            }
            return None;
        }
        self.count += 1;
        self.last.push_back(signal.clone());
        if self.last.len() > MOST {
            self.last.pop_front();
        }
        Some(signal)
    }

    /// The vessel begins an exec.
    pub fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// What is to be queued for the new program of the process whose thread `tid` made the exec.
    fn for_new_program(&mut self, tid: i32, request: &wire::Exec) -> Vec<SigInfo> {
        let unseen = self
            .count
            .saturating_sub(request.relayed)
            .min(self.last.len() as u64) as usize;
        let rest = self.last.split_off(self.last.len() - unseen);
        let mut infos = request.pending.clone();
        infos.truncate(MOST);
        let later = rest.iter().chain(self.held.iter().flatten());
        // What is for another thread ends with that.
        let its = later.filter(|s| s.tid == 0 || s.tid == tid);
        infos.extend(its.map(|s| shim::signal::info_from_bytes(&s.info)));
        infos
    }
}

impl Home {
    /// An exec has failed: what was kept is sent.
    pub(crate) fn send_held(&mut self, pid: i32) {
        let executing = self.tasks.values().any(|t| t.pid == pid && t.executing.is_some());
        let Some(away) = self.processes.get_mut(&pid).and_then(|p| p.away()) else {
            return;
        };
        if executing {
            return;
        }
        for signal in away.sent.held.take().unwrap_or_default() {
            away.relay(pid as u32, signal);
        }
    }

    /// An exec has succeeded, and the process is stopped in it: it queues what it has not taken for itself, since nobody else may
    /// queue the kernel's own codes.
    pub(crate) fn resend(
        &mut self,
        pid: i32,
        tid: i32,
        request: &wire::Exec,
        stopped: &mut Stopped,
    ) -> anyhow::Result<()> {
        let Some(Mode::Away(away)) = self.processes.get_mut(&pid).map(|p| &mut p.mode) else {
            return Ok(());
        };
        let infos = away.sent.for_new_program(tid, request);
        if infos.is_empty() {
            return Ok(());
        }
        let Err(e) = shim::signal::queue_by_itself(stopped, &infos) else {
            return Ok(());
        };
        if e.is_gone() {
            return Err(e.into());
        }
        tracing::warn!(pid, error = %e, "signals across an exec lose their senders");
        for info in infos {
            let signal = info.signo();
            let sent = shim::signal::queue_process(pid, signal, &info);
            if let Err(e) = sent.or_else(|_| shim::signal::kill_process(pid, signal)) {
                tracing::debug!(pid, signal, error = %e, "signal across an exec");
            }
        }
        Ok(())
    }

    /// What is pending in an image goes with it; the vessel is not to send it once more.
    pub(crate) fn carry(&mut self, image: &ProcessImage) {
        if let Some(process) = self.processes.get_mut(&image.pid) {
            process.carried = image.pending.clone();
        }
    }

    /// Whether a vessel takes a signal that its guest has already.
    pub(crate) fn is_carried(&mut self, pid: i32, stopped: &Stopped) -> anyhow::Result<bool> {
        let Some(process) = self.processes.get_mut(&pid).filter(|p| !p.carried.is_empty()) else {
            return Ok(false);
        };
        let info = stopped.siginfo()?;
        let Some(at) = process.carried.iter().position(|c| *c == info) else {
            return Ok(false);
        };
        process.carried.swap_remove(at);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signal(signal: i32, tid: i32) -> wire::Signal {
        wire::Signal {
            pid: 7,
            tid,
            signal,
            info: SigInfo::user(signal, libc::SI_USER, 99, 0).0.to_vec(),
            counted: true,
        }
    }

    fn exec(pending: &[i32], relayed: u64) -> wire::Exec {
        wire::Exec {
            call: Vec::new(),
            sigmask: 0,
            pending: pending
                .iter()
                .map(|s| SigInfo::user(*s, libc::SI_USER, 99, 0))
                .collect(),
            relayed,
        }
    }

    #[test]
    fn a_new_program_gets_what_the_guest_has_not_taken() {
        let mut sent = Sent::default();
        assert!(sent.sends(signal(10, 0)).is_some());
        assert!(sent.sends(signal(15, 0)).is_some());
        assert!(sent.sends(signal(12, 8)).is_some());
        sent.hold();
        assert!(sent.sends(signal(1, 0)).is_none());
        // The guest has the first, which is pending; the second was on its way; the third was for a thread that is gone.
        let got: Vec<i32> = sent
            .for_new_program(7, &exec(&[10], 1))
            .iter()
            .map(SigInfo::signo)
            .collect();
        assert_eq!(got, [10, 15, 1]);
    }

    #[test]
    fn what_the_guest_took_is_over() {
        let mut sent = Sent::default();
        assert!(sent.sends(signal(15, 0)).is_some());
        assert!(sent.for_new_program(7, &exec(&[], 1)).is_empty());
        // Pending without being known: it sent it to itself.
        let own = sent.for_new_program(7, &exec(&[5], 1));
        assert_eq!(own.iter().map(SigInfo::signo).collect::<Vec<_>>(), [5]);
    }
}
