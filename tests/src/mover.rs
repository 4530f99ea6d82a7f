//! Somebody who moves every process of a job about for as long as it lives.
//!
//! It asks the deputies as `mosps` and `mosmigrate` do, through the sockets of their jobs, without starting a program each time.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use linklayer::wire::{Mode, MoveReport};
use runtime::jobs::client::{self, JobError};
use runtime::jobs::{HOME, ProcInfo};

use crate::faults::Fault;
use crate::lab::Lab;

/// From the beginning of one move of a process to that of its next.
pub const PERIOD: Duration = Duration::from_millis(50);
/// What it has for itself between two moves at least, however long they take. It is not longer at home, where it does in no time
/// what it was started for.
const BREATH: Duration = Duration::from_millis(10);
/// How often new processes are looked for.
const LOOK: Duration = Duration::from_millis(10);
/// How long a move may take, and how long one may be under way when its process has ended.
const PATIENCE: Duration = Duration::from_secs(30);

/// Each way from one place to another once.
const WAYS: [u32; 6] = [3, HOME, 2, HOME, 3, 2];
const MODES: [Mode; 5] = [
    Mode::Auto,
    Mode::Postcopy,
    Mode::Freeze,
    Mode::Hybrid,
    Mode::Precopy,
];

/// Words of the answer of a process that is placed just now, or moves with others.
const MOVING: &str = "is being moved at this moment";
/// Words of the answers that say why a process is not moved just now, and that nothing has happened to it. Any other failure
/// is an error of ours.
const REFUSALS: [&str; 10] = [
    // It has just executed another program, or ended.
    "it is not here any more",
    // It was faster.
    "it is on its way home",
    MOVING,
    "; try again later",
    "maps a file shared and writable",
    "shares memory with other processes",
    "(CLONE_VM)",
    "maps a device",
    "its resource limits leave no room",
    "gains privileges",
];
/// Words of the answers that say that there is no such process any more.
const ENDED: [&str; 4] = [
    "is not one of this job",
    "the process has ended",
    "the deputy ends",
    "ended while it was worked on",
];

/// What came of the moves of some processes.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Processes that were seen.
    pub processes: usize,
    /// Moves that came about, by where to and mode.
    pub moved: HashMap<(u32, &'static str), usize>,
    /// Moves that were refused with a reason, by it.
    pub refused: HashMap<&'static str, usize>,
    /// Moves that failed in another way.
    pub failed: Vec<String>,
    /// The longest time that one process was seen to live, and how often it was moved and refused for good.
    pub longest: (Duration, usize, usize),
    /// The longest move.
    pub slowest: Duration,
}

impl Tally {
    /// All moves that came about.
    pub fn moves(&self) -> usize {
        self.moved.values().sum()
    }

    /// All that were refused.
    pub fn refusals(&self) -> usize {
        self.refused.values().sum()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (alive, moved, refused) = self.longest;
        write!(
            f,
            "{} processes, {} moves {:?}, {} refused {:?}; the longest lived {alive:?}: {moved} moves, {refused} refused; slowest {:?}",
            self.processes,
            self.moves(),
            self.moved,
            self.refusals(),
            self.refused,
            self.slowest,
        )
    }
}

#[derive(Debug)]
struct State {
    stop: AtomicBool,
    tally: Mutex<Tally>,
}

impl State {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// Moves all processes of all jobs whose home is node 1 of a lab, from node to node and home, until it is stopped.
#[derive(Debug)]
pub struct Mover {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl Mover {
    /// Begins.
    pub fn start(lab: &Lab) -> Self {
        let rundir = rundir(lab);
        let state = Arc::new(State {
            stop: AtomicBool::new(false),
            tally: Mutex::default(),
        });
        let thread = std::thread::spawn({
            let state = state.clone();
            move || look(&state, &[rundir])
        });
        Self {
            state,
            thread: Some(thread),
        }
    }

    /// Waits for the moves that are under way, and tells what was done.
    ///
    /// # Panics
    /// When a move is not answered.
    pub fn stop(mut self) -> Tally {
        self.state.stop.store(true, Ordering::Release);
        let thread = self.thread.take().expect("it was started");
        let until = Instant::now() + PATIENCE;
        while !thread.is_finished() {
            assert!(Instant::now() < until, "a move is not answered");
            std::thread::sleep(LOOK);
        }
        thread.join().expect("the mover does not panic");
        self.state.tally().clone()
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Release);
    }
}

/// Moves of single processes, asked for as `mosmigrate` does.
#[derive(Debug)]
pub struct Steering {
    rundirs: [PathBuf; 1],
}

impl Steering {
    /// Of the jobs whose home is node 1 of a lab.
    pub fn of(lab: &Lab) -> Self {
        Self {
            rundirs: [rundir(lab)],
        }
    }

    /// Moves a process, and gives what is reported of it, or why it did not move.
    pub fn migrate(&self, pid: u32, to: u32, mode: Mode) -> Result<MoveReport, String> {
        let (socket, _, pid) = client::find(&self.rundirs, pid).map_err(|e| e.to_string())?;
        client::migrate(&socket, pid, to, mode, &mut |_| {}).map_err(|e| e.to_string())
    }

    /// The same with a fault armed that may be in what comes later. Where all had been sent while the process ran, and nothing has changed
    /// since, as on a machine on which it does not get on, there is nothing of that: then it goes back and is moved again.
    pub fn migrate_into(
        &self,
        pid: u32,
        (from, to): (u32, u32),
        mode: Mode,
        fault: &Fault,
    ) -> Result<MoveReport, String> {
        loop {
            let report = self.migrate(pid, to, mode)?;
            if mode != Mode::Hybrid || report.after.pages.pages != 0 || fault.happened() {
                return Ok(report);
            }
            self.migrate(pid, from, Mode::Freeze)?;
        }
    }
}

/// The rundir of node 1, where the sockets of its jobs are, as this machine sees it.
fn rundir(lab: &Lab) -> PathBuf {
    let rundir = runtime::rundir::path();
    lab.root_of(1).join(rundir.strip_prefix("/").unwrap_or(&rundir))
}

/// Looks for processes, and has each of them moved by a thread of its own.
fn look(state: &Arc<State>, rundirs: &[PathBuf]) {
    let mut known: HashMap<u32, JoinHandle<()>> = HashMap::new();
    let mut count = 0;
    while !state.stopped() {
        known.retain(|_, thread| !thread.is_finished());
        for (socket, job) in client::all(rundirs) {
            for process in job.processes {
                if known.contains_key(&process.pid) {
                    continue;
                }
                state.tally().processes += 1;
                let (pid, shared, socket) = (process.pid, state.clone(), socket.clone());
                let turn = count;
                count += 1;
                known.insert(
                    pid,
                    std::thread::spawn(move || walk(&shared, socket, process, turn)),
                );
            }
        }
        std::thread::sleep(LOOK);
    }
    for thread in known.into_values() {
        let _ = thread.join();
    }
}

/// Moves one process until it has ended.
fn walk(state: &State, socket: PathBuf, process: ProcInfo, turn: usize) {
    let born = Instant::now();
    let (mut moved, mut refused) = (0, 0);
    let mut round = turn;
    loop {
        let begun = Instant::now();
        let to = WAYS[round % WAYS.len()];
        let mode = MODES[(round + round / WAYS.len()) % MODES.len()];
        let result = client::migrate(&socket, process.pid, to, mode, &mut |_| {});
        let took = begun.elapsed();
        let mut tally = state.tally();
        tally.slowest = tally.slowest.max(took);
        let why = match result {
            Ok(report) => {
                let mode = match report.mode {
                    Mode::Precopy => "precopy",
                    Mode::Postcopy => "postcopy",
                    Mode::Hybrid => "hybrid",
                    _ => "freeze",
                };
                *tally.moved.entry((to, mode)).or_default() += 1;
                moved += 1;
                String::new()
            }
            // Its deputy has ended with it.
            Err(JobError::Connect { .. } | JobError::Channel(_)) => ENDED[2].into(),
            Err(e) => e.to_string(),
        };
        let ended = ENDED.iter().any(|words| why.contains(words));
        if let Some(reason) = REFUSALS.into_iter().find(|words| why.contains(words)) {
            *tally.refused.entry(reason).or_default() += 1;
            refused += usize::from(reason != MOVING);
        } else if !why.is_empty() && !ended {
            let (pid, comm) = (process.pid, &process.comm);
            tally.failed.push(format!(
                "{comm} ({pid}) to {to} by {mode:?} after {took:?}: {why}"
            ));
        }
        if took > PATIENCE {
            let (pid, comm) = (process.pid, &process.comm);
            tally
                .failed
                .push(format!("{comm} ({pid}) to {to} by {mode:?} took {took:?}"));
        }
        let alive = born.elapsed();
        if alive > tally.longest.0 {
            tally.longest = (alive, moved, refused);
        }
        drop(tally);
        if ended || state.stopped() {
            return;
        }
        if !why.contains(MOVING) {
            round += 1;
            if to != HOME {
                std::thread::sleep(PERIOD.saturating_sub(took));
            }
        }
        std::thread::sleep(BREATH);
    }
}
