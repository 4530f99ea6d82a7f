//! From home to away: a program that was just executed is built anew on another node.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use linklayer::image::{Area, AreaFlags, AreaKind, SigInfo};
use linklayer::pages::Writer;
use linklayer::quic::{Link, STANDSTILL};
use linklayer::stay::StayReason;
use linklayer::wire::{self, FileRef, Kind, MoveReport, Phase};
use shim::faults::{self, Point};
use shim::process::resident_bytes;
use shim::ptrace::{Stop, Stopped};
use shim::track::Tracker;
use shim::vessel::Vessel;

use crate::entry::Breakpoint;
use crate::home::Home;
use crate::hop::Hop;
use crate::outward::{Ready, reason_of, stayed};
use crate::postcopy::Rest;
use crate::process::{Away, Mode, Role, Task, send};
use crate::road::{Description, Road};
use crate::shared::{Command, Shared};

impl Home {
    /// A process has executed a program (PTRACE_EVENT_EXEC): all its other threads are gone, it is at home, and it is
    /// decided anew where it runs.
    pub(crate) fn executed(&mut self, pid: i32, former_tid: i32, mut stopped: Stopped) -> anyhow::Result<()> {
        let executing = self.tasks.get_mut(&former_tid).and_then(|t| t.executing.take());
        let threads: Vec<i32> = self
            .tasks
            .values()
            .filter(|t| t.pid == pid)
            .map(|t| t.tid)
            .collect();
        for tid in threads {
            if let Some(mut task) = self.tasks.remove(&tid) {
                task.end_calls();
            }
            if let Some(worker) = self.shared.workers.write().remove(&tid) {
                worker.slot.abandon();
            }
        }
        self.tasks.insert(pid, Task::new(pid, pid, Role::Native));
        if let Some((reply, request)) = executing {
            stopped.set_sigmask(request.sigmask)?;
            self.resend(pid, former_tid, &request, &mut stopped)?;
            reply.errno(0);
        }
        self.memory_returned(pid);
        self.executed_together(pid);
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        process.discard_guest();
        let from = process.node();
        if from != 0 {
            stopped.set_options(Home::options())?;
        }
        process.mode = Mode::Native;
        self.shared.held.settle(pid);
        // Its memory is another now.
        process.pager = None;
        process.needs_no_more();
        self.shared.incomplete.lock().remove(&pid);
        self.shared.catchers.write().remove(&pid);
        if shim::privileges::lacks(pid) {
            match shim::privileges::execute_again(stopped) {
                Ok(()) => {
                    tracing::info!(pid, "leaves the job: its program has privileges of its own");
                    self.tasks.remove(&pid);
                    self.forget(pid);
                    return Ok(());
                }
                Err((whole, e)) => {
                    tracing::warn!(pid, error = %e, "runs without the privileges of its program");
                    stopped = whole;
                }
            }
        }
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        process.breakpoint = None;
        process.stay = Some(StayReason::StartedHome);
        process.how = "executed";
        for action in &mut process.actions {
            // exec(2) resets handlers; what is ignored stays ignored.
            if action.handler > 1 {
                *action = Default::default();
            }
        }
        process.works_on.clear();
        process.target = self.shared.cluster.choose(from);
        // A move that was asked for is made with the new program.
        for waiter in process.waiters.drain(..) {
            process.target = None;
            let _ = waiter.done.send(Ok(MoveReport::default()));
        }
        let asked = [
            process.next.take(),
            process.leaving.take().map(|l| l.wish),
            process.hop.take().map(Hop::cancel),
        ];
        for wish in asked.into_iter().flatten() {
            process.target = Some(wish.node);
            if let Some(earlier) = process.departure.replace(wish) {
                earlier.fail(format!("process {pid} is moved elsewhere"));
            }
        }
        let worked_on = self.works_with(pid);
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        if process.target.is_some() {
            match worked_on
                .map_or(Ok(()), Err)
                .and_then(|()| movable(pid, &stopped))
                .and_then(|()| Breakpoint::set(pid).map_err(|e| StayReason::NoNode(format!("{e:#}"))))
            {
                Ok(breakpoint) => process.breakpoint = Some(breakpoint),
                Err(reason) => process.stay_at_home(reason),
            }
        }
        self.publish(pid);
        stopped.cont(0)?;
        Ok(())
    }

    /// Whether this SIGTRAP is that of the breakpoint at the entry point.
    pub(crate) fn at_entry(&self, pid: i32, stopped: &Stopped) -> anyhow::Result<bool> {
        let Some(breakpoint) = self.processes.get(&pid).and_then(|p| p.breakpoint.as_ref()) else {
            return Ok(false);
        };
        Ok(breakpoint.hit(&stopped.regs()?))
    }

    /// The process stands at its entry point: describe it and have it built. It stays whole until that succeeded.
    pub(crate) fn begin_launch(&mut self, pid: i32, mut stopped: Stopped) -> anyhow::Result<()> {
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        let (Some(breakpoint), Some(node)) = (process.breakpoint.take(), process.target) else {
            stopped.cont(0)?;
            return Ok(());
        };
        breakpoint.remove(pid)?;
        let mut regs = stopped.regs()?;
        regs.rip = breakpoint.address();
        stopped.set_regs(&regs)?;
        // Threads that a library's constructor started: a launch moves one thread.
        if self.tasks.values().filter(|t| t.pid == pid).count() > 1 {
            process.stay_at_home(StayReason::EarlyThreads);
            self.publish(pid);
            stopped.cont(0)?;
            return Ok(());
        }
        stopped.settle()?;
        let (threads, described) = self.describe(pid, vec![stopped], false);
        match described {
            Ok((image, _)) if self.shares_memory(pid, &image) => {
                let wish = self.processes.get_mut(&pid).and_then(|p| p.departure.take());
                return self.depart_together(pid, node, wish, threads);
            }
            Ok((image, files)) => {
                process_launch(&self.shared, pid, Start::Node(node), Description { image, files });
                if let Some(process) = self.processes.get_mut(&pid) {
                    process.mode = Mode::Launching(threads, node);
                }
            }
            Err(e) => {
                tracing::info!(pid, error = format!("{e:#}"), "stays at home");
                if let Some(process) = self.processes.get_mut(&pid) {
                    process.stay_at_home(reason_of(&e));
                }
                self.publish(pid);
                self.release(threads)?;
            }
        }
        Ok(())
    }

    /// The guest stands ready on its node, or was refused.
    pub(crate) fn launch_ready(
        &mut self,
        pid: i32,
        result: anyhow::Result<Box<Arrived>>,
    ) -> anyhow::Result<()> {
        let begun = Instant::now();
        let Some(process) = self.processes.get_mut(&pid) else {
            // Killed meanwhile.
            if let Ok(arrived) = result {
                send(
                    &arrived.contact,
                    pid,
                    Kind::Discard,
                    &wire::encode(&wire::Pid(pid)),
                );
            }
            return Ok(());
        };
        let (threads, node) = match std::mem::replace(&mut process.mode, Mode::Native) {
            Mode::Launching(threads, node) => (threads, node),
            other => {
                process.mode = other;
                return Ok(());
            }
        };
        let departure = process.departure.take();
        let result = match result {
            Ok(arrived) => arrived.can_commit(pid).map_err(|why| (Phase::Resume, why)),
            Err(why) => Err((Phase::Transfer, why)),
        };
        let (link, mut report, tracker, rest) = match result {
            Ok(arrived) => (arrived.contact, arrived.report, arrived.tracker, arrived.rest),
            Err((phase, why)) => {
                tracing::warn!(pid, node, why = format!("{why:#}"), "not moved; it runs at home");
                if let Some(wish) = departure {
                    wish.fail(stayed(pid, phase, &why));
                }
                process.stay = Some(reason_of(&why));
                self.publish(pid);
                return self.release(threads);
            }
        };
        let stopped = in_group_stop(&threads);
        // To drop much memory takes its time, which the guest does not have to wait for.
        let large = resident_bytes(pid) > wire::LARGE_BYTES;
        match self.empty(pid, threads, large || rest.is_some()) {
            Ok((vessel, pending)) => {
                let how = if departure.is_some() {
                    "asked"
                } else {
                    "placed at exec"
                };
                self.is_away(vessel, (pending, stopped), node, &link, how);
                self.publish(pid);
                tracing::info!(pid, node, "runs there");
                send(&link, pid, Kind::LaunchGo, &wire::encode(&wire::Pid(pid)));
                let _ = faults::at(Point::SourceAfter, pid);
                report.times.resume_us = begun.elapsed().as_micros() as u64;
                let dropped = if large && rest.is_none() {
                    self.drop_now(pid)
                } else {
                    Ok(())
                };
                if let (Err(_), Some(away)) = (&dropped, self.processes.get_mut(&pid).and_then(|p| p.away()))
                {
                    away.has_pages = true;
                }
                drop(tracker);
                if let Some(rest) = rest {
                    self.push(pid, rest, departure, report);
                } else if let Some(wish) = departure {
                    wish.fulfil(report);
                }
                dropped
            }
            Err((whole, e)) => {
                // Before the commit: the source goes on.
                send(&link, pid, Kind::Discard, &wire::encode(&wire::Pid(pid)));
                tracing::warn!(pid, error = %e, "not emptied; it runs at home");
                if let Some(wish) = departure {
                    wish.fail(stayed(pid, Phase::Resume, &anyhow::Error::msg(e.to_string())));
                }
                if whole.is_empty() {
                    return Err(anyhow::Error::new(e).context(format!("process {pid} could not be emptied")));
                }
                if let Some(process) = self.processes.get_mut(&pid) {
                    process.stay = Some(StayReason::Limits);
                }
                self.publish(pid);
                self.release(whole)
            }
        }
    }
}

impl Home {
    /// A process has become a vessel. Its guest does not run yet. Given with it are the signals that were pending for single
    /// threads, and whether it was in a group-stop.
    pub(crate) fn is_away(
        &mut self,
        vessel: Vessel,
        (pending, stopped): (Vec<(i32, SigInfo)>, bool),
        node: u32,
        link: &Link,
        how: &'static str,
    ) {
        let pid = vessel.pid();
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        let mut away = Away::new(vessel, node, link.clone());
        // What was pending for single threads comes before the first instruction, and so does the SIGCONT that ends a group-stop,
        // which the catcher has yet to take.
        let continued = pending.iter().any(|(_, info)| info.signo() == libc::SIGCONT);
        for (tid, info) in pending {
            let signal = wire::Signal {
                pid,
                tid,
                signal: info.signo(),
                info: info.0.to_vec(),
                counted: true,
            };
            away.relay(pid as u32, signal);
        }
        away.asked = process.frozen;
        away.continued = continued;
        away.frozen = stopped && !continued;
        away.say_frozen(pid);
        process.stay = None;
        process.how = how;
        process.moves_out += 1;
        process.sleeps.clear();
        process.mode = Mode::Away(Box::new(away));
    }
}

/// Whether threads of one process are stopped by job control.
pub(crate) fn in_group_stop(threads: &[Stopped]) -> bool {
    threads.iter().any(|t| matches!(t.stop(), Stop::Group(_)))
}

/// Whether a program that was just executed may be moved at all.
fn movable(pid: i32, stopped: &Stopped) -> Result<(), StayReason> {
    let broken = |e: &dyn std::fmt::Display| StayReason::NoNode(e.to_string());
    let regs = stopped.regs().map_err(|e| broken(&e))?;
    // Segment 0x33 is 64-bit user code (arch/x86/include/asm/segment.h, __USER_CS).
    if regs.cs != 0x33 {
        return Err(StayReason::NotX86_64);
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(|e| broken(&e))?;
    let ids = |name: &str| -> Vec<String> {
        status
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .map(|l| l.split_whitespace().map(str::to_string).collect())
            .unwrap_or_default()
    };
    for name in ["Uid:", "Gid:"] {
        let ids = ids(name);
        if ids.first() != ids.get(1) {
            return Err(StayReason::Privileged);
        }
    }
    Ok(())
}

/// What is there of the way of a process that is launched.
pub(crate) enum Start {
    /// Nothing: it is to go to this node.
    Node(u32),
    /// Everything.
    Prepared(Box<Ready>),
}

/// A process that stands ready at its node.
pub struct Arrived {
    /// The contact to the node.
    contact: Link,
    report: MoveReport,
    /// What watched its memory; let go when the memory is not needed any more.
    tracker: Option<Tracker>,
    /// What is sent when it runs there.
    rest: Option<Rest>,
}

impl Arrived {
    /// Looks whether the node hears of what is decided now. If not, the process goes on at home, and nothing of it stays there.
    fn can_commit(self: Box<Self>, pid: i32) -> anyhow::Result<Box<Self>> {
        let cut = |link: &Link| !link.is_live();
        let why = match faults::at(Point::SourceResume, pid) {
            Err(why) => why,
            Ok(()) if cut(&self.contact) => "the contact to the node is cut".into(),
            Ok(()) if self.rest.as_ref().is_some_and(|rest| cut(rest.road.link())) => {
                "the link on which the rest of it is to go is cut".into()
            }
            Ok(()) => return Ok(self),
        };
        send(&self.contact, pid, Kind::Discard, &wire::encode(&wire::Pid(pid)));
        Err(anyhow::Error::msg(why))
    }
}

/// Sends the process and waits for the answer on a thread of its own.
pub(crate) fn process_launch(shared: &Arc<Shared>, pid: i32, start: Start, mut description: Description) {
    description.leave_pending();
    let shared = shared.clone();
    crate::contact::spawn("launch", move || {
        let ready = match start {
            Start::Prepared(ready) => Ok(*ready),
            Start::Node(node) => Road::open(&shared, node, pid, 0).map(|road| Ready {
                road,
                tracker: None,
                writer: Writer::default(),
                report: MoveReport::default(),
                lazy: false,
            }),
        };
        let result = ready.map_err(anyhow::Error::msg).and_then(|ready| {
            let contact = ready.road.contact.clone();
            let sent = transfer(ready, description);
            match &sent {
                Ok(_) => drop(contact.await_live(STANDSTILL)),
                // It may stand ready there, if only the answer was lost.
                Err(_) => send(&contact, pid, Kind::Discard, &wire::encode(&wire::Pid(pid))),
            }
            sent
        });
        shared.post(Command::LaunchReady {
            pid,
            result: result.map(Box::new),
        });
    });
}

fn transfer(mut ready: Ready, description: Description) -> anyhow::Result<Arrived> {
    let tid = description.image.reached_by();
    let pid = description.image.pid;
    faults::at(Point::SourceTransfer, pid).map_err(anyhow::Error::msg)?;
    let later = shim::capture::send_process(
        ready.road.link(),
        &description.into_launch(),
        tid,
        ready.tracker.as_ref(),
        ready.lazy,
        &mut ready.writer,
        &mut ready.report,
    )?;
    let contact = ready.road.contact.clone();
    let rest = if ready.lazy {
        let pusher = ready.road.source.serve(ready.road.link(), pid, tid, later);
        let pusher = pusher.context("its memory")?;
        Some(Rest {
            road: ready.road,
            pusher,
        })
    } else {
        None
    };
    Ok(Arrived {
        contact,
        report: ready.report,
        tracker: ready.tracker,
        rest,
    })
}

/// The files that a process maps, as they are named to the other node.
pub(crate) struct Namer<'a> {
    shared: &'a Shared,
    pid: i32,
    by_inode: HashMap<(u64, u64), FileRef>,
}

impl<'a> Namer<'a> {
    /// For the areas of this process.
    pub(crate) fn new(shared: &'a Shared, pid: i32) -> Namer<'a> {
        Namer {
            shared,
            pid,
            by_inode: HashMap::new(),
        }
    }

    /// The number of the file behind an area, which is opened for serving its content.
    pub(crate) fn name(
        &mut self,
        start: u64,
        end: u64,
        dev: u64,
        ino: u64,
        path: &[u8],
    ) -> anyhow::Result<u64> {
        if let Some(file) = self.by_inode.get(&(dev, ino)) {
            return Ok(file.id);
        }
        let file = self.open(start, end, dev, ino, path)?;
        let file = self.shared.files.register(file, path.to_vec())?;
        let id = file.id;
        self.by_inode.insert((dev, ino), file);
        Ok(id)
    }

    /// Opens the very file that is mapped: by its path in the process's own root if that still names it, else by the
    /// mapping itself.
    fn open(&self, start: u64, end: u64, dev: u64, ino: u64, path: &[u8]) -> anyhow::Result<std::fs::File> {
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::fs::MetadataExt;
        let mut rooted = format!("/proc/{}/root", self.pid).into_bytes();
        rooted.extend_from_slice(path);
        let candidates = [
            std::ffi::OsStr::from_bytes(&rooted).to_os_string(),
            format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid).into(),
        ];
        for candidate in candidates {
            let Ok(file) = std::fs::File::open(&candidate) else {
                continue;
            };
            let meta = file.metadata()?;
            if (meta.dev(), meta.ino()) == (dev, ino) {
                anyhow::ensure!(meta.is_file(), StayReason::DeviceMapping);
                return Ok(file);
            }
        }
        let path = String::from_utf8_lossy(path).into_owned();
        Err(StayReason::LostFile(path).into())
    }

    /// All files that were named.
    pub(crate) fn files(self) -> Vec<FileRef> {
        self.by_inode.into_values().collect()
    }
}

/// Whether an area maps a file shared, and is writable or can be made so.
pub(crate) fn shared_writable(area: &Area) -> bool {
    area.shared() && matches!(area.kind, AreaKind::File { .. }) && area.flags.has(AreaFlags::MAY_WRITE)
}
