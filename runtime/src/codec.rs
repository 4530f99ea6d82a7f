//! Length-prefixed bincode messages, as every socket and pipe between our own programs carries them.
//!
//! A message is a little-endian `u32` length followed by that many bytes of bincode 2 (standard configuration). The
//! length is compared with the reader's limit before anything is allocated, and the decoder itself is limited too, so
//! that a length *inside* a message cannot ask for more memory than the message could hold. Bytes left over after the
//! value are an error: both ends agree on every byte.

use std::io::{Read, Write};

use bincode::{Decode, Encode};

/// The largest message on a control socket, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;

/// A message could not be read, written, or understood.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The socket or pipe failed. An end of file in the middle of a message is `UnexpectedEof`.
    #[error("message channel failed: {0}")]
    Io(#[from] std::io::Error),
    /// The peer closed the channel between two messages.
    #[error("the peer closed the channel")]
    Closed,
    /// The message is larger than the reader allows. Nothing of it was read.
    #[error("message of {len} bytes is above the limit of {max}")]
    TooLarge {
        /// Length that the prefix announced.
        len: usize,
        /// Limit of this channel.
        max: usize,
    },
    /// The bytes are no such message.
    #[error("malformed message: {0}")]
    Malformed(String),
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MAX_MESSAGE>()
}

/// Encodes `value` without a length prefix.
///
/// # Errors
/// [`CodecError::TooLarge`] when the result is above [`MAX_MESSAGE`].
pub fn encode<T: Encode>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::encode_to_vec(value, config()).map_err(|e| CodecError::Malformed(e.to_string()))?;
    if bytes.len() > MAX_MESSAGE {
        return Err(CodecError::TooLarge {
            len: bytes.len(),
            max: MAX_MESSAGE,
        });
    }
    Ok(bytes)
}

/// Decodes a value that fills `bytes` exactly.
///
/// # Errors
/// [`CodecError::Malformed`] for anything else.
pub fn decode<T: Decode<()>>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) =
        bincode::decode_from_slice(bytes, config()).map_err(|e| CodecError::Malformed(e.to_string()))?;
    if used != bytes.len() {
        return Err(CodecError::Malformed(format!(
            "{} bytes left over",
            bytes.len() - used
        )));
    }
    Ok(value)
}

/// Writes one message with its prefix, in one `write` where the channel takes it.
///
/// # Errors
/// As [`encode`], and the channel's own.
pub fn write_message<T: Encode>(out: &mut impl Write, value: &T) -> Result<(), CodecError> {
    let body = encode(value)?;
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&body);
    out.write_all(&bytes)?;
    out.flush()?;
    Ok(())
}

/// Reads one message of at most `max` bytes.
///
/// # Errors
/// [`CodecError::Closed`] when the channel ends before the first byte of the prefix; otherwise what went wrong.
pub fn read_message<T: Decode<()>>(input: &mut impl Read, max: usize) -> Result<T, CodecError> {
    let mut prefix = [0u8; 4];
    let mut have = 0;
    while have < prefix.len() {
        match input.read(&mut prefix[have..]) {
            Ok(0) if have == 0 => return Err(CodecError::Closed),
            Ok(0) => return Err(CodecError::Io(std::io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => have += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let len = u32::from_le_bytes(prefix) as usize;
    let max = max.min(MAX_MESSAGE);
    if len > max {
        return Err(CodecError::TooLarge { len, max });
    }
    let mut body = vec![0; len];
    input.read_exact(&mut body)?;
    decode(&body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_returns_as_it_was() {
        let mut pipe = Vec::new();
        write_message(&mut pipe, &("one".to_string(), 2u64)).unwrap();
        write_message(&mut pipe, &vec![3u32; 3]).unwrap();
        let mut input = pipe.as_slice();
        assert_eq!(
            read_message::<(String, u64)>(&mut input, 100).unwrap(),
            ("one".to_string(), 2)
        );
        assert_eq!(read_message::<Vec<u32>>(&mut input, 100).unwrap(), vec![3; 3]);
        assert!(matches!(
            read_message::<u8>(&mut input, 100),
            Err(CodecError::Closed)
        ));
    }

    #[test]
    fn lengths_are_bounded_outside_and_inside() {
        let huge = [0xffu8; 64];
        assert!(matches!(
            read_message::<Vec<u8>>(&mut huge.as_slice(), 100),
            Err(CodecError::TooLarge { .. })
        ));
        // varint marker for a u64 length, then a length that no memory could hold
        let mut inside = vec![253u8];
        inside.extend_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(
            decode::<Vec<u64>>(&inside),
            Err(CodecError::Malformed(_))
        ));
        assert!(matches!(decode::<u8>(&[1, 2]), Err(CodecError::Malformed(_))));
        let mut cut = Vec::new();
        write_message(&mut cut, &7u64).unwrap();
        cut.insert(4, 0);
        assert!(read_message::<String>(&mut &cut[..3], 100).is_err());
    }
}
