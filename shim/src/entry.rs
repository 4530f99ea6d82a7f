//! Letting a new program run up to its entry point, so that it is moved after its loader has done its work at home.

use std::fs;

use linklayer::image::PAGE;

use crate::inject::{InjectError, Injector, Memory, Result, find_entry};
use crate::ptrace::{Status, Stop, Stopped, Target, wait};

const AT_NULL: u64 = 0;
const AT_ENTRY: u64 = 9;
const INT3: u8 = 0xcc;
const SIGTRAP_BIT: u64 = 1 << (libc::SIGTRAP - 1);

/// Reads the value of one AT_* entry of a process's auxiliary vector (getauxval(3)).
pub fn auxv(pid: i32, wanted: u64) -> Result<Option<u64>> {
    let bytes = fs::read(format!("/proc/{pid}/auxv")).map_err(InjectError::proc("auxv", pid))?;
    let word = |b: &[u8]| b.try_into().map(u64::from_ne_bytes).unwrap_or_default();
    for pair in bytes.chunks_exact(16) {
        match word(&pair[..8]) {
            AT_NULL => break,
            key if key == wanted => return Ok(Some(word(&pair[8..]))),
            _ => {}
        }
    }
    Ok(None)
}

/// A breakpoint at the entry point of a program that has just been executed.
///
/// Arm it at the exec stop ([`EntryTrap::arm`]), resume the process, and handle its stops as usual; at every signal-delivery-stop ask
/// [`EntryTrap::reached`], and when it is, [`EntryTrap::disarm`] it. What constructors in the loader do before is handled so:
/// a fork's child has a copy of the breakpoint to remove at the fork event ([`EntryTrap::disarm_copy`]); threads that exist at the entry are
/// the caller's to stop; an exec or the end of the process makes the trap void.
#[derive(Debug)]
pub struct EntryTrap {
    pid: i32,
    entry: u64,
    original: u8,
    /// SIGTRAP was ignored at the exec: the kernel resets that when it forces the breakpoint's SIGTRAP.
    ignored: bool,
    /// SIGTRAP was blocked at the exec, likewise.
    blocked: bool,
}

impl EntryTrap {
    /// Writes the breakpoint into a process that is in its exec stop (or at any point before its entry).
    pub fn arm(stopped: &Stopped) -> Result<Self> {
        let pid = stopped.tid();
        let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
        let entry = auxv(pid, AT_ENTRY)?.ok_or_else(|| InjectError::proc("AT_ENTRY", pid)(missing()))?;
        let memory = Memory::open(pid).map_err(InjectError::proc("mem", pid))?;
        let mut original = [0];
        memory
            .read(entry, &mut original)
            .map_err(InjectError::proc("mem", pid))?;
        memory
            .write(entry, &[INT3])
            .map_err(InjectError::proc("mem", pid))?;
        let status =
            fs::read_to_string(format!("/proc/{pid}/status")).map_err(InjectError::proc("status", pid))?;
        Ok(EntryTrap {
            pid,
            entry,
            original: original[0],
            ignored: signal_set(&status, "SigIgn:") & SIGTRAP_BIT != 0,
            blocked: signal_set(&status, "SigBlk:") & SIGTRAP_BIT != 0,
        })
    }

    /// Address of the entry point.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// Whether this stop is the one at the breakpoint.
    pub fn reached(&self, stopped: &Stopped) -> Result<bool> {
        Ok(stopped.stop() == Stop::Signal(libc::SIGTRAP) && stopped.regs()?.rip == self.entry + 1)
    }

    /// Removes the breakpoint where it was [reached](EntryTrap::reached) and leaves the thread at the entry point in an event stop.
    pub fn disarm(self, stopped: &mut Stopped) -> Result<()> {
        self.disarm_copy(self.pid)?;
        let mut regs = stopped.regs()?;
        regs.rip = self.entry;
        regs.orig_rax = u64::MAX;
        stopped.set_regs(&regs)?;
        if self.blocked {
            let mask = stopped.sigmask()?;
            stopped.set_sigmask(mask | SIGTRAP_BIT)?;
        }
        stopped.settle()?;
        if self.ignored {
            self.ignore_trap(stopped)?;
        }
        Ok(())
    }

    /// Removes the breakpoint from a process that got it by fork, or that is not to be stopped at its entry any more.
    pub fn disarm_copy(&self, pid: i32) -> Result<()> {
        let memory = Memory::open(pid).map_err(InjectError::proc("mem", pid))?;
        memory
            .write(self.entry, &[self.original])
            .map_err(InjectError::proc("mem", pid))
    }

    fn ignore_trap(&self, stopped: &mut Stopped) -> Result<()> {
        // The kernel's struct sigaction: handler, flags, restorer, mask. At the entry everything below the stack pointer is free.
        let place = (stopped.regs()?.rsp & !(PAGE - 1)) - 256;
        let mut action = [0; 32];
        action[0] = libc::SIG_IGN as u8;
        let mut injector = Injector::begin(stopped, find_entry(self.pid)?)?;
        let memory = Memory::open(self.pid).map_err(InjectError::proc("mem", self.pid))?;
        let set = if memory.write(place, &action).is_ok() {
            injector.demand(
                "rt_sigaction",
                libc::SYS_rt_sigaction,
                [libc::SIGTRAP as u64, place, 0, 8, 0, 0],
            )
        } else {
            Ok(0)
        };
        injector.end()?;
        set.map(|_| ())
    }
}

/// A set of signals in the text of /proc/PID/status.
pub(crate) fn signal_set(status: &str, field: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0)
}

/// How [`run_to_entry`] ended.
#[derive(Debug)]
pub enum Entered {
    /// The process is stopped at its entry point, in an event stop.
    AtEntry(Stopped),
    /// It executed another program before: stopped in that exec stop.
    Exec(Stopped),
    /// It ended before.
    Ended(Status),
}

/// Runs a process from its exec stop to its entry point, waiting for it alone. Signals are delivered to it, and job control stops it;
/// processes and threads that it makes meanwhile stay in their first stop, to be reported by [`wait`] later.
pub fn run_to_entry(stopped: Stopped) -> Result<Entered> {
    let tid = stopped.tid();
    let trap = EntryTrap::arm(&stopped)?;
    stopped.cont(0)?;
    loop {
        let mut stopped = match wait(Target::Thread(tid), false)? {
            Some((_, Status::Stopped(stopped))) => stopped,
            Some((_, ended)) => return Ok(Entered::Ended(ended)),
            None => return Err(crate::ptrace::PtraceError::Gone { op: "wait", tid }.into()),
        };
        match stopped.stop() {
            Stop::Signal(_) if trap.reached(&stopped)? => {
                trap.disarm(&mut stopped)?;
                return Ok(Entered::AtEntry(stopped));
            }
            Stop::Signal(sig) => stopped.cont(sig)?,
            Stop::Group(_) => stopped.listen()?,
            Stop::Exec { .. } => return Ok(Entered::Exec(stopped)),
            Stop::Fork(child) => {
                trap.disarm_copy(child)?;
                stopped.cont(0)?;
            }
            // A vfork's child shares the memory until it has let go.
            _ => stopped.cont(0)?,
        }
    }
}
