//! What can go wrong with a lab.

use std::io;
use std::path::PathBuf;

/// Why a lab command failed. Unless the text says otherwise, a failed `up` has been undone.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Namespaces, bridges and mounts for whole machines need root.
    #[error("a lab needs root: it makes namespaces, mounts and a bridge for every node (try it with sudo)")]
    NotRoot,
    /// The name cannot be used for a directory and a control group.
    #[error(
        "the lab name `{0}` is not usable: 1 to 32 letters, digits, `-`, `_` or `.`, not starting with `.`"
    )]
    BadName(String),
    /// A number given on the command line is out of its range.
    #[error("{0}")]
    BadOption(String),
    /// `up` for a lab that is up.
    #[error("lab `{0}` is already up (`mosctl lab down --name {0}` ends it)")]
    Exists(String),
    /// Another command is creating or ending the lab at this moment.
    #[error("lab `{0}` is being created or ended by another command")]
    Busy(String),
    /// No lab of that name.
    #[error("there is no lab `{0}` (`mosctl lab up --name {0}` makes one, `mosctl lab status` lists them)")]
    Unknown(String),
    /// The lab has no node of that number.
    #[error("lab `{lab}` has nodes 1 to {nodes}, and no node {node}")]
    NoSuchNode {
        /// Name of the lab.
        lab: String,
        /// What was asked for.
        node: String,
        /// How many nodes there are.
        nodes: u32,
    },
    /// A node's first process is gone: the node is dead.
    #[error("node {node} of lab `{lab}` is dead (`mosctl lab down --name {lab}` cleans up)")]
    NodeDead {
        /// Name of the lab.
        lab: String,
        /// Number of the node.
        node: u32,
    },
    /// A program that the lab uses is not installed.
    #[error("`{tool}` was not found: the lab needs it (Debian: apt-get install {package})")]
    MissingTool {
        /// The program.
        tool: &'static str,
        /// The Debian package it is in.
        package: &'static str,
    },
    /// A program that the lab uses failed.
    #[error("{tool} failed: {message}")]
    Tool {
        /// The program with its arguments.
        tool: String,
        /// What it wrote, or how it ended.
        message: String,
    },
    /// No user of that name or number.
    #[error("there is no user `{0}` in /etc/passwd")]
    NoUser(String),
    /// No control group controller for `--cpu-quota`.
    #[error("--cpu-quota needs a writable `cpu` control group controller: {0}")]
    NoCpuController(String),
    /// A node could not be set up; the text comes from the node.
    #[error("{who}: {message}")]
    Keeper {
        /// The hub or the node.
        who: String,
        /// What it said.
        message: String,
    },
    /// The daemons of the nodes did not become a cluster.
    #[error("the cluster of the lab: {0}")]
    Cluster(String),
    /// Something survived `down`.
    #[error("lab `{lab}` could not be ended completely: {what}")]
    Leftover {
        /// Name of the lab.
        lab: String,
        /// What is left.
        what: String,
    },
    /// The record of a lab cannot be read.
    #[error("the record {path} is damaged: {message}")]
    Record {
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A system call failed.
    #[error("{tried}: {source}")]
    System {
        /// What was tried, on what.
        tried: String,
        /// What the kernel answered.
        source: io::Error,
    },
}

impl LabError {
    /// For `map_err`: names what was tried.
    pub(crate) fn system<E: Into<io::Error>>(tried: impl Into<String>) -> impl FnOnce(E) -> Self {
        let tried = tried.into();
        move |e| Self::System {
            tried,
            source: e.into(),
        }
    }
}
