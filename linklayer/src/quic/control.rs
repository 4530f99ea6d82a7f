//! What the two ends of a link tell each other about the link itself, on the first stream of a connection.

use crate::frame::{Frame, Header};
use crate::session::{CHANNELS, CONTROL_CHANNEL};

/// Version of the link's protocol. Both ends must have the same.
pub(super) const VERSION: u16 = 1;

const HELLO: u16 = 1;
const ACKS: u16 = 2;
const ACK_NOW: u16 = 3;
const POSITION_LEN: usize = 12;

/// Length of what begins each direction of a stream: channel and number of the first frame.
pub(super) const PREAMBLE_LEN: usize = 12;

/// A message of the link to the other end's link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Control {
    /// The first message of each end: which session, and how far it has got. The end that accepted answers in kind.
    Hello(Hello),
    /// Frames received, per channel.
    Acks(Vec<(u32, u64)>),
    /// Please acknowledge everything at once.
    AckNow,
}

/// See [`Control::Hello`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    /// [`VERSION`] of the sender.
    pub(super) version: u16,
    /// Chosen by the end that connects, the same on all its connections.
    pub(super) session: [u8; 16],
    /// Counts the connections of a session, from 1.
    pub(super) epoch: u32,
    /// Frames received, per channel.
    pub(super) positions: Vec<(u32, u64)>,
}

impl Control {
    /// The message as a frame.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        let kind = match self {
            Self::Hello(hello) => {
                payload.extend_from_slice(&hello.version.to_le_bytes());
                payload.extend_from_slice(&hello.session);
                payload.extend_from_slice(&hello.epoch.to_le_bytes());
                put_positions(&mut payload, &hello.positions);
                HELLO
            }
            Self::Acks(positions) => {
                put_positions(&mut payload, positions);
                ACKS
            }
            Self::AckNow => ACK_NOW,
        };
        let header = Header {
            kind,
            len: payload.len() as u32,
            ..Header::default()
        };
        [&header.encode(0, 0), payload.as_slice()].concat()
    }

    /// Reads a frame of the control stream; `None` if it is not exactly one of the messages. A `Hello` of another
    /// version is returned with what all versions have in common: the version.
    pub(super) fn decode(frame: &Frame) -> Option<Self> {
        let payload = frame.payload.as_slice();
        match frame.header.kind {
            HELLO => {
                let (version, rest) = payload.split_first_chunk::<2>()?;
                let version = u16::from_le_bytes(*version);
                if version != VERSION {
                    return Some(Self::Hello(Hello {
                        version,
                        session: [0; 16],
                        epoch: 0,
                        positions: Vec::new(),
                    }));
                }
                let (session, rest) = rest.split_first_chunk::<16>()?;
                let (epoch, rest) = rest.split_first_chunk::<4>()?;
                let epoch = u32::from_le_bytes(*epoch);
                Some(Self::Hello(Hello {
                    version,
                    session: *session,
                    epoch,
                    positions: positions(rest)?,
                }))
            }
            ACKS => Some(Self::Acks(positions(payload)?)),
            ACK_NOW if payload.is_empty() => Some(Self::AckNow),
            _ => None,
        }
    }
}

/// What begins one direction of a stream.
pub(super) fn preamble(channel: u32, first: u64) -> [u8; PREAMBLE_LEN] {
    let mut out = [0; PREAMBLE_LEN];
    out[..4].copy_from_slice(&channel.to_le_bytes());
    out[4..].copy_from_slice(&first.to_le_bytes());
    out
}

/// Reads a [`preamble`]: channel and number of the first frame.
pub(super) fn read_preamble(bytes: &[u8; PREAMBLE_LEN]) -> (u32, u64) {
    let [l0, l1, l2, l3, first @ ..] = *bytes;
    (u32::from_le_bytes([l0, l1, l2, l3]), u64::from_le_bytes(first))
}

fn put_positions(out: &mut Vec<u8>, positions: &[(u32, u64)]) {
    for &(channel, received) in positions {
        out.extend_from_slice(&preamble(channel, received));
    }
}

fn positions(bytes: &[u8]) -> Option<Vec<(u32, u64)>> {
    let (entries, rest) = bytes.as_chunks::<POSITION_LEN>();
    if !rest.is_empty() || entries.len() > CHANNELS as usize {
        return None;
    }
    let all: Vec<_> = entries.iter().map(read_preamble).collect();
    all.iter()
        .all(|&(channel, _)| channel != CONTROL_CHANNEL)
        .then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Assembler;
    use proptest::prelude::*;

    #[test]
    fn messages_survive_their_bytes() {
        let positions = vec![(0, 7), (9, u64::MAX)];
        let hello = Hello {
            version: VERSION,
            session: [3; 16],
            epoch: 2,
            positions: positions.clone(),
        };
        for message in [Control::Hello(hello), Control::Acks(positions), Control::AckNow] {
            let frame = Assembler::default()
                .push(&mut message.encode().as_slice())
                .unwrap()
                .unwrap();
            assert_eq!(Control::decode(&frame), Some(message));
        }
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_read(kind in 0u16..5, payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let frame = Frame { header: Header { kind, ..Header::default() }, lane: 0, word: 0, payload };
            let _ = Control::decode(&frame);
        }
    }
}
