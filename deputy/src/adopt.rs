//! Taking up processes that run already, and letting those of the job go.
//!
//! A process at home is only watched, so that taking it up is to seize it and all that descends from it, and letting it go
//! is to detach. Neither is noticed by the program.

use std::collections::HashMap;

use anyhow::Context;
use crossbeam_channel::Sender;
use shim::memory::ProcessMemory;
use shim::process::{has_ended, tracer_of};
use shim::ptrace::{self, Stopped};

use crate::home::{Home, unless_gone};
use crate::process::{Mode, Role, Task};

/// A descendant that was not taken up, and why, in words.
pub type LeftOut = (i32, String);

impl Home {
    /// Takes up a running process with all its threads and all its descendants. Descendants that cannot be traced (they have
    /// another tracer, or other credentials) are left out and named in the answer.
    ///
    /// # Errors
    /// When the process itself is not there or cannot be traced. Those that were seized run on when the caller ends, if that let
    /// them outlive it.
    pub fn adopt_tree(&mut self, root: i32) -> anyhow::Result<Vec<LeftOut>> {
        let mut left_out: HashMap<i32, String> = HashMap::new();
        // Threads and children can be made while we look: what is found in the last round is nothing new.
        loop {
            let mut found = 0;
            for pid in tree_of(root) {
                if left_out.contains_key(&pid) {
                    continue;
                }
                match self.adopt_process(pid) {
                    Ok(n) => found += n,
                    Err(why) if pid == root => anyhow::bail!(why),
                    Err(why) => {
                        left_out.insert(pid, why);
                    }
                }
            }
            if found == 0 {
                break;
            }
        }
        anyhow::ensure!(
            self.processes.contains_key(&root),
            "process {root} has ended, or there is none"
        );
        Ok(left_out.into_iter().collect())
    }

    /// Seizes the threads of a process that are not seized yet; gives their number, or why it cannot be done.
    fn adopt_process(&mut self, pid: i32) -> Result<usize, String> {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
            return Ok(0);
        };
        let tids = threads
            .flatten()
            .filter_map(|t| t.file_name().to_str()?.parse::<i32>().ok());
        let mut found = 0;
        for tid in tids {
            if self.tasks.contains_key(&tid) {
                continue;
            }
            // A child of one that is seized already belongs to us from its birth; the event of its parent will tell.
            let nothing_to_do = || has_ended(tid) || tracer_of(tid) == Some(std::process::id() as i32);
            if nothing_to_do() {
                continue;
            }
            match ptrace::seize(tid, Home::options()) {
                Ok(()) => {}
                Err(e) if e.is_gone() || nothing_to_do() => continue,
                Err(e) => return Err(refusal(pid, tracer_of(tid), &e)),
            }
            found += 1;
            if !self.processes.contains_key(&pid) {
                self.add_adopted(pid);
            }
            self.tasks.insert(tid, Task::new(tid, pid, Role::Native));
            if waits_in_vfork(pid, tid)
                && let Some(process) = self.processes.get_mut(&pid)
            {
                process.vforking += 1;
            }
        }
        Ok(found)
    }

    fn add_adopted(&mut self, pid: i32) {
        let mut process = crate::process::Process::new(pid, Mode::Native);
        process.how = "adopted";
        self.processes.insert(pid, process);
        self.publish(pid);
    }

    /// Lets all processes of the job go: they run on as if the deputy had never been.
    pub(crate) fn release_job(&mut self, done: Sender<Result<(), String>>) -> anyhow::Result<()> {
        let moving =
            |p: &crate::process::Process| p.leaving.is_some() || matches!(p.mode, Mode::Launching(..));
        let mut away: Vec<i32> = self
            .processes
            .values()
            .filter(|p| p.node() != 0)
            .map(|p| p.pid)
            .collect();
        away.sort_unstable();
        let refused = if !away.is_empty() {
            let list: Vec<String> = away.iter().map(ToString::to_string).collect();
            Some(format!(
                "away from home: {}; bring them home first (mosmigrate PID home)",
                list.join(", ")
            ))
        } else if let Some((parent, _)) = self.vforked.values().next() {
            Some(format!("process {parent} waits for the child of a vfork"))
        } else {
            self.processes
                .values()
                .find(|p| moving(p))
                .map(|p| format!("process {} is being moved at this moment", p.pid))
        };
        if let Some(why) = refused {
            let _ = done.send(Err(why));
            return Ok(());
        }
        for process in self.processes.values_mut() {
            // Its loader is still at work; it will not be placed.
            if let Some(breakpoint) = process.breakpoint.take() {
                breakpoint.remove(process.pid)?;
            }
        }
        self.releasing = Some(done);
        for tid in self.tasks.keys() {
            unless_gone(ptrace::interrupt(*tid)).context("process to be released")?;
        }
        Ok(())
    }

    /// Detaches from a thread that stopped while the job is being released.
    pub(crate) fn detach(&mut self, stopped: Stopped) -> anyhow::Result<()> {
        use shim::ptrace::Stop;
        let tid = stopped.tid();
        let signal = match stopped.stop() {
            Stop::Signal(signal) => signal,
            Stop::Fork(child) | Stop::Vfork(child) | Stop::Clone(child) => {
                // It is a tracee from birth and must be let go, too.
                let pid = self.tasks.get(&tid).map_or(child, |t| t.pid);
                let owner = shim::process::of_thread(child).unwrap_or(child);
                let of = if owner == pid { pid } else { child };
                self.tasks
                    .entry(child)
                    .or_insert_with(|| Task::new(child, of, Role::Native));
                if let Some(stray) = self.strays.remove(&child) {
                    self.detach(stray)?;
                }
                0
            }
            _ => 0,
        };
        self.tasks.remove(&tid);
        stopped.detach(signal)?;
        Ok(())
    }
}

/// Why a process cannot be seized, for a person.
fn refusal(pid: i32, tracer: Option<i32>, error: &ptrace::PtraceError) -> String {
    if let Some(tracer) = tracer {
        return format!(
            "process {pid} has a tracer already (process {tracer}): a debugger, strace, or the deputy of another job"
        );
    }
    format!(
        "process {pid} may not be traced ({error}): it has other credentials than you, it has made itself undumpable, or a \
         security module forbids it (kernel.yama.ptrace_scope must be 0 for processes that are not your children)"
    )
}

/// A process and what descends from it.
fn tree_of(root: i32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name may hold anything; the parent is the second field after it (proc_pid_stat(5)).
        let parent = stat
            .rfind(')')
            .and_then(|end| stat[end + 1..].split_whitespace().nth(1)?.parse::<i32>().ok());
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut tree = vec![root];
    let mut at = 0;
    while let Some(pid) = tree.get(at) {
        let next = children.remove(pid).unwrap_or_default();
        tree.extend(next);
        at += 1;
    }
    tree
}

/// Whether a thread waits for the child of a vfork that it made before it was seized.
fn waits_in_vfork(pid: i32, tid: i32) -> bool {
    // Uninterruptibly, which a thread in a stop of ours is not.
    let status = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
    if !status.lines().any(|l| l.starts_with("State:\tD")) {
        return false;
    }
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).unwrap_or_default();
    // "NUMBER 0xARG0 0xARG1 ..." (proc_pid_syscall(5)), "running" and "-1 ..." otherwise.
    let mut words = text.split_whitespace();
    let nr = words.next().and_then(|n| n.parse::<i64>().ok()).unwrap_or(-1);
    let first = words
        .next()
        .and_then(|w| u64::from_str_radix(w.trim_start_matches("0x"), 16).ok())
        .unwrap_or(0);
    let flags = match nr {
        libc::SYS_vfork => libc::CLONE_VFORK as u64,
        libc::SYS_clone => first,
        libc::SYS_clone3 => {
            let mut flags = [0; 8];
            match ProcessMemory::new(pid).read_forced(first, &mut flags) {
                Ok(()) => u64::from_ne_bytes(flags),
                Err(_) => 0,
            }
        }
        _ => 0,
    };
    flags & libc::CLONE_VFORK as u64 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_its_root_and_its_descendants() {
        let me = std::process::id() as i32;
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep");
        let pid = child.id() as i32;
        assert!(tree_of(me).contains(&pid));
        assert_eq!(tree_of(pid), [pid]);
        assert!(!has_ended(pid) && tracer_of(pid).is_none());
        assert!(!waits_in_vfork(pid, pid));
        child.kill().expect("kill");
        child.wait().expect("wait");
        assert!(has_ended(pid));
    }

    #[test]
    fn a_refusal_names_the_tracer() {
        let Err(error) = ptrace::interrupt(1 << 29) else {
            panic!("there is no such thread")
        };
        assert!(refusal(5, Some(77), &error).contains("77"));
        assert!(refusal(5, None, &error).contains("yama"));
    }
}
