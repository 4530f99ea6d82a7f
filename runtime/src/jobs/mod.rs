//! Jobs as seen from outside: what a deputy tells about its processes, and what it can be asked to do.
//!
//! Each deputy listens on `<rundir>/jobs/<its pid>.sock` ([`JobServer`]); `mosps`, `mosmigrate` and `mosctl status` visit
//! these sockets ([`client`]). No daemon is involved, so that a job can be seen and steered while `mosd` is down.
//! A connection carries any number of requests, each answered once. Only the job's own user and root are served.

pub mod client;
mod server;

pub use server::{JobControl, JobServer};

use bincode::{Decode, Encode};
use linklayer::wire::{Mode, MoveReport, Progress};
use serde::{Deserialize, Serialize};

use crate::job_id::JobId;

/// The node number that means "home" in [`JobRequest::Migrate`] and in [`ProcInfo::node`].
pub const HOME: u32 = 0;

/// One job: the process tree of one `mosrun`.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its name.
    pub id: JobId,
    /// Pid of the `mosrun` that the shell knows.
    pub front_pid: u32,
    /// Pid of the deputy.
    pub deputy_pid: u32,
    /// Pid of the program that was asked for; the job goes on when it has ended and descendants live.
    pub main_pid: u32,
    /// The job's user.
    pub uid: u32,
    /// When it started, milliseconds since 1970.
    pub started_unix_ms: u64,
    /// Its processes, in the order of their pids. Each is visible at home under that pid.
    pub processes: Vec<ProcInfo>,
    /// Sums over the whole life of the job, including processes that have ended.
    pub totals: Counters,
}

/// One process of a job.
#[derive(Debug, Clone, PartialEq, Encode, Decode, Serialize, Deserialize)]
pub struct ProcInfo {
    /// Pid, the same at home and away.
    pub pid: u32,
    /// Parent, as home sees it.
    pub ppid: u32,
    /// Name (`/proc/PID/comm`).
    pub comm: String,
    /// Where its user half is: a node number, or [`HOME`].
    pub node: u32,
    /// Number of its home node; 0 when that node is in no cluster.
    pub home: u32,
    /// How it got to where it is.
    pub arrival: Arrival,
    /// Threads.
    pub threads: u32,
    /// Resident memory where it runs, in bytes.
    pub rss_bytes: u64,
    /// CPU time used, user and system, at all places it has been, in milliseconds.
    pub cpu_ms: u64,
    /// What it has done so far.
    pub counters: Counters,
    /// Forwarded calls per second, over about the last second.
    pub calls_per_s: f64,
    /// Why it may not leave home, when it may not.
    pub stay: Option<String>,
}

/// How a process got to where it is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "by", content = "why")]
pub enum Arrival {
    /// It started at home, because that was asked for or is where its parent was.
    Home,
    /// A node was named (`-r`, `-NUMBER`).
    Named,
    /// The placement policy chose the node.
    Placed,
    /// It was drawn from a list (`-j`).
    Drawn,
    /// Its parent or the program before exec was there.
    Inherited,
    /// Somebody asked for it (`mosmigrate`).
    Asked,
    /// It was started without a deputy and put under one (`mosctl adopt`).
    Adopted,
    /// It went home because of a call that can be done exactly only there; the text names it.
    WentHome(String),
}

impl Arrival {
    /// A word for a table.
    pub fn word(&self) -> &'static str {
        match self {
            Arrival::Home => "home",
            Arrival::Named => "named",
            Arrival::Placed => "placed",
            Arrival::Drawn => "drawn",
            Arrival::Inherited => "inherited",
            Arrival::Asked => "asked",
            Arrival::Adopted => "adopted",
            Arrival::WentHome(_) => "went-home",
        }
    }
}

/// What was counted for a process or a job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Counters {
    /// Calls that were sent home.
    pub calls_forwarded: u64,
    /// Calls answered at the remote from the result cache.
    pub cache_hits: u64,
    /// Calls that might have been, and were not in the cache.
    pub cache_misses: u64,
    /// Cached results thrown away because a call changed them.
    pub cache_invalidations: u64,
    /// Moves from home to a node or between nodes.
    pub moves_out: u64,
    /// Moves back home.
    pub moves_home: u64,
}

impl std::ops::AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.calls_forwarded += other.calls_forwarded;
        self.cache_hits += other.cache_hits;
        self.cache_misses += other.cache_misses;
        self.cache_invalidations += other.cache_invalidations;
        self.moves_out += other.moves_out;
        self.moves_home += other.moves_home;
    }
}

/// What a deputy can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum JobRequest {
    /// Describe the job.
    List,
    /// Move process `pid` to node `to` ([`HOME`]: home). Answered when it is there, or when it turned out impossible.
    Migrate {
        /// The process.
        pid: u32,
        /// Where to.
        to: u32,
        /// How.
        mode: Mode,
    },
    /// Stop process `pid` where it is, or let it go on.
    Freeze {
        /// The process.
        pid: u32,
        /// Stop it.
        stop: bool,
    },
    /// Let all processes of the job go. Answered when that is done; the job is over then.
    Release,
}

/// A deputy's answer.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum JobAnswer {
    /// To [`JobRequest::List`].
    Job(JobInfo),
    /// To [`JobRequest::Migrate`], before the answer, any number of times: how far it is.
    Progress(Progress),
    /// To [`JobRequest::Migrate`]: the process is there.
    Moved(MoveReport),
    /// It was done.
    Done,
    /// It was not done, and the process is where it was; the text says why.
    Refused(String),
}
