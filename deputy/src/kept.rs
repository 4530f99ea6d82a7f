//! What arrives at home for a guest that stands still so as to move.
//!
//! Once a guest has been captured, nothing that is given to it counts any more; so its supervisor has home keep everything back
//! before it captures. Where the process goes on, it gets what was kept, before it executes anything.

use crossbeam_channel::Sender;
use linklayer::image::SigInfo;
use linklayer::quic::ReplyTo;
use linklayer::wire::{self, Kind};
use shim::ptrace;
use shim::timed::Looker;

use crate::home::{Home, unless_gone};
use crate::process::{Away, Mode, send};
use crate::signals;

/// Signals and stops of a guest that moves.
#[derive(Debug, Default)]
pub struct Kept {
    signals: Vec<wire::Signal>,
}

impl Kept {
    /// Its signals, with the thread that each is for, or 0.
    pub fn signals(self) -> impl Iterator<Item = (i32, SigInfo)> {
        self.signals
            .into_iter()
            .map(|s| (s.tid, shim::signal::info_from_bytes(&s.info)))
    }
}

impl Away {
    /// Sends the guest a signal, or keeps it.
    pub fn relay(&mut self, lane: u32, signal: wire::Signal) {
        match &mut self.kept {
            Some(kept) => kept.signals.push(signal),
            None => {
                if let Some(now) = self.sent.sends(signal) {
                    signals::send(&self.link, lane, &now);
                }
            }
        }
    }

    /// Tells the guest whether it is to stand still, or leaves that for later.
    pub fn say_frozen(&mut self, pid: i32) {
        let still = self.frozen || self.asked;
        if self.kept.is_some() || still == self.told {
            return;
        }
        self.told = still;
        let kind = if still { Kind::Freeze } else { Kind::Thaw };
        send(&self.link, pid, kind, &wire::encode(&wire::Pid(pid)));
    }

    /// Its group-stop has ended, and the guest has been sent the SIGCONT.
    pub fn thaw(&mut self, pid: i32) {
        if std::mem::take(&mut self.frozen) {
            self.say_frozen(pid);
        }
    }

    /// The guest takes signals again. One that was built anew (`fresh`) has not been told to stand still.
    pub fn give_kept(&mut self, pid: i32, fresh: bool) {
        let kept = self.kept.take();
        if fresh {
            self.told = false;
            self.sent = crate::resend::Sent::default();
        }
        if self.frozen || self.asked {
            self.say_frozen(pid);
        }
        for signal in kept.into_iter().flat_map(|kept| kept.signals) {
            self.relay(pid as u32, signal);
        }
        self.say_frozen(pid);
    }
}

impl Home {
    /// The guest stands still, and what was sent to it before has arrived.
    pub(crate) fn keep_back(&mut self, reply: ReplyTo, pid: i32) -> anyhow::Result<()> {
        let Some(process) = self.processes.get_mut(&pid) else {
            reply.errno(libc::ESRCH);
            return Ok(());
        };
        process.give_gathered();
        let Some(away) = process.away() else {
            reply.errno(libc::ESRCH);
            return Ok(());
        };
        away.kept.get_or_insert_default();
        reply.errno(0);
        Ok(())
    }

    /// Stops a process where it is, or lets it go on. It is no stop of job control: nobody at home is told of it.
    pub(crate) fn freeze(
        &mut self,
        pid: i32,
        stop: bool,
        done: &Sender<Result<(), String>>,
    ) -> anyhow::Result<()> {
        let Some(process) = self.processes.get_mut(&pid) else {
            let _ = done.send(Err(format!("process {pid} is not one of this job")));
            return Ok(());
        };
        if process.breakpoint.is_some()
            || process.leaving.is_some()
            || matches!(process.mode, Mode::Launching(..))
        {
            let _ = done.send(Err(format!("process {pid} is being moved at this moment")));
            return Ok(());
        }
        let changes = process.frozen != stop;
        process.frozen = stop;
        let standing = if stop {
            Vec::new()
        } else {
            std::mem::take(&mut process.standing)
        };
        if let Some(away) = process.away() {
            away.asked = stop;
            away.say_frozen(pid);
        } else if stop && changes {
            // One that is stopped by job control is held when that lets it go.
            let mut looker = Looker::default();
            for task in self
                .tasks
                .values_mut()
                .filter(|t| t.pid == pid && !t.group_stopped)
            {
                task.seen = looker.look(task.tid);
                unless_gone(ptrace::interrupt(task.tid))?;
            }
        }
        for thread in standing {
            self.let_go_unless_gone(thread)?;
        }
        let _ = done.send(Ok(()));
        Ok(())
    }
}
