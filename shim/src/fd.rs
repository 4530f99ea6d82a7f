//! Descriptors of other processes, and leases.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A descriptor of a process (pidfd_open(2)); readable when it has ended.
///
/// # Errors
/// ESRCH: no such process.
pub fn of_process(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if pidfd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd as i32) })
}

/// A duplicate of descriptor `fd` of process `pid` (pidfd_open(2), pidfd_getfd(2)); needs ptrace permission.
///
/// # Errors
/// ESRCH: no such process; EBADF: no such descriptor there; EPERM.
pub fn get_from(pid: i32, fd: i32) -> io::Result<OwnedFd> {
    take(&of_process(pid)?, fd)
}

fn take(pidfd: &OwnedFd, fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(got as i32) })
}

/// The same of a thread, whose process may go on without its leader and whose descriptors may be its own.
///
/// # Errors
/// As [`get_from`]. Before Linux 6.9 a thread can only be reached by its leader.
pub fn get_from_thread(tid: i32, fd: i32) -> io::Result<OwnedFd> {
    // PIDFD_THREAD of linux/pidfd.h.
    const PIDFD_THREAD: i32 = libc::O_EXCL;
    // SAFETY: no pointers.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, tid, PIDFD_THREAD) };
    if pidfd < 0 {
        let leader = crate::process::of_thread(tid).unwrap_or(tid);
        return get_from(leader, fd);
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    take(&unsafe { OwnedFd::from_raw_fd(pidfd as i32) }, fd)
}

/// Takes and gives back a read lease on a file (fcntl(2) F_SETLEASE), which tells whether anybody has it open for
/// writing.
///
/// # Errors
/// EAGAIN: somebody has; EACCES: it is another user's file; EINVAL: the file system has no leases.
pub fn try_read_lease(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: F_SETLEASE takes an integer.
    if unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) };
    Ok(())
}
