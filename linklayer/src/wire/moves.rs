//! Moves: what is said about a process that changes its node, and what is told of it afterwards.

use std::net::SocketAddr;
use std::ops::Range;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use super::MAX_BODY_BYTES;

/// Most runs of pages in one [`Present`].
pub const MAX_RUNS: usize = MAX_BODY_BYTES / 32;

/// Asks a supervisor for a link of its own for one process that comes: from home, or from another node.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Listen {
    /// The process.
    pub pid: i32,
    /// Fingerprint of the one-time key of who will connect.
    pub peer: [u8; 32],
}

/// Answer to [`Listen`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Listening {
    /// Where, and by which key it is known there; and why no process can run there before its memory has come (empty: it can).
    At(Place, String),
    /// Why not.
    Refused(String),
}

/// Where somebody waits for a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Place {
    /// The address.
    pub addr: SocketAddr,
    /// Fingerprint of the one-time key of who waits.
    pub fingerprint: [u8; 32],
    /// Whether it has pages in its page store, so that it is worth asking which ([`Kind::Known`](super::Kind::Known)).
    pub knows: bool,
}

/// How the memory of a process is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// As its size suggests.
    #[default]
    Auto,
    /// It stands still while its memory is sent.
    Freeze,
    /// Its memory is sent while it runs; what it changes meanwhile is sent again.
    Precopy,
    /// It runs at its new place at once; its memory is sent while it runs there.
    Postcopy,
    /// First as [`Mode::Precopy`] for some rounds, then as [`Mode::Postcopy`] for what is left.
    Hybrid,
}

/// A process with more memory than this gets a link of its own, bytes.
pub const LARGE_BYTES: u64 = 4 << 20;
/// From this size on a process runs while its memory is sent, when nobody says otherwise, bytes.
const PRECOPY_BYTES: u64 = 64 << 20;

impl Mode {
    /// Whether a process with so much memory is to run while that is sent.
    pub fn wants_precopy(self, size_bytes: u64) -> bool {
        match self {
            Mode::Auto => size_bytes >= PRECOPY_BYTES,
            Mode::Freeze | Mode::Postcopy => false,
            Mode::Precopy | Mode::Hybrid => true,
        }
    }

    /// Whether memory is to be sent after the process runs at its new place.
    pub fn is_lazy(self) -> bool {
        matches!(self, Mode::Postcopy | Mode::Hybrid)
    }

    /// What is done by a process whose mode this is said to be when nothing was sent while it ran at its old place.
    pub fn without_precopy(self) -> Mode {
        if self.is_lazy() {
            Mode::Postcopy
        } else {
            Mode::Freeze
        }
    }
}

/// How a process got to its place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// From one end straight to the other.
    #[default]
    Direct,
    /// From node to node by way of home.
    Home,
}

/// Asks a supervisor to send a process to another node, which waits for it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MoveTo {
    /// The process.
    pub pid: i32,
    /// Number of this attempt, greater than those of earlier ones.
    pub attempt: u64,
    /// Where the other supervisor waits.
    pub place: Place,
    /// The one-time key to show there (`OneTimeKey::to_bytes`).
    pub key: Vec<u8>,
    /// How.
    pub mode: Mode,
    /// It can run there before all of its memory has come.
    pub postcopy: bool,
}

/// A supervisor waits with the memory of a process that is going to come home.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Coming {
    /// The process.
    pub pid: i32,
    /// Where it waits.
    pub place: Place,
    /// The one-time key to show there (`OneTimeKey::to_bytes`).
    pub key: Vec<u8>,
    /// Memory is sent while it runs: what comes is kept until all has come, and a list of what still exists comes with it
    /// ([`Present`]). Otherwise it comes after the layout of the process.
    pub while_it_runs: bool,
}

/// A process stands ready at the other node, and still here: home decides. Answered with [`Errno`](super::Errno); 0: it runs there
/// now, forget it.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Moved {
    /// The process.
    pub pid: i32,
    /// What was done for it so far.
    pub report: MoveReport,
}

/// What a process is like that is going to come, so that it can be made ready for while it still runs elsewhere. All of it may be
/// otherwise when it comes.
#[derive(Clone, Debug, Encode, Decode)]
pub struct Prefetch {
    /// The files that it maps.
    pub files: Vec<super::FileRef>,
    /// Its private memory that is not of a file, as in an image. With none, its pages are kept until it is built.
    pub areas: Vec<crate::image::Area>,
    /// Home's host name.
    pub hostname: Vec<u8>,
}

/// Which pages a process that was sent while it ran has in the end: what else was sent of it is dropped.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Present {
    /// Begin and end of each run, in the order of addresses; at most [`MAX_RUNS`].
    pub runs: Vec<(u64, u64)>,
}

/// The bodies of the [`Kind::Present`](super::Kind::Present) frames that make up one list; at least one.
///
/// # Errors
/// Those of `sink`.
pub fn present<E>(runs: &[Range<u64>], sink: &mut dyn FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
    let mut rest = runs;
    loop {
        let (part, more) = rest.split_at(rest.len().min(MAX_RUNS));
        let runs = part.iter().map(|r| (r.start, r.end)).collect();
        sink(&super::encode(&Present { runs }))?;
        if more.is_empty() {
            return Ok(());
        }
        rest = more;
    }
}

/// Most ranges in one [`Want`].
pub const MAX_WANTED: usize = 1024;

/// Pages, by their addresses at the source, that somebody waits for at the target.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Want {
    /// Begin and end of each run; at most [`MAX_WANTED`].
    pub runs: Vec<(u64, u64)>,
}

/// A process has all of its memory at its new place, or will never have it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Settled {
    /// The process.
    pub pid: i32,
    /// What came after it ran there.
    pub after: After,
    /// Why it is lost; empty when it is not.
    pub lost: String,
}

/// Part of a move, for the message when it fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Reaching the other end.
    #[default]
    Reach,
    /// Sending memory while it runs.
    Precopy,
    /// Stopping it.
    Seize,
    /// Describing it.
    Dump,
    /// Sending what describes it, and its pages.
    Transfer,
    /// Building it at its new place.
    Restore,
    /// Going over to the new place.
    Resume,
    /// Sending the rest of its memory while it runs there.
    Postcopy,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Phase::Reach => "reaching the node",
            Phase::Precopy => "sending its memory while it runs",
            Phase::Seize => "stopping it",
            Phase::Dump => "describing it",
            Phase::Transfer => "sending it",
            Phase::Restore => "building it there",
            Phase::Resume => "going over",
            Phase::Postcopy => "sending the rest while it runs there",
        })
    }
}

/// How long the parts of a move took, in microseconds. The process stands still for all but the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Times {
    /// Sending memory while it runs.
    pub precopy_us: u64,
    /// Stopping it.
    pub seize_us: u64,
    /// Describing it.
    pub dump_us: u64,
    /// Sending the pages that were left.
    pub pages_us: u64,
    /// Waiting until the other end has everything.
    pub transfer_us: u64,
    /// Building it there.
    pub restore_us: u64,
    /// Going over.
    pub resume_us: u64,
}

impl Times {
    /// How long it stood still.
    pub fn frozen_us(&self) -> u64 {
        self.seize_us + self.dump_us + self.pages_us + self.transfer_us + self.restore_us + self.resume_us
    }
}

/// What became of the pages of a process that was moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct PageCounts {
    /// Pages, counted as often as they were sent.
    pub pages: u64,
    /// Of them, those of nothing but zeros, which went as a mark.
    pub zero: u64,
    /// Of them, those that went compressed.
    pub compressed: u64,
    /// Of them, those that went as a hash, because the receiver had them in its page store.
    pub stored: u64,
    /// Bytes that were sent for them.
    pub bytes: u64,
    /// Bytes of those that were in the receiver's page store.
    pub saved_bytes: u64,
}

/// What was done for a process after it ran at its new place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct After {
    /// Pages that were sent.
    pub pages: PageCounts,
    /// How often somebody had to wait for a page, be it a fresh one.
    pub faults: u64,
    /// From when it ran there to the last page, microseconds.
    pub last_page_us: u64,
}

impl std::ops::AddAssign for Times {
    fn add_assign(&mut self, other: Times) {
        self.precopy_us += other.precopy_us;
        self.seize_us += other.seize_us;
        self.dump_us += other.dump_us;
        self.pages_us += other.pages_us;
        self.transfer_us += other.transfer_us;
        self.restore_us += other.restore_us;
        self.resume_us += other.resume_us;
    }
}

impl std::ops::AddAssign for After {
    fn add_assign(&mut self, other: After) {
        self.pages += other.pages;
        self.faults += other.faults;
        self.last_page_us += other.last_page_us;
    }
}

impl std::ops::AddAssign for PageCounts {
    fn add_assign(&mut self, other: PageCounts) {
        self.pages += other.pages;
        self.zero += other.zero;
        self.compressed += other.compressed;
        self.stored += other.stored;
        self.bytes += other.bytes;
        self.saved_bytes += other.saved_bytes;
    }
}

/// A move that came about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct MoveReport {
    /// The parts.
    pub times: Times,
    /// Its pages that were sent before it ran at its new place.
    pub pages: PageCounts,
    /// What came afterwards.
    pub after: After,
    /// How often its memory was gone through while it ran.
    pub rounds: u32,
    /// The way it took.
    pub way: Way,
    /// How its memory was moved: never [`Mode::Auto`].
    pub mode: Mode,
    /// Why it was not done otherwise.
    pub note: String,
}

/// How far a move has got.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Progress {
    /// The process.
    pub pid: i32,
    /// What it is doing.
    pub phase: Phase,
    /// What was done so far.
    pub report: MoveReport,
    /// Pages that are still to be sent, as far as that is known.
    pub left: u64,
}
