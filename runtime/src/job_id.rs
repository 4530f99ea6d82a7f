//! The name of a job.

use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// Names one job (one `mosrun` and its process tree) in the whole cluster.
///
/// `home` and `deputy_pid` tell a person where to look; `nonce` is random and keeps the names of different times apart
/// when a pid is used again.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode, Serialize, Deserialize,
)]
pub struct JobId {
    /// Number of the home node, from 1; 0 when the home node is in no cluster.
    pub home: u32,
    /// Pid of the deputy on the home node.
    pub deputy_pid: u32,
    /// Random.
    pub nonce: u64,
}

impl JobId {
    /// A new name for a job of node `home` whose deputy is `deputy_pid`.
    pub fn new(home: u32, deputy_pid: u32) -> Self {
        JobId {
            home,
            deputy_pid,
            nonce: rand::random(),
        }
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{:016x}", self.home, self.deputy_pid, self.nonce)
    }
}

/// The text is no job name.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no job name (HOME.PID.NONCE)")]
pub struct NotAJobId(String);

impl FromStr for JobId {
    type Err = NotAJobId;

    fn from_str(text: &str) -> Result<Self, NotAJobId> {
        let parse = || {
            let mut parts = text.split('.');
            let id = JobId {
                home: parts.next()?.parse().ok()?,
                deputy_pid: parts.next()?.parse().ok()?,
                nonce: u64::from_str_radix(parts.next()?, 16).ok()?,
            };
            parts.next().is_none().then_some(id)
        };
        parse().ok_or_else(|| NotAJobId(text.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let id = JobId::new(3, 4711);
        assert_eq!(id.to_string().parse::<JobId>().unwrap(), id);
        for bad in ["", "1.2", "1.2.3.4", "x.2.3", "1.2.g"] {
            assert!(bad.parse::<JobId>().is_err(), "{bad}");
        }
    }
}
