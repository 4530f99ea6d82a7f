//! The messages of a contact: what a supervisor and a deputy say to each other.
//!
//! A frame's [`Kind`] says how its payload is read. [`Kind::Call`], [`Kind::FileData`] and [`Kind::Pages`] carry
//! raw bytes because they are the hot path; every other body is a serde type in bincode's standard encoding with
//! a limit on what may be allocated. Both ends treat what arrives as hostile: an unknown kind or a malformed body
//! is an error that ends the contact, never a panic.
//!
//! Lanes: a guest thread's calls travel on the lane with its tid; what concerns a whole process travels on the
//! lane of its pid; lane 0 is the job's.

mod moves;

use bincode::{Decode, Encode};

pub use moves::*;

use crate::image::{ProcessImage, SigInfo};
use crate::stay::StayReason;

/// Version of everything in this module; the ends compare it in [`Hello`].
pub const PROTOCOL_VERSION: u32 = 1;

/// Flag of a [`Kind::Call`] frame (beside `frame::flags::REPLY`): a signal is pending for the call already, so that it
/// is interrupted as soon as it would wait.
pub const INTERRUPT_AT_ONCE: u16 = 2;

/// Flag of a [`Kind::Call`] frame: [`BLOCKS_TTIN`] and [`BLOCKS_TTOU`] say what the guest thread blocks. Sent with calls
/// that change a terminal, and when home asked for it ([`MASK_WANTED`]).
pub const MASK_KNOWN: u16 = 4;
/// Flag of a [`Kind::Call`] frame: the guest thread blocks SIGTTIN.
pub const BLOCKS_TTIN: u16 = 8;
/// Flag of a [`Kind::Call`] frame: the guest thread blocks SIGTTOU.
pub const BLOCKS_TTOU: u16 = 16;
/// Result of a [`Kind::Call`] that has not been made because what the thread blocks decides on it: to be sent again
/// with [`MASK_KNOWN`]. No call of the kernel's has this result.
pub const MASK_WANTED: i64 = i64::MIN + 0x7474;

/// Largest bincode body that is decoded, in bytes.
pub const MAX_BODY_BYTES: usize = 4 << 20;

/// Most bytes of a file whose hashes are asked for at a time.
pub const MAX_HASHED_BYTES: u32 = 64 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// Supervisor to deputy: execute a system call in the vessel thread `tid`. Body: `CallRequest::encode`;
    /// answer: result and out bytes.
    Call = 1,
    /// Supervisor to deputy: create a child process or thread ([`Clone`]); answer [`CloneReply`].
    Clone = 2,
    /// Supervisor to deputy: replace the program ([`Exec`]); answer [`Errno`] when it failed, else
    /// [`Kind::Discard`] follows.
    Exec = 3,
    /// Supervisor to deputy: the guest thread ends with this code ([`ExitCode`]); answer: empty.
    ExitThread = 4,
    /// Supervisor to deputy: the process ends with this code ([`ExitCode`]); no answer, [`Kind::Discard`] follows.
    ExitGroup = 5,
    /// Supervisor to deputy: the guest was killed by a signal of its own ([`Died`]).
    Died = 6,
    /// Supervisor to deputy: interrupt the call in progress ([`Interrupt`]).
    Interrupt = 7,
    /// Supervisor to deputy: send a range of a file ([`FileRead`]); answer: raw bytes ([`Kind::FileData`]).
    FileRead = 8,
    /// Raw bytes of a file.
    FileData = 9,
    /// Supervisor to deputy: which file is behind this descriptor, for mapping it ([`MapFile`]); answer
    /// [`MapFileReply`].
    MapFile = 10,
    /// Supervisor to deputy: the content of a held file ([`HeldFile`]) has changed: u64 number of the file, u64 offset (little-endian) and the
    /// bytes; without bytes: what has been written so far is to reach the disk. Answer [`Errno`].
    HeldWrite = 73,
    /// Deputy to supervisor: the content of a held file is wanted at home ([`HeldId`]). Answer [`Errno`]: 0 when all of it has been written
    /// and nobody maps it any more, EINPROGRESS when those who do are on their way home, with it.
    GiveBack = 74,
    /// Supervisor to deputy: nobody maps a held file any more, and all of it has been written ([`HeldId`]); answer [`Errno`].
    GivenBack = 75,
    /// Supervisor to deputy: a captured process comes home ([`Homecoming`]); answer [`Errno`] (0: lay-out is
    /// ready, send pages).
    Homecoming = 11,
    /// Pages of a process that moves: u64 address (little-endian) and the bytes, in either direction.
    Pages = 12,
    /// The same compressed (see [`crate::pages`]).
    PackedPages = 44,
    /// The same as hashes of pages that the receiver has (see [`crate::pages::known`]).
    KnownPages = 70,
    /// To a supervisor, on the link of a process that is going to come: which pages have you (empty body)? Answer: raw bytes
    /// ([`crate::pages::known::Known::encode`]).
    Known = 71,
    /// Supervisor to deputy: the hashes of the pages of a range of a file ([`FileRead`], at most [`MAX_HASHED_BYTES`]); answer: raw bytes, 32 for
    /// each page, up to the end of the file. What is missing to a whole last page counts as zeros.
    FileHashes = 72,
    /// Pages of memory that processes that move share: u64 id of the [`SharedObject`], u64 offset (little-endian) and the
    /// bytes, in either direction. On the lane of the process that announced the object.
    SharedPages = 50,
    /// Supervisor to deputy: all pages were sent ([`HomeCommit`]); answer [`Errno`] (0: they run at home now, forget
    /// them).
    HomeCommit = 13,
    /// Supervisor to deputy: a signal disposition changed ([`Action`]); no answer.
    Action = 14,
    /// Supervisor to deputy: open a file with this content at home ([`Synthetic`]); answer: i64 result.
    Synthetic = 15,
    /// Supervisor to deputy: a request to move did not come about ([`MoveFailed`]).
    MoveFailed = 16,
    /// Supervisor to deputy: read this file of /proc about the caller (body: its path); answer: its content.
    ReadProc = 18,
    /// Supervisor to deputy: resource use of the guests ([`Usage`]), once a second while it changes.
    Usage = 17,
    /// Deputy to supervisor: a process that is to be built ([`Launch`]); pages follow, then [`Kind::LaunchBuild`].
    Launch = 32,
    /// Deputy to supervisor: the vessel is ready, the guest may run ([`Pid`]); no answer. The commit of a launch.
    LaunchGo = 33,
    /// Deputy to supervisor: all pages were sent, build it ([`Pid`]); answer [`LaunchReady`].
    LaunchBuild = 42,
    /// To a supervisor, before [`Kind::LaunchBuild`]: which of the pages that were sent count ([`Present`]); several of these are
    /// one list.
    Present = 45,
    /// Supervisor to deputy: the guest stands still, so keep back what arrives for it ([`Pid`]); answer [`Errno`]. It ends with
    /// the move, or with [`Kind::MoveFailed`].
    KeepBack = 46,
    /// Deputy to supervisor: a process is going to come on a link of its own ([`Listen`]); answer [`Listening`].
    Listen = 47,
    /// Deputy to supervisor: send a process to another node ([`MoveTo`]).
    MoveTo = 48,
    /// Supervisor to deputy: a process stands ready at the other node ([`Moved`]); answer [`Errno`].
    Moved = 49,
    /// Supervisor to deputy: the memory of a process that is going to come home comes on a link of its own ([`Coming`]); answer
    /// [`Errno`] (0: home has connected).
    Coming = 53,
    /// To where a process is going to be, on such a link: what was sent of it while it ran is to be where it belongs (empty body) before
    /// more is sent or it is stopped; answer [`Errno`].
    InPlace = 63,
    /// Supervisor to deputy, on such a link: all memory has been sent (empty body); answer [`Errno`] (0: it is in the vessel).
    PagesEnd = 54,
    /// To a supervisor, on the link of a process that is going to come, before its pages: the files and the memory that it has so far
    /// ([`Prefetch`]); to a deputy likewise, without files; answer [`Errno`]: what can be made ready is.
    Prefetch = 55,
    /// To a supervisor, before [`Kind::LaunchBuild`], or to a deputy, before [`Kind::HomeCommit`]: the pages that come only when the
    /// process runs there ([`Present`]); several of these are one list.
    Later = 56,
    /// From there, on the link of the process: somebody waits for these pages ([`Want`]).
    Want = 57,
    /// From there: all pages have come (empty body); answer [`Errno`] (0: the process is forgotten where it came from).
    Whole = 58,
    /// To there: the rest of its memory cannot be had any more (the reason as text).
    SourceLost = 59,
    /// Supervisor to deputy: a process that ran before its memory had come has all of it, or is lost ([`Settled`]).
    Settled = 60,
    /// Supervisor to deputy: how far a move has got ([`Progress`]).
    Progress = 52,
    /// Deputy to supervisor: a signal for a guest ([`Signal`]).
    Signal = 34,
    /// Deputy to supervisor: stop ([`Pid`]): the vessel was stopped by a signal.
    Freeze = 35,
    /// Deputy to supervisor: continue ([`Pid`]).
    Thaw = 36,
    /// Deputy to supervisor: the process exists no longer; remove the guest ([`Pid`]).
    /// It goes on the lane of the process, as what begins every move of it does, so that it never meets a later guest of this pid.
    Discard = 37,
    /// Deputy to supervisor: send this process home ([`Bring`]).
    Bring = 38,
    /// Either way, first frame on lane 0 ([`Hello`]).
    Hello = 39,
    /// Deputy to supervisor: the job is over; kill what is left and end.
    End = 40,
    /// Deputy to supervisor: would this signal stop the guest, which leaves it to its default action ([`Stop`])? Answer
    /// [`WouldStop`].
    WouldStop = 61,
    /// Supervisor to deputy: the guest takes a stop signal that it had blocked ([`Stop`]).
    Stops = 62,
    /// Supervisor to deputy: a process is about to work on the memory of another one ([`WorksOn`]); answer [`IsHome`]. Both
    /// stay at home from then on, and the other one is brought there.
    WorksOn = 64,
    /// Supervisor to deputy: what do home's clocks show (empty body); answer [`Clocks`](crate::image::Clocks).
    Clock = 43,
    /// Deputy to supervisor: a process that comes shares memory with others that come ([`Share`]); before its [`Launch`].
    /// Answer [`Errno`].
    Share = 51,
    /// Supervisor to deputy: the guests that were created are running ([`Pid`]); a clone's parent was released.
    Cloned = 41,
}

impl Kind {
    /// The kind with this number.
    pub fn from_u16(n: u16) -> Option<Kind> {
        use Kind::*;
        const ALL: [Kind; 57] = [
            Call,
            Clone,
            Exec,
            ExitThread,
            ExitGroup,
            Died,
            Interrupt,
            FileRead,
            FileData,
            MapFile,
            Homecoming,
            Pages,
            SharedPages,
            Share,
            HomeCommit,
            Action,
            Synthetic,
            MoveFailed,
            Usage,
            Launch,
            LaunchGo,
            Signal,
            Freeze,
            Thaw,
            Discard,
            Bring,
            Hello,
            End,
            Cloned,
            LaunchBuild,
            ReadProc,
            Clock,
            PackedPages,
            Present,
            KeepBack,
            Listen,
            MoveTo,
            Moved,
            Progress,
            Coming,
            InPlace,
            PagesEnd,
            Prefetch,
            Later,
            Want,
            Whole,
            SourceLost,
            Settled,
            WouldStop,
            WorksOn,
            Stops,
            KnownPages,
            Known,
            FileHashes,
            HeldWrite,
            GiveBack,
            GivenBack,
        ];
        ALL.into_iter().find(|k| *k as u16 == n)
    }
}

/// A body that could not be decoded.
#[derive(Debug, thiserror::Error)]
#[error("malformed {what} from the peer: {why}")]
pub struct Malformed {
    /// Which body.
    pub what: &'static str,
    /// What the decoder said.
    pub why: String,
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MAX_BODY_BYTES>()
}

/// Encodes a body.
pub fn encode<T: Encode>(body: &T) -> Vec<u8> {
    // Encoding into memory fails for no type of this module.
    bincode::encode_to_vec(body, bincode::config::standard()).unwrap_or_default()
}

/// Decodes a body; trailing bytes are an error.
pub fn decode<T: Decode<()>>(bytes: &[u8]) -> Result<T, Malformed> {
    let what = std::any::type_name::<T>();
    match bincode::decode_from_slice::<T, _>(bytes, config()) {
        Ok((body, used)) if used == bytes.len() => Ok(body),
        Ok((_, used)) => Err(Malformed {
            what,
            why: format!("{} bytes too many", bytes.len() - used),
        }),
        Err(e) => Err(Malformed {
            what,
            why: e.to_string(),
        }),
    }
}

/// The id of the object, the offset and the bytes of a [`Kind::SharedPages`] or [`Kind::HeldWrite`] frame.
pub fn shared_pages(payload: &[u8]) -> Result<(u64, u64, &[u8]), Malformed> {
    let Some((head, data)) = payload.split_first_chunk::<16>() else {
        let (what, why) = ("pages of shared memory", "no address".into());
        return Err(Malformed { what, why });
    };
    let head = u128::from_le_bytes(*head);
    Ok((head as u64, (head >> 64) as u64, data))
}

/// First message of both ends.
#[derive(Clone, Debug, Encode, Decode)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u32,
    /// Number of the node the sender runs on.
    pub node: u32,
    /// Of a deputy: calls that can only be executed at home fail with ENOSYS instead of taking the process home.
    pub refuse_homeward: bool,
    /// Of a deputy: guests see home's CPUs.
    pub topology_of_home: bool,
    /// Of a deputy: instructions that its programs may use ([`crate::cpu::here`]).
    pub instructions: Vec<String>,
}

/// An errno, 0 for success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Errno(pub i32);

/// A peer did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum NotDone {
    /// Its answer makes no sense.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// It said why.
    #[error("{}", nix::errno::Errno::from_raw(*.0).desc())]
    Errno(i32),
}

/// Looks at an answer that is an [`Errno`].
///
/// # Errors
/// It is not 0, or none.
pub fn done(answer: &[u8]) -> Result<(), NotDone> {
    match decode(answer)? {
        Errno(0) => Ok(()),
        Errno(errno) => Err(NotDone::Errno(errno)),
    }
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Pid(pub i32);

/// A clone(2) as the vessel is to execute it.
#[derive(Clone, Debug, Encode, Decode)]
pub struct Clone {
    /// `CLONE_*` flags without the exit signal, as the guest gave them.
    pub flags: u64,
    /// Signal for the parent when the child ends; 0 for none.
    pub exit_signal: i32,
    /// The signal mask of the caller, which a thread or child inherits.
    pub sigmask: u64,
}

/// Answer to [`Clone`].
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct CloneReply {
    /// The new tid, or a negative errno.
    pub tid: i64,
    /// The descriptor made for `CLONE_PIDFD`, else -1.
    pub pidfd: i32,
}

/// An execve(2)/execveat(2).
#[derive(Clone, Debug, Encode, Decode)]
pub struct Exec {
    /// The call, as [`crate::syscall::CallRequest::encode`] gives it.
    pub call: Vec<u8>,
    /// The caller's signal mask, which survives an exec.
    pub sigmask: u64,
    /// Signals pending for the caller or its process, which survive an exec.
    pub pending: Vec<SigInfo>,
    /// How many of home's counted signals have been queued for the guest; it was given no later ones.
    pub relayed: u64,
}

/// How a thread or process ends by itself.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct ExitCode(pub i32);

/// A guest that was killed by a signal of its own.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct Died {
    /// Process.
    pub pid: i32,
    /// Signal number.
    pub signal: i32,
}

/// A process and a signal of job control.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct Stop {
    /// Process.
    pub pid: i32,
    /// Signal number.
    pub signal: i32,
}

/// A process and the one on whose memory it works.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct WorksOn {
    /// Process.
    pub pid: i32,
    /// The other one.
    pub other: Named,
}

/// How a process names another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Named {
    /// By the id of one of its threads.
    Thread(i32),
    /// By a descriptor of it (pidfd_open(2)).
    Descriptor(i32),
}

/// Whether a process is at home now, or is none of the job.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct IsHome(pub bool);

/// Whether it would: one of the guest's threads does not block the signal.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct WouldStop(pub bool);

/// Interrupts the call `seq` of thread `tid` if it is still in progress.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct Interrupt {
    /// Thread.
    pub tid: i32,
    /// Sequence number of the frame that carried the call.
    pub seq: u64,
}

/// What a file's content is known by: equal keys mean equal content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Encode, Decode)]
pub struct FileKey {
    /// Device, as st_dev.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Modification time, ns.
    pub mtime_ns: i64,
    /// Change time, ns.
    pub ctime_ns: i64,
    /// Counts up when the file is too freshly written for its times to tell versions apart; else 0.
    pub fresh: u64,
}

/// A file that is mapped by a process that moves.
#[derive(Clone, Debug, Encode, Decode)]
pub struct FileRef {
    /// Number by which areas and [`FileRead`] name it; unique in the job.
    pub id: u64,
    /// Content key.
    pub key: FileKey,
    /// Path at home, for /proc/PID/maps; not used to open anything.
    pub path: Vec<u8>,
}

/// Asks for a range of a file.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct FileRead {
    /// The file's number.
    pub id: u64,
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes, at most 1 MiB.
    pub len: u32,
}

/// Asks which file a mmap(2) is about; also checks it as mmap would.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct MapFile {
    /// mmap's arguments.
    pub len: u64,
    /// Protection bits.
    pub prot: i32,
    /// Flags.
    pub flags: i32,
    /// Descriptor.
    pub fd: i32,
    /// Offset in bytes.
    pub offset: u64,
}

/// Answer to [`MapFile`].
#[derive(Clone, Debug, Encode, Decode)]
pub enum MapFileReply {
    /// mmap fails with this errno.
    Errno(i32),
    /// Map this file.
    File(FileRef),
    /// Map this file shared and writable.
    Held(HeldFile),
    /// It can only be mapped at home.
    GoHome(crate::stay::StayReason),
}

/// A file that processes of the job, all of them on one node, are the only ones to have open and to map, and that home keeps everybody
/// else from opening: so it can be mapped shared and writable there.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HeldFile {
    /// Number by which areas ([`crate::image::AreaKind::Held`]) and [`FileRead`] name it; unique in the job.
    pub id: u64,
    /// Size, bytes: at most [`MAX_HELD_BYTES`].
    pub size: u64,
    /// Device.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
    /// Path at home, for /proc/PID/maps; not used to open anything.
    pub path: Vec<u8>,
}

/// The number of a held file.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct HeldId(pub u64);

/// Largest file that is held, bytes.
pub const MAX_HELD_BYTES: u64 = 64 << 20;

/// A process that comes home, without its pages.
#[derive(Clone, Debug, Encode, Decode)]
pub struct Homecoming {
    /// The process.
    pub image: ProcessImage,
    /// Why it comes.
    pub reason: crate::stay::StayReason,
    /// Itself and the processes that come with it, because they share memory: all are resumed by one [`HomeCommit`].
    pub group: Vec<i32>,
    /// Anonymous memory that it shares, by the ids in its areas. An object that several processes of the group name is the
    /// same.
    pub objects: Vec<SharedObject>,
    /// Its threads that wait for the child of a vfork(2).
    pub vforks: Vec<Vfork>,
    /// It is to run before all of its memory has come.
    pub postcopy: bool,
    /// The held files that it and the others of its group map. Their content has been written ([`Kind::HeldWrite`]).
    pub held: Vec<u64>,
    /// Pages of its memory were sent while it ran, on a link of its own, on which it is said which of them count.
    pub early: bool,
}

/// Anonymous memory that processes share (MAP_SHARED | MAP_ANONYMOUS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct SharedObject {
    /// The id by which areas name it ([`crate::image::AreaKind::SharedAnon`]).
    pub id: u64,
    /// Its size in bytes: what is mapped beyond gives SIGBUS.
    pub size: u64,
}

/// What a process shares with others that come with it. An object that several of them name is the same.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Share {
    /// The process.
    pub pid: i32,
    /// Its objects, by the ids in its areas, and whether they are accounted for as a whole.
    pub objects: Vec<(SharedObject, bool)>,
}

/// A thread that waits until a child that borrows its memory has executed a program or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Vfork {
    /// The thread.
    pub tid: i32,
    /// The child.
    pub child: i32,
}

/// The commit of a homecoming: from here on these processes run at home.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HomeCommit {
    /// Those that were announced together, and are still there.
    pub group: Vec<i32>,
}

/// A changed signal disposition.
#[derive(Clone, Copy, Debug, Encode, Decode)]
pub struct Action {
    /// Process.
    pub pid: i32,
    /// Signal number.
    pub signal: i32,
    /// `struct sigaction` of the kernel: handler, flags, restorer, mask.
    pub action: [u64; 4],
}

/// A read-only file that is made at home with content from the remote node.
#[derive(Clone, Debug, Encode, Decode)]
pub struct Synthetic {
    /// Name for /proc/PID/fd.
    pub name: Vec<u8>,
    /// open(2) flags.
    pub flags: i32,
    /// Content.
    pub content: Vec<u8>,
}

/// Why a process did not move; it goes on where it was.
#[derive(Clone, Debug, Encode, Decode)]
pub struct MoveFailed {
    /// Process.
    pub pid: i32,
    /// Number of the attempt ([`Bring::attempt`], [`MoveTo::attempt`]), or 0: the node began it by itself, or the process stood still for it.
    pub attempt: u64,
    /// In which part of the move.
    pub phase: Phase,
    /// It stood still for the move and goes on now: what home keeps back is wanted again, and what it was told of the process is
    /// void. Otherwise another move, of which home knows, may be under way.
    pub stood: bool,
    /// The reason in words.
    pub why: String,
}

/// Resource use of one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct GuestUsage {
    /// Process.
    pub pid: i32,
    /// Resident memory, bytes.
    pub rss_bytes: u64,
    /// User time, ms.
    pub utime_ms: u64,
    /// System time, ms.
    pub stime_ms: u64,
}

/// Resource use of a job's guests, and the cache's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Usage {
    /// Per guest.
    pub guests: Vec<GuestUsage>,
    /// Calls answered from the result cache.
    pub cache_hits: u64,
    /// Calls that had to ask home first.
    pub cache_misses: u64,
    /// Cached results dropped because a call changed them.
    pub cache_invalidations: u64,
}

/// A process to be built, without its pages.
#[derive(Clone, Debug, Encode, Decode)]
pub struct Launch {
    /// The process.
    pub image: ProcessImage,
    /// Files that its areas name.
    pub files: Vec<FileRef>,
    /// Host name of home.
    pub hostname: Vec<u8>,
    /// Overrun counts of the timer signals that it took last, by timer.
    pub overruns: Vec<(i32, i32)>,
}

/// Answer to [`Launch`].
#[derive(Clone, Debug, Encode, Decode)]
pub struct LaunchReady {
    /// Why it cannot run there, if so.
    pub refused: Option<StayReason>,
    /// How long building it took, microseconds.
    pub restore_us: u64,
    /// Begin and end of runs of pages that came as hashes and are not there, at most [`MAX_RUNS`]. With any, nothing was built: these
    /// are to be sent as they are, and the question is to be asked again.
    pub missing: Vec<(u64, u64)>,
}

/// A signal on its way to a guest.
#[derive(Clone, Debug, Encode, Decode)]
pub struct Signal {
    /// Process.
    pub pid: i32,
    /// Thread, or 0 for the process.
    pub tid: i32,
    /// Signal number.
    pub signal: i32,
    /// The kernel's siginfo, 128 bytes (a Vec because serde's arrays end at 32).
    pub info: Vec<u8>,
    /// Home counts it, to know at an exec what the guest has got.
    pub counted: bool,
}

/// A request to send a process home.
#[derive(Clone, Debug, Encode, Decode)]
pub struct Bring {
    /// Process.
    pub pid: i32,
    /// Number of this attempt, greater than those of earlier ones.
    pub attempt: u64,
    /// Why.
    pub reason: crate::stay::StayReason,
    /// How its memory is sent.
    pub mode: Mode,
    /// It can run at home before all of its memory has come.
    pub postcopy: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_round_trip_and_unknown_is_none() {
        for n in 0..200u16 {
            if let Some(k) = Kind::from_u16(n) {
                assert_eq!(k as u16, n);
            }
        }
        assert!(Kind::from_u16(0).is_none());
        assert_eq!((0..200u16).filter(|n| Kind::from_u16(*n).is_some()).count(), 57);
    }

    #[test]
    fn bodies_refuse_trailing_bytes_and_huge_lengths() {
        let mut b = encode(&Interrupt { tid: 7, seq: 9 });
        assert_eq!(decode::<Interrupt>(&b).map(|i| i.seq).ok(), Some(9));
        b.push(0);
        assert!(decode::<Interrupt>(&b).is_err());
        let huge = [253, 255, 255, 255, 255, 255, 255, 255, 127];
        assert!(decode::<Synthetic>(&huge).is_err());
    }
}
