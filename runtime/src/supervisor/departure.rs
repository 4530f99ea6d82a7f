//! Sending a guest to another node: straight there, and only when home has switched its contact, it is forgotten here.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use linklayer::frame::Header;
use linklayer::image::{AreaKind, ProcessImage};
use linklayer::pages::Writer;
use linklayer::quic::{Fingerprint, Handler, Link, LinkError, OneTimeKey};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, Mode, MoveReport, MoveTo, Phase};
use shim::track::Tracker;

use super::arrivals;
use super::guest::Guest;
use super::shared::{Command, Shared};
use super::tracer::{Hold, Tracer};

/// From this size on a guest runs while its memory is sent, when nobody says otherwise, bytes.
const PRECOPY_BYTES: u64 = 64 << 20;
/// A guest with more memory than this gets a link of its own to go home, bytes.
const LARGE_BYTES: u64 = 4 << 20;
/// How long home may take from being told of the link to its first packet.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(20);

/// A guest that is to leave, and what was made ready for it.
pub(super) struct Departure {
    pid: i32,
    /// Why it goes home, if it does not go to another node.
    home: Option<StayReason>,
    link: Link,
    pub(super) tracker: Option<Tracker>,
    writer: Writer,
    report: MoveReport,
    since: Instant,
}

/// A link that only sends, and gets answers.
struct Mute;

impl Handler for Mute {
    fn frame(&self, link: &Link, _lane: u32, header: Header, _payload: Vec<u8>) {
        tracing::error!(
            kind = header.kind,
            "a frame that nobody asked for on the link of a process"
        );
        link.close();
    }

    fn lost(&self, why: &LinkError) {
        tracing::debug!(error = %why, "link of a process");
    }
}

/// Why a guest does not leave.
pub(super) struct Failure {
    pub(super) phase: Phase,
    pub(super) why: String,
}

impl Failure {
    pub(super) fn new(phase: Phase, why: impl std::fmt::Display) -> Failure {
        Failure {
            phase,
            why: why.to_string(),
        }
    }
}

/// Home wants a guest to go to another node: makes everything ready on a thread of its own.
pub(super) fn begin(shared: &Arc<Shared>, order: MoveTo) {
    let starter = shared.starter.clone();
    let shared = shared.clone();
    starter.start("departure", move || match make_ready(&shared, &order) {
        Ok(departure) => shared.post(Command::Depart(Box::new(departure))),
        Err(failure) => failed(&shared, order.pid, failure),
    });
}

/// Tells home that a guest goes on here.
pub(super) fn failed(shared: &Shared, pid: i32, failure: Failure) {
    let Failure { phase, why } = failure;
    tracing::error!(pid, %phase, why, "does not leave; it goes on here");
    let body = wire::MoveFailed { pid, phase, why };
    shared.tell(pid, Kind::MoveFailed, &wire::encode(&body));
}

fn make_ready(shared: &Arc<Shared>, order: &MoveTo) -> Result<Departure, Failure> {
    let pid = order.pid;
    let guest = shared.guests.read().get(&pid).cloned();
    let guest = guest.ok_or_else(|| Failure::new(Phase::Seize, "it is not here any more"))?;
    if let Some(why) = shares_memory(shared, &guest) {
        return Err(Failure::new(Phase::Reach, why));
    }
    let reach = |e: LinkError| {
        Failure::new(
            Phase::Reach,
            format!("that node cannot be reached from here: {e}"),
        )
    };
    let key = OneTimeKey::from_bytes(&order.key).map_err(reach)?;
    let peer = Fingerprint(order.place.fingerprint);
    let link =
        Link::connect(order.place.addr, &key, peer, Arc::new(Mute), arrivals::options()).map_err(reach)?;
    let mut departure = Departure::new(pid, None, link);
    announce_files(shared, &guest, &departure);
    if wants_precopy(order.mode, super::usage::resident_bytes(guest.memory.pid()))
        && let Err(why) = precopy(shared, &mut departure)
    {
        departure.not_while_it_ran(&why);
    }
    departure.since = Instant::now();
    Ok(departure)
}

/// Why a guest does not go alone: those who share memory go together, by way of home.
fn shares_memory(shared: &Shared, guest: &Guest) -> Option<&'static str> {
    let same_space = |other: &Arc<Guest>| other.pid != guest.pid && other.space == guest.space;
    if shared.guests.read().values().any(same_space) {
        return Some("it has the memory of another process");
    }
    let lines = shim::capture::map_lines(guest.memory.pid(), false).unwrap_or_default();
    lines
        .iter()
        .any(shim::capture::MapLine::shares_memory)
        .then_some("it maps memory that can be shared")
}

/// Tells the other node which files the guest maps, so that they are there when it is built.
fn announce_files(shared: &Shared, guest: &Guest, departure: &Departure) {
    let lines = shim::capture::map_lines(guest.memory.pid(), false).unwrap_or_default();
    let mut seen = HashSet::new();
    let files = lines
        .iter()
        .filter_map(|line| shim::capture::file_id(&line.path))
        .filter(|id| seen.insert(*id))
        .filter_map(|id| shared.files.known(id))
        .collect();
    let body = wire::encode(&wire::Prefetch { files });
    if let Err(e) = send(&departure.link, departure.pid, Kind::Prefetch, &[&body]) {
        tracing::debug!(error = %e, "files not announced");
    }
}

fn wants_precopy(mode: Mode, size_bytes: u64) -> bool {
    match mode {
        Mode::Auto => size_bytes >= PRECOPY_BYTES,
        Mode::Freeze => false,
        Mode::Precopy => true,
    }
}

/// Home wants a guest back. One with little memory is stopped at once and sent on the contact; for another, home connects to a
/// link of its own first.
pub(super) fn begin_home(shared: &Arc<Shared>, bring: wire::Bring) {
    let wire::Bring { pid, reason, mode } = bring;
    let guest = shared.guests.read().get(&pid).cloned();
    let size_bytes = guest.map_or(0, |g| super::usage::resident_bytes(g.memory.pid()));
    if size_bytes <= LARGE_BYTES && mode != Mode::Precopy {
        shared.post(Command::GoHome(pid, reason));
        return;
    }
    let starter = shared.starter.clone();
    let shared = shared.clone();
    starter.start("departure", move || match link_to_home(&shared, pid) {
        Ok(link) => {
            let mut departure = Departure::new(pid, Some(reason), link);
            if wants_precopy(mode, size_bytes)
                && let Err(why) = precopy(&shared, &mut departure)
            {
                departure.not_while_it_ran(&why);
            }
            departure.since = Instant::now();
            shared.post(Command::Depart(Box::new(departure)));
        }
        Err(e) => {
            tracing::warn!(pid, error = format!("{e:#}"), "pages go on the contact");
            shared.post(Command::GoHome(pid, reason));
        }
    });
}

/// Has home connect to a link for the memory of one process.
fn link_to_home(shared: &Arc<Shared>, pid: i32) -> anyhow::Result<Link> {
    let key = OneTimeKey::generate()?;
    let (listener, place) = arrivals::bind(shared)?;
    let request = wire::Coming {
        pid,
        place,
        key: key.to_bytes(),
    };
    let (say, said) = crossbeam_channel::bounded(1);
    let peer = key.fingerprint();
    shared.starter.start("accept", move || {
        let _ = say.send(listener.accept(peer, Arc::new(Mute), ACCEPT_TIMEOUT, arrivals::options()));
    });
    let answer = shared.ask(pid, pid, Kind::Coming, &wire::encode(&request))?;
    let wire::Errno(errno) = wire::decode(&answer)?;
    let why = nix::errno::Errno::from_raw(errno).desc();
    anyhow::ensure!(errno == 0, "home: {why}");
    Ok(said.recv()??)
}

impl Departure {
    fn new(pid: i32, home: Option<StayReason>, link: Link) -> Departure {
        Departure {
            pid,
            home,
            link,
            tracker: None,
            writer: Writer::default(),
            report: MoveReport {
                mode: Mode::Freeze,
                ..MoveReport::default()
            },
            since: Instant::now(),
        }
    }

    fn not_while_it_ran(&mut self, why: &str) {
        self.report.note = format!("not sent while it ran: {why}");
        self.report.mode = Mode::Freeze;
        self.tracker = None;
    }

    /// The way home for the memory of its process.
    pub(super) fn into_parts(self) -> (Link, Option<Tracker>, Writer, MoveReport) {
        (self.link, self.tracker, self.writer, self.report)
    }
}

fn precopy(shared: &Arc<Shared>, departure: &mut Departure) -> Result<(), String> {
    let begun = Instant::now();
    let pid = departure.pid;
    let (done, tracked) = crossbeam_channel::bounded(1);
    shared.post(Command::Track(pid, done));
    let tracker = tracked.recv().map_err(|e| e.to_string())??;
    let link = &departure.link;
    let rounds = tracker
        .precopy(
            &mut departure.writer,
            &mut |kind, parts| send(link, pid, kind, parts),
            &mut |writer, rounds, left| {
                let report = MoveReport {
                    pages: writer.counts,
                    rounds,
                    mode: Mode::Precopy,
                    ..MoveReport::default()
                };
                tell_progress(shared, pid, pid, Phase::Precopy, report, left);
            },
        )
        .map_err(|e| e.to_string())?;
    departure.report.rounds = rounds;
    departure.report.mode = Mode::Precopy;
    departure.report.times.precopy_us = begun.elapsed().as_micros() as u64;
    departure.tracker = Some(tracker);
    Ok(())
}

/// Tells home how far a move has got.
pub(super) fn tell_progress(
    shared: &Shared,
    pid: i32,
    lane: i32,
    phase: Phase,
    report: MoveReport,
    left: u64,
) {
    let progress = wire::Progress {
        pid,
        phase,
        report,
        left,
    };
    shared.tell(lane, Kind::Progress, &wire::encode(&progress));
}

pub(super) fn send(link: &Link, pid: i32, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
    let header = Header::new(kind as u16, pid, link.next_seq());
    link.send(pid as u32, header, parts).map_err(io::Error::other)
}

impl Tracer {
    /// Everything is ready: the guest is stopped.
    pub(super) fn depart(&mut self, departure: Departure) -> anyhow::Result<()> {
        let pid = departure.pid;
        let refuse = |why: &str| failed(&self.shared, pid, Failure::new(Phase::Seize, why));
        if !self.shared.guests.read().contains_key(&pid) {
            refuse("it is not here any more");
            return Ok(());
        }
        if self.holds.get(&pid).is_some_and(Hold::captures) {
            if departure.home.is_none() {
                refuse("it is on its way home");
            }
            return Ok(());
        }
        let hold = match departure.home.clone() {
            Some(reason) => Hold::Home { first: pid, reason },
            None => Hold::Node,
        };
        self.departures.insert(pid, departure);
        self.hold(pid, hold)
    }

    /// A guest's memory is to be watched: all its threads are stopped for a moment.
    pub(super) fn track(
        &mut self,
        pid: i32,
        done: crossbeam_channel::Sender<Result<Tracker, String>>,
    ) -> anyhow::Result<()> {
        let held = self.holds.get(&pid).is_some_and(Hold::captures);
        if held || !self.shared.guests.read().contains_key(&pid) {
            let _ = done.send(Err("it moves already, or has ended".into()));
            return Ok(());
        }
        self.tracking.insert(pid, done);
        self.hold(pid, Hold::Track)
    }

    /// All threads of a guest that is to be watched are stopped.
    pub(super) fn track_held(&mut self, pid: i32) -> anyhow::Result<()> {
        let Some(done) = self.tracking.remove(&pid) else {
            return self.release(pid);
        };
        let guest = self.shared.guests.read().get(&pid).cloned();
        let leader = guest
            .as_ref()
            .and_then(|g| self.threads.get_mut(&g.outer))
            .and_then(|t| t.held.as_mut());
        let begun = match (leader, guest) {
            (Some(leader), Some(guest)) => Tracker::begin(leader, guest.pass_key).map_err(|e| e.to_string()),
            _ => Err("its first thread has ended".into()),
        };
        let _ = done.send(begun);
        self.release(pid)
    }

    /// All threads of a guest that leaves are stopped, and nothing more arrives for it.
    pub(super) fn departure_held(&mut self, guest: &Arc<Guest>) -> anyhow::Result<()> {
        let pid = guest.pid;
        let Some(mut departure) = self.departures.remove(&pid) else {
            return Ok(());
        };
        departure.report.times.seize_us = departure.since.elapsed().as_micros() as u64;
        if !self.relatives(std::slice::from_ref(guest)).is_empty()
            || !super::homeward::shared_objects(guest).is_empty()
        {
            // Those who share memory move together, which is home's business.
            let why = "it shares memory".to_string();
            return self.departed(pid, Err(Failure::new(Phase::Reach, why)));
        }
        let begun = Instant::now();
        let launch = match self.describe_departure(guest, departure.tracker.is_some()) {
            Ok(launch) => launch,
            Err(failure) => return self.departed(pid, Err(failure)),
        };
        departure.report.times.dump_us = begun.elapsed().as_micros() as u64;
        let (shared, guest) = (self.shared.clone(), guest.clone());
        self.shared.starter.start("departure", move || {
            let result = transfer(&shared, guest.memory.pid(), launch, &mut departure);
            shared.post(Command::Departed(pid, guest.outer, result));
            departure.link.close();
        });
        Ok(())
    }

    fn describe_departure(&mut self, guest: &Arc<Guest>, tracked: bool) -> Result<wire::Launch, Failure> {
        self.capture(guest, tracked)
            .and_then(|(image, _)| self.launch_of(guest, image))
            .map_err(|e| Failure::new(Phase::Dump, format!("{e:#}")))
    }

    /// What the other node needs to build a captured guest.
    fn launch_of(&self, guest: &Guest, mut image: ProcessImage) -> anyhow::Result<wire::Launch> {
        let mut files = Vec::new();
        let mut named = HashSet::new();
        for area in &image.areas {
            match area.kind {
                AreaKind::File { file_id, .. } if named.insert(file_id) => {
                    let file = self.shared.files.known(file_id);
                    files.push(file.with_context(|| format!("file {file_id} of an area is not known"))?);
                }
                AreaKind::SharedAnon { .. } => {
                    anyhow::bail!("it maps memory that can be shared");
                }
                _ => {}
            }
        }
        image.vdso = self.shared.vdso_of_home();
        let overruns = guest.overruns.lock().iter().map(|(id, n)| (*id, *n)).collect();
        Ok(wire::Launch {
            image,
            files,
            hostname: self.shared.hostname_of_home(),
            overruns,
        })
    }

    /// The guest runs at the other node now, or it goes on here.
    pub(super) fn departed(&mut self, pid: i32, result: Result<(), Failure>) -> anyhow::Result<()> {
        match result {
            Ok(()) => {
                let guest = self.shared.guests.read().get(&pid).cloned();
                guest.map_or(Ok(()), |guest| self.forget_guest(&guest))
            }
            Err(failure) => {
                failed(&self.shared, pid, failure);
                self.release(pid)
            }
        }
    }
}

fn transfer(
    shared: &Shared,
    reached_by: i32,
    launch: wire::Launch,
    departure: &mut Departure,
) -> Result<(), Failure> {
    let pid = departure.pid;
    let link = &departure.link;
    let report = &mut departure.report;
    let sending = |e: io::Error| Failure::new(Phase::Transfer, e);
    let begun = Instant::now();
    let all = shim::capture::all_runs(reached_by, &launch.image.areas).map_err(sending)?;
    send(link, pid, Kind::Launch, &[&wire::encode(&launch)]).map_err(sending)?;
    let runs = match &departure.tracker {
        Some(tracker) => tracker.round().map_err(sending)?,
        None => all.clone(),
    };
    let mut sink = |kind: Kind, parts: &[&[u8]]| send(link, pid, kind, parts);
    shim::capture::write_pages(reached_by, &runs, &mut departure.writer, &mut sink).map_err(sending)?;
    if departure.tracker.is_some() {
        wire::present(&all, &mut |body| send(link, pid, Kind::Present, &[body])).map_err(sending)?;
    }
    report.pages = departure.writer.counts;
    report.times.pages_us = begun.elapsed().as_micros() as u64;
    let asked = Instant::now();
    let header = Header::new(Kind::LaunchBuild as u16, pid, link.next_seq());
    let (_, answer) = link
        .call(pid as u32, header, &[&wire::encode(&wire::Pid(pid))])
        .map_err(|e| Failure::new(Phase::Transfer, e))?;
    let ready: wire::LaunchReady = wire::decode(&answer).map_err(|e| Failure::new(Phase::Transfer, e))?;
    if !ready.refused.is_empty() {
        return Err(Failure::new(Phase::Restore, ready.refused));
    }
    let waited = asked.elapsed().as_micros() as u64;
    report.times.restore_us = ready.restore_us.min(waited);
    report.times.transfer_us = waited - report.times.restore_us;
    let moved = wire::Moved {
        pid,
        report: report.clone(),
    };
    let answer = shared
        .ask(pid, pid, Kind::Moved, &wire::encode(&moved))
        .map_err(|e| Failure::new(Phase::Resume, e))?;
    let wire::Errno(errno) = wire::decode(&answer).map_err(|e| Failure::new(Phase::Resume, e))?;
    if errno != 0 {
        let why = nix::errno::Errno::from_raw(errno).desc();
        return Err(Failure::new(Phase::Resume, format!("home: {why}")));
    }
    Ok(())
}
