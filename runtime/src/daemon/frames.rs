//! Messages of [`crate::codec`] on asynchronous channels.

use std::time::Duration;

use bincode::{Decode, Encode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::codec::{self, CodecError};

/// Writes one message.
///
/// # Errors
/// As [`codec::write_message`].
pub async fn write<T: Encode>(out: &mut (impl AsyncWrite + Unpin), value: &T) -> Result<(), CodecError> {
    let body = codec::encode(value)?;
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&body);
    out.write_all(&bytes).await?;
    out.flush().await?;
    Ok(())
}

/// Reads one message of at most `max` bytes.
///
/// # Errors
/// As [`codec::read_message`].
pub async fn read<T: Decode<()>>(input: &mut (impl AsyncRead + Unpin), max: usize) -> Result<T, CodecError> {
    let mut prefix = [0u8; 4];
    let mut have = 0;
    while have < prefix.len() {
        match input.read(&mut prefix[have..]).await? {
            0 if have == 0 => return Err(CodecError::Closed),
            0 => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
            n => have += n,
        }
    }
    let len = u32::from_le_bytes(prefix) as usize;
    if len > max {
        return Err(CodecError::TooLarge { len, max });
    }
    // grows with what arrives: a length alone, of who knows whom, reserves little
    let mut body = Vec::with_capacity(len.min(16 << 10));
    input.take(len as u64).read_to_end(&mut body).await?;
    if body.len() < len {
        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
    }
    codec::decode(&body)
}

/// Runs a future for at most `limit`; `None` when that was not enough.
pub async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    tokio::time::timeout(limit, future).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_pass_and_bad_ones_do_not() {
        let (mut a, mut b) = tokio::io::duplex(64);
        let sent = "x".repeat(1000);
        let both = tokio::join!(write(&mut a, &sent), read::<String>(&mut b, 2000));
        both.0.unwrap();
        assert_eq!(both.1.unwrap(), sent);
        a.write_all(&[255; 4]).await.unwrap();
        assert!(matches!(
            read::<String>(&mut b, 2000).await,
            Err(CodecError::TooLarge { .. })
        ));
        a.write_all(&[9, 0, 0, 0, 1]).await.unwrap();
        drop(a);
        assert!(matches!(
            read::<String>(&mut b, 2000).await,
            Err(CodecError::Io(_))
        ));
        assert!(matches!(
            read::<String>(&mut b, 2000).await,
            Err(CodecError::Closed)
        ));
    }
}
