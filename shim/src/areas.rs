//! The memory areas of a process as /proc shows them (proc_pid_maps(5), proc_pid_smaps(5)).

use std::fs;
use std::io;

use linklayer::image::{AreaFlags, Prot};

/// One line of /proc/PID/maps, with the flags of smaps if that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedArea {
    /// first address
    pub start: u64,
    /// address after the last
    pub end: u64,
    /// protection
    pub prot: Prot,
    /// `s` in the permissions: MAP_SHARED
    pub shared: bool,
    /// offset in the file, bytes
    pub offset: u64,
    /// device of the file as stat(2) gives it; 0 without a file
    pub dev: u64,
    /// inode number; 0 without a file
    pub ino: u64,
    /// path or [name]; empty for plain anonymous memory. Newlines are escaped as the kernel does it (`\012`).
    pub name: Vec<u8>,
    /// flags (only MAP_SHARED when maps alone was read)
    pub flags: AreaFlags,
    /// VmFlags that have no bit in [`AreaFlags`] but matter: `io`, `pf` (device memory), `ss` (shadow stack)
    pub special: bool,
}

impl MappedArea {
    /// Whether a file (also a deleted one, a memfd, /dev/zero) is behind it.
    pub fn has_file(&self) -> bool {
        self.ino != 0
    }
}

/// Reads /proc/PID/maps.
pub fn maps(pid: i32) -> io::Result<Vec<MappedArea>> {
    parse(&fs::read(format!("/proc/{pid}/maps"))?)
}

/// Reads /proc/PID/smaps, for the flags too. The kernel walks the page tables for it.
pub fn smaps(pid: i32) -> io::Result<Vec<MappedArea>> {
    parse(&fs::read(format!("/proc/{pid}/smaps"))?)
}

fn parse(text: &[u8]) -> io::Result<Vec<MappedArea>> {
    let mut areas: Vec<MappedArea> = Vec::new();
    for line in text.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
        // Area lines begin with a lower-case hexadecimal digit, the others with an upper-case letter.
        if line[0].is_ascii_uppercase() {
            if let (Some(rest), Some(area)) = (line.strip_prefix(b"VmFlags:"), areas.last_mut()) {
                set_flags(area, rest);
            }
            continue;
        }
        let area = parse_line(line).ok_or_else(|| {
            let text = format!("unexpected line in maps: {}", String::from_utf8_lossy(line));
            io::Error::new(io::ErrorKind::InvalidData, text)
        })?;
        areas.push(area);
    }
    Ok(areas)
}

fn parse_line(line: &[u8]) -> Option<MappedArea> {
    let mut rest = line;
    let mut word = || {
        let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        rest = tail.strip_prefix(b" ").unwrap_or(tail);
        std::str::from_utf8(word).ok()
    };
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = word()?.split_once('-')?;
    let perms = word()?.as_bytes();
    let offset = hex(word()?)?;
    let (major, minor) = word()?.split_once(':')?;
    let ino = word()?.parse().ok()?;
    let bit = |at: usize, letter: u8, bit: u8| if perms.get(at) == Some(&letter) { bit } else { 0 };
    let prot = Prot(bit(0, b'r', Prot::READ) | bit(1, b'w', Prot::WRITE) | bit(2, b'x', Prot::EXEC));
    let shared = perms.get(3) == Some(&b's');
    let padding = rest.iter().position(|b| *b != b' ').unwrap_or(rest.len());
    Some(MappedArea {
        start: hex(start)?,
        end: hex(end)?,
        prot,
        shared,
        offset,
        dev: nix::sys::stat::makedev(hex(major)?, hex(minor)?),
        ino,
        name: rest[padding..].to_vec(),
        flags: AreaFlags(if shared { AreaFlags::SHARED } else { 0 }),
        special: false,
    })
}

fn set_flags(area: &mut MappedArea, text: &[u8]) {
    for flag in text.split(|b| *b == b' ') {
        area.flags.0 |= match flag {
            b"gd" => AreaFlags::GROWSDOWN,
            b"nr" => AreaFlags::NORESERVE,
            b"lo" => AreaFlags::LOCKED,
            b"dc" => AreaFlags::DONTFORK,
            b"wf" => AreaFlags::WIPEONFORK,
            b"dd" => AreaFlags::DONTDUMP,
            b"hg" => AreaFlags::HUGEPAGE,
            b"nh" => AreaFlags::NOHUGEPAGE,
            b"mg" => AreaFlags::MERGEABLE,
            b"sr" => AreaFlags::SEQUENTIAL,
            b"rr" => AreaFlags::RANDOM,
            b"sl" => AreaFlags::SEALED,
            b"gu" => AreaFlags::GUARDED,
            b"ht" => AreaFlags::HUGETLB,
            b"um" | b"uw" | b"ui" => AreaFlags::UFFD,
            b"io" | b"pf" | b"ss" => {
                area.special = true;
                0
            }
            _ => 0,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_sort_are_read() {
        let text = b"\
00400000-00401000 r-xp 00001000 fe:00 1234                               /bin/a b (deleted)
Size:                  4 kB
VmFlags: rd ex mr mw me dw
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
VmFlags: rd wr mr mw me gd ac lo sd
7f0000000000-7f0000001000 rw-s 00002000 00:01 99 /memfd:mosrun-5 (deleted)
7f0000001000-7f0000002000 ---p 00000000 00:00 0 ";
        let areas = parse(text).unwrap();
        assert_eq!(areas.len(), 4);
        assert_eq!(areas[0].name, b"/bin/a b (deleted)");
        assert_eq!(
            (areas[0].start, areas[0].end, areas[0].offset, areas[0].ino),
            (0x400000, 0x401000, 0x1000, 1234)
        );
        assert_eq!(areas[0].prot, Prot(Prot::READ | Prot::EXEC));
        assert!(areas[1].flags.has(AreaFlags::GROWSDOWN | AreaFlags::LOCKED) && !areas[1].special);
        assert!(areas[2].shared && areas[2].name.starts_with(b"/memfd:mosrun-5"));
        assert!(areas[3].name.is_empty() && areas[3].prot == Prot(0));
        assert!(parse(b"rubbish").is_err());
    }

    #[test]
    fn the_own_areas_are_read() {
        let own = std::process::id() as i32;
        let areas = smaps(own).unwrap();
        assert!(
            areas
                .iter()
                .any(|a| a.name == b"[stack]" && a.flags.has(AreaFlags::GROWSDOWN))
        );
        assert!(areas.iter().any(|a| a.name == b"[vdso]"));
        assert!(areas.windows(2).all(|w| w[0].end <= w[1].start));
    }
}
