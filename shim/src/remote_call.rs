//! Making a stopped thread of another process execute system calls, one at a time.
//!
//! The thread executes a `syscall` instruction under single step, so nothing needs to follow it. All signals but SIGTRAP
//! are blocked meanwhile: a blocked SIGTRAP would be forced through and lose its disposition
//! (kernel/signal.c, force_sig_info_to_task).

use linklayer::image::Regs;
use nix::errno::Errno;

use crate::ptrace::{self, PtraceError, Status, Stop, Stopped, Target};

/// All signals but SIGTRAP.
const MASK: u64 = !(1 << (libc::SIGTRAP - 1));

/// Why a call could not be made. The thread's own registers may not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RemoteCallError {
    /// ptrace failed, mostly because the thread was killed.
    #[error(transparent)]
    Ptrace(#[from] PtraceError),
    /// The thread ended.
    #[error("thread {0} ended while it was worked on")]
    Ended(i32),
    /// The call itself failed.
    #[error("{what} in process {tid}: {errno}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// Where.
        tid: i32,
        /// The call's error.
        errno: Errno,
    },
}

/// A thread that executes calls for us.
#[derive(Debug)]
pub struct RemoteCalls {
    stopped: Option<Stopped>,
    tid: i32,
    site: u64,
    /// What lets these calls pass the process's filter, in the last argument register.
    key: u64,
    regs: Regs,
    mask: u64,
}

impl RemoteCalls {
    /// Takes a stopped thread; `site` is the address of a `syscall` instruction in its memory.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn begin(mut stopped: Stopped, site: u64) -> Result<RemoteCalls, RemoteCallError> {
        let regs = stopped.regs()?;
        let mask = stopped.sigmask()?;
        stopped.set_sigmask(MASK)?;
        Ok(RemoteCalls {
            tid: stopped.tid(),
            stopped: Some(stopped),
            site,
            key: 0,
            regs,
            mask,
        })
    }

    /// Uses another `syscall` instruction from now on.
    pub fn move_to(&mut self, site: u64) {
        self.site = site;
    }

    /// Shows the filter of the process this key with every call that leaves the last argument free.
    pub fn show(&mut self, key: u64) {
        self.key = key;
    }

    /// The thread.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Executes a call; gives the raw result (negative errno).
    ///
    /// # Errors
    /// The thread ended, or cannot be traced.
    pub fn raw(&mut self, nr: i64, mut args: [u64; 6]) -> Result<i64, RemoteCallError> {
        let mut stopped = self.stopped.take().ok_or(RemoteCallError::Ended(self.tid))?;
        // mmap has six arguments of its own; the anonymous memory that is wanted here passes any filter.
        if args[5] == 0 && nr != libc::SYS_mmap {
            args[5] = self.key;
        }
        let mut regs = self.regs;
        regs.set_call(nr as u64, args);
        regs.rip = self.site;
        regs.orig_rax = u64::MAX;
        stopped.set_regs(&regs)?;
        stopped.step(0)?;
        loop {
            match ptrace::wait(Target::Thread(self.tid), false)? {
                Some((_, Status::Stopped(stop))) => {
                    if stop.stop() == Stop::Signal(libc::SIGTRAP) {
                        let ret = stop.regs()?.rax as i64;
                        self.stopped = Some(stop);
                        return Ok(ret);
                    }
                    // A stop that was owed from before; the step goes on.
                    stop.step(0)?;
                }
                _ => return Err(RemoteCallError::Ended(self.tid)),
            }
        }
    }

    /// Executes a call that must succeed.
    ///
    /// # Errors
    /// As [`RemoteCalls::raw`], and the call's own error.
    pub fn call(&mut self, what: &'static str, nr: i64, args: [u64; 6]) -> Result<u64, RemoteCallError> {
        let ret = self.raw(nr, args)?;
        if (-4095..0).contains(&ret) {
            return Err(RemoteCallError::Failed {
                what,
                tid: self.tid,
                errno: Errno::from_raw(-ret as i32),
            });
        }
        Ok(ret as u64)
    }

    /// Gives the thread back with the registers and the mask that it had.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn end(mut self) -> Result<Stopped, RemoteCallError> {
        let mut stopped = self.stopped.take().ok_or(RemoteCallError::Ended(self.tid))?;
        stopped.set_regs(&self.regs)?;
        stopped.set_sigmask(self.mask)?;
        Ok(stopped)
    }

    /// Gives the thread back with these registers and this mask.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn end_with(mut self, regs: &Regs, mask: u64) -> Result<Stopped, RemoteCallError> {
        self.regs = *regs;
        self.mask = mask;
        self.end()
    }

    /// The token, for requests on the stopped thread between calls.
    pub fn stopped_mut(&mut self) -> Option<&mut Stopped> {
        self.stopped.as_mut()
    }
}
