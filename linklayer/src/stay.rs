//! Stay reasons: why a process may not be, or may not stay, away from home.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

/// Why a process is at home, or must go there. One enum for logs, `mosps` and errors.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Encode, Decode)]
pub enum StayReason {
    /// Somebody asked for it.
    Asked,
    /// A call that can only be executed exactly at home.
    Call {
        /// Number of the call.
        nr: u32,
        /// What about it.
        note: String,
    },
    /// It maps a file shared and writable, which others may write too.
    SharedMapping,
    /// It shares memory with other processes.
    SharedMemory,
    /// It maps a device.
    DeviceMapping,
    /// Its program is not 64-bit x86.
    NotX86_64,
    /// Its program gains privileges when it is executed (set-user-id, file capabilities).
    Privileged,
    /// A resource limit leaves no room for what the deputy needs in it.
    Limits,
    /// It would dump core at home, where its core file belongs.
    CoreDump,
    /// No node takes it.
    NoNode(String),
    /// It was started at home and nobody asked to move it.
    StartedHome,
}

impl std::fmt::Display for StayReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StayReason::Asked => write!(f, "asked to be at home"),
            StayReason::Call { nr, note } => write!(f, "system call {nr} runs at home: {note}"),
            StayReason::SharedMapping => write!(f, "maps a file shared and writable"),
            StayReason::SharedMemory => write!(f, "shares memory with other processes"),
            StayReason::DeviceMapping => write!(f, "maps a device"),
            StayReason::NotX86_64 => write!(f, "not a 64-bit x86 program"),
            StayReason::Privileged => write!(f, "gains privileges when executed"),
            StayReason::Limits => write!(f, "its resource limits leave no room to move it"),
            StayReason::CoreDump => write!(f, "dumps core at home"),
            StayReason::NoNode(why) => write!(f, "no node takes it: {why}"),
            StayReason::StartedHome => write!(f, "started at home"),
        }
    }
}
