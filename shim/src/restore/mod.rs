//! Building a process out of an image: a blank process is emptied and filled by calls that it executes under ptrace.

mod kernel;
mod shell;

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use linklayer::image::{
    AltStack, Area, AreaFlags, AreaKind, PAGE, ProcessImage, RESERVED, SigAction, SigInfo, ThreadImage,
    XstateComponent,
};

pub use shell::{Room, Shell};
pub(crate) use shell::{carry, inside, outside};

use crate::memory::ProcessMemory;
use crate::ptrace::{self, PtraceError, Stopped};
use crate::remote_call::{BatchCall, RemoteCallError, RemoteCalls};
use crate::{userfault, xstate};
use linklayer::pages::Landed;

/// Where the code that makes the calls lies while a process is built: in the part of the address space that no guest
/// may use.
pub const TRAMPOLINE: u64 = RESERVED.start;
/// A page for the calls' arguments.
pub const SCRATCH: u64 = TRAMPOLINE + PAGE;
/// How much of it the calls of a batch may use.
pub(crate) const ARGUMENTS_LEN: usize = 1024;
const SYSCALL: [u8; 2] = [0x0f, 0x05];
const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;

/// Why a process could not be built. The blank process is spoilt and must be killed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A call in it failed.
    #[error(transparent)]
    Call(#[from] RemoteCallError),
    /// ptrace failed.
    #[error(transparent)]
    Ptrace(#[from] PtraceError),
    /// It could not be looked at.
    #[error(transparent)]
    Capture(#[from] crate::capture::CaptureError),
    /// Its memory could not be accessed.
    #[error("memory of the new process: {0}")]
    Memory(#[from] io::Error),
    /// The image needs something that this node has not.
    #[error("{0}")]
    Unsuitable(String),
}

impl RestoreError {
    /// Whether the process is dead.
    pub fn is_gone(&self) -> bool {
        match self {
            RestoreError::Call(e) => e.is_gone(),
            RestoreError::Ptrace(e) => e.is_gone(),
            RestoreError::Capture(e) => e.is_gone(),
            _ => false,
        }
    }
}

/// A process under construction: its leader, and the other threads that were [started](Rebuilt::start_threads), can be
/// made to execute calls.
#[derive(Debug)]
pub struct Rebuilt {
    calls: RemoteCalls,
    others: Vec<RemoteCalls>,
    memory: ProcessMemory,
    pid: i32,
    threads: Vec<ThreadImage>,
    pending: Vec<SigInfo>,
    xstate_layout: Vec<XstateComponent>,
    key: u64,
    /// The leader is not among the threads: it only builds, and ends.
    leader_ended: bool,
    userfault: Option<OwnedFd>,
}

/// How the new process makes a userfaultfd, if pages of it come later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// By the system call.
    Call,
    /// By this descriptor of its, which is of the device.
    Device(i32),
}

impl Rebuilt {
    /// Executes a call in the leader.
    ///
    /// # Errors
    /// The process was killed.
    pub fn raw(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, RemoteCallError> {
        self.calls.raw(nr, args)
    }

    /// The process has a filter now, which calls pass with this key.
    pub fn show(&mut self, key: u64) {
        self.key = key;
        self.calls.show(key);
        for calls in &mut self.others {
            calls.show(key);
        }
    }

    /// Its process id here.
    pub fn pid(&self) -> i32 {
        self.calls.tid()
    }

    /// The userfaultfd that it was to make.
    pub fn take_userfault(&mut self) -> Option<OwnedFd> {
        self.userfault.take()
    }

    /// Writes arguments into the scratch page.
    ///
    /// # Errors
    /// The process was killed.
    pub fn scratch(&mut self, bytes: &[u8]) -> io::Result<u64> {
        self.memory.write_forced(SCRATCH, bytes)?;
        Ok(SCRATCH)
    }

    /// Makes the threads of the image but the leader, which is there. They inherit the leader's filter. `next_tid` has the kernel
    /// give its argument to the next thread of the process's pid namespace. Gives the ids that the threads have for this process,
    /// in the order of the image.
    ///
    /// # Errors
    /// `next_tid` fails, another process took the id, or the process was killed.
    pub fn start_threads(
        &mut self,
        next_tid: &mut dyn FnMut(i32) -> io::Result<()>,
    ) -> Result<Vec<i32>, RestoreError> {
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        let there = self.others.len() + usize::from(!self.leader_ended);
        for thread in self.threads.iter().skip(there) {
            next_tid(thread.tid)?;
            let got = self
                .calls
                .call("clone", libc::SYS_clone, [flags as u64, 0, 0, 0, 0, 0])?;
            let newborn = self
                .calls
                .newborn()
                .ok_or(RemoteCallError::Ended(self.calls.tid()))?;
            let mut calls = RemoteCalls::begin(ptrace::wait_stop(newborn)?, TRAMPOLINE)?;
            calls.show(self.key);
            if got != thread.tid as u64 {
                return Err(RestoreError::Unsuitable(format!(
                    "thread id {} is taken",
                    thread.tid
                )));
            }
            register(&mut calls, &self.memory, thread)?;
            self.others.push(calls);
        }
        Ok(self.others.iter().map(RemoteCalls::tid).collect())
    }

    /// Removes the construction site and puts the leader where the image says; it can be resumed.
    ///
    /// # Errors
    /// The image has more threads, or the process was killed.
    pub fn finish(self) -> Result<Stopped, RestoreError> {
        if self.threads.len() != 1 || self.leader_ended {
            return Err(RestoreError::Unsuitable(
                "its other threads were not taken".into(),
            ));
        }
        let mut threads = self.finish_all()?;
        threads
            .pop()
            .ok_or(RestoreError::Unsuitable("it has no thread".into()))
    }

    /// Removes the construction site and puts all threads where the image says; they can be resumed. The leader is the first,
    /// or has ended.
    ///
    /// # Errors
    /// Threads were not [started](Rebuilt::start_threads), or the process was killed.
    pub fn finish_all(mut self) -> Result<Vec<Stopped>, RestoreError> {
        if self.others.len() + usize::from(!self.leader_ended) != self.threads.len() {
            return Err(RestoreError::Unsuitable(
                "its other threads were not started".into(),
            ));
        }
        let mut all = Vec::new();
        if self.leader_ended {
            end_leader(self.calls)?;
        } else {
            all.push(self.calls);
        }
        all.append(&mut self.others);
        for (calls, thread) in all.iter_mut().zip(&self.threads) {
            for info in &thread.pending {
                requeue(calls, &self.memory, self.pid, thread.tid, false, info)?;
            }
        }
        let first = self.threads.first().map_or(self.pid, |thread| thread.tid);
        for info in &self.pending {
            requeue(&mut all[0], &self.memory, self.pid, first, true, info)?;
        }
        all[0].call("munmap", libc::SYS_munmap, [TRAMPOLINE, 2 * PAGE, 0, 0, 0, 0])?;
        let mut stopped = Vec::new();
        for (mut calls, thread) in all.into_iter().zip(&self.threads) {
            set_xstate(calls.stopped(), thread, &self.xstate_layout)?;
            stopped.push(calls.end_with(&thread.resumed(), thread.sigmask)?);
        }
        Ok(stopped)
    }
}

/// Has the leader of a process with other threads end, and waits until it has: the tracer is not told.
fn end_leader(leader: RemoteCalls) -> Result<(), RestoreError> {
    let tid = leader.tid();
    leader.leave_by(libc::SYS_exit, [0; 6])?;
    let until = Instant::now() + Duration::from_secs(2);
    while !crate::process::has_ended(tid) {
        if Instant::now() > until {
            return Err(RestoreError::Unsuitable("its first thread does not end".into()));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

/// Gives a thread its extended registers, laid out as this CPU has them.
pub(crate) fn set_xstate(
    stopped: &mut Stopped,
    thread: &ThreadImage,
    layout: &[XstateComponent],
) -> Result<(), RestoreError> {
    if thread.xstate.is_empty() {
        return Ok(());
    }
    let here = xstate::layout();
    let sample = stopped.xstate()?;
    if here == layout && sample.len() == thread.xstate.len() {
        stopped.set_xstate(&thread.xstate)?;
    } else {
        let converted = xstate::convert(&thread.xstate, layout, &here, &sample)
            .map_err(|e| RestoreError::Unsuitable(e.to_string()))?;
        stopped.set_xstate(&converted)?;
    }
    Ok(())
}

/// Puts a pending signal back, for the thread or (`process`) for its process. The thread, whose id in its own process `pid` is `tid`,
/// sends it to itself, so that any si_code is allowed: that holds for the number of the very thread, be it the leader or not
/// (kernel/signal.c, do_rt_sigqueueinfo).
pub(crate) fn requeue(
    calls: &mut RemoteCalls,
    memory: &ProcessMemory,
    pid: i32,
    tid: i32,
    process: bool,
    info: &SigInfo,
) -> Result<(), RestoreError> {
    memory.write_forced(SCRATCH, &info.0)?;
    let signal = info.signo() as u64;
    // A full queue or a coalesced signal is no error natively either.
    if process {
        calls.raw(libc::SYS_rt_sigqueueinfo, [tid as u64, signal, SCRATCH, 0, 0, 0])?;
    } else {
        let args = [pid as u64, tid as u64, signal, SCRATCH, 0, 0];
        calls.raw(libc::SYS_rt_tgsigqueueinfo, args)?;
    }
    Ok(())
}

/// Makes the blank process (stopped in a system call's wake, with nothing of value in it) the one of the image, except for its
/// further threads ([`Rebuilt::start_threads`]) and for what [`Rebuilt::finish_all`] does. `fd_of` gives the descriptor,
/// inside the blank process, of a file's content or of shared memory. With `faults` it makes a userfaultfd, which is taken from it.
///
/// # Errors
/// See [`RestoreError`].
pub fn rebuild<'a>(
    stopped: Stopped,
    image: &ProcessImage,
    fd_of: &dyn Fn(Backing) -> Option<i32>,
    pages: impl IntoIterator<Item = (u64, &'a [u8])>,
    faults: Option<Faults>,
) -> Result<Rebuilt, RestoreError> {
    Shell::new(stopped)?.rebuild(image, fd_of, pages, &Landed::default(), faults)
}

/// Makes a process that has the memory of the image the one of the image in all else.
fn complete(
    mut calls: RemoteCalls,
    memory: ProcessMemory,
    image: &ProcessImage,
    faults: Option<Faults>,
) -> Result<Rebuilt, RestoreError> {
    let first = image
        .threads
        .first()
        .ok_or_else(|| RestoreError::Unsuitable("a process without threads".into()))?;
    let pid = calls.tid();
    advise(&mut calls, image)?;
    mm_fields(&mut calls, &memory, image)?;
    let userfault = faults.map(|how| make_userfault(&mut calls, how)).transpose()?;
    process(&mut calls, &memory, image)?;
    if image.leader_ended() {
        // What it leaves when it ends is nothing of the image's.
        let nothing = ThreadImage {
            robust_list: (0, 0),
            clear_child_tid: 0,
            rseq: None,
            altstack: AltStack::default(),
            ..first.clone()
        };
        register(&mut calls, &memory, &nothing)?;
    } else {
        register(&mut calls, &memory, first)?;
    }
    limits(pid, image)?;
    Ok(Rebuilt {
        leader_ended: image.leader_ended(),
        calls,
        others: Vec::new(),
        memory,
        pid: image.pid,
        threads: image.threads.clone(),
        pending: image.pending.clone(),
        xstate_layout: image.xstate_layout.clone(),
        key: 0,
        userfault,
    })
}

/// Has the process make a userfaultfd, and takes a duplicate of it. Its own is closed with all others.
fn make_userfault(calls: &mut RemoteCalls, how: Faults) -> Result<OwnedFd, RestoreError> {
    let made = match how {
        Faults::Call => calls.call(
            "userfaultfd",
            libc::SYS_userfaultfd,
            [userfault::FLAGS, 0, 0, 0, 0, 0],
        )?,
        Faults::Device(fd) => {
            let args = [fd as u64, userfault::IOC_NEW, userfault::FLAGS, 0, 0, 0];
            calls.call("ioctl of the userfaultfd device", libc::SYS_ioctl, args)?
        }
    };
    Ok(crate::fd::get_from(calls.tid(), made as i32)?)
}

fn batched(what: &'static str, nr: i64, args: [u64; 6]) -> BatchCall {
    BatchCall { what, nr, args }
}

/// What an area maps that is not its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Backing {
    /// The file with this number.
    File(u64),
    /// The shared anonymous memory with this id.
    Shared(u64),
}

fn map(area: &Area, fd_of: &dyn Fn(Backing) -> Option<i32>) -> Result<BatchCall, RestoreError> {
    let mut flags = libc::MAP_FIXED_NOREPLACE;
    flags |= if area.shared() {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE
    };
    if area.flags.has(AreaFlags::GROWSDOWN) {
        flags |= libc::MAP_GROWSDOWN | libc::MAP_STACK;
    }
    if area.flags.has(AreaFlags::NORESERVE) {
        flags |= libc::MAP_NORESERVE;
    }
    let (fd, offset) = match area.kind {
        AreaKind::Anon => {
            flags |= libc::MAP_ANONYMOUS;
            (-1, 0)
        }
        AreaKind::File { file_id, offset } => {
            let fd = fd_of(Backing::File(file_id))
                .ok_or_else(|| RestoreError::Unsuitable(format!("file {file_id} of an area is not here")))?;
            (fd, offset)
        }
        AreaKind::SharedAnon {
            id,
            offset,
            sysv: false,
        } => {
            let fd = fd_of(Backing::Shared(id))
                .ok_or_else(|| RestoreError::Unsuitable(format!("shared memory {id} is not here")))?;
            (fd, offset)
        }
        _ => {
            return Err(RestoreError::Unsuitable(
                "an area that only exists at home".into(),
            ));
        }
    };
    let args = [
        area.start,
        area.len(),
        u64::from(area.prot.0),
        flags as u64,
        fd as u64,
        offset,
    ];
    Ok(batched("mmap", libc::SYS_mmap, args))
}

fn advise(calls: &mut RemoteCalls, image: &ProcessImage) -> Result<(), RestoreError> {
    let advices = [
        (AreaFlags::DONTFORK, libc::MADV_DONTFORK),
        (AreaFlags::WIPEONFORK, libc::MADV_WIPEONFORK),
        (AreaFlags::HUGEPAGE, libc::MADV_HUGEPAGE),
        (AreaFlags::NOHUGEPAGE, libc::MADV_NOHUGEPAGE),
        (AreaFlags::MERGEABLE, libc::MADV_MERGEABLE),
        (AreaFlags::DONTDUMP, libc::MADV_DONTDUMP),
    ];
    let mut batch = Vec::new();
    for area in image.areas.iter().filter(|a| !a.is_kernel()) {
        for (flag, advice) in advices {
            if area.flags.has(flag) {
                let args = [area.start, area.len(), advice as u64, 0, 0, 0];
                batch.push(batched("madvise", libc::SYS_madvise, args));
            }
        }
    }
    let about_fork = [libc::MADV_DONTFORK as u64, libc::MADV_WIPEONFORK as u64];
    for (call, ret) in batch.iter().zip(calls.batch(&batch)?) {
        // A hint that this kernel lacks changes nothing that the program can see, but for the two about fork.
        if ret < 0 && about_fork.contains(&call.args[2]) {
            return Err(RestoreError::Unsuitable("madvise about fork".into()));
        }
    }
    Ok(())
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

/// prctl(2) PR_SET_MM_MAP: struct prctl_mm_map of linux/prctl.h, then the auxiliary vector.
fn mm_fields(
    calls: &mut RemoteCalls,
    memory: &ProcessMemory,
    image: &ProcessImage,
) -> Result<(), RestoreError> {
    const MAP_LEN: u64 = 104;
    let mm = &image.mm;
    let auxv_at = SCRATCH + 256;
    let mut map = words(&[
        mm.start_code,
        mm.end_code,
        mm.start_data,
        mm.end_data,
        mm.start_brk,
        mm.brk,
        mm.start_stack,
        mm.arg_start,
        mm.arg_end,
        mm.env_start,
        mm.env_end,
        auxv_at,
    ]);
    map.extend((image.auxv.len() as u32).to_ne_bytes());
    map.extend(u32::MAX.to_ne_bytes());
    memory.write_forced(SCRATCH, &map)?;
    memory.write_forced(auxv_at, &image.auxv)?;
    calls.call(
        "prctl(PR_SET_MM_MAP)",
        libc::SYS_prctl,
        [PR_SET_MM, PR_SET_MM_MAP, SCRATCH, MAP_LEN, 0, 0],
    )?;
    Ok(())
}

/// Gives a process the dispositions of the signals 1, 2 ... that it has not yet: to set one anew can discard a pending signal.
pub(crate) fn actions(
    calls: &mut RemoteCalls,
    memory: &ProcessMemory,
    wanted: &[SigAction],
    present: &[SigAction],
) -> Result<(), RestoreError> {
    /// Of struct sigaction.
    const LEN: usize = 32;
    let set: Vec<(u64, &SigAction)> = (1..)
        .zip(wanted)
        .enumerate()
        .filter(|(i, (signal, action))| {
            present.get(*i).copied().unwrap_or_default() != **action && ![9, 19].contains(signal)
        })
        .map(|(_, pair)| pair)
        .collect();
    for part in set.chunks(ARGUMENTS_LEN / LEN) {
        let bytes: Vec<u8> = part
            .iter()
            .flat_map(|(_, a)| words(&[a.handler, a.flags, a.restorer, a.mask]))
            .collect();
        memory.write_forced(SCRATCH, &bytes)?;
        let batch: Vec<BatchCall> = part
            .iter()
            .zip((SCRATCH..).step_by(LEN))
            .map(|((signal, _), at)| {
                batched("rt_sigaction", libc::SYS_rt_sigaction, [*signal, at, 0, 8, 0, 0])
            })
            .collect();
        calls.batch_all(&batch)?;
    }
    Ok(())
}

/// Dispositions and personality; no descriptor stays open.
fn process(
    calls: &mut RemoteCalls,
    memory: &ProcessMemory,
    image: &ProcessImage,
) -> Result<(), RestoreError> {
    actions(calls, memory, &image.actions, &[])?;
    let personality = [u64::from(image.personality), 0, 0, 0, 0, 0];
    calls.batch_all(&[
        batched("personality", libc::SYS_personality, personality),
        batched(
            "close_range",
            libc::SYS_close_range,
            [0, u64::from(u32::MAX), 0, 0, 0, 0],
        ),
    ])?;
    Ok(())
}

/// What a thread has registered with the kernel, and its name.
pub(crate) fn register(
    calls: &mut RemoteCalls,
    memory: &ProcessMemory,
    thread: &ThreadImage,
) -> Result<(), RestoreError> {
    let mut name = thread.comm.clone();
    name.resize(15, 0);
    name.push(0);
    let alt = thread.altstack;
    name.extend(words(&[alt.sp, u64::from(alt.flags), alt.size]));
    memory.write_forced(SCRATCH, &name)?;
    let (head, _) = thread.robust_list;
    let clear = thread.clear_child_tid;
    let mut batch = vec![
        batched(
            "prctl(PR_SET_NAME)",
            libc::SYS_prctl,
            [libc::PR_SET_NAME as u64, SCRATCH, 0, 0, 0, 0],
        ),
        batched(
            "set_tid_address",
            libc::SYS_set_tid_address,
            [clear, 0, 0, 0, 0, 0],
        ),
        batched(
            "set_robust_list",
            libc::SYS_set_robust_list,
            [head, 24, 0, 0, 0, 0],
        ),
    ];
    if let Some(rseq) = thread.rseq {
        let args = [rseq.pointer, rseq.size.into(), 0, rseq.signature.into(), 0, 0];
        batch.push(batched("rseq", libc::SYS_rseq, args));
    }
    calls.batch_all(&batch)?;
    // "Never had one" can only be confirmed, by a change to nothing.
    let ret = calls.raw(libc::SYS_sigaltstack, [SCRATCH + 16, 0, 0, 0, 0, 0])?;
    if ret < 0 && alt.size == 0 {
        memory.write_forced(SCRATCH + 16, &words(&[0, libc::SS_DISABLE as u64, 0]))?;
        calls.call(
            "sigaltstack",
            libc::SYS_sigaltstack,
            [SCRATCH + 16, 0, 0, 0, 0, 0],
        )?;
    } else if ret < 0 {
        let errno = nix::errno::Errno::from_raw(-ret as i32);
        let (what, tid) = ("sigaltstack", calls.tid());
        return Err(RemoteCallError::Failed { what, tid, errno }.into());
    }
    Ok(())
}

/// The limits that the guest's own kernel enforces on its memory.
fn limits(pid: i32, image: &ProcessImage) -> Result<(), RestoreError> {
    for limit in &image.rlimits {
        let enforced_here = [
            libc::RLIMIT_STACK,
            libc::RLIMIT_AS,
            libc::RLIMIT_DATA,
            libc::RLIMIT_CPU,
            libc::RLIMIT_SIGPENDING,
        ]
        .contains(&limit.resource);
        if enforced_here {
            crate::process::set_limit(pid, limit.resource, limit.soft, limit.hard).map_err(|e| {
                RestoreError::Unsuitable(format!(
                    "this node cannot grant resource limit {}: {e}",
                    limit.resource
                ))
            })?;
        }
    }
    Ok(())
}
