//! What a group of captured guests takes home with it, on its way.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use linklayer::image::ProcessImage;
use linklayer::pages::Writer;
use linklayer::quic::{Link, STANDSTILL};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, Mode, Phase, Times, Vfork};
use shim::capture::SharedObjects;
use shim::postcopy::Pusher;
use shim::track::Tracker;

use super::departure::{self, Departure, Failure, Parts};
use super::guest::Guest;
use super::held;
use super::shared::{Command, Shared};
use shim::faults::{self, Point};

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

/// Sends a group home on a thread of its own, and tells the tracer under this number what came of it.
pub(super) fn start(
    shared: &Arc<Shared>,
    number: u64,
    (members, guests): (Vec<Member>, Vec<Arc<Guest>>),
    times: Times,
) {
    let starter = shared.starter.clone();
    let shared = shared.clone();
    starter.start("homeward", move || {
        let result = send(&shared, members, times)
            .map_err(|e| Failure::new(Phase::Transfer, format!("{e:#}")))
            .and_then(|(lane, group, rest)| commit(&shared, &guests, (lane, group), rest));
        shared.post(Command::WentHome(number, result));
    });
}

/// Home has everything: it is to run those who are still there. Then comes what they run there without.
fn commit(
    shared: &Shared,
    guests: &[Arc<Guest>],
    (lane, group): (i32, Vec<i32>),
    rest: Option<Rest>,
) -> Result<(), Failure> {
    faults::at(Point::SourceResume, lane).map_err(|why| Failure::new(Phase::Resume, why))?;
    let cut = |rest: &Rest| !rest.link.await_live(STANDSTILL);
    if rest.as_ref().is_some_and(cut) {
        let why = "the link on which the rest of it is to go is cut";
        return Err(Failure::new(Phase::Resume, why));
    }
    let home = |e: &dyn std::fmt::Display| Failure::new(Phase::Resume, format!("home: {e}"));
    let commit = wire::encode(&wire::HomeCommit { group });
    let answer = shared
        .ask(lane, lane, Kind::HomeCommit, &commit)
        .map_err(|e| home(&e))?;
    wire::done(&answer).map_err(|e| home(&e))?;
    if let Some(Rest { link, pusher }) = rest {
        guests.iter().for_each(|guest| guest.vacate());
        departure::push(&pusher, &link);
    }
    Ok(())
}

/// Gives the lane on which all went, those who have been sent, and what of one of them is still to be sent.
fn send(
    shared: &Shared,
    mut members: Vec<Member>,
    times: Times,
) -> anyhow::Result<(i32, Vec<i32>, Option<Rest>)> {
    let mut group: Vec<i32> = members.iter().map(|m| m.pid).collect();
    for pid in &group {
        faults::at(Point::SourceTransfer, *pid).map_err(anyhow::Error::msg)?;
    }
    let shared_memory = SharedObjects::of(members.iter().map(|m| (m.reached_by, &m.image)));
    let lane = group.first().copied().unwrap_or_default();
    // Who shares memory comes with it.
    let lazy = |member: &Member| {
        members.len() == 1
            && shared_memory.named_by(&member.image).is_empty()
            && member.image.held().is_empty()
            && member.own.as_ref().is_some_and(Departure::is_lazy)
    };
    let held: BTreeSet<u64> = members
        .iter()
        .flat_map(|m| m.image.held().into_iter().chain(shared.held.of(m.pid)))
        .collect();
    shared.held.leave(&held, &group)?;
    held::write_back(shared, held.iter().copied()).context("a mapped file")?;
    for member in &members {
        let body = wire::Homecoming {
            held: held.iter().copied().collect(),
            image: member.image.clone(),
            reason: member.reason.clone(),
            group: group.clone(),
            objects: shared_memory.named_by(&member.image),
            vforks: member.vforks.clone(),
            postcopy: lazy(member),
            early: members
                .iter()
                .any(|other| other.space == member.space && other.own.as_ref().is_some_and(|own| own.early)),
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
    let lazily: HashSet<i32> = members.iter().filter(|m| lazy(m)).map(|m| m.pid).collect();
    let mut rest = None;
    tracing::debug!(?group, ?lazily, "goes home");
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
                let (sent, tracker, more) = send_own(member, own, lazily.contains(&member.pid))?;
                trackers.extend(tracker);
                rest = rest.or(more);
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
    Ok((lane, group, rest))
}

/// What of a process that runs at home is still to be sent.
struct Rest {
    link: Link,
    pusher: Arc<Pusher>,
}

/// Sends the memory of a process on its own link, and waits until home has written it. With `lazy`, what can come later is given
/// back.
fn send_own(
    member: &Member,
    own: Departure,
    lazy: bool,
) -> anyhow::Result<(wire::MoveReport, Option<Tracker>, Option<Rest>)> {
    let (wanted, early) = (own.is_lazy(), own.early);
    let Parts {
        link,
        source,
        tracker,
        mut writer,
        mut report,
    } = own.into_parts();
    if wanted && !lazy {
        report.mode = if tracker.is_some() {
            Mode::Precopy
        } else {
            Mode::Freeze
        };
        report.note = "not sent while it runs at home: it shares memory".into();
    }
    let pid = member.pid;
    let all = shim::capture::all_runs(member.reached_by, &member.image.areas)?;
    let mut sink = |kind: Kind, parts: &[&[u8]]| link.tell(pid, pid, kind, parts).map_err(io::Error::other);
    let later = shim::capture::send_pages(
        &member.image,
        member.reached_by,
        (&all, tracker.as_ref()),
        (lazy, early),
        &mut writer,
        &mut sink,
    )?;
    report.pages = writer.counts;
    wire::done(&link.ask(pid, Kind::PagesEnd, &[])?).context("memory at home")?;
    if !lazy {
        return Ok((report, tracker, None));
    }
    let pusher = source.serve(&link, pid, member.reached_by, later)?;
    Ok((report, tracker, Some(Rest { link, pusher })))
}

fn send_pages(shared: &Shared, lane: i32, member: &Member, writer: &mut Writer) -> anyhow::Result<()> {
    let link = shared.link()?;
    let runs = shim::capture::all_runs(member.reached_by, &member.image.areas)?;
    shim::capture::write_pages(member.reached_by, &runs, writer, &mut |kind, parts| {
        link.tell(lane, member.pid, kind, parts).map_err(io::Error::other)
    })?;
    Ok(())
}
