//! The listener of a seccomp filter: system calls of guests, waiting for an answer (seccomp_unotify(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use parking_lot::Mutex;
use thiserror::Error;

/// A system call that a guest made and that waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notification {
    /// Names this call until it is answered; never used again for another.
    pub id: u64,
    /// The thread that made it, as the receiver's pid namespace numbers it (0: not visible there).
    pub tid: i32,
    /// Number of the call.
    pub nr: i32,
    /// AUDIT_ARCH_* of the call.
    pub arch: u32,
    /// Address after the `syscall` instruction.
    pub instruction_pointer: u64,
    /// The six argument registers.
    pub args: [u64; 6],
}

/// What [`Listener::recv`] brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A call.
    Call(Notification),
    /// The wake descriptor became readable (it is not read from), or the time was up.
    Woken,
    /// No process has the filter any more; nothing will ever come.
    Ended,
}

/// Why an answer was not delivered.
#[derive(Debug, Error)]
pub enum NotifyError {
    /// The call does not wait any more: its thread was killed, or (before it was received, or without
    /// `WAIT_KILLABLE_RECV`) a signal took it out.
    #[error("the call is gone")]
    Gone,
    /// The kernel refused for another reason. Nothing was delivered.
    #[error("{op} on a seccomp listener: {source}")]
    Os {
        /// the request
        op: &'static str,
        /// the kernel's error
        source: io::Error,
    },
}

impl NotifyError {
    fn last(op: &'static str) -> NotifyError {
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            Some(libc::ENOENT) => NotifyError::Gone,
            _ => NotifyError::Os { op, source },
        }
    }

    /// Whether the call does not wait any more.
    pub fn is_gone(&self) -> bool {
        matches!(self, NotifyError::Gone)
    }
}

/// A listener. All methods may be called from any thread; one thread at a time is inside [`Listener::recv`], others queue.
///
/// When the last copy of the descriptor is closed while guests live, their calls fail with ENOSYS and they *run on*: keep the
/// listener until its guests are dead, and have them traced with `PTRACE_O_EXITKILL`.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    receiving: Mutex<()>,
}

impl Listener {
    /// Takes a listener's descriptor, as seccomp(2) with `SECCOMP_FILTER_FLAG_NEW_LISTENER` returned it.
    pub fn new(fd: OwnedFd) -> Listener {
        Listener {
            fd,
            receiving: Mutex::new(()),
        }
    }

    /// Waits for a call, at most `timeout_ms` (negative: for ever), or until `wake` becomes readable.
    ///
    /// # Errors
    /// What poll(2) and the kernel give; EINTR and calls that vanished meanwhile are passed over.
    pub fn recv(&self, wake: Option<BorrowedFd<'_>>, timeout_ms: i32) -> Result<Received, NotifyError> {
        // With two receivers one poll would let both into a request that only one of them gets out of.
        let _one = self.receiving.lock();
        let request_waits = wake.is_none() && timeout_ms < 0 && requests_end();
        loop {
            if request_waits {
                match self.take() {
                    Ok(call) => return Ok(Received::Call(call)),
                    Err(NotifyError::Os { source, .. }) if source.kind() == io::ErrorKind::Interrupted => {
                        continue;
                    }
                    // The call vanished, or the last process with the filter did: poll tells which.
                    Err(NotifyError::Gone) => {}
                    Err(other) => return Err(other),
                }
            }
            let mut fds = [
                libc::pollfd {
                    fd: self.fd.as_raw_fd(),
                    events: libc::POLLIN,
                    revents: 0,
                },
                libc::pollfd {
                    fd: wake.map_or(-1, |fd| fd.as_raw_fd()),
                    events: libc::POLLIN,
                    revents: 0,
                },
            ];
            // SAFETY: `fds` is an array of two pollfd.
            let ready =
                unsafe { libc::poll(fds.as_mut_ptr(), 2, if request_waits { 0 } else { timeout_ms }) };
            if ready < 0 {
                let source = io::Error::last_os_error();
                if source.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(NotifyError::Os { op: "poll", source });
            }
            if request_waits && fds[0].revents & (libc::POLLHUP | libc::POLLERR) == 0 {
                continue;
            }
            if ready == 0 || fds[1].revents != 0 {
                return Ok(Received::Woken);
            }
            if fds[0].revents & libc::POLLIN != 0 {
                match self.take() {
                    Ok(call) => return Ok(Received::Call(call)),
                    // It vanished between the poll and the request.
                    Err(NotifyError::Gone) => continue,
                    Err(NotifyError::Os { source, .. }) if source.kind() == io::ErrorKind::Interrupted => {
                        continue;
                    }
                    Err(other) => return Err(other),
                }
            }
            if fds[0].revents != 0 {
                return Ok(Received::Ended);
            }
        }
    }

    fn take(&self) -> Result<Notification, NotifyError> {
        // The kernel insists on zeroes.
        let mut notif = Notif::default();
        // SAFETY: `notif` is the structure that this request fills in.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), NOTIF_RECV, &raw mut notif) } < 0 {
            return Err(NotifyError::last("SECCOMP_IOCTL_NOTIF_RECV"));
        }
        Ok(Notification {
            id: notif.id,
            tid: notif.pid as i32,
            nr: notif.nr,
            arch: notif.arch,
            instruction_pointer: notif.instruction_pointer,
            args: notif.args,
        })
    }

    /// Whether the call still waits. To be asked after its thread's memory was opened or read by number and before what was
    /// read is believed: the thread may have died and its number been given to another.
    pub fn id_valid(&self, id: u64) -> bool {
        // SAFETY: the request reads one u64.
        unsafe { libc::ioctl(self.fd.as_raw_fd(), NOTIF_ID_VALID, &raw const id) == 0 }
    }

    fn send(&self, resp: NotifResp) -> Result<(), NotifyError> {
        // SAFETY: `resp` is the structure that this request reads.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), NOTIF_SEND, &raw const resp) } < 0 {
            return Err(NotifyError::last("SECCOMP_IOCTL_NOTIF_SEND"));
        }
        Ok(())
    }

    /// Lets the call return `value`. Values in -4095..=-1 are what a failed call leaves in rax, restart codes included
    /// (-512..=-516: only for a thread that has an interrupt or a signal to stop for, or user code sees the code itself).
    ///
    /// # Errors
    /// [`NotifyError::Gone`]; EINPROGRESS: it was answered already.
    pub fn send_result(&self, id: u64, value: i64) -> Result<(), NotifyError> {
        // The kernel takes an error apart from a value, and puts either into rax.
        let (val, error) = match value {
            -4095..=-1 => (0, value as i32),
            _ => (value, 0),
        };
        self.send(NotifResp {
            id,
            val,
            error,
            flags: 0,
        })
    }

    /// Lets the call go on here, in this node's kernel, as if it had not been intercepted.
    ///
    /// The guest's other threads can change what its pointers point to, after it was looked at: only for calls that are
    /// harmless whatever their memory says.
    ///
    /// # Errors
    /// As [`Listener::send_result`].
    pub fn send_continue(&self, id: u64) -> Result<(), NotifyError> {
        self.send(NotifResp {
            id,
            val: 0,
            error: 0,
            flags: FLAG_CONTINUE,
        })
    }

    /// Installs a duplicate of `fd` in the guest as number `number`, replacing what is there, or as the lowest free number.
    /// Returns the number. The call goes on waiting.
    ///
    /// # Errors
    /// [`NotifyError::Gone`]; EBADF or EMFILE when the number is beyond the guest's RLIMIT_NOFILE.
    pub fn add_fd(
        &self,
        id: u64,
        fd: BorrowedFd<'_>,
        number: Option<u32>,
        cloexec: bool,
    ) -> Result<u32, NotifyError> {
        let request = NotifAddFd {
            id,
            flags: if number.is_some() { ADDFD_SETFD } else { 0 },
            srcfd: fd.as_raw_fd() as u32,
            newfd: number.unwrap_or(0),
            newfd_flags: if cloexec { libc::O_CLOEXEC as u32 } else { 0 },
        };
        loop {
            // SAFETY: `request` is the structure that this request reads.
            let got = unsafe { libc::ioctl(self.fd.as_raw_fd(), NOTIF_ADDFD, &raw const request) };
            if got >= 0 {
                return Ok(got as u32);
            }
            match NotifyError::last("SECCOMP_IOCTL_NOTIF_ADDFD") {
                NotifyError::Os { source, .. } if source.kind() == io::ErrorKind::Interrupted => continue,
                other => return Err(other),
            }
        }
    }

    /// Tells the kernel that receiver and guest hand over to each other, so that it wakes either on the other's processor
    /// (SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP, Linux 6.6). Returns whether this kernel can.
    pub fn prefer_same_cpu(&self) -> bool {
        const SYNC_WAKE_UP: libc::c_ulong = 1;
        // SAFETY: the request's argument is a number.
        unsafe { libc::ioctl(self.fd.as_raw_fd(), NOTIF_SET_FLAGS, SYNC_WAKE_UP) == 0 }
    }
}

/// Whether SECCOMP_IOCTL_NOTIF_RECV itself, which waits as poll does, ends when no process has the filter any more: so
/// since Linux 6.11. Before that it would wait for ever.
fn requests_end() -> bool {
    static THEY_DO: OnceLock<bool> = OnceLock::new();
    *THEY_DO.get_or_init(|| since_6_11(&crate::probe::kernel_release()))
}

fn since_6_11(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|n| n.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(11))
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

// linux/seccomp.h: magic '!', numbers 0 to 4.
const NOTIF_RECV: libc::c_ulong = 0xc050_2100;
const NOTIF_SEND: libc::c_ulong = 0xc018_2101;
const NOTIF_ID_VALID: libc::c_ulong = 0x4008_2102;
const NOTIF_ADDFD: libc::c_ulong = 0x4018_2103;
const NOTIF_SET_FLAGS: libc::c_ulong = 0x4008_2104;
const FLAG_CONTINUE: u32 = 1;
const ADDFD_SETFD: u32 = 1;

/// struct seccomp_notif.
#[repr(C)]
#[derive(Default)]
struct Notif {
    id: u64,
    pid: u32,
    flags: u32,
    nr: i32,
    arch: u32,
    instruction_pointer: u64,
    args: [u64; 6],
}

/// struct seccomp_notif_resp.
#[repr(C)]
struct NotifResp {
    id: u64,
    val: i64,
    error: i32,
    flags: u32,
}

/// struct seccomp_notif_addfd.
#[repr(C)]
struct NotifAddFd {
    id: u64,
    flags: u32,
    srcfd: u32,
    newfd: u32,
    newfd_flags: u32,
}

const _: () = assert!(size_of::<Notif>() == 0x50);
const _: () = assert!(size_of::<NotifResp>() == 0x18);
const _: () = assert!(size_of::<NotifAddFd>() == 0x18);

#[cfg(test)]
mod tests {
    use super::since_6_11;

    #[test]
    fn releases_are_compared_as_numbers() {
        for (release, since) in [
            ("6.1.0-37-amd64", false),
            ("6.10.14", false),
            ("6.11.0", true),
            ("6.18.44-fc-v445", true),
            ("7.0-rc1", true),
            ("5.19.2", false),
            ("", false),
        ] {
            assert_eq!(since_6_11(release), since, "{release}");
        }
    }
}
