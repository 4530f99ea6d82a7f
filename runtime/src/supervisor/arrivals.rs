//! Processes that come here: what was sent of them is put into them as it comes, or kept until they are built.
//!
//! A process comes on the contact, or on a link of its own, from home or from another node. Such a link is made for one process,
//! as home asked for it ([`Kind::Listen`]), and nothing else can be said on it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use linklayer::frame::Header;
use linklayer::image::{self, Area, PAGE, USER_END};
use linklayer::pages::known::{Nothing, Source};
use linklayer::pages::{self, Kept};
use linklayer::quic::{Fingerprint, Handler, Link, LinkError, LinkListener, OneTimeKey, Options, ReplyTo};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, Listening, MAX_RUNS, Place};
use parking_lot::Mutex;
use shim::restore::Room;

use super::begun::Begin;
use super::contact::Build;
use super::postcopy::{Later, PagerSlot};
use super::shared::{Command, Shared};
use shim::faults::{self, Point};

/// How long somebody may take from being told of the link to its first packet.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(20);
/// Most processes that may come at a time.
const MAX_LINKS: usize = 256;

/// Binds a link for one process.
///
/// # Errors
/// The system's.
pub fn bind(shared: &Shared) -> Result<(LinkListener, Place), LinkError> {
    let key = OneTimeKey::generate()?;
    let fingerprint = key.fingerprint().0;
    let listener = LinkListener::bind(SocketAddr::new(shared.listen, 0), key)?;
    let addr = listener.local_addr();
    let knows = false;
    Ok((
        listener,
        Place {
            addr,
            fingerprint,
            knows,
        },
    ))
}

/// A process that is not complete yet.
#[derive(Default)]
pub struct Arriving {
    launch: Option<wire::Launch>,
    pages: Kept,
    present: Option<Vec<(u64, u64)>>,
    later: Option<Vec<(u64, u64)>>,
    /// It has a link of its own, so it is large enough that its pages are worth keeping.
    own_link: bool,
    /// The link that has begun to build it.
    begun_by: Option<u64>,
    /// What is kept for the page store of the frames whose pages were put into it, and how much that is.
    landed: Frames,
    landed_bytes: u64,
}

/// Frames of pages, as they came.
pub type Frames = Vec<(Kind, Vec<u8>)>;

/// Most runs of pages in a list: as many as there are pages in what may come, when every other one is there.
fn most_listed() -> usize {
    pages::most_kept_bytes() / PAGE as usize / 2
}

/// Adds to a list of runs of pages, which is in the order of addresses.
fn add_runs(list: &mut Vec<(u64, u64)>, payload: &[u8]) -> Result<(), String> {
    let more: wire::Present = wire::decode(payload).map_err(|e| e.to_string())?;
    for (start, end) in more.runs {
        let ordered = start < end && end <= USER_END && list.last().is_none_or(|last| last.1 <= start);
        if !ordered || !start.is_multiple_of(PAGE) || !end.is_multiple_of(PAGE) || list.len() >= most_listed()
        {
            return Err("a list of pages that is none".into());
        }
        list.push((start, end));
    }
    Ok(())
}

/// What follows from a frame about a process that comes.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// More frames.
    More,
    /// These pages have to be sent as they are.
    Missing(Vec<(u64, u64)>),
    /// It is complete.
    Build,
}

impl Arriving {
    /// From now on its pages are put there. Not when it is too late for that.
    fn put_into(&mut self, number: u64, room: Room) -> bool {
        let early = self.launch.is_none() && self.pages.bytes() == 0 && self.begun_by.is_none();
        if early {
            self.pages.put_into(Box::new(room));
            self.begun_by = Some(number);
        }
        early
    }

    /// Keeps a frame that was taken up for the page store, as far as that takes it.
    fn keep(&mut self, kind: Kind, payload: Vec<u8>, limit_bytes: u64) {
        /// The length of a frame that says that there are zeros.
        const ZEROS_LEN: usize = 12;
        let content = kind == Kind::Pages || kind == Kind::PackedPages && payload.len() > ZEROS_LEN;
        if self.begun_by.is_some() && content && self.landed_bytes < limit_bytes {
            self.landed_bytes += payload.len() as u64;
            self.landed.push((kind, payload));
        }
    }

    /// Takes up a frame about this process. What comes as a hash is had from `source`.
    fn frame(&mut self, pid: i32, kind: Kind, payload: &[u8], source: &dyn Source) -> Result<Next, String> {
        match kind {
            Kind::Launch => {
                let launch: wire::Launch = wire::decode(payload).map_err(|e| e.to_string())?;
                launch.image.validate().map_err(|e| e.to_string())?;
                if launch.image.pid != pid {
                    return Err(format!("process {} in place of {pid}", launch.image.pid));
                }
                self.launch = Some(launch);
            }
            Kind::Pages | Kind::PackedPages | Kind::KnownPages => {
                self.pages
                    .take(kind, payload, source, pages::most_kept_bytes())
                    .map_err(|e| e.to_string())?;
            }
            Kind::Present => add_runs(self.present.get_or_insert_default(), payload)?,
            Kind::Later => add_runs(self.later.get_or_insert_default(), payload)?,
            Kind::LaunchBuild => {
                if let Some(present) = self.present.take() {
                    self.pages.retain(&present);
                }
                let missing = self.pages.missing(MAX_RUNS);
                return Ok(if missing.is_empty() {
                    Next::Build
                } else {
                    Next::Missing(missing)
                });
            }
            other => return Err(format!("{other:?} about a process that comes")),
        }
        Ok(Next::More)
    }
}

/// What a process lacks, as the answer to its end.
fn lacks(missing: Vec<(u64, u64)>) -> Vec<u8> {
    wire::encode(&wire::LaunchReady {
        refused: None,
        restore_us: 0,
        missing,
    })
}

/// The processes that come.
#[derive(Default)]
pub struct Arrivals {
    /// Those on the contact.
    on_contact: Mutex<HashMap<i32, Arriving>>,
    /// Links of their own, with this end of each: a process may come once more before its last link is known to be over.
    links: Mutex<HashMap<i32, (Link, Arc<OwnLink>)>>,
    /// Those that have such a link, and whether home has said since that they do not come.
    awaited: Mutex<HashMap<i32, Arc<AtomicBool>>>,
    numbers: AtomicU64,
}

impl Arrivals {
    /// Takes up a frame of the contact.
    ///
    /// # Errors
    /// Home breaks the protocol.
    pub fn frame(
        &self,
        shared: &Arc<Shared>,
        answer: ReplyTo,
        kind: Kind,
        payload: &[u8],
    ) -> Result<(), String> {
        let pid = answer.header.tid;
        let mut all = self.on_contact.lock();
        if kind == Kind::Launch {
            all.insert(pid, Arriving::default());
        }
        let arriving = all
            .get_mut(&pid)
            .ok_or_else(|| format!("process {pid} was not announced"))?;
        // No hashes come by the contact.
        match arriving.frame(pid, kind, payload, &Nothing)? {
            Next::More => return Ok(()),
            Next::Missing(missing) => {
                answer.send(&[&lacks(missing)]);
                return Ok(());
            }
            Next::Build => {}
        }
        let arriving = all.remove(&pid).unwrap_or_default();
        drop(all);
        if arriving.later.is_some() {
            return Err("pages that come later, on the contact".into());
        }
        prepare(shared, arriving, answer, &PagerSlot::default(), Arc::default())
    }

    /// A process has come as far as that its link belongs to who brings the rest.
    pub fn handed_over(&self, pid: i32) {
        self.awaited.lock().remove(&pid);
        self.links.lock().remove(&pid);
    }

    /// A process does not come, or is no more.
    pub fn forget(&self, pid: i32) {
        self.on_contact.lock().remove(&pid);
        // All of it may be here, but not yet with the tracer, which is told of this by another way.
        if let Some(needless) = self.awaited.lock().remove(&pid) {
            needless.store(true, Ordering::Release);
        }
        let link = self.links.lock().remove(&pid);
        if let Some((link, own)) = link {
            own.over("it does not come");
            // Without waiting for the peer.
            drop(link);
        }
    }

    /// Waits for a process on a link of its own.
    pub fn listen(&self, shared: &Arc<Shared>, request: wire::Listen) -> Listening {
        let pid = request.pid;
        if let Err(why) = faults::at(Point::TargetReach, pid) {
            return Listening::Refused(why);
        }
        if self.links.lock().len() >= MAX_LINKS {
            return Listening::Refused("too many processes come at this moment".into());
        }
        let (listener, place) = match bind(shared) {
            Ok((listener, place)) => {
                let knows = shared.stored.has_some();
                (listener, Place { knows, ..place })
            }
            Err(e) => return Listening::Refused(e.to_string()),
        };
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let needless: Arc<AtomicBool> = Arc::default();
        self.awaited.lock().insert(pid, needless.clone());
        let starter = shared.starter.clone();
        let shared = shared.clone();
        starter.start("accept", move || {
            let own = Arc::new(OwnLink {
                shared: shared.clone(),
                pid,
                number,
                coming: Arc::default(),
                needless,
                pager: PagerSlot::default(),
            });
            let peer = Fingerprint(request.peer);
            match listener.accept(peer, own.clone(), ACCEPT_TIMEOUT, Options::of_process()) {
                Ok(link) => {
                    let mut links = shared.arrivals.links.lock();
                    // Whoever was to send it before may have been long in coming, and be of no use any more.
                    let latest = links.get(&pid).is_none_or(|(_, other)| other.number < number);
                    let is_over = own.coming.over.load(Ordering::Acquire);
                    let useless = if latest && !is_over {
                        links.insert(pid, (link, own))
                    } else {
                        Some((link, own))
                    };
                    drop(links);
                    if let Some((link, own)) = useless {
                        own.over("another link of the process has come");
                        drop(link);
                    }
                }
                Err(e) => tracing::debug!(pid, error = %e, "nobody came"),
            }
        });
        Listening::At(place, shim::userfault::source().err().unwrap_or_default())
    }
}

/// What has come by a link.
#[derive(Default)]
struct Coming {
    /// Nothing more comes. Set before what has come is dropped.
    over: AtomicBool,
    arriving: Mutex<Arriving>,
}

/// This end of the link of one process.
struct OwnLink {
    shared: Arc<Shared>,
    pid: i32,
    number: u64,
    coming: Arc<Coming>,
    /// Home has said that the process does not come, or the link is over.
    needless: Arc<AtomicBool>,
    /// Who gets the pages that come when it runs.
    pager: PagerSlot,
}

impl Handler for OwnLink {
    fn frame(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>) {
        let kind = Kind::from_u16(header.kind).ok_or_else(|| format!("unknown kind {}", header.kind));
        let done = kind.and_then(|kind| {
            if header.tid != self.pid {
                return Err(format!("process {} on the link of {}", header.tid, self.pid));
            }
            if let Some(pager) = self.pager.get() {
                return pager.frame(kind, &payload);
            }
            let mut arriving = self.coming.arriving.lock();
            let answer = ReplyTo {
                link: link.clone(),
                lane,
                header,
            };
            match kind {
                Kind::Prefetch => return self.prefetch(&payload, answer),
                // All frames in front of this one have been taken up.
                Kind::InPlace => {
                    answer.errno(0);
                    return Ok(());
                }
                Kind::Known => {
                    tell_known(&self.shared, answer);
                    return Ok(());
                }
                Kind::Pages | Kind::PackedPages | Kind::KnownPages => {
                    let point = match arriving.launch {
                        Some(_) => Point::TargetTransfer,
                        None => Point::TargetPrecopy,
                    };
                    faults::at(point, self.pid)?;
                }
                _ => {}
            }
            match arriving.frame(self.pid, kind, &payload, &self.shared.stored)? {
                Next::More => {
                    arriving.keep(kind, payload, self.shared.stored.limit_bytes());
                    return Ok(());
                }
                Next::Missing(missing) => {
                    answer.send(&[&lacks(missing)]);
                    return Ok(());
                }
                Next::Build => {}
            }
            let arriving = Arriving {
                own_link: true,
                ..std::mem::take(&mut *arriving)
            };
            prepare(&self.shared, arriving, answer, &self.pager, self.needless.clone())
        });
        if let Err(why) = done {
            tracing::error!(pid = self.pid, %why, "the sender of a process breaks the protocol");
            link.close();
            self.over(&why);
        }
    }

    fn lost(&self, why: &LinkError) {
        tracing::debug!(pid = self.pid, error = %why, "link of a process");
        self.over(&why.to_string());
    }
}

impl OwnLink {
    /// Nothing more comes by it.
    fn over(&self, why: &str) {
        if let Some(pager) = self.pager.get() {
            pager.lost(why);
            return;
        }
        self.coming.over.store(true, Ordering::Release);
        let arriving = std::mem::take(&mut *self.coming.arriving.lock());
        if let Some(number) = arriving.begun_by {
            self.shared.post(Command::Abandon(self.pid, number));
        }
        // Nobody would hear that it stands ready.
        self.needless.store(true, Ordering::Release);
        let same = |one: &Arc<AtomicBool>| Arc::ptr_eq(one, &self.needless);
        self.shared
            .arrivals
            .awaited
            .lock()
            .retain(|pid, one| *pid != self.pid || !same(one));
        let mut links = self.shared.arrivals.links.lock();
        if links
            .get(&self.pid)
            .is_some_and(|(_, own)| own.number == self.number)
        {
            links.remove(&self.pid);
        }
    }
}

impl OwnLink {
    /// Makes ready for a process that is going to come, and says so: fetches its files (what cannot be had now is fetched when it is
    /// built), and begins to build it.
    fn prefetch(&self, payload: &[u8], answer: ReplyTo) -> Result<(), String> {
        let coming: wire::Prefetch = wire::decode(payload).map_err(|e| e.to_string())?;
        image::validate_areas(&coming.areas).map_err(|e| e.to_string())?;
        let (shared, to, pid, number) = (self.shared.clone(), self.coming.clone(), self.pid, self.number);
        self.shared.starter.start("prefetch", move || {
            let wire::Prefetch {
                files,
                areas,
                hostname,
            } = coming;
            for file in &files {
                if let Err(e) = shared.file(file) {
                    tracing::debug!(id = file.id, error = %e, "file not fetched yet");
                }
            }
            if !areas.is_empty()
                && let Err(why) = begin(&shared, &to, pid, number, areas, hostname)
            {
                tracing::debug!(pid, why, "its pages are kept until it is built");
            }
            answer.errno(0);
        });
        Ok(())
    }
}

/// Has the tracer begin to build a process, whose pages are put into it from then on.
fn begin(
    shared: &Shared,
    to: &Coming,
    pid: i32,
    number: u64,
    areas: Vec<Area>,
    hostname: Vec<u8>,
) -> Result<(), String> {
    let ahead = shared.clocks_ahead().map_err(|e| format!("home's clocks: {e}"))?;
    let (done, begun) = crossbeam_channel::bounded(1);
    shared.post(Command::Begin(Begin {
        pid,
        number,
        hostname,
        ahead,
        areas,
        done,
    }));
    let room = begun.recv().map_err(|e| e.to_string())??;
    let mut arriving = to.arriving.lock();
    if to.over.load(Ordering::Acquire) || !arriving.put_into(number, room) {
        shared.post(Command::Abandon(pid, number));
        return Err("it does not come any more, or its pages were there first".into());
    }
    Ok(())
}

/// Says which pages are in the page store.
fn tell_known(shared: &Arc<Shared>, answer: ReplyTo) {
    let stored = shared.stored.clone();
    shared.starter.start("known", move || {
        answer.send(&[&stored.known().encode()]);
    });
}

/// Fetches what is missing of the files, off the thread that delivers frames, and hands the whole to the tracer.
fn prepare(
    shared: &Arc<Shared>,
    arriving: Arriving,
    answer: ReplyTo,
    pager: &PagerSlot,
    needless: Arc<AtomicBool>,
) -> Result<(), String> {
    let Arriving {
        launch,
        pages,
        own_link,
        later,
        begun_by,
        landed,
        ..
    } = arriving;
    let later = later.map(|runs| Later {
        runs,
        link: answer.link.clone(),
        pager: pager.clone(),
    });
    let launch = launch.ok_or("a process without a description")?;
    let starter = shared.starter.clone();
    let shared = shared.clone();
    starter.start("build", move || {
        let begun = Instant::now();
        match missing(&shared, &launch) {
            Ok((files, ahead)) => {
                shared.post(Command::Build(Box::new(Build {
                    launch,
                    pages,
                    begun_by,
                    keep_pages: own_link,
                    landed,
                    files,
                    ahead,
                    begun,
                    later,
                    needless,
                    answer,
                })));
            }
            Err(why) => {
                if let Some(number) = begun_by {
                    shared.post(Command::Abandon(launch.image.pid, number));
                }
                let ready = wire::LaunchReady {
                    refused: Some(StayReason::NoNode(why)),
                    restore_us: 0,
                    missing: Vec::new(),
                };
                answer.send(&[&wire::encode(&ready)]);
            }
        }
    });
    Ok(())
}

type Missing = (HashMap<u64, Arc<super::files::Stored>>, linklayer::image::Clocks);

fn missing(shared: &Shared, launch: &wire::Launch) -> Result<Missing, String> {
    let mut files = HashMap::new();
    for file in &launch.files {
        let stored = shared
            .file(file)
            .map_err(|e| format!("{}: {e}", String::from_utf8_lossy(&file.path)))?;
        files.insert(file.id, stored);
    }
    let ahead = shared.clocks_ahead().map_err(|e| format!("home's clocks: {e}"))?;
    Ok((files, ahead))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(arriving: &mut Arriving, kind: Kind, payload: &[u8]) -> Result<Next, String> {
        arriving.frame(5, kind, payload, &Nothing)
    }

    #[test]
    fn what_came_as_a_hash_and_is_not_there_is_asked_for_as_far_as_it_counts() {
        let mut arriving = Arriving::default();
        let hashes = [&0x1000u64.to_le_bytes()[..], &[7; 3 * 32]].concat();
        assert_eq!(frame(&mut arriving, Kind::KnownPages, &hashes), Ok(Next::More));
        let runs = vec![(0x2000, 0x3000)];
        let present = wire::encode(&wire::Present { runs: runs.clone() });
        assert_eq!(frame(&mut arriving, Kind::Present, &present), Ok(Next::More));
        assert_eq!(
            frame(&mut arriving, Kind::LaunchBuild, &[]),
            Ok(Next::Missing(runs))
        );
        let page = [&0x2000u64.to_le_bytes()[..], &[7; PAGE as usize]].concat();
        assert_eq!(frame(&mut arriving, Kind::Pages, &page), Ok(Next::More));
        assert_eq!(frame(&mut arriving, Kind::LaunchBuild, &[]), Ok(Next::Build));
        assert!(frame(&mut arriving, Kind::KnownPages, &hashes[1..]).is_err());
    }

    #[test]
    fn a_process_is_kept_until_it_is_complete() {
        let mut arriving = Arriving::default();
        let page = [&0x1000u64.to_le_bytes()[..], &[7; PAGE as usize]].concat();
        assert_eq!(frame(&mut arriving, Kind::Pages, &page), Ok(Next::More));
        assert_eq!(arriving.pages.bytes(), PAGE as usize);
        let present = wire::encode(&wire::Present {
            runs: vec![(0, PAGE)],
        });
        assert_eq!(frame(&mut arriving, Kind::Present, &present), Ok(Next::More));
        let nonsense = wire::encode(&wire::Present {
            runs: vec![(PAGE, 0)],
        });
        assert!(frame(&mut arriving, Kind::Later, &nonsense).is_err());
        let again = frame(&mut arriving, Kind::Present, &present);
        assert!(again.is_err(), "the same once more");
        assert!(frame(&mut arriving, Kind::Launch, b"nonsense").is_err());
        assert!(frame(&mut arriving, Kind::Signal, &[]).is_err());
        assert_eq!(frame(&mut arriving, Kind::LaunchBuild, &[]), Ok(Next::Build));
        assert!(arriving.launch.is_none());
    }
}
