//! Raw calls behind the lab (`mosctl lab`): TAP devices, pidfds, and ending by a given signal.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal};

/// Creates (or attaches to) the TAP device `name` in the calling thread's network namespace.
///
/// Frames are read and written whole, without a packet information header (`IFF_NO_PI`); the device has no offloads, so
/// that every frame read has its checksums and is no longer than the device's MTU. The device lives as long as the
/// descriptor, which is non-blocking and close-on-exec. Needs `CAP_NET_ADMIN`; see the kernel's
/// Documentation/networking/tuntap.rst.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(|b| b == 0) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the path is a NUL-terminated constant, and open(2) takes no other pointer.
    let raw = unsafe {
        libc::open(
            c"/dev/net/tun".as_ptr(),
            libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC,
        )
    };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open(2) just returned this descriptor, and nothing else owns it.
    let device = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives on this stack frame throughout the call.
    if unsafe { libc::ioctl(raw, libc::TUNSETIFF as _, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(device)
}

/// A pidfd of the process `pid` (pidfd_open(2)); it becomes readable when the process ends.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw as i32) })
}

/// Ends this process the way a child that died of `signal` ended, so that our own parent sees the same wait status.
///
/// No core is dumped on top of the child's. Falls back to exit status 128 + `signal` (the shell's convention) if the
/// signal turns out not to be deadly.
pub fn die_of(signal: i32) -> ! {
    if let Ok(known) = Signal::try_from(signal) {
        let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action installs no code of ours. It fails for SIGKILL and SIGSTOP, which have no other.
        let _ = unsafe { nix::sys::signal::sigaction(known, &default) };
        let mut only = SigSet::empty();
        only.add(known);
        let _ = only.thread_unblock();
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), known);
    }
    std::process::exit(128 + signal)
}
