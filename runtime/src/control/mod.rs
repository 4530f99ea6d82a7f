//! The daemon's unix socket: what the programs of this machine may ask `mosd`.
//!
//! A connection begins with the preamble of both sides ([`PREAMBLE`] and a little-endian `u16` version), so that programs
//! and daemons of different versions find out before they misunderstand each other. Then come requests, each answered
//! once, as messages of [`crate::codec`]. Who asks is known from `SO_PEERCRED` and `SO_PEERGROUPS` (unix(7)); nothing
//! that a client says about itself is believed.

mod client;

pub use client::{Client, ClientError};

use std::net::SocketAddr;
use std::path::PathBuf;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::cluster::state::NodeState;
use crate::job_id::JobId;
use crate::pagestore::Counts;

/// The first bytes of both directions.
pub const PREAMBLE: [u8; 4] = *b"MOSd";
/// Version of the messages below.
pub const VERSION: u16 = 1;
/// Largest request, in bytes.
pub const MAX_REQUEST: usize = 4096;

/// What `mosd` can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Request {
    /// The nodes, as this one knows them.
    Nodes,
    /// A supervisor for a job, on some node.
    Supervisor(SupervisorRequest),
    /// Everything that `mosctl status` shows of the daemon.
    Status,
}

/// Asks for a supervisor. User and groups are those of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct SupervisorRequest {
    /// Number of the node where it is to be.
    pub node: u32,
    /// The job.
    pub job: JobId,
    /// Fingerprint of the deputy's one-time key.
    pub peer_fingerprint: [u8; 32],
}

/// Where a supervisor waits for the deputy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Placement {
    /// Address of its contact socket.
    pub addr: SocketAddr,
    /// Fingerprint of its one-time key.
    pub fingerprint: [u8; 32],
    /// Its pid on its node.
    pub pid: u32,
}

/// An answer of `mosd`.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum Answer {
    /// To [`Request::Nodes`], in the order of their numbers.
    Nodes(Vec<NodeState>),
    /// To [`Request::Supervisor`].
    Placed(Placement),
    /// To [`Request::Status`].
    Status(DaemonStatus),
    /// It was not done.
    Failed(Failure),
}

/// What a daemon says of itself.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Version of the program.
    pub version: String,
    /// Its pid.
    pub pid: u32,
    /// How long it has been running, in milliseconds.
    pub uptime_ms: u64,
    /// Number of this node.
    pub node: u32,
    /// Name of the cluster.
    pub cluster: String,
    /// Fingerprint of the cluster's certificate authority, in hexadecimal digits.
    pub cluster_fingerprint: String,
    /// Whether this node holds the authority's key, so that it can invite others.
    pub authority: bool,
    /// The configuration file that was read.
    pub config: Option<PathBuf>,
    /// Where it listens for other nodes.
    pub listen: SocketAddr,
    /// What other nodes are told to dial.
    pub advertised: SocketAddr,
    /// The nodes.
    pub nodes: Vec<NodeState>,
    /// Supervisors here, for jobs of other nodes.
    pub supervisors: Vec<HostedJob>,
    /// The page stores of the nodes that answered.
    pub page_stores: Vec<NodeStore>,
}

/// The page stores of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct NodeStore {
    /// Number of the node.
    pub node: u32,
    /// What they have and have done, those of all users together.
    pub counts: Counts,
}

/// A job of another node that has a supervisor here.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct HostedJob {
    /// The job.
    pub job: JobId,
    /// Its user.
    pub uid: u32,
    /// Pid of the supervisor.
    pub pid: u32,
}

/// Why something was not done. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
#[error("{text}")]
pub struct Failure {
    /// What to do about it, for a program.
    pub kind: FailureKind,
    /// For a person.
    pub text: String,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(kind: FailureKind, text: impl Into<String>) -> Self {
        Failure {
            kind,
            text: text.into(),
        }
    }
}

/// Kinds of [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum FailureKind {
    /// No such node in the cluster.
    UnknownNode,
    /// The node is known and could not be reached in time.
    NodeDown,
    /// The node answered, and does not want to or cannot.
    Refused,
    /// The other side does not understand us: different versions, or not one of our programs.
    Protocol,
    /// The caller may not ask this.
    Denied,
}
