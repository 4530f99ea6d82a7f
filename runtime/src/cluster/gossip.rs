//! The membership protocol: foca (SWIM with suspicion), told who we are and how to write its packets.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use bincode::{Decode, Encode};
use bytes::{Buf, BufMut};
use foca::{Header, Identity, Member, Message, State};

use super::names::{MAX_HOST, MAX_NAME};
use super::protocol::MAX_DATAGRAM;
use crate::codec::CodecError;

/// Largest packet, in bytes: one byte of a datagram says that it is one.
pub const MAX_PACKET: usize = MAX_DATAGRAM - 1;

/// A node in the membership protocol: one life of one node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GossipId {
    /// The node's number, which is its address to foca.
    pub number: u32,
    /// Tells the lives of a node apart: a later one has a higher generation. (Microseconds since 1970 at its start.)
    pub generation: u64,
    /// Where its daemon listens.
    pub addr: SocketAddr,
    /// Its name.
    pub name: String,
    /// Its host name.
    pub host: String,
}

impl GossipId {
    /// Whether its texts are of a length that we would send.
    pub fn is_sound(&self) -> bool {
        self.number != 0 && self.name.len() <= MAX_NAME && self.host.len() <= MAX_HOST
    }
}

impl Identity for GossipId {
    type Addr = u32;

    fn renew(&self) -> Option<Self> {
        // declared down while alive: come back as somebody newer
        Some(GossipId {
            generation: self.generation + 1,
            ..self.clone()
        })
    }

    fn addr(&self) -> u32 {
        self.number
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.generation > adversary.generation
    }
}

/// How the membership protocol is tuned.
pub fn config(probe_period: Duration, suspect: Duration) -> foca::Config {
    let mut config = foca::Config::new_lan(NonZeroU32::new(64).unwrap_or(NonZeroU32::MIN));
    config.probe_period = probe_period;
    config.probe_rtt = probe_period / 3;
    config.suspect_to_down_after = suspect;
    config.max_packet_size = NonZeroUsize::new(MAX_PACKET).unwrap_or(NonZeroUsize::MIN);
    if let Some(periodic) = &mut config.periodic_announce_to_down_members {
        periodic.frequency = Duration::from_secs(20);
    }
    config
}

/// Number of the node that a packet says it is from.
pub fn sender(packet: &[u8]) -> Option<u32> {
    take::<WireHeader>(packet).ok().map(|header| header.src.number)
}

/// Writes and reads the parts of foca's packets.
#[derive(Debug, Clone, Copy, Default)]
pub struct PacketCodec;

#[derive(Encode, Decode)]
struct WireHeader {
    src: GossipId,
    src_incarnation: u16,
    dst: GossipId,
    message: WireMessage,
}

#[derive(Encode, Decode)]
enum WireMessage {
    Ping(u8),
    Ack(u8),
    PingReq(GossipId, u8),
    IndirectPing(GossipId, u8),
    IndirectAck(GossipId, u8),
    ForwardedAck(GossipId, u8),
    Announce,
    Feed,
    Gossip,
    Broadcast,
    TurnUndead,
}

#[derive(Encode, Decode)]
struct WireMember {
    id: GossipId,
    incarnation: u16,
    state: u8,
}

fn put<T: Encode>(value: &T, mut buf: impl BufMut) -> Result<(), CodecError> {
    let bytes = crate::codec::encode(value)?;
    if buf.remaining_mut() < bytes.len() {
        return Err(CodecError::TooLarge {
            len: bytes.len(),
            max: buf.remaining_mut(),
        });
    }
    buf.put_slice(&bytes);
    Ok(())
}

fn take<T: Decode<()>>(mut buf: impl Buf) -> Result<T, CodecError> {
    let config = bincode::config::standard().with_limit::<MAX_PACKET>();
    let (value, used) =
        bincode::decode_from_slice(buf.chunk(), config).map_err(|e| CodecError::Malformed(e.to_string()))?;
    buf.advance(used);
    Ok(value)
}

fn sound(id: GossipId) -> Result<GossipId, CodecError> {
    if id.is_sound() {
        Ok(id)
    } else {
        Err(CodecError::Malformed("unsound node identity".into()))
    }
}

impl foca::Codec<GossipId> for PacketCodec {
    type Error = CodecError;

    fn encode_header(&mut self, header: &Header<GossipId>, buf: impl BufMut) -> Result<(), CodecError> {
        let message = match header.message.clone() {
            Message::Ping(n) => WireMessage::Ping(n),
            Message::Ack(n) => WireMessage::Ack(n),
            Message::PingReq { target, probe_number } => WireMessage::PingReq(target, probe_number),
            Message::IndirectPing { origin, probe_number } => WireMessage::IndirectPing(origin, probe_number),
            Message::IndirectAck { target, probe_number } => WireMessage::IndirectAck(target, probe_number),
            Message::ForwardedAck { origin, probe_number } => WireMessage::ForwardedAck(origin, probe_number),
            Message::Announce => WireMessage::Announce,
            Message::Feed => WireMessage::Feed,
            Message::Gossip => WireMessage::Gossip,
            Message::Broadcast => WireMessage::Broadcast,
            Message::TurnUndead => WireMessage::TurnUndead,
        };
        let (src, dst) = (header.src.clone(), header.dst.clone());
        put(
            &WireHeader {
                src,
                src_incarnation: header.src_incarnation,
                dst,
                message,
            },
            buf,
        )
    }

    fn decode_header(&mut self, buf: impl Buf) -> Result<Header<GossipId>, CodecError> {
        let wire: WireHeader = take(buf)?;
        let message = match wire.message {
            WireMessage::Ping(n) => Message::Ping(n),
            WireMessage::Ack(n) => Message::Ack(n),
            WireMessage::PingReq(target, probe_number) => Message::PingReq {
                target: sound(target)?,
                probe_number,
            },
            WireMessage::IndirectPing(origin, probe_number) => Message::IndirectPing {
                origin: sound(origin)?,
                probe_number,
            },
            WireMessage::IndirectAck(target, probe_number) => Message::IndirectAck {
                target: sound(target)?,
                probe_number,
            },
            WireMessage::ForwardedAck(origin, probe_number) => Message::ForwardedAck {
                origin: sound(origin)?,
                probe_number,
            },
            WireMessage::Announce => Message::Announce,
            WireMessage::Feed => Message::Feed,
            WireMessage::Gossip => Message::Gossip,
            WireMessage::Broadcast => Message::Broadcast,
            WireMessage::TurnUndead => Message::TurnUndead,
        };
        Ok(Header {
            src: sound(wire.src)?,
            src_incarnation: wire.src_incarnation,
            dst: sound(wire.dst)?,
            message,
        })
    }

    fn encode_member(&mut self, member: &Member<GossipId>, buf: impl BufMut) -> Result<(), CodecError> {
        let state = match member.state() {
            State::Alive => 0,
            State::Suspect => 1,
            State::Down => 2,
        };
        put(
            &WireMember {
                id: member.id().clone(),
                incarnation: member.incarnation(),
                state,
            },
            buf,
        )
    }

    fn decode_member(&mut self, buf: impl Buf) -> Result<Member<GossipId>, CodecError> {
        let wire: WireMember = take(buf)?;
        let state = match wire.state {
            0 => State::Alive,
            1 => State::Suspect,
            2 => State::Down,
            other => return Err(CodecError::Malformed(format!("member state {other}"))),
        };
        Ok(Member::new(sound(wire.id)?, wire.incarnation, state))
    }
}

#[cfg(test)]
mod tests {
    use foca::Codec;

    use super::*;

    fn id(number: u32) -> GossipId {
        GossipId {
            number,
            generation: 1,
            addr: "[fe80::1234:5678:9abc:def0]:65535".parse().unwrap(),
            name: "n".repeat(MAX_NAME),
            host: "h".repeat(MAX_HOST),
        }
    }

    #[test]
    fn parts_return_as_they_were_and_fit() {
        let mut codec = PacketCodec;
        let messages = [
            Message::Ping(1),
            Message::Ack(2),
            Message::PingReq {
                target: id(3),
                probe_number: 3,
            },
            Message::IndirectPing {
                origin: id(3),
                probe_number: 4,
            },
            Message::IndirectAck {
                target: id(3),
                probe_number: 5,
            },
            Message::ForwardedAck {
                origin: id(3),
                probe_number: 6,
            },
            Message::Announce,
            Message::Feed,
            Message::Gossip,
            Message::Broadcast,
            Message::TurnUndead,
        ];
        for message in messages {
            let header = Header {
                src: id(1),
                src_incarnation: 9,
                dst: id(2),
                message,
            };
            let mut buf = Vec::new();
            codec.encode_header(&header, &mut buf).unwrap();
            assert!(buf.len() < MAX_PACKET / 2);
            assert_eq!(sender(&buf), Some(1));
            buf.push(7);
            let mut rest = buf.as_slice();
            assert_eq!(codec.decode_header(&mut rest).unwrap(), header);
            assert_eq!(rest, [7]);
            for cut in 0..buf.len() - 1 {
                assert!(codec.decode_header(&buf[..cut]).is_err());
            }
        }
        for state in [State::Alive, State::Suspect, State::Down] {
            let member = Member::new(id(4), 3, state);
            let mut buf = Vec::new();
            codec.encode_member(&member, &mut buf).unwrap();
            assert_eq!(codec.decode_member(buf.as_slice()).unwrap(), member);
        }
    }

    #[test]
    fn unsound_identities_are_refused() {
        let mut codec = PacketCodec;
        let long = GossipId {
            name: "x".repeat(MAX_NAME + 1),
            ..id(1)
        };
        for unsound in [long, id(0)] {
            let mut buf = Vec::new();
            codec.encode_member(&Member::alive(unsound), &mut buf).unwrap();
            assert!(codec.decode_member(buf.as_slice()).is_err());
        }
        let mut small = [0u8; 8];
        assert!(
            codec
                .encode_member(&Member::alive(id(1)), &mut small[..])
                .is_err()
        );
    }

    #[test]
    fn a_later_life_wins() {
        let first = id(1);
        let second = first.renew().unwrap();
        assert!(second.win_addr_conflict(&first) && !first.win_addr_conflict(&second));
        assert_eq!(first.addr(), second.addr());
    }
}
