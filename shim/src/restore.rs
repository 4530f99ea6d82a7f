//! Building a process out of an image: a blank process is emptied and filled by calls that it executes under ptrace.

use std::io;

use linklayer::image::{Area, AreaFlags, AreaKind, PAGE, ProcessImage, RESERVED, ThreadImage};

use crate::memory::ProcessMemory;
use crate::ptrace::{PtraceError, Stopped};
use crate::remote_call::{RemoteCallError, RemoteCalls};

/// Where the code that makes the calls lies while a process is built: in the part of the address space that no guest
/// may use.
pub const TRAMPOLINE: u64 = RESERVED.start;
/// A page for the calls' arguments.
pub const SCRATCH: u64 = TRAMPOLINE + PAGE;
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
    /// Its memory could not be accessed.
    #[error("memory of the new process: {0}")]
    Memory(#[from] io::Error),
    /// The image needs something that this node has not.
    #[error("{0}")]
    Unsuitable(String),
}

/// A process under construction whose single thread can still be made to execute calls.
#[derive(Debug)]
pub struct Rebuilt {
    calls: RemoteCalls,
    thread: ThreadImage,
}

impl Rebuilt {
    /// Executes a call in the new process.
    ///
    /// # Errors
    /// The process was killed.
    pub fn raw(&mut self, nr: i64, args: [u64; 6]) -> Result<i64, RemoteCallError> {
        self.calls.raw(nr, args)
    }

    /// The process has a filter now, which calls pass with this key.
    pub fn show(&mut self, key: u64) {
        self.calls.show(key);
    }

    /// Its process id here.
    pub fn pid(&self) -> i32 {
        self.calls.tid()
    }

    /// Removes the construction site and puts the thread where the image says; it can be resumed.
    ///
    /// # Errors
    /// The process was killed.
    pub fn finish(mut self) -> Result<Stopped, RestoreError> {
        self.calls
            .call("munmap", libc::SYS_munmap, [TRAMPOLINE, 2 * PAGE, 0, 0, 0, 0])?;
        if !self.thread.xstate.is_empty()
            && let Some(stopped) = self.calls.stopped_mut()
        {
            stopped.set_xstate(&self.thread.xstate)?;
        }
        let regs = self.thread.regs;
        Ok(self.calls.end_with(&regs, self.thread.sigmask)?)
    }
}

/// Makes the blank process (stopped in a system call's wake, with nothing of value in it) the one of the image, except
/// for what [`Rebuilt::finish`] does. `fd_of` gives the descriptor, inside the blank process, of a file's content.
///
/// # Errors
/// See [`RestoreError`].
pub fn rebuild(
    stopped: Stopped,
    image: &ProcessImage,
    fd_of: &dyn Fn(u64) -> Option<i32>,
    pages: &[(u64, Vec<u8>)],
) -> Result<Rebuilt, RestoreError> {
    let [thread] = image.threads.as_slice() else {
        return Err(RestoreError::Unsuitable(
            "a process with several threads cannot be built yet".into(),
        ));
    };
    let pid = stopped.tid();
    let memory = ProcessMemory::new(pid);
    let mut site = stopped.regs()?.rip.wrapping_sub(2);
    let mut code = [0; 2];
    memory.read_forced(site, &mut code)?;
    if code != SYSCALL {
        site += 2;
        memory.write_forced(site, &SYSCALL)?;
    }
    let mut calls = RemoteCalls::begin(stopped, site)?;
    build_site(&mut calls, &memory)?;
    empty(&mut calls, pid, image)?;
    for area in image.areas.iter().filter(|a| !a.is_kernel()) {
        map(&mut calls, area, fd_of)?;
    }
    for (address, data) in pages {
        memory.write_forced(*address, data)?;
    }
    advise(&mut calls, image)?;
    mm_fields(&mut calls, &memory, image)?;
    identity(&mut calls, &memory, image, thread)?;
    calls.call(
        "close_range",
        libc::SYS_close_range,
        [0, u64::from(u32::MAX), 0, 0, 0, 0],
    )?;
    limits(pid, image)?;
    Ok(Rebuilt {
        calls,
        thread: thread.clone(),
    })
}

fn build_site(calls: &mut RemoteCalls, memory: &ProcessMemory) -> Result<(), RestoreError> {
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u64;
    let rx = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let rw = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    calls.call("mmap", libc::SYS_mmap, [TRAMPOLINE, PAGE, rx, flags, u64::MAX, 0])?;
    memory.write_forced(TRAMPOLINE, &SYSCALL)?;
    calls.move_to(TRAMPOLINE);
    calls.call("mmap", libc::SYS_mmap, [SCRATCH, PAGE, rw, flags, u64::MAX, 0])?;
    Ok(())
}

/// Unmaps everything but the site and puts the kernel's own areas where the image has them.
fn empty(calls: &mut RemoteCalls, pid: i32, image: &ProcessImage) -> Result<(), RestoreError> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut kernel = Vec::new();
    let mut gaps = Vec::new();
    for line in maps.lines() {
        let Some((start, end, name)) = parse_line(line) else {
            continue;
        };
        match name {
            "[vdso]" => kernel.push((AreaKind::Vdso, start, end)),
            "[vvar]" => kernel.push((AreaKind::Vvar, start, end)),
            "[vvar_vclock]" => kernel.push((AreaKind::VvarVclock, start, end)),
            "[vsyscall]" => {}
            _ if start >= TRAMPOLINE && end <= SCRATCH + PAGE => {}
            _ => gaps.push((start, end)),
        }
    }
    for (start, end) in gaps {
        calls.call("munmap", libc::SYS_munmap, [start, end - start, 0, 0, 0, 0])?;
    }
    // First aside, then to their places: a place may be where another still is.
    let mut aside = SCRATCH + 16 * PAGE;
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    for (_, start, end) in &mut kernel {
        let len = *end - *start;
        calls.call("mremap", libc::SYS_mremap, [*start, len, len, flags, aside, 0])?;
        (*start, *end) = (aside, aside + len);
        aside += len;
    }
    for (kind, start, end) in kernel {
        let len = end - start;
        let wanted = image.areas.iter().find(|a| a.kind == kind);
        match wanted {
            Some(area) if area.len() == len => {
                calls.call(
                    "mremap",
                    libc::SYS_mremap,
                    [start, len, len, flags, area.start, 0],
                )?;
            }
            Some(_) => {
                return Err(RestoreError::Unsuitable(format!(
                    "this node's kernel has a {kind:?} of another size than home's"
                )));
            }
            None => {
                calls.call("munmap", libc::SYS_munmap, [start, len, 0, 0, 0, 0])?;
            }
        }
    }
    Ok(())
}

/// Start, end and name of a line of /proc/PID/maps.
fn parse_line(line: &str) -> Option<(u64, u64, &str)> {
    let mut fields = line.split_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let name = fields.nth(4).unwrap_or_default();
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
        name,
    ))
}

fn map(calls: &mut RemoteCalls, area: &Area, fd_of: &dyn Fn(u64) -> Option<i32>) -> Result<(), RestoreError> {
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
            let fd = fd_of(file_id)
                .ok_or_else(|| RestoreError::Unsuitable(format!("file {file_id} of an area is not here")))?;
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
    calls.call("mmap", libc::SYS_mmap, args)?;
    Ok(())
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
    for area in image.areas.iter().filter(|a| !a.is_kernel()) {
        for (flag, advice) in advices {
            if area.flags.has(flag) {
                // A hint that this kernel lacks changes nothing that the program can see, but for the two about fork.
                let ret = calls.raw(
                    libc::SYS_madvise,
                    [area.start, area.len(), advice as u64, 0, 0, 0],
                )?;
                if ret < 0 && matches!(advice, libc::MADV_DONTFORK | libc::MADV_WIPEONFORK) {
                    return Err(RestoreError::Unsuitable("madvise about fork".into()));
                }
            }
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

/// Dispositions, names, and what a thread has registered with the kernel.
fn identity(
    calls: &mut RemoteCalls,
    memory: &ProcessMemory,
    image: &ProcessImage,
    thread: &ThreadImage,
) -> Result<(), RestoreError> {
    for (index, action) in image.actions.iter().enumerate() {
        let signal = index as u64 + 1;
        if action.handler == 0 && action.flags == 0 || [9, 19].contains(&signal) {
            continue;
        }
        memory.write_forced(
            SCRATCH,
            &words(&[action.handler, action.flags, action.restorer, action.mask]),
        )?;
        calls.call(
            "rt_sigaction",
            libc::SYS_rt_sigaction,
            [signal, SCRATCH, 0, 8, 0, 0],
        )?;
    }
    let mut name = thread.comm.clone();
    name.truncate(15);
    name.push(0);
    memory.write_forced(SCRATCH, &name)?;
    calls.call(
        "prctl(PR_SET_NAME)",
        libc::SYS_prctl,
        [libc::PR_SET_NAME as u64, SCRATCH, 0, 0, 0, 0],
    )?;
    calls.call(
        "personality",
        libc::SYS_personality,
        [u64::from(image.personality), 0, 0, 0, 0, 0],
    )?;
    if thread.clear_child_tid != 0 {
        calls.call(
            "set_tid_address",
            libc::SYS_set_tid_address,
            [thread.clear_child_tid, 0, 0, 0, 0, 0],
        )?;
    }
    let (head, len) = thread.robust_list;
    if head != 0 {
        calls.call(
            "set_robust_list",
            libc::SYS_set_robust_list,
            [head, len, 0, 0, 0, 0],
        )?;
    }
    if thread.altstack.size != 0 {
        let alt = thread.altstack;
        memory.write_forced(SCRATCH, &words(&[alt.sp, u64::from(alt.flags), alt.size]))?;
        calls.call("sigaltstack", libc::SYS_sigaltstack, [SCRATCH, 0, 0, 0, 0, 0])?;
    }
    if let Some(rseq) = thread.rseq {
        let args = [
            rseq.pointer,
            u64::from(rseq.size),
            0,
            u64::from(rseq.signature),
            0,
            0,
        ];
        calls.call("rseq", libc::SYS_rseq, args)?;
    }
    Ok(())
}

/// The limits that the guest's own kernel enforces on its memory.
fn limits(pid: i32, image: &ProcessImage) -> Result<(), RestoreError> {
    for limit in &image.rlimits {
        let of_memory = [libc::RLIMIT_STACK, libc::RLIMIT_AS, libc::RLIMIT_DATA].contains(&limit.resource);
        if of_memory {
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
