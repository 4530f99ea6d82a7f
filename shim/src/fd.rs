//! Descriptors of other processes, and leases.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

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

/// struct f_owner_ex of fcntl.h.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Owner {
    kind: i32,
    pid: i32,
}

/// A write lease on a file (fcntl(2) F_SETLEASE): while it is held, its open file description is the only one, and who opens or truncates the
/// file by its name waits until it is given back, or for the time of /proc/sys/fs/lease-break-time. This process is told by SIGIO that
/// somebody waits.
#[derive(Debug)]
pub struct WriteLease {
    file: Arc<File>,
    /// Whom the description sent its signals before, and which.
    before: (Owner, i32),
}

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_OWNER_PID: i32 = 1;

impl WriteLease {
    /// Takes one.
    ///
    /// # Errors
    /// EAGAIN: there is another open file description of the file, or a mapping by one; EACCES: it is another user's file; EINVAL: the file
    /// system has no leases.
    pub fn take(file: Arc<File>) -> io::Result<WriteLease> {
        let fd = file.as_raw_fd();
        let mut owner = Owner { kind: 0, pid: 0 };
        // SAFETY: the kernel writes one struct f_owner_ex to the pointer.
        if unsafe { libc::fcntl(fd, F_GETOWN_EX, &raw mut owner) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: F_GETSIG takes nothing.
        let signal = unsafe { libc::fcntl(fd, F_GETSIG) };
        let lease = WriteLease {
            file,
            before: (owner, signal),
        };
        // From here on dropping it puts back what was there.
        lease.signals(
            Owner {
                kind: F_OWNER_PID,
                pid: std::process::id() as i32,
            },
            0,
        )?;
        // SAFETY: F_SETLEASE takes an integer.
        if unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(lease)
    }

    /// Whether somebody waits for it, or the kernel has taken it away.
    pub fn is_asked_for(&self) -> bool {
        // SAFETY: F_GETLEASE takes nothing.
        unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_GETLEASE) != libc::F_WRLCK }
    }

    fn signals(&self, owner: Owner, signal: i32) -> io::Result<()> {
        let fd = self.file.as_raw_fd();
        // SAFETY: the kernel reads one struct f_owner_ex at the pointer; F_SETSIG takes an integer.
        let failed = unsafe {
            libc::fcntl(fd, F_SETOWN_EX, &raw const owner) < 0 || libc::fcntl(fd, F_SETSIG, signal) < 0
        };
        if failed {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

impl Drop for WriteLease {
    fn drop(&mut self) {
        // SAFETY: F_SETLEASE takes an integer.
        unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
        let (owner, signal) = self.before;
        // Whoever it was may be gone.
        let _ = self.signals(owner, signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    /// What the home half rests on when it lets a file be mapped writable elsewhere.
    #[test]
    fn a_write_lease_is_granted_only_when_nobody_else_has_the_file() {
        // SAFETY: the disposition is that of this process, which runs this test alone or others that do not mind.
        unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leased");
        std::fs::write(&path, [1; 5000]).unwrap();
        let file = Arc::new(open(&path));
        let refused = || {
            let error = WriteLease::take(file.clone()).map(drop).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
        };
        let reader = File::open(&path).unwrap();
        refused();
        // SAFETY: a new mapping that only this test knows; it is removed below.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ,
                libc::MAP_SHARED,
                reader.as_raw_fd(),
                0,
            )
        };
        assert_ne!(mapped, libc::MAP_FAILED);
        drop(reader);
        refused();
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(mapped, 4096) };
        let lease = WriteLease::take(file.clone()).unwrap();
        assert!(!lease.is_asked_for());
        let (say, said) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            let opened = open(&path);
            let _ = say.send(());
            opened
        });
        while !lease.is_asked_for() {
            std::thread::yield_now();
        }
        assert!(said.try_recv().is_err());
        drop(lease);
        assert!(said.recv().is_ok());
        assert!(other.join().is_ok());
    }
}
