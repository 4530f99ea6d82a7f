//! The target's end: puts pages in as they come, and asks for those that somebody waits for.

use std::collections::HashSet;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use linklayer::frame::Header;
use linklayer::image::PAGE;
use linklayer::pages::{self, Piece};
use linklayer::postcopy::Missing;
use linklayer::quic::Link;
use linklayer::wire::{self, After, Kind, Mode, MoveReport, Phase, Progress};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::faults::{self, Point};
use crate::userfault::{Happened, Put, Userfault};

/// How often it is told how far it is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// How soon it is looked again after the layout of a process was changing, ms.
const AGAIN_MS: u16 = 1;
/// The link of a process whose pages are still coming is not given up for so long: when it is, the process is lost.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// All pages are here, and the source has forgotten them.
    Whole(After),
    /// The source is lost, and with it the rest of the process, which has to be killed at once: it would go on with zeros.
    Lost(String),
    /// Nobody needs the rest: the process has ended, or has executed another program.
    Needless(After),
}

/// One address space.
struct Space {
    memory: Arc<Userfault>,
    missing: Missing,
    /// Pages that somebody waits for and that could not be put in yet.
    waiting: HashSet<u64>,
    /// Pages that came while the layout changed: address there, bytes.
    late: Vec<(u64, Vec<u8>)>,
    gone: bool,
}

struct State {
    spaces: Vec<Space>,
    /// Pages, by their addresses there, that the source was asked for and that have not come.
    asked: HashSet<u64>,
    after: After,
    /// When it was last told how far it is.
    told: Instant,
    lost: Option<String>,
    needless: bool,
    /// Nothing is missing any more, or missed: that the source goes away from now on is no loss.
    complete: bool,
    ended: Option<Result<(), String>>,
}

/// Memory of a process that is still coming. One thread serves those who wait for pages ([`Pager::serve`]), and any thread may
/// bring some ([`Pager::frame`]).
pub struct Pager {
    pid: i32,
    link: Link,
    begun: Instant,
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
    open: AtomicBool,
}

impl std::fmt::Debug for Pager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pager")
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

impl Pager {
    /// For a process that stands ready and whose pages in `later` come by this link. `memory` watches the areas with such pages.
    ///
    /// # Errors
    /// No descriptor.
    pub fn new(
        pid: i32,
        memory: Userfault,
        later: impl IntoIterator<Item = Range<u64>>,
        link: Link,
    ) -> std::io::Result<Pager> {
        link.be_patient(PATIENCE);
        let space = Space {
            memory: Arc::new(memory),
            missing: Missing::new(later),
            waiting: HashSet::new(),
            late: Vec::new(),
            gone: false,
        };
        Ok(Pager {
            pid,
            link,
            begun: Instant::now(),
            state: Mutex::new(State {
                spaces: vec![space],
                asked: HashSet::new(),
                after: After::default(),
                told: Instant::now(),
                lost: None,
                needless: false,
                complete: false,
                ended: None,
            }),
            changed: Condvar::new(),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            open: AtomicBool::new(true),
        })
    }

    /// Whether pages may still be missing.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Why the rest is lost, when it is.
    pub fn loss(&self) -> Option<String> {
        self.state.lock().lost.clone()
    }

    /// Takes up a frame of the source's.
    ///
    /// # Errors
    /// It is malformed, or none that a source sends.
    pub fn frame(&self, kind: Kind, payload: &[u8]) -> Result<(), String> {
        match kind {
            Kind::Pages | Kind::PackedPages => {
                let piece = pages::decode(kind, payload).map_err(|e| e.to_string())?;
                self.came(kind, &piece, payload.len() as u64)
            }
            Kind::SourceLost => {
                self.lost(&String::from_utf8_lossy(payload));
                Ok(())
            }
            other => Err(format!("{other:?} from the source of a process that runs")),
        }
    }

    fn came(&self, kind: Kind, piece: &Piece<'_>, sent_bytes: u64) -> Result<(), String> {
        let len = piece.data.len() as u64;
        if !piece.address.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err("pages that are none".into());
        }
        let no_memory = faults::at(Point::TargetRest, self.pid).is_err();
        let mut state = self.state.lock();
        let count = len / PAGE;
        let pages = &mut state.after.pages;
        pages.pages += count;
        pages.bytes += sent_bytes;
        let zero = piece.data.iter().all(|b| *b == 0);
        if zero {
            pages.zero += count;
        } else if kind == Kind::PackedPages {
            pages.compressed += count;
        }
        for page in (piece.address..piece.address + len).step_by(PAGE as usize) {
            state.asked.remove(&page);
        }
        let mut over = true;
        for space in &mut state.spaces {
            if no_memory || !space.put(piece.address, &piece.data, zero) {
                space.late.push((piece.address, piece.data.to_vec()));
            }
            over &= space.is_done();
        }
        let late = state.spaces.iter().any(|s| !s.late.is_empty());
        let tell = state.told.elapsed() > TELL_EVERY;
        drop(state);
        self.changed.notify_all();
        if over || late || tell {
            self.rouse();
        }
        Ok(())
    }

    /// The source is lost.
    pub fn lost(&self, why: &str) {
        let mut state = self.state.lock();
        // That all of them have come may not be noted yet.
        if state.complete || state.spaces.iter().all(Space::is_done) {
            drop(state);
            return self.rouse();
        }
        state.lost.get_or_insert_with(|| why.to_string());
        drop(state);
        self.rouse();
    }

    /// The process has ended, or has another memory now.
    pub fn needless(&self) {
        self.state.lock().needless = true;
        self.rouse();
    }

    fn rouse(&self) {
        // A counter that is full wakes as well.
        let _ = self.wake.write(1);
    }

    /// Waits until the pages of a range of the first process are here. Whoever reads its memory by other means than it does itself
    /// should: /proc/PID/mem fails where a page is missing.
    pub fn ensure(&self, address: u64, len: u64) {
        if !self.is_open() {
            return;
        }
        let Some(end) = address.checked_add(len) else {
            return;
        };
        // A range that reaches beyond all memory is found to be none by whoever asked.
        let range = address / PAGE * PAGE..end.div_ceil(PAGE).saturating_mul(PAGE);
        let mut state = self.state.lock();
        loop {
            if state.ended.is_some() || state.lost.is_some() || state.needless {
                return;
            }
            let missing = match state.spaces.first() {
                Some(space) if !space.gone => space.missing.within(&range),
                _ => return,
            };
            if missing.is_empty() {
                return;
            }
            let wanted: Vec<Range<u64>> = missing
                .iter()
                .flat_map(|part| not_asked(&mut state.asked, part.source()))
                .collect();
            if !wanted.is_empty() {
                MutexGuard::unlocked(&mut state, || self.ask(&wanted));
                continue;
            }
            self.changed.wait(&mut state);
        }
    }

    /// Waits until all pages are here.
    ///
    /// # Errors
    /// They will never be.
    pub fn wait(&self) -> Result<(), String> {
        let mut state = self.state.lock();
        loop {
            if let Some(ended) = &state.ended {
                return ended.clone();
            }
            self.changed.wait(&mut state);
        }
    }

    fn ask(&self, wanted: &[Range<u64>]) {
        for part in wanted.chunks(wire::MAX_WANTED) {
            let body = wire::Want {
                runs: part.iter().map(|r| (r.start, r.end)).collect(),
            };
            let header = Header::new(Kind::Want as u16, self.pid, self.link.next_seq());
            if let Err(e) = self.link.send(self.pid as u32, header, &[&wire::encode(&body)]) {
                self.lost(&e.to_string());
            }
        }
    }

    /// Serves until all pages are here, or cannot be had, or are not needed. `tell` hears now and then how far it is. `ended` is called
    /// once, before anybody who waits for a page gets zeros.
    pub fn serve(self: &Arc<Self>, tell: &mut dyn FnMut(Progress), ended: impl FnOnce(End)) {
        // There may be nothing to wait for, or nothing may come any more: of a link that was lost before frames found this, nobody
        // is told again.
        match self.link.lost() {
            Some(why) => self.lost(&why.to_string()),
            None => self.rouse(),
        }
        let end = loop {
            match self.round() {
                Ok(Some(end)) => break end,
                Ok(None) => self.say_how_far(tell),
                Err(e) => break End::Lost(format!("its memory cannot be filled: {e}")),
            }
        };
        let after = self.state.lock().after;
        let result = match &end {
            End::Lost(why) => {
                self.lost(why);
                Err(why.clone())
            }
            End::Needless(_) => Err("it has ended".into()),
            End::Whole(_) => {
                // Its memory is its own again: nobody has to be told of what it does.
                self.state.lock().spaces.clear();
                // The source may be gone by now, which harms nobody.
                let header = Header::new(Kind::Whole as u16, self.pid, self.link.next_seq());
                if let Err(e) = self.link.call(self.pid as u32, header, &[]) {
                    tracing::debug!(pid = self.pid, error = %e, "source of a process that is whole");
                }
                self.open.store(false, Ordering::Release);
                Ok(())
            }
        };
        tracing::debug!(
            pid = self.pid,
            ?end,
            pages = after.pages.pages,
            faults = after.faults,
            "post-copy ends"
        );
        ended(end);
        let spaces = {
            let mut state = self.state.lock();
            state.ended = Some(result);
            std::mem::take(&mut state.spaces)
        };
        self.open.store(false, Ordering::Release);
        self.changed.notify_all();
        drop(spaces);
        self.link.close();
    }

    fn say_how_far(&self, tell: &mut dyn FnMut(Progress)) {
        let mut state = self.state.lock();
        if state.told.elapsed() < TELL_EVERY {
            return;
        }
        state.told = Instant::now();
        let progress = Progress {
            pid: self.pid,
            phase: Phase::Postcopy,
            report: MoveReport {
                mode: Mode::Postcopy,
                after: state.after,
                ..MoveReport::default()
            },
            left: state.spaces.iter().map(|s| s.missing.pages()).max().unwrap_or(0),
        };
        drop(state);
        tell(progress);
    }

    /// Waits for something, and does what can be done.
    fn round(&self) -> std::io::Result<Option<End>> {
        self.await_something();
        let mut wanted = Vec::new();
        let mut state = self.state.lock();
        let State {
            spaces, asked, after, ..
        } = &mut *state;
        let mut born = Vec::new();
        for space in spaces.iter_mut() {
            space.take_events(&mut born, &mut after.faults)?;
            space.retry();
            wanted.extend(space.resolve(asked)?);
        }
        spaces.extend(born);
        spaces.retain(|space| !space.gone);
        after.last_page_us = self.begun.elapsed().as_micros() as u64;
        let after = state.after;
        if state.spaces.iter().all(Space::is_done) {
            state.lost = None;
            state.complete = true;
            return Ok(Some(if state.spaces.is_empty() {
                End::Needless(after)
            } else {
                End::Whole(after)
            }));
        }
        if state.needless {
            state.lost = None;
            state.complete = true;
            return Ok(Some(End::Needless(after)));
        }
        if let Some(why) = &state.lost {
            return Ok(Some(End::Lost(why.clone())));
        }
        drop(state);
        self.changed.notify_all();
        self.ask(&wanted);
        Ok(None)
    }

    fn await_something(&self) {
        let (fds, again) = {
            let state = self.state.lock();
            let fds: Vec<_> = state.spaces.iter().map(|space| space.memory.clone()).collect();
            let again = state
                .spaces
                .iter()
                .any(|s| !s.late.is_empty() || !s.waiting.is_empty());
            (fds, again)
        };
        let mut polled: Vec<PollFd<'_>> = fds
            .iter()
            .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
            .collect();
        polled.push(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN));
        let timeout = if again {
            PollTimeout::from(AGAIN_MS)
        } else {
            PollTimeout::NONE
        };
        if let Err(e) = poll(&mut polled, timeout) {
            tracing::debug!(error = %e, "poll");
        }
        let _ = self.wake.read();
    }
}

/// The pages of a range there that were not asked for yet, as runs; they are from now on.
fn not_asked(asked: &mut HashSet<u64>, range: Range<u64>) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for page in range.step_by(PAGE as usize) {
        if asked.insert(page) {
            super::add(&mut out, page..page + PAGE);
        }
    }
    out
}

impl Space {
    fn is_done(&self) -> bool {
        self.gone || self.missing.is_empty()
    }

    /// Puts pages that came where they belong; false: the layout changes, so that they are to be put later.
    fn put(&mut self, source: u64, data: &[u8], zero: bool) -> bool {
        for part in self.missing.places(&(source..source + data.len() as u64)) {
            let from = (part.there - source) as usize;
            let bytes = &data[from..from + (part.here.end - part.here.start) as usize];
            let put = if zero {
                self.memory.zero(&part.here)
            } else {
                self.memory.copy(part.here.start, bytes)
            };
            match put {
                Ok(Put::Done) => self.missing.forget(&part.here),
                Ok(Put::Gone) => self.gone = true,
                Ok(Put::Changing) => return false,
                // No memory at this moment: it is tried again until there is some.
                Err(e) => {
                    tracing::debug!(error = %e, "page not put in yet");
                    return false;
                }
            }
        }
        true
    }

    /// Learns what the process has done with its memory, and what it waits for.
    fn take_events(&mut self, born: &mut Vec<Space>, faults: &mut u64) -> std::io::Result<()> {
        loop {
            let events = self.memory.read()?;
            if events.is_empty() {
                return Ok(());
            }
            for event in events {
                match event {
                    Happened::Fault(address) => {
                        *faults += 1;
                        self.waiting.insert(address / PAGE * PAGE);
                    }
                    Happened::Removed(range) | Happened::Unmapped(range) => {
                        self.missing.forget(&range);
                        // Who waits for a page of it would wait for ever.
                        self.memory.wake(&range)?;
                    }
                    Happened::Moved(from, to, len) => {
                        self.missing.moved(from, to, len);
                        self.memory.wake(&(from..from + len))?;
                    }
                    Happened::Fork(memory) => born.push(Space {
                        memory: Arc::new(memory),
                        missing: self.missing.clone(),
                        waiting: HashSet::new(),
                        late: self.late.clone(),
                        gone: false,
                    }),
                }
            }
        }
    }

    /// Puts in what came while the layout changed.
    fn retry(&mut self) {
        let late = std::mem::take(&mut self.late);
        for (source, data) in late {
            if !self.put(source, &data, false) {
                self.late.push((source, data));
            }
        }
    }

    /// Gives fresh pages to those who wait for them, and what is to be asked for the others.
    fn resolve(&mut self, asked: &mut HashSet<u64>) -> std::io::Result<Vec<Range<u64>>> {
        let mut wanted = Vec::new();
        let mut again = HashSet::new();
        for page in std::mem::take(&mut self.waiting) {
            if let Some(range) = self.missing.wanted(page) {
                wanted.extend(not_asked(asked, range));
                continue;
            }
            match self.memory.zero(&(page..page + PAGE))? {
                Put::Done => {}
                Put::Gone => self.gone = true,
                Put::Changing => drop(again.insert(page)),
            }
        }
        self.waiting = again;
        Ok(wanted)
    }
}
