//! The carrier between two ends of a job: a [`Link`].
//!
//! A link carries [frames](crate::frame) on numbered lanes between two processes that know each other by the
//! [fingerprints](Fingerprint) of one-time keys. Every frame is delivered exactly once and in the order of its lane, or
//! the link is lost: a broken connection is made anew and the [session](crate::session) goes on.
//!
//! QUIC is driven by hand, without a runtime, over a blocking UDP socket: the thread that calls writes its frame, sends
//! the datagram, and then receives for everybody until its own reply is there (*leader*); threads that call meanwhile
//! wait to be woken (*followers*). When nobody waits, a thread of the link's own receives and keeps the timers.
//!
//! - `keys`: one-time keys, pinning.
//! - `socket`: the UDP sockets; `spin`: when waiting on the CPU pays.
//! - `conn`: one QUIC connection and its streams; `control`: what links tell each other.
//! - `core`: all the connections of a link, its session and its timers, without I/O; `transport`: how QUIC is set up.
//! - `lead`: threads; `link`, `listen`, `reply`: what users see.

mod conn;
mod control;
mod core;
mod keys;
mod lead;
mod link;
mod listen;
mod reply;
mod socket;
mod spin;
mod transport;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

pub use self::keys::{Fingerprint, OneTimeKey};
pub use self::link::{Handler, Link};
pub use self::listen::LinkListener;
pub use self::reply::{ReplyTo, SendOnly};
use crate::frame::MAX_PAYLOAD;
use crate::session::SessionError;

/// Why a link cannot be made, or cannot go on. All but [`LinkError::TooLong`] and [`LinkError::Nested`] mean that the
/// link is of no use any more; those two change nothing.
#[derive(Debug, Clone, Error)]
pub enum LinkError {
    /// The peer closed the link.
    #[error("the peer closed the link")]
    Closed,
    /// This end closed the link.
    #[error("the link was closed here")]
    ShutDown,
    /// The kernel says that nobody listens at the peer's address: the process there is gone.
    #[error("the peer is gone: nobody listens at its address")]
    Refused,
    /// Nothing was heard from the peer for the whole time that was allowed.
    #[error("nothing heard from the peer for {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The peer's key is not the one that was pinned, or this end's is not the one that the peer has pinned.
    #[error("the peer is not who it should be: {0}")]
    Untrusted(String),
    /// The peer speaks another version of the link's protocol.
    #[error("the peer speaks version {theirs} of the link protocol, this end {ours}")]
    Version {
        /// The version of this end.
        ours: u16,
        /// The version of the peer.
        theirs: u16,
    },
    /// The peer did what no peer does; the link was closed.
    #[error("protocol error of the peer: {0}")]
    Protocol(String),
    /// The peer closed the link because of what this end did.
    #[error("the peer found a protocol error: {0}")]
    Rejected(String),
    /// A payload longer than [`MAX_PAYLOAD`]; nothing was sent.
    #[error("a payload of {len} bytes is longer than {MAX_PAYLOAD}")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// A `call` from inside [`Handler::frame`], which would wait for itself; nothing was sent.
    #[error("a call from inside the frame handler of the same link")]
    Nested,
    /// The listener has already been used up by a link.
    #[error("the listener already belongs to a link")]
    InUse,
    /// A one-time key that is none.
    #[error("bad one-time key: {0}")]
    BadKey(String),
    /// The system refused a socket, a thread or an event.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        error: Arc<io::Error>,
    },
}

impl LinkError {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io {
            what,
            error: Arc::new(error),
        }
    }
}

impl From<SessionError> for LinkError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::TooLong { len } => Self::TooLong { len },
            SessionError::BadChannel { .. } | SessionError::BadPosition { .. } | SessionError::Gap { .. } => {
                Self::Protocol(error.to_string())
            }
        }
    }
}

/// The least that a window is cut down to, in bytes.
const MIN_WINDOW_BYTES: u32 = 64 << 10;

/// How long a process that stands still so as to move waits for a peer of which nothing is heard: it could go on where it is.
pub const STANDSTILL: Duration = Duration::from_secs(10);

/// How a link behaves. [`Options::default`] is for calls, [`Options::bulk`] for pages and file contents on a link of
/// their own.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long `connect` waits for the other end.
    pub connect_timeout: Duration,
    /// How long a link that hears nothing from its peer is kept before it is lost.
    pub give_up_after: Duration,
    /// After this much silence the link counts as interrupted, and the end that connected tries anew.
    pub silence: Duration,
    /// How often an idle link shows that it is alive. At most a third of `silence`.
    pub keep_alive: Duration,
    /// Bytes that the peer has not acknowledged, from which on `send` and `call` wait.
    pub queue_bytes: usize,
    /// How much may be under way to this end on one lane, in bytes.
    pub stream_window_bytes: u32,
    /// How much may be under way to this end on all lanes, in bytes.
    pub window_bytes: u32,
    /// How much QUIC takes from this end beyond what the peer has acknowledged, in bytes.
    pub send_window_bytes: u64,
    /// What is asked of the kernel for each direction of a socket, in bytes; it may give less.
    pub socket_buffer_bytes: usize,
    /// The largest UDP payload that is tried, in bytes; what the path takes is found out.
    pub mtu_bytes: u16,
    /// The most datagrams that one send carries.
    pub segments: usize,
    /// `SO_PRIORITY` of the socket (socket(7)); 6 goes before bulk in the default queueing discipline.
    pub priority: Option<u32>,
    /// How long a thread that waits for a reply, or the link's own thread under load, waits on the CPU before it
    /// sleeps; only while the machine has cores to spare and it pays. Zero: never.
    pub spin: Duration,
    /// Name of the link's thread (at most 15 bytes are shown).
    pub thread_name: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            give_up_after: Duration::from_secs(60),
            silence: Duration::from_secs(3),
            keep_alive: Duration::from_millis(500),
            queue_bytes: 16 << 20,
            stream_window_bytes: 2 << 20,
            window_bytes: 4 << 20,
            send_window_bytes: 4 << 20,
            socket_buffer_bytes: 4 << 20,
            mtu_bytes: 8952,
            segments: 40,
            priority: Some(6),
            spin: Duration::from_micros(100),
            thread_name: "link".to_owned(),
        }
    }
}

impl Options {
    /// For pages and file contents: a longer queue and larger buffers, no priority over calls. Windows are a few
    /// milliseconds of a fast network: what is in them is what a call beside it may have to wait for.
    pub fn bulk() -> Self {
        Self {
            queue_bytes: 32 << 20,
            stream_window_bytes: 2 << 20,
            window_bytes: 2 << 20,
            send_window_bytes: 4 << 20,
            socket_buffer_bytes: 16 << 20,
            priority: None,
            spin: Duration::ZERO,
            thread_name: "bulk".to_owned(),
            ..Self::default()
        }
    }

    /// For the link of one process that moves. While its pages are on their way it stands still, so a silent peer is not waited
    /// for as long as on a contact.
    pub fn of_process() -> Self {
        Self {
            give_up_after: STANDSTILL,
            ..Self::bulk()
        }
    }
}

impl Options {
    /// The same with windows for a socket whose receive buffer is of `buffer_bytes`. The kernel counts up to twice a
    /// datagram's payload; a window beyond what fits is a promise of loss.
    fn fitted(mut self, buffer_bytes: usize) -> Self {
        let fit = u32::try_from(buffer_bytes / 2)
            .unwrap_or(u32::MAX)
            .max(MIN_WINDOW_BYTES);
        self.window_bytes = self.window_bytes.min(fit);
        self.stream_window_bytes = self.stream_window_bytes.min(fit);
        self.silence = self.silence.max(3 * self.keep_alive);
        self
    }
}

/// What a link has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Smoothed round trip of the connection, in microseconds; 0 without one.
    pub rtt_us: u64,
    /// UDP payload size in use, in bytes.
    pub mtu_bytes: u16,
    /// Frames handed to a connection, resent ones counted again.
    pub frames_sent: u64,
    /// Frames received, duplicates included.
    pub frames_received: u64,
    /// Frames that were received again and dropped.
    pub duplicates: u64,
    /// Frames that were sent again on a new connection.
    pub resent: u64,
    /// Connections after the first.
    pub reconnects: u64,
    /// Bytes that the peer has not acknowledged.
    pub unacknowledged_bytes: usize,
    /// UDP payload bytes sent on the present connection.
    pub sent_bytes: u64,
    /// UDP payload bytes received on the present connection.
    pub received_bytes: u64,
    /// Packets of the present connection that were lost on the way.
    pub lost_packets: u64,
}

#[cfg(test)]
mod tests;
