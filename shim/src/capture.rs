//! Describing a stopped process: its areas, its mm fields, its threads.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use linklayer::image::{
    AltStack, Area, AreaFlags, AreaKind, Clocks, Limit, MmFields, PAGE, ProcessImage, Prot, RESERVED,
    Rewound, SigAction, ThreadImage,
};

use crate::memory::ProcessMemory;
use crate::ptrace::{PendingQueue, PtraceError, Stopped};
use crate::remote_call::{RemoteCallError, RemoteCalls};
use crate::restore::{SCRATCH, TRAMPOLINE};

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
    /// It cannot be moved as it is.
    #[error("{0}")]
    Unsuitable(String),
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

/// One line of /proc/PID/maps with the flags of smaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapLine {
    /// The addresses.
    pub range: Range<u64>,
    /// Protection.
    pub prot: Prot,
    /// Mapped shared.
    pub shared: bool,
    /// Offset in the file.
    pub offset: u64,
    /// Device.
    pub dev: u64,
    /// Inode; 0 for anonymous memory.
    pub ino: u64,
    /// Path or name.
    pub path: Vec<u8>,
    /// VmFlags of smaps, when they were asked for.
    pub flags: Vec<[u8; 2]>,
}

/// Reads a process's areas; with the flags of smaps, which costs a walk of its page tables.
///
/// # Errors
/// The process is gone.
pub fn map_lines(pid: i32, with_flags: bool) -> io::Result<Vec<MapLine>> {
    let text = std::fs::read(format!(
        "/proc/{pid}/{}",
        if with_flags { "smaps" } else { "maps" }
    ))?;
    let mut lines: Vec<MapLine> = Vec::new();
    for line in text.split(|b| *b == b'\n') {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            if let Some(last) = lines.last_mut() {
                last.flags = flags
                    .split(|b| *b == b' ')
                    .filter_map(|f| <[u8; 2]>::try_from(f).ok())
                    .collect();
            }
        } else if let Some(parsed) = parse_line(line) {
            lines.push(parsed);
        }
    }
    Ok(lines)
}

fn parse_line(line: &[u8]) -> Option<MapLine> {
    // address perms offset dev inode path; a name of smaps ("Size:") has no dash in its first field.
    let mut rest = line;
    let mut next = || {
        let start = rest.iter().position(|b| *b != b' ')?;
        let end = rest[start..]
            .iter()
            .position(|b| *b == b' ')
            .map_or(rest.len(), |e| start + e);
        let field = std::str::from_utf8(&rest[start..end]).ok()?;
        rest = &rest[end..];
        Some(field)
    };
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let (start, end) = next()?.split_once('-')?;
    let perms = next()?.as_bytes();
    let offset = next()?;
    let (major, minor) = next()?.split_once(':')?;
    let ino = next()?;
    let mut prot = 0;
    for (byte, mark, bit) in [
        (0, b'r', Prot::READ),
        (1, b'w', Prot::WRITE),
        (2, b'x', Prot::EXEC),
    ] {
        if *perms.get(byte)? == mark {
            prot |= bit;
        }
    }
    let path = rest
        .iter()
        .position(|b| *b != b' ')
        .map(|p| rest[p..].to_vec())
        .unwrap_or_default();
    Some(MapLine {
        range: hex(start)?..hex(end)?,
        prot: Prot(prot),
        shared: *perms.get(3)? == b's',
        offset: hex(offset)?,
        dev: libc::makedev(hex(major)? as u32, hex(minor)? as u32),
        ino: ino.parse().ok()?,
        path,
        flags: Vec::new(),
    })
}

const DELETED: &[u8] = b" (deleted)";
const OUR_FILES: &[u8] = b"/memfd:mosrun-";

/// The number in the name of a memfd that stands for one of home's files.
pub fn file_id(path: &[u8]) -> Option<u64> {
    let name = path
        .strip_suffix(DELETED)
        .unwrap_or(path)
        .strip_prefix(OUR_FILES)?;
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// Whether an area is part of what a deputy or supervisor keeps in a process.
pub fn reserved(range: &Range<u64>) -> bool {
    range.start >= RESERVED.start && range.end <= RESERVED.end
}

fn area(
    line: &MapLine,
    name: &mut dyn FnMut(&FileArea<'_>) -> Result<u64, String>,
) -> Result<Area, CaptureError> {
    let kind = match line.path.as_slice() {
        b"[vdso]" => AreaKind::Vdso,
        b"[vvar]" => AreaKind::Vvar,
        b"[vvar_vclock]" => AreaKind::VvarVclock,
        path if line.ino != 0 => {
            let bare = path.strip_suffix(DELETED).unwrap_or(path);
            if let Some(file_id) = file_id(path) {
                AreaKind::File {
                    file_id,
                    offset: line.offset,
                }
            } else if line.shared && bare == b"/dev/zero" || path.starts_with(b"/SYSV") {
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
    let mut flags = if line.shared { AreaFlags::SHARED } else { 0 };
    for (mark, flag) in [
        (b"gd", AreaFlags::GROWSDOWN),
        (b"nr", AreaFlags::NORESERVE),
        (b"lo", AreaFlags::LOCKED),
        (b"dc", AreaFlags::DONTFORK),
        (b"wf", AreaFlags::WIPEONFORK),
        (b"dd", AreaFlags::DONTDUMP),
        (b"hg", AreaFlags::HUGEPAGE),
        (b"nh", AreaFlags::NOHUGEPAGE),
        (b"mg", AreaFlags::MERGEABLE),
    ] {
        let special = matches!(kind, AreaKind::Vdso | AreaKind::Vvar | AreaKind::VvarVclock);
        if line.flags.contains(mark) && !special {
            flags |= flag;
        }
    }
    if line.flags.contains(b"ht") {
        return Err(CaptureError::Unsuitable("it uses hugetlbfs pages".into()));
    }
    Ok(Area {
        start: line.range.start,
        end: line.range.end,
        prot: line.prot,
        flags: AreaFlags(flags),
        kind,
    })
}

/// A `syscall` instruction in a process's vDSO.
///
/// # Errors
/// The process is gone, or has no vDSO.
pub fn vdso_site(pid: i32) -> Result<u64, CaptureError> {
    let lines = map_lines(pid, false)?;
    let vdso = lines
        .iter()
        .find(|l| l.path == b"[vdso]")
        .ok_or_else(|| CaptureError::Unsuitable("it has no vDSO".into()))?;
    let mut code = vec![0; (vdso.range.end - vdso.range.start) as usize];
    ProcessMemory::new(pid).read_forced(vdso.range.start, &mut code)?;
    code.windows(2)
        .position(|w| w == [0x0f, 0x05])
        .map(|at| vdso.range.start + at as u64)
        .ok_or_else(|| CaptureError::Unsuitable("its vDSO has no system call instruction".into()))
}

/// Describes a process all of whose threads are stopped (`threads`, the leader first). `key` lets calls pass its filter (0: it
/// has none). `name` numbers the files that it
/// maps. Calls are injected for what only the process itself can ask; it is as before afterwards.
///
/// # Errors
/// See [`CaptureError`].
pub fn describe(
    pid: i32,
    threads: &mut Vec<Stopped>,
    key: u64,
    mut name: impl FnMut(&FileArea<'_>) -> Result<u64, String>,
) -> Result<ProcessImage, CaptureError> {
    let mut areas = Vec::new();
    for line in map_lines(pid, true)? {
        if line.path == b"[vsyscall]" || reserved(&line.range) {
            continue;
        }
        areas.push(area(&line, &mut name)?);
    }
    let site = vdso_site(pid)?;
    let mut images = Vec::new();
    let mut brk = 0;
    let count = threads.len();
    for index in 0..count {
        let token = threads.remove(index);
        let turn = Turn {
            first: index == 0,
            last: index + 1 == count,
        };
        let (token, described) = thread(pid, token, site, turn, key)?;
        threads.insert(index, token);
        let (image, end) = described?;
        if turn.first {
            brk = end;
        }
        images.push(image);
    }
    let mut image = ProcessImage {
        pid,
        areas,
        mm: mm_fields(pid)?,
        auxv: std::fs::read(format!("/proc/{pid}/auxv"))?,
        threads: images,
        actions: dispositions(pid)?,
        pending: threads
            .first()
            .map_or(Ok(Vec::new()), |t| t.pending(PendingQueue::Process))?,
        rlimits: limits(pid)?,
        personality: personality(pid)?,
        dumpable: 1,
        clocks: clocks(),
    };
    image.mm.brk = brk;
    Ok(image)
}

/// What only a thread itself can say, and the process's end of heap.
#[derive(Default)]
struct Asked {
    altstack: AltStack,
    clear_child_tid: u64,
    brk: u64,
}

/// Where a thread is among those of its process.
#[derive(Clone, Copy)]
struct Turn {
    first: bool,
    last: bool,
}

/// Has a thread answer; the first brings the site for it, the last takes it away.
fn ask(
    calls: &mut RemoteCalls,
    memory: &ProcessMemory,
    site: u64,
    turn: Turn,
) -> Result<Asked, CaptureError> {
    let mut asked = Asked::default();
    if turn.first {
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as u64;
        let (rx, rw) = (
            (libc::PROT_READ | libc::PROT_EXEC) as u64,
            (libc::PROT_READ | libc::PROT_WRITE) as u64,
        );
        calls.call("mmap", libc::SYS_mmap, [TRAMPOLINE, PAGE, rx, flags, u64::MAX, 0])?;
        calls.call("mmap", libc::SYS_mmap, [SCRATCH, PAGE, rw, flags, u64::MAX, 0])?;
        memory.write_forced(TRAMPOLINE, &[0x0f, 0x05])?;
    }
    calls.move_to(TRAMPOLINE);
    if turn.first {
        asked.brk = calls.call("brk", libc::SYS_brk, [0; 6])?;
    }
    calls.call("sigaltstack", libc::SYS_sigaltstack, [0, SCRATCH, 0, 0, 0, 0])?;
    let mut bytes = [0; 24];
    memory.read_forced(SCRATCH, &mut bytes)?;
    let word = |i: usize| {
        let mut w = [0; 8];
        w.copy_from_slice(&bytes[i * 8..i * 8 + 8]);
        u64::from_ne_bytes(w)
    };
    asked.altstack = AltStack {
        sp: word(0),
        flags: word(1) as u32 & !(libc::SS_ONSTACK as u32),
        size: word(2),
    };
    let got = calls.raw(
        libc::SYS_prctl,
        [libc::PR_GET_TID_ADDRESS as u64, SCRATCH, 0, 0, 0, 0],
    )?;
    if got == 0 {
        memory.read_forced(SCRATCH, &mut bytes[..8])?;
        let mut address = [0; 8];
        address.copy_from_slice(&bytes[..8]);
        asked.clear_child_tid = u64::from_ne_bytes(address);
    }
    if turn.last {
        calls.move_to(site);
        calls.call("munmap", libc::SYS_munmap, [TRAMPOLINE, 2 * PAGE, 0, 0, 0, 0])?;
    }
    Ok(asked)
}

/// Describes one thread; its token comes back with whatever became of it.
fn thread(
    pid: i32,
    token: Stopped,
    site: u64,
    turn: Turn,
    key: u64,
) -> Result<(Stopped, Result<(ThreadImage, u64), CaptureError>), CaptureError> {
    let tid = token.tid();
    let mut regs = token.regs()?;
    let mut rewound = None;
    let code = regs.rax as i64;
    if regs.orig_rax as i64 >= 0 && [-512, -513, -514, -516].contains(&code) {
        rewound = Some(Rewound {
            nr: regs.orig_rax as u32,
            code: code as i32,
        });
        regs.rax = regs.orig_rax;
        regs.rip -= 2;
    }
    regs.orig_rax = u64::MAX;
    let xstate = token.xstate()?;
    let sigmask = token.sigmask()?;
    let rseq = token.rseq()?;
    let pending = token.pending(PendingQueue::Thread)?;
    let mut calls = RemoteCalls::begin(token, site)?;
    calls.show(key);
    let asked = ask(&mut calls, &ProcessMemory::new(pid), site, turn);
    let token = calls.end()?;
    let image = asked.and_then(|asked| {
        let comm = std::fs::read(format!("/proc/{pid}/task/{tid}/comm"))?;
        let image = ThreadImage {
            tid,
            comm: comm.strip_suffix(b"\n").unwrap_or(&comm).to_vec(),
            regs,
            xstate,
            sigmask,
            altstack: asked.altstack,
            robust_list: robust_list(tid),
            clear_child_tid: asked.clear_child_tid,
            rseq,
            pending,
            rewound,
        };
        Ok((image, asked.brk))
    });
    Ok((token, image))
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

/// What /proc tells of the dispositions: which signals are ignored. Handlers are not among it; a process that has some is
/// described by who knows them.
///
/// # Errors
/// The process is gone.
pub fn dispositions(pid: i32) -> Result<Vec<SigAction>, CaptureError> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let set = |name: &str| {
        status
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .and_then(|l| u64::from_str_radix(l.trim(), 16).ok())
            .unwrap_or(0)
    };
    let ignored = set("SigIgn:");
    Ok((0..64)
        .map(|i| SigAction {
            handler: ignored >> i & 1,
            ..SigAction::default()
        })
        .collect())
}

/// Whether the process has signal handlers.
pub fn has_handlers(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|l| l.strip_prefix("SigCgt:"))
        .is_some_and(|l| u64::from_str_radix(l.trim(), 16) != Ok(0))
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

fn clocks() -> Clocks {
    let read =
        |clock| nix::time::clock_gettime(clock).map_or(0, |t| t.tv_sec() * 1_000_000_000 + t.tv_nsec());
    Clocks {
        monotonic_ns: read(nix::time::ClockId::CLOCK_MONOTONIC),
        boottime_ns: read(nix::time::ClockId::CLOCK_BOOTTIME),
    }
}

/// struct pm_scan_arg of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// struct page_region of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// The ranges of an area whose pages are not as fresh memory or the mapped file would have them.
///
/// # Errors
/// The process is gone.
pub fn page_runs(pid: i32, area: &Area) -> io::Result<Vec<Range<u64>>> {
    if area.shared() && matches!(area.kind, AreaKind::File { .. }) {
        return Ok(Vec::new());
    }
    let map = File::open(format!("/proc/{pid}/pagemap"))?;
    let private_file = matches!(area.kind, AreaKind::File { .. });
    match scan(&map, area, private_file) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            read_map(&map, area, private_file)
        }
        other => other,
    }
}

fn scan(map: &File, area: &Area, private_file: bool) -> io::Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut regions = vec![PageRegion::default(); 512];
    let excluded = PAGE_IS_PFNZERO | if private_file { PAGE_IS_FILE } else { 0 };
    let mut at = area.start;
    while at < area.end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: at,
            end: area.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: excluded,
            category_mask: excluded,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT,
            ..ScanArg::default()
        };
        // SAFETY: `arg` is the structure the request takes, and `vec` names `vec_len` regions that live through the call.
        let got = unsafe { libc::ioctl(map.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        for region in &regions[..got as usize] {
            match runs.last_mut() {
                Some(last) if last.end == region.start => last.end = region.end,
                _ => runs.push(region.start..region.end),
            }
        }
        if arg.walk_end <= at {
            break;
        }
        at = arg.walk_end;
    }
    Ok(runs)
}

/// The same from /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst), for kernels before 6.7.
fn read_map(map: &File, area: &Area, private_file: bool) -> io::Result<Vec<Range<u64>>> {
    const AT_ONCE: u64 = 8192;
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut at = area.start;
    while at < area.end {
        let pages = AT_ONCE.min((area.end - at) / PAGE);
        let mut bytes = vec![0; pages as usize * 8];
        map.read_exact_at(&mut bytes, at / PAGE * 8)?;
        for (i, entry) in bytes.chunks_exact(8).enumerate() {
            let mut word = [0; 8];
            word.copy_from_slice(entry);
            let entry = u64::from_ne_bytes(word);
            let there = entry >> 62 != 0;
            let file = entry >> 61 & 1 == 1;
            if there && !(private_file && file) {
                let start = at + i as u64 * PAGE;
                match runs.last_mut() {
                    Some(last) if last.end == start => last.end += PAGE,
                    _ => runs.push(start..start + PAGE),
                }
            }
        }
        at += pages * PAGE;
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps_are_parsed() {
        let line = parse_line(b"7f00-8f00 r-xp 00001000 08:02 173521      /usr/bin/a b (deleted)");
        let Some(line) = line else { panic!("not parsed") };
        assert_eq!(line.range, 0x7f00..0x8f00);
        assert_eq!(
            (line.prot.0, line.shared, line.offset, line.ino),
            (5, false, 0x1000, 173_521)
        );
        assert_eq!(line.path, b"/usr/bin/a b (deleted)");
        assert!(parse_line(b"Size:                  4 kB").is_none());
        assert_eq!(file_id(b"/memfd:mosrun-17 (deleted)"), Some(17));
        assert_eq!(file_id(b"/memfd:other"), None);
    }
}
