//! Making a stopped thread execute system calls.
//!
//! The calls are run between two syscall stops (PTRACE_SYSCALL), never by a breakpoint: a forced SIGTRAP would reset the
//! disposition of a process that ignores or blocks it. All signals are blocked meanwhile, so none is delivered, and none is lost.
//!
//! The other threads of the process must be stopped too while memory is [planted](Injector::plant), and their calls must not be in
//! the way of what is injected.

pub mod code;
mod mem;

use std::io;
use std::ops::Range;

use linklayer::image::Regs;
use nix::errno::Errno;
use thiserror::Error;

use crate::areas;
use crate::ptrace::{PtraceError, Stop, Stopped};
pub use mem::Memory;

/// Why an injection failed.
#[derive(Debug, Error)]
pub enum InjectError {
    /// A ptrace request failed; the thread is dead if [`PtraceError::is_gone`].
    #[error(transparent)]
    Ptrace(#[from] PtraceError),
    /// The injected call gave an error; the thread is as before, but for what earlier calls did.
    #[error("injected {call} in thread {tid}: {errno}")]
    Call {
        /// name of the call
        call: &'static str,
        /// thread
        tid: i32,
        /// its error
        errno: Errno,
    },
    /// /proc of the process could not be read, or its memory not be accessed.
    #[error("{what} of process {pid}: {source}")]
    Proc {
        /// what was accessed
        what: &'static str,
        /// process
        pid: i32,
        /// the error
        source: io::Error,
    },
    /// The thread cannot take injected calls in this stop (signal-delivery-stop, seccomp stop, exit stop).
    #[error("thread {tid} cannot take calls in the stop {stop:?}")]
    BadStop {
        /// thread
        tid: i32,
        /// where it is
        stop: Stop,
    },
    /// The thread left the path that it was put on.
    #[error("thread {tid} left the injected call with {stop:?}")]
    Strayed {
        /// thread
        tid: i32,
        /// what it did
        stop: Stop,
    },
    /// No `syscall` instruction was found in the process's executable areas.
    #[error("process {pid} has no syscall instruction to use")]
    NoEntry {
        /// process
        pid: i32,
    },
}

impl InjectError {
    /// Whether the thread (or its process) is dead.
    pub fn is_gone(&self) -> bool {
        matches!(self, InjectError::Ptrace(error) if error.is_gone())
    }

    pub(crate) fn proc(what: &'static str, pid: i32) -> impl FnOnce(io::Error) -> Self {
        move |source| InjectError::Proc { what, pid, source }
    }
}

/// Result of an injection.
pub type Result<T> = std::result::Result<T, InjectError>;

/// Finds an address in the process where a `syscall` instruction is: in the vDSO, else in any executable area.
pub fn find_entry(pid: i32) -> Result<u64> {
    find_entry_outside(pid, 0..0)
}

/// Like [`find_entry`], but not in the range `except`.
pub(crate) fn find_entry_outside(pid: i32, except: Range<u64>) -> Result<u64> {
    let areas = areas::maps(pid).map_err(InjectError::proc("maps", pid))?;
    let memory = Memory::open(pid).map_err(InjectError::proc("mem", pid))?;
    let mut executable: Vec<_> = areas
        .iter()
        .filter(|a| a.prot.executable() && a.name != b"[vsyscall]")
        .filter(|a| a.end <= except.start || a.start >= except.end)
        .collect();
    executable.sort_by_key(|a| a.name != b"[vdso]");
    const CHUNK: u64 = 64 * 1024;
    for area in executable {
        let mut at = area.start;
        while at < area.end {
            // One byte of overlap: the instruction may straddle two chunks.
            let mut bytes = vec![0; (CHUNK + 1).min(area.end - at) as usize];
            if memory.read(at, &mut bytes).is_err() {
                break;
            }
            if let Some(found) = bytes.windows(2).position(|w| w == [0x0f, 0x05]) {
                return Ok(at + found as u64);
            }
            at += CHUNK;
        }
    }
    Err(InjectError::NoEntry { pid })
}

/// Executes calls in one stopped thread. Made by [`Injector::begin`], and to be ended by [`Injector::end`]: dropping it leaves
/// the thread stopped with foreign registers and with all signals blocked.
#[derive(Debug)]
#[must_use = "the thread's registers are restored by end()"]
pub struct Injector<'t> {
    thread: &'t mut Stopped,
    saved: Regs,
    mask: u64,
    entry: u64,
    newborn: Option<i32>,
}

impl<'t> Injector<'t> {
    /// Saves the registers and the signal mask of a stopped thread and blocks its signals. `entry` is the address of a `syscall`
    /// instruction in its memory, see [`find_entry`]. A thread inside a call first leaves it ([`Stopped::leave_call`]).
    ///
    /// A thread in a signal-delivery-stop is refused (the signal would be lost): deliver it, or keep its siginfo and
    /// [`Stopped::settle`]. The same goes for seccomp stops and exit stops. The caller must not give a syscall-*entry* stop.
    pub fn begin(thread: &'t mut Stopped, entry: u64) -> Result<Self> {
        let stop = thread.stop();
        if matches!(stop, Stop::Signal(_) | Stop::Seccomp(_) | Stop::Exit { .. }) {
            return Err(InjectError::BadStop {
                tid: thread.tid(),
                stop,
            });
        }
        thread.leave_call()?;
        let saved = thread.regs()?;
        let mask = thread.sigmask()?;
        thread.set_sigmask(u64::MAX)?;
        Ok(Injector {
            thread,
            saved,
            mask,
            entry,
            newborn: None,
        })
    }

    /// The thread's id.
    pub fn tid(&self) -> i32 {
        self.thread.tid()
    }

    /// The registers that [`Injector::end`] gives back; they may be changed.
    pub fn registers(&mut self) -> &mut Regs {
        &mut self.saved
    }

    /// The signal mask that [`Injector::end`] gives back; it may be changed.
    pub fn mask(&mut self) -> &mut u64 {
        &mut self.mask
    }

    /// The stopped thread (its registers and mask are not its own now).
    pub fn thread(&mut self) -> &mut Stopped {
        self.thread
    }

    /// Uses another `syscall` instruction from now on.
    pub fn set_entry(&mut self, entry: u64) {
        self.entry = entry;
    }

    /// The thread or process, as the tracer numbers it, that the last call made (clone, fork, vfork). It is a tracee, in or on the
    /// way to its first stop.
    pub fn newborn(&self) -> Option<i32> {
        self.newborn
    }

    /// Executes one call and gives its raw result: -4095..=-1 is an error, and also the kernel's internal restart codes can be
    /// seen. Waits as long as the call blocks. Group-stops that begin meanwhile are entered and kept in effect.
    ///
    /// Not for exec, exit and vfork.
    pub fn call(&mut self, nr: i64, args: [u64; 6]) -> Result<i64> {
        let mut regs = Regs {
            rip: self.entry,
            orig_rax: u64::MAX,
            ..self.saved
        };
        regs.set_call(nr as u64, args);
        self.newborn = None;
        self.thread.set_regs(&regs)?;
        let mut entered = false;
        let mut deliver = 0;
        loop {
            let stop = self.thread.run_on(libc::PTRACE_SYSCALL, deliver)?;
            deliver = 0;
            match stop {
                Stop::Syscall if entered => break,
                Stop::Syscall => entered = true,
                // It cannot be blocked. Delivered, the kernel keeps account of the group-stop.
                Stop::Signal(libc::SIGSTOP) => deliver = libc::SIGSTOP,
                Stop::Fork(tid) | Stop::Vfork(tid) | Stop::Clone(tid) => self.newborn = Some(tid),
                Stop::Signal(_) | Stop::Exit { .. } | Stop::Exec { .. } => {
                    return Err(InjectError::Strayed {
                        tid: self.tid(),
                        stop,
                    });
                }
                Stop::Interrupt | Stop::Group(_) | Stop::Seccomp(_) | Stop::VforkDone(_) => {}
            }
        }
        Ok(self.thread.regs()?.rax as i64)
    }

    /// Like [`Injector::call`], but an error of the call is an error here. `name` is for its message.
    pub fn demand(&mut self, name: &'static str, nr: i64, args: [u64; 6]) -> Result<u64> {
        let ret = self.call(nr, args)?;
        if (-4095..0).contains(&ret) {
            return Err(InjectError::Call {
                call: name,
                tid: self.tid(),
                errno: Errno::from_raw(-ret as i32),
            });
        }
        Ok(ret as u64)
    }

    /// Maps the code page and the scratch page and uses the code's first instruction from now on. EEXIST: they are there.
    ///
    /// `pid` is the process of the thread.
    pub fn plant(&mut self, pid: i32) -> Result<()> {
        const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let map = |prot: i32, at: u64, len: u64| [at, len, prot as u64, FLAGS as u64, u64::MAX, 0];
        let scratch = map(
            libc::PROT_READ | libc::PROT_WRITE,
            code::SCRATCH,
            code::SCRATCH_LEN,
        );
        self.demand(
            "mmap",
            libc::SYS_mmap,
            map(libc::PROT_READ | libc::PROT_EXEC, code::CODE, 4096),
        )?;
        let memory = Memory::open(pid).map_err(InjectError::proc("mem", pid))?;
        memory
            .write(code::CODE, code::code())
            .map_err(InjectError::proc("mem", pid))?;
        self.demand("mmap", libc::SYS_mmap, scratch)?;
        self.entry = code::CODE;
        Ok(())
    }

    /// Unmaps what [`Injector::plant`] mapped, with the planted instruction itself: afterwards no call is possible until
    /// [`Injector::set_entry`].
    pub fn unplant(&mut self) -> Result<()> {
        let len = code::SCRATCH + code::SCRATCH_LEN - code::CODE;
        self.demand("munmap", libc::SYS_munmap, [code::CODE, len, 0, 0, 0, 0])?;
        Ok(())
    }

    /// Gives the thread its registers and its mask back and brings it to an event stop ([`Stop::Interrupt`], or
    /// [`Stop::Group`] while a group-stop is in effect). A call that it was in is interrupted as before: it restarts when the
    /// thread is resumed.
    pub fn end(self) -> Result<()> {
        self.thread.set_regs(&self.saved)?;
        self.thread.set_sigmask(self.mask)?;
        self.thread.settle()?;
        Ok(())
    }

    /// Like [`Injector::end`] without the event stop: the thread is left in a syscall stop, to be resumed with signal 0 only.
    pub fn end_unsettled(self) -> Result<()> {
        self.thread.set_regs(&self.saved)?;
        self.thread.set_sigmask(self.mask)?;
        Ok(())
    }
}
