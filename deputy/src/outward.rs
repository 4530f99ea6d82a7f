//! From home to away, for a process that is running: it is stopped where it stands, described, and built elsewhere.
//!
//! Until the guest stands ready the process is whole and only stopped, so whatever fails lets it go on at home. A large process
//! is not stopped before most of its memory is there: its pages are sent while it runs, and those that change are sent again.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use crossbeam_channel::Sender;
use linklayer::choice;
use linklayer::pages::Writer;
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, MoveReport, Phase, Way};
use shim::capture::{CaptureError, SendError};
use shim::faults::{self, Point};
use shim::process::resident_bytes;
use shim::ptrace::{self, PtraceError, Stop, Stopped};
use shim::timed::Looker;
use shim::track::Tracker;

use crate::home::{Home, unless_gone};
use crate::launch::{Namer, Start, process_launch};
use crate::process::Mode;
use crate::road::{Description, Road};
use crate::shared::{Command, Shared};

/// How often, and how long apart, a process in such a wait is tried again.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

/// How a move ended.
pub type Outcome = Result<MoveReport, String>;
/// Who asked for a move and is told how it went.
pub type Done = Sender<Outcome>;

/// A move that somebody asked for.
pub struct Wish {
    /// Where to.
    pub node: u32,
    /// How.
    pub mode: wire::Mode,
    /// Who asked.
    pub done: Done,
    /// How often it is still tried when a thread is in a wait that cannot be described.
    pub tries: u32,
    /// What was done for it before: the way to home of a process that goes from node to node.
    pub before: Option<MoveReport>,
}

impl Wish {
    /// A move to this node.
    pub fn new(node: u32, mode: wire::Mode, done: Done) -> Wish {
        Wish {
            node,
            mode,
            done,
            tries: TRIES,
            before: None,
        }
    }

    /// It came about.
    pub fn fulfil(self, mut report: MoveReport) {
        if let Some(before) = self.before {
            report.times += before.times;
            report.pages += before.pages;
            report.after += before.after;
            report.rounds += before.rounds;
            report.way = Way::Home;
            report.note = [before.note, report.note]
                .into_iter()
                .filter(|note| !note.is_empty())
                .collect::<Vec<_>>()
                .join("; ");
        }
        let _ = self.done.send(Ok(report));
    }

    /// It did not, for a reason that lies in the process.
    pub fn refuse(self, pid: i32, reason: &StayReason) {
        self.fail(format!("process {pid} {reason}"));
    }

    /// It did not.
    pub fn fail(self, why: String) {
        let _ = self.done.send(Err(why));
    }
}

/// Everything that is made ready before the process is stopped.
pub struct Ready {
    /// The way.
    pub road: Road,
    /// What watches its memory, when pages were sent while it ran.
    pub tracker: Option<Tracker>,
    /// What writes its pages.
    pub writer: Writer,
    /// What was done so far.
    pub report: MoveReport,
    /// It is to run there before all of its memory has come.
    pub lazy: bool,
}

/// How far the process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It runs while the way is made ready.
    Preparing,
    /// It is being stopped so that its memory can be watched.
    Tracking,
    /// It is being stopped to leave.
    Stopping,
}

/// A process that is to leave home.
pub struct Leaving {
    /// What is asked.
    pub wish: Wish,
    /// Number of this attempt.
    attempt: u64,
    stage: Stage,
    /// Its threads that have stopped.
    held: Vec<Stopped>,
    since: Instant,
    ready: Option<Box<Ready>>,
    tracked: Option<Sender<Result<Tracker, String>>>,
}

impl Leaving {
    /// Whether its threads are being stopped.
    pub fn stops(&self) -> bool {
        self.stage != Stage::Preparing
    }
}

impl Home {
    /// Moves a process to a node.
    pub(crate) fn send_out(&mut self, pid: i32, wish: Wish) -> anyhow::Result<()> {
        if let Some(reason) = self.works_with(pid) {
            wish.refuse(pid, &reason);
            return Ok(());
        }
        let Some(process) = self.processes.get_mut(&pid) else {
            wish.fail(format!("process {pid} is not one of this job"));
            return Ok(());
        };
        let moving = process.is_moving();
        match &process.mode {
            _ if moving => wish.refuse(pid, &StayReason::Moving),
            Mode::Away(away) if away.node == wish.node => wish.fulfil(MoveReport::default()),
            Mode::Away(_) => self.hop(pid, wish),
            Mode::Launching(..) => wish.refuse(pid, &StayReason::Moving),
            Mode::Native if process.vforking > 0 => {
                // Its thread stops only when its child has given the memory back.
                process.after_vfork.push((pid, wish));
            }
            Mode::Native => self.prepare(pid, wish),
        }
        Ok(())
    }

    fn prepare(&mut self, pid: i32, wish: Wish) {
        let (node, mode) = (wish.node, wish.mode);
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        let attempt = crate::shared::next_id();
        process.leaving = Some(Leaving {
            wish,
            attempt,
            stage: Stage::Preparing,
            held: Vec::new(),
            since: Instant::now(),
            ready: None,
            tracked: None,
        });
        let (shared, pager) = (self.shared.clone(), process.pager.clone());
        crate::contact::spawn("out", move || {
            // What is still coming has to be here before it can be sent on.
            let here = pager.map_or(Ok(()), |pager| pager.wait());
            let ready = here.and_then(|()| make_ready(&shared, pid, attempt, node, mode).map(Box::new));
            shared.post(Command::Depart(pid, attempt, ready));
        });
    }

    /// Everything is ready, or cannot be made so: the process is stopped.
    pub(crate) fn depart(
        &mut self,
        pid: i32,
        attempt: u64,
        ready: Result<Box<Ready>, String>,
    ) -> anyhow::Result<()> {
        let waits = self.waits_for_a_time(pid);
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        let Some(mut leaving) = process.leaving.take_if(|leaving| leaving.attempt == attempt) else {
            // It has executed another program since, and that one may be leaving.
            return Ok(());
        };
        match ready {
            Ok(ready) => {
                leaving.ready = Some(ready);
                if waits {
                    return self.try_again(pid, leaving, Vec::new());
                }
                process.leaving = Some(leaving);
                self.stop_leaving(pid, Stage::Stopping)
            }
            Err(why) => {
                let why = format!("process {pid} stays at home: {}: {why}", Phase::Reach);
                leaving.wish.fail(why);
                Ok(())
            }
        }
    }

    /// A process that leaves is to be watched.
    pub(crate) fn track(
        &mut self,
        pid: i32,
        attempt: u64,
        done: Sender<Result<Tracker, String>>,
    ) -> anyhow::Result<()> {
        let waits = self.waits_for_a_time(pid);
        let leaving = self.processes.get_mut(&pid).and_then(|p| p.leaving.as_mut());
        let Some(leaving) = leaving.filter(|leaving| leaving.attempt == attempt) else {
            let _ = done.send(Err("it does not leave any more".into()));
            return Ok(());
        };
        if waits {
            let _ = done.send(Err("a thread is in a wait that must not be disturbed".into()));
            return Ok(());
        }
        leaving.tracked = Some(done);
        self.stop_leaving(pid, Stage::Tracking)
    }

    /// Whether a thread of a process at home is in a wait that would begin anew.
    fn waits_for_a_time(&self, pid: i32) -> bool {
        let mut threads = self.tasks.values().filter(|t| t.pid == pid && !t.group_stopped);
        threads.any(|t| crate::restarts::waits_for_a_time(t.tid))
    }

    fn stop_leaving(&mut self, pid: i32, stage: Stage) -> anyhow::Result<()> {
        if let Some(leaving) = self.processes.get_mut(&pid).and_then(|p| p.leaving.as_mut()) {
            leaving.stage = stage;
            leaving.since = Instant::now();
        }
        self.stop_to_leave(pid)
    }

    /// Stops the threads of a process at home that is to leave. Those that stand still already have stopped.
    pub(crate) fn stop_to_leave(&mut self, pid: i32) -> anyhow::Result<()> {
        let process = self.processes.get_mut(&pid).context("process at home")?;
        let standing = std::mem::take(&mut process.standing);
        let stands = |tid| standing.iter().any(|t| t.tid() == tid);
        let mut looker = Looker::default();
        for task in self.tasks.values_mut().filter(|t| t.pid == pid && !stands(t.tid)) {
            task.seen = looker.look(task.tid);
            unless_gone(ptrace::interrupt(task.tid))?;
        }
        standing.into_iter().try_for_each(|thread| self.held(pid, thread))
    }

    /// A thread of a process at home has stopped because it was asked to.
    pub(crate) fn held(&mut self, pid: i32, stopped: Stopped) -> anyhow::Result<()> {
        let process = self.processes.get_mut(&pid).context("process at home")?;
        if let Some(first) = process.together {
            return self.held_together(first, stopped);
        }
        self.held_for_leaving(pid, stopped)
    }

    /// Lets threads of processes at home go on.
    pub(crate) fn release(&mut self, threads: Vec<Stopped>) -> anyhow::Result<()> {
        threads.into_iter().try_for_each(|thread| self.let_go(thread))
    }

    /// Lets a thread of a process at home go on: one that is in a group-stop from SIGCONT on, one that is to stand still
    /// when somebody wants it to.
    pub(crate) fn let_go(&mut self, mut stopped: Stopped) -> anyhow::Result<()> {
        let Some(task) = self.tasks.get_mut(&stopped.tid()) else {
            return Ok(stopped.cont(0)?);
        };
        if matches!(stopped.stop(), Stop::Group(_)) {
            task.group_stopped = true;
            return Ok(stopped.listen()?);
        }
        let pid = task.pid;
        match self.processes.get_mut(&pid).filter(|p| p.frozen) {
            Some(process) => process.standing.push(stopped),
            None => {
                self.begin_sleep(pid, &mut stopped)?;
                stopped.cont(0)?;
            }
        }
        Ok(())
    }

    /// The same where it does no harm that the thread is dead.
    pub(crate) fn let_go_unless_gone(&mut self, stopped: Stopped) -> anyhow::Result<()> {
        match self.let_go(stopped) {
            Err(e) if e.downcast_ref().is_some_and(PtraceError::is_gone) => Ok(()),
            other => other,
        }
    }

    /// A thread of a process that leaves has stopped.
    fn held_for_leaving(&mut self, pid: i32, stopped: Stopped) -> anyhow::Result<()> {
        let process = self.processes.get_mut(&pid).context("process that leaves")?;
        let Some(leaving) = process.leaving.as_mut().filter(|l| l.stops()) else {
            return self.let_go(stopped);
        };
        leaving.held.push(stopped);
        self.leave_if_all_held(pid)
    }

    /// Goes on when all threads that a leaving process still has are stopped.
    pub(crate) fn leave_if_all_held(&mut self, pid: i32) -> anyhow::Result<()> {
        let count = self.living(pid).len();
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        let Some(leaving) = process
            .leaving
            .as_mut()
            .filter(|l| l.stops() && l.held.len() >= count)
        else {
            return Ok(());
        };
        leaving.held.sort_by_key(|t| (t.tid() != pid, t.tid()));
        if leaving.stage == Stage::Tracking {
            leaving.stage = Stage::Preparing;
            let mut held = std::mem::take(&mut leaving.held);
            let begun = match held.first_mut() {
                Some(leader) => Tracker::begin(leader, 0).map_err(|e| e.to_string()),
                None => Err("it has ended".into()),
            };
            if let Some(tracked) = leaving.tracked.take() {
                let _ = tracked.send(begun);
            }
            return self.release(held);
        }
        match process.leaving.take() {
            Some(leaving) => self.leave(pid, leaving),
            None => Ok(()),
        }
    }

    /// All threads are stopped: it is described and sent.
    fn leave(&mut self, pid: i32, mut leaving: Leaving) -> anyhow::Result<()> {
        let held = std::mem::take(&mut leaving.held);
        let Some(mut ready) = leaving.ready.take() else {
            return self.release(held);
        };
        if let Err(why) = faults::at(Point::SourceSeize, pid) {
            leaving
                .wish
                .fail(stayed(pid, Phase::Seize, &anyhow::Error::msg(why)));
            return self.release(held);
        }
        ready.report.times.seize_us = leaving.since.elapsed().as_micros() as u64;
        let described_at = Instant::now();
        let (threads, described) = self.describe(pid, held, ready.tracker.is_some());
        let (mut image, files) = match described {
            Ok(described) => described,
            Err(e) => {
                leaving.wish.fail(stayed(pid, Phase::Dump, &e));
                if let Some(process) = self.processes.get_mut(&pid) {
                    process.stay = Some(reason_of(&e));
                }
                self.publish(pid);
                return self.release(threads);
            }
        };
        if self.shares_memory(pid, &image) {
            let node = leaving.wish.node;
            // Nobody watches its memory any more: it is described anew.
            drop(ready);
            return self.depart_together(pid, node, Some(leaving.wish), threads);
        }
        if !self.settle_waits(&mut image) {
            leaving.ready = Some(ready);
            return self.try_again(pid, leaving, threads);
        }
        ready.report.times.dump_us = described_at.elapsed().as_micros() as u64;
        let node = leaving.wish.node;
        process_launch(
            &self.shared,
            pid,
            Start::Prepared(ready),
            Description { image, files },
        );
        if let Some(process) = self.processes.get_mut(&pid) {
            process.mode = Mode::Launching(threads, node);
            process.departure = Some(leaving.wish);
        }
        Ok(())
    }

    /// It is in a sleep whose rest only the kernel knows: let it go on and look again soon.
    fn try_again(&mut self, pid: i32, mut leaving: Leaving, threads: Vec<Stopped>) -> anyhow::Result<()> {
        self.release(threads)?;
        if leaving.wish.tries == 0 {
            leaving.wish.refuse(pid, &StayReason::TimedWait);
            return Ok(());
        }
        leaving.wish.tries -= 1;
        leaving.stage = Stage::Preparing;
        let attempt = leaving.attempt;
        let ready = leaving.ready.take().context("way of a process that leaves")?;
        if let Some(process) = self.processes.get_mut(&pid) {
            process.leaving = Some(leaving);
        }
        let shared = self.shared.clone();
        crate::contact::spawn("again", move || {
            std::thread::sleep(PAUSE);
            shared.post(Command::Depart(pid, attempt, Ok(ready)));
        });
        Ok(())
    }
}

impl Home {
    /// As for one process, for those that leave together: the whole is tried again.
    pub(crate) fn again_together(
        &mut self,
        pid: i32,
        wish: Option<Wish>,
        threads: Vec<Stopped>,
    ) -> anyhow::Result<()> {
        self.release(threads)?;
        let Some(mut wish) = wish else { return Ok(()) };
        if wish.tries == 0 {
            wish.refuse(pid, &StayReason::TimedWait);
            return Ok(());
        }
        wish.tries -= 1;
        let shared = self.shared.clone();
        crate::contact::spawn("again", move || {
            std::thread::sleep(PAUSE);
            shared.post(Command::Out(pid, Box::new(wish)));
        });
        Ok(())
    }
}

/// Opens the way to a node, and sends what memory can be sent while the process runs.
fn make_ready(
    shared: &Arc<Shared>,
    pid: i32,
    attempt: u64,
    node: u32,
    mode: wire::Mode,
) -> Result<Ready, String> {
    let size_bytes = resident_bytes(pid);
    let (wanted, lazy) = (mode.wants_precopy(size_bytes), mode.is_lazy());
    let mut ready = Ready {
        road: Road::open(
            shared,
            node,
            pid,
            if wanted || lazy { u64::MAX } else { size_bytes },
        )?,
        tracker: None,
        writer: Writer::default(),
        report: MoveReport {
            mode: mode.without_precopy(),
            ..MoveReport::default()
        },
        lazy,
    };
    if lazy && let Err(why) = ready.road.postcopy() {
        return Err(format!(
            "node {node} cannot run it before its memory has come: {why}"
        ));
    }
    if ready.road.has_link() {
        announce(shared, pid, &ready.road, wanted || !lazy);
        ready.road.learn_known(pid, &mut ready.writer);
    }
    if wanted && let Err(why) = precopy(shared, pid, attempt, &mut ready, mode) {
        if mode == wire::Mode::Precopy {
            tracing::warn!(pid, why, "its memory is sent while it stands still");
        }
        ready.report.note = format!("not sent while it ran: {why}");
        ready.tracker = None;
    }
    Ok(ready)
}

/// Tells the node which files the process maps and, with `memory`, which memory it has, and waits until that is there.
fn announce(shared: &Arc<Shared>, pid: i32, road: &Road, memory: bool) {
    let mut namer = Namer::new(shared, pid);
    for line in shim::capture::map_lines(pid, false).unwrap_or_default() {
        if line.ino != 0 && !line.shared {
            // What cannot be opened is for the description to tell.
            let _ = namer.name(line.range.start, line.range.end, line.dev, line.ino, &line.path);
        }
    }
    let areas = memory.then(|| shim::capture::private_memory(pid));
    let body = wire::encode(&wire::Prefetch {
        files: namer.files(),
        areas: areas.unwrap_or_default(),
        hostname: crate::road::hostname(),
    });
    if let Err(e) = road.link().ask(pid, Kind::Prefetch, &body) {
        tracing::debug!(pid, error = %e, "not announced");
    }
}

fn precopy(
    shared: &Arc<Shared>,
    pid: i32,
    attempt: u64,
    ready: &mut Ready,
    mode: wire::Mode,
) -> Result<(), String> {
    if !ready.road.has_link() {
        return Err("there is no link of its own to the node".into());
    }
    let begun = Instant::now();
    faults::at(Point::SourcePrecopy, pid)?;
    let (done, tracked) = crossbeam_channel::bounded(1);
    shared.post(Command::Track(pid, attempt, done));
    let tracker = tracked.recv().map_err(|e| e.to_string())??;
    let link = ready.road.link();
    let rounds = tracker
        .precopy(
            pid,
            &mut ready.writer,
            &mut |kind, parts| link.tell(pid, pid, kind, parts).map_err(io::Error::other),
            &mut || {
                link.await_sent(choice::QUEUED_BYTES).map_err(io::Error::other)?;
                // Of pages that the node has already there is little to send and much to do.
                let taken_up = link.ask(pid, Kind::InPlace, &[]);
                taken_up.map(drop).map_err(io::Error::other)
            },
            &mut |progress| {
                shared.progress.lock().insert(pid, progress);
            },
        )
        .map_err(|e| e.to_string())?;
    ready.lazy = choice::comes_later(mode, &rounds, ready.road.postcopy().is_ok());
    ready.report.rounds = rounds.len() as u32;
    ready.report.mode = if ready.lazy {
        wire::Mode::Hybrid
    } else {
        wire::Mode::Precopy
    };
    ready.report.times.precopy_us = begun.elapsed().as_micros() as u64;
    ready.tracker = Some(tracker);
    Ok(())
}

/// What is said when a process that leaves home is at home.
pub(crate) fn stayed(pid: i32, phase: Phase, why: &anyhow::Error) -> String {
    if shim::process::is_dying(pid) {
        return HAS_ENDED.into();
    }
    format!("process {pid} stays at home: {phase}: {why:#}")
}

/// What is said to those who wait for something of a process that is no more.
pub(crate) const HAS_ENDED: &str = "the process has ended";

/// Why it is, as one of the reasons that there are.
pub(crate) fn reason_of(why: &anyhow::Error) -> StayReason {
    let known = why.chain().find_map(|cause| {
        let refused = cause.downcast_ref().map(|e| match e {
            SendError::Refused(reason) => Some(reason),
            _ => None,
        });
        let unsuitable = cause.downcast_ref().map(|e| match e {
            CaptureError::Unsuitable(reason) => Some(reason),
            _ => None,
        });
        cause
            .downcast_ref::<StayReason>()
            .or(refused.flatten())
            .or(unsuitable.flatten())
    });
    let other = || StayReason::NoNode(format!("{why:#}"));
    known.cloned().unwrap_or_else(other)
}
