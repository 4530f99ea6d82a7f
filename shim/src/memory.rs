//! Memory of another process, under the protections that it has itself.
//!
//! The bulk of the work is process_vm_readv(2) and process_vm_writev(2). Where they differ from what the process could do
//! itself, the difference is made good here: they do not grow a stack (the kernel does it for the process, and a large
//! buffer on the stack is often handed to a system call before it was ever touched), and they cannot answer whether
//! memory is writable without writing.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

use linklayer::memory::{Fault, GuestMemory};

use crate::postcopy::Pager;

const PAGE: u64 = 4096;

/// Memory of the process `pid`, which this process may trace (ptrace(2), "Ptrace access mode checking").
///
/// The descriptors it opens belong to the memory that the process has at first use: after an execve(2) of that process, or
/// its death, make a new one. The accesses themselves go by pid; the owner drops this when it reaps the process.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: AtomicI32,
    mem: OnceLock<Option<File>>,
    maps: OnceLock<Option<File>>,
    pager: OnceLock<Arc<Pager>>,
}

/// An area of memory as [`ProcessMemory::area_at`] finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedArea {
    /// first address
    pub start: u64,
    /// address after the last
    pub end: u64,
    /// PROT_READ
    pub readable: bool,
    /// PROT_WRITE
    pub writable: bool,
    /// whether a file backs it, so that its end may lie beyond the end of the file
    pub file_backed: bool,
}

impl ProcessMemory {
    /// The memory of a process or thread. Nothing is opened yet.
    pub fn new(pid: i32) -> ProcessMemory {
        ProcessMemory {
            pid: AtomicI32::new(pid),
            mem: OnceLock::new(),
            maps: OnceLock::new(),
            pager: OnceLock::new(),
        }
    }

    /// Pages of it are still coming: what is accessed is waited for.
    pub fn comes_by(&self, pager: Arc<Pager>) {
        // One process is built once.
        let _ = self.pager.set(pager);
    }

    /// Who brings the pages that are still coming.
    pub fn pager(&self) -> Option<&Arc<Pager>> {
        self.pager.get().filter(|pager| pager.is_open())
    }

    fn await_pages(&self, addr: u64, len: usize) {
        if let Some(pager) = self.pager.get() {
            pager.ensure(addr, len as u64);
        }
    }

    /// The process or thread by which it is reached.
    pub fn pid(&self) -> i32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// Reaches it by another thread: one that has ended has no memory any more, the process's first one included.
    pub fn set_pid(&self, tid: i32) {
        self.pid.store(tid, Ordering::Relaxed);
    }

    /// Reads without regard to protections (/proc/PID/mem, as a debugger does): also from PROT_NONE areas.
    ///
    /// # Errors
    /// EIO: not mapped; 0-filled nowhere: all of `buf` or an error. ENOENT, EACCES when the file cannot be opened.
    pub fn read_forced(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.await_pages(addr, buf.len());
        self.mem()?.read_exact_at(buf, addr)
    }

    /// Writes without regard to protections: also to read-only private areas, which are copied.
    ///
    /// # Errors
    /// As [`ProcessMemory::read_forced`]; a part may have been written.
    pub fn write_forced(&self, addr: u64, data: &[u8]) -> io::Result<()> {
        self.await_pages(addr, data.len());
        self.mem()?.write_all_at(data, addr)
    }

    /// The area that covers `addr`, or the next one above it.
    pub fn area_at(&self, addr: u64) -> Option<MappedArea> {
        match self.query(addr) {
            Some(answer) => answer,
            None => self.scan(addr),
        }
    }

    /// Whether the kernel answers for single areas, so that no text has to be read.
    pub fn can_query(&self) -> bool {
        self.query(0).is_some()
    }

    fn mem(&self) -> io::Result<&File> {
        self.mem
            .get_or_init(|| {
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(format!("/proc/{}/mem", self.pid()))
                    .ok()
            })
            .as_ref()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EACCES))
    }

    /// PROCMAP_QUERY (Linux 6.11); `None` when there is no answer to be had from it.
    fn query(&self, addr: u64) -> Option<Option<MappedArea>> {
        let maps = self
            .maps
            .get_or_init(|| File::open(format!("/proc/{}/maps", self.pid())).ok())
            .as_ref()?;
        let mut query = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: PROCMAP_COVERING_OR_NEXT,
            query_addr: addr,
            ..ProcmapQuery::default()
        };
        // SAFETY: `query` is the structure that this request reads and writes, of the size it announces.
        if unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) } < 0 {
            return match io::Error::last_os_error().raw_os_error() {
                Some(libc::ENOENT) => Some(None),
                _ => None,
            };
        }
        Some(Some(MappedArea {
            start: query.vma_start,
            end: query.vma_end,
            readable: query.vma_flags & PROCMAP_READABLE != 0,
            writable: query.vma_flags & PROCMAP_WRITABLE != 0,
            file_backed: query.inode != 0,
        }))
    }

    /// The same from the text of /proc/PID/maps, for older kernels.
    fn scan(&self, addr: u64) -> Option<MappedArea> {
        let mut text = String::new();
        File::open(format!("/proc/{}/maps", self.pid()))
            .and_then(|mut file| file.read_to_string(&mut text))
            .ok()?;
        text.lines()
            .filter_map(parse_maps_line)
            .find(|area| area.end > addr)
    }

    /// Lets the kernel grow a stack to `addr` if one may grow so far, as it would for the process's own access.
    /// (The path of /proc/PID/mem does it; that of process_vm_readv(2) does not since Linux 6.5.)
    fn grow(&self, addr: u64) -> bool {
        let mut byte = [0];
        self.read_forced(addr, &mut byte).is_ok()
    }

    /// One transfer of at most `len` bytes; how many were transferred.
    fn transfer(&self, way: Way, local: *mut u8, addr: u64, len: usize) -> io::Result<usize> {
        self.await_pages(addr, len);
        let mine = libc::iovec {
            iov_base: local.cast(),
            iov_len: len,
        };
        let theirs = libc::iovec {
            iov_base: addr as usize as *mut libc::c_void,
            iov_len: len,
        };
        // SAFETY: `mine` names `len` bytes of the caller's buffer, which is only read from for `Way::Write`; `theirs` is
        // interpreted in the other process's address space.
        let moved = unsafe {
            match way {
                Way::Read => libc::process_vm_readv(self.pid(), &mine, 1, &theirs, 1, 0),
                Way::Write => libc::process_vm_writev(self.pid(), &mine, 1, &theirs, 1, 0),
            }
        };
        if moved < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(moved as usize)
        }
    }

    fn transfer_all(&self, way: Way, local: *mut u8, addr: u64, len: usize) -> Result<(), Fault> {
        let fault = Fault { addr };
        addr.checked_add(len as u64).ok_or(fault)?;
        let mut done = 0;
        let mut grown = false;
        while done < len {
            let at = addr + done as u64;
            let rest = len - done;
            let result = self.transfer(way, local.wrapping_add(done), at, rest);
            match result {
                Ok(0) => return Err(fault),
                Ok(moved) => {
                    done += moved;
                    grown = false;
                }
                Err(e) => match e.raw_os_error() {
                    Some(libc::EFAULT) if !grown && self.grow(at) => grown = true,
                    // Kernels without CONFIG_CROSS_MEMORY_ATTACH.
                    Some(libc::ENOSYS) => return self.by_file(way, local.wrapping_add(done), at, rest),
                    _ => return Err(fault),
                },
            }
        }
        Ok(())
    }

    /// A transfer through /proc/PID/mem, which knows no protections: they are checked first.
    fn by_file(&self, way: Way, local: *mut u8, addr: u64, len: usize) -> Result<(), Fault> {
        let fault = Fault { addr };
        let allowed = |area: &MappedArea| match way {
            Way::Read => area.readable,
            Way::Write => area.writable,
        };
        if !self.covered(addr, len as u64, allowed) {
            return Err(fault);
        }
        // SAFETY: the callers own `len` bytes from `local` during the call, writable for `Way::Read`, and nobody else
        // accesses them.
        let result = unsafe {
            match way {
                Way::Read => self.read_forced(addr, std::slice::from_raw_parts_mut(local, len)),
                Way::Write => self.write_forced(addr, std::slice::from_raw_parts(local, len)),
            }
        };
        result.map_err(|_| fault)
    }

    /// Whether areas that `allowed` accepts cover the range without a hole.
    fn covered(&self, addr: u64, len: u64, allowed: impl Fn(&MappedArea) -> bool) -> bool {
        let Some(end) = addr.checked_add(len) else {
            return false;
        };
        let mut at = addr;
        while at < end {
            let mut found = self.area_at(at);
            if found.is_none_or(|area| area.start > at) && self.grow(at) {
                found = self.area_at(at);
            }
            let Some(area) = found.filter(|area| area.start <= at && allowed(area)) else {
                return false;
            };
            let stop = area.end.min(end);
            // What lies beyond the end of a file is a suffix of the area: its last byte tells.
            if area.file_backed && area.readable && !self.touch(stop - 1) {
                return false;
            }
            at = stop;
        }
        true
    }

    /// Whether one byte can be read.
    fn touch(&self, addr: u64) -> bool {
        let mut byte = [0u8];
        match self.transfer(Way::Read, byte.as_mut_ptr(), addr, 1) {
            Ok(moved) => moved == 1,
            Err(e) => e.raw_os_error() == Some(libc::ENOSYS) && self.read_forced(addr, &mut byte).is_ok(),
        }
    }
}

impl GuestMemory for ProcessMemory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), Fault> {
        self.transfer_all(Way::Read, buf.as_mut_ptr(), addr, buf.len())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), Fault> {
        self.transfer_all(Way::Write, data.as_ptr().cast_mut(), addr, data.len())
    }

    fn readable(&self, addr: u64, len: u64) -> bool {
        // One byte needs no look at the areas.
        if len <= PAGE - addr % PAGE {
            return len == 0 || self.touch(addr) || self.covered(addr, len, |area| area.readable);
        }
        self.covered(addr, len, |area| area.readable)
    }

    fn writable(&self, addr: u64, len: u64) -> bool {
        self.covered(addr, len, |area| area.writable)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

const PROCMAP_QUERY: libc::c_ulong = 0xc068_6611;
const PROCMAP_READABLE: u64 = 1;
const PROCMAP_WRITABLE: u64 = 2;
const PROCMAP_COVERING_OR_NEXT: u64 = 0x10;

/// struct procmap_query (linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// `start-end perms offset dev inode ...` (proc_pid_maps(5)).
fn parse_maps_line(line: &str) -> Option<MappedArea> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let perms = fields.next()?.as_bytes();
    let inode = fields.nth(2)?;
    Some(MappedArea {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        readable: perms.first() == Some(&b'r'),
        writable: perms.get(1) == Some(&b'w'),
        file_backed: inode != "0",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps() {
        let area =
            parse_maps_line("7ffff7fc1000-7ffff7fc3000 r-xp 00001000 fe:00 1234  /usr/lib/ld.so").unwrap();
        assert_eq!(
            area,
            MappedArea {
                start: 0x7fff_f7fc_1000,
                end: 0x7fff_f7fc_3000,
                readable: true,
                writable: false,
                file_backed: true
            }
        );
        assert!(
            !parse_maps_line("1000-2000 ---p 00000000 00:00 0 ")
                .unwrap()
                .readable
        );
        assert_eq!(parse_maps_line("garbage"), None);
    }
}
