//! The vessel: a process of home without its user half, executing calls for a guest elsewhere.

mod arena;
mod home;
mod stub;

use linklayer::image::{PAGE, Regs, SigAction};

pub use arena::{ARENA_ADDRESS, ARENA_LEN, Arena, Slot};

use crate::capture::{self, CaptureError, map_lines, reserved, vdso_site};
use crate::memory::ProcessMemory;
use crate::ptrace::{self, PtraceError, Status, Stopped, Target};
use crate::remote_call::{RemoteCallError, RemoteCalls};
use crate::restore::{SCRATCH, TRAMPOLINE};

/// Workers block everything but the signals whose blocking changes what the terminal does
/// (drivers/tty/tty_jobctrl.c asks whether the caller blocks or ignores them).
const WORKER_MASK: u64 = !(1 << (libc::SIGTTIN - 1) | 1 << (libc::SIGTTOU - 1));
const MADV_DONTNEED_LOCKED: u64 = 24;

/// Why a vessel could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum VesselError {
    /// Looking at the process failed.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// A call in it failed.
    #[error(transparent)]
    Call(#[from] RemoteCallError),
    /// ptrace failed.
    #[error(transparent)]
    Ptrace(#[from] PtraceError),
    /// Its memory or /proc.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// A call in a slot failed.
    #[error("{what} in the vessel: {errno}")]
    Slot {
        /// What was tried.
        what: &'static str,
        /// The call's error.
        errno: nix::errno::Errno,
    },
}

/// An emptied process.
#[derive(Debug)]
pub struct Vessel {
    pid: i32,
    catcher: i32,
    /// Its process was forked with CLONE_VM: its memory is its parent's until it executes something.
    pub shares_memory: bool,
}

/// What conversion made.
pub struct Parts {
    /// Each thread with its slot; they wait for calls.
    pub workers: Vec<(i32, Slot)>,
    /// The thread that takes signals.
    pub catcher: i32,
    /// The process's dispositions.
    pub actions: Vec<SigAction>,
}

impl Vessel {
    /// Turns a single-threaded stopped process into a vessel. Its memory areas stay; their pages are dropped, but for
    /// those of its arguments and environment, which ps(1) shows.
    ///
    /// # Errors
    /// Before its pages are dropped the process is restored, and given back with the error; after that nothing fails.
    pub fn convert(
        stopped: Stopped,
        arena: &Arena,
    ) -> Result<(Vessel, Parts), (Option<Stopped>, VesselError)> {
        let pid = stopped.tid();
        let slot = match arena.allocate() {
            Ok(slot) => slot,
            Err(e) => return Err((Some(stopped), e.into())),
        };
        let site = match vdso_site(pid) {
            Ok(site) => site,
            Err(e) => return Err((Some(stopped), e.into())),
        };
        let mut calls = match RemoteCalls::begin(stopped, site) {
            Ok(calls) => calls,
            Err(e) => return Err((None, e.into())),
        };
        if let Err(e) = furnish(&mut calls, pid, arena) {
            // Nothing of the process's own was touched yet.
            let undo = [TRAMPOLINE, 2 * PAGE, 0, 0, 0, 0];
            calls.move_to(site);
            let _ = calls.raw(libc::SYS_munmap, undo);
            let _ = calls.raw(libc::SYS_munmap, [ARENA_ADDRESS, ARENA_LEN as u64, 0, 0, 0, 0]);
            return Err((calls.end().ok(), e));
        }
        match settle(calls, pid, &slot) {
            Ok((catcher, actions)) => Ok((
                Vessel {
                    pid,
                    catcher,
                    shares_memory: false,
                },
                Parts {
                    workers: vec![(pid, slot)],
                    catcher,
                    actions,
                },
            )),
            Err(e) => Err((None, e)),
        }
    }

    /// Makes a vessel of the child that a worker just forked; the child is at its first stop and goes into its slot when
    /// it is resumed.
    ///
    /// # Errors
    /// The child is gone.
    pub fn adopt_child(stopped: Stopped) -> Result<(Vessel, Stopped, i32), VesselError> {
        let pid = stopped.tid();
        let mut calls = RemoteCalls::begin(stopped, TRAMPOLINE)?;
        let catcher = start_catcher(&mut calls)?;
        Ok((
            Vessel {
                pid,
                catcher,
                shares_memory: false,
            },
            calls.end()?,
            catcher,
        ))
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The thread that takes its signals.
    pub fn catcher(&self) -> i32 {
        self.catcher
    }

    /// Ends the call in progress of a stopped worker: one that is waiting in the kernel ends with the raw code with which
    /// it was interrupted, one that has not begun as if it had been made again later (ERESTARTNOINTR). A call that has
    /// ended keeps its result.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn abort_call(stopped: &mut Stopped, slot: &Slot) -> Result<(), PtraceError> {
        const NOT_BEGUN: i64 = -513;
        if !slot.posted() {
            return Ok(());
        }
        let mut regs = stopped.regs()?;
        let code = regs.rax as i64;
        if regs.rip == stub::after_address() {
            if regs.orig_rax as i64 >= 0 && [-512, -513, -514, -516].contains(&code) {
                regs.orig_rax = u64::MAX;
                stopped.set_regs(&regs)?;
            }
            return Ok(());
        }
        if regs.rip > stub::after_address() && regs.rip < stub::catcher_address() {
            // On its way to say that it has ended.
            return Ok(());
        }
        regs.rip = stub::after_address();
        regs.rax = NOT_BEGUN as u64;
        regs.orig_rax = u64::MAX;
        regs.r13 = 0;
        stopped.set_regs(&regs)
    }
}

/// The stub, the arena.
fn furnish(calls: &mut RemoteCalls, pid: i32, arena: &Arena) -> Result<(), VesselError> {
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
    let (rx, rw) = (
        (libc::PROT_READ | libc::PROT_EXEC) as u64,
        (libc::PROT_READ | libc::PROT_WRITE) as u64,
    );
    let memory = ProcessMemory::new(pid);
    calls.call("mmap", libc::SYS_mmap, [TRAMPOLINE, PAGE, rx, flags, u64::MAX, 0])?;
    calls.call("mmap", libc::SYS_mmap, [SCRATCH, PAGE, rw, flags, u64::MAX, 0])?;
    memory.write_forced(TRAMPOLINE, stub::code())?;
    calls.move_to(TRAMPOLINE);
    let mut path = arena.path().into_bytes();
    path.push(0);
    memory.write_forced(SCRATCH, &path)?;
    let open = (libc::O_RDWR | libc::O_CLOEXEC) as u64;
    let fd = calls.call("open of the arena", libc::SYS_open, [SCRATCH, open, 0, 0, 0, 0])?;
    let shared = (libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE) as u64;
    let mapped = calls.call(
        "mmap of the arena",
        libc::SYS_mmap,
        [ARENA_ADDRESS, ARENA_LEN as u64, rw, shared, fd, 0],
    );
    calls.call("close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
    mapped?;
    Ok(())
}

/// From here on the process is a vessel.
fn settle(mut calls: RemoteCalls, pid: i32, slot: &Slot) -> Result<(i32, Vec<SigAction>), VesselError> {
    let rseq = calls.stopped_mut().map(|s| s.rseq()).transpose()?.flatten();
    if let Some(rseq) = rseq {
        const UNREGISTER: u64 = 1;
        let args = [
            rseq.pointer,
            u64::from(rseq.size),
            UNREGISTER,
            u64::from(rseq.signature),
            0,
            0,
        ];
        calls.call("rseq", libc::SYS_rseq, args)?;
    }
    calls.call("set_robust_list", libc::SYS_set_robust_list, [0, 24, 0, 0, 0, 0])?;
    calls.call("set_tid_address", libc::SYS_set_tid_address, [0; 6])?;
    drop_pages(&mut calls, pid)?;
    let catcher = start_catcher(&mut calls)?;
    let regs = worker_regs(slot);
    calls.end_with(&regs, WORKER_MASK)?.cont(0)?;
    Ok((catcher, capture::dispositions(pid)?))
}

/// Registers of a worker that waits in its slot.
fn worker_regs(slot: &Slot) -> Regs {
    Regs {
        rip: stub::loop_address(),
        r12: slot.address(),
        orig_rax: u64::MAX,
        // User code and data segments (arch/x86/include/asm/segment.h).
        cs: 0x33,
        ss: 0x2b,
        eflags: 0x202,
        ..Regs::default()
    }
}

fn drop_pages(calls: &mut RemoteCalls, pid: i32) -> Result<(), VesselError> {
    let kept = capture::argument_pages(pid)?;
    for line in map_lines(pid, false)? {
        let special = matches!(
            line.path.as_slice(),
            b"[vdso]" | b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]"
        );
        if special || reserved(&line.range) {
            continue;
        }
        let parts = [
            line.range.start..line.range.end.min(kept.start),
            line.range.start.max(kept.end)..line.range.end,
        ];
        for part in parts {
            if part.start >= part.end {
                continue;
            }
            let len = part.end - part.start;
            let args = [part.start, len, MADV_DONTNEED_LOCKED, 0, 0, 0];
            if calls.raw(libc::SYS_madvise, args)? < 0 {
                // Before Linux 5.18.
                let args = [part.start, len, libc::MADV_DONTNEED as u64, 0, 0, 0];
                calls.call("madvise", libc::SYS_madvise, args)?;
            }
        }
    }
    Ok(())
}

/// A thread that blocks no signal and does nothing: signals for the process show up there.
fn start_catcher(calls: &mut RemoteCalls) -> Result<i32, VesselError> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    calls.move_to(TRAMPOLINE);
    let tid = calls.call("clone", libc::SYS_clone, [flags as u64, 0, 0, 0, 0, 0])? as i32;
    let Some((_, Status::Stopped(mut stopped))) = ptrace::wait(Target::Thread(tid), false)? else {
        return Err(RemoteCallError::Ended(tid).into());
    };
    let mut regs = stopped.regs()?;
    regs.rip = stub::catcher_address();
    regs.orig_rax = u64::MAX;
    stopped.set_regs(&regs)?;
    stopped.set_sigmask(0)?;
    stopped.cont(0)?;
    Ok(tid)
}
