//! Memory of a guest, as the marshalling code sees it: a few bytes at a time, through a trait, so that the whole of
//! it can be tested against a simulated memory in one process.

use std::fmt;
use std::sync::Mutex;

/// Size of a page of guest memory in bytes (x86_64 base pages).
pub const PAGE_SIZE: u64 = 4096;

/// First address that can never be user memory on x86_64 with four-level page tables (`TASK_SIZE_MAX`). Pointers at
/// or above it fail `access_ok()` in every process alike, so they may be handed to the home kernel as they are.
pub const USER_END: u64 = 0x7fff_ffff_f000;

/// Addresses below this are not mapped in any process (`vm.mmap_min_addr` as every distribution sets it).
pub const LOW_END: u64 = 0x1_0000;

/// An address that passes `access_ok()` and is never mapped in a vessel. It stands for a guest pointer that cannot be
/// followed, so that the home kernel itself decides which error the call gives (EBADF comes before EFAULT, and so
/// on). It lies behind the arena in the addresses that no process's own memory may have ([`crate::image::RESERVED`]).
pub const HOLE: u64 = 0x1000_ffff_0000;

/// Bytes from [`HOLE`] that are never mapped.
pub const HOLE_LEN: u64 = 0x1_0000;

const _: () = assert!(
    HOLE >= crate::image::RESERVED.start && HOLE + HOLE_LEN <= crate::image::RESERVED.end,
    "the hole is reserved"
);

/// An access to guest memory that the guest itself could not have made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory at {addr:#x} cannot be accessed")]
pub struct Fault {
    /// The start of the range that was asked for.
    pub addr: u64,
}

/// An address in another process. It can be computed with and printed, and not dereferenced.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RemotePtr(pub u64);

impl RemotePtr {
    /// The null pointer.
    pub const NULL: RemotePtr = RemotePtr(0);

    /// Whether this is the null pointer.
    pub fn is_null(self) -> bool {
        self.0 == 0
    }

    /// The address `bytes` further on, or `None` when it wraps around.
    pub fn checked_add(self, bytes: u64) -> Option<RemotePtr> {
        self.0.checked_add(bytes).map(RemotePtr)
    }
}

impl fmt::Debug for RemotePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for RemotePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Access to the memory of one guest process.
///
/// Implementations honour the guest's page protections: reading a `PROT_NONE` page or writing a read-only page is a
/// [`Fault`]. A failed call may have transferred a part. Nothing here blocks on the guest's own progress.
pub trait GuestMemory {
    /// Fills `buf` from `addr`, wholly or not at all as far as the caller is concerned.
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), Fault>;

    /// Writes `data` to `addr`.
    fn write(&self, addr: u64, data: &[u8]) -> Result<(), Fault>;

    /// Whether each of the `len` bytes from `addr` can be read. True for an empty range.
    fn readable(&self, addr: u64, len: u64) -> bool;

    /// Whether each of the `len` bytes from `addr` can be written. True for an empty range. Used before calls whose
    /// effect could not be undone when the result finds no place.
    fn writable(&self, addr: u64, len: u64) -> bool;

    /// Reads a NUL-terminated string of at most `max` bytes, the NUL included when there is one among them. Without
    /// a NUL in the first `max` bytes exactly `max` bytes are returned. A fault before the NUL is a fault.
    fn read_string(&self, addr: u64, max: usize) -> Result<Vec<u8>, Fault> {
        let mut text = Vec::new();
        let mut at = addr;
        let mut step = 256u64;
        while text.len() < max {
            // Never past the end of a page in one read: the string may end just before an unmapped one.
            let room = (PAGE_SIZE - at % PAGE_SIZE)
                .min(step)
                .min((max - text.len()) as u64) as usize;
            let start = text.len();
            text.resize(start + room, 0);
            self.read(at, &mut text[start..]).map_err(|_| Fault { addr })?;
            if let Some(nul) = text[start..].iter().position(|&b| b == 0) {
                text.truncate(start + nul + 1);
                return Ok(text);
            }
            at = at.checked_add(room as u64).ok_or(Fault { addr })?;
            step = PAGE_SIZE;
        }
        Ok(text)
    }

    /// Reads a little-endian `u32`.
    fn read_u32(&self, addr: u64) -> Result<u32, Fault> {
        let mut word = [0; 4];
        self.read(addr, &mut word)?;
        Ok(u32::from_le_bytes(word))
    }

    /// Reads a little-endian `u64`.
    fn read_u64(&self, addr: u64) -> Result<u64, Fault> {
        let mut word = [0; 8];
        self.read(addr, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }
}

/// A simulated guest memory: areas with a protection each, for tests of everything that takes a [`GuestMemory`].
#[derive(Debug, Default)]
pub struct LocalMemory {
    areas: Mutex<Vec<LocalArea>>,
}

#[derive(Debug)]
struct LocalArea {
    start: u64,
    bytes: Vec<u8>,
    writable: bool,
}

impl LocalMemory {
    /// A memory in which nothing is mapped.
    pub fn new() -> LocalMemory {
        LocalMemory::default()
    }

    /// Maps `bytes` at `start`, readable and, if asked for, writable. Adjacent areas are accessed as one.
    ///
    /// # Panics
    /// If the area overlaps another one or wraps around: a test that does so is wrong.
    pub fn map(&self, start: u64, bytes: Vec<u8>, writable: bool) {
        let mut areas = self.lock();
        let end = start.checked_add(bytes.len() as u64).expect("area wraps around");
        assert!(
            areas
                .iter()
                .all(|a| end <= a.start || a.start + a.bytes.len() as u64 <= start),
            "area overlaps"
        );
        areas.push(LocalArea {
            start,
            bytes,
            writable,
        });
        areas.sort_by_key(|a| a.start);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<LocalArea>> {
        self.areas.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Calls `visit` with each piece of `[addr, addr+len)`, in order, if all of it is mapped (and writable).
    fn walk(
        &self,
        addr: u64,
        len: u64,
        write: bool,
        mut visit: impl FnMut(&mut [u8], std::ops::Range<usize>),
    ) -> Result<(), Fault> {
        let fault = Fault { addr };
        let end = addr.checked_add(len).ok_or(fault)?;
        let mut areas = self.lock();
        // Two passes, so that a faulting access transfers nothing.
        let mut pieces = Vec::new();
        let mut at = addr;
        for (index, area) in areas.iter().enumerate() {
            let area_end = area.start + area.bytes.len() as u64;
            if at >= end || area_end <= at || area.start > at || (write && !area.writable) {
                continue;
            }
            let stop = area_end.min(end);
            pieces.push((
                index,
                (at - area.start) as usize..(stop - area.start) as usize,
                (at - addr) as usize,
            ));
            at = stop;
        }
        if at < end {
            return Err(fault);
        }
        for (index, inside, from) in pieces {
            let len = inside.len();
            visit(&mut areas[index].bytes[inside], from..from + len);
        }
        Ok(())
    }
}

impl GuestMemory for LocalMemory {
    fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), Fault> {
        self.walk(addr, buf.len() as u64, false, |bytes, range| {
            buf[range].copy_from_slice(bytes)
        })
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), Fault> {
        self.walk(addr, data.len() as u64, true, |bytes, range| {
            bytes.copy_from_slice(&data[range])
        })
    }

    fn readable(&self, addr: u64, len: u64) -> bool {
        self.walk(addr, len, false, |_, _| ()).is_ok()
    }

    fn writable(&self, addr: u64, len: u64) -> bool {
        self.walk(addr, len, true, |_, _| ()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_areas_are_one_and_protections_hold() {
        let memory = LocalMemory::new();
        memory.map(0x2000, vec![1; 0x1000], false);
        memory.map(0x1000, vec![2; 0x1000], true);
        let mut both = [0; 4];
        memory.read(0x1ffe, &mut both).unwrap();
        assert_eq!(both, [2, 2, 1, 1]);
        assert_eq!(memory.write(0x1ffe, &[9; 4]), Err(Fault { addr: 0x1ffe }));
        memory.read(0x1ffe, &mut both).unwrap();
        assert_eq!(both, [2, 2, 1, 1], "a faulting write changes nothing");
        assert!(memory.writable(0x1ffe, 2) && !memory.writable(0x1ffe, 3));
        assert!(memory.readable(0x1000, 0x2000) && !memory.readable(0x1000, 0x2001));
        assert!(memory.readable(0x9000, 0));
        assert!(!memory.readable(u64::MAX, 2));
    }

    #[test]
    fn strings_may_end_at_the_last_byte_of_memory() {
        let memory = LocalMemory::new();
        memory.map(0x1ffc, b"abc\0".to_vec(), false);
        memory.map(0x3000, vec![b'x'; 0x1000], false);
        assert_eq!(memory.read_string(0x1ffd, 4096).unwrap(), b"bc\0");
        assert_eq!(memory.read_string(0x3ffc, 4).unwrap(), b"xxxx");
        assert_eq!(memory.read_string(0x3ffc, 5), Err(Fault { addr: 0x3ffc }));
    }
}
