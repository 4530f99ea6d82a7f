//! Anonymous memory that several processes share, made for them by another one.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

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
}
