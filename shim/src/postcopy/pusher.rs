//! The source's end: sends what the target wants, and all other pages until the end.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use linklayer::frame::Header;
use linklayer::image::PAGE;
use linklayer::pages::Writer;
use linklayer::postcopy::Rest;
use linklayer::quic::{Handler, Link, LinkError, ReplyTo};
use linklayer::wire::{self, Kind};
use parking_lot::{Condvar, Mutex};

use super::pager::PATIENCE;
use crate::faults::{self, Point};
use crate::memory::ProcessMemory;

/// How much is sent in one piece when nobody waits for it, bytes.
const PIECE_BYTES: u64 = 128 << 10;
/// So much may be under way before more is sent that nobody waits for: what is wanted has to wait for it on a slow link.
const UNDER_WAY_BYTES: usize = 2 << 20;
/// How soon it is looked again whether more can be sent; a page that is wanted is sent at once.
const PAUSE: Duration = Duration::from_millis(1);
/// What is wanted does not wait on the lane of all other pages.
const OTHER_LANE: u32 = 0x200;
/// Most ranges that the target may want and that are not sent yet.
const MOST_WANTED: usize = 1 << 16;

/// How it ended.
pub enum Pushed {
    /// The target has all, and waits to hear that the source has forgotten it.
    Whole(ReplyTo),
    /// The target needs no more, or is lost.
    Over(String),
}

#[derive(Default)]
struct State {
    rest: Rest,
    wanted: VecDeque<Range<u64>>,
    whole: Option<ReplyTo>,
    over: Option<String>,
}

/// The memory of a process that has left, which stands still or is a vessel.
pub struct Pusher {
    pid: i32,
    memory: ProcessMemory,
    state: Mutex<State>,
    changed: Condvar,
}

impl std::fmt::Debug for Pusher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pusher")
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

impl Pusher {
    /// For these pages of a process that stands still, reached by a thread of it.
    ///
    /// # Errors
    /// Its memory cannot be read.
    fn new(pid: i32, reached_by: i32, later: Vec<Range<u64>>) -> io::Result<Arc<Pusher>> {
        let memory = ProcessMemory::new(reached_by);
        if let Some(first) = later.first() {
            // From now on it is this memory, whatever the process executes.
            memory.read_forced(first.start, &mut [0])?;
        }
        Ok(Arc::new(Pusher {
            pid,
            memory,
            state: Mutex::new(State {
                rest: Rest::new(later),
                ..State::default()
            }),
            changed: Condvar::new(),
        }))
    }

    fn frame(&self, link: &Link, lane: u32, header: Header, payload: &[u8]) -> Result<(), String> {
        if header.tid != self.pid {
            return Err(format!("process {} on the link of {}", header.tid, self.pid));
        }
        let mut state = self.state.lock();
        match Kind::from_u16(header.kind) {
            Some(Kind::Want) => {
                let want: wire::Want = wire::decode(payload).map_err(|e| e.to_string())?;
                if state.wanted.len() + want.runs.len() > MOST_WANTED {
                    return Err("more pages wanted than there are".into());
                }
                for (start, end) in want.runs {
                    if start >= end || !start.is_multiple_of(PAGE) || !end.is_multiple_of(PAGE) {
                        return Err("a range of pages that is none".into());
                    }
                    state.wanted.push_back(start..end);
                }
            }
            Some(Kind::Whole) => {
                state.whole = Some(ReplyTo {
                    link: link.clone(),
                    lane,
                    header,
                });
            }
            kind => return Err(format!("{kind:?} from the target of a process")),
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// The link is lost, or the process is no more: nothing is sent any longer.
    pub fn stop(&self, why: &str) {
        self.state.lock().over.get_or_insert_with(|| why.to_string());
        self.changed.notify_all();
    }

    /// How many pages are still to be sent.
    pub fn left(&self) -> u64 {
        self.state.lock().rest.pages()
    }

    /// Sends until the target has all. The pages must stay as they are until then.
    pub fn run(&self, link: &Link) -> Pushed {
        // What the target has in its page store goes as it is, too: somebody may be waiting for it, and it has to be there.
        let mut writer = Writer::default();
        let (lane, urgent) = (self.pid as u32, self.pid as u32 ^ OTHER_LANE);
        loop {
            let mut state = self.state.lock();
            if let Some(reply) = state.whole.take() {
                return Pushed::Whole(reply);
            }
            if let Some(why) = &state.over {
                return Pushed::Over(why.clone());
            }
            let (lane, runs) = if let Some(wanted) = state.wanted.pop_front() {
                (urgent, state.rest.take(&wanted))
            } else if state.rest.is_empty() {
                self.changed.wait(&mut state);
                continue;
            } else if link.stats().unacknowledged_bytes > UNDER_WAY_BYTES {
                self.changed.wait_for(&mut state, PAUSE);
                continue;
            } else {
                (lane, state.rest.next(PIECE_BYTES).into_iter().collect())
            };
            drop(state);
            if let Err(why) = faults::at(Point::SourceRest, self.pid) {
                tracing::debug!(pid = self.pid, why, "goes on");
            }
            let sent = crate::capture::write_memory(&self.memory, &runs, &mut writer, &mut |kind, parts| {
                let header = Header::new(kind as u16, self.pid, link.next_seq());
                link.send(lane, header, parts).map_err(io::Error::other)
            });
            if let Err(e) = sent {
                let why = format!("its memory cannot be read where it came from: {e}");
                let header = Header::new(Kind::SourceLost as u16, self.pid, link.next_seq());
                let _ = link.send(lane, header, &[why.as_bytes()]);
                return Pushed::Over(why);
            }
        }
    }
}

/// This end of a link on which a process is sent: nothing comes on it but answers, and what the target says of a process that runs
/// there already.
#[derive(Debug, Default)]
pub struct SourceLink {
    pusher: OnceLock<Arc<Pusher>>,
    /// What came before there was a pusher: the target is ready a little earlier than the source knows.
    early: Mutex<Vec<Early>>,
}

/// Lane, header and body of a frame.
type Early = (u32, Header, Vec<u8>);

/// Most of these, and most bytes of one.
const MOST_EARLY: usize = 64;
const MOST_EARLY_BYTES: usize = 64 << 10;

impl SourceLink {
    /// From now on the target may want these pages of a process that stands still, by this link. Gives who sends them.
    ///
    /// # Errors
    /// As [`Pusher::new`].
    pub fn serve(
        &self,
        link: &Link,
        pid: i32,
        reached_by: i32,
        later: Vec<Range<u64>>,
    ) -> io::Result<Arc<Pusher>> {
        // If it is lost from now on, so is the process.
        link.be_patient(PATIENCE);
        let pusher = Pusher::new(pid, reached_by, later)?;
        let mut early = self.early.lock();
        for (lane, header, payload) in early.drain(..) {
            if let Err(why) = pusher.frame(link, lane, header, &payload) {
                pusher.stop(&why);
            }
        }
        let _ = self.pusher.set(pusher.clone());
        // Nobody is told of it once more.
        if let Some(why) = link.lost() {
            pusher.stop(&why.to_string());
        }
        Ok(pusher)
    }

    fn take_up(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>) -> Result<(), String> {
        let mut early = self.early.lock();
        if let Some(pusher) = self.pusher.get() {
            drop(early);
            return pusher.frame(link, lane, header, &payload);
        }
        let known = matches!(Kind::from_u16(header.kind), Some(Kind::Want | Kind::Whole));
        if !known || early.len() >= MOST_EARLY || payload.len() > MOST_EARLY_BYTES {
            return Err(format!("a frame of kind {} that nobody asked for", header.kind));
        }
        early.push((lane, header, payload));
        Ok(())
    }
}

impl Handler for SourceLink {
    fn frame(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>) {
        if let Err(why) = self.take_up(link, lane, header, payload) {
            tracing::error!(%why, "the target of a process breaks the protocol");
            link.close();
            self.lost(&LinkError::Protocol(why));
        }
    }

    fn lost(&self, why: &LinkError) {
        tracing::debug!(error = %why, "link of a process");
        if let Some(pusher) = self.pusher.get() {
            pusher.stop(&why.to_string());
        }
    }
}
