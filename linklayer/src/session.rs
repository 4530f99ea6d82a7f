//! Exactly once over connections that come and go.
//!
//! A [`Session`] stands between the users of a link, who speak in frames on numbered lanes, and the connection of the
//! moment. It keeps every frame until the peer has acknowledged it, resends what the peer does not have when a new
//! connection stands, and drops what it has seen before: a frame is delivered once, in the order of its lane, or the
//! session fails.
//!
//! There is no end of lanes, one for each thread that ever was; they share a fixed number of *channels*
//! ([`channel_of`]), each of which keeps the order.
//!
//! Frames of a channel are numbered from 0 by position alone; nothing of it is in the frame. A channel's stream on a new
//! connection starts with the number of its first frame ([`Session::next_index`]). Acknowledgements are cumulative per
//! channel: the low 32 bits ride in the header of every frame that goes the other way, and the full number is told on the
//! control stream when no frame does so for [`ACK_DELAY`] or after [`ACK_BYTES`].
//!
//! Sans-IO: no clock, no sockets. Inputs are [`push`](Session::push), [`receive`](Session::receive),
//! [`acknowledged`](Session::acknowledged), [`resume`](Session::resume) and [`disconnected`](Session::disconnected);
//! outputs are [`poll_channel`](Session::poll_channel), [`poll_frame`](Session::poll_frame) and
//! [`take_acks`](Session::take_acks) once [`next_timeout`](Session::next_timeout) has come.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use rustc_hash::FxHashMap;
use thiserror::Error;

use crate::frame::{HEADER_LEN, Header, MAX_PAYLOAD};

/// Channels of a session, numbered from 0. A peer that uses another one breaks the protocol.
pub const CHANNELS: u32 = 1024;
/// The channel number that the link keeps for itself.
pub const CONTROL_CHANNEL: u32 = u32::MAX;
/// How long a received frame may stay unacknowledged when nothing is sent on its channel.
pub const ACK_DELAY: Duration = Duration::from_millis(50);
/// Received bytes after which an acknowledgement is due at once.
pub const ACK_BYTES: usize = 512 << 10;

/// Why a session cannot go on, or a frame cannot be taken. After all but [`SessionError::TooLong`], which changes
/// nothing, the session is broken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SessionError {
    /// The payload of a frame to be sent is longer than [`MAX_PAYLOAD`].
    #[error("a payload of {len} bytes is longer than {MAX_PAYLOAD}")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// There is no such channel, or the frame's lane belongs to another.
    #[error("channel {channel} does not exist or does not carry the frame's lane")]
    BadChannel {
        /// The channel that the peer used.
        channel: u32,
    },
    /// The peer claims to have received what was never sent, or to have lost what it acknowledged.
    #[error("the peer's position {claimed} on channel {channel} is outside of {from}..={to}")]
    BadPosition {
        /// The channel.
        channel: u32,
        /// What the peer claims.
        claimed: u64,
        /// The first position that is possible.
        from: u64,
        /// The last position that is possible.
        to: u64,
    },
    /// The peer left out frames.
    #[error("channel {channel} goes on with frame {index}, but {expected} is next")]
    Gap {
        /// The channel.
        channel: u32,
        /// The number of the frame that came.
        index: u64,
        /// The number of the frame that is due.
        expected: u64,
    },
}

/// What became of a received frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receipt {
    /// It is due: deliver it.
    New,
    /// It was delivered before: drop it.
    Duplicate,
}

#[derive(Debug, Default)]
struct Channel {
    /// Number of the first frame in `kept`.
    base: u64,
    /// Frames that the peer has not acknowledged.
    kept: VecDeque<Bytes>,
    /// How many of `kept` the present connection has taken.
    taken: usize,
    /// Whether the channel waits in `ready`.
    ready: bool,
    /// Frames received.
    received: u64,
    /// What the peer was told of `received`.
    told: u64,
    /// Whether the channel waits in `unacked`.
    unacked: bool,
}

/// The channel that carries `lane`.
pub const fn channel_of(lane: u32) -> u32 {
    lane % CHANNELS
}

/// One end's memory of a conversation. See the module's documentation.
#[derive(Debug, Default)]
pub struct Session {
    // A peer can only choose among the numbers up to `CHANNELS`: no need of a hash that withstands it.
    channels: FxHashMap<u32, Channel>,
    /// Channels with frames that the present connection has not taken.
    ready: VecDeque<u32>,
    /// Channels whose peer was not told everything.
    unacked: Vec<u32>,
    ack_at: Option<Instant>,
    received_bytes: usize,
    kept_bytes: usize,
    connected: bool,
    duplicates: u64,
    resent: u64,
}

impl Session {
    /// An empty session without a connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a frame to be sent on `lane`: `header` with its length set to that of `parts`, which are put one after the other.
    ///
    /// On an error nothing has changed.
    pub fn push(&mut self, lane: u32, mut header: Header, parts: &[&[u8]]) -> Result<(), SessionError> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        if len > MAX_PAYLOAD {
            return Err(SessionError::TooLong { len });
        }
        header.len = len as u32;
        let channel = channel_of(lane);
        let connected = self.connected;
        let entry = self.channel(channel)?;
        let mut bytes = BytesMut::with_capacity(HEADER_LEN + len);
        bytes.put_slice(&header.encode(lane, entry.received as u32));
        for part in parts {
            bytes.put_slice(part);
        }
        if connected {
            entry.told = entry.received;
        }
        entry.kept.push_back(bytes.freeze());
        let newly_ready = !std::mem::replace(&mut entry.ready, true);
        if newly_ready {
            self.ready.push_back(channel);
        }
        self.kept_bytes += HEADER_LEN + len;
        Ok(())
    }

    /// A new connection stands; `positions` are the peer's, as [`Session::positions`] gives them over there. Everything
    /// that the peer does not have becomes ready to be sent again.
    pub fn resume(&mut self, positions: &[(u32, u64)]) -> Result<(), SessionError> {
        self.disconnected();
        let peer: FxHashMap<u32, u64> = positions.iter().copied().collect();
        for (&channel, &claimed) in &peer {
            if claimed > 0 && !self.channels.contains_key(&channel) {
                return Err(SessionError::BadPosition {
                    channel,
                    claimed,
                    from: 0,
                    to: 0,
                });
            }
        }
        for (&channel, entry) in &mut self.channels {
            let claimed = peer.get(&channel).copied().unwrap_or(0);
            let (from, to) = (entry.base, entry.base + entry.kept.len() as u64);
            if claimed < from || claimed > to {
                return Err(SessionError::BadPosition {
                    channel,
                    claimed,
                    from,
                    to,
                });
            }
            self.kept_bytes -= entry.trim(claimed);
            self.resent += entry.taken as u64;
            entry.taken = 0;
            // The peer learns `received` from our positions, which travel the other way in the same exchange.
            entry.told = entry.received;
            if !entry.kept.is_empty() {
                entry.ready = true;
                self.ready.push_back(channel);
            }
        }
        self.unacked.clear();
        self.channels.values_mut().for_each(|entry| entry.unacked = false);
        self.ack_at = None;
        self.received_bytes = 0;
        self.connected = true;
        Ok(())
    }

    /// The connection is gone. Nothing is ready to be written until [`Session::resume`].
    pub fn disconnected(&mut self) {
        self.connected = false;
        self.ready.clear();
        self.ack_at = None;
        self.channels.values_mut().for_each(|entry| entry.ready = false);
    }

    /// How many frames were received on each channel that has any: what the peer needs to resume.
    pub fn positions(&self) -> Vec<(u32, u64)> {
        self.channels
            .iter()
            .filter(|(_, entry)| entry.received > 0)
            .map(|(&channel, entry)| (channel, entry.received))
            .collect()
    }

    /// The next channel that has frames to be written. It is named once; its frames must then be taken with
    /// [`Session::poll_frame`] until there is none, now or when the connection can take more.
    pub fn poll_channel(&mut self) -> Option<u32> {
        if !self.connected {
            return None;
        }
        let channel = self.ready.pop_front()?;
        if let Some(entry) = self.channels.get_mut(&channel) {
            entry.ready = false;
        }
        Some(channel)
    }

    /// The next frame of `channel` for the present connection, with its header; the session keeps it, too.
    pub fn poll_frame(&mut self, channel: u32) -> Option<Bytes> {
        if !self.connected {
            return None;
        }
        let entry = self.channels.get_mut(&channel)?;
        let frame = entry.kept.get(entry.taken)?.clone();
        entry.taken += 1;
        Some(frame)
    }

    /// The number of the frame that [`Session::poll_frame`] returns next for `channel`.
    pub fn next_index(&self, channel: u32) -> u64 {
        self.channels
            .get(&channel)
            .map_or(0, |entry| entry.base + entry.taken as u64)
    }

    /// A whole frame of `len` payload bytes of `lane` arrived as number `index` of `channel`, with `word` in its header.
    pub fn receive(
        &mut self,
        now: Instant,
        channel: u32,
        index: u64,
        lane: u32,
        word: u32,
        len: usize,
    ) -> Result<Receipt, SessionError> {
        if channel_of(lane) != channel {
            return Err(SessionError::BadChannel { channel });
        }
        let entry = self.channel(channel)?;
        if index > entry.received {
            return Err(SessionError::Gap {
                channel,
                index,
                expected: entry.received,
            });
        }
        let new = index == entry.received;
        if new {
            entry.received += 1;
        } else {
            // The peer would not send it had it heard that it is here.
            entry.told = index;
        }
        let newly_unacked = !std::mem::replace(&mut entry.unacked, true);
        let freed = entry.trim_word(word);
        self.kept_bytes -= freed;
        if newly_unacked {
            self.unacked.push(channel);
        }
        self.received_bytes += HEADER_LEN + len;
        let due = if self.received_bytes >= ACK_BYTES {
            now
        } else {
            now + ACK_DELAY
        };
        self.ack_at = Some(self.ack_at.map_or(due, |at| at.min(due)));
        if new {
            return Ok(Receipt::New);
        }
        self.duplicates += 1;
        Ok(Receipt::Duplicate)
    }

    /// The number that the next frame on `channel` is expected to have.
    pub fn expected(&self, channel: u32) -> u64 {
        self.channels.get(&channel).map_or(0, |entry| entry.received)
    }

    /// The peer says that it has the first `upto` frames of `channel`.
    pub fn acknowledged(&mut self, channel: u32, upto: u64) -> Result<(), SessionError> {
        let Some(entry) = self.channels.get_mut(&channel) else {
            return Err(SessionError::BadPosition {
                channel,
                claimed: upto,
                from: 0,
                to: 0,
            });
        };
        let to = entry.base + entry.taken as u64;
        if upto > to {
            return Err(SessionError::BadPosition {
                channel,
                claimed: upto,
                from: entry.base,
                to,
            });
        }
        self.kept_bytes -= entry.trim(upto);
        Ok(())
    }

    /// When [`Session::take_acks`] is due.
    pub fn next_timeout(&self) -> Option<Instant> {
        self.ack_at
    }

    /// Makes an acknowledgement due at once, if the peer was not told everything.
    pub fn hurry_acks(&mut self, now: Instant) {
        if self.connected && !self.unacked.is_empty() {
            self.ack_at = Some(now);
        }
    }

    /// The channels whose peer was not told everything, with the number of frames received on each. They count as told.
    pub fn take_acks(&mut self) -> Vec<(u32, u64)> {
        self.ack_at = None;
        self.received_bytes = 0;
        let mut acks = Vec::new();
        for channel in self.unacked.drain(..) {
            let Some(entry) = self.channels.get_mut(&channel) else {
                continue;
            };
            entry.unacked = false;
            if entry.told != entry.received {
                entry.told = entry.received;
                acks.push((channel, entry.received));
            }
        }
        acks
    }

    /// Bytes that are kept because the peer has not acknowledged them.
    pub fn kept_bytes(&self) -> usize {
        self.kept_bytes
    }

    /// Frames that were received again and dropped.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Frames that were handed to a connection more than once.
    pub fn resent(&self) -> u64 {
        self.resent
    }

    fn channel(&mut self, channel: u32) -> Result<&mut Channel, SessionError> {
        if channel >= CHANNELS {
            return Err(SessionError::BadChannel { channel });
        }
        Ok(self.channels.entry(channel).or_default())
    }
}

impl Channel {
    /// Forgets the frames before `upto`, which is at most the number of frames there are; returns their bytes.
    fn trim(&mut self, upto: u64) -> usize {
        let mut bytes = 0;
        while self.base < upto {
            let Some(frame) = self.kept.pop_front() else { break };
            bytes += frame.len();
            self.base += 1;
            self.taken = self.taken.saturating_sub(1);
        }
        bytes
    }

    /// As [`Channel::trim`], with the low half of the number: a word that fits nothing that was sent is an old one.
    fn trim_word(&mut self, word: u32) -> usize {
        let ahead = u64::from(word.wrapping_sub(self.base as u32));
        if ahead <= self.taken as u64 {
            self.trim(self.base + ahead)
        } else {
            0
        }
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
