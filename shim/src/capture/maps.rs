//! The areas of a process as /proc shows them (proc_pid_maps(5), proc_pid_smaps(5)).

use std::io;
use std::ops::Range;

use linklayer::image::{Area, AreaFlags, AreaKind, Prot, RESERVED};

use crate::shared_memory;

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
    /// Protection key (pkeys(7)), when the flags were asked for; 0 is everybody's.
    pub protection_key: u32,
}

/// The anonymous memory that a process maps shared, and the memory that stands for held files: device and inode of each object. None when
/// it is gone.
pub fn shared_objects(pid: i32) -> Vec<(u64, u64)> {
    let lines = map_lines(pid, false).unwrap_or_default();
    let shared = lines
        .iter()
        .filter(|line| line.shares_memory() || held_id(&line.path).is_some());
    shared.map(|line| (line.dev, line.ino)).collect()
}

impl MapLine {
    /// Whether it is anonymous memory that is shared with whoever maps the same inode.
    pub fn shares_memory(&self) -> bool {
        let bare = self.path.strip_suffix(DELETED).unwrap_or(&self.path);
        self.shared && self.ino != 0 && (bare == shared_memory::KERNELS || bare == shared_memory::PATH)
    }

    /// Whether the kernel made it, so that it is no memory of the process.
    pub fn is_kernels(&self) -> bool {
        let names: [&[u8]; 4] = [b"[vdso]", b"[vvar]", b"[vvar_vclock]", b"[vsyscall]"];
        names.contains(&self.path.as_slice())
    }

    /// The flags that a process can set, as an image has them.
    pub fn area_flags(&self) -> AreaFlags {
        let mut flags = if self.shared { AreaFlags::SHARED } else { 0 };
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
            if self.flags.contains(mark) {
                flags |= flag;
            }
        }
        if self.shared && self.flags.contains(b"mw") {
            flags |= AreaFlags::MAY_WRITE;
        }
        AreaFlags(flags)
    }
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
        } else if let Some(key) = line.strip_prefix(b"ProtectionKey:") {
            if let Some(last) = lines.last_mut() {
                let key = std::str::from_utf8(key).unwrap_or_default().trim().parse();
                last.protection_key = key.unwrap_or(0);
            }
        } else if let Some(parsed) = parse_line(line) {
            lines.push(parsed);
        }
    }
    Ok(lines)
}

/// The private memory of a process that is not of a file, in areas as an image has them: what can be told while it runs. None when it
/// is gone.
pub fn private_memory(pid: i32) -> Vec<Area> {
    let lines = map_lines(pid, true).unwrap_or_default();
    let mut end = 0;
    lines
        .iter()
        .filter(|line| line.ino == 0 && !line.shared && !reserved(&line.range) && !line.is_kernels())
        // It changes while it is read: what was seen first counts.
        .filter(|line| {
            let behind = line.range.start >= end;
            end = end.max(line.range.end);
            behind
        })
        .map(|line| Area {
            start: line.range.start,
            end: line.range.end,
            prot: line.prot,
            flags: line.area_flags(),
            kind: AreaKind::Anon,
        })
        .collect()
}

/// The areas of private memory of an image that a process has in more than one piece. The kernel makes what is mapped beside an area
/// that has pages one with either neighbour, and never two of them that have; an mremap(2) of memory that lies in two fails.
pub(crate) fn in_pieces<'a>(lines: &[MapLine], areas: &'a [Area]) -> Vec<&'a Area> {
    let private = |area: &&Area| area.kind == AreaKind::Anon && !area.shared();
    let whole = |area: &Area| {
        let at = lines.partition_point(|line| line.range.end <= area.start);
        (lines.get(at)).is_some_and(|line| line.range.start <= area.start && area.end <= line.range.end)
    };
    areas.iter().filter(private).filter(|area| !whole(area)).collect()
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
        protection_key: 0,
    })
}

pub(super) const DELETED: &[u8] = b" (deleted)";
const OUR_FILES: &[u8] = b"/memfd:mosrun-";

/// The number in the name of a memfd that stands for one of home's files.
pub fn file_id(path: &[u8]) -> Option<u64> {
    let name = path
        .strip_suffix(DELETED)
        .unwrap_or(path)
        .strip_prefix(OUR_FILES)?;
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// How a memfd is named that stands for a held file, followed by its number.
pub const HELD: &str = "mosrun-held-";

/// The number in the name of such a memfd.
pub fn held_id(path: &[u8]) -> Option<u64> {
    let name = path.strip_suffix(DELETED).unwrap_or(path);
    let name = std::str::from_utf8(name).ok()?.strip_prefix("/memfd:")?;
    name.strip_prefix(HELD)?.parse().ok()
}

/// The held files that a process maps. None when it is gone.
pub fn held_by(pid: i32) -> Vec<u64> {
    let lines = map_lines(pid, false).unwrap_or_default();
    lines.iter().filter_map(|line| held_id(&line.path)).collect()
}

/// Whether an area is part of what a deputy or supervisor keeps in a process.
pub fn reserved(range: &Range<u64>) -> bool {
    range.start >= RESERVED.start && range.end <= RESERVED.end
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
        assert_eq!(file_id(b"/memfd:mosrun-held-17 (deleted)"), None);
        assert_eq!(held_id(b"/memfd:mosrun-held-17 (deleted)"), Some(17));
        assert_eq!(held_id(b"/memfd:mosrun-17 (deleted)"), None);
    }
}
