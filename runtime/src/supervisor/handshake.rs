//! What `mosd` and the supervisor that it starts say to each other, once, over the supervisor's stdin and stdout.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use bincode::{Decode, Encode};

use crate::codec::{self, CodecError};
use crate::job_id::JobId;

/// Largest message of the handshake, in bytes. Supplementary groups are its only list: at most 65,536 of them
/// (`NGROUPS_MAX`).
const MAX_HANDSHAKE: usize = 512 << 10;

/// Everything a supervisor is told when it starts.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SupervisorConfig {
    /// The job whose guests it will own.
    pub job: JobId,
    /// Number of the node it runs on, from 1.
    pub node: u32,
    /// Name of the node it runs on.
    pub node_name: String,
    /// Number of the job's home node, from 1.
    pub home_node: u32,
    /// Name of the job's home node.
    pub home_name: String,
    /// User that the job belongs to. The supervisor has this uid already when `mosd` is root; else it has `mosd`'s.
    pub uid: u32,
    /// Primary group of the job's user.
    pub gid: u32,
    /// Supplementary groups of the job's user.
    pub groups: Vec<u32>,
    /// Fingerprint of the deputy's one-time key: whoever shows another one is refused.
    pub peer_fingerprint: [u8; 32],
    /// The local address on which the home node reached this one: listen here (on any port).
    pub listen: IpAddr,
    /// What the guests may use of this node.
    pub limits: SupervisorLimits,
    /// The page store of the job's user, if there is one.
    pub store: Option<StoreConfig>,
}

/// Where a page store is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StoreConfig {
    /// Its directory (see [`crate::pagestore`]).
    dir: Vec<u8>,
    /// What it may take, bytes.
    pub limit_bytes: u64,
}

impl StoreConfig {
    /// A store of at most so many bytes.
    pub fn new(dir: &Path, limit_bytes: u64) -> StoreConfig {
        StoreConfig {
            dir: dir.as_os_str().as_encoded_bytes().to_vec(),
            limit_bytes,
        }
    }

    /// Its directory.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(OsString::from_vec(self.dir.clone()))
    }
}

/// Bounds for the guests of one job on one node, from `[guests]` of `mosd.toml`. `None` is no bound.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct SupervisorLimits {
    /// Added to the nice value of the guests, 0..=19.
    pub nice: i32,
    /// Guests of this job at a time.
    pub max_guests: Option<u32>,
    /// Memory of the guests of this job together, in bytes.
    pub max_memory_bytes: Option<u64>,
}

/// How to reach a supervisor that is listening.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct SupervisorReady {
    /// Address of its contact socket.
    pub addr: SocketAddr,
    /// Fingerprint of its one-time key.
    pub fingerprint: [u8; 32],
    /// Its pid, for the daemon's accounts.
    pub pid: u32,
}

/// The supervisor's one answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum SupervisorAnswer {
    /// It listens.
    Ready(SupervisorReady),
    /// It cannot work on this node, and ends; the text says why.
    Failed(String),
}

impl SupervisorConfig {
    /// Reads the configuration, as the supervisor does from its stdin.
    ///
    /// # Errors
    /// The channel's, or a message that is no configuration.
    pub fn read_from(input: &mut impl Read) -> Result<Self, CodecError> {
        codec::read_message(input, MAX_HANDSHAKE)
    }

    /// Writes the configuration, as `mosd` does.
    ///
    /// # Errors
    /// The channel's.
    pub fn write_to(&self, out: &mut impl Write) -> Result<(), CodecError> {
        codec::write_message(out, self)
    }
}

impl SupervisorAnswer {
    /// Reads the answer, as `mosd` does.
    ///
    /// # Errors
    /// The channel's ([`CodecError::Closed`] when the supervisor died without one), or a message that is no answer.
    pub fn read_from(input: &mut impl Read) -> Result<Self, CodecError> {
        codec::read_message(input, MAX_HANDSHAKE)
    }

    /// Writes the answer, as the supervisor does to its stdout.
    ///
    /// # Errors
    /// The channel's.
    pub fn write_to(&self, out: &mut impl Write) -> Result<(), CodecError> {
        codec::write_message(out, self)
    }
}

/// Gives `mosd` its answer, and then lets go of stdin and stdout (they become `/dev/null`), so that neither process
/// holds anything of the other. Standard error stays: it is where the log goes.
///
/// # Errors
/// The answer could not be written (`mosd` is gone: nobody will connect), or `/dev/null` cannot be opened.
pub fn answer_and_detach(answer: &SupervisorAnswer) -> Result<(), CodecError> {
    let result = answer.write_to(&mut std::io::stdout().lock());
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&null).map_err(std::io::Error::from)?;
    nix::unistd::dup2_stdout(&null).map_err(std::io::Error::from)?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions() {
        let config = SupervisorConfig {
            job: JobId::new(1, 77),
            node: 2,
            node_name: "two".into(),
            home_node: 1,
            home_name: "one".into(),
            uid: 1000,
            gid: 100,
            groups: vec![100, 27],
            peer_fingerprint: [7; 32],
            listen: "127.0.0.1".parse().unwrap(),
            limits: SupervisorLimits {
                nice: 5,
                max_guests: Some(10),
                max_memory_bytes: None,
            },
            store: Some(StoreConfig::new("/x".as_ref(), 5)),
        };
        let mut pipe = Vec::new();
        config.write_to(&mut pipe).unwrap();
        assert_eq!(SupervisorConfig::read_from(&mut pipe.as_slice()).unwrap(), config);

        let answer = SupervisorAnswer::Ready(SupervisorReady {
            addr: "127.0.0.1:9".parse().unwrap(),
            fingerprint: [9; 32],
            pid: 5,
        });
        let mut pipe = Vec::new();
        answer.write_to(&mut pipe).unwrap();
        assert_eq!(SupervisorAnswer::read_from(&mut pipe.as_slice()).unwrap(), answer);
        assert!(matches!(
            SupervisorAnswer::read_from(&mut [].as_slice()),
            Err(CodecError::Closed)
        ));
    }
}
