//! A guest and its threads, as all threads of the supervisor see them.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use linklayer::image::SigAction;
use linklayer::memory::GuestMemory;
use lru::LruCache;
use parking_lot::Mutex;
use shim::memory::ProcessMemory;
use shim::notify::Listener;

use super::notify::Turn;

/// What a cached result is known by: thread (0: any), number of the call.
pub type Known = (i32, u32);

/// Pauses between attempts to go home for the same call: they double from the first to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Numbers for [`Guest::space`].
static SPACES: AtomicU64 = AtomicU64::new(1);

/// A guest: the user half of one process.
pub struct Guest {
    /// Its pid, which is also the pid of its vessel at home.
    pub pid: i32,
    /// Its pid as this node's supervisor sees it.
    pub outer: i32,
    /// Readable when it has ended: a guest's end makes no SIGCHLD (its exit signal is 0).
    pub exited: OwnedFd,
    /// Its memory.
    pub memory: ProcessMemory,
    /// Where its notifications arrive; children share their parent's.
    pub listener: Arc<Listener>,
    /// Whose turn it is to receive from it; shared as the listener is.
    pub turn: Arc<Turn>,
    /// Lets calls of the supervisor's own pass the filter.
    pub pass_key: u64,
    /// It is being captured: results that could be lost are handed to the tracer.
    pub freezing: AtomicBool,
    /// Signal dispositions, kept equal to the kernel's.
    pub actions: Mutex<Vec<SigAction>>,
    /// Results that cannot change unnoticed.
    pub identity: Mutex<LruCache<Known, i64>>,
    /// Program name of an exec in progress is about to replace it; its death is no news.
    pub leaving: AtomicBool,
    /// Its process runs elsewhere, or is no more: what is left of it at most keeps what is still to be sent. While a program is executed,
    /// which may fail, it is leaving and not vacated.
    pub vacated: AtomicBool,
    /// Signals and stops that have arrived from home and are not queued for it yet.
    pub incoming: AtomicU32,
    /// What it has got of home's signals.
    pub relayed: Mutex<Relayed>,
    /// Overrun counts of the timer signals that it took last, by timer.
    pub overruns: Mutex<LruCache<i32, i32>>,
    /// Threads that have ended or are about to, as the supervisor sees them.
    pub ended: Mutex<HashSet<i32>>,
    /// How often it could not go home for a call, and when that was last.
    pub setback: Mutex<Option<(u32, Instant)>>,
    /// Number of its address space: guests with the same one have the same memory (CLONE_VM).
    pub space: u64,
}

impl Guest {
    /// A guest without threads.
    ///
    /// # Errors
    /// It is gone already.
    pub fn new(
        pid: i32,
        outer: i32,
        listener: Arc<Listener>,
        turn: Arc<Turn>,
        pass_key: u64,
        actions: Vec<SigAction>,
    ) -> std::io::Result<Guest> {
        let capacity = std::num::NonZeroUsize::new(64).unwrap_or(std::num::NonZeroUsize::MIN);
        Ok(Guest {
            exited: shim::fd::of_process(outer)?,
            pid,
            outer,
            memory: ProcessMemory::new(outer),
            listener,
            turn,
            pass_key,
            freezing: AtomicBool::new(false),
            actions: Mutex::new(actions),
            identity: Mutex::new(LruCache::new(capacity)),
            leaving: AtomicBool::new(false),
            vacated: AtomicBool::new(false),
            incoming: AtomicU32::new(0),
            relayed: Mutex::default(),
            overruns: Mutex::new(LruCache::new(capacity)),
            ended: Mutex::default(),
            setback: Mutex::new(None),
            space: SPACES.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// Its process runs elsewhere, or is no more: its end is no news.
    pub fn vacate(&self) {
        self.leaving.store(true, Ordering::Release);
        self.vacated.store(true, Ordering::Release);
    }

    /// It could not go home for a call that it will make again.
    pub fn set_back(&self) {
        let mut setback = self.setback.lock();
        let before = setback.filter(|(_, when)| when.elapsed() < 2 * LONGEST_PAUSE);
        *setback = Some((before.map_or(0, |(n, _)| n) + 1, Instant::now()));
    }

    /// How long to wait before it is tried again to go home for a call: home may lack memory for the moment.
    pub fn pause(&self) -> Duration {
        match *self.setback.lock() {
            Some((times, when)) => {
                let pause = FIRST_PAUSE.saturating_mul(1 << times.min(16)).min(LONGEST_PAUSE);
                pause.saturating_sub(when.elapsed())
            }
            None => Duration::ZERO,
        }
    }

    /// The disposition of a signal.
    pub fn action(&self, signal: i32) -> SigAction {
        self.actions
            .lock()
            .get(signal as usize - 1)
            .copied()
            .unwrap_or_default()
    }

    /// Whether a signal that is not blocked would do nothing: it is ignored, or its default is to be ignored.
    pub fn ignores(&self, signal: i32) -> bool {
        match self.action(signal).handler {
            0 => matches!(
                signal,
                libc::SIGCHLD | libc::SIGURG | libc::SIGWINCH | libc::SIGCONT
            ),
            1 => true,
            _ => false,
        }
    }
}

/// Most signals that are kept during an exec.
const KEPT_MAX: usize = 4096;

/// Signals from home that a guest has got. An exec that succeeds discards the guest: home gives the new program what the
/// guest has not got, so during an exec it gets nothing more.
#[derive(Default)]
pub struct Relayed {
    count: u64,
    executing: u32,
    kept: Vec<linklayer::wire::Signal>,
}

impl Relayed {
    /// Whether the signal is to be queued now. To be called with the lock held until it is.
    pub fn admits(&mut self, signal: &linklayer::wire::Signal) -> bool {
        if self.executing > 0 {
            if self.kept.len() < KEPT_MAX {
                self.kept.push(signal.clone());
            }
            return false;
        }
        self.count += u64::from(signal.counted);
        true
    }

    /// A thread makes an exec. Gives how many signals the guest has got.
    pub fn begin_exec(&mut self) -> u64 {
        self.executing += 1;
        self.count
    }

    /// The exec has failed. Gives what came meanwhile.
    pub fn end_exec(&mut self) -> Vec<linklayer::wire::Signal> {
        self.executing = self.executing.saturating_sub(1);
        if self.executing > 0 {
            return Vec::new();
        }
        std::mem::take(&mut self.kept)
    }
}

/// What a guest thread is doing, as far as its notifications tell.
#[derive(Clone, Debug, PartialEq)]
pub enum InCall {
    /// It runs, or waits in a call of its own kernel.
    Idle,
    /// Its notification is being handled here; it takes no time to speak of.
    Busy(u64),
    /// Its call is in progress at home.
    Forwarded(Forwarded),
    /// The tracer holds its notification and will answer it.
    Held(u64),
}

/// A call in progress at home.
#[derive(Clone, Debug, PartialEq)]
pub struct Forwarded {
    /// The notification.
    pub notification: u64,
    /// Sequence number of the frame.
    pub seq: u64,
    /// The mask that is in effect during the call (ppoll and the like), if it brings one.
    pub mask: Option<u64>,
    /// Number of the call.
    pub nr: u32,
    /// When it began.
    pub started: Instant,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.guest.turn.leave();
    }
}

/// A wait with a relative timeout.
#[derive(Clone, Copy, Debug)]
pub struct Wait {
    /// The system call's number.
    pub nr: u32,
    /// Its arguments.
    pub args: [u64; 6],
    /// When it began.
    pub started: Instant,
    /// The timeout of a call that takes it from a timespec, as it was then: the kernel may write what is left to the same place.
    pub timeout: Option<Duration>,
}

impl Wait {
    /// One that begins now, in a call with these arguments.
    pub fn begin(nr: u32, args: &[u64; 6], memory: &dyn GuestMemory) -> Wait {
        let at = match i64::from(nr) {
            libc::SYS_nanosleep => args[0],
            libc::SYS_clock_nanosleep if args[1] & libc::TIMER_ABSTIME as u64 == 0 => args[2],
            libc::SYS_rt_sigtimedwait => args[2],
            _ => 0,
        };
        let timeout = || {
            let (seconds, nanoseconds) = (memory.read_u64(at).ok()?, memory.read_u64(at + 8).ok()?);
            (at != 0).then_some(Duration::new(seconds, u32::try_from(nanoseconds).ok()?))
        };
        Wait {
            nr,
            args: *args,
            timeout: timeout(),
            started: Instant::now(),
        }
    }
}

/// A thread of a guest.
pub struct Thread {
    /// Its tid, the vessel thread's as well.
    pub tid: i32,
    /// Its tid as the supervisor sees it.
    pub outer: i32,
    /// Its guest.
    pub guest: Arc<Guest>,
    /// What it is doing.
    pub call: Mutex<InCall>,
    /// Its last notification was answered with a restart code, which is not one of the kernel's own then.
    pub answered: AtomicBool,
    /// Signals that were queued for it here and that it has not taken yet.
    pub queued: AtomicU32,
    /// What it restarts with restart_syscall(2) is a sleep that began at home.
    pub sleeps_at_home: AtomicBool,
    /// The wait with a relative timeout that it began last.
    pub sleep: Mutex<Option<Wait>>,
    /// Calls forwarded.
    pub forwarded: AtomicU64,
}

impl Thread {
    /// A thread that has not called yet, and does not run yet.
    pub fn new(tid: i32, outer: i32, guest: Arc<Guest>) -> Thread {
        guest.turn.join();
        Thread {
            tid,
            outer,
            guest,
            call: Mutex::new(InCall::Idle),
            answered: AtomicBool::new(false),
            queued: AtomicU32::new(0),
            sleeps_at_home: AtomicBool::new(false),
            sleep: Mutex::new(None),
            forwarded: AtomicU64::new(0),
        }
    }

    /// Signals that are pending for it and not blocked by `mask` (its own mask when `None`), as a set.
    pub fn deliverable(&self, mask: Option<u64>) -> u64 {
        let Some(status) = SignalStatus::read(self.outer) else {
            return 0;
        };
        (status.pending_thread | status.pending_process) & !mask.unwrap_or(status.blocked)
    }

    /// Whether it blocks a signal now, be it by the mask of the call that it waits in.
    pub fn blocks(&self, signal: i32) -> bool {
        let mask = match &*self.call.lock() {
            InCall::Forwarded(f) if f.mask.is_some() => f.mask,
            _ => SignalStatus::read(self.outer).map(|s| s.blocked),
        };
        !(1..=64).contains(&signal) || mask.is_none_or(|m| m >> (signal - 1) & 1 == 1)
    }

    /// Whether a signal was queued for it that interrupts a call made under `mask`.
    pub fn must_return(&self, mask: Option<u64>) -> bool {
        // A temporary mask may unblock what has been pending since long before.
        (mask.is_some() || self.queued.load(Ordering::Acquire) > 0) && {
            let set = self.deliverable(mask);
            (1..=64).any(|s| set >> (s - 1) & 1 == 1 && !self.guest.ignores(s))
        }
    }
}

/// The signal lines of /proc/TID/status.
#[derive(Clone, Copy, Debug, Default)]
pub struct SignalStatus {
    /// SigPnd.
    pub pending_thread: u64,
    /// ShdPnd.
    pub pending_process: u64,
    /// SigBlk.
    pub blocked: u64,
}

impl SignalStatus {
    /// Whether one of these signals is pending.
    pub fn pends(&self, signals: &[i32]) -> bool {
        let pending = self.pending_thread | self.pending_process;
        signals.iter().any(|s| pending >> (s - 1) & 1 == 1)
    }

    /// Reads them; `None` when the thread is gone.
    pub fn read(tid: i32) -> Option<SignalStatus> {
        let text = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
        let mut status = SignalStatus::default();
        for line in text.lines() {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let field = match name {
                "SigPnd" => &mut status.pending_thread,
                "ShdPnd" => &mut status.pending_process,
                "SigBlk" => &mut status.blocked,
                _ => continue,
            };
            *field = u64::from_str_radix(value.trim(), 16).ok()?;
        }
        Some(status)
    }
}
