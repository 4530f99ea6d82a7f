//! ptrace(2) with its states in the types.
//!
//! Tracees are seized, never attached. A thread that stopped is held by a [`Stopped`] token, which is neither `Clone` nor
//! `Copy`: every request that needs a stopped thread is a method of it, and resuming consumes it. Dropping the token leaves the
//! thread stopped (it still belongs to the tracer; [`Stopped::assume`] makes a token anew).
//!
//! ptrace belongs to one *OS thread*: everything here must be called from the thread that seized the tracee.
//!
//! A tracee can be killed at any time, also while it is stopped: then every request fails with [`PtraceError::Gone`] and its
//! death is what [`wait`] reports next.

mod stopped;
mod wait;

use linklayer::image::Rseq;
use nix::errno::Errno;
pub use nix::sys::ptrace::Options;
use thiserror::Error;

pub use stopped::{PendingQueue, Stopped};
pub use wait::{Status, Stop, Target, wait, wait_stop};

/// Why a ptrace request failed. Nothing was changed in the tracee.
#[derive(Debug, Error)]
pub enum PtraceError {
    /// The thread is dead, was killed while it was stopped, or is no tracee of this thread (ESRCH).
    #[error("{op}: thread {tid} is gone")]
    Gone {
        /// the request
        op: &'static str,
        /// the thread
        tid: i32,
    },
    /// Any other error of the kernel.
    #[error("{op} of thread {tid}: {errno}")]
    Os {
        /// the request
        op: &'static str,
        /// the thread
        tid: i32,
        /// the kernel's error
        errno: Errno,
    },
}

impl PtraceError {
    pub(crate) fn new(op: &'static str, tid: i32, errno: Errno) -> Self {
        match errno {
            Errno::ESRCH => PtraceError::Gone { op, tid },
            errno => PtraceError::Os { op, tid, errno },
        }
    }

    /// Whether the tracee is dead (or no tracee of this thread).
    pub fn is_gone(&self) -> bool {
        matches!(self, PtraceError::Gone { .. })
    }
}

/// Result of a ptrace request.
pub type Result<T> = std::result::Result<T, PtraceError>;

/// Requests that libc and nix lack, with their numbers (linux/ptrace.h).
pub(crate) mod request {
    pub const GETREGSET: u32 = 0x4204;
    pub const SETREGSET: u32 = 0x4205;
    pub const SEIZE: u32 = 0x4206;
    pub const INTERRUPT: u32 = 0x4207;
    pub const LISTEN: u32 = 0x4208;
    pub const PEEKSIGINFO: u32 = 0x4209;
    pub const GETSIGMASK: u32 = 0x420a;
    pub const SETSIGMASK: u32 = 0x420b;
    pub const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
}

/// The options that every tracee of ours has: events of fork, vfork, clone, exec and exec's new image, and syscall stops that
/// can be told from SIGTRAP. Add `PTRACE_O_EXITKILL`, `PTRACE_O_TRACESECCOMP`, `PTRACE_O_TRACEEXIT` as needed.
pub fn usual_options() -> Options {
    Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEVFORKDONE
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC
}

/// Raw request. `addr` and `data` must be what `req` demands: valid pointers where the kernel reads or writes through them.
///
/// # Safety
/// The kernel accesses the caller's memory at `addr`/`data` for the requests that say so in ptrace(2).
pub(crate) unsafe fn raw(req: u32, tid: i32, addr: usize, data: usize) -> std::result::Result<i64, Errno> {
    // SAFETY: the caller guarantees the pointers; the call has no other effect on this process.
    let ret = unsafe { libc::syscall(libc::SYS_ptrace, u64::from(req), i64::from(tid), addr, data) };
    Errno::result(ret)
}

/// Seizes a thread (PTRACE_SEIZE): it keeps running. PTRACE_O_TRACESYSGOOD is always added.
/// EPERM: not permitted, or another tracer has it.
pub fn seize(tid: i32, options: Options) -> Result<()> {
    let options = options | Options::PTRACE_O_TRACESYSGOOD;
    // SAFETY: SEIZE takes no pointers.
    unsafe { raw(request::SEIZE, tid, 0, options.bits() as usize) }
        .map_err(|e| PtraceError::new("PTRACE_SEIZE", tid, e))?;
    Ok(())
}

/// Asks a running tracee to stop (PTRACE_INTERRUPT). It will be reported as [`Stop::Interrupt`], or as another stop that it
/// reaches first: that one takes the interrupt's place (kernel/signal.c, ptrace_stop: any trap clears a pending one), so who
/// needs an event stop asks again before resuming it, as [`Stopped::settle`] does.
pub fn interrupt(tid: i32) -> Result<()> {
    // SAFETY: INTERRUPT takes no pointers.
    unsafe { raw(request::INTERRUPT, tid, 0, 0) }
        .map_err(|e| PtraceError::new("PTRACE_INTERRUPT", tid, e))?;
    Ok(())
}

/// The layout that PTRACE_GET_RSEQ_CONFIGURATION fills in.
#[repr(C)]
#[derive(Default)]
struct RseqConfiguration {
    pointer: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

impl RseqConfiguration {
    fn registration(&self) -> Option<Rseq> {
        (self.pointer != 0).then_some(Rseq {
            pointer: self.pointer,
            size: self.size,
            signature: self.signature,
            flags: self.flags,
        })
    }
}
