//! Files that guests map shared and writable: home holds them (`deputy/src/held.rs`), and their content is a memfd here, which all guests
//! map that map the file.
//!
//! What the guests have changed is known by the hashes of the pages that home has. It is written at home when a guest asks for that
//! (msync(2)), executes a program or ends, and always before home lets anybody else have the file.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use linklayer::image::PAGE;
use linklayer::stay::StayReason;
use linklayer::wire::{self, HeldFile, HeldId, Kind, MAX_HELD_BYTES};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::Mutex;
use shim::capture::{HELD, held_by};

use super::calls::{Call, Outcome};
use super::files::CHUNK_BYTES;
use super::shared::{Command, Shared};

/// Most bytes written at home by one message.
const PART_BYTES: usize = 256 << 10;

/// A held file here.
struct Held {
    file: HeldFile,
    memory: File,
    /// What home has, by the hashes of its pages; none before it has been fetched.
    at_home: Mutex<Option<Vec<blake3::Hash>>>,
}

/// The held files of a job's guests on this node.
#[derive(Default)]
pub struct HeldFiles {
    count: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    files: HashMap<u64, Entry>,
    /// Those that were given back: an answer that names one may still be on its way.
    given_back: HashSet<u64>,
    /// Those that are on their way home with the guests that map them.
    leaving: HashSet<u64>,
}

struct Entry {
    held: Arc<Held>,
    /// Guests that have mapped it, or are about to. Their children may map it as well.
    mappers: HashSet<i32>,
}

impl HeldFiles {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// What home knows of the file with this number.
    pub fn known(&self, id: u64) -> Option<HeldFile> {
        Some(self.state.lock().files.get(&id)?.held.file.clone())
    }

    fn get(&self, id: u64) -> Option<Arc<Held>> {
        Some(self.state.lock().files.get(&id)?.held.clone())
    }

    /// The files that a guest has mapped, or is about to.
    pub fn of(&self, pid: i32) -> Vec<u64> {
        if self.is_empty() {
            return Vec::new();
        }
        let state = self.state.lock();
        let its = state
            .files
            .iter()
            .filter(|(_, entry)| entry.mappers.contains(&pid));
        its.map(|(id, _)| *id).collect()
    }

    /// A guest is about to map a file. None: it was given back, or is on its way home.
    fn take(&self, file: &HeldFile, pid: i32) -> io::Result<Option<Arc<Held>>> {
        let mut state = self.state.lock();
        if state.given_back.contains(&file.id) || state.leaving.contains(&file.id) {
            return Ok(None);
        }
        if let Some(entry) = state.files.get_mut(&file.id) {
            entry.mappers.insert(pid);
            return Ok(Some(entry.held.clone()));
        }
        let size = i64::try_from(file.size.min(MAX_HELD_BYTES)).map_err(io::Error::other)?;
        let name = format!("{HELD}{}", file.id);
        let memory = memfd_create(name.as_str(), MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&memory, size)?;
        let held = Arc::new(Held {
            file: file.clone(),
            memory: memory.into(),
            at_home: Mutex::new(None),
        });
        let entry = Entry {
            held: held.clone(),
            mappers: HashSet::from([pid]),
        };
        state.files.insert(file.id, entry);
        self.count.fetch_add(1, Ordering::AcqRel);
        Ok(Some(held))
    }

    /// Nobody maps a file, and nobody can begin to from now on. An error: somebody has just begun to. The file is known until
    /// [`HeldFiles::remove`]: whoever else is to give it back finds what has still to be written.
    fn give_back(&self, shared: &Shared, id: u64) -> io::Result<Option<Arc<Held>>> {
        let mut state = self.state.lock();
        let guests = shared.guests.read();
        let lives = |entry: &Entry| entry.mappers.iter().any(|pid| guests.contains_key(pid));
        if state.files.get(&id).is_some_and(lives) {
            return Err(io::Error::from_raw_os_error(libc::EINPROGRESS));
        }
        state.given_back.insert(id);
        Ok(state.files.get(&id).map(|entry| entry.held.clone()))
    }

    /// Forgets a file: home has its content.
    fn remove(&self, state: &mut State, id: u64) {
        state.given_back.insert(id);
        state.leaving.remove(&id);
        if state.files.remove(&id).is_some() {
            self.count.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// These are going home with a group of guests: nobody begins to map one of them from now on. An error: somebody else has begun
    /// to.
    ///
    /// # Errors
    /// As said; the group does not go then.
    pub fn leave(&self, ids: &BTreeSet<u64>, group: &[i32]) -> io::Result<()> {
        let mut state = self.state.lock();
        let others = |id: &u64| {
            let entry = state.files.get(id);
            entry.is_some_and(|entry| entry.mappers.iter().any(|pid| !group.contains(pid)))
        };
        if ids.iter().any(others) {
            return Err(io::Error::other("another process has just mapped a file of it"));
        }
        state.leaving.extend(ids);
        Ok(())
    }

    /// They stay, with those who map them.
    pub fn stay(&self, ids: impl IntoIterator<Item = u64>) {
        let mut state = self.state.lock();
        for id in ids {
            state.leaving.remove(&id);
        }
    }

    /// These have gone home with those who mapped them.
    pub fn forget(&self, ids: impl IntoIterator<Item = u64>) {
        let mut state = self.state.lock();
        for id in ids {
            self.remove(&mut state, id);
        }
    }
}

/// Maps a file for a guest, whose own kernel executes the mmap(2). None: home has to be asked again.
pub(super) fn map(call: &Call, file: &HeldFile, fd: i32) -> Result<Option<Outcome>, Outcome> {
    let shared = call.shared;
    let held = match shared.held.take(file, call.thread.guest.pid) {
        Ok(Some(held)) => held,
        Ok(None) => return Ok(None),
        Err(e) => {
            return Ok(Some(Outcome::Value(-i64::from(
                e.raw_os_error().unwrap_or(libc::ENOMEM),
            ))));
        }
    };
    if let Err(e) = held.fill(shared) {
        tracing::error!(error = %e, "file for a mapping");
        return Ok(Some(Outcome::Stay(StayReason::SharedMapping)));
    }
    let listener = &call.thread.guest.listener;
    let added = listener.add_fd(
        call.notification,
        held.memory.as_fd(),
        u32::try_from(fd).ok(),
        true,
    );
    Ok(Some(match added {
        Ok(_) => Outcome::Continue,
        Err(e) => {
            tracing::error!(error = %e, "file for a mapping");
            Outcome::Handled
        }
    }))
}

impl Held {
    /// Fetches the content, unless it is here.
    fn fill(&self, shared: &Shared) -> io::Result<()> {
        let mut at_home = self.at_home.lock();
        if at_home.is_some() {
            return Ok(());
        }
        let size = self.file.size;
        let mut at = 0;
        while at < size {
            let data = shared.read_file(self.file.id, at, u64::from(CHUNK_BYTES).min(size - at) as u32)?;
            if data.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if data.iter().any(|b| *b != 0) {
                self.memory.write_all_at(&data, at)?;
            }
            at += data.len() as u64;
        }
        let mut hashes = Vec::new();
        self.pages(&mut |_, page| {
            hashes.push(blake3::hash(page));
            Ok(())
        })?;
        *at_home = Some(hashes);
        Ok(())
    }

    /// Gives all pages in turn, the last one as long as it is.
    fn pages(&self, each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut page = [0; PAGE as usize];
        let mut at = 0;
        while at < self.file.size {
            let len = PAGE.min(self.file.size - at) as usize;
            self.memory.read_exact_at(&mut page[..len], at)?;
            each(at, &page[..len])?;
            at += PAGE;
        }
        Ok(())
    }

    /// Writes at home what it does not have.
    fn write_back(&self, shared: &Shared) -> io::Result<()> {
        let mut at_home = self.at_home.lock();
        let Some(hashes) = at_home.as_mut() else {
            return Ok(());
        };
        let known = hashes.clone();
        let mut send = |changed: &mut Changed| {
            if changed.data.is_empty() {
                return Ok(());
            }
            tell(shared, self.file.id, changed.at, &changed.data)?;
            changed.data.clear();
            for (index, hash) in changed.hashes.drain(..) {
                if let Some(known) = hashes.get_mut(index) {
                    *known = hash;
                }
            }
            io::Result::Ok(())
        };
        let mut changed = Changed::default();
        self.pages(&mut |at, page| {
            let index = (at / PAGE) as usize;
            let hash = blake3::hash(page);
            if known.get(index) == Some(&hash) {
                return Ok(());
            }
            if changed.at + changed.data.len() as u64 != at || changed.data.len() + page.len() > PART_BYTES {
                send(&mut changed)?;
                changed.at = at;
            }
            changed.data.extend_from_slice(page);
            changed.hashes.push((index, hash));
            Ok(())
        })?;
        send(&mut changed)
    }
}

/// Neighbouring pages that home does not have.
#[derive(Default)]
struct Changed {
    at: u64,
    data: Vec<u8>,
    hashes: Vec<(usize, blake3::Hash)>,
}

fn tell(shared: &Shared, id: u64, at: u64, data: &[u8]) -> io::Result<()> {
    let body = [&id.to_le_bytes()[..], &at.to_le_bytes(), data].concat();
    let answer = shared
        .ask(0, 0, Kind::HeldWrite, &body)
        .map_err(io::Error::other)?;
    match wire::decode(&answer).map_err(io::Error::other)? {
        wire::Errno(0) => Ok(()),
        wire::Errno(errno) => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Writes at home what has been changed of these files.
///
/// # Errors
/// Those of writing at home, or the contact is lost.
pub fn write_back(shared: &Shared, ids: impl IntoIterator<Item = u64>) -> io::Result<()> {
    for held in ids.into_iter().filter_map(|id| shared.held.get(id)) {
        held.write_back(shared)?;
    }
    Ok(())
}

/// The same before a guest ends or executes a program: nobody is to find the file older than that, whatever becomes of this node.
pub(super) fn before_end(call: &Call) {
    if call.shared.held.is_empty() {
        return;
    }
    let guest = &call.thread.guest;
    let mut ids = call.shared.held.of(guest.pid);
    ids.extend(held_by(guest.memory.pid()));
    if let Err(e) = write_back(call.shared, ids) {
        // It is tried again when the file is given back.
        tracing::warn!(pid = guest.pid, error = %e, "mapped file not written at home yet");
    }
}

/// msync(2): what the file is at home is as new as the mapping, and on the disk if that is asked for.
pub(super) fn msync(call: &Call) -> Outcome {
    let shared = call.shared;
    if shared.held.is_empty() {
        return Outcome::Continue;
    }
    let ids = held_by(call.thread.guest.memory.pid());
    let mut done = write_back(shared, ids.iter().copied());
    if call.args[2] as i32 & libc::MS_SYNC != 0 {
        done = done.and_then(|()| ids.iter().try_for_each(|id| tell(shared, *id, 0, &[])));
    }
    match done {
        // The arguments are looked at by this kernel.
        Ok(()) => Outcome::Continue,
        Err(e) => Outcome::Value(-i64::from(e.raw_os_error().unwrap_or(libc::EIO))),
    }
}

/// The guests that map a file, or are about to.
fn mappers(shared: &Shared, id: u64) -> Vec<i32> {
    let known = {
        let state = shared.held.state.lock();
        state.files.get(&id).map(|entry| entry.mappers.clone())
    };
    let known = known.unwrap_or_default();
    let guests = shared.guests.read();
    guests
        .values()
        .filter(|guest| known.contains(&guest.pid) || held_by(guest.memory.pid()).contains(&id))
        .map(|guest| guest.pid)
        .collect()
}

/// Home wants a file: gives it back when nobody maps it, else sends home those who do. Gives an errno.
pub fn wanted(shared: &Shared, id: u64) -> i32 {
    let mappers = mappers(shared, id);
    if !mappers.is_empty() {
        // They may be stopped, and come only when they are continued.
        if let Err(e) = write_back(shared, [id]) {
            tracing::warn!(id, error = %e, "mapped file not written at home yet");
        }
        for pid in mappers {
            shared.post(Command::GoHome(pid, StayReason::SharedMapping));
        }
        return libc::EINPROGRESS;
    }
    match orphan(shared, id) {
        Ok(()) => 0,
        Err(e) => e.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// Gives up a file that nobody maps, when home has its content. Home may ask for it while it is being given back: both wait for the
/// content to be there.
fn orphan(shared: &Shared, id: u64) -> io::Result<()> {
    let Some(held) = shared.held.give_back(shared, id)? else {
        return Ok(());
    };
    let written = held.write_back(shared);
    shared.held.forget([id]);
    written
}

/// A guest has ended: home gets the files that nobody maps any more.
pub fn left(shared: &Arc<Shared>, pid: i32) {
    if shared.held.is_empty() {
        return;
    }
    let ids: Vec<u64> = {
        let mut state = shared.held.state.lock();
        state.files.values_mut().for_each(|entry| {
            entry.mappers.remove(&pid);
        });
        state.files.keys().copied().collect()
    };
    let later = shared.clone();
    shared.starter.start("held", move || {
        for id in ids {
            // Home asks for it as well, perhaps.
            if !mappers(&later, id).is_empty() || later.held.get(id).is_none() {
                continue;
            }
            match orphan(&later, id) {
                Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => continue,
                Err(e) => tracing::error!(id, error = %e, "mapped file not written at home"),
                Ok(()) => {}
            }
            let body = wire::encode(&HeldId(id));
            if let Err(e) = later.ask(0, 0, Kind::GivenBack, &body) {
                tracing::debug!(error = %e, "file not given back");
            }
        }
    });
}
