//! Describing a stopped process: its areas, its mm fields, its threads.

mod maps;
mod pages;
mod send;
mod shared;
mod stream;

use std::io;
use std::ops::Range;

use linklayer::image::{
    AltStack, Area, AreaFlags, AreaKind, Clocks, Limit, MmFields, PAGE, ProcessImage, Prot, RESERVED, Regs,
    Rewound, SIGNALS, SigAction, ThreadImage,
};
use linklayer::stay::StayReason;

use crate::memory::ProcessMemory;
use crate::ptrace::{PendingQueue, PtraceError, Stop, Stopped};
use crate::remote_call::{BatchCall, RemoteCallError, RemoteCalls};
use crate::restore::{SCRATCH, TRAMPOLINE};
use crate::vessel::stub;
use crate::xstate;

pub(crate) use maps::in_pieces;
pub use maps::{
    HELD, MapLine, file_id, held_by, held_id, map_lines, private_memory, reserved, shared_objects,
};
pub(crate) use pages::{Found, scan_written};
pub use pages::{page_runs, page_runs_of};
pub use send::{SendError, learn_known, send_pages, send_process};
pub use shared::{SharedObjects, reserves};
pub(crate) use stream::write_memory;
pub use stream::{all_runs, write_pages, write_running};

/// Why a process could not be described. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A call in it failed.
    #[error(transparent)]
    Call(#[from] RemoteCallError),
    /// ptrace failed.
    #[error(transparent)]
    Ptrace(#[from] PtraceError),
    /// /proc could not be read.
    #[error("/proc: {0}")]
    Proc(#[from] io::Error),
    /// It has ended, or is about to.
    #[error("the process has ended")]
    Ended,
    /// It cannot be moved as it is.
    #[error("it {0}")]
    Unsuitable(StayReason),
}

impl CaptureError {
    /// Whether the process is dead.
    pub fn is_gone(&self) -> bool {
        match self {
            CaptureError::Call(error) => error.is_gone(),
            CaptureError::Ptrace(error) => error.is_gone(),
            // Of files in /proc.
            CaptureError::Proc(error) => {
                matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT))
            }
            CaptureError::Ended => true,
            CaptureError::Unsuitable(_) => false,
        }
    }
}

/// An area that maps a file, as `describe` asks for its name.
#[derive(Debug)]
pub struct FileArea<'a> {
    /// First address.
    pub start: u64,
    /// End address.
    pub end: u64,
    /// Device of the file.
    pub dev: u64,
    /// Inode of the file.
    pub ino: u64,
    /// Path, without the " (deleted)" mark.
    pub path: &'a [u8],
}

fn area(
    line: &MapLine,
    tracked: bool,
    name: &mut dyn FnMut(&FileArea<'_>) -> Result<u64, StayReason>,
) -> Result<Area, CaptureError> {
    let kernel = matches!(line.path.as_slice(), b"[vdso]" | b"[vvar]" | b"[vvar_vclock]");
    if line.path == b"anon_inode:[io_uring]" {
        return Err(CaptureError::Unsuitable(StayReason::IoUring));
    }
    if !kernel && (line.flags.contains(b"io") || line.flags.contains(b"pf")) {
        return Err(CaptureError::Unsuitable(StayReason::DeviceMapping));
    }
    let kind = match line.path.as_slice() {
        b"[vdso]" => AreaKind::Vdso,
        b"[vvar]" => AreaKind::Vvar,
        b"[vvar_vclock]" => AreaKind::VvarVclock,
        path if path.strip_suffix(maps::DELETED) == Some(FOREIGN_VDSO) => AreaKind::Vdso,
        // The first segment of System V has inode 0.
        path if line.ino != 0 || line.shared => {
            let bare = path.strip_suffix(maps::DELETED).unwrap_or(path);
            if let Some(file_id) = file_id(path) {
                AreaKind::File {
                    file_id,
                    offset: line.offset,
                }
            } else if let Some(id) = maps::held_id(path) {
                AreaKind::Held {
                    id,
                    offset: line.offset,
                }
            } else if line.shares_memory() || path.starts_with(b"/SYSV") {
                let sysv = path.starts_with(b"/SYSV");
                AreaKind::SharedAnon {
                    id: line.ino,
                    offset: line.offset,
                    sysv,
                }
            } else {
                let file = FileArea {
                    start: line.range.start,
                    end: line.range.end,
                    dev: line.dev,
                    ino: line.ino,
                    path: bare,
                };
                AreaKind::File {
                    file_id: name(&file).map_err(CaptureError::Unsuitable)?,
                    offset: line.offset,
                }
            }
        }
        _ => AreaKind::Anon,
    };
    let foreign: &[&[u8; 2]] = if tracked {
        &[b"um", b"ui"]
    } else {
        &[b"um", b"uw", b"ui"]
    };
    for (marks, reason) in [
        (&[b"ht"][..], StayReason::HugePages),
        (foreign, StayReason::Userfaultfd),
        (&[b"ss"], StayReason::ShadowStack),
        (&[b"gu"], StayReason::GuardRegions),
    ] {
        if marks.iter().any(|mark| line.flags.contains(mark)) {
            return Err(CaptureError::Unsuitable(reason));
        }
    }
    // The kernel itself takes a key for memory that may only be executed.
    if line.protection_key != 0 && line.prot.0 != Prot::EXEC {
        return Err(CaptureError::Unsuitable(StayReason::ProtectionKeys));
    }
    Ok(Area {
        start: line.range.start,
        end: line.range.end,
        prot: line.prot,
        flags: if kernel {
            AreaFlags::default()
        } else {
            line.area_flags()
        },
        kind,
    })
}

/// Start and content of the vDSO that a process has from its kernel.
///
/// # Errors
/// The process is gone, or has no vDSO.
pub(crate) fn vdso_bytes(pid: i32) -> Result<(u64, Vec<u8>), CaptureError> {
    let lines = map_lines(pid, false)?;
    if lines.is_empty() {
        // Its memory has gone already, and it is about to.
        return Err(RemoteCallError::Ended(pid).into());
    }
    let vdso = lines
        .iter()
        .find(|l| l.path == b"[vdso]")
        .ok_or_else(|| CaptureError::Unsuitable(StayReason::Hidden("it has no vDSO".into())))?;
    let mut code = vec![0; (vdso.range.end - vdso.range.start) as usize];
    ProcessMemory::new(pid).read_forced(vdso.range.start, &mut code)?;
    Ok((vdso.range.start, code))
}

/// How the file is named that stands in for the vDSO of another kernel.
const FOREIGN_VDSO: &[u8] = b"/memfd:mosrun-vdso";

/// A `syscall` instruction in a process's vDSO.
///
/// # Errors
/// The process is gone, or has no vDSO.
pub fn vdso_site(pid: i32) -> Result<u64, CaptureError> {
    let (start, code) = vdso_bytes(pid)?;
    code.windows(2)
        .position(|w| w == [0x0f, 0x05])
        .map(|at| start + at as u64)
        .ok_or_else(|| {
            CaptureError::Unsuitable(StayReason::Hidden(
                "its vDSO has no system call instruction".into(),
            ))
        })
}

/// Describes a process all of whose threads are in event stops (`threads`, the leader first). `key` lets calls pass its filter (0: it
/// has none). `name` numbers the files that it maps. Calls are injected for what only the process itself can ask; it is as
/// before afterwards, also after an error.
///
/// # Errors
/// See [`CaptureError`].
pub fn describe(
    pid: i32,
    threads: &mut [Stopped],
    key: u64,
    name: impl FnMut(&FileArea<'_>) -> Result<u64, StayReason>,
) -> Result<ProcessImage, CaptureError> {
    describe_tracked(pid, threads, key, false, name)
}

/// As [`describe`], for a process that a [`Tracker`](crate::track::Tracker) may be watching (`tracked`).
///
/// # Errors
/// See [`CaptureError`].
pub fn describe_tracked(
    pid: i32,
    threads: &mut [Stopped],
    key: u64,
    tracked: bool,
    mut name: impl FnMut(&FileArea<'_>) -> Result<u64, StayReason>,
) -> Result<ProcessImage, CaptureError> {
    // Killed meanwhile: which of its threads that was noticed by is nobody's concern.
    describe_stopped(pid, threads, key, tracked, &mut name).map_err(|e| match e {
        e if e.is_gone() => CaptureError::Ended,
        e => e,
    })
}

fn describe_stopped(
    pid: i32,
    threads: &mut [Stopped],
    key: u64,
    tracked: bool,
    name: &mut dyn FnMut(&FileArea<'_>) -> Result<u64, StayReason>,
) -> Result<ProcessImage, CaptureError> {
    // A leader that has ended shows nothing of the process.
    let by = threads.first().map_or(pid, Stopped::tid);
    let mut areas = Vec::new();
    let mut vdso = Vdso::default();
    for line in map_lines(by, true)? {
        vdso.add(&line);
        let kernel = matches!(line.path.as_slice(), b"[vdso]" | b"[vvar]" | b"[vvar_vclock]");
        if line.path == b"[vsyscall]" || (kernel && reserved(&line.range)) {
            continue;
        }
        if line.range.start < RESERVED.end && RESERVED.start < line.range.end {
            return Err(CaptureError::Unsuitable(StayReason::ReservedAddresses));
        }
        areas.push(area(&line, tracked, name)?);
    }
    let site = vdso_site(by)?;
    let mut asked = Asked::default();
    let mut images = Vec::new();
    let count = threads.len();
    for (index, token) in threads.iter_mut().enumerate() {
        vdso.leave(token)?;
        // On an error the thread is where it was: stopped.
        let own = Stopped::assume(token.tid(), token.stop());
        let mut image = before_calls(&own)?;
        let mut calls = RemoteCalls::begin(own, site)?;
        let mut done = ask(&mut calls, key, index == 0, &mut asked, &mut image);
        if (done.is_err() || index + 1 == count) && !matches!(&done, Err(e) if e.is_gone()) {
            calls.move_to(site);
            let removed = calls.call("munmap", libc::SYS_munmap, [TRAMPOLINE, 2 * PAGE, 0, 0, 0, 0]);
            done = done.and(removed.map(|_| ()).map_err(CaptureError::from));
        }
        *token = calls.end()?;
        done?;
        images.push(image);
    }
    let mut image = ProcessImage {
        pid,
        areas,
        mm: mm_fields(by)?,
        auxv: std::fs::read(format!("/proc/{by}/auxv"))?,
        threads: images,
        actions: asked.actions,
        pending: threads
            .first()
            .map_or(Ok(Vec::new()), |t| t.pending(PendingQueue::Process))?,
        rlimits: limits(by)?,
        personality: personality(by)?,
        dumpable: 1,
        xstate_layout: xstate::layout(),
        vdso: Vec::new(),
    };
    if key == 0 {
        // At home: it goes where another kernel may be.
        image.vdso = vdso_bytes(by)?.1;
    }
    image.mm.brk = asked.brk;
    Ok(image)
}

/// Where code of a vDSO lies in a process.
#[derive(Debug, Default)]
struct Vdso {
    /// This kernel's, where home's is.
    own: Range<u64>,
    /// What leads from home's to this kernel's, and this kernel's behind it.
    led: Vec<Range<u64>>,
}

impl Vdso {
    fn add(&mut self, line: &MapLine) {
        let led = line.path.strip_suffix(maps::DELETED) == Some(FOREIGN_VDSO);
        match line.path == b"[vdso]" {
            true if !reserved(&line.range) => self.own = line.range.clone(),
            vdso if vdso || led => self.led.push(line.range.clone()),
            _ => {}
        }
    }

    /// Steps a thread out of it. Elsewhere it would go on with what it has read of this kernel's data, whose pages are not even
    /// the same ones where there is no time namespace (lib/vdso/gettimeofday.c). No signal is delivered meanwhile.
    fn leave(&self, token: &mut Stopped) -> Result<(), CaptureError> {
        /// The longest function takes some hundred.
        const MOST_STEPS: u32 = 100_000;
        let led = |rip: u64| self.led.iter().any(|range| range.contains(&rip));
        let inside = |rip: u64| self.own.contains(&rip) || led(rip);
        let regs = token.regs()?;
        if !inside(regs.rip) {
            return Ok(());
        }
        let refused = || CaptureError::Unsuitable(StayReason::InVdso);
        let in_call = regs.orig_rax as i64 >= 0;
        if in_call && !led(regs.rip) {
            // Nothing follows such a call but the way back.
            return Ok(());
        }
        if in_call || crate::remote_call::ignores_trap(token.tid()) {
            // Its call would be made again at an address that home has not; or it would not ignore SIGTRAP any more.
            return Err(refused());
        }
        let mask = token.sigmask()?;
        let memory = ProcessMemory::new(token.tid());
        token.set_sigmask(!(1 << (libc::SIGTRAP - 1)))?;
        let mut stopped = false;
        let mut left = false;
        for _ in 0..MOST_STEPS {
            let at = token.regs()?.rip;
            let mut code = [0; 2];
            memory.read_forced(at, &mut code)?;
            let calls = code == [0x0f, 0x05];
            left = !inside(at) || (calls && !led(at));
            if left || calls {
                break;
            }
            // It cannot be blocked.
            stopped |= token.run_on(libc::PTRACE_SINGLESTEP, 0)? == Stop::Signal(libc::SIGSTOP);
        }
        token.set_sigmask(mask)?;
        token.settle()?;
        if stopped {
            let thread = nix::unistd::Pid::from_raw(token.tid());
            nix::sys::signal::kill(thread, nix::sys::signal::Signal::SIGSTOP).map_err(io::Error::from)?;
        }
        if left { Ok(()) } else { Err(refused()) }
    }
}

/// What the leader was asked.
#[derive(Default)]
struct Asked {
    brk: u64,
    actions: Vec<SigAction>,
}

/// What ptrace and /proc tell of a thread.
fn before_calls(token: &Stopped) -> Result<ThreadImage, CaptureError> {
    let tid = token.tid();
    let mut regs = token.regs()?;
    // Segment 0x33 is 64-bit user code (arch/x86/include/asm/segment.h, __USER_CS).
    if regs.cs != 0x33 {
        return Err(CaptureError::Unsuitable(StayReason::NotX86_64));
    }
    let mut rewound = None;
    let code = regs.rax as i64;
    let sigmask = token.sigmask()?;
    if regs.orig_rax as i64 >= 0 && [-512, -513, -514, -516].contains(&code) {
        let masks_more = code == -514 && blocked(tid)? & !sigmask != 0;
        rewound = Some(Rewound {
            nr: regs.orig_rax as u32,
            // A mask of its own (ppoll(2) and its kind) that kept signals off it would not be in effect before it is made again.
            code: if masks_more { -513 } else { code as i32 },
        });
        regs.rax = regs.orig_rax;
        regs.rip -= 2;
    } else if made_again(tid, &regs) {
        rewound = Some(Rewound {
            nr: regs.rax as u32,
            code: -513,
        });
    }
    regs.orig_rax = u64::MAX;
    let comm = std::fs::read(format!("/proc/{tid}/comm"))?;
    Ok(ThreadImage {
        tid,
        comm: comm.strip_suffix(b"\n").unwrap_or(&comm).to_vec(),
        regs,
        xstate: token.xstate()?,
        sigmask,
        altstack: AltStack::default(),
        robust_list: robust_list(tid),
        clear_child_tid: 0,
        rseq: token.rseq()?,
        pending: token.pending(PendingQueue::Thread)?,
        rewound,
        sleep: None,
    })
}

/// Whether the kernel has a thread make its interrupted call again, and it has not come to that yet: it is past the look for signals,
/// or in its own code already, where only a restart_syscall(2) can be told from a call that was not begun. What that restarts
/// is in this kernel.
fn made_again(tid: i32, regs: &Regs) -> bool {
    let restart = regs.rax == libc::SYS_restart_syscall as u64;
    let mut code = [0; 2];
    (restart || (regs.orig_rax as i64 >= 0 && regs.rax == regs.orig_rax))
        && ProcessMemory::new(tid).read_forced(regs.rip, &mut code).is_ok()
        && code == [0x0f, 0x05]
}

/// The signals that a thread blocks at this moment, which may be by the mask of the call that it is in.
fn blocked(tid: i32) -> io::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status"))?;
    let set = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    Ok(set
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .unwrap_or(0))
}

/// Asks a thread what only it can say; the first one also what concerns the whole process, after the place for the calls was made.
fn ask(
    calls: &mut RemoteCalls,
    key: u64,
    first: bool,
    asked: &mut Asked,
    image: &mut ThreadImage,
) -> Result<(), CaptureError> {
    let memory = ProcessMemory::new(calls.tid());
    calls.show(key);
    if first {
        build_site(calls, &memory)?;
        asked.brk = calls.call("brk", libc::SYS_brk, [0; 6])?;
        asked.actions = actions(calls, &memory)?;
    }
    calls.move_to(TRAMPOLINE);
    let tid_address = libc::PR_GET_TID_ADDRESS as u64;
    // A signal stack that never was and one that was disabled read alike. Only the former is "changed" to nothing without
    // an error (kernel/signal.c, do_sigaltstack).
    const NOTHING: u64 = SCRATCH + 64;
    memory
        .write_forced(NOTHING, &[0; 24])
        .map_err(|source| RemoteCallError::Memory {
            tid: calls.tid(),
            source,
        })?;
    let results = calls.batch(&[
        BatchCall {
            what: "sigaltstack",
            nr: libc::SYS_sigaltstack,
            args: [0, SCRATCH, 0, 0, 0, 0],
        },
        BatchCall {
            what: "prctl",
            nr: libc::SYS_prctl,
            args: [tid_address, SCRATCH + 24, 0, 0, 0, 0],
        },
        BatchCall {
            what: "sigaltstack",
            nr: libc::SYS_sigaltstack,
            args: [NOTHING, 0, 0, 0, 0, 0],
        },
    ])?;
    let words = words_at(&memory, 4)?;
    image.altstack = AltStack {
        sp: words[0],
        flags: words[1] as u32 & !(libc::SS_ONSTACK as u32),
        size: words[2],
    };
    if image.altstack.size == 0 && results.last() == Some(&0) {
        image.altstack.flags = 0;
    }
    image.clear_child_tid = match results[..] {
        [0, 0, _] => words[3],
        // A kernel without CONFIG_CHECKPOINT_RESTORE does not tell.
        [0, _, _] => {
            let what = "clear-child-tid addresses".into();
            return Err(CaptureError::Unsuitable(StayReason::Hidden(what)));
        }
        _ => {
            return Err(CaptureError::Unsuitable(StayReason::Hidden(
                "signal stacks".into(),
            )));
        }
    };
    Ok(())
}

/// Maps the stub and the scratch page where no program has anything.
pub(crate) fn build_site(calls: &mut RemoteCalls, memory: &ProcessMemory) -> Result<(), RemoteCallError> {
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u64;
    let rx = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let rw = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let tid = calls.tid();
    calls.call("mmap", libc::SYS_mmap, [TRAMPOLINE, PAGE, rx, flags, u64::MAX, 0])?;
    memory
        .write_forced(TRAMPOLINE, stub::code())
        .map_err(|source| RemoteCallError::Memory { tid, source })?;
    calls.move_to(TRAMPOLINE);
    calls.call("mmap", libc::SYS_mmap, [SCRATCH, PAGE, rw, flags, u64::MAX, 0])?;
    Ok(())
}

fn words_at(memory: &ProcessMemory, count: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    memory.read_forced(SCRATCH, &mut bytes)?;
    let word = |b: &[u8]| b.try_into().map_or(0, u64::from_ne_bytes);
    Ok(bytes.chunks_exact(8).map(word).collect())
}

/// The dispositions of a process in which a site was built: /proc tells which signals are ignored, the process itself is
/// asked about those that it handles.
pub(crate) fn actions(
    calls: &mut RemoteCalls,
    memory: &ProcessMemory,
) -> Result<Vec<SigAction>, CaptureError> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", calls.tid()))?;
    let set = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.and_then(|l| u64::from_str_radix(l.trim(), 16).ok())
            .unwrap_or(0)
    };
    let (ignored, caught) = (set("SigIgn:"), set("SigCgt:"));
    let mut actions: Vec<SigAction> = (0..SIGNALS)
        .map(|i| SigAction {
            handler: ignored >> i & 1,
            ..SigAction::default()
        })
        .collect();
    for (i, action) in actions
        .iter_mut()
        .enumerate()
        .filter(|(i, _)| caught >> i & 1 == 1)
    {
        let args = [i as u64 + 1, 0, SCRATCH, 8, 0, 0];
        calls.call("rt_sigaction", libc::SYS_rt_sigaction, args)?;
        // The kernel's struct sigaction: handler, flags, restorer, mask.
        let words = words_at(memory, 4)?;
        *action = SigAction {
            handler: words[0],
            flags: words[1],
            restorer: words[2],
            mask: words[3],
        };
    }
    Ok(actions)
}

/// get_robust_list(2) of another thread; needs ptrace permission.
fn robust_list(tid: i32) -> (u64, u64) {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: the kernel writes one pointer and one size to the two places.
    let ret = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
    if ret < 0 { (0, 0) } else { (head, len) }
}

/// Fields 26-28 and 45-51 of /proc/PID/stat (proc_pid_stat(5)).
fn mm_fields(pid: i32) -> Result<MmFields, CaptureError> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = text[text.rfind(')').map_or(0, |p| p + 1)..]
        .split_whitespace()
        .collect();
    let field = |n: usize| fields.get(n - 3).and_then(|f| f.parse().ok()).unwrap_or(0);
    Ok(MmFields {
        start_code: field(26),
        end_code: field(27),
        start_stack: field(28),
        start_data: field(45),
        end_data: field(46),
        start_brk: field(47),
        arg_start: field(48),
        arg_end: field(49),
        env_start: field(50),
        env_end: field(51),
        brk: 0,
    })
}

/// The pages with the arguments and the environment of a process.
///
/// # Errors
/// The process is gone.
pub fn argument_pages(pid: i32) -> Result<Range<u64>, CaptureError> {
    let mm = mm_fields(pid)?;
    let start = mm.arg_start.min(mm.env_start) / PAGE * PAGE;
    let end = mm.env_end.max(mm.arg_end).div_ceil(PAGE) * PAGE;
    Ok(start..end.max(start))
}

fn limits(pid: i32) -> Result<Vec<Limit>, CaptureError> {
    (0..16)
        .map(|resource| {
            let (soft, hard) = crate::process::limit(pid, resource)?;
            Ok(Limit { resource, soft, hard })
        })
        .collect()
}

fn personality(pid: i32) -> Result<u32, CaptureError> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/personality"))?;
    Ok(u32::from_str_radix(text.trim(), 16).unwrap_or(0))
}

/// What this process's clocks show now.
pub fn clocks() -> Clocks {
    let read =
        |clock| nix::time::clock_gettime(clock).map_or(0, |t| t.tv_sec() * 1_000_000_000 + t.tv_nsec());
    Clocks {
        monotonic_ns: read(nix::time::ClockId::CLOCK_MONOTONIC),
        boottime_ns: read(nix::time::ClockId::CLOCK_BOOTTIME),
    }
}
