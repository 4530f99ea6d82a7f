//! Sending a guest to another node: straight there, and only when home has switched its contact, it is forgotten here.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use linklayer::choice;
use linklayer::image::{AreaKind, ProcessImage};
use linklayer::pages::Writer;
use linklayer::quic::{Fingerprint, Link, LinkError, OneTimeKey, Options, STANDSTILL};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, LARGE_BYTES, Mode, MoveReport, MoveTo, Phase};
use shim::capture::{SendError, learn_known, send_process, shared_objects};
use shim::postcopy::{Pushed, Pusher, SourceLink};
use shim::process::resident_bytes;
use shim::track::Tracker;

use super::arrivals;
use super::guest::Guest;
use super::shared::{Command, Shared};
use super::tracer::{Hold, Tracer};
use shim::faults::{self, Point};

/// How long home may take from being told of the link to its first packet.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(20);
/// Why a guest does not leave that has ended, or has left already.
const NOT_HERE: &str = "it is not here any more";

/// A guest that is to leave, and what was made ready for it.
pub(super) struct Departure {
    pid: i32,
    guest: Arc<Guest>,
    /// As [`wire::MoveFailed`] has it.
    attempt: u64,
    /// Why it goes home, if it does not go to another node.
    home: Option<StayReason>,
    link: Link,
    /// What the other end may say on it.
    source: Arc<SourceLink>,
    /// It is to run there before all of its memory has come.
    lazy: bool,
    pub(super) tracker: Option<Tracker>,
    writer: Writer,
    /// Memory was to be sent while it ran, though that may not have come about.
    pub(super) early: bool,
    report: MoveReport,
    since: Instant,
}

/// What a departure consists of on its way home.
pub(super) struct Parts {
    pub(super) link: Link,
    pub(super) source: Arc<SourceLink>,
    pub(super) tracker: Option<Tracker>,
    pub(super) writer: Writer,
    pub(super) report: MoveReport,
}

/// Why a guest does not leave.
#[derive(Clone, Debug)]
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
        Err(failure) => failed(&shared, order.pid, failure, Some(order.attempt)),
    });
}

/// Tells home that a guest goes on here, which stood still before if there is no `attempt`: that of one whose process need not even be
/// here any more.
pub(super) fn failed(shared: &Shared, pid: i32, failure: Failure, attempt: Option<u64>) {
    let Failure { phase, why } = failure;
    tracing::error!(pid, %phase, why, "does not leave; it goes on here");
    let body = wire::MoveFailed {
        pid,
        attempt: attempt.unwrap_or(0),
        phase,
        stood: attempt.is_none(),
        why,
    };
    shared.tell(pid, Kind::MoveFailed, &wire::encode(&body));
}

fn make_ready(shared: &Arc<Shared>, order: &MoveTo) -> Result<Departure, Failure> {
    let pid = order.pid;
    let guest = shared.guests.read().get(&pid).cloned();
    let guest = guest.ok_or_else(|| Failure::new(Phase::Seize, NOT_HERE))?;
    await_memory(&guest)?;
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
    let source = Arc::new(SourceLink::default());
    let link = Link::connect(
        order.place.addr,
        &key,
        peer,
        source.clone(),
        Options::of_process(),
    )
    .map_err(reach)?;
    let mut departure = Departure::new(guest.clone(), order.attempt, None, (link, source), order.mode);
    let early = order.mode.wants_precopy(resident_bytes(guest.memory.pid()));
    announce(shared, &guest, &departure, early || !order.mode.is_lazy());
    learn_known(&departure.link, pid, &order.place, &mut departure.writer);
    if early && let Err(why) = precopy(shared, &mut departure, order.mode, order.postcopy) {
        departure.not_while_it_ran(&why);
    }
    departure.since = Instant::now();
    Ok(departure)
}

/// A guest whose own memory is still coming goes on until it is there.
fn await_memory(guest: &Guest) -> Result<(), Failure> {
    match guest.memory.pager() {
        Some(pager) => pager.wait().map_err(|e| Failure::new(Phase::Seize, e)),
        None => Ok(()),
    }
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

/// Tells the other node which files the guest maps and, with `memory`, which memory it has, and waits until that is there.
fn announce(shared: &Shared, guest: &Guest, departure: &Departure, memory: bool) {
    let lines = shim::capture::map_lines(guest.memory.pid(), false).unwrap_or_default();
    let mut seen = HashSet::new();
    let files = lines
        .iter()
        .filter_map(|line| shim::capture::file_id(&line.path))
        .filter(|id| seen.insert(*id))
        .filter_map(|id| shared.files.known(id))
        .collect();
    let areas = memory.then(|| shim::capture::private_memory(guest.memory.pid()));
    let body = wire::encode(&wire::Prefetch {
        files,
        areas: areas.unwrap_or_default(),
        hostname: shared.hostname_of_home(),
    });
    if let Err(e) = departure.link.ask(departure.pid, Kind::Prefetch, &body) {
        tracing::debug!(error = %e, "not announced");
    }
}

/// Home wants a guest back. One with little memory is stopped at once and sent on the contact; for another, home connects to a
/// link of its own first.
pub(super) fn begin_home(shared: &Arc<Shared>, bring: wire::Bring) {
    let Some(guest) = shared.guests.read().get(&bring.pid).cloned() else {
        return failed(
            shared,
            bring.pid,
            Failure::new(Phase::Seize, NOT_HERE),
            Some(bring.attempt),
        );
    };
    if let Some(pager) = guest.memory.pager().cloned() {
        let starter = shared.starter.clone();
        let shared = shared.clone();
        starter.start("departure", move || {
            // One that is lost is not brought home.
            if pager.wait().is_ok() {
                begin_home(&shared, bring);
            }
        });
        return;
    }
    let wire::Bring {
        pid,
        attempt,
        reason,
        mode,
        postcopy,
    } = bring;
    let size_bytes = resident_bytes(guest.memory.pid());
    tracing::debug!(pid, ?mode, ?reason, size_bytes, "is to come home");
    if size_bytes <= LARGE_BYTES && matches!(mode, Mode::Auto | Mode::Freeze) {
        shared.post(Command::GoHome(pid, reason));
        return;
    }
    let starter = shared.starter.clone();
    let shared = shared.clone();
    let early = mode.wants_precopy(size_bytes);
    starter.start("departure", move || match link_to_home(&shared, pid, early) {
        Ok(link) => {
            let mut departure = Departure::new(guest, attempt, Some(reason), link, mode);
            departure.early = early;
            if early {
                announce_memory(&departure);
            }
            if early && let Err(why) = precopy(&shared, &mut departure, mode, postcopy) {
                departure.not_while_it_ran(&why);
            }
            // What is still on its way must not come while home gives the vessel the layout that the process has then: of an area
            // that is made anew home takes along what it has.
            if early && let Err(e) = departure.link.ask(pid, Kind::InPlace, &[]) {
                tracing::debug!(pid, error = %e, "its pages are not all at home");
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

/// Tells home which memory the guest has, so that its vessel has room for its pages when they come.
fn announce_memory(departure: &Departure) {
    let pid = departure.pid;
    let body = wire::encode(&wire::Prefetch {
        files: Vec::new(),
        areas: shim::capture::private_memory(departure.guest.memory.pid()),
        hostname: Vec::new(),
    });
    if let Err(e) = departure.link.ask(pid, Kind::Prefetch, &body) {
        tracing::debug!(pid, error = %e, "not announced");
    }
}

/// Has home connect to a link for the memory of one process.
fn link_to_home(
    shared: &Arc<Shared>,
    pid: i32,
    while_it_runs: bool,
) -> anyhow::Result<(Link, Arc<SourceLink>)> {
    let key = OneTimeKey::generate()?;
    let (listener, place) = arrivals::bind(shared)?;
    let request = wire::Coming {
        pid,
        place,
        key: key.to_bytes(),
        while_it_runs,
    };
    let (say, said) = crossbeam_channel::bounded(1);
    let peer = key.fingerprint();
    let source = Arc::new(SourceLink::default());
    let handler = source.clone();
    shared.starter.start("accept", move || {
        let _ = say.send(listener.accept(peer, handler, ACCEPT_TIMEOUT, Options::of_process()));
    });
    let answer = shared.ask(pid, pid, Kind::Coming, &wire::encode(&request))?;
    wire::done(&answer).context("home")?;
    Ok((said.recv()??, source))
}

impl Departure {
    fn new(
        guest: Arc<Guest>,
        attempt: u64,
        home: Option<StayReason>,
        (link, source): (Link, Arc<SourceLink>),
        mode: Mode,
    ) -> Departure {
        Departure {
            pid: guest.pid,
            guest,
            attempt,
            home,
            link,
            source,
            lazy: mode.is_lazy(),
            tracker: None,
            early: false,
            writer: Writer::default(),
            report: MoveReport {
                mode: mode.without_precopy(),
                ..MoveReport::default()
            },
            since: Instant::now(),
        }
    }

    fn not_while_it_ran(&mut self, why: &str) {
        self.report.note = format!("not sent while it ran: {why}");
        self.report.mode = if self.lazy { Mode::Postcopy } else { Mode::Freeze };
        self.tracker = None;
    }

    /// Whether it goes home.
    pub(super) fn goes_home(&self) -> bool {
        self.home.is_some()
    }

    /// The way home for the memory of its process.
    pub(super) fn into_parts(self) -> Parts {
        Parts {
            link: self.link,
            source: self.source,
            tracker: self.tracker,
            writer: self.writer,
            report: self.report,
        }
    }

    /// Whether it is to run at home before all of its memory has come.
    pub(super) fn is_lazy(&self) -> bool {
        self.lazy
    }
}

fn precopy(
    shared: &Arc<Shared>,
    departure: &mut Departure,
    mode: Mode,
    possible: bool,
) -> Result<(), String> {
    let begun = Instant::now();
    let pid = departure.pid;
    faults::at(Point::SourcePrecopy, pid)?;
    let (done, tracked) = crossbeam_channel::bounded(1);
    shared.post(Command::Track(departure.guest.clone(), done));
    let tracker = tracked.recv().map_err(|e| e.to_string())??;
    let link = &departure.link;
    let rounds = tracker
        .precopy(
            pid,
            &mut departure.writer,
            &mut |kind, parts| link.tell(pid, pid, kind, parts).map_err(io::Error::other),
            &mut || {
                link.await_sent(choice::QUEUED_BYTES).map_err(io::Error::other)?;
                // Of pages that the node has already there is little to send and much to do.
                let taken_up = link.ask(pid, Kind::InPlace, &[]);
                taken_up.map(drop).map_err(io::Error::other)
            },
            &mut |progress| tell_progress(shared, pid, &progress),
        )
        .map_err(|e| e.to_string())?;
    departure.lazy = choice::comes_later(mode, &rounds, possible);
    departure.report.rounds = rounds.len() as u32;
    departure.report.mode = if departure.lazy {
        Mode::Hybrid
    } else {
        Mode::Precopy
    };
    departure.report.times.precopy_us = begun.elapsed().as_micros() as u64;
    departure.tracker = Some(tracker);
    Ok(())
}

/// Tells home how far a move has got.
pub(super) fn tell_progress(shared: &Shared, lane: i32, progress: &wire::Progress) {
    shared.tell(lane, Kind::Progress, &wire::encode(progress));
}

impl Tracer {
    /// Everything is ready: the guest is stopped.
    pub(super) fn depart(&mut self, departure: Departure) -> anyhow::Result<()> {
        let (pid, attempt) = (departure.pid, departure.attempt);
        let refuse = |why: &str| failed(&self.shared, pid, Failure::new(Phase::Seize, why), Some(attempt));
        if !self.is_here(&departure.guest) {
            refuse(NOT_HERE);
            return Ok(());
        }
        if let Err(why) = faults::at(Point::SourceSeize, pid) {
            refuse(&why);
            return Ok(());
        }
        match self.holds.get(&pid) {
            // It has been faster; home sends it on from there, if it was to go to another node.
            Some(Hold::Home { .. }) => return Ok(()),
            Some(hold) if hold.captures() => {
                if departure.home.is_none() {
                    refuse("it is being moved at this moment");
                }
                return Ok(());
            }
            _ => {}
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
        guest: &Arc<Guest>,
        done: crossbeam_channel::Sender<Result<Tracker, String>>,
    ) -> anyhow::Result<()> {
        let pid = guest.pid;
        let held = self.holds.get(&pid).is_some_and(Hold::captures);
        if held || !self.is_here(guest) {
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
            || !shared_objects(guest.memory.pid()).is_empty()
        {
            // Those who share memory move together, which is home's business.
            let why = "it shares memory".to_string();
            return self.departed(guest, Err(Failure::new(Phase::Reach, why)));
        }
        let begun = Instant::now();
        let launch = match self.describe_departure(guest) {
            Ok(launch) => launch,
            Err(failure) => return self.departed(guest, Err(failure)),
        };
        departure.report.times.dump_us = begun.elapsed().as_micros() as u64;
        let (shared, guest) = (self.shared.clone(), guest.clone());
        self.shared.starter.start("departure", move || {
            let result = transfer(&shared, &guest, &launch, &mut departure).map(|rest| {
                if let Some(pusher) = rest {
                    push(&pusher, &departure.link);
                }
            });
            shared.post(Command::Departed(guest, result));
            departure.link.close();
        });
        Ok(())
    }

    fn describe_departure(&mut self, guest: &Arc<Guest>) -> Result<wire::Launch, Failure> {
        faults::at(Point::SourceDump, guest.pid).map_err(|why| Failure::new(Phase::Dump, why))?;
        self.capture(guest)
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
    pub(super) fn departed(&mut self, guest: &Arc<Guest>, result: Result<(), Failure>) -> anyhow::Result<()> {
        let pid = guest.pid;
        if !self.is_here(guest) {
            return Ok(());
        }
        match result {
            Ok(()) => {
                let _ = faults::at(Point::SourceAfter, pid);
                self.forget_guest(guest)
            }
            Err(failure) => {
                failed(&self.shared, pid, failure, None);
                self.release(pid)
            }
        }
    }
}

/// Sends the rest of a guest that runs elsewhere already, and stands still here.
pub(super) fn push(pusher: &Pusher, link: &Link) {
    match pusher.run(link) {
        // Nothing of it is needed any more; it is forgotten at once, and before another of this pid is built here.
        Pushed::Whole(reply) => reply.errno(0),
        Pushed::Over(why) => tracing::debug!(?pusher, why, "the rest of its memory is not sent"),
    }
}

/// Builds the guest at the other node and has home decide. Gives what is to send the rest when it runs there.
fn transfer(
    shared: &Shared,
    guest: &Guest,
    launch: &wire::Launch,
    departure: &mut Departure,
) -> Result<Option<Arc<Pusher>>, Failure> {
    let pid = departure.pid;
    faults::at(Point::SourceTransfer, pid).map_err(|why| Failure::new(Phase::Transfer, why))?;
    let reached_by = guest.memory.pid();
    let later = send_process(
        &departure.link,
        launch,
        reached_by,
        departure.tracker.as_ref(),
        departure.lazy,
        &mut departure.writer,
        &mut departure.report,
    )
    .map_err(|e| match e {
        SendError::Refused(why) => Failure::new(Phase::Restore, why),
        e => Failure::new(Phase::Transfer, e),
    })?;
    let rest = if departure.lazy {
        let pusher = departure.source.serve(&departure.link, pid, reached_by, later);
        Some(pusher.map_err(|e| Failure::new(Phase::Transfer, e))?)
    } else {
        None
    };
    faults::at(Point::SourceResume, pid).map_err(|why| Failure::new(Phase::Resume, why))?;
    if departure.lazy && !departure.link.await_live(STANDSTILL) {
        let why = "the link to where the rest of it is to go is cut";
        return Err(Failure::new(Phase::Resume, why));
    }
    let moved = wire::Moved {
        pid,
        report: departure.report.clone(),
    };
    let home = |e: &dyn std::fmt::Display| Failure::new(Phase::Resume, format!("home: {e}"));
    let answer = shared
        .ask(pid, pid, Kind::Moved, &wire::encode(&moved))
        .map_err(|e| home(&e))?;
    wire::done(&answer).map_err(|e| home(&e))?;
    guest.vacate();
    Ok(rest)
}
