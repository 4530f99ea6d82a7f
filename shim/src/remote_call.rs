//! Making a stopped thread of another process execute system calls.
//!
//! The thread executes a `syscall` instruction under single step, so nothing needs to follow it. All signals but SIGTRAP are
//! blocked meanwhile: a blocked SIGTRAP would be forced through and lose its disposition (kernel/signal.c,
//! force_sig_info_to_task). So would an ignored one: a process that ignores SIGTRAP makes its calls between syscall
//! stops, at twice the price.
//!
//! Between calls the thread is in a signal-delivery-stop, so that a call of its own that was interrupted is restarted by
//! the kernel when it goes on; the signal with which it was stopped, if there was one, is still to be delivered.

use linklayer::image::{Regs, SigInfo};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::clone_rewrite::RESTARTNOINTR;
use crate::memory::ProcessMemory;
use crate::ptrace::{PtraceError, Stop, Stopped};
use crate::restore::{ARGUMENTS_LEN, SCRATCH};
use crate::vessel::stub;

/// All signals but SIGTRAP.
const MASK: u64 = !TRAP_BIT;
const TRAP_BIT: u64 = 1 << (libc::SIGTRAP - 1);
/// Where the description of a batch begins in the scratch page, and how many calls it can have.
const TABLE: u64 = SCRATCH + ARGUMENTS_LEN as u64;
const TABLE_CALLS: usize = (4096 - ARGUMENTS_LEN) / ENTRY;
/// Number, six arguments, result.
const ENTRY: usize = 64;

/// Why a call could not be made. The thread's own registers may not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RemoteCallError {
    /// ptrace failed, mostly because the thread was killed.
    #[error(transparent)]
    Ptrace(#[from] PtraceError),
    /// The thread ended. Its death is still to be waited for.
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
    /// The thread stopped where no call leads to.
    #[error("thread {tid} left its call with {stop:?}")]
    Strayed {
        /// The thread.
        tid: i32,
        /// What it did.
        stop: Stop,
    },
    /// The calls of a batch could not be written or read.
    #[error("memory of thread {tid}: {source}")]
    Memory {
        /// The thread.
        tid: i32,
        /// The error.
        source: std::io::Error,
    },
}

impl RemoteCallError {
    /// Whether the thread is dead.
    pub fn is_gone(&self) -> bool {
        match self {
            RemoteCallError::Ptrace(error) => error.is_gone(),
            RemoteCallError::Ended(_) => true,
            _ => false,
        }
    }
}

/// One call of a [`RemoteCalls::batch`].
#[derive(Debug, Clone, Copy)]
pub struct BatchCall {
    /// Name for messages.
    pub what: &'static str,
    /// Number.
    pub nr: i64,
    /// Arguments.
    pub args: [u64; 6],
}

/// A thread that executes calls for us. Dropping it leaves the thread stopped with foreign registers.
#[derive(Debug)]
pub struct RemoteCalls {
    stopped: Stopped,
    site: u64,
    regs: Regs,
    mask: u64,
    /// How it was stopped at first, with the siginfo of a signal-delivery-stop.
    origin: Stop,
    info: Option<SigInfo>,
    /// Somebody sent it a SIGTRAP meanwhile.
    trapped: bool,
    /// It ignores SIGTRAP.
    by_syscall_stops: bool,
    /// It has run since it came.
    moved: bool,
    newborn: Option<i32>,
    /// Lets calls pass the filter of the process; 0: it has none.
    key: u64,
}

impl RemoteCalls {
    /// Takes a stopped thread; `site` is the address of a `syscall` instruction in its memory. A thread that is stopped inside a
    /// call (exec, clone ...) first leaves it. It must not be in a seccomp stop or a syscall-entry stop.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn begin(mut stopped: Stopped, site: u64) -> Result<RemoteCalls, RemoteCallError> {
        let origin = stopped.stop();
        if matches!(origin, Stop::Seccomp(_) | Stop::Exit { .. }) {
            return Err(RemoteCallError::Strayed {
                tid: stopped.tid(),
                stop: origin,
            });
        }
        stopped.leave_call()?;
        let regs = stopped.regs()?;
        let mask = stopped.sigmask()?;
        let info = match origin {
            Stop::Signal(_) => Some(stopped.siginfo()?),
            _ => None,
        };
        let by_syscall_stops = ignores_trap(stopped.tid());
        stopped.set_sigmask(if by_syscall_stops { u64::MAX } else { MASK })?;
        Ok(RemoteCalls {
            stopped,
            site,
            regs,
            mask,
            origin,
            info,
            trapped: false,
            by_syscall_stops,
            moved: false,
            newborn: None,
            key: 0,
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

    fn with_key(&self, nr: i64, mut args: [u64; 6]) -> [u64; 6] {
        let taken = linklayer::syscall::row(nr as u32).map_or(6, |row| row.args.len());
        if self.key != 0 && taken < 6 {
            args[5] = self.key;
        }
        args
    }

    /// The thread.
    pub fn tid(&self) -> i32 {
        self.stopped.tid()
    }

    /// The thread or process that the last call made (clone, fork), as this process numbers it; a tracee in its first stop or on the
    /// way to it.
    pub fn newborn(&self) -> Option<i32> {
        self.newborn
    }

    /// Executes a call; gives the raw result (negative errno). Waits as long as it blocks.
    ///
    /// # Errors
    /// The thread ended, or cannot be traced.
    pub fn raw(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, RemoteCallError> {
        loop {
            // A clone does nothing while a stop is owed, as by the SIGCONT of another process (kernel/fork.c, copy_process). We see it
            // before the kernel makes the call again.
            match self.once(nr, args)? {
                RESTARTNOINTR => continue,
                ret => return Ok(ret),
            }
        }
    }

    fn once(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, RemoteCallError> {
        let mut regs = self.regs;
        regs.set_call(nr as u64, self.with_key(nr, args));
        regs.rip = self.site;
        regs.orig_rax = u64::MAX;
        self.newborn = None;
        self.stopped.set_regs(&regs)?;
        if self.by_syscall_stops {
            while self.run(libc::PTRACE_SYSCALL)? != Stop::Syscall {}
            while self.run(libc::PTRACE_SYSCALL)? != Stop::Syscall {}
            return Ok(self.stopped.regs()?.rax as i64);
        }
        let after = self.site + 2;
        self.until_trap(libc::PTRACE_SINGLESTEP, after)
    }

    /// Runs until the SIGTRAP of the kernel at this address; gives rax.
    fn until_trap(&mut self, request: u32, address: u64) -> Result<i64, RemoteCallError> {
        loop {
            if self.run(request)? != Stop::Signal(libc::SIGTRAP) {
                continue;
            }
            let regs = self.stopped.regs()?;
            if regs.rip == address {
                return Ok(regs.rax as i64);
            }
            self.trapped = true;
        }
    }

    /// Resumes the thread until its next stop. Stops that were owed from before, or that others bring about, are passed on.
    fn run(&mut self, request: u32) -> Result<Stop, RemoteCallError> {
        let sig = match self.stopped.stop() {
            // It cannot be blocked. Delivered, the kernel keeps account of the group-stop, which does not stop us. The one with
            // which the thread came is delivered at the end.
            Stop::Signal(libc::SIGSTOP) if self.moved => libc::SIGSTOP,
            _ => 0,
        };
        self.moved = true;
        let tid = self.tid();
        let stop = self.stopped.run_on(request, sig).map_err(|e| match e {
            e if e.is_gone() => RemoteCallError::Ended(tid),
            e => e.into(),
        })?;
        match stop {
            Stop::Fork(tid) | Stop::Vfork(tid) | Stop::Clone(tid) => self.newborn = Some(tid),
            Stop::Signal(libc::SIGTRAP | libc::SIGSTOP) => {}
            Stop::Signal(_) | Stop::Exit { .. } | Stop::Exec { .. } => {
                return Err(RemoteCallError::Strayed {
                    tid: self.tid(),
                    stop,
                });
            }
            _ => {}
        }
        Ok(stop)
    }

    /// Executes a call that must succeed.
    ///
    /// # Errors
    /// As [`RemoteCalls::raw`], and the call's own error.
    pub fn call(&mut self, what: &'static str, nr: i64, args: [u64; 6]) -> Result<u64, RemoteCallError> {
        let ret = self.raw(nr, args)?;
        self.succeeded(what, ret)
    }

    fn succeeded(&self, what: &'static str, ret: i64) -> Result<u64, RemoteCallError> {
        if (-4095..0).contains(&ret) {
            return Err(RemoteCallError::Failed {
                what,
                tid: self.tid(),
                errno: Errno::from_raw(-ret as i32),
            });
        }
        Ok(ret as u64)
    }

    /// Executes calls one after the other and gives their raw results; what one of them returns has no influence on the next. It
    /// takes about as long as a single call. The stub's page and the scratch page must be there; the calls may use the first
    /// kilobyte of the latter.
    ///
    /// # Errors
    /// The thread ended, or cannot be traced.
    pub fn batch(&mut self, calls: &[BatchCall]) -> Result<Vec<i64>, RemoteCallError> {
        let mut results = Vec::with_capacity(calls.len());
        for part in calls.chunks(TABLE_CALLS) {
            if part.len() == 1 || self.by_syscall_stops {
                for call in part {
                    results.push(self.raw(call.nr, call.args)?);
                }
                continue;
            }
            let failed = |tid| move |source| RemoteCallError::Memory { tid, source };
            let memory = ProcessMemory::new(self.tid());
            let mut table: Vec<u8> = part
                .iter()
                .flat_map(|call| {
                    [call.nr as u64]
                        .into_iter()
                        .chain(self.with_key(call.nr, call.args))
                        .chain([0])
                })
                .flat_map(u64::to_ne_bytes)
                .collect();
            memory.write_forced(TABLE, &table).map_err(failed(self.tid()))?;
            let mut regs = self.regs;
            regs.rip = stub::batch_address();
            regs.orig_rax = u64::MAX;
            regs.rbx = TABLE;
            regs.r13 = part.len() as u64;
            self.newborn = None;
            self.stopped.set_regs(&regs)?;
            self.until_trap(libc::PTRACE_CONT, stub::batch_end_address())?;
            memory
                .read_forced(TABLE, &mut table)
                .map_err(failed(self.tid()))?;
            for entry in table.chunks_exact(ENTRY) {
                let mut word = [0; 8];
                word.copy_from_slice(&entry[ENTRY - 8..]);
                results.push(i64::from_ne_bytes(word));
            }
        }
        Ok(results)
    }

    /// A batch of calls that must all succeed. On an error the calls after the failed one were executed too.
    ///
    /// # Errors
    /// As [`RemoteCalls::batch`], and the first error of a call.
    pub fn batch_all(&mut self, calls: &[BatchCall]) -> Result<(), RemoteCallError> {
        let results = self.batch(calls)?;
        for (call, ret) in calls.iter().zip(results) {
            self.succeeded(call.what, ret)?;
        }
        Ok(())
    }

    /// Gives the thread back with the registers and the mask that it had.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn end(mut self) -> Result<Stopped, RemoteCallError> {
        self.stopped.set_regs(&self.regs)?;
        self.stopped.set_sigmask(self.mask)?;
        if self.trapped {
            // Natively it would have been delivered a little earlier.
            let _ = nix::sys::signal::kill(Pid::from_raw(self.tid()), Signal::SIGTRAP);
        }
        match (self.origin, &self.info) {
            (Stop::Signal(_), Some(info)) if !self.by_syscall_stops => {
                // In place of our SIGTRAP its own signal is going to be delivered.
                self.stopped.set_siginfo(info)?;
                Ok(Stopped::assume(self.tid(), self.origin))
            }
            (Stop::Group(_), _) => {
                self.stopped.settle()?;
                Ok(self.stopped)
            }
            _ if self.by_syscall_stops => {
                // An event stop, so that an interrupted call of its own is restarted.
                self.stopped.settle()?;
                Ok(self.stopped)
            }
            _ => Ok(Stopped::assume(self.tid(), Stop::Interrupt)),
        }
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

    /// Sends the thread into a call from which it does not return, and lets go of it.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn leave_by(mut self, nr: i64, args: [u64; 6]) -> Result<(), RemoteCallError> {
        let mut regs = self.regs;
        regs.set_call(nr as u64, self.with_key(nr, args));
        regs.rip = self.site;
        regs.orig_rax = u64::MAX;
        self.stopped.set_regs(&regs)?;
        self.stopped.set_sigmask(u64::MAX)?;
        self.stopped.cont(0)?;
        Ok(())
    }

    /// The token, for requests on the stopped thread between calls. Its registers and its mask are not its own now.
    pub fn stopped(&mut self) -> &mut Stopped {
        &mut self.stopped
    }
}

/// Whether a thread's process ignores SIGTRAP, which a single step would change.
pub(crate) fn ignores_trap(tid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let ignored = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    ignored.is_some_and(|l| u64::from_str_radix(l.trim(), 16).is_ok_and(|set| set & TRAP_BIT != 0))
}
