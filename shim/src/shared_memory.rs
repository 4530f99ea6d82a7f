//! Anonymous memory that several processes share, made for them by another one.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::fs::File;
use std::hash::Hash;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use linklayer::image::PAGE;
use parking_lot::Mutex;

/// Name of the memfds that stand for it where the real thing cannot be had.
const NAME: &str = "mosrun-shared";
/// How an area that maps one of these is shown.
pub(crate) const PATH: &[u8] = b"/memfd:mosrun-shared";
/// How the kernel shows memory that was mapped with MAP_SHARED | MAP_ANONYMOUS.
pub(crate) const KERNELS: &[u8] = b"/dev/zero";

/// Memory of `size` bytes that whoever opens the file (by /proc/PID/fd) maps shared. With the right to open mapped memory
/// (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN in the first user namespace; proc_pid_map_files(5)) it is what the kernel makes for
/// MAP_SHARED | MAP_ANONYMOUS; without, a memfd, which differs in the name that /proc/PID/maps shows.
///
/// # Errors
/// Out of memory, address space or descriptors.
pub fn create(size: u64, reserved: bool) -> io::Result<File> {
    match anonymous(size, reserved) {
        Ok(file) => Ok(file),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOENT)) => memfd(size),
        Err(e) => Err(e),
    }
}

/// The same as a memfd in any case.
///
/// # Errors
/// Out of memory or descriptors.
pub fn memfd(size: u64) -> io::Result<File> {
    let fd: OwnedFd = nix::sys::memfd::memfd_create(NAME, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let size = i64::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    nix::unistd::ftruncate(&fd, size)?;
    Ok(fd.into())
}

fn anonymous(size: u64, reserved: bool) -> io::Result<File> {
    let len = usize::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let mut flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    if !reserved {
        flags |= libc::MAP_NORESERVE;
    }
    // SAFETY: a new mapping at an address of the kernel's choice, which nobody accesses.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = base as usize;
    let end = start + len.div_ceil(4096) * 4096;
    let opened = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/self/map_files/{start:x}-{end:x}"));
    // SAFETY: the range was mapped above and nothing refers to it.
    unsafe { libc::munmap(base, len) };
    opened
}

/// Anonymous memory of processes that move and share it, by some name. It lives until the last of them has what it needs.
#[derive(Debug)]
pub struct Objects<K> {
    known: Mutex<HashMap<K, Object>>,
}

#[derive(Debug)]
struct Object {
    file: Arc<File>,
    size: u64,
    /// Processes that were announced with it.
    users: HashSet<i32>,
}

impl<K> Default for Objects<K> {
    fn default() -> Objects<K> {
        Objects {
            known: Mutex::default(),
        }
    }
}

impl<K: Eq + Hash + Copy + Debug> Objects<K> {
    /// Makes what a process names and nobody has named before it; see [`create`].
    ///
    /// # Errors
    /// It is known with another size, or cannot be made.
    pub fn announce(&self, name: K, pid: i32, size: u64, reserved: bool) -> io::Result<()> {
        let mut known = self.known.lock();
        if let Some(object) = known.get_mut(&name) {
            if object.size != size {
                return Err(io::Error::other("shared memory of two sizes"));
            }
            object.users.insert(pid);
            return Ok(());
        }
        // Memory of which nothing can be accessed has to be mapped, too.
        let least = size.max(PAGE);
        let file = create(least, reserved)?;
        if least != size {
            file.set_len(size)?;
        }
        let object = Object {
            file: Arc::new(file),
            size,
            users: HashSet::from([pid]),
        };
        known.insert(name, object);
        Ok(())
    }

    /// The file of one that was announced.
    pub fn file(&self, name: K) -> Option<Arc<File>> {
        Some(self.known.lock().get(&name)?.file.clone())
    }

    /// Writes pages of one that was announced.
    ///
    /// # Errors
    /// It was not, or does not reach so far: the peer breaks the protocol.
    pub fn write(&self, name: K, offset: u64, data: &[u8]) -> Result<(), String> {
        let known = self.known.lock();
        let object = known
            .get(&name)
            .ok_or_else(|| format!("pages of shared memory {name:?}, which was not announced"))?;
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > object.size) {
            return Err(format!("pages behind the end of shared memory {name:?}"));
        }
        let file = object.file.clone();
        drop(known);
        file.write_all_at(data, offset)
            .map_err(|e| format!("shared memory {name:?} at {offset:#x}: {e}"))
    }

    /// A process has mapped what it names, or does not come.
    pub fn forget(&self, pid: i32) {
        self.known.lock().retain(|_, object| {
            object.users.remove(&pid);
            !object.users.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_hold_what_is_written_and_end_where_they_end() {
        for file in [create(3 * 4096, true), memfd(3 * 4096)] {
            let Ok(file) = file else { panic!("not made") };
            assert!(file.write_all_at(b"shared", 2 * 4096).is_ok());
            let mut back = [0; 6];
            assert!(file.read_exact_at(&mut back, 2 * 4096).is_ok());
            assert_eq!(&back, b"shared");
            assert_eq!(file.metadata().map(|m| m.len()).ok(), Some(3 * 4096));
        }
    }

    #[test]
    fn shared_memory_is_made_once_and_lives_as_long_as_somebody_comes_with_it() {
        let objects = Objects::default();
        assert!(objects.announce(7, 100, 8192, true).is_ok());
        assert!(objects.announce(7, 101, 8192, true).is_ok());
        assert!(objects.announce(7, 102, 4096, true).is_err());
        assert!(objects.announce(8, 102, 0, true).is_ok());
        assert!(objects.write(8, 0, &[1]).is_err());
        assert!(objects.write(7, 4096, &[1; 4096]).is_ok());
        assert!(objects.write(7, 4097, &[1; 4096]).is_err());
        assert!(objects.write(7, u64::MAX, &[1; 4096]).is_err());
        assert!(objects.write(9, 0, &[1]).is_err());
        objects.forget(100);
        assert!(objects.file(7).is_some());
        objects.forget(101);
        assert!(objects.file(7).is_none());
    }
}
