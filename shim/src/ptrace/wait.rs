//! Waiting for tracees.

use std::cell::RefCell;
use std::collections::VecDeque;

use nix::errno::Errno;

use super::{PtraceError, Result, Stopped, raw};

/// Whom to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Any tracee or child of this process.
    Any,
    /// Any tracee or child of the calling OS thread.
    Mine,
    /// This thread (tracee) or child.
    Thread(i32),
}

/// What [`wait`] learnt of a thread.
#[derive(Debug)]
pub enum Status {
    /// It exited (a leader: its whole process did) with this status, 0..=255.
    Exited(i32),
    /// It was killed by a signal.
    Signaled {
        /// the signal
        sig: i32,
        /// whether a core was dumped
        core: bool,
    },
    /// It stopped; the token is the right to look at it and to resume it.
    Stopped(Stopped),
}

/// Why a thread stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Signal-delivery-stop: resume with this signal to deliver it, with 0 to suppress it.
    Signal(i32),
    /// Group-stop by this stopping signal: [`Stopped::listen`] keeps it stopped as job control wants.
    Group(i32),
    /// PTRACE_INTERRUPT, the first stop of a new tracee, or the end of a group-stop.
    Interrupt,
    /// fork(2), with the child's id (also clone with exit signal SIGCHLD). Inside the call.
    Fork(i32),
    /// vfork(2), with the child's id. Inside the call.
    Vfork(i32),
    /// clone(2), with the child's id. Inside the call.
    Clone(i32),
    /// The child of vfork has let go. Inside the call.
    VforkDone(i32),
    /// execve(2) succeeded; the thread that called it had this id before. Inside the call.
    Exec {
        /// thread id before the exec
        former_tid: i32,
    },
    /// The thread is about to end with this wait status (PTRACE_O_TRACEEXIT).
    Exit {
        /// as waitpid(2) would give it
        status: i32,
    },
    /// A filter answered SECCOMP_RET_TRACE with this data. Before the call.
    Seccomp(u16),
    /// Entry to or exit from a system call, after [`Stopped::syscall`].
    Syscall,
}

impl Stop {
    /// Whether the thread is inside a system call whose result would overwrite rax when it is resumed.
    pub fn inside_call(&self) -> bool {
        matches!(
            self,
            Stop::Fork(_)
                | Stop::Vfork(_)
                | Stop::Clone(_)
                | Stop::VforkDone(_)
                | Stop::Exec { .. }
                | Stop::Seccomp(_)
        )
    }
}

thread_local! {
    /// What [`wait_stop`] learnt of threads that it was not waiting for; [`wait`] reports it first.
    static ASIDE: RefCell<VecDeque<(i32, Status)>> = const { RefCell::new(VecDeque::new()) };
}

/// Waits for a tracee or child (waitpid(2) with __WALL). With `nohang` it returns `None` when there is nothing to report. ECHILD
/// (there is nobody to wait for) also gives `None`.
///
/// A stop whose event message cannot be read because the tracee was killed meanwhile is not reported: its death follows.
///
/// What concerns other threads and was seen while [`wait_stop`] waited is kept for this function: so a thread that traces must
/// wait for all of its children here, and not also by other means.
pub fn wait(target: Target, nohang: bool) -> Result<Option<(i32, Status)>> {
    let kept = ASIDE.with_borrow_mut(|aside| {
        let at = match target {
            Target::Any | Target::Mine => 0,
            Target::Thread(tid) => aside.iter().position(|(t, _)| *t == tid)?,
        };
        aside.remove(at)
    });
    match kept {
        Some(kept) => Ok(Some(kept)),
        None => wait_kernel(target, nohang),
    }
}

/// Waits for the next stop of one tracee. When it dies instead, this gives [`PtraceError::Gone`] and its death stays to be
/// reported by [`wait`].
///
/// It waits for all tracees and children of this OS thread and keeps what concerns others for [`wait`]: waiting for one id alone
/// would never end for a thread group leader that was killed together with other tracees of ours in its process, because the
/// kernel reports a leader only after the others were reaped.
pub fn wait_stop(tid: i32) -> Result<Stopped> {
    let gone = PtraceError::Gone { op: "wait", tid };
    let next = ASIDE.with_borrow_mut(|aside| {
        let at = aside.iter().position(|(t, _)| *t == tid)?;
        match aside[at].1 {
            Status::Stopped(_) => aside.remove(at),
            _ => Some((0, Status::Exited(0))),
        }
    });
    match next {
        Some((_, Status::Stopped(stopped))) => return Ok(stopped),
        Some(_) => return Err(gone),
        None => {}
    }
    loop {
        let Some((found, status)) = wait_kernel(Target::Mine, false)? else {
            return Err(gone);
        };
        match status {
            Status::Stopped(stopped) if found == tid => return Ok(stopped),
            status => {
                let dead = found == tid;
                ASIDE.with_borrow_mut(|aside| aside.push_back((found, status)));
                if dead {
                    return Err(gone);
                }
            }
        }
    }
}

fn wait_kernel(target: Target, nohang: bool) -> Result<Option<(i32, Status)>> {
    let (id, mut flags) = match target {
        Target::Any => (-1, libc::__WALL),
        Target::Mine => (-1, libc::__WALL | libc::__WNOTHREAD),
        Target::Thread(tid) => (tid, libc::__WALL),
    };
    if nohang {
        flags |= libc::WNOHANG;
    }
    loop {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the status word during the call.
        let tid = unsafe { libc::waitpid(id, &mut status, flags) };
        match Errno::result(tid) {
            Ok(0) | Err(Errno::ECHILD) => return Ok(None),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(PtraceError::new("waitpid", id, errno)),
            Ok(_) => {}
        }
        match decode(tid, status) {
            Ok(status) => return Ok(Some((tid, status))),
            Err(gone) if gone.is_gone() => continue,
            Err(error) => return Err(error),
        }
    }
}

fn decode(tid: i32, status: i32) -> Result<Status> {
    if libc::WIFEXITED(status) {
        return Ok(Status::Exited(libc::WEXITSTATUS(status)));
    }
    if libc::WIFSIGNALED(status) {
        return Ok(Status::Signaled {
            sig: libc::WTERMSIG(status),
            core: libc::WCOREDUMP(status),
        });
    }
    let sig = libc::WSTOPSIG(status);
    let message = || event_message(tid);
    let stop = match status >> 16 {
        0 if sig == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(sig),
        libc::PTRACE_EVENT_FORK => Stop::Fork(message()? as i32),
        libc::PTRACE_EVENT_VFORK => Stop::Vfork(message()? as i32),
        libc::PTRACE_EVENT_CLONE => Stop::Clone(message()? as i32),
        libc::PTRACE_EVENT_VFORK_DONE => Stop::VforkDone(message()? as i32),
        libc::PTRACE_EVENT_EXEC => Stop::Exec {
            former_tid: message()? as i32,
        },
        libc::PTRACE_EVENT_EXIT => Stop::Exit {
            status: message()? as i32,
        },
        libc::PTRACE_EVENT_SECCOMP => Stop::Seccomp(message()? as u16),
        // The kernel gives the stopping signal while a group-stop is in effect, else SIGTRAP.
        libc::PTRACE_EVENT_STOP if sig != libc::SIGTRAP => Stop::Group(sig),
        _ => Stop::Interrupt,
    };
    Ok(Status::Stopped(Stopped::assume(tid, stop)))
}

/// PTRACE_GETEVENTMSG of a thread that is in an event stop.
fn event_message(tid: i32) -> Result<u64> {
    let mut message = 0u64;
    // SAFETY: the kernel writes one unsigned long to `message`.
    unsafe { raw(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize) }
        .map_err(|e| PtraceError::new("PTRACE_GETEVENTMSG", tid, e))?;
    Ok(message)
}
