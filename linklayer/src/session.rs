//! Exactly once over connections that come and go.
//!
//! A [`Session`] stands between the users of a link, who speak in frames on numbered lanes, and the connection of the
//! moment. It keeps every frame until the peer has acknowledged it, resends what the peer does not have when a new
//! connection stands, and drops what it has seen before: a frame is delivered once, in the order of its lane, or the
//! session fails.
//!
//! Frames of a lane are numbered from 0 by position alone; nothing of it is in the frame. A lane's stream on a new
//! connection starts with the number of its first frame ([`Session::next_index`]). Acknowledgements are cumulative per
//! lane: the low 32 bits ride in the header of every frame that goes the other way, and the full number is told on the
//! control stream when no frame does so for [`ACK_DELAY`] or after [`ACK_BYTES`].
//!
//! Sans-IO: no clock, no sockets. Inputs are [`push`](Session::push), [`receive`](Session::receive),
//! [`acknowledged`](Session::acknowledged), [`resume`](Session::resume) and [`disconnected`](Session::disconnected);
//! outputs are [`poll_lane`](Session::poll_lane), [`poll_frame`](Session::poll_frame) and
//! [`take_acks`](Session::take_acks) once [`next_timeout`](Session::next_timeout) has come.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use thiserror::Error;

use crate::frame::{HEADER_LEN, Header, MAX_PAYLOAD};

/// Lanes that a session can have. A peer that opens more breaks the protocol.
pub const MAX_LANES: usize = 8192;
/// The lane number that the link keeps for itself.
pub const CONTROL_LANE: u32 = u32::MAX;
/// How long a received frame may stay unacknowledged when nothing is sent on its lane.
pub const ACK_DELAY: Duration = Duration::from_millis(50);
/// Received bytes after which an acknowledgement is due at once.
pub const ACK_BYTES: usize = 512 << 10;

/// Why a session cannot go on, or a frame cannot be taken. Except for [`SessionError::TooLong`] and
/// [`SessionError::TooManyLanes`] on sending, which change nothing, the session is broken afterwards.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SessionError {
    /// The payload of a frame to be sent is longer than [`MAX_PAYLOAD`].
    #[error("a payload of {len} bytes is longer than {MAX_PAYLOAD}")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// More than [`MAX_LANES`] lanes, or the reserved lane.
    #[error("lane {lane} is one too many or reserved")]
    TooManyLanes {
        /// The lane that was asked for.
        lane: u32,
    },
    /// The peer claims to have received what was never sent, or to have lost what it acknowledged.
    #[error("the peer's position {claimed} on lane {lane} is outside of {from}..={to}")]
    BadPosition {
        /// The lane.
        lane: u32,
        /// What the peer claims.
        claimed: u64,
        /// The first position that is possible.
        from: u64,
        /// The last position that is possible.
        to: u64,
    },
    /// The peer left out frames.
    #[error("lane {lane} goes on with frame {index}, but {expected} is next")]
    Gap {
        /// The lane.
        lane: u32,
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
struct Lane {
    /// Number of the first frame in `kept`.
    base: u64,
    /// Frames that the peer has not acknowledged.
    kept: VecDeque<Bytes>,
    /// How many of `kept` the present connection has taken.
    taken: usize,
    /// Whether the lane waits in `ready`.
    ready: bool,
    /// Frames received.
    received: u64,
    /// What the peer was told of `received`.
    told: u64,
    /// Whether the lane waits in `unacked`.
    unacked: bool,
}

/// One end's memory of a conversation. See the module's documentation.
#[derive(Debug, Default)]
pub struct Session {
    lanes: HashMap<u32, Lane>,
    /// Lanes with frames that the present connection has not taken.
    ready: VecDeque<u32>,
    /// Lanes whose peer was not told everything.
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

    /// Takes a frame to be sent: `header` with its length set to that of `parts`, which are put one after the other.
    ///
    /// On an error nothing has changed.
    pub fn push(&mut self, lane: u32, mut header: Header, parts: &[&[u8]]) -> Result<(), SessionError> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        if len > MAX_PAYLOAD {
            return Err(SessionError::TooLong { len });
        }
        header.len = len as u32;
        let connected = self.connected;
        let entry = self.lane(lane)?;
        let mut bytes = BytesMut::with_capacity(HEADER_LEN + len);
        bytes.put_slice(&header.encode(entry.received as u32));
        for part in parts {
            bytes.put_slice(part);
        }
        if connected {
            entry.told = entry.received;
        }
        entry.kept.push_back(bytes.freeze());
        let newly_ready = !std::mem::replace(&mut entry.ready, true);
        if newly_ready {
            self.ready.push_back(lane);
        }
        self.kept_bytes += HEADER_LEN + len;
        Ok(())
    }

    /// A new connection stands; `positions` are the peer's, as [`Session::positions`] gives them over there. Everything
    /// that the peer does not have becomes ready to be sent again.
    pub fn resume(&mut self, positions: &[(u32, u64)]) -> Result<(), SessionError> {
        self.disconnected();
        let peer: HashMap<u32, u64> = positions.iter().copied().collect();
        for (&lane, &claimed) in &peer {
            if claimed > 0 && !self.lanes.contains_key(&lane) {
                return Err(SessionError::BadPosition {
                    lane,
                    claimed,
                    from: 0,
                    to: 0,
                });
            }
        }
        for (&lane, entry) in &mut self.lanes {
            let claimed = peer.get(&lane).copied().unwrap_or(0);
            let (from, to) = (entry.base, entry.base + entry.kept.len() as u64);
            if claimed < from || claimed > to {
                return Err(SessionError::BadPosition {
                    lane,
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
                self.ready.push_back(lane);
            }
        }
        self.unacked.clear();
        self.lanes.values_mut().for_each(|entry| entry.unacked = false);
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
        self.lanes.values_mut().for_each(|entry| entry.ready = false);
    }

    /// How many frames were received on each lane that has any: what the peer needs to resume.
    pub fn positions(&self) -> Vec<(u32, u64)> {
        self.lanes
            .iter()
            .filter(|(_, entry)| entry.received > 0)
            .map(|(&lane, entry)| (lane, entry.received))
            .collect()
    }

    /// The next lane that has frames to be written. It is named once; its frames must then be taken with
    /// [`Session::poll_frame`] until there is none, now or when the connection can take more.
    pub fn poll_lane(&mut self) -> Option<u32> {
        if !self.connected {
            return None;
        }
        let lane = self.ready.pop_front()?;
        if let Some(entry) = self.lanes.get_mut(&lane) {
            entry.ready = false;
        }
        Some(lane)
    }

    /// The next frame of `lane` for the present connection, with its header; the session keeps it, too.
    pub fn poll_frame(&mut self, lane: u32) -> Option<Bytes> {
        if !self.connected {
            return None;
        }
        let entry = self.lanes.get_mut(&lane)?;
        let frame = entry.kept.get(entry.taken)?.clone();
        entry.taken += 1;
        Some(frame)
    }

    /// The number of the frame that [`Session::poll_frame`] returns next for `lane`.
    pub fn next_index(&self, lane: u32) -> u64 {
        self.lanes
            .get(&lane)
            .map_or(0, |entry| entry.base + entry.taken as u64)
    }

    /// A whole frame of `len` payload bytes arrived as number `index` of `lane`, with `word` in its header.
    pub fn receive(
        &mut self,
        now: Instant,
        lane: u32,
        index: u64,
        word: u32,
        len: usize,
    ) -> Result<Receipt, SessionError> {
        let entry = self.lane(lane)?;
        if index > entry.received {
            return Err(SessionError::Gap {
                lane,
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
            self.unacked.push(lane);
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

    /// The number that the next frame on `lane` is expected to have.
    pub fn expected(&self, lane: u32) -> u64 {
        self.lanes.get(&lane).map_or(0, |entry| entry.received)
    }

    /// The peer says that it has the first `upto` frames of `lane`.
    pub fn acknowledged(&mut self, lane: u32, upto: u64) -> Result<(), SessionError> {
        let Some(entry) = self.lanes.get_mut(&lane) else {
            return Err(SessionError::BadPosition {
                lane,
                claimed: upto,
                from: 0,
                to: 0,
            });
        };
        let to = entry.base + entry.taken as u64;
        if upto > to {
            return Err(SessionError::BadPosition {
                lane,
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

    /// The lanes whose peer was not told everything, with the number of frames received on each. They count as told.
    pub fn take_acks(&mut self) -> Vec<(u32, u64)> {
        self.ack_at = None;
        self.received_bytes = 0;
        let mut acks = Vec::new();
        for lane in self.unacked.drain(..) {
            let Some(entry) = self.lanes.get_mut(&lane) else {
                continue;
            };
            entry.unacked = false;
            if entry.told != entry.received {
                entry.told = entry.received;
                acks.push((lane, entry.received));
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

    fn lane(&mut self, lane: u32) -> Result<&mut Lane, SessionError> {
        if lane == CONTROL_LANE || (self.lanes.len() >= MAX_LANES && !self.lanes.contains_key(&lane)) {
            return Err(SessionError::TooManyLanes { lane });
        }
        Ok(self.lanes.entry(lane).or_default())
    }
}

impl Lane {
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

    /// As [`Lane::trim`], with the low half of the number: a word that fits nothing that was sent is an old one.
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
