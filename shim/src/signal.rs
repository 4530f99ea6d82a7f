//! Sending a signal with its siginfo to one thread or to a process (rt_sigqueueinfo(2), rt_tgsigqueueinfo(2)).

use std::io;

use linklayer::image::SigInfo;

use crate::capture::{CaptureError, vdso_site};
use crate::memory::ProcessMemory;
use crate::ptrace::Stopped;
use crate::remote_call::RemoteCalls;

/// Queues a signal for a process. The kernel refuses codes of its own (>= 0) with EPERM.
pub fn queue_process(pid: i32, signal: i32, info: &SigInfo) -> io::Result<()> {
    // SAFETY: the kernel reads 128 bytes at the pointer, which SigInfo has.
    let r = unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info.0.as_ptr()) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Has a stopped process that has just executed a program queue signals for itself, with whatever siginfo: the kernel accepts its own
/// codes from nobody else.
///
/// # Errors
/// It is gone, or has no vDSO.
pub fn queue_by_itself(stopped: &mut Stopped, infos: &[SigInfo]) -> Result<(), CaptureError> {
    /// Nothing is below a new program's stack pointer yet.
    const BELOW_STACK: u64 = 4096;
    let pid = stopped.tid();
    let site = vdso_site(pid)?;
    let memory = ProcessMemory::new(pid);
    let mut calls = RemoteCalls::begin(Stopped::assume(pid, stopped.stop()), site)?;
    let at = (calls.stopped().regs()?.rsp - BELOW_STACK) & !15;
    let made = infos.iter().try_for_each(|info| {
        memory.write_forced(at, &info.0)?;
        // A full queue and a signal that is pending already are no errors natively either.
        let args = [pid as u64, info.signo() as u64, at, 0, 0, 0];
        calls.raw(libc::SYS_rt_sigqueueinfo, args)?;
        Ok(())
    });
    let clean = memory.write_forced(at, &[0; size_of::<SigInfo>()]);
    *stopped = calls.end()?;
    clean?;
    made
}

/// Whether a signal that a worker has taken, which blocks all but those for its thread and a terminal's, is for that thread alone: from a
/// timer (SIGEV_THREAD_ID) or from tgkill(2).
pub fn is_for_one_thread(info: &SigInfo) -> bool {
    [libc::SI_TIMER, libc::SI_TKILL].contains(&info.code())
}

/// Queues a signal for one thread.
pub fn queue_thread(pid: i32, tid: i32, signal: i32, info: &SigInfo) -> io::Result<()> {
    // SAFETY: the kernel reads 128 bytes at the pointer, which SigInfo has.
    let r = unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, info.0.as_ptr()) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A siginfo as sigqueue(3) makes it, with an integer value.
pub fn queued_info(signal: i32, value: u64) -> SigInfo {
    let mut info = SigInfo::user(signal, libc::SI_QUEUE, 0, 0);
    info.0[24..32].copy_from_slice(&value.to_ne_bytes());
    info
}

/// si_value of a siginfo that has one.
pub fn info_value(info: &SigInfo) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&info.0[24..32]);
    u64::from_ne_bytes(bytes)
}

/// A siginfo from wire bytes; what is missing is zero, what is too much is cut.
pub fn info_from_bytes(bytes: &[u8]) -> SigInfo {
    let mut info = SigInfo::default();
    let n = bytes.len().min(info.0.len());
    info.0[..n].copy_from_slice(&bytes[..n]);
    info
}

/// tgkill(2).
pub fn kill_thread(pid: i32, tid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    let r = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Kills the process that a pidfd names, whatever has its number by now (pidfd_send_signal(2)).
///
/// # Errors
/// ESRCH: it has ended.
pub fn kill_by(process: &impl std::os::fd::AsFd) -> io::Result<()> {
    let fd = std::os::fd::AsRawFd::as_raw_fd(&process.as_fd());
    // SAFETY: no pointers but a null one.
    let r = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd,
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// kill(2).
pub fn kill_process(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    let r = unsafe { libc::kill(pid, signal) };
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
