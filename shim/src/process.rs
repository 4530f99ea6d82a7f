//! Starting processes without exec, and what they inherit.

use std::io;
use std::os::fd::RawFd;

use linklayer::image::PAGE;

/// Runs `work` in a grandchild that belongs to nobody: a session of its own, re-parented at once, without controlling
/// terminal. The caller stays what it was (no child to wait for is left behind).
///
/// Only a single-threaded process may do this, so that the copy is whole.
///
/// # Errors
/// When this process has more than one thread, or cannot fork.
pub fn spawn_detached(work: impl FnOnce()) -> io::Result<()> {
    let threads = std::fs::read_dir("/proc/self/task")
        .map(|d| d.count())
        .unwrap_or(1);
    if threads != 1 {
        return Err(io::Error::other("cannot fork: this process has several threads"));
    }
    // SAFETY: the process has one thread, so the child is a complete copy and may run anything.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // SAFETY: as above.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: no pointers.
                unsafe { libc::setsid() };
                prefer_session();
                work();
                std::process::exit(0);
            }
            // SAFETY: ends this process at once without running the parent's exit handlers a second time.
            unsafe { libc::_exit(i32::from(child < 0)) }
        }
        child => {
            let mut status = 0;
            // SAFETY: `status` is a valid place for the status word.
            while unsafe { libc::waitpid(child, &mut status, 0) } < 0 {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
            if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0 {
                Ok(())
            } else {
                Err(io::Error::other("cannot fork a second time"))
            }
        }
    }
}

/// Has the scheduler prefer the session that the calling process leads, as far as it is allowed to (CAP_SYS_NICE).
///
/// A kernel with autogroups (sched(7)) shares processors among sessions, not processes. One that wakes up often for a moment, as those do
/// that serve others, may have to wait for seconds then while processes of other sessions compute (seen with Linux 6.18 on two busy
/// processors).
pub fn prefer_session() {
    /// As a nice value.
    const PREFERENCE: i32 = -10;
    if let Err(e) = std::fs::write("/proc/self/autogroup", PREFERENCE.to_string()) {
        tracing::debug!(error = %e, "session not preferred");
    }
}

/// Closes every descriptor but those in `keep`, and opens the standard ones that are not kept on /dev/null.
///
/// For a process that was forked from a launcher and must not hold what the launched program holds (a pipe's reader
/// waits for the last writer).
///
/// # Errors
/// When /dev/null cannot be opened.
pub fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut sorted: Vec<RawFd> = keep.iter().copied().filter(|fd| *fd >= 0).collect();
    sorted.sort_unstable();
    let mut next = 0;
    for fd in sorted.into_iter().chain([RawFd::MAX]) {
        if fd > next {
            // SAFETY: closes numbers that nothing in this freshly forked process uses any more, as the caller states.
            unsafe { libc::syscall(libc::SYS_close_range, next, fd - 1, 0) };
        }
        next = fd.saturating_add(1);
    }
    for fd in 0..3 {
        // SAFETY: F_GETFD touches no memory.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            // SAFETY: the path is a NUL-terminated literal; the lowest free number is `fd` because all below are open.
            let got = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
            if got != fd {
                return Err(io::Error::other("cannot open /dev/null"));
            }
        }
    }
    Ok(())
}

/// Raises the soft limit of open files to the hard one.
pub fn raise_nofile() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid rlimit for both calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// Lets `tracer` attach to this process where the Yama module would refuse it (prctl(2), PR_SET_PTRACER). Harmless where
/// there is no such module.
pub fn allow_tracer(tracer: i32) {
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, tracer as libc::c_ulong, 0, 0, 0) };
}

/// Sets a resource limit of another process (prlimit(2)).
///
/// # Errors
/// EPERM above the hard limit, ESRCH.
pub fn set_limit(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let new = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: `new` is a valid rlimit64 and the old one is not asked for.
    if unsafe { libc::prlimit64(pid, resource, &new, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A resource limit of another process (prlimit(2)): soft and hard.
///
/// # Errors
/// EPERM, ESRCH.
pub fn limit(pid: i32, resource: u32) -> io::Result<(u64, u64)> {
    let mut old = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `old` is a valid place for the limit and no new one is given.
    if unsafe { libc::prlimit64(pid, resource, std::ptr::null(), &mut old) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((old.rlim_cur, old.rlim_max))
}

/// A number in the status of a thread (proc_pid_status(5)); `name` ends with a colon.
fn status_number(tid: i32, name: &str) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().parse().ok()
}

/// The process of a thread.
pub fn of_thread(tid: i32) -> Option<i32> {
    status_number(tid, "Tgid:")
}

/// Who traces a thread; `None` when nobody does, or it is gone.
pub fn tracer_of(tid: i32) -> Option<i32> {
    status_number(tid, "TracerPid:").filter(|tracer| *tracer != 0)
}

/// What a process has in memory, bytes (proc_pid_statm(5)); 0 when it is gone.
pub fn resident_bytes(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = text.split_whitespace().nth(1).and_then(|f| f.parse::<u64>().ok());
    pages.unwrap_or(0) * PAGE
}

/// A value of a process's auxiliary vector (getauxval(3)).
///
/// # Errors
/// The process is gone, or may not be read.
pub fn auxiliary(pid: i32, key: u64) -> io::Result<Option<u64>> {
    Ok(auxiliary_in(&std::fs::read(format!("/proc/{pid}/auxv"))?, key))
}

fn auxiliary_in(auxv: &[u8], wanted: u64) -> Option<u64> {
    auxv.chunks_exact(16).find_map(|pair| {
        let key = u64::from_ne_bytes(pair[..8].try_into().ok()?);
        let value = u64::from_ne_bytes(pair[8..].try_into().ok()?);
        (key == wanted).then_some(value)
    })
}

/// Whether a thread has ended, also when its process goes on without it (a leader stays as a zombie).
pub fn has_ended(tid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat")).unwrap_or_default();
    let state = stat
        .rfind(')')
        .and_then(|end| stat.as_bytes().get(end + 2).copied());
    matches!(state, None | Some(b'Z' | b'X'))
}

/// Whether a process has ended or is about to, because it was killed: what is found out about it is not to be relied on.
pub fn is_dying(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    let killed = |set: Option<&str>| {
        let set = set.and_then(|v| u64::from_str_radix(v, 16).ok()).unwrap_or(0);
        set >> (libc::SIGKILL - 1) & 1 == 1
    };
    // One that is ending has no memory any more before it is a zombie.
    has_ended(pid) || value("VmSize:").is_none() || killed(value("SigPnd:")) || killed(value("ShdPnd:"))
}

/// Whether two processes have one memory (CLONE_VM; kcmp(2), KCMP_VM). `None` when the kernel does not tell.
pub fn same_memory(one: i32, other: i32) -> Option<bool> {
    const KCMP_VM: i32 = 1;
    // SAFETY: no pointers.
    match unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_VM, 0, 0) } {
        0 => Some(true),
        1..=3 => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_in_an_auxiliary_vector() {
        const AT_ENTRY: u64 = 9;
        let mut auxv = Vec::new();
        for (key, value) in [(6u64, 4096u64), (AT_ENTRY, 0x40_1000), (0, 0)] {
            auxv.extend(key.to_ne_bytes());
            auxv.extend(value.to_ne_bytes());
        }
        assert_eq!(auxiliary_in(&auxv, AT_ENTRY), Some(0x40_1000));
        assert_eq!(auxiliary_in(&auxv[..16], AT_ENTRY), None);
        let own = auxiliary(std::process::id() as i32, AT_ENTRY);
        assert!(own.is_ok_and(|entry| entry.is_some()));
    }

    #[test]
    fn a_process_is_its_own_and_nobody_traces_it() {
        let pid = std::process::id() as i32;
        assert_eq!((of_thread(pid), tracer_of(pid)), (Some(pid), None));
        assert!(resident_bytes(pid) > 0 && !has_ended(pid));
    }
}
