//! What the tracer thread, the contact's threads and the waiters of a deputy share.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::Sender;
use linklayer::quic::{Handler, Link, ReplyTo};
use linklayer::stay::StayReason;
use linklayer::wire;
use nix::sys::eventfd::EventFd;
use parking_lot::{Mutex, RwLock};
use shim::shared_memory::Objects;
use shim::track::Tracker;

use crate::calls::Worker;
use crate::files::Files;
use crate::held::HeldFiles;
use crate::hop::HopReady;
use crate::launch::Arrived;
use crate::outward::{Done, Ready, Wish};

/// What the deputy needs of the cluster; implemented by the program around it.
pub trait Cluster: Send + Sync {
    /// Where a program that was just executed by a process on the node `from` (0: at home) is to run: a node's number, or `None` for
    /// home.
    fn choose(&self, from: u32) -> Option<u32>;
    /// Opens a contact to a new supervisor of this job on a node. Blocks; the error is for people.
    fn contact(&self, node: u32, handler: Arc<dyn Handler>) -> Result<Link, String>;
}

/// What is asked of the tracer thread.
pub enum Command {
    /// The supervisor built (or refused) a guest.
    LaunchReady {
        /// Process.
        pid: i32,
        /// What it got there with, or why not.
        result: anyhow::Result<Box<Arrived>>,
    },
    /// Create a child or thread.
    Clone(ReplyTo, wire::Clone),
    /// The vessel's clone call ended; with an error when `ret` is negative.
    CloneEnded {
        /// The thread that called.
        tid: i32,
        /// Its result.
        ret: i64,
    },
    /// Execute a program.
    Exec(ReplyTo, wire::Exec),
    /// The vessel's exec call came back, so it failed.
    ExecFailed {
        /// The thread that called.
        tid: i32,
        /// Its result.
        ret: i64,
    },
    /// A thread ends.
    ExitThread(ReplyTo, i32),
    /// A process ends.
    ExitGroup(ReplyTo, i32),
    /// A guest was killed by a signal of its own.
    Died(wire::Died),
    /// Its process can die of the same now.
    Dies(i32, i32),
    /// A guest takes a stop signal that it had blocked.
    Stops(wire::Stop),
    /// Interrupt a call in progress.
    Interrupt(wire::Interrupt),
    /// A process comes home.
    Homecoming(ReplyTo, Box<wire::Homecoming>),
    /// Its vessel has the layout, or could not take it.
    LaidOut(ReplyTo, Box<wire::Homecoming>, anyhow::Result<Duration>),
    /// The pages of these are all there.
    HomeCommit(ReplyTo, wire::HomeCommit),
    /// It does not leave this node.
    MoveFailed(u32, wire::MoveFailed),
    /// A disposition changed.
    Action(wire::Action),
    /// A call that may have sent its own process a signal has ended; its answer comes after the signal.
    Settle(Box<crate::calls::Pending>, i64),
    /// Signals for one thread alone come from now on.
    Unblock(Box<crate::calls::Pending>, i64),
    /// Make a call that a terminal may stop.
    Expose(Box<crate::calls::Pending>),
    /// It has ended with this reply.
    Exposed(Box<crate::calls::Pending>, Vec<u8>),
    /// Bring a process home; the answer tells when it is there, or why it is not.
    Bring(i32, StayReason, wire::Mode, Done),
    /// Move a process to a node; the answer tells when it runs there, or why it does not.
    Out(i32, Box<Wish>),
    /// The way out is ready in this attempt, or cannot be made so.
    Depart(i32, u64, Result<Box<Ready>, String>),
    /// Watch the memory of a process that is to leave in this attempt.
    Track(i32, u64, Sender<Result<Tracker, String>>),
    /// The node to which a guest is to go in this attempt waits for it.
    HopReady(i32, u64, Result<HopReady, String>),
    /// A guest (of this node) stands ready at another one.
    Moved(ReplyTo, u32, Box<wire::Moved>),
    /// A guest stands still so as to move.
    KeepBack(ReplyTo, i32),
    /// A process is about to work on the memory of another one.
    WorksOn(ReplyTo, wire::WorksOn),
    /// Stop a process where it is, or let it go on.
    Freeze(i32, bool, Sender<Result<(), String>>),
    /// Let all processes of the job go, and end; the answer tells when that is done, or why it is not.
    Release(Sender<Result<(), String>>),
    /// The supervisor built (or refused) a group of guests.
    TogetherReady(
        Box<crate::together::Sent>,
        Result<(Link, wire::MoveReport), String>,
    ),
    /// The vessel of this process, which has this catcher, drops its pages: nobody needs them any more. Who is given waits for that.
    Empty(i32, i32, Sender<()>),
    /// The pages of a process come while it still runs away: its vessel is to have room for private memory in these areas.
    Room(
        i32,
        Vec<linklayer::image::Area>,
        Sender<Result<shim::restore::Room, String>>,
    ),
    /// A process that ran before its memory had come has all of it, or is lost.
    Settled(wire::Settled),
    /// A process at home has all of its memory, or its memory is lost.
    Complete(i32, Arc<shim::postcopy::Pager>, shim::postcopy::End),
    /// The contact with this number to the supervisor of a node is gone.
    Lost(u32, u64, String),
}

/// A contact to the supervisor of a node.
#[derive(Clone)]
pub struct Contacted {
    /// Which of those to that node.
    pub number: u64,
    /// The contact.
    pub link: Link,
}

/// Counters of one process, kept across its moves.
#[derive(Default)]
pub struct Counters {
    /// Calls executed for its guests.
    pub forwarded: AtomicU64,
}

/// State shared by all threads of a deputy.
pub struct Shared {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    /// Vessel threads by tid.
    pub workers: RwLock<HashMap<i32, Arc<Worker>>>,
    /// The catchers of the vessels, by process.
    pub catchers: RwLock<HashMap<i32, i32>>,
    /// Files that guests map.
    pub files: Files,
    /// Files that guests map shared and writable.
    pub held: HeldFiles,
    /// Open contacts by node.
    pub links: Mutex<HashMap<u32, Contacted>>,
    /// Held by who opens the contact to a node.
    opening: Mutex<HashMap<u32, Arc<Mutex<()>>>>,
    /// The cluster.
    pub cluster: Arc<dyn Cluster>,
    /// What is known of the job's processes, for `mosps`.
    pub table: Mutex<HashMap<i32, ProcessView>>,
    /// Processes whose pages may be written because they are on their way home, each with a living thread.
    pub homecoming: Mutex<HashMap<i32, i32>>,
    /// What processes on their way home share, by the node that they come from and its id there.
    pub objects: Objects<(u32, u64)>,
    /// Memory that comes home in front of its process.
    pub coming: crate::coming::Coming,
    /// Processes at home whose memory is still coming.
    pub incomplete: Mutex<HashMap<i32, Arc<shim::postcopy::Pager>>>,
    /// How far moves that are under way have got, by process.
    pub progress: Mutex<HashMap<i32, wire::Progress>>,
    /// Last usage report of each node.
    pub usage: Mutex<HashMap<u32, wire::Usage>>,
}

/// A process of the job as others may see it.
#[derive(Clone, Debug)]
pub struct ProcessView {
    /// Process.
    pub pid: i32,
    /// Node it runs on; 0 is home.
    pub node: u32,
    /// How it got there, in words.
    pub how: String,
    /// Why it is at home, if it is.
    pub stay: Option<StayReason>,
    /// Forwarded calls so far.
    pub forwarded: u64,
    /// Moves from home to a node, and between nodes.
    pub moves_out: u64,
    /// Moves back home.
    pub moves_home: u64,
}

impl Shared {
    /// The shared state and the tracer's end of it.
    pub fn new(commands: Sender<Command>, wake: Arc<EventFd>, cluster: Arc<dyn Cluster>) -> Arc<Shared> {
        Arc::new(Shared {
            commands,
            wake,
            workers: RwLock::default(),
            catchers: RwLock::default(),
            files: Files::default(),
            held: HeldFiles::new(),
            links: Mutex::default(),
            opening: Mutex::default(),
            cluster,
            table: Mutex::default(),
            homecoming: Mutex::default(),
            objects: Default::default(),
            coming: crate::coming::Coming::default(),
            incomplete: Mutex::default(),
            progress: Mutex::default(),
            usage: Mutex::default(),
        })
    }

    /// Hands a command to the tracer thread.
    pub fn post(&self, command: Command) {
        // The receiver lives as long as the tracer; after it nothing is left to do.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }

    /// The worker of a thread.
    pub fn worker(&self, tid: i32) -> Option<Arc<Worker>> {
        self.workers.read().get(&tid).cloned()
    }

    /// Counts a forwarded call.
    pub fn count(&self, pid: i32) {
        if let Some(view) = self.table.lock().get_mut(&pid) {
            view.forwarded += 1;
        }
    }

    /// The contact to a node, opened when there is none.
    pub fn contact(self: &Arc<Self>, node: u32) -> Result<Link, String> {
        // A second one would have a supervisor of its own, and end with it.
        let opening = self.opening.lock().entry(node).or_default().clone();
        let _one_at_a_time = opening.lock();
        if let Some(contacted) = self.links.lock().get(&node) {
            return Ok(contacted.link.clone());
        }
        let number = next_id();
        let handler = Arc::new(crate::contact::Contact::new(self.clone(), node, number));
        let link = self.cluster.contact(node, handler)?;
        let contacted = Contacted {
            number,
            link: link.clone(),
        };
        self.links.lock().insert(node, contacted);
        // Who was told of it before it was there has found nothing.
        if let Some(why) = link.lost() {
            self.post(Command::Lost(node, number, why.to_string()));
        }
        Ok(link)
    }
}

/// A counter for ids that are unique in this deputy.
pub fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
