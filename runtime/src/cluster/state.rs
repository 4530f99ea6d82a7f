//! What a node knows of the nodes.

use std::fmt;
use std::net::SocketAddr;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// Whether a node answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeStatus {
    /// It does.
    Alive,
    /// It did not answer a probe, and has not yet been declared down.
    Suspect,
    /// It does not, or it said goodbye.
    Down,
}

impl fmt::Display for NodeStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NodeStatus::Alive => "up",
            NodeStatus::Suspect => "suspect",
            NodeStatus::Down => "down",
        })
    }
}

/// How loaded a node is, as it measures itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct LoadVector {
    /// Cores that tasks may use.
    pub cores: u32,
    /// Tasks that run or want to run, smoothed over about two seconds, in thousandths. Waiting guests are not in it,
    /// unlike in the load average.
    pub runnable_milli: u32,
    /// Speed of a core; 1000 is the reference.
    pub speed: u32,
    /// Memory there is, in bytes.
    pub memory_total_bytes: u64,
    /// Memory that can be had without swapping (`MemAvailable`), in bytes.
    pub memory_free_bytes: u64,
    /// Supervisors (jobs of other nodes) that are here.
    pub guests: u32,
    /// Whether it takes guests that nobody named it for.
    pub admits: bool,
}

impl LoadVector {
    /// Tasks that run or want to run.
    pub fn runnable(&self) -> f64 {
        f64::from(self.runnable_milli) / 1000.0
    }
}

/// One node, as this node knows it.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize, Deserialize)]
pub struct NodeState {
    /// Its number, from 1.
    pub number: u32,
    /// Its name in the cluster.
    pub name: String,
    /// Its host name.
    pub host: String,
    /// Address of its daemon.
    pub addr: Option<SocketAddr>,
    /// Whether it is this node.
    pub is_self: bool,
    /// Whether it answers.
    pub status: NodeStatus,
    /// Its load, when it has told us.
    pub load: Option<LoadVector>,
    /// How old that is, in milliseconds.
    pub load_age_ms: Option<u64>,
    /// What this node placed there so lately that it cannot be in `load` yet.
    pub pending: u32,
}
