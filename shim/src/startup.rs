//! What the shell handed to this program, recorded before Rust's runtime changes it.
//!
//! Rust's start-up code sets SIGPIPE to be ignored and opens `/dev/null` on closed standard descriptors. A launcher
//! must hand on what it was given, so a function in `.init_array` (run by the C library before `main`) looks first.

use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

static RECORD: AtomicU32 = AtomicU32::new(0);
const RECORDED: u32 = 1 << 31;
const SIGPIPE_IGNORED: u32 = 1 << 8;

extern "C" fn record() {
    let mut bits = RECORDED;
    for fd in 0..3 {
        // SAFETY: F_GETFD on any number is harmless and touches no memory.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            bits |= 1 << fd;
        }
    }
    let mut old = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null new action only reads; `old` is writable and large enough, and zeroed is a valid value of it.
    let ignored = unsafe {
        libc::sigaction(libc::SIGPIPE, std::ptr::null(), old.as_mut_ptr()) == 0
            && old.assume_init().sa_sigaction == libc::SIG_IGN
    };
    if ignored {
        bits |= SIGPIPE_IGNORED;
    }
    RECORD.store(bits, Ordering::Relaxed);
}

#[used]
// SAFETY: the section holds pointers to functions that the C library calls once, single-threaded, before main;
// `record` uses nothing that needs an initialised runtime.
#[unsafe(link_section = ".init_array")]
static INIT: extern "C" fn() = record;

/// Puts back what Rust's start-up changed: the disposition of SIGPIPE, and closed standard descriptors.
/// To be called just before an exec; the caller's own standard streams may be gone afterwards.
pub fn restore_inherited() {
    let bits = RECORD.load(Ordering::Relaxed);
    if bits & RECORDED == 0 {
        return;
    }
    if bits & SIGPIPE_IGNORED == 0 {
        // SAFETY: setting a default disposition installs no code.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    }
    for fd in 0..3 {
        if bits & (1 << fd) != 0 {
            // SAFETY: the descriptor was closed when this program began; Rust opened it on /dev/null and nothing
            // else owns the number.
            unsafe { libc::close(fd) };
        }
    }
}

/// Sets a variable in this process's environment, for the program that it is about to execute.
///
/// # Errors
/// When this process has more than one thread: another could be reading the environment.
pub fn set_variable(name: &str, value: &OsStr) -> io::Result<()> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(io::Error::other(
            "the environment cannot be changed: this process has several threads",
        ));
    }
    // SAFETY: no other thread exists that could read or write the environment meanwhile.
    unsafe { std::env::set_var(name, value) };
    Ok(())
}
