//! Calls that the kernel does not restart, at home.
//!
//! A thread that is stopped by its tracer leaves the call that it waits in. The kernel restarts most calls by itself then; some
//! end with EINTR although no handler has run (signal(7), "Interruption of system calls and library functions by stop
//! signals"), and so do they for a signal that is ignored, which only a traced thread takes notice of. Natively neither would have
//! happened, so they are made to restart as others do, unless a handler runs.
//!
//! Those of them that have a relative timeout would begin it anew; they begin with what is left of it, where the kernel tells when
//! they began (`shim::timed`). A socket's own timeout is not in the call: a process that is to leave is not stopped while one of its threads is
//! in such a call, or, where the kernel does not tell, in any such wait.

use linklayer::image::Regs;
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::time::TimeValLike;
use shim::memory::ProcessMemory;
use shim::ptrace::{Result, Stopped};
use shim::timed;

/// ERESTARTNOHAND: EINTR when a handler runs, made again otherwise (include/linux/errno.h).
const RESTART_UNLESS_HANDLED: i64 = -514;

/// io_pgetevents(2).
const IO_PGETEVENTS: i64 = 333;

/// Whether a call may end with EINTR where no handler runs.
fn ends_early(nr: i64) -> bool {
    match nr {
        libc::SYS_epoll_wait
        | libc::SYS_epoll_pwait
        | libc::SYS_epoll_pwait2
        | libc::SYS_rt_sigtimedwait
        | libc::SYS_semop
        | libc::SYS_semtimedop
        | libc::SYS_io_getevents
        | IO_PGETEVENTS => true,
        // Of sockets with a timeout.
        libc::SYS_read
        | libc::SYS_readv
        | libc::SYS_write
        | libc::SYS_writev
        | libc::SYS_recvfrom
        | libc::SYS_recvmsg
        | libc::SYS_recvmmsg
        | libc::SYS_sendto
        | libc::SYS_sendmsg
        | libc::SYS_sendmmsg
        | libc::SYS_accept
        | libc::SYS_accept4
        | libc::SYS_connect => true,
        _ => false,
    }
}

/// Whether a thread is in a call that would begin its timeout anew if it were made again.
pub fn waits_for_a_time(tid: i32) -> bool {
    let Some((nr, args)) = timed::call_of(tid) else {
        return false;
    };
    match nr as i64 {
        libc::SYS_epoll_wait
        | libc::SYS_epoll_pwait
        | libc::SYS_rt_sigtimedwait
        | libc::SYS_epoll_pwait2
        | libc::SYS_semtimedop => !timed::is_told() && timed::has_limit(nr, &args),
        libc::SYS_io_getevents | IO_PGETEVENTS => args[4] != 0,
        nr if ends_early(nr) && nr != libc::SYS_semop => socket_has_timeout(tid, args[0] as i32),
        _ => false,
    }
}

/// Whether a descriptor is a socket on which calls end after some time (socket(7), SO_RCVTIMEO).
fn socket_has_timeout(tid: i32, fd: i32) -> bool {
    let Ok(socket) = shim::fd::get_from_thread(tid, fd) else {
        return false;
    };
    let receives = getsockopt(&socket, sockopt::ReceiveTimeout);
    let sends = getsockopt(&socket, sockopt::SendTimeout);
    [receives, sends]
        .into_iter()
        .any(|limit| limit.is_ok_and(|limit| limit.num_microseconds() > 0))
}

/// Whether a thread that would make this call again would begin its timeout anew.
pub fn would_begin_anew(regs: &Regs, memory: &ProcessMemory) -> bool {
    let read = |at, bytes: &mut [u8]| memory.read_forced(at, bytes);
    ends_early(regs.rax as i64) && timed::limit_ns(regs.rax, &regs.call_args(), read).is_some()
}

/// Whether a stopped thread was made to restart a call that ends early ([`make_restart`]).
pub fn is_made_to(regs: &Regs) -> bool {
    regs.rax as i64 == RESTART_UNLESS_HANDLED && ends_early(regs.orig_rax as i64)
}

/// Has the call that a stopped thread was taken out of restart like others. Not for a thread that was stopped by job control, which
/// natively ends the call.
///
/// # Errors
/// The thread is gone.
pub fn make_restart(stopped: &mut Stopped) -> Result<()> {
    let mut regs = stopped.regs()?;
    if regs.rax as i64 == -i64::from(libc::EINTR) && ends_early(regs.orig_rax as i64) {
        regs.rax = RESTART_UNLESS_HANDLED as u64;
        stopped.set_regs(&regs)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_wait_for_a_time_are_known() {
        use std::os::fd::AsRawFd;
        use std::os::unix::net::UnixStream;
        let (socket, _other) = UnixStream::pair().unwrap();
        let own = nix::unistd::gettid().as_raw();
        assert!(!socket_has_timeout(own, socket.as_raw_fd()));
        socket
            .set_read_timeout(Some(std::time::Duration::from_secs(5)))
            .unwrap();
        assert!(socket_has_timeout(own, socket.as_raw_fd()));
        // One that runs, and one that waits for ever.
        assert!(!waits_for_a_time(own));
        let (tell, told) = std::sync::mpsc::channel();
        let waiting = std::thread::spawn(move || {
            use std::io::Read;
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = (&socket).read(&mut [0]);
        });
        let tid = told.recv().unwrap();
        while !waits_for_a_time(tid) {
            assert!(!waiting.is_finished());
            std::thread::yield_now();
        }
        drop(_other);
        waiting.join().unwrap();
    }

    #[test]
    fn only_calls_that_wait_without_being_restarted() {
        assert!(ends_early(libc::SYS_epoll_wait) && ends_early(libc::SYS_recvfrom));
        // -1: the thread was not in a call.
        assert!(!ends_early(-1) && !ends_early(libc::SYS_close) && !ends_early(libc::SYS_poll));
    }
}
