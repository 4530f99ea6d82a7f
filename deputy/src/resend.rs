//! Signals across an exec.
//!
//! An exec that succeeds discards the guest, and with it what it was sent and has not taken. Natively that stays pending and
//! reaches the new program. So while the vessel executes, home keeps what arrives; of what it had sent before, the supervisor
//! says how much the guest has got, and which signals are pending there; the rest is queued for the new program.
//!
//! The kernel lets nobody queue codes of its own (CLD_, SI_USER, SI_KERNEL) for others: such a signal is queued with a
//! token, and its siginfo is set when it is delivered.

use std::collections::VecDeque;

use linklayer::image::{ProcessImage, SigInfo};
use linklayer::wire;
use shim::ptrace::Stopped;

use crate::home::Home;
use crate::process::Mode;

/// Most signals that are remembered, or kept during an exec. Real-time signals beyond that are lost in it.
const MOST: usize = 1024;
/// What the tokens of this deputy begin with.
const TOKENS: u64 = 0x6d6f_7373_0000_0000;

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

    /// What is to be queued for the new program of process `pid`, whose thread `tid` made the exec.
    fn for_new_program(&mut self, pid: i32, tid: i32, request: &wire::Exec) -> Vec<SigInfo> {
        let unseen = self
            .count
            .saturating_sub(request.relayed)
            .min(self.last.len() as u64) as usize;
        let rest = self.last.split_off(self.last.len() - unseen);
        let mut infos = Vec::new();
        for signal in (1..=64).filter(|s| request.pending >> (s - 1) & 1 == 1) {
            let known = self.last.iter().rev().find(|sent| sent.signal == signal);
            infos.push(known.map_or_else(
                || SigInfo::user(signal, libc::SI_USER, pid, nix::unistd::getuid().as_raw()),
                |sent| shim::signal::info_from_bytes(&sent.info),
            ));
        }
        let later = rest.iter().chain(self.held.iter().flatten());
        // What is for another thread ends with that.
        let its = later.filter(|s| s.tid == 0 || s.tid == tid);
        infos.extend(its.map(|s| shim::signal::info_from_bytes(&s.info)));
        infos
    }
}

/// A signal that was queued anew.
pub struct Resent {
    token: u64,
    info: SigInfo,
}

impl Resent {
    fn is(&self, info: &SigInfo) -> bool {
        info.code() == libc::SI_QUEUE && shim::signal::info_value(info) == self.token
    }
}

/// The siginfo of a signal as it first was.
pub fn first(resent: &mut Vec<Resent>, info: SigInfo) -> SigInfo {
    let at = resent.iter().position(|r| r.is(&info));
    at.map_or(info, |at| resent.swap_remove(at).info)
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

    /// An exec has succeeded, and the process is stopped in it.
    pub(crate) fn resend(&mut self, pid: i32, tid: i32, request: &wire::Exec) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        let Mode::Away(away) = &mut process.mode else {
            return;
        };
        for info in away.sent.for_new_program(pid, tid, request) {
            let signal = info.signo();
            // The kernel takes negative codes as they are, but for this one.
            let queued = if info.code() < 0 && info.code() != libc::SI_TKILL {
                info
            } else {
                let token = TOKENS + crate::shared::next_id();
                process.resent.push(Resent { token, info });
                shim::signal::queued_info(signal, token)
            };
            let sent = shim::signal::queue_process(pid, signal, &queued);
            if let Err(e) = sent.or_else(|_| shim::signal::kill_process(pid, signal)) {
                tracing::debug!(pid, signal, error = %e, "signal across an exec");
            }
        }
    }

    /// A process was described for another node: what is pending goes with it, as it first was.
    pub(crate) fn carry(&mut self, image: &mut ProcessImage) {
        let Some(process) = self.processes.get_mut(&image.pid) else {
            return;
        };
        process.carried = image.pending.clone();
        let threads = image.threads.iter_mut().map(|t| &mut t.pending);
        for info in threads.chain([&mut image.pending]).flatten() {
            if let Some(resent) = process.resent.iter().find(|r| r.is(info)) {
                *info = resent.info;
            }
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
        process.resent.retain(|r| !r.is(&info));
        Ok(true)
    }

    /// The siginfo of the signal that a thread is about to take, as it first was.
    pub(crate) fn siginfo(&mut self, pid: i32, stopped: &Stopped) -> anyhow::Result<SigInfo> {
        let info = stopped.siginfo()?;
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(info);
        };
        Ok(first(&mut process.resent, info))
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

    fn exec(pending: u64, relayed: u64) -> wire::Exec {
        wire::Exec {
            call: Vec::new(),
            sigmask: 0,
            pending,
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
            .for_new_program(7, 7, &exec(1 << 9, 1))
            .iter()
            .map(SigInfo::signo)
            .collect();
        assert_eq!(got, [10, 15, 1]);
    }

    #[test]
    fn what_the_guest_took_is_over() {
        let mut sent = Sent::default();
        assert!(sent.sends(signal(15, 0)).is_some());
        assert!(sent.for_new_program(7, 7, &exec(0, 1)).is_empty());
        // Pending without being known: it sent it to itself.
        let own = sent.for_new_program(7, 7, &exec(1 << 4, 1));
        assert_eq!(own.iter().map(SigInfo::signo).collect::<Vec<_>>(), [5]);
    }
}
