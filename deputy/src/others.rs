//! Processes that work on the memory of others (process_vm_readv(2) and its kin, /proc/PID/mem).
//!
//! At home the kernel would find the empty memory of a vessel. So both are brought home for such a call, and stay there: what a process
//! does at home is not seen, and it may do the same again. A process that is at home when it does so for the first time is not seen at all
//! (README, limits).

use linklayer::quic::ReplyTo;
use linklayer::stay::StayReason;
use linklayer::wire::{self, IsHome, Named};

use crate::home::Home;
use crate::process::Mode;

impl Home {
    /// A process that is away is about to work on the memory of another one, and comes home for it when that is here.
    pub(crate) fn works_on(&mut self, reply: &ReplyTo, body: wire::WorksOn) -> anyhow::Result<()> {
        let named = match body.other {
            Named::Thread(tid) => Some(tid),
            Named::Descriptor(fd) => described(body.pid, fd),
        };
        let other = named.map(|tid| shim::process::of_thread(tid).unwrap_or(tid));
        let others = other.filter(|other| self.processes.contains_key(other));
        let is_home = match (others, self.processes.get_mut(&body.pid)) {
            (Some(other), Some(process)) => {
                if !process.works_on.contains(&other) {
                    process.works_on.push(other);
                }
                other == body.pid || self.bring_for(other, body.pid)?
            }
            // The call finds no such process, or one that is none of ours.
            _ => true,
        };
        reply.send(&[&wire::encode(&IsHome(is_home))]);
        Ok(())
    }

    /// Has a process come home because another one is to work on its memory. Gives whether it is here already.
    fn bring_for(&mut self, pid: i32, by: i32) -> anyhow::Result<bool> {
        let Some(process) = self.processes.get(&pid) else {
            return Ok(true);
        };
        match process.mode {
            Mode::Native => Ok(!process.is_moving() && process.pager.is_none()),
            // It is asked for again.
            Mode::Launching(..) => Ok(false),
            Mode::Away(_) => {
                if process.waiters.is_empty() && process.hop.is_none() {
                    let (done, _nobody_waits) = crossbeam_channel::bounded(1);
                    self.bring(pid, StayReason::WorkedOn(by), wire::Mode::default(), done)?;
                }
                Ok(false)
            }
        }
    }

    /// Why a process must not leave home, or is to come: it works on the memory of another one, or another one on its.
    pub(crate) fn works_with(&self, pid: i32) -> Option<StayReason> {
        let own = self
            .processes
            .get(&pid)
            .and_then(|process| process.works_on.first());
        if let Some(other) = own {
            return Some(StayReason::WorksOn(*other));
        }
        let by = self
            .processes
            .values()
            .find(|process| process.works_on.contains(&pid))?;
        Some(StayReason::WorkedOn(by.pid))
    }
}

/// The process that a descriptor is of (proc_pid_fdinfo(5)).
fn described(pid: i32, fd: i32) -> Option<i32> {
    let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
    info.lines()
        .find_map(|line| line.strip_prefix("Pid:"))?
        .trim()
        .parse()
        .ok()
}
