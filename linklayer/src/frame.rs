//! The frame: what travels on a lane of a link.
//!
//! A frame is a [`Header`] of [`HEADER_LEN`] bytes followed by its payload. The header is little-endian:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 2 | `kind`: what the payload is; chosen by the user of the link |
//! | 2 | 2 | `flags`: see [`flags`] |
//! | 4 | 4 | `tid`: the thread that the frame is about |
//! | 8 | 8 | `seq`: the number that ties a reply to its call |
//! | 16 | 4 | `len`: length of the payload in bytes, at most [`MAX_PAYLOAD`] |
//! | 20 | 4 | the link's own word: acknowledgement of the other direction (`session`) |
//! | 24 | 4 | the lane |
//!
//! A peer is hostile input: an [`Assembler`] takes bytes as they come, allocates in proportion to what has arrived,
//! and fails for good on the first header that breaks a limit.

use thiserror::Error;

/// Length of an encoded header in bytes.
pub const HEADER_LEN: usize = 28;

/// The largest payload of one frame in bytes. A header that announces more is an error that ends the link.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// What is set aside at once for an announced payload; more only follows data that has arrived.
const EAGER_BYTES: usize = 256 << 10;

/// Bits of [`Header::flags`].
pub mod flags {
    /// The frame answers the call with the same lane, `tid` and `seq`.
    pub const REPLY: u16 = 1;
}

/// A frame that broke a limit. The stream it came from cannot be read any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The payload is longer than [`MAX_PAYLOAD`].
    #[error("a frame of kind {kind} announces {len} bytes, more than {MAX_PAYLOAD}")]
    TooLong {
        /// Kind of the frame.
        kind: u16,
        /// Announced length in bytes.
        len: u32,
    },
}

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// What the payload is.
    pub kind: u16,
    /// See [`flags`].
    pub flags: u16,
    /// The thread that the frame is about.
    pub tid: i32,
    /// Ties a reply to its call.
    pub seq: u64,
    /// Length of the payload in bytes. A link sets it when it sends.
    pub len: u32,
}

impl Header {
    /// A header without flags; the length is set by the link when the frame is sent.
    pub const fn new(kind: u16, tid: i32, seq: u64) -> Self {
        Self {
            kind,
            flags: 0,
            tid,
            seq,
            len: 0,
        }
    }

    /// The header of the reply to the call that this header began: same `tid` and `seq`, with [`flags::REPLY`].
    pub const fn reply(&self, kind: u16) -> Self {
        Self {
            kind,
            flags: flags::REPLY,
            tid: self.tid,
            seq: self.seq,
            len: 0,
        }
    }

    /// Whether this frame answers a call.
    pub const fn is_reply(&self) -> bool {
        self.flags & flags::REPLY != 0
    }

    /// Encodes the header with its lane and the link's own word.
    pub fn encode(&self, lane: u32, word: u32) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0..2].copy_from_slice(&self.kind.to_le_bytes());
        out[2..4].copy_from_slice(&self.flags.to_le_bytes());
        out[4..8].copy_from_slice(&self.tid.to_le_bytes());
        out[8..16].copy_from_slice(&self.seq.to_le_bytes());
        out[16..20].copy_from_slice(&self.len.to_le_bytes());
        out[20..24].copy_from_slice(&word.to_le_bytes());
        out[24..28].copy_from_slice(&lane.to_le_bytes());
        out
    }

    /// Decodes a header, its lane, and the link's own word; every limit of the header is checked.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<(Self, u32, u32), FrameError> {
        let [
            k0,
            k1,
            f0,
            f1,
            t0,
            t1,
            t2,
            t3,
            seq @ ..,
            l0,
            l1,
            l2,
            l3,
            w0,
            w1,
            w2,
            w3,
            n0,
            n1,
            n2,
            n3,
        ] = *bytes;
        let header = Self {
            kind: u16::from_le_bytes([k0, k1]),
            flags: u16::from_le_bytes([f0, f1]),
            tid: i32::from_le_bytes([t0, t1, t2, t3]),
            seq: u64::from_le_bytes(seq),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
        };
        if header.len as usize > MAX_PAYLOAD {
            return Err(FrameError::TooLong {
                kind: header.kind,
                len: header.len,
            });
        }
        let lane = u32::from_le_bytes([n0, n1, n2, n3]);
        Ok((header, lane, u32::from_le_bytes([w0, w1, w2, w3])))
    }
}

/// A whole frame as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its head; `len` is the length of `payload`.
    pub header: Header,
    /// The lane that it is on.
    pub lane: u32,
    /// The link's own word of the head.
    pub word: u32,
    /// The payload.
    pub payload: Vec<u8>,
}

/// Puts frames together from the bytes of a stream, in whatever pieces they come.
///
/// After an error the assembler must not be used again.
#[derive(Debug, Default)]
pub struct Assembler {
    head: [u8; HEADER_LEN],
    have: usize,
    body: Option<Frame>,
}

impl Assembler {
    /// Takes bytes off the front of `input` until it is empty or a frame is complete, and returns that frame.
    pub fn push(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        if self.body.is_none() {
            let take = input.len().min(HEADER_LEN - self.have);
            self.head[self.have..self.have + take].copy_from_slice(&input[..take]);
            self.have += take;
            *input = &input[take..];
            if self.have < HEADER_LEN {
                return Ok(None);
            }
            let (header, lane, word) = Header::decode(&self.head)?;
            let payload = Vec::with_capacity((header.len as usize).min(EAGER_BYTES));
            self.body = Some(Frame {
                header,
                lane,
                word,
                payload,
            });
        }
        let Some(frame) = self.body.as_mut() else {
            return Ok(None);
        };
        let missing = frame.header.len as usize - frame.payload.len();
        let take = missing.min(input.len());
        if frame.payload.capacity() - frame.payload.len() < take {
            let grown = (frame.payload.len() * 2).clamp(take, missing);
            frame.payload.reserve_exact(grown);
        }
        frame.payload.extend_from_slice(&input[..take]);
        *input = &input[take..];
        if take < missing {
            return Ok(None);
        }
        self.have = 0;
        Ok(self.body.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_fixed() {
        let header = Header {
            kind: 0x0102,
            flags: 0x0304,
            tid: -2,
            seq: 0x1122_3344_5566_7788,
            len: 9,
        };
        let bytes = header.encode(0x0506_0708, 0xdead_beef);
        assert_eq!(
            bytes,
            [
                0x02, 0x01, 0x04, 0x03, 0xfe, 0xff, 0xff, 0xff, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22,
                0x11, 9, 0, 0, 0, 0xef, 0xbe, 0xad, 0xde, 8, 7, 6, 5
            ]
        );
        assert_eq!(Header::decode(&bytes), Ok((header, 0x0506_0708, 0xdead_beef)));
    }

    #[test]
    fn an_oversized_header_is_refused() {
        let header = Header {
            len: MAX_PAYLOAD as u32 + 1,
            kind: 7,
            ..Header::default()
        };
        let error = FrameError::TooLong {
            kind: 7,
            len: header.len,
        };
        assert_eq!(Header::decode(&header.encode(3, 0)), Err(error));
        assert_eq!(
            Assembler::default().push(&mut header.encode(3, 0).as_slice()),
            Err(error)
        );
    }

    #[test]
    fn an_announced_payload_is_not_allocated_before_it_arrives() {
        let mut assembler = Assembler::default();
        let header = Header {
            len: MAX_PAYLOAD as u32,
            ..Header::default()
        };
        assert_eq!(assembler.push(&mut header.encode(3, 0).as_slice()), Ok(None));
        assert!(assembler.body.as_ref().unwrap().payload.capacity() <= EAGER_BYTES);
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            sizes in prop::collection::vec(0usize..3000, 1..8),
            cuts in prop::collection::vec(1usize..997, 1..40),
        ) {
            let mut wire = Vec::new();
            let mut sent = Vec::new();
            for (n, size) in sizes.iter().enumerate() {
                let header = Header { kind: n as u16, flags: 1, tid: 5, seq: n as u64, len: *size as u32 };
                let payload = vec![n as u8; *size];
                wire.extend_from_slice(&header.encode(8, n as u32));
                wire.extend_from_slice(&payload);
                sent.push(Frame { header, lane: 8, word: n as u32, payload });
            }
            let mut assembler = Assembler::default();
            let mut got = Vec::new();
            let mut rest = wire.as_slice();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (mut piece, after) = rest.split_at((*cut).min(rest.len()));
                rest = after;
                while !piece.is_empty() {
                    got.extend(assembler.push(&mut piece).unwrap());
                }
            }
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
            let mut assembler = Assembler::default();
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                if assembler.push(&mut rest).is_err() {
                    break;
                }
            }
        }
    }
}
