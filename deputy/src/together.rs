//! Processes that share memory leave home together, all or none.
//!
//! Who belongs to a group is found when its first members stand still; whoever is found then is stopped too, until there is
//! nobody left who could see the memory change. All are built on the node before the first of them loses its memory here.

use std::collections::{BTreeSet, HashMap, HashSet};

use anyhow::Context;
use linklayer::image::{AreaKind, ProcessImage};
use linklayer::pages::Writer;
use linklayer::quic::Link;
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, MoveReport};
use shim::capture::{SharedObjects, send_process, shared_objects};
use shim::ptrace::Stopped;
use shim::vessel::Vessel;

use crate::home::Home;
use crate::outward::{Wish, reason_of};
use crate::process::{Mode, send};
use crate::road::Description;
use crate::shared::Command;

/// Processes that are being stopped so as to leave home together.
pub struct Together {
    /// Where to.
    node: u32,
    /// Who asked, unless the first was to begin there.
    wish: Option<Wish>,
    members: BTreeSet<i32>,
    /// Their threads that have stopped.
    held: HashMap<i32, Stopped>,
}

/// A group that has been sent: whom and where to.
pub struct Sent {
    node: u32,
    wish: Option<Wish>,
    members: Vec<i32>,
}

impl Home {
    /// Whether a process whose threads are all stopped, and that looks like this, has to take others with it or shares memory
    /// of its own.
    pub(crate) fn shares_memory(&self, pid: i32, image: &ProcessImage) -> bool {
        let maps_shared = image
            .areas
            .iter()
            .any(|area| matches!(area.kind, AreaKind::SharedAnon { .. }));
        maps_shared || self.sharers(&BTreeSet::from([pid])).len() > 1
    }

    /// A process that stands still with all its threads is to leave with those whose memory it shares.
    pub(crate) fn depart_together(
        &mut self,
        first: i32,
        node: u32,
        wish: Option<Wish>,
        threads: Vec<Stopped>,
    ) -> anyhow::Result<()> {
        if let Some(process) = self.processes.get_mut(&first) {
            process.together = Some(first);
        }
        let group = Together {
            node,
            wish,
            members: BTreeSet::from([first]),
            held: threads.into_iter().map(|t| (t.tid(), t)).collect(),
        };
        self.together.insert(first, group);
        self.together_progress(first)
    }

    /// A thread of a process that leaves with others has stopped.
    pub(crate) fn held_together(&mut self, first: i32, stopped: Stopped) -> anyhow::Result<()> {
        match self.together.get_mut(&first) {
            Some(group) => {
                group.held.insert(stopped.tid(), stopped);
                self.together_progress(first)
            }
            None => self.let_go(stopped),
        }
    }

    /// Goes on with a group as far as its members stand still.
    pub(crate) fn together_progress(&mut self, first: i32) -> anyhow::Result<()> {
        loop {
            let Some(group) = self.together.get_mut(&first) else {
                return Ok(());
            };
            let known = &self.processes;
            group.members.retain(|pid| known.contains_key(pid));
            if !group.members.contains(&first) {
                return self.not_together(first, &anyhow::anyhow!("process {first} has ended"));
            }
            if let Some(busy) = group
                .members
                .iter()
                .find(|pid| known.get(pid).is_some_and(|p| p.vforking > 0))
                .copied()
            {
                // Its thread stops only when its child has given the memory back.
                return self.after_vfork(first, busy);
            }
            let members = group.members.clone();
            let held: HashSet<i32> = group.held.keys().copied().collect();
            let stands = |pid: &i32| self.living(*pid).iter().all(|tid| held.contains(tid));
            if !members.iter().all(stands) {
                return Ok(());
            }
            let more: Vec<i32> = self.sharers(&members).difference(&members).copied().collect();
            if more.is_empty() {
                return self.leave_together(first);
            }
            for pid in more {
                if let Some(why) = self.cannot_join(pid) {
                    return self.not_together(first, &why);
                }
                self.join(first, pid)?;
            }
        }
    }

    /// A member has executed a program: its memory is new and its own. A move that was asked for is made with the new program.
    pub(crate) fn executed_together(&mut self, pid: i32) {
        let Some(first) = self.processes.get_mut(&pid).and_then(|p| p.together.take()) else {
            return;
        };
        let Some(group) = self.together.get_mut(&first) else {
            return;
        };
        group.members.remove(&pid);
        let tasks = &self.tasks;
        group
            .held
            .retain(|tid, _| tasks.get(tid).is_some_and(|t| t.pid != pid));
        if pid == first
            && let Some(wish) = group.wish.take()
        {
            self.shared.post(Command::Out(pid, Box::new(wish)));
        }
        if let Err(e) = self.together_progress(first) {
            tracing::error!(error = format!("{e:#}"), "processes that leave");
        }
    }

    fn cannot_join(&self, pid: i32) -> Option<anyhow::Error> {
        let because = |reason: StayReason| {
            let whom = format!("process {pid}, with which it shares memory");
            Some(anyhow::Error::new(reason).context(whom))
        };
        let process = self.processes.get(&pid)?;
        if !matches!(process.mode, Mode::Native) || process.leaving.is_some() || process.breakpoint.is_some()
        {
            return because(StayReason::Moving);
        }
        if process.together.is_some() {
            return because(StayReason::Moving);
        }
        None
    }

    fn join(&mut self, first: i32, pid: i32) -> anyhow::Result<()> {
        if let Some(process) = self.processes.get_mut(&pid) {
            process.together = Some(first);
        }
        if let Some(group) = self.together.get_mut(&first) {
            group.members.insert(pid);
        }
        self.stop_to_leave(pid)
    }

    /// Some processes at home, and all of the job who share memory with one of them.
    fn sharers(&self, members: &BTreeSet<i32>) -> BTreeSet<i32> {
        let mut found = members.clone();
        let others = || {
            let at_home = |p: &&crate::process::Process| !matches!(p.mode, Mode::Away(_));
            self.processes.values().filter(at_home).map(|p| p.pid)
        };
        let mut objects = HashSet::new();
        for pid in members {
            objects.extend(shared_objects(*pid));
        }
        for pid in others().filter(|pid| !members.contains(pid)) {
            let one_memory = || {
                members
                    .iter()
                    .any(|member| shim::process::same_memory(*member, pid) == Some(true))
            };
            if one_memory()
                || (!objects.is_empty() && shared_objects(pid).iter().any(|o| objects.contains(o)))
            {
                found.insert(pid);
            }
        }
        found
    }

    /// It does not come about: everybody goes on at home.
    fn not_together(&mut self, first: i32, why: &anyhow::Error) -> anyhow::Result<()> {
        let Some(group) = self.together.remove(&first) else {
            return Ok(());
        };
        tracing::info!(pid = first, why = format!("{why:#}"), "stays at home");
        self.ungroup(group.members.iter().copied());
        match group.wish {
            Some(wish) => wish.fail(format!("process {first} stays at home: {why:#}")),
            None => {
                if let Some(process) = self.processes.get_mut(&first) {
                    process.stay = Some(reason_of(why));
                }
                self.publish(first);
            }
        }
        self.release(group.held.into_values().collect())
    }

    fn ungroup(&mut self, members: impl Iterator<Item = i32>) {
        for pid in members {
            if let Some(process) = self.processes.get_mut(&pid) {
                process.together = None;
            }
        }
    }

    /// A member waits for the child of a vfork: all go on, and it is tried again when the child has given the memory back.
    fn after_vfork(&mut self, first: i32, busy: i32) -> anyhow::Result<()> {
        let Some(group) = self.together.remove(&first) else {
            return Ok(());
        };
        self.ungroup(group.members.iter().copied());
        if let (Some(wish), Some(process)) = (group.wish, self.processes.get_mut(&busy)) {
            process.after_vfork.push((first, wish));
        }
        self.release(group.held.into_values().collect())
    }

    /// Everybody stands still and nobody is missing: all are described and sent.
    fn leave_together(&mut self, first: i32) -> anyhow::Result<()> {
        let Some(group) = self.together.remove(&first) else {
            return Ok(());
        };
        let mut by_process: HashMap<i32, Vec<Stopped>> = HashMap::new();
        let mut held = group.held;
        for stopped in held.drain().map(|(_, stopped)| stopped) {
            let pid = self.tasks.get(&stopped.tid()).map_or(first, |t| t.pid);
            by_process.entry(pid).or_default().push(stopped);
        }
        let mut described = Vec::new();
        let mut stopped = Vec::new();
        let mut unknown = false;
        let mut failed = strangers(&group.members).or_else(|| one_memory(&group.members));
        for (pid, mut threads) in by_process {
            threads.sort_by_key(|t| (t.tid() != pid, t.tid()));
            if failed.is_some() {
                stopped.push((pid, threads));
                continue;
            }
            let (threads, result) = self.describe(pid, threads, false);
            stopped.push((pid, threads));
            match result {
                Ok((mut image, files)) => {
                    unknown |= !self.settle_waits(&mut image);
                    described.push(Description { image, files });
                }
                Err(e) => failed = Some(e.context(format!("process {pid}"))),
            }
        }
        let tokens = |stopped: Vec<(i32, Vec<Stopped>)>| stopped.into_iter().flat_map(|(_, t)| t).collect();
        if let Some(why) = failed {
            let held: Vec<Stopped> = tokens(stopped);
            let held = held.into_iter().map(|t| (t.tid(), t)).collect();
            self.together.insert(first, Together { held, ..group });
            return self.not_together(first, &why);
        }
        if unknown {
            self.ungroup(group.members.iter().copied());
            return self.again_together(first, group.wish, tokens(stopped));
        }
        for (pid, threads) in stopped {
            if let Some(process) = self.processes.get_mut(&pid) {
                process.mode = Mode::Launching(threads, group.node);
            }
        }
        let sent = Sent {
            node: group.node,
            wish: group.wish,
            members: group.members.into_iter().collect(),
        };
        let shared = self.shared.clone();
        crate::contact::spawn("launch", move || {
            let result = shared.contact(sent.node).and_then(|link| {
                let report = transfer(&link, first, described).map_err(|e| format!("{e:#}"))?;
                Ok((link, report))
            });
            shared.post(Command::TogetherReady(Box::new(sent), result));
        });
        Ok(())
    }

    /// All guests of a group stand ready on their node, or were refused.
    pub(crate) fn together_ready(
        &mut self,
        sent: Sent,
        result: Result<(Link, MoveReport), String>,
    ) -> anyhow::Result<()> {
        let node = sent.node;
        self.ungroup(sent.members.iter().copied());
        let mut whole = Vec::new();
        let mut killed = Vec::new();
        for pid in &sent.members {
            let Some(process) = self.processes.get_mut(pid) else {
                killed.push(*pid);
                continue;
            };
            match std::mem::replace(&mut process.mode, Mode::Native) {
                Mode::Launching(threads, _) => whole.push((*pid, threads)),
                other => process.mode = other,
            }
        }
        let (link, report) = match result {
            Ok(sent) => sent,
            Err(why) => return self.stay_together(sent, &why, whole),
        };
        let discard = |pid: i32| send(&link, pid, Kind::Discard, &wire::encode(&wire::Pid(pid)));
        killed.into_iter().for_each(discard);
        let mut prepared = Vec::new();
        let mut failed = None;
        let mut unchanged = Vec::new();
        for (pid, mut threads) in whole {
            if failed.is_some() {
                unchanged.push((pid, threads));
                continue;
            }
            let stops = crate::launch::in_group_stop(&threads);
            crate::vessel::set_options(&mut threads, Home::vessel_options());
            match Vessel::prepare(threads, &self.arena) {
                Ok(one) => prepared.push((pid, one, stops)),
                // Killed: the others leave without it.
                Err((threads, _)) if threads.is_empty() => discard(pid),
                Err((threads, e)) => {
                    failed = Some(format!("process {pid} cannot become a vessel: {e}"));
                    unchanged.push((pid, threads));
                }
            }
        }
        if let Some(why) = failed {
            sent.members.iter().copied().for_each(discard);
            unchanged.extend(prepared.into_iter().map(|(pid, one, _)| (pid, one.undo())));
            return self.stay_together(sent, &why, unchanged);
        }
        // From here on there is no way back.
        let mut gone = Vec::new();
        for (pid, one, stops) in prepared {
            match one.settle(false) {
                Ok((vessel, mut parts)) => {
                    let pending = std::mem::take(&mut parts.pending);
                    self.furnish(pid, parts);
                    let how = if sent.wish.is_some() {
                        "asked"
                    } else {
                        "placed at exec"
                    };
                    self.is_away(vessel, (pending, stops), node, &link, how);
                    self.publish(pid);
                    gone.push(pid);
                }
                Err(e) => {
                    tracing::debug!(pid, error = %e, "killed when it was to leave");
                    discard(pid);
                }
            }
        }
        for pid in gone {
            send(&link, pid, Kind::LaunchGo, &wire::encode(&wire::Pid(pid)));
        }
        if let Some(wish) = sent.wish {
            wish.fulfil(report);
        }
        Ok(())
    }

    fn stay_together(
        &mut self,
        sent: Sent,
        why: &str,
        whole: Vec<(i32, Vec<Stopped>)>,
    ) -> anyhow::Result<()> {
        tracing::warn!(node = sent.node, why, members = ?sent.members, "not moved; they run at home");
        for (pid, mut threads) in whole {
            crate::vessel::set_options(&mut threads, Home::options());
            if let Some(process) = self.processes.get_mut(&pid) {
                process.stay = Some(StayReason::NoNode(why.to_string()));
            }
            self.publish(pid);
            self.release(threads)?;
        }
        if let Some(wish) = sent.wish {
            wish.fail(why.to_string());
        }
        Ok(())
    }
}

/// Says who shares memory with the group and does not belong to the job: a process that was there before the job, or that
/// cannot be traced.
fn strangers(members: &BTreeSet<i32>) -> Option<anyhow::Error> {
    let objects: HashSet<(u64, u64)> = members.iter().flat_map(|pid| shared_objects(*pid)).collect();
    if objects.is_empty() {
        return None;
    }
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| !members.contains(pid))
        .find(|pid| shared_objects(*pid).iter().any(|o| objects.contains(o)))
        .map(|pid| StayReason::Stranger(pid).into())
}

/// Says who has one address space with another: such a pair is not built elsewhere.
fn one_memory(members: &BTreeSet<i32>) -> Option<anyhow::Error> {
    members.iter().find_map(|one| {
        let other = members
            .range(one + 1..)
            .find(|other| shim::process::same_memory(*one, **other) == Some(true))?;
        Some(anyhow::Error::new(StayReason::OneMemory(*one)).context(format!("process {other}")))
    })
}

/// Sends a group and waits until all of it stands ready.
fn transfer(link: &Link, first: i32, members: Vec<Description>) -> anyhow::Result<MoveReport> {
    let objects = SharedObjects::of(members.iter().map(|m| (m.image.reached_by(), &m.image)));
    for member in &members {
        let pid = member.image.pid;
        let body = wire::Share {
            pid,
            objects: objects
                .named_by(&member.image)
                .into_iter()
                .map(|object| (object, shim::capture::reserves(&member.image, object.id)))
                .collect(),
        };
        let answer = link.ask(pid, Kind::Share, &wire::encode(&body))?;
        wire::done(&answer).context("shared memory there")?;
    }
    // In front of the first process on its lane, and so before any of them may run.
    objects
        .read(&mut |id, offset, data| {
            let parts = [&id.to_le_bytes()[..], &offset.to_le_bytes(), data];
            link.tell(first, first, Kind::SharedPages, &parts)
                .map_err(std::io::Error::other)
        })
        .context("shared memory")?;
    let mut sent = Vec::new();
    let mut report = MoveReport {
        mode: wire::Mode::Freeze,
        ..MoveReport::default()
    };
    for mut member in members {
        let pid = member.image.pid;
        sent.push(pid);
        member.leave_pending();
        let mut own = MoveReport::default();
        let tid = member.image.reached_by();
        let launch = member.into_launch();
        if let Err(e) = send_process(link, &launch, tid, None, false, &mut Writer::default(), &mut own) {
            for pid in sent {
                send(link, pid, Kind::Discard, &wire::encode(&wire::Pid(pid)));
            }
            return Err(e).context(format!("process {pid}"));
        }
        report.times += own.times;
        report.pages += own.pages;
    }
    Ok(report)
}
