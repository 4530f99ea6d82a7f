//! Memory that comes home in front of its process, on a link of its own.
//!
//! What is sent while it runs is put into the vessel as it comes, where that has room for it ([`Command::Room`]), and else kept until all
//! has come: the vessel gets the layout of the process only when that stands still, of which it hears on another link. Of a process that
//! stands still it is written at once.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use linklayer::frame::Header;
use linklayer::image::{self, Area, PAGE, USER_END};
use linklayer::pages::{self, Kept, Landed};
use linklayer::quic::{Fingerprint, Handler, Link, LinkError, OneTimeKey, Options, ReplyTo};
use linklayer::wire::{self, Kind};
use parking_lot::Mutex;
use shim::faults::{self, Point};
use shim::postcopy::Pager;
use shim::vessel::Vessel;

use crate::shared::{Command, Shared};

/// Memory of processes that come home.
#[derive(Default)]
pub struct Coming {
    kept: Mutex<HashMap<i32, Early>>,
}

#[derive(Default)]
struct Early {
    while_it_runs: bool,
    has_room: bool,
    pages: Kept,
    present: Vec<(u64, u64)>,
    link: Option<Link>,
    /// The pages that come when it runs here.
    later: Option<Vec<(u64, u64)>>,
    userfault: Option<OwnedFd>,
    pager: PagerSlot,
}

/// Where the frames of a link find who brings the pages that come later.
type PagerSlot = Arc<OnceLock<Arc<Pager>>>;

/// Pages of a process that come when it runs here.
pub struct Later {
    /// Which, in the order of addresses.
    pub runs: Vec<(u64, u64)>,
    /// Made by its vessel.
    pub userfault: OwnedFd,
    /// By which they come.
    pub link: Link,
    /// Who is to get what comes.
    pub pager: PagerSlot,
}

/// Most runs of pages in a list: as many as there are when every other page is there.
fn most_runs() -> usize {
    pages::most_kept_bytes() / PAGE as usize / 2
}

impl Coming {
    /// The vessel of a process has made a userfaultfd.
    pub fn userfault(&self, pid: i32, made: OwnedFd) {
        if let Some(early) = self.kept.lock().get_mut(&pid) {
            early.userfault = Some(made);
        }
    }

    /// What of a process comes later, if something does.
    pub fn later(&self, pid: i32) -> Option<Later> {
        let mut all = self.kept.lock();
        let early = all.get_mut(&pid)?;
        Some(Later {
            runs: early.later.take()?,
            userfault: early.userfault.take()?,
            link: early.link.clone()?,
            pager: early.pager.clone(),
        })
    }

    /// Whether memory of a process may be on its way.
    pub fn is_coming(&self, pid: i32) -> bool {
        self.kept.lock().contains_key(&pid)
    }

    /// Which pages of a process that is going to come have been put into its vessel, if there was room made for them.
    pub fn landed(&self, pid: i32) -> Option<Landed> {
        let all = self.kept.lock();
        let early = all.get(&pid).filter(|early| early.has_room)?;
        Some(early.pages.landed().clone())
    }

    /// What has been put into a vessel does not count. Neither does the link by which it came.
    pub fn leave_room(&self, pid: i32) {
        let mut all = self.kept.lock();
        let early = all
            .get(&pid)
            .is_some_and(|early| early.has_room)
            .then(|| all.remove(&pid));
        drop(all);
        if early.is_some() {
            tracing::debug!(pid, "what came early is left");
        }
        // Its link is dropped with it.
        drop(early);
    }

    /// A process is at home, or does not come.
    pub fn forget(&self, pid: i32) {
        // Its link is dropped with it.
        let early = self.kept.lock().remove(&pid);
        if early.is_some() {
            tracing::debug!(pid, "nothing more comes in front");
        }
        drop(early);
    }
}

/// Connects to where a supervisor waits so as to send the memory of a process.
pub fn connect(shared: &Arc<Shared>, request: &wire::Coming) -> Result<(), LinkError> {
    let pid = request.pid;
    let pager = PagerSlot::default();
    let early = Early {
        pager: pager.clone(),
        while_it_runs: request.while_it_runs,
        ..Early::default()
    };
    let earlier = shared.coming.kept.lock().insert(pid, early);
    tracing::debug!(
        pid,
        while_it_runs = request.while_it_runs,
        instead = earlier.is_some(),
        "its memory comes in front"
    );
    drop(earlier);
    let key = OneTimeKey::from_bytes(&request.key)?;
    let handler = Arc::new(OwnLink {
        shared: shared.clone(),
        pid,
        pager,
    });
    let peer = Fingerprint(request.place.fingerprint);
    let link = Link::connect(request.place.addr, &key, peer, handler, Options::of_process())?;
    if let Some(early) = shared.coming.kept.lock().get_mut(&pid) {
        early.link = Some(link);
    }
    Ok(())
}

/// This end of the link of one process.
struct OwnLink {
    shared: Arc<Shared>,
    pid: i32,
    pager: PagerSlot,
}

impl OwnLink {
    fn take_up(&self, link: &Link, lane: u32, header: Header, payload: &[u8]) -> Result<(), String> {
        let kind = Kind::from_u16(header.kind).ok_or_else(|| format!("unknown kind {}", header.kind))?;
        if header.tid != self.pid {
            return Err(format!("process {} on the link of {}", header.tid, self.pid));
        }
        if let Some(pager) = self.pager.get() {
            return pager.frame(kind, payload);
        }
        match kind {
            Kind::Prefetch => {
                let body: wire::Prefetch = wire::decode(payload).map_err(|e| e.to_string())?;
                image::validate_areas(&body.areas).map_err(|e| e.to_string())?;
                let (shared, pid) = (self.shared.clone(), self.pid);
                let link = link.clone();
                let reply = ReplyTo { link, lane, header };
                crate::contact::spawn("room", move || {
                    if let Err(why) = make_room(&shared, pid, body.areas) {
                        tracing::debug!(pid, why, "its pages are kept until it stands still");
                    }
                    reply.errno(0);
                });
                Ok(())
            }
            Kind::Pages | Kind::PackedPages => {
                let piece = pages::decode(kind, payload).map_err(|e| e.to_string())?;
                let stands_still = self.shared.homecoming.lock().contains_key(&self.pid);
                let point = if stands_still {
                    Point::TargetTransfer
                } else {
                    Point::TargetPrecopy
                };
                faults::at(point, self.pid)?;
                let mut all = self.shared.coming.kept.lock();
                let early = all.get_mut(&self.pid).ok_or("nothing was announced")?;
                if !early.while_it_runs {
                    drop(all);
                    return crate::contact::write_pages(&self.shared, self.pid, piece.address, &piece.data);
                }
                early
                    .pages
                    .put(&piece, pages::most_kept_bytes())
                    .map_err(|e| e.to_string())
            }
            // All frames before this one have been taken up.
            Kind::InPlace => {
                let link = link.clone();
                ReplyTo { link, lane, header }.errno(0);
                Ok(())
            }
            Kind::Present => {
                let present: wire::Present = wire::decode(payload).map_err(|e| e.to_string())?;
                let mut all = self.shared.coming.kept.lock();
                let early = all.get_mut(&self.pid).ok_or("nothing was announced")?;
                early.present.extend(present.runs);
                Ok(())
            }
            Kind::Later => {
                let more: wire::Present = wire::decode(payload).map_err(|e| e.to_string())?;
                let mut all = self.shared.coming.kept.lock();
                let early = all.get_mut(&self.pid).ok_or("nothing was announced")?;
                let list = early.later.get_or_insert_default();
                for (start, end) in more.runs {
                    let ordered = start < end && end <= USER_END && list.last().is_none_or(|l| l.1 <= start);
                    let pages = start.is_multiple_of(PAGE) && end.is_multiple_of(PAGE);
                    if !ordered || !pages || list.len() >= most_runs() {
                        return Err("a list of pages that is none".into());
                    }
                    list.push((start, end));
                }
                Ok(())
            }
            // All has been sent: it is written into the vessel.
            Kind::PagesEnd => {
                let early = self.shared.coming.kept.lock().get_mut(&self.pid).map(|early| {
                    (
                        early.while_it_runs,
                        std::mem::take(&mut early.pages),
                        std::mem::take(&mut early.present),
                    )
                });
                let (kept, pages, present) = early.ok_or("nothing was announced")?;
                let (shared, pid) = (self.shared.clone(), self.pid);
                let link = link.clone();
                let reply = ReplyTo { link, lane, header };
                crate::contact::spawn("coming", move || {
                    reply.errno(if kept {
                        write_all(&shared, pid, pages, &present)
                    } else {
                        0
                    });
                });
                Ok(())
            }
            other => Err(format!("{other:?} on the link of a process")),
        }
    }
}

/// Has the vessel of a process make room for its pages, which are put there from then on.
fn make_room(shared: &Shared, pid: i32, areas: Vec<Area>) -> Result<(), String> {
    let (done, made) = crossbeam_channel::bounded(1);
    shared.post(Command::Room(pid, areas, done));
    let room = made.recv().map_err(|e| e.to_string())??;
    let mut all = shared.coming.kept.lock();
    let early = all.get_mut(&pid).ok_or("nothing was announced")?;
    if !early.while_it_runs || early.has_room || early.pages.bytes() > 0 {
        return Err("its pages were there first".into());
    }
    early.has_room = true;
    early.pages.put_into(Box::new(room));
    Ok(())
}

fn write_all(shared: &Shared, pid: i32, mut pages: Kept, present: &[(u64, u64)]) -> i32 {
    pages.retain(present);
    // Those that do not exist any more.
    let stale = pages.landed().stale();
    let tid = shared.homecoming.lock().get(&pid).copied();
    if let Some(worker) = tid
        .filter(|_| !stale.is_empty())
        .and_then(|tid| shared.worker(tid))
        && let Err(e) = Vessel::drop_runs(&worker.slot, stale)
    {
        tracing::error!(pid, error = %e, "memory that came home");
        return libc::EIO;
    }
    for (address, data) in pages.runs() {
        if let Err(why) = crate::contact::write_pages(shared, pid, address, data) {
            tracing::error!(pid, %why, "memory that came home");
            return libc::EIO;
        }
    }
    0
}

impl Handler for OwnLink {
    fn frame(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>) {
        if let Err(why) = self.take_up(link, lane, header, &payload) {
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
    fn over(&self, why: &str) {
        if let Some(pager) = self.pager.get() {
            pager.lost(why);
        }
    }
}
