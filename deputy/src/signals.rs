//! Signals at home, on their way to guests.

use linklayer::frame::Header;
use linklayer::quic::Link;
use linklayer::wire::{self, Kind};

/// Sends a signal on a lane. A lost contact is noticed elsewhere.
pub fn send(link: &Link, lane: u32, signal: &wire::Signal) {
    let body = wire::encode(signal);
    if let Err(e) = link.send(
        lane,
        Header::new(Kind::Signal as u16, signal.pid, link.next_seq()),
        &[&body],
    ) {
        tracing::debug!(error = %e, "signal not sent");
    }
}

/// Whether a SIGCONT is pending for a single thread of the process: it is blocked there, and no catcher will report it.
pub fn continued_thread(pid: i32) -> bool {
    let bit = 1u64 << (libc::SIGCONT - 1);
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    tasks
        .flatten()
        .any(|task| pending(&task.path(), "SigPnd:") & bit != 0)
}

/// A set of pending signals of a thread, as its status file tells.
pub fn pending(task: &std::path::Path, which: &str) -> u64 {
    let status = std::fs::read_to_string(task.join("status")).unwrap_or_default();
    status
        .lines()
        .find_map(|l| l.strip_prefix(which))
        .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
        .unwrap_or(0)
}

/// Whether the default action of a signal is to stop the process.
pub fn stops(signal: i32) -> bool {
    [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal)
}
