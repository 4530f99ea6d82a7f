//! The vessel: a process of home without its user half, executing calls for a guest elsewhere.

mod arena;
mod home;
mod room;
pub(crate) mod stub;

use std::collections::HashMap;
use std::fs;
use std::ops::Range;

use linklayer::image::{PAGE, Regs, SigAction, SigInfo};

pub use arena::{ARENA_ADDRESS, ARENA_LEN, Arena, KEEPERS, Slot};
pub use home::Homebound;

use crate::capture::{self, CaptureError, map_lines, reserved, vdso_site};
use crate::clone_rewrite::RESTARTNOINTR;
use crate::memory::ProcessMemory;
use crate::process;
use crate::ptrace::{self, PendingQueue, PtraceError, Stop, Stopped};
use crate::remote_call::{BatchCall, RemoteCallError, RemoteCalls};
use crate::restore::{SCRATCH, TRAMPOLINE};

/// Workers block everything: the catcher takes what arrives.
pub const WORKER_MASK: u64 = u64::MAX;
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
    /// Registering what a thread had failed.
    #[error(transparent)]
    Restore(#[from] crate::restore::RestoreError),
    /// Its registers are not those of this CPU.
    #[error(transparent)]
    Xstate(#[from] crate::xstate::XstateError),
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

impl VesselError {
    /// Whether the process is dead.
    pub fn is_gone(&self) -> bool {
        match self {
            VesselError::Capture(e) => e.is_gone(),
            VesselError::Call(e) => e.is_gone(),
            VesselError::Ptrace(e) => e.is_gone(),
            VesselError::Restore(e) => e.is_gone(),
            VesselError::Slot { errno, .. } => *errno == nix::errno::Errno::ESRCH,
            _ => false,
        }
    }
}

/// An emptied process.
#[derive(Debug)]
pub struct Vessel {
    pid: i32,
    catcher: i32,
    /// The process whose memory it has: itself, or who made it with CLONE_VM.
    pub memory: i32,
}

/// What conversion made.
#[derive(Debug)]
pub struct Parts {
    /// Each thread with its slot; they wait for calls.
    pub workers: Vec<(i32, Slot)>,
    /// The thread that takes signals.
    pub catcher: i32,
    /// The process's dispositions.
    pub actions: Vec<SigAction>,
    /// Signals that were pending for single threads (first), and have been taken off their queues: workers take none.
    pub pending: Vec<(i32, SigInfo)>,
    /// Threads that are in a group-stop and listen for SIGCONT.
    pub listening: Vec<i32>,
    /// Signals that a timer of the process sends to one thread alone, as sets, which that one's worker does not block.
    pub unblocked: HashMap<i32, u64>,
}

impl Vessel {
    /// Turns a single-threaded stopped process into a vessel. See [`Vessel::convert_all`].
    ///
    /// # Errors
    /// As there.
    pub fn convert(
        stopped: Stopped,
        arena: &Arena,
    ) -> Result<(Vessel, Parts), (Option<Stopped>, VesselError)> {
        Vessel::convert_all(vec![stopped], arena).map_err(|(mut threads, e)| (threads.pop(), e))
    }

    /// Turns a process all of whose threads are in event stops (the leader first, if it lives) into a vessel. Its memory areas stay;
    /// their pages are dropped, but for those of its arguments and environment, which ps(1) shows. What the threads have
    /// registered with the kernel (rseq, robust list, clear-child-tid address) is unregistered, as it lies in memory that vanishes.
    ///
    /// Its threads run, or listen for SIGCONT when they were in a group-stop. Anonymous memory that it shares is emptied: everybody
    /// who shares it must leave with it.
    ///
    /// # Errors
    /// The process is as it was, and its threads are given back; none when it is dead.
    pub fn convert_all(
        threads: Vec<Stopped>,
        arena: &Arena,
    ) -> Result<(Vessel, Parts), (Vec<Stopped>, VesselError)> {
        Vessel::prepare(threads, arena)?
            .settle(false)
            .map_err(|e| (Vec::new(), e))
    }

    /// The first part of [`Vessel::convert_all`]: everything that can fail while the process is whole. So several can be made
    /// ready before the first one loses its memory.
    ///
    /// # Errors
    /// As there.
    pub fn prepare(
        mut threads: Vec<Stopped>,
        arena: &Arena,
    ) -> Result<Prepared, (Vec<Stopped>, VesselError)> {
        // A leader that has ended shows nothing of the process.
        let Some(by) = threads.first().map(Stopped::tid) else {
            return Err((threads, VesselError::Call(RemoteCallError::Ended(0))));
        };
        let Some(pid) = process::of_thread(by) else {
            return Err((Vec::new(), VesselError::Call(RemoteCallError::Ended(by))));
        };
        let slots: std::io::Result<Vec<Slot>> = threads.iter().map(|_| arena.allocate()).collect();
        let (slots, site) = match (slots, vdso_site(by)) {
            (Ok(slots), Ok(site)) => (slots, site),
            (Err(e), _) => return Err((threads, e.into())),
            (_, Err(e)) => return Err((threads, e.into())),
        };
        let leader = &threads[0];
        let own = Stopped::assume(by, leader.stop());
        let mut leader = match RemoteCalls::begin(own, site) {
            Ok(calls) => calls,
            Err(e) => return Err((alive(threads, &e), e.into())),
        };
        match furnish(&mut leader, by, arena) {
            Ok((catcher, actions)) => Ok(Prepared {
                pid,
                threads,
                leader,
                catcher,
                actions,
                slots,
                site,
            }),
            Err(e) => match clear(leader, site) {
                Ok(stopped) => {
                    threads[0] = stopped;
                    Err((threads, e))
                }
                Err(_) => Err((Vec::new(), e)),
            },
        }
    }

    /// Makes a vessel of the child that a worker just forked; the child is at its first stop and goes into its slot when
    /// it is resumed. With `drop` it has pages of its parent, which it drops.
    ///
    /// # Errors
    /// The child is gone.
    pub fn adopt_child(stopped: Stopped, drop: bool) -> Result<(Vessel, Stopped, i32), VesselError> {
        let pid = stopped.tid();
        let mut calls = RemoteCalls::begin(stopped, TRAMPOLINE)?;
        if drop {
            Vessel::drop_inherited(&mut calls)?;
        }
        let catcher = make_catcher(&mut calls)?;
        let tid = catcher.tid();
        catcher.cont(0)?;
        let catcher = tid;
        Ok((
            Vessel {
                pid,
                catcher,
                memory: pid,
            },
            calls.end()?,
            catcher,
        ))
    }

    /// Drops the pages that were kept ([`Prepared::settle`]), by calls of the catcher, which has stopped.
    ///
    /// # Errors
    /// The process is dead.
    pub fn drop_pages(&self, catcher: Stopped) -> Result<Stopped, VesselError> {
        let by = catcher.tid();
        let mut calls = RemoteCalls::begin(catcher, TRAMPOLINE)?;
        drop_pages(&mut calls, by)?;
        Ok(calls.end()?)
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
        // Behind the point where it says that a call has ended it may still be in the wake of the call before this one.
        if regs.rip > stub::after_address() && regs.rip < stub::said_address() {
            return Ok(());
        }
        regs.rip = stub::after_address();
        regs.rax = RESTARTNOINTR as u64;
        regs.orig_rax = u64::MAX;
        regs.r13 = 0;
        stopped.set_regs(&regs)
    }
}

/// A process that can become a vessel or go on as it was. See [`Vessel::prepare`]. Dropping it leaves its threads stopped.
#[derive(Debug)]
pub struct Prepared {
    pid: i32,
    threads: Vec<Stopped>,
    leader: RemoteCalls,
    catcher: Stopped,
    actions: Vec<SigAction>,
    slots: Vec<Slot>,
    site: u64,
}

impl Prepared {
    /// The second part of [`Vessel::convert_all`]. With `keep` the pages stay until [`Vessel::drop_pages`].
    ///
    /// # Errors
    /// The process is dead.
    pub fn settle(self, keep: bool) -> Result<(Vessel, Parts), VesselError> {
        let (pid, catcher, by) = (self.pid, self.catcher.tid(), self.leader.tid());
        // From here on nothing fails but by the death of the process.
        let unblocked =
            timers_of_threads(&fs::read_to_string(format!("/proc/{pid}/timers")).unwrap_or_default());
        let settled = settle(
            &unblocked,
            self.threads,
            self.leader,
            self.catcher,
            &self.slots,
            (!keep).then_some(by),
        )?;
        let vessel = Vessel {
            pid,
            catcher,
            memory: pid,
        };
        let parts = Parts {
            workers: settled.workers.into_iter().zip(self.slots).collect(),
            catcher,
            actions: self.actions,
            pending: settled.pending,
            listening: settled.listening,
            unblocked,
        };
        Ok((vessel, parts))
    }

    /// Makes it again what it was. Its threads are given back stopped; none when it is dead. The catcher has ended, as
    /// [`ptrace::wait`] will report.
    pub fn undo(mut self) -> Vec<Stopped> {
        if home::end_stopped(self.catcher).is_err() {
            return Vec::new();
        }
        match clear(self.leader, self.site) {
            Ok(stopped) => {
                self.threads[0] = stopped;
                self.threads
            }
            Err(_) => Vec::new(),
        }
    }
}

/// Takes the stub and the arena out of a process that was to be a vessel. Nothing of its own was touched yet.
fn clear(mut leader: RemoteCalls, site: u64) -> Result<Stopped, RemoteCallError> {
    leader.move_to(site);
    leader.raw(libc::SYS_munmap, [TRAMPOLINE, 2 * PAGE, 0, 0, 0, 0])?;
    leader.raw(libc::SYS_munmap, [ARENA_ADDRESS, ARENA_LEN as u64, 0, 0, 0, 0])?;
    leader.end()
}
impl Vessel {
    /// Ends the call in progress of a worker that is in a group-stop, where it cannot say so itself: its result is what
    /// [`Vessel::abort_call`] would make of it, and when it goes on it waits for the next call.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn withdraw_call(stopped: &mut Stopped, slot: &Slot) -> Result<(), PtraceError> {
        if !slot.posted() {
            return Ok(());
        }
        let mut regs = stopped.regs()?;
        if regs.rip > stub::after_address() && regs.rip < stub::said_address() {
            // It has a result, and not said it yet: a few instructions, in which nobody is stopped but by chance.
            return Ok(());
        }
        let ret = if regs.rip == stub::after_address() {
            regs.rax as i64
        } else {
            RESTARTNOINTR
        };
        regs.rip = stub::loop_address();
        regs.orig_rax = u64::MAX;
        regs.r13 = 0;
        stopped.set_regs(&regs)?;
        slot.finish(ret);
        Ok(())
    }
}

/// The threads, if the process is alive.
fn alive(threads: Vec<Stopped>, error: &RemoteCallError) -> Vec<Stopped> {
    if error.is_gone() { Vec::new() } else { threads }
}

/// The stub, the arena, the catcher (still stopped). Gives the process's dispositions too.
fn furnish(
    calls: &mut RemoteCalls,
    pid: i32,
    arena: &Arena,
) -> Result<(Stopped, Vec<SigAction>), VesselError> {
    let memory = ProcessMemory::new(pid);
    let _raised = Raised::new(pid, &[libc::RLIMIT_NOFILE, libc::RLIMIT_AS]);
    capture::build_site(calls, &memory)?;
    let mut path = arena.path().into_bytes();
    path.push(0);
    memory.write_forced(SCRATCH, &path)?;
    let open = (libc::O_RDWR | libc::O_CLOEXEC) as u64;
    let fd = calls.call("open of the arena", libc::SYS_open, [SCRATCH, open, 0, 0, 0, 0])?;
    let rw = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let shared = (libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE) as u64;
    let mapped = calls.call(
        "mmap of the arena",
        libc::SYS_mmap,
        [ARENA_ADDRESS, ARENA_LEN as u64, rw, shared, fd, 0],
    );
    calls.call("close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
    mapped?;
    let actions = capture::actions(calls, &memory)?;
    Ok((make_catcher(calls)?, actions))
}

/// Soft limits of a process that are as high as the hard ones while this lives.
struct Raised {
    pid: i32,
    before: Vec<(u32, u64, u64)>,
}

impl Raised {
    fn new(pid: i32, resources: &[u32]) -> Raised {
        let mut before = Vec::new();
        for resource in resources {
            if let Ok((soft, hard)) = process::limit(pid, *resource)
                && soft != hard
                && process::set_limit(pid, *resource, hard, hard).is_ok()
            {
                before.push((*resource, soft, hard));
            }
        }
        Raised { pid, before }
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        for (resource, soft, hard) in &self.before {
            // It can only fail when the process is dead.
            let _ = process::set_limit(self.pid, *resource, *soft, *hard);
        }
    }
}

/// Puts all threads to work, after the memory (of the process that is reached by `emptied`) has gone.
fn settle(
    unblocked: &HashMap<i32, u64>,
    threads: Vec<Stopped>,
    leader: RemoteCalls,
    catcher: Stopped,
    slots: &[Slot],
    emptied: Option<i32>,
) -> Result<Settled, VesselError> {
    let tids: Vec<i32> = threads.iter().map(Stopped::tid).collect();
    let mut workers = vec![leader];
    for thread in threads.into_iter().skip(1) {
        workers.push(RemoteCalls::begin(thread, TRAMPOLINE)?);
    }
    let mut pending = Vec::new();
    for calls in &mut workers {
        let mut batch = vec![
            BatchCall {
                what: "set_robust_list",
                nr: libc::SYS_set_robust_list,
                args: [0, 24, 0, 0, 0, 0],
            },
            BatchCall {
                what: "set_tid_address",
                nr: libc::SYS_set_tid_address,
                args: [0; 6],
            },
        ];
        if let Some(rseq) = calls.stopped().rseq()? {
            const UNREGISTER: u64 = 1;
            let (size, signature) = (u64::from(rseq.size), u64::from(rseq.signature));
            batch.push(BatchCall {
                what: "rseq",
                nr: libc::SYS_rseq,
                args: [rseq.pointer, size, UNREGISTER, signature, 0, 0],
            });
        }
        calls.batch_all(&batch)?;
        let tid = calls.tid();
        pending.extend(take_pending(calls)?.into_iter().map(|info| (tid, info)));
    }
    if let Some(by) = emptied {
        drop_pages(&mut workers[0], by)?;
    }
    let mut listening = Vec::new();
    for (calls, slot) in workers.into_iter().zip(slots) {
        let own = unblocked.get(&calls.tid()).copied().unwrap_or(0);
        let worker = calls.end_with(&worker_regs(slot), WORKER_MASK & !own)?;
        resume(worker, &mut listening)?;
    }
    resume(catcher, &mut listening)?;
    Ok(Settled {
        workers: tids,
        pending,
        listening,
    })
}

/// Threads of a new vessel.
struct Settled {
    workers: Vec<i32>,
    /// Signals for single ones of them.
    pending: Vec<(i32, SigInfo)>,
    /// Those, with the catcher, that are in a group-stop.
    listening: Vec<i32>,
}

/// The signals that timers send to single threads, as sets, in /proc/PID/timers (SIGEV_THREAD_ID; proc_pid_timers(5)).
fn timers_of_threads(text: &str) -> HashMap<i32, u64> {
    let mut found = HashMap::new();
    let mut signal = None;
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("signal: ") {
            signal = value
                .split('/')
                .next()
                .and_then(|number| number.parse::<u32>().ok());
        } else if let Some(value) = line.strip_prefix("notify: ")
            && let Some(tid) = value
                .split_once("/tid.")
                .and_then(|(_, tid)| tid.trim().parse().ok())
            && let Some(signal @ 1..=64) = signal
        {
            *found.entry(tid).or_insert(0) |= 1 << (signal - 1);
        }
    }
    found
}

/// Takes the signals off a thread's queue that are for it alone. Those for the process stay.
fn take_pending(calls: &mut RemoteCalls) -> Result<Vec<SigInfo>, VesselError> {
    let memory = ProcessMemory::new(calls.tid());
    let mut taken = Vec::new();
    // The kernel looks at the thread's own queue first (kernel/signal.c, dequeue_signal).
    while !calls.stopped().pending(PendingQueue::Thread)?.is_empty() {
        let mut arguments = vec![0xff; 16];
        arguments.extend([0; 16]);
        memory.write_forced(SCRATCH, &arguments)?;
        let args = [SCRATCH, SCRATCH + 64, SCRATCH + 16, 8, 0, 0];
        if calls.raw(libc::SYS_rt_sigtimedwait, args)? < 0 {
            break;
        }
        let mut info = SigInfo::default();
        memory.read_forced(SCRATCH + 64, &mut info.0)?;
        taken.push(info);
    }
    Ok(taken)
}

/// Lets a thread go on, in a group-stop only from SIGCONT on.
fn resume(stopped: Stopped, listening: &mut Vec<i32>) -> Result<(), PtraceError> {
    match stopped.stop() {
        Stop::Group(_) => {
            listening.push(stopped.tid());
            stopped.listen()
        }
        _ => stopped.cont(0),
    }
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

/// Drops the pages of everything that is the process's own. Areas that refuse (of devices, sealed ones) keep theirs.
fn drop_pages(calls: &mut RemoteCalls, pid: i32) -> Result<(), VesselError> {
    let kept = capture::argument_pages(pid)?;
    let mut parts: Vec<Range<u64>> = Vec::new();
    let mut shared = Vec::new();
    for line in map_lines(pid, false)? {
        let special = matches!(
            line.path.as_slice(),
            b"[vdso]" | b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]"
        );
        if special || reserved(&line.range) {
            continue;
        }
        if line.shares_memory() {
            // All who share it have left; what they do with it elsewhere comes back as a new object.
            shared.push(BatchCall {
                what: "madvise",
                nr: libc::SYS_madvise,
                args: [
                    line.range.start,
                    line.range.end - line.range.start,
                    libc::MADV_REMOVE as u64,
                    0,
                    0,
                    0,
                ],
            });
        }
        let around = [
            line.range.start..line.range.end.min(kept.start),
            line.range.start.max(kept.end)..line.range.end,
        ];
        parts.extend(around.into_iter().filter(|part| part.start < part.end));
    }
    let advise = |advice: u64| {
        move |part: &Range<u64>| BatchCall {
            what: "madvise",
            nr: libc::SYS_madvise,
            args: [part.start, part.end - part.start, advice, 0, 0, 0],
        }
    };
    let calls_made: Vec<BatchCall> = parts.iter().map(advise(MADV_DONTNEED_LOCKED)).collect();
    let results = calls.batch(&calls_made)?;
    // A read-only view refuses; the memory then stays as long as the view.
    calls.batch(&shared)?;
    // Before Linux 5.18.
    let refused = parts.iter().zip(results).filter(|(_, ret)| *ret < 0);
    let again: Vec<BatchCall> = refused
        .map(|(part, _)| advise(libc::MADV_DONTNEED as u64)(part))
        .collect();
    calls.batch(&again)?;
    Ok(())
}

/// A thread that blocks no signal and does nothing: signals for the process show up there. It is given back stopped.
fn make_catcher(calls: &mut RemoteCalls) -> Result<Stopped, VesselError> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    calls.move_to(TRAMPOLINE);
    calls.call("clone", libc::SYS_clone, [flags as u64, 0, 0, 0, 0, 0])?;
    let tid = calls.newborn().ok_or(RemoteCallError::Ended(calls.tid()))?;
    let mut stopped = ptrace::wait_stop(tid)?;
    let mut regs = stopped.regs()?;
    regs.rip = stub::catcher_address();
    regs.orig_rax = u64::MAX;
    stopped.set_regs(&regs)?;
    stopped.set_sigmask(0)?;
    Ok(stopped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_of_threads_are_known() {
        let text = "ID: 0\nsignal: 36/00007ffc\nnotify: signal/tid.50\nClockID: 1\nID: 1\nsignal: 14/0\nnotify: signal/pid.14\nClockID: 0\n\
                    ID: 2\nsignal: 34/0\nnotify: signal/tid.50\nClockID: 1\nID: 3\nsignal: 99/0\nnotify: none/tid.3\n";
        assert_eq!(timers_of_threads(text), HashMap::from([(50, 1 << 35 | 1 << 33)]));
        assert_eq!(timers_of_threads(""), HashMap::new());
    }
}
