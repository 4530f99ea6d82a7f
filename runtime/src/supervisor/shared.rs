//! What all threads of a supervisor share.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam_channel::Sender;
use linklayer::frame::Header;
use linklayer::image::{Clocks, SigInfo};
use linklayer::quic::{Link, LinkError};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind};
use nix::sys::eventfd::EventFd;
use parking_lot::{Mutex, RwLock};
use shim::shared_memory::Objects;

use super::arrivals::Arrivals;
use super::files::{FileStore, Known};
use super::guest::{Guest, Thread};
use super::starter::Starter;
use super::stored::Stored;

/// What is asked of the supervisor's tracer thread.
pub enum Command {
    /// Build a guest.
    Build(Box<super::contact::Build>),
    /// Begin to build one.
    Begin(super::begun::Begin),
    /// What a link (by its number) has begun of a process is not needed.
    Abandon(i32, u64),
    /// Run it.
    LaunchGo(i32),
    /// Relay a signal.
    /// ... and the guest in whose count of arrived signals it is.
    Signal(wire::Signal, Option<Arc<Guest>>),
    /// What is pending for a thread, as seen here, and for its process.
    Pending(i32, Sender<Vec<SigInfo>>),
    /// Answer a notification with a result that needs the tracer: a restart code, or one that came while freezing.
    Reply {
        /// The thread, as seen here.
        outer: i32,
        /// Its notification.
        notification: u64,
        /// Result for the guest.
        ret: i64,
        /// The call's own signal mask.
        mask: Option<(u64, u64)>,
    },
    /// Home executed the clone (or not).
    Cloned {
        /// The thread that clones, as seen here.
        outer: i32,
        /// Home's answer.
        reply: wire::CloneReply,
    },
    /// Stop a guest; counted as a signal is.
    Freeze(i32, Option<Arc<Guest>>),
    /// Let it run.
    Thaw(i32),
    /// Remove a guest without a word.
    Discard(i32),
    /// Send a guest home.
    GoHome(i32, StayReason),
    /// Home has taken over (or not) a group that was sent.
    WentHome(u64, Result<(), super::departure::Failure>),
    /// Everything is ready for a guest to go to another node.
    Depart(Box<super::departure::Departure>),
    /// It runs there now, or it does not leave.
    Departed(Arc<Guest>, Result<(), super::departure::Failure>),
    /// Watch the memory of a guest.
    Track(Arc<Guest>, Sender<Result<shim::track::Tracker, String>>),
    /// Home keeps back what arrives for a guest, or there is nothing any more to be kept back for.
    Quiet(i32, u64, bool),
    /// A guest that ran before its memory had come has all of it, or has ended.
    Settled,
    /// Everything ends.
    End(String),
}

/// What every process of the job has from home.
#[derive(Clone, Default)]
struct OfHome {
    vdso: Vec<u8>,
    hostname: Vec<u8>,
}

/// State shared by all threads of a supervisor.
pub struct Shared {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    /// Starts threads for the tracer.
    pub starter: Starter,
    link: OnceLock<Link>,
    /// Guests by home pid.
    pub guests: RwLock<HashMap<i32, Arc<Guest>>>,
    /// Guest threads by the tid that this node sees.
    pub threads: RwLock<HashMap<i32, Arc<Thread>>>,
    /// Home's files.
    pub files: FileStore,
    /// Those that guests map shared and writable.
    pub held: super::held::HeldFiles,
    /// The page store.
    pub stored: Stored,
    /// What processes share that are being built.
    pub objects: Objects<u64>,
    /// Result cache counters.
    pub cache_hits: AtomicU64,
    /// Calls whose result was not in the cache.
    pub cache_misses: AtomicU64,
    /// Results dropped.
    pub cache_invalidations: AtomicU64,
    /// The job's user at home.
    pub uid: u32,
    /// Show the guests home's CPUs instead of this node's.
    pub topology_of_home: AtomicBool,
    /// Instructions that the job's programs may use and that this node's processor lacks.
    pub lacks: OnceLock<String>,
    /// Calls that only home can execute fail with ENOSYS.
    pub refuse_homeward: AtomicBool,
    ahead: Mutex<Option<Clocks>>,
    /// Processes that come.
    pub arrivals: Arrivals,
    /// The local address to listen at for them.
    pub listen: IpAddr,
    of_home: Mutex<OfHome>,
}

/// How often home is asked for its clocks; the answer that came the soonest counts.
const CLOCK_SAMPLES: u32 = 8;

impl Shared {
    /// Shared state without a contact yet.
    pub fn new(
        commands: Sender<Command>,
        wake: Arc<EventFd>,
        starter: Starter,
        stored: Stored,
        uid: u32,
        file_limit_bytes: u64,
        listen: IpAddr,
    ) -> Shared {
        Shared {
            stored,
            uid,
            commands,
            wake,
            starter,
            link: OnceLock::new(),
            guests: RwLock::default(),
            threads: RwLock::default(),
            files: FileStore::new(file_limit_bytes),
            held: Default::default(),
            objects: Objects::default(),
            cache_hits: AtomicU64::new(0),
            cache_misses: AtomicU64::new(0),
            cache_invalidations: AtomicU64::new(0),
            topology_of_home: AtomicBool::new(false),
            lacks: OnceLock::new(),
            refuse_homeward: AtomicBool::new(false),
            ahead: Mutex::new(None),
            arrivals: Arrivals::default(),
            listen,
            of_home: Mutex::default(),
        }
    }

    /// Keeps what a process brings with it of home.
    pub fn remember_home(&self, launch: &wire::Launch) {
        let mut of_home = self.of_home.lock();
        of_home.hostname.clone_from(&launch.hostname);
        if !launch.image.vdso.is_empty() {
            of_home.vdso.clone_from(&launch.image.vdso);
        }
    }

    /// The content of home's vDSO.
    pub fn vdso_of_home(&self) -> Vec<u8> {
        self.of_home.lock().vdso.clone()
    }

    /// Home's host name.
    pub fn hostname_of_home(&self) -> Vec<u8> {
        self.of_home.lock().hostname.clone()
    }

    /// Makes the contact known.
    pub fn set_link(&self, link: Link) {
        let _ = self.link.set(link);
    }

    /// The contact. It is set before the first guest exists.
    pub fn link(&self) -> Result<&Link, LinkError> {
        self.link.get().ok_or(LinkError::Closed)
    }

    /// Hands a command to the tracer thread.
    pub fn post(&self, command: Command) {
        // The receiver lives as long as the tracer, which ends the process.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }

    /// Counts something that has arrived for a guest, and that its calls must not overtake on their way back. The
    /// tracer counts down.
    pub fn arrived(&self, pid: i32) -> Option<Arc<Guest>> {
        let guest = self.guests.read().get(&pid).cloned()?;
        guest.incoming.fetch_add(1, Ordering::AcqRel);
        Some(guest)
    }

    /// A thread of a guest is about to end: its memory is reached through one that lives.
    pub fn thread_ends(&self, thread: &Thread) {
        let guest = &thread.guest;
        let mut ended = guest.ended.lock();
        ended.insert(thread.outer);
        if guest.memory.pid() == thread.outer
            && let Some(other) = self
                .threads
                .read()
                .values()
                .find(|t| t.guest.pid == guest.pid && !ended.contains(&t.outer))
        {
            guest.memory.set_pid(other.outer);
        }
    }

    /// The guest thread that this node knows as `outer`.
    pub fn thread(&self, outer: i32) -> Option<Arc<Thread>> {
        self.threads.read().get(&outer).cloned()
    }

    /// Sends a message without an answer.
    pub fn tell(&self, lane: i32, kind: Kind, body: &[u8]) {
        let Ok(link) = self.link() else { return };
        let header = Header {
            kind: kind as u16,
            flags: 0,
            tid: lane,
            seq: link.next_seq(),
            len: body.len() as u32,
        };
        if let Err(e) = link.send(lane as u32, header, &[body]) {
            tracing::debug!(?kind, error = %e, "message not sent");
        }
    }

    /// Whether the contact is lost for good.
    pub fn is_cut_off(&self) -> bool {
        self.link().is_ok_and(|link| link.lost().is_some())
    }

    /// Asks home and waits for the answer. Not for the thread that delivers frames.
    ///
    /// # Errors
    /// The contact is lost.
    pub fn ask(&self, lane: i32, tid: i32, kind: Kind, body: &[u8]) -> Result<Vec<u8>, LinkError> {
        let link = self.link()?;
        let header = Header {
            kind: kind as u16,
            flags: 0,
            tid,
            seq: link.next_seq(),
            len: body.len() as u32,
        };
        Ok(link.call(lane as u32, header, &[body])?.1)
    }

    /// How far home's clocks are ahead of this node's, measured once. It is wrong by less than half of a round trip, and a
    /// move takes several: no process sees its clock go back when it moves.
    ///
    /// # Errors
    /// The contact is lost, or home answers nonsense.
    pub fn clocks_ahead(&self) -> std::io::Result<Clocks> {
        let mut known = self.ahead.lock();
        if let Some(ahead) = *known {
            return Ok(ahead);
        }
        let mut best: Option<(i64, Clocks)> = None;
        for _ in 0..CLOCK_SAMPLES {
            let before = shim::capture::clocks();
            let answer = self.ask(0, 0, Kind::Clock, &[]).map_err(std::io::Error::other)?;
            let after = shim::capture::clocks();
            let home: Clocks = wire::decode(&answer).map_err(std::io::Error::other)?;
            let trip_ns = (after - before).monotonic_ns;
            if best.is_none_or(|(least, _)| trip_ns < least) {
                let ahead = home - before;
                let there = Clocks {
                    monotonic_ns: ahead.monotonic_ns.saturating_sub(trip_ns / 2),
                    boottime_ns: ahead.boottime_ns.saturating_sub(trip_ns / 2),
                };
                best = Some((trip_ns, there));
            }
        }
        if let Some((trip_ns, ahead)) = best {
            tracing::debug!(trip_ns, ahead_ns = ahead.monotonic_ns, "home's clocks");
            *known = Some(ahead);
        }
        Ok(known.unwrap_or_default())
    }

    /// The same as far as it was measured, which it was before the first process was built.
    pub fn known_ahead(&self) -> Clocks {
        self.ahead.lock().unwrap_or_default()
    }

    /// The content of one of home's files: what of it is neither with this job nor in the page store is fetched.
    ///
    /// # Errors
    /// The contact is lost, or there is no memory for it.
    pub fn file(&self, file: &wire::FileRef) -> std::io::Result<Arc<super::files::Stored>> {
        let hashes = |offset, len| {
            let body = wire::encode(&wire::FileRead {
                id: file.id,
                offset,
                len,
            });
            let answer = self.ask(0, 0, Kind::FileHashes, &body);
            answer.map_err(std::io::Error::other)
        };
        let known = Known {
            stored: &self.stored,
            hashes: &hashes,
        };
        self.files
            .get(file, &known, |offset, len| self.read_file(file.id, offset, len))
    }

    /// A range of one of home's files.
    ///
    /// # Errors
    /// The contact is lost.
    pub(super) fn read_file(&self, id: u64, offset: u64, len: u32) -> std::io::Result<Vec<u8>> {
        let body = wire::encode(&wire::FileRead { id, offset, len });
        self.ask(0, 0, Kind::FileRead, &body)
            .map_err(std::io::Error::other)
    }

    /// Whether a thread of the guest would take the signal at once.
    pub fn would_stop(&self, stop: &wire::Stop) -> bool {
        let threads = self.threads.read();
        let mut its = threads
            .values()
            .filter(|t| t.guest.pid == stop.pid && !t.guest.ended.lock().contains(&t.outer))
            .peekable();
        // One that is being made inherits a mask that home knows no more of than this node.
        its.peek().is_none() || its.any(|t| !t.blocks(stop.signal))
    }

    /// The guest that has this thread.
    pub fn owner_of(&self, tid: i32) -> Option<i32> {
        self.threads
            .read()
            .values()
            .find(|t| t.tid == tid)
            .map(|t| t.guest.pid)
    }

    /// How many threads a guest has.
    pub fn threads_of(&self, pid: i32) -> usize {
        self.threads
            .read()
            .values()
            .filter(|t| t.guest.pid == pid)
            .count()
    }

    /// The job's user.
    pub fn home_uid(&self) -> u32 {
        self.uid
    }
}
