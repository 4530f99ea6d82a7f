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

/// Whether the default action of a signal is to stop the process.
pub fn stops(signal: i32) -> bool {
    [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal)
}
