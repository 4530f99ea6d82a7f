//! Processes that run at their new place before all of their memory is there, seen from home.

use anyhow::Context;
use crossbeam_channel::Sender;
use linklayer::image::Area;
use linklayer::wire::{MoveReport, Phase, Settled};
use shim::postcopy::{End, Pager, Pushed, Pusher, watched};
use shim::ptrace::{self, Stopped};
use shim::restore::Room;
use shim::userfault::{self, Userfault};
use std::sync::Arc;

use crate::home::Home;
use crate::outward::Wish;
use crate::process::{Mode, Process, Role};
use crate::road::Road;
use crate::shared::{Command, Shared};

/// What of a process that has left home is still to be sent.
pub struct Rest {
    /// The way.
    pub road: Road,
    /// What knows which pages.
    pub pusher: Arc<Pusher>,
}

/// What is reported of a move whose process ended before all of its memory was needed.
pub fn ended_before(mut report: MoveReport) -> MoveReport {
    report.note = "it ended, or executed another program, before all of its memory had come".into();
    report
}

impl Home {
    /// Sends the rest of a process that runs away. Its vessel keeps its pages meanwhile.
    pub(crate) fn push(&mut self, pid: i32, rest: Rest, wish: Option<Wish>, report: MoveReport) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        if let Some(wish) = wish {
            process.arriving = Some((wish, report));
        }
        let Some(away) = process.away() else { return };
        away.has_pages = true;
        let catcher = away.vessel.catcher();
        let shared = self.shared.clone();
        crate::contact::spawn("push", move || {
            let pushed = rest.pusher.run(rest.road.link());
            let (done, emptied) = crossbeam_channel::bounded(1);
            // Also when it is not sent to the end: nobody can have the rest any more.
            shared.post(Command::Empty(pid, catcher, done));
            // It is said by dropping the other end.
            let _ = emptied.recv();
            match pushed {
                Pushed::Whole(reply) => reply.errno(0),
                Pushed::Over(why) => tracing::debug!(pid, why, "the rest of its memory is not sent"),
            }
        });
    }

    /// Has a vessel, which has this catcher, drop its pages. Not one whose process is on its way home: that sees to it itself.
    pub(crate) fn drop_pages(&mut self, pid: i32, catcher: i32, done: Sender<()>) -> anyhow::Result<()> {
        if self.shared.coming.is_coming(pid) {
            return Ok(());
        }
        let away = self.processes.get_mut(&pid).and_then(|p| p.away());
        match away.filter(|away| away.vessel.catcher() == catcher && away.coming.is_none()) {
            Some(away) => away.emptying = Some(done),
            None => return Ok(()),
        }
        self.have_catcher_act(pid)
    }

    /// Has a vessel drop its pages, before anything else is done about it: a child that it forks would have them.
    pub(crate) fn drop_now(&mut self, pid: i32) -> anyhow::Result<()> {
        let (done, _nobody_waits) = crossbeam_channel::bounded(0);
        match self.processes.get_mut(&pid).and_then(|p| p.away()) {
            Some(away) => away.emptying = Some(done),
            None => return Ok(()),
        }
        self.have_catcher_act(pid)
    }

    /// Has a vessel make room for the pages of its guest, which runs and is going to come home.
    pub(crate) fn make_room(
        &mut self,
        pid: i32,
        areas: Vec<Area>,
        done: Sender<Result<Room, String>>,
    ) -> anyhow::Result<()> {
        let memory = |process: &Process| match &process.mode {
            Mode::Away(away) => Some(away.vessel.memory),
            _ => None,
        };
        let away = self.processes.get(&pid).and_then(|process| match &process.mode {
            Mode::Away(away) if away.coming.is_none() => Some(away.vessel.memory),
            _ => None,
        });
        let same = self.processes.values().filter(|p| memory(p) == away).count();
        if away.is_none() || same > 1 {
            let _ = done.send(Err("it is not away, or another process has its memory".into()));
            return Ok(());
        }
        if self
            .processes
            .get_mut(&pid)
            .and_then(|p| p.away())
            .is_some_and(|a| a.has_pages)
        {
            self.drop_now(pid)?;
        }
        if let Some(away) = self.processes.get_mut(&pid).and_then(|p| p.away()) {
            away.wants_room = Some((areas, done));
        }
        self.have_catcher_act(pid)
    }

    /// Stops the catcher of a vessel until it has done what there is to do.
    fn have_catcher_act(&mut self, pid: i32) -> anyhow::Result<()> {
        loop {
            let away = self.processes.get_mut(&pid).and_then(|p| p.away());
            let Some(away) = away.filter(|a| a.emptying.is_some() || a.wants_room.is_some()) else {
                return Ok(());
            };
            // A signal that arrives takes the place of the stop that is asked for.
            let catcher = away.vessel.catcher();
            match ptrace::interrupt(catcher).and_then(|()| ptrace::wait_stop(catcher)) {
                Ok(stopped) => self.vessel_stop(pid, catcher, stopped)?,
                // It was killed, as will be reported.
                Err(e) if e.is_gone() => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The catcher of a vessel has stopped: it does what there is to do about the vessel's memory.
    pub(crate) fn catcher_acts(
        &mut self,
        pid: i32,
        tid: i32,
        mut stopped: Stopped,
    ) -> anyhow::Result<Stopped> {
        if self.tasks.get(&tid).is_none_or(|task| task.role != Role::Catcher) {
            return Ok(stopped);
        }
        let Some(away) = self.processes.get_mut(&pid).and_then(|p| p.away()) else {
            return Ok(stopped);
        };
        if let Some(_said_by_dropping_it) = away.emptying.take() {
            stopped = away.vessel.drop_pages(stopped)?;
            away.has_pages = false;
        }
        if let Some((areas, done)) = away.wants_room.take() {
            let (still, room) = away.vessel.make_room(stopped, &areas)?;
            stopped = still;
            away.has_pages = true;
            let _ = done.send(Ok(room));
        }
        Ok(stopped)
    }

    /// A process has all of its memory where it runs, or never will.
    pub(crate) fn settled(&mut self, settled: &Settled) -> anyhow::Result<()> {
        let pid = settled.pid;
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        if !settled.lost.is_empty() {
            self.lost_before_whole(pid, &settled.lost);
            return Ok(());
        }
        self.shared.progress.lock().remove(&pid);
        if let Some((wish, mut report)) = process.arriving.take() {
            report.after = settled.after;
            wish.fulfil(report);
        }
        Ok(())
    }

    /// A process that runs at a node will never have all of its memory, if it has not.
    pub(crate) fn lost_before_whole(&mut self, pid: i32, why: &str) {
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        let node = process.node();
        if let Some((wish, _)) = process.arriving.take() {
            let why = lost_words(pid, &format!("node {node}"), why);
            tracing::error!("{why}");
            wish.fail(why);
        }
        self.shared.progress.lock().remove(&pid);
    }
}

/// What is said of a process that was lost before it had all of its memory.
pub fn lost_words(pid: i32, place: &str, why: &str) -> String {
    format!(
        "process {pid} is lost at {place}: {}: {why}; it had left before all of its memory was there",
        Phase::Postcopy
    )
}

/// Whether a process can run at home before all of its memory is here.
///
/// # Errors
/// What it lacks, for a person.
pub fn possible_here() -> Result<(), String> {
    if Home::outlived() {
        return Err("processes of this job are to go on when its deputy ends, which one without all of its memory cannot".into());
    }
    userfault::follows_forks()
}

/// A process at home has all of its memory, or never will: in that case it is killed at once, since it would go on with zeros, and so
/// are its children that lack memory.
fn ended(shared: &Shared, pid: i32, pager: &Arc<Pager>, end: End) {
    let mut those = Vec::new();
    shared.incomplete.lock().retain(|one, its| {
        let same = Arc::ptr_eq(its, pager);
        those.extend(same.then_some(*one));
        !same
    });
    if let End::Lost(why) = &end {
        for one in those {
            tracing::error!(
                pid = one,
                why,
                "its memory cannot be had any more from where it came; it is killed"
            );
            if let Err(e) = shim::signal::kill_process(one, nix::libc::SIGKILL) {
                tracing::debug!(pid = one, error = %e, "kill");
            }
        }
    }
    shared.post(Command::Complete(pid, pager.clone(), end));
}

impl Home {
    /// A process is about to run at home; if pages of it come later, they are waited for from now on.
    pub(crate) fn begin_to_run_early(&mut self, pid: i32) -> anyhow::Result<()> {
        let Some(later) = self.shared.coming.later(pid) else {
            return Ok(());
        };
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        anyhow::ensure!(
            later.link.is_live(),
            "the link on which the rest of it is to come is cut"
        );
        let coming = process.away().and_then(|away| away.coming.as_ref());
        let (body, _) = coming.context("a process that was not announced")?;
        let memory = Userfault::begin(later.userfault, true).context("userfaultfd")?;
        for range in watched(&body.image, &later.runs) {
            memory
                .register(&range)
                .with_context(|| format!("watching memory at {:#x}", range.start))?;
        }
        let runs = later.runs.iter().map(|(start, end)| *start..*end);
        let pager = Arc::new(Pager::new(pid, memory, runs, later.link)?);
        let _ = later.pager.set(pager.clone());
        process.pager = Some(pager.clone());
        self.shared.incomplete.lock().insert(pid, pager.clone());
        let shared = self.shared.clone();
        crate::contact::spawn("pager", move || {
            let tell = &mut |progress| {
                shared.progress.lock().insert(pid, progress);
            };
            pager.serve(tell, |end| ended(&shared, pid, &pager, end));
        });
        Ok(())
    }

    /// The child of a process whose memory is still coming lacks the same.
    pub(crate) fn inherit_pager(&mut self, parent: i32, child: i32) {
        let pager = self.processes.get(&parent).and_then(|p| p.pager.clone());
        let (Some(pager), Some(process)) = (pager.filter(|p| p.is_open()), self.processes.get_mut(&child))
        else {
            return;
        };
        process.pager = Some(pager.clone());
        self.shared.incomplete.lock().insert(child, pager.clone());
        if pager.loss().is_some()
            && let Err(e) = shim::signal::kill_process(child, nix::libc::SIGKILL)
        {
            tracing::debug!(child, error = %e, "kill");
        }
    }

    /// A process at home, and its children, have all of their memory, or have lost it.
    pub(crate) fn complete(&mut self, pid: i32, pager: &Arc<Pager>, end: End) -> anyhow::Result<()> {
        for process in self.processes.values_mut() {
            if process.pager.as_ref().is_some_and(|its| Arc::ptr_eq(its, pager)) {
                process.pager = None;
            }
        }
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        self.shared.progress.lock().remove(&pid);
        let Some((waiters, mut report)) = process.came.take() else {
            return Ok(());
        };
        process.waiters = waiters;
        match end {
            End::Whole(after) | End::Needless(after) => {
                report.after = after;
                self.tell_of_homecoming(pid, report);
            }
            End::Lost(why) => {
                let why = lost_words(pid, "home", &why);
                for waiter in process.waiters.drain(..) {
                    let _ = waiter.done.send(Err(why.clone()));
                }
            }
        }
        Ok(())
    }
}
