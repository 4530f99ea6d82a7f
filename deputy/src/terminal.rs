//! Calls on terminals by processes in the background.
//!
//! What the kernel does with such a call depends on whether the calling thread blocks SIGTTIN or SIGTTOU
//! ([`linklayer::syscall::TerminalUse`]). Workers block both. So a read that natively sends SIGTTIN fails with EIO and has done
//! nothing; a write to a terminal that stops writers is found out before it is made; and calls that change a terminal come
//! with the guest thread's mask at once. Where the guest thread blocks less than its worker, and the process is in the
//! background, the worker is *exposed*: for the time of the call it blocks what the guest thread blocks, and the catcher
//! blocks these signals instead, so that the thread that the terminal stops is the one that called.

use anyhow::Context;
use shim::ptrace::{self, Stopped};
use shim::vessel::WORKER_MASK;

use crate::calls::Pending;
use crate::home::Home;
use crate::process::Role;

/// The signals by which a terminal stops processes in the background.
pub const SIGNALS: u64 = 1 << (libc::SIGTTIN - 1) | 1 << (libc::SIGTTOU - 1);

/// What is to be done at a worker's next stop.
pub enum Step {
    /// Take the guest thread's mask and make the call.
    Begin(Pending),
    /// Block everything again and send this reply.
    End(Pending, Vec<u8>),
}

impl Step {
    /// The worker is gone.
    pub fn give_up(&self) {
        match self {
            Step::Begin(pending) => pending.give_up(),
            Step::End(pending, reply) => pending.answer(reply),
        }
    }
}

/// A vessel's calls of this kind.
#[derive(Default)]
pub struct Exposed {
    /// They wait for the catcher to block the signals.
    waiting: Vec<Pending>,
    /// Workers that are exposed or about to be.
    workers: Vec<i32>,
    /// The catcher blocks the signals.
    covered: bool,
}

impl Exposed {
    /// Whether the catcher has to change what it blocks, or somebody waits until it has.
    pub fn waits(&self) -> bool {
        !self.waiting.is_empty() || self.covered == self.workers.is_empty()
    }
}

impl Drop for Exposed {
    fn drop(&mut self) {
        for pending in self.waiting.drain(..) {
            pending.give_up();
        }
    }
}

/// Whether the kernel would look at the mask of a process: it has a terminal, in whose foreground it is not.
pub fn in_background(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    background(&stat)
}

/// Fields 5, 7 and 8 of proc_pid_stat(5).
fn background(stat: &str) -> bool {
    let Some(end) = stat.rfind(')') else { return false };
    let mut fields = stat[end + 1..].split_whitespace().skip(2);
    let mut field = || fields.next().unwrap_or("0");
    let (group, _session, terminal, foreground) = (field(), field(), field(), field());
    terminal != "0" && group != foreground
}

impl Home {
    /// Makes a call whose worker has to block no more than its guest thread.
    pub(crate) fn expose(&mut self, pending: Pending) -> anyhow::Result<()> {
        let (pid, tid) = (pending.worker().pid, pending.worker().tid);
        let Some(away) = self.processes.get_mut(&pid).and_then(|p| p.away()) else {
            pending.give_up();
            return Ok(());
        };
        away.exposed.workers.push(tid);
        if away.exposed.covered {
            return self.step(tid, Step::Begin(pending));
        }
        let catcher = away.vessel.catcher();
        away.exposed.waiting.push(pending);
        Ok(ptrace::interrupt(catcher)?)
    }

    /// The call has ended.
    pub(crate) fn cover(&mut self, pending: Pending, reply: Vec<u8>) -> anyhow::Result<()> {
        self.step(pending.worker().tid, Step::End(pending, reply))
    }

    fn step(&mut self, tid: i32, step: Step) -> anyhow::Result<()> {
        let Some(task) = self.tasks.get_mut(&tid).filter(|t| t.role == Role::Worker) else {
            step.give_up();
            return Ok(());
        };
        task.exposure = Some(step);
        Ok(ptrace::interrupt(tid)?)
    }

    /// A thread of a vessel is in an event stop.
    pub(crate) fn expose_further(&mut self, pid: i32, tid: i32, stopped: &mut Stopped) -> anyhow::Result<()> {
        let task = self.tasks.get_mut(&tid).context("thread of the vessel")?;
        match task.exposure.take() {
            Some(Step::Begin(pending)) => {
                let mask = WORKER_MASK & !SIGNALS & !task.unblocked | pending.guest_mask();
                stopped.set_sigmask(mask)?;
                pending.begin_exposed();
            }
            Some(Step::End(pending, reply)) => {
                stopped.set_sigmask(WORKER_MASK & !task.unblocked)?;
                pending.answer(&reply);
                self.exposed_gone(pid, tid);
            }
            None if task.role == Role::Catcher => {
                let Some(away) = self.processes.get_mut(&pid).and_then(|p| p.away()) else {
                    return Ok(());
                };
                let exposed = &mut away.exposed;
                let wanted = !exposed.workers.is_empty();
                if exposed.covered != wanted {
                    stopped.set_sigmask(if wanted { SIGNALS } else { 0 })?;
                    exposed.covered = wanted;
                }
                for pending in std::mem::take(&mut exposed.waiting) {
                    self.step(pending.worker().tid, Step::Begin(pending))?;
                }
            }
            None => {}
        }
        Ok(())
    }

    /// A worker is not exposed any more.
    pub(crate) fn exposed_gone(&mut self, pid: i32, tid: i32) {
        let Some(away) = self.processes.get_mut(&pid).and_then(|p| p.away()) else {
            return;
        };
        let before = away.exposed.workers.len();
        away.exposed.workers.retain(|t| *t != tid);
        if before > 0 && away.exposed.workers.is_empty() {
            // The catcher takes everything again from its next stop on; that it is gone is seen elsewhere.
            let _ = ptrace::interrupt(away.vessel.catcher());
        }
    }

    /// Takes back a call of a worker that is not exposed yet.
    pub(crate) fn not_exposed_yet(&mut self, pid: i32, tid: i32) -> Option<Pending> {
        let task = self.tasks.get_mut(&tid)?;
        let pending = match task.exposure.take() {
            Some(Step::Begin(pending)) => Some(pending),
            other => {
                task.exposure = other;
                let exposed = &mut self.processes.get_mut(&pid)?.away()?.exposed;
                let at = exposed.waiting.iter().position(|p| p.worker().tid == tid)?;
                Some(exposed.waiting.swap_remove(at))
            }
        };
        self.exposed_gone(pid, tid);
        pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_foreground_is_where_the_groups_are_equal() {
        let stat = |group: i32, terminal: i32, foreground: i32| {
            background(&format!(
                "7 (a) b) S 1 {group} 3 {terminal} {foreground} 4194304 0"
            ))
        };
        assert!(!stat(5, 34816, 5));
        assert!(stat(5, 34816, 6));
        assert!(!stat(5, 0, -1));
        assert!(!background("gone"));
    }
}
