//! From home to away, for a process that is running: it is stopped where it stands, described, and built elsewhere.
//!
//! Until the guest stands ready the process is whole and only stopped, so whatever fails lets it go on at home.

use std::time::Duration;

use anyhow::Context;
use crossbeam_channel::Sender;
use linklayer::image::ProcessImage;
use linklayer::stay::StayReason;
use shim::ptrace::{self, Stopped};

use crate::home::Home;
use crate::launch::process_launch;
use crate::process::Mode;
use crate::shared::Command;

/// The kernel's code for a wait whose rest it keeps to itself (ERESTART_RESTARTBLOCK): a thread in one cannot be described.
const RESTART_BLOCK: i32 = -516;
/// How often, and how long apart, a process in such a wait is tried again.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

/// Who asked for a move and is told how it went.
pub type Done = Sender<Result<(), String>>;

/// A process that is being stopped so as to leave home.
pub struct Leaving {
    /// Where to.
    pub node: u32,
    /// Who asked.
    pub done: Done,
    /// How often it is still tried.
    pub tries: u32,
    /// Its threads that have stopped.
    pub held: Vec<Stopped>,
}

impl Home {
    /// Moves a process to a node: from home directly, from another node by way of home.
    pub(crate) fn send_out(
        &mut self,
        pid: i32,
        node: u32,
        done: Done,
        tries: Option<u32>,
    ) -> anyhow::Result<()> {
        let refuse = |why: String| {
            let _ = done.send(Err(why));
            Ok(())
        };
        let Some(process) = self.processes.get_mut(&pid) else {
            return refuse(format!("process {pid} is not one of this job"));
        };
        match &process.mode {
            Mode::Away(away) if away.node == node => {
                let _ = done.send(Ok(()));
                return Ok(());
            }
            Mode::Away(_) => {
                process.next = Some((node, done));
                let (arrived, _) = crossbeam_channel::bounded(1);
                return self.bring(pid, StayReason::Asked, arrived);
            }
            Mode::Launching(..) => return refuse(format!("process {pid} is being moved at this moment")),
            Mode::Native => {}
        }
        if process.breakpoint.is_some() || process.leaving.is_some() || process.together.is_some() {
            return refuse(format!("process {pid} is being moved at this moment"));
        }
        if process.vforking > 0 {
            // Its thread stops only when its child has given the memory back.
            process.after_vfork.push((pid, node, done));
            return Ok(());
        }
        let tids: Vec<i32> = self
            .tasks
            .values()
            .filter(|t| t.pid == pid)
            .map(|t| t.tid)
            .collect();
        if self.tasks.values().any(|t| t.pid == pid && t.group_stopped) {
            return refuse(format!("process {pid} is stopped; continue it first"));
        }
        process.leaving = Some(Leaving {
            node,
            done,
            tries: tries.unwrap_or(TRIES),
            held: Vec::new(),
        });
        for tid in tids {
            match ptrace::interrupt(tid) {
                Err(e) if !e.is_gone() => return Err(e.into()),
                _ => {}
            }
        }
        Ok(())
    }

    /// A thread of a process that leaves has stopped.
    pub(crate) fn held_for_leaving(&mut self, pid: i32, stopped: Stopped) -> anyhow::Result<()> {
        if let Some(first) = self.processes.get(&pid).and_then(|p| p.together) {
            return self.held_together(first, stopped);
        }
        let process = self.processes.get_mut(&pid).context("process that leaves")?;
        let Some(leaving) = process.leaving.as_mut() else {
            stopped.cont(0)?;
            return Ok(());
        };
        leaving.held.push(stopped);
        self.leave_if_all_held(pid)
    }

    /// Goes on when all threads that a leaving process still has are stopped.
    pub(crate) fn leave_if_all_held(&mut self, pid: i32) -> anyhow::Result<()> {
        let count = self.tasks.values().filter(|t| t.pid == pid).count();
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        if process.leaving.as_ref().is_none_or(|l| l.held.len() < count) {
            return Ok(());
        }
        let Some(mut leaving) = process.leaving.take() else {
            return Ok(());
        };
        leaving.held.sort_by_key(|t| (t.tid() != pid, t.tid()));
        let (threads, described) = self.describe(pid, leaving.held);
        let result = described.map_err(|e| format!("process {pid} stays at home: {e:#}"));
        match result {
            Ok((image, files)) => {
                if self.shares_memory(pid, &image) {
                    let done = Some(leaving.done);
                    return self.depart_together(pid, leaving.node, done, leaving.tries, threads);
                }
                if waits(&image) {
                    return self.try_again(pid, leaving.node, Some(leaving.done), leaving.tries, threads);
                }
                process_launch(&self.shared, pid, leaving.node, image, files);
                if let Some(process) = self.processes.get_mut(&pid) {
                    process.mode = Mode::Launching(threads, leaving.node);
                    process.departure = Some(leaving.done);
                }
                Ok(())
            }
            Err(why) => {
                let _ = leaving.done.send(Err(why));
                release(threads)
            }
        }
    }

    /// It is in a sleep whose rest only the kernel knows: let it go on and look again soon.
    pub(crate) fn try_again(
        &mut self,
        pid: i32,
        node: u32,
        done: Option<Done>,
        tries: u32,
        threads: Vec<Stopped>,
    ) -> anyhow::Result<()> {
        release(threads)?;
        let Some(done) = done else { return Ok(()) };
        if tries == 0 {
            let why =
                format!("process {pid} is in a timed wait whose rest the kernel keeps; try again later");
            let _ = done.send(Err(why));
            return Ok(());
        }
        let shared = self.shared.clone();
        crate::contact::spawn("again", move || {
            std::thread::sleep(PAUSE);
            shared.post(Command::Out(pid, node, done, Some(tries - 1)));
        });
        Ok(())
    }
}

/// Whether a thread is in a wait whose rest only the kernel knows.
pub(crate) fn waits(image: &ProcessImage) -> bool {
    image
        .threads
        .iter()
        .any(|t| t.rewound.is_some_and(|r| r.code == RESTART_BLOCK))
}

/// Lets threads go on.
pub(crate) fn release(threads: Vec<Stopped>) -> anyhow::Result<()> {
    for thread in threads {
        thread.cont(0)?;
    }
    Ok(())
}
