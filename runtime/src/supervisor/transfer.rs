//! What a group of captured guests takes home with it, on its way.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use linklayer::image::ProcessImage;
use linklayer::pages::Writer;
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, Phase, Times, Vfork};
use shim::capture::SharedObjects;
use shim::track::Tracker;

use super::departure::{self, Departure};
use super::shared::{Command, Shared};

/// A captured guest.
pub(super) struct Member {
    pub(super) pid: i32,
    /// A thread of it, as seen here, by which its memory is reached.
    pub(super) reached_by: i32,
    /// Number of its address space.
    pub(super) space: u64,
    pub(super) image: ProcessImage,
    pub(super) reason: StayReason,
    pub(super) vforks: Vec<Vfork>,
    /// The link of its own on which its memory goes, if it has one.
    pub(super) own: Option<Departure>,
}

/// Sends a group home on a thread of its own, and says so to the tracer.
pub(super) fn start(shared: &Arc<Shared>, first: i32, members: Vec<Member>, times: Times) {
    let starter = shared.starter.clone();
    let shared = shared.clone();
    starter.start("homeward", move || {
        let result = send(&shared, members, times).map_err(|e| format!("{e:#}"));
        shared.post(Command::WentHome(first, result));
    });
}

fn send(shared: &Shared, mut members: Vec<Member>, times: Times) -> anyhow::Result<()> {
    let mut group: Vec<i32> = members.iter().map(|m| m.pid).collect();
    let shared_memory = SharedObjects::of(members.iter().map(|m| (m.reached_by, &m.image)));
    let lane = group.first().copied().unwrap_or_default();
    for member in &members {
        let body = wire::Homecoming {
            image: member.image.clone(),
            reason: member.reason.clone(),
            group: group.clone(),
            objects: shared_memory.named_by(&member.image),
            vforks: member.vforks.clone(),
        };
        let body = wire::encode(&body);
        let answer = shared.ask(lane, member.pid, Kind::Homecoming, &body)?;
        if wire::decode::<wire::Errno>(&answer)?.0 == libc::ESRCH {
            // Killed at home; it is about to be removed here.
            group.retain(|pid| *pid != member.pid);
            continue;
        }
        wire::done(&answer).context("layout at home")?;
    }
    let begun = Instant::now();
    let mut writer = Writer::default();
    let mut spaces = HashSet::new();
    let mut report = wire::MoveReport {
        mode: wire::Mode::Freeze,
        ..wire::MoveReport::default()
    };
    // What watched their memory is kept until nobody needs that any more.
    let mut trackers = Vec::new();
    for member in members.iter_mut().filter(|m| group.contains(&m.pid)) {
        if !spaces.insert(member.space) {
            continue;
        }
        match member.own.take() {
            Some(own) => {
                let (sent, tracker) = send_own(member, own)?;
                trackers.extend(tracker);
                report.times += sent.times;
                report.pages += sent.pages;
                report.rounds = report.rounds.max(sent.rounds);
                report.mode = sent.mode;
                report.note = sent.note;
            }
            None => send_pages(shared, lane, member, &mut writer)?,
        }
    }
    let link = shared.link()?;
    // Home's new objects are empty.
    shared_memory.read(&mut |id, offset, data| {
        let parts = [&id.to_le_bytes()[..], &offset.to_le_bytes(), data];
        link.tell(lane, lane, Kind::SharedPages, &parts)
            .map_err(io::Error::other)
    })?;
    report.times += times;
    report.pages += writer.counts;
    report.times.pages_us = begun.elapsed().as_micros() as u64;
    for pid in &group {
        let progress = wire::Progress {
            pid: *pid,
            phase: Phase::Resume,
            report: report.clone(),
            left: 0,
        };
        departure::tell_progress(shared, lane, &progress);
    }
    let commit = wire::encode(&wire::HomeCommit { group });
    wire::done(&shared.ask(lane, lane, Kind::HomeCommit, &commit)?).context("resuming at home")
}

/// Sends the memory of a process on its own link, and waits until home has written it.
fn send_own(member: &Member, own: Departure) -> anyhow::Result<(wire::MoveReport, Option<Tracker>)> {
    let (link, tracker, mut writer, mut report) = own.into_parts();
    let pid = member.pid;
    let all = shim::capture::all_runs(member.reached_by, &member.image.areas)?;
    let mut sink = |kind: Kind, parts: &[&[u8]]| link.tell(pid, pid, kind, parts).map_err(io::Error::other);
    match &tracker {
        Some(tracker) => {
            let runs = tracker.round()?;
            shim::capture::write_pages(member.reached_by, &runs, &mut writer, &mut sink)?;
            wire::present(&all, &mut |body| sink(Kind::Present, &[body]))?;
        }
        None => shim::capture::write_pages(member.reached_by, &all, &mut writer, &mut sink)?,
    }
    report.pages = writer.counts;
    wire::done(&link.ask(pid, Kind::PagesEnd, &[])?).context("memory at home")?;
    Ok((report, tracker))
}

fn send_pages(shared: &Shared, lane: i32, member: &Member, writer: &mut Writer) -> anyhow::Result<()> {
    let link = shared.link()?;
    let runs = shim::capture::all_runs(member.reached_by, &member.image.areas)?;
    shim::capture::write_pages(member.reached_by, &runs, writer, &mut |kind, parts| {
        link.tell(lane, member.pid, kind, parts).map_err(io::Error::other)
    })?;
    Ok(())
}
