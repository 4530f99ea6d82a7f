//! Invitations, as the text that a person carries from one node to the next.
//!
//! `mosrun-` and hexadecimal digits of: a version byte, a bincode body, and four bytes of checksum, so that a text that
//! was cut short is told from one that is wrong. The body has the cluster's fingerprint (so that the joining node knows
//! whom it may believe), where to ask, and a secret that is good for one join until it expires.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use bincode::{Decode, Encode};

use super::authority::ClusterFingerprint;
use crate::codec;

const PREFIX: &str = "mosrun-";
const VERSION: u8 = 1;
const CHECKSUM: usize = 4;
/// Longest token, in characters.
const MAX_TEXT: usize = 2048;
/// Most addresses in a token.
const MAX_ADDRESSES: usize = 8;

/// Names an invitation without giving its secret away.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub struct InviteId(pub [u8; 8]);

impl fmt::Display for InviteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for InviteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The secret of an invitation. Its text is shown in the token and nowhere else.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct InviteSecret(pub [u8; 32]);

impl InviteSecret {
    /// What may be kept of it.
    pub fn hash(&self) -> blake3::Hash {
        blake3::hash(&self.0)
    }
}

impl fmt::Debug for InviteSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InviteSecret")
    }
}

/// An invitation to join a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Token {
    /// The cluster's fingerprint.
    pub cluster: ClusterFingerprint,
    /// Where the node that holds the authority listens, the likeliest first.
    pub addresses: Vec<SocketAddr>,
    /// Which invitation this is.
    pub id: InviteId,
    /// The proof of having been invited.
    pub secret: InviteSecret,
    /// When it ends, in seconds since 1970. Told so that the joining side can say so; the authority decides.
    pub expires_unix_s: u64,
}

/// The text is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin as tokens do.
    #[error("this is no invitation: one begins with {PREFIX:?} (make one with `mosctl cluster invite`)")]
    NotAToken,
    /// It was damaged on the way.
    #[error("the invitation is incomplete or damaged: copy all of it")]
    Damaged,
    /// It comes from a newer or older program.
    #[error(
        "the invitation is of version {0}, this program understands {VERSION}: use the same version of mosctl on both nodes"
    )]
    Version(u8),
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = vec![VERSION];
        bytes.extend(codec::encode(self).map_err(|_| fmt::Error)?);
        let sum = blake3::hash(&bytes);
        bytes.extend_from_slice(&sum.as_bytes()[..CHECKSUM]);
        write!(f, "{PREFIX}{}", hex::encode(bytes))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let digits = text.trim().strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
        if digits.len() > MAX_TEXT {
            return Err(TokenError::Damaged);
        }
        let bytes = hex::decode(digits).map_err(|_| TokenError::Damaged)?;
        let (body, sum) = bytes.split_last_chunk::<CHECKSUM>().ok_or(TokenError::Damaged)?;
        if blake3::hash(body).as_bytes()[..CHECKSUM] != *sum {
            return Err(TokenError::Damaged);
        }
        let (version, body) = body.split_first().ok_or(TokenError::Damaged)?;
        if *version != VERSION {
            return Err(TokenError::Version(*version));
        }
        let token: Token = codec::decode(body).map_err(|_| TokenError::Damaged)?;
        if token.addresses.is_empty() || token.addresses.len() > MAX_ADDRESSES {
            return Err(TokenError::Damaged);
        }
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token {
            cluster: ClusterFingerprint([3; 32]),
            addresses: vec!["10.1.2.3:7117".parse().unwrap(), "[::1]:1".parse().unwrap()],
            id: InviteId([4; 8]),
            secret: InviteSecret([5; 32]),
            expires_unix_s: 1_900_000_000,
        }
    }

    #[test]
    fn text_and_back() {
        let text = token().to_string();
        assert_eq!(format!(" {text}\n").parse::<Token>().unwrap(), token());
    }

    #[test]
    fn damage_is_noticed() {
        let text = token().to_string();
        for cut in 0..text.len() {
            assert!(text[..cut].parse::<Token>().is_err(), "{cut}");
        }
        let mut other = text.clone().into_bytes();
        other[40] = if other[40] == b'0' { b'1' } else { b'0' };
        assert_eq!(
            String::from_utf8(other).unwrap().parse::<Token>(),
            Err(TokenError::Damaged)
        );
        assert_eq!("hello".parse::<Token>(), Err(TokenError::NotAToken));
        assert_eq!(
            format!("{PREFIX}{}", "00".repeat(4000)).parse::<Token>(),
            Err(TokenError::Damaged)
        );
        assert_eq!(format!("{PREFIX}é").parse::<Token>(), Err(TokenError::Damaged));
        assert!(!format!("{:?}", token()).contains("05"));
    }
}
