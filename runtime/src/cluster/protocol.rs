//! What daemons say to each other.
//!
//! On a new connection the dialling side opens a stream and sends an [`Offer`]; the other side answers with a
//! [`Verdict`]. Both have a layout that never changes, so that programs of any two versions can tell each other that they
//! do not fit. When they do, both sides send an [`Introduction`], and from then on each further stream carries one
//! [`PeerRequest`] and one [`PeerAnswer`], and each datagram is one of [`Datagram`].

use std::net::SocketAddr;

use bincode::{Decode, Encode};
use bytes::Bytes;

use super::gossip::GossipId;
use super::state::LoadVector;
use super::store::MemberRecord;
use super::token::{InviteId, InviteSecret};
use crate::codec::{self, CodecError};
use crate::control::{Failure, Placement};
use crate::job_id::JobId;
use crate::pagestore::Counts;

const MAGIC: [u8; 4] = *b"MOSC";
/// Lowest version of the control protocol that this program speaks.
pub const VERSION_MIN: u16 = 1;
/// Highest one.
pub const VERSION_MAX: u16 = 1;
/// Largest request or answer of a node, in bytes: supplementary groups and member lists are the largest parts.
pub const MAX_PEER_MESSAGE: usize = 512 << 10;
/// Largest message of somebody who has no certificate yet, in bytes.
pub const MAX_JOIN_MESSAGE: usize = 16 << 10;
/// Largest datagram, in bytes. What fits QUIC's smallest packet, its header and tag taken off.
pub const MAX_DATAGRAM: usize = 1100;
/// Load reports in one datagram.
pub const MAX_REPORTS: usize = 16;

/// The versions that the dialling side speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Lowest.
    pub min: u16,
    /// Highest.
    pub max: u16,
}

/// What the other side makes of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// The version to be spoken; 0 when there is none that both speak.
    pub chosen: u16,
    /// What the answering side speaks.
    pub range: Offer,
}

/// The peer speaks another language.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// These are not the bytes of a mosd.
    #[error("the peer does not speak the control protocol")]
    Stranger,
    /// It is a mosd of another version.
    #[error(
        "the peer speaks versions {} to {} of the control protocol, we speak {} to {}: install the same version of mosd on both nodes",
        theirs.min, theirs.max, ours.min, ours.max
    )]
    Mismatch {
        /// What it speaks.
        theirs: Offer,
        /// What we speak.
        ours: Offer,
    },
}

impl Offer {
    /// Length on the wire, in bytes.
    pub const LEN: usize = 8;
    /// What this program speaks.
    pub const OURS: Offer = Offer {
        min: VERSION_MIN,
        max: VERSION_MAX,
    };

    /// The bytes.
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.min.to_le_bytes());
        bytes[6..].copy_from_slice(&self.max.to_le_bytes());
        bytes
    }

    /// Reads the bytes.
    ///
    /// # Errors
    /// [`VersionError::Stranger`].
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, VersionError> {
        let [m0, m1, m2, m3, a, b, c, d] = *bytes;
        let offer = Offer {
            min: u16::from_le_bytes([a, b]),
            max: u16::from_le_bytes([c, d]),
        };
        if [m0, m1, m2, m3] == MAGIC && offer.min > 0 && offer.min <= offer.max {
            Ok(offer)
        } else {
            Err(VersionError::Stranger)
        }
    }

    /// The answering side's decision: the highest version that both speak.
    pub fn answer(self, theirs: Offer) -> Verdict {
        let highest = self.max.min(theirs.max);
        let chosen = if highest >= self.min.max(theirs.min) {
            highest
        } else {
            0
        };
        Verdict { chosen, range: self }
    }
}

impl Verdict {
    /// Length on the wire, in bytes.
    pub const LEN: usize = 10;

    /// The bytes.
    pub fn encode(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.range.encode());
        bytes[8..].copy_from_slice(&self.chosen.to_le_bytes());
        bytes
    }

    /// Reads the bytes, on the side that made the offer `ours`.
    ///
    /// # Errors
    /// [`VersionError`], also when the peer chose what was not offered.
    pub fn decode(bytes: &[u8; Self::LEN], ours: Offer) -> Result<u16, VersionError> {
        let mut range = [0; Offer::LEN];
        range.copy_from_slice(&bytes[..Offer::LEN]);
        let theirs = Offer::decode(&range)?;
        match u16::from_le_bytes([bytes[8], bytes[9]]) {
            0 => Err(VersionError::Mismatch { theirs, ours }),
            chosen if (ours.min..=ours.max).contains(&chosen) => Ok(chosen),
            _ => Err(VersionError::Stranger),
        }
    }
}

/// How a daemon introduces itself, both ways. Number and name are believed only as far as the certificate says so.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Introduction {
    /// Who it is in the membership protocol.
    pub id: GossipId,
    /// Version of the program, for people.
    pub software: String,
    /// The nodes it has heard of.
    pub members: Vec<MemberRecord>,
}

/// What a daemon asks another.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum PeerRequest {
    /// Start a supervisor for a job of the asking node.
    Supervisor(RemoteSupervisor),
    /// What have your page stores done?
    PageStores,
}

/// A supervisor is wanted. The asking node vouches for the user: it has them from the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RemoteSupervisor {
    /// The job; its home is the asking node.
    pub job: JobId,
    /// Its user.
    pub uid: u32,
    /// The user's group.
    pub gid: u32,
    /// The user's supplementary groups.
    pub groups: Vec<u32>,
    /// Fingerprint of the deputy's one-time key.
    pub peer_fingerprint: [u8; 32],
}

/// A daemon's answer to another.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum PeerAnswer {
    /// To [`PeerRequest::Supervisor`].
    Placed(Placement),
    /// To [`PeerRequest::PageStores`]: those of all users together.
    PageStores(Counts),
    /// It was not done.
    Failed(Failure),
}

/// What fits in a datagram, after a byte that says which it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Datagram {
    /// A packet of the membership protocol.
    Gossip(Bytes),
    /// Loads of several nodes.
    Loads(Vec<LoadReport>),
}

/// The load of a node, as it travels from hand to hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct LoadReport {
    /// The node's number.
    pub number: u32,
    /// How old it is when it is sent, in milliseconds.
    pub age_ms: u32,
    /// The load.
    pub load: LoadVector,
}

impl Datagram {
    const GOSSIP: u8 = 0;
    const LOADS: u8 = 1;

    /// The bytes.
    ///
    /// # Errors
    /// It is larger than [`MAX_DATAGRAM`].
    pub fn encode(&self) -> Result<Bytes, CodecError> {
        let bytes: Vec<u8> = match self {
            Datagram::Gossip(packet) => [&[Self::GOSSIP], packet.as_ref()].concat(),
            Datagram::Loads(reports) => [vec![Self::LOADS], codec::encode(reports)?].concat(),
        };
        if bytes.len() > MAX_DATAGRAM {
            return Err(CodecError::TooLarge {
                len: bytes.len(),
                max: MAX_DATAGRAM,
            });
        }
        Ok(bytes.into())
    }

    /// Reads the bytes.
    ///
    /// # Errors
    /// [`CodecError::Malformed`].
    pub fn decode(bytes: &Bytes) -> Result<Self, CodecError> {
        match bytes.split_first() {
            Some((&Self::GOSSIP, _)) => Ok(Datagram::Gossip(bytes.slice(1..))),
            Some((&Self::LOADS, body)) => {
                let reports: Vec<LoadReport> = codec::decode(body)?;
                if reports.len() > MAX_REPORTS {
                    return Err(CodecError::Malformed(format!("{} load reports", reports.len())));
                }
                Ok(Datagram::Loads(reports))
            }
            _ => Err(CodecError::Malformed("unknown kind of datagram".into())),
        }
    }
}

/// What somebody with an invitation says.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct JoinRequest {
    /// The invitation.
    pub id: InviteId,
    /// The proof.
    pub secret: InviteSecret,
    /// The name that the node wants to have.
    pub name: String,
    /// Its host name.
    pub host: String,
    /// Its public key (SubjectPublicKeyInfo, DER).
    pub public_key: Vec<u8>,
    /// Port of its daemon.
    pub port: u16,
}

/// What it is told.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum JoinAnswer {
    /// It is a node now.
    Welcome {
        /// Its certificate (DER).
        certificate: Vec<u8>,
        /// The authority's certificate (DER).
        authority: Vec<u8>,
        /// The address that its question came from, with the port of its daemon.
        seen_as: SocketAddr,
        /// The nodes there are.
        members: Vec<MemberRecord>,
    },
    /// It is not; the text says why.
    Refused(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(min: u16, max: u16) -> Offer {
        Offer { min, max }
    }

    #[test]
    fn the_highest_common_version_is_spoken() {
        for (ours, theirs, expected) in [
            (offer(1, 1), offer(1, 1), 1),
            (offer(1, 4), offer(2, 9), 4),
            (offer(3, 9), offer(1, 3), 3),
            (offer(1, 2), offer(3, 4), 0),
            (offer(5, 6), offer(1, 4), 0),
        ] {
            let verdict = ours.answer(Offer::decode(&theirs.encode()).unwrap());
            assert_eq!(verdict.chosen, expected);
            let read = Verdict::decode(&verdict.encode(), theirs);
            if expected == 0 {
                let error = read.unwrap_err();
                assert_eq!(
                    error,
                    VersionError::Mismatch {
                        theirs: ours,
                        ours: theirs
                    }
                );
                assert!(error.to_string().contains("same version of mosd"));
            } else {
                assert_eq!(read.unwrap(), expected);
            }
        }
    }

    #[test]
    fn strangers_are_told_apart() {
        assert_eq!(Offer::decode(b"GET / HT"), Err(VersionError::Stranger));
        assert_eq!(Offer::decode(&offer(0, 3).encode()), Err(VersionError::Stranger));
        assert_eq!(Offer::decode(&offer(3, 2).encode()), Err(VersionError::Stranger));
        let lie = Verdict {
            chosen: 7,
            range: offer(1, 9),
        };
        assert_eq!(
            Verdict::decode(&lie.encode(), offer(1, 1)),
            Err(VersionError::Stranger)
        );
    }

    #[test]
    fn datagrams_are_bounded() {
        let load = LoadVector {
            cores: u32::MAX,
            runnable_milli: u32::MAX,
            speed: u32::MAX,
            memory_total_bytes: u64::MAX,
            memory_free_bytes: u64::MAX,
            guests: u32::MAX,
            admits: true,
        };
        let report = LoadReport {
            number: u32::MAX,
            age_ms: u32::MAX,
            load,
        };
        let full = Datagram::Loads(vec![report; MAX_REPORTS]);
        assert_eq!(Datagram::decode(&full.encode().unwrap()).unwrap(), full);
        assert!(Datagram::Loads(vec![report; 100]).encode().is_err());
        let gossip = Datagram::Gossip(Bytes::from_static(b"x"));
        assert_eq!(Datagram::decode(&gossip.encode().unwrap()).unwrap(), gossip);
        for bad in [&b""[..], &[9], &[1, 255, 255], &[1, 17]] {
            assert!(Datagram::decode(&Bytes::copy_from_slice(bad)).is_err());
        }
    }
}
