//! The vessel: what becomes of a process at home when its user half leaves.
//!
//! It keeps its pid, threads, descriptors, areas and dispositions. Each thread executes the [worker code](code::worker) on its
//! [`Slot`]; one further thread, the *catcher*, waits with no signal blocked, so that signals to the process show up as
//! signal-delivery-stops of the catcher and do not disturb the workers' calls. The pages are dropped, the areas stay.
//!
//! Order: [`prepare`] (may be undone with [`unprepare`] as long as the threads are their own), [`enter`], resume what it gave back,
//! [`drop_memory`]. New threads: post clone(2) to a slot, give the child in its first stop to [`adopt_thread`]; new processes:
//! post clone/fork, and [`adopt_process`]. A vessel executes execve(2), exit(2) and exit_group(2) as posted calls like any other.

use std::cmp::Ordering::{Equal, Less};
use std::ops::Range;

use linklayer::image::{MmFields, PAGE, RESERVED};
use nix::errno::Errno;
use thiserror::Error;

use crate::areas::{self, MappedArea};
use crate::arena::{self, Arena, ArenaError, SEGMENT_LEN, Slot};
use crate::inject::{self, InjectError, Injector, code};
use crate::limits;
use crate::ptrace::{PtraceError, Stopped, wait_stop};

/// The signals that a worker blocks when it begins: all. Of these only SIGTTIN and SIGTTOU may be unblocked, so that
/// a background process is stopped at the terminal when the guest would be.
pub const WORKER_MASK: u64 = u64::MAX;

const CATCHER_CLONE: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// MADV_DONTNEED_LOCKED of linux/mman.h.
const MADV_DONTNEED_LOCKED: u64 = 24;
/// RSEQ_FLAG_UNREGISTER of linux/rseq.h.
const RSEQ_UNREGISTER: u64 = 1;

/// Why something could not be done to a vessel.
#[derive(Debug, Error)]
pub enum VesselError {
    /// An injected call failed.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// A ptrace request failed.
    #[error(transparent)]
    Ptrace(#[from] PtraceError),
    /// The slot could not be used.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// A posted call failed.
    #[error("{call} in the vessel: {errno}")]
    Call {
        /// name of the call
        call: &'static str,
        /// its error
        errno: Errno,
    },
    /// /proc of the process could not be read.
    #[error("cannot read {what} of process {pid}: {source}")]
    Proc {
        /// what
        what: &'static str,
        /// process
        pid: i32,
        /// the error
        source: std::io::Error,
    },
}

impl VesselError {
    /// Whether the process is dead.
    pub fn is_gone(&self) -> bool {
        match self {
            VesselError::Inject(error) => error.is_gone(),
            VesselError::Ptrace(error) => error.is_gone(),
            _ => false,
        }
    }
}

/// Result of vessel operations.
pub type Result<T> = std::result::Result<T, VesselError>;

/// Maps the code, the scratch page and the arena in a process whose threads are all stopped. Nothing else changes; on an error
/// nothing stays mapped. It opens the arena by its path in /proc, for which a file descriptor must be free (the soft limits of files
/// and address space are raised meanwhile).
pub fn prepare(leader: &mut Stopped, arena: &Arena) -> Result<()> {
    let pid = leader.tid();
    let entry = inject::find_entry(pid)?;
    let _raised = limits::Raised::new(pid, &[libc::RLIMIT_NOFILE, libc::RLIMIT_AS]);
    let mut injector = Injector::begin(leader, entry)?;
    let done = map_all(&mut injector, pid, arena);
    if let Err(error) = &done
        && !error.is_gone()
    {
        injector.set_entry(entry);
        // Unmapping what is not mapped is no error.
        unmap_all(&mut injector)?;
    }
    injector.end()?;
    done
}

/// Undoes [`prepare`] in a process whose threads are all stopped outside the code.
pub fn unprepare(leader: &mut Stopped) -> Result<()> {
    let entry = inject::find_entry_outside(leader.tid(), RESERVED)?;
    let mut injector = Injector::begin(leader, entry)?;
    unmap_all(&mut injector)?;
    injector.end()?;
    Ok(())
}

fn map_all(injector: &mut Injector<'_>, pid: i32, arena: &Arena) -> Result<()> {
    injector.plant(pid)?;
    let memory = inject::Memory::open(pid).map_err(InjectError::proc("mem", pid))?;
    memory
        .write(code::SCRATCH, arena.path().as_bytes_with_nul())
        .map_err(InjectError::proc("mem", pid))?;
    let how = (libc::O_RDWR | libc::O_CLOEXEC) as u64;
    let fd = injector.demand(
        "openat",
        libc::SYS_openat,
        [libc::AT_FDCWD as u64, code::SCRATCH, how, 0, 0, 0],
    )?;
    let mapped = injector.demand("mmap", libc::SYS_mmap, segment_map(0, arena.segments(), fd));
    injector.demand("close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
    mapped?;
    Ok(())
}

/// Arguments of the mmap of the segments `from..to`.
fn segment_map(from: usize, to: usize, fd: u64) -> [u64; 6] {
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE,
    );
    let offset = (from * SEGMENT_LEN) as u64;
    [
        code::ARENA + offset,
        ((to - from) * SEGMENT_LEN) as u64,
        prot as u64,
        flags as u64,
        fd,
        offset,
    ]
}

fn unmap_all(injector: &mut Injector<'_>) -> Result<()> {
    let len = RESERVED.end - RESERVED.start;
    injector.demand("munmap", libc::SYS_munmap, [RESERVED.start, len, 0, 0, 0, 0])?;
    Ok(())
}

/// Puts the threads of a [prepared](prepare) process into the worker code, each on its slot (the leader first in `threads`), makes the
/// catcher, and gives it back stopped. All threads are then in event stops: resume each with `cont(0)`, or `listen()` when it is in a
/// group-stop.
///
/// rseq, robust list and clear-child-tid address of each thread are unregistered: they point into memory that is going to vanish.
/// The registers and masks are lost: capture them before.
pub fn enter(threads: &mut [Stopped], slots: &[&Slot]) -> Result<Stopped> {
    assert_eq!(threads.len(), slots.len(), "one slot per thread");
    let mut catcher = None;
    for (thread, slot) in threads.iter_mut().zip(slots) {
        let rseq = thread.rseq()?;
        let mut injector = Injector::begin(thread, code::CODE)?;
        if let Some(rseq) = rseq {
            let args = [
                rseq.pointer,
                rseq.size.into(),
                RSEQ_UNREGISTER,
                rseq.signature.into(),
                0,
                0,
            ];
            injector.demand("rseq", libc::SYS_rseq, args)?;
        }
        injector.demand("set_robust_list", libc::SYS_set_robust_list, [0, 24, 0, 0, 0, 0])?;
        injector.demand("set_tid_address", libc::SYS_set_tid_address, [0; 6])?;
        if catcher.is_none() {
            catcher = Some(make_catcher(&mut injector)?);
        }
        put_to_work(&mut injector, slot);
        *injector.mask() = WORKER_MASK;
        injector.end()?;
    }
    catcher.ok_or_else(|| PtraceError::Gone { op: "enter", tid: 0 }.into())
}

fn put_to_work(injector: &mut Injector<'_>, slot: &Slot) {
    let regs = injector.registers();
    regs.rip = code::worker();
    regs.r12 = slot.address();
    regs.orig_rax = u64::MAX;
}

fn make_catcher(injector: &mut Injector<'_>) -> Result<Stopped> {
    injector.demand("clone", libc::SYS_clone, [CATCHER_CLONE as u64, 0, 0, 0, 0, 0])?;
    let tid = injector.newborn().ok_or(PtraceError::Gone {
        op: "clone",
        tid: injector.tid(),
    })?;
    let mut catcher = wait_stop(tid)?;
    let mut regs = catcher.regs()?;
    regs.rip = code::catcher();
    regs.orig_rax = u64::MAX;
    catcher.set_regs(&regs)?;
    catcher.set_sigmask(0)?;
    Ok(catcher)
}

/// Puts a thread that a worker's clone(2) made, and that is in its first stop, to work on a slot of its own. Its signal mask is the one
/// it inherited. The caller resumes it.
pub fn adopt_thread(child: &mut Stopped, slot: &Slot) -> Result<()> {
    let mut regs = child.regs()?;
    regs.rip = code::worker();
    regs.r12 = slot.address();
    regs.orig_rax = u64::MAX;
    child.set_regs(&regs)?;
    Ok(())
}

/// Puts a process that a worker's fork made (without CLONE_VM), and that is in its first stop, to work on a slot of its own, and
/// makes its catcher, which it gives back stopped. The caller resumes both.
pub fn adopt_process(child: &mut Stopped, slot: &Slot) -> Result<Stopped> {
    let mut injector = Injector::begin(child, code::CODE)?;
    let catcher = make_catcher(&mut injector)?;
    put_to_work(&mut injector, slot);
    injector.end()?;
    Ok(catcher)
}

/// How a call in a slot stood when it was [cancelled](cancel).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// It had ended, or nothing was posted: its result stands.
    Ended,
    /// It was interrupted: its result will be this raw code of the kernel, one of -512, -513, -514, -516.
    Interrupted(i64),
    /// It had not begun and will not: its result will be -513 (ERESTARTNOINTR).
    NotBegun,
}

/// Ends the call of a worker that was stopped by [`crate::ptrace::interrupt`]: when the worker is resumed, the call completes in its
/// slot with the kernel's raw restart code. Without this the kernel restarts the call by itself when the worker is resumed, with the
/// deadline kept; a few calls end with -4 (EINTR) all the same: they count as ended.
pub fn cancel(worker: &mut Stopped, slot: &Slot) -> Result<Cancelled> {
    let state = slot.state();
    if !slot.busy() {
        return Ok(Cancelled::Ended);
    }
    let mut regs = worker.regs()?;
    let cancelled = match (state, regs.rip.cmp(&code::called()), regs.rax as i64) {
        // The worker has not looked yet; it may still be ringing for the call before.
        (arena::POSTED, ..) | (_, Less, _) => {
            regs.rip = code::called();
            regs.rax = -513i64 as u64;
            Cancelled::NotBegun
        }
        (_, Equal, code @ (-512 | -513 | -514 | -516)) if regs.orig_rax as i64 >= 0 => {
            Cancelled::Interrupted(code)
        }
        _ => return Ok(Cancelled::Ended),
    };
    regs.orig_rax = u64::MAX;
    worker.set_regs(&regs)?;
    Ok(cancelled)
}

/// Ends the catcher (or any other vessel thread) with exit(2) when it is resumed.
pub fn dismiss(thread: &mut Stopped) -> Result<()> {
    let mut regs = thread.regs()?;
    regs.rip = code::exit();
    regs.orig_rax = u64::MAX;
    thread.set_regs(&regs)?;
    thread.set_sigmask(u64::MAX)?;
    Ok(())
}

/// Posts a call and makes an error of its errno.
pub(crate) fn post(slot: &Slot, call: &'static str, nr: i64, args: [u64; 6]) -> Result<u64> {
    match slot.call(nr, args)? {
        ret @ -4095..0 => Err(VesselError::Call {
            call,
            errno: Errno::from_raw(-ret as i32),
        }),
        ret => Ok(ret as u64),
    }
}

/// Maps the arena's segments `from..` in the vessel of a running worker: for slots in segments that were made since it was
/// prepared (or since its parent was).
pub fn map_segments(slot: &Slot, arena: &Arena, from: usize) -> Result<()> {
    let to = arena.segments();
    if from >= to {
        return Ok(());
    }
    slot.write(0, arena.path().as_bytes_with_nul())?;
    let how = (libc::O_RDWR | libc::O_CLOEXEC) as u64;
    let open = [libc::AT_FDCWD as u64, slot.data_address(), how, 0, 0, 0];
    let fd = post(slot, "openat", libc::SYS_openat, open)?;
    let mapped = post(slot, "mmap", libc::SYS_mmap, segment_map(from, to, fd));
    post(slot, "close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
    mapped.map(|_| ())
}

/// The pages that a vessel keeps, so that others still see its command line and environment in /proc.
pub fn kept_pages(mm: &MmFields) -> Vec<Range<u64>> {
    let page = |from: u64, to: u64| from & !(PAGE - 1)..(to + PAGE - 1) & !(PAGE - 1);
    [page(mm.arg_start, mm.arg_end), page(mm.env_start, mm.env_end)]
        .into_iter()
        .filter(|r| r.start < r.end)
        .collect()
}

/// Drops the pages of a vessel through one of its (idle) workers, but for the `keep` ranges (page-aligned), its code and its arena.
/// The areas stay. Gives the number of bytes in areas that refused (device memory, sealed areas).
pub fn drop_memory(slot: &Slot, pid: i32, keep: &[Range<u64>]) -> Result<u64> {
    let areas = areas::maps(pid).map_err(|source| VesselError::Proc {
        what: "maps",
        pid,
        source,
    })?;
    let mut runs: Vec<(Range<u64>, Vec<Range<u64>>)> = Vec::new();
    for area in areas.iter().filter(|a| droppable(a)) {
        for piece in without(area.start..area.end, keep) {
            match runs.last_mut() {
                Some((run, pieces)) if run.end == piece.start => {
                    run.end = piece.end;
                    pieces.push(piece);
                }
                _ => runs.push((piece.clone(), vec![piece])),
            }
        }
    }
    let drop_range = |range: &Range<u64>| -> Result<bool> {
        let args = [
            range.start,
            range.end - range.start,
            MADV_DONTNEED_LOCKED,
            0,
            0,
            0,
        ];
        Ok(slot.call(libc::SYS_madvise, args)? == 0)
    };
    let mut refused = 0;
    for (run, pieces) in &runs {
        // Neighbours are dropped by one call; the call stops at the first area that refuses.
        if drop_range(run)? {
            continue;
        }
        for piece in pieces {
            if !drop_range(piece)? {
                refused += piece.end - piece.start;
            }
        }
    }
    Ok(refused)
}

fn droppable(area: &MappedArea) -> bool {
    let kernel = [
        &b"[vdso]"[..],
        b"[vvar]",
        b"[vvar_vclock]",
        b"[vsyscall]",
        b"[uprobes]",
    ]
    .contains(&&area.name[..]);
    !kernel && (area.end <= RESERVED.start || area.start >= RESERVED.end)
}

/// What is left of `range` without the `holes`.
fn without(range: Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = vec![range];
    for hole in holes {
        left = left
            .into_iter()
            .flat_map(|r| [r.start..r.end.min(hole.start), r.start.max(hole.end)..r.end])
            .filter(|r| r.start < r.end)
            .collect();
    }
    left.sort_by_key(|r| r.start);
    left
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_cut_out() {
        assert_eq!(without(10..20, &[]), [10..20]);
        assert_eq!(without(10..20, &[12..14, 18..30]), [10..12, 14..18]);
        assert_eq!(without(10..20, &[0..30]), []);
        assert_eq!(without(10..20, &[0..10, 20..30]), [10..20]);
    }
}
