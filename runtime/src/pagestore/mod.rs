//! The page store of a user on a node: pages of memory and of files that have been here, by their content, so that they need not be
//! sent again.
//!
//! It is shared by the supervisors of all jobs of that user, and of nobody else: who names a hash is given the page, and must not get
//! another user's. It is a directory that only the user can enter:
//!
//!     journal    which page is in which slot (see [`journal`]), replayed by everybody, shortened when it is long
//!     pages      the slots, 4 KiB each
//!     counts     what was counted
//!
//! Changes are made under a lock (flock(2)) on the journal, which the kernel takes back from who dies. Reading needs none, because nothing is
//! believed: a page is hashed when it is put in, and again when it is taken out. What is torn, forged, rotten or just being replaced
//! does not have the hash that was asked for, and is not there then.
//!
//! A slot is sealed: the page is combined with a stream of bytes that is made from its whole hash, of which the journal has a part only.
//! So the files tell nothing to those who do not know the hash of a page already.

pub mod journal;
mod place;

pub use place::{counts, default_dir, prepare, remove_all};

use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bincode::{Decode, Encode};
use linklayer::image::PAGE;
use nix::fcntl::{Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::Mode;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use journal::{Change, HEADER_BYTES, Index, Prefix, RECORD_BYTES};

/// Bytes of a page.
const PAGE_BYTES: usize = PAGE as usize;
/// The smallest store, bytes.
pub const MIN_BYTES: u64 = 1 << 20;
/// The largest. A supervisor keeps about a fiftieth of it in memory.
pub const MAX_BYTES: u64 = 16 << 30;
/// Bytes that are not of pages, nor of the journal's records for them.
const OVERHEAD_BYTES: u64 = 128 << 10;
/// Records that a journal may have besides two for each slot.
const SPARE_RECORDS: u64 = 2048;
/// What a page takes: its slot, and records of it in the journal and in the one that replaces it.
const PER_PAGE_BYTES: u64 = PAGE + 3 * RECORD_BYTES as u64;
/// Pages that are put in while the lock is held once.
const BATCH: usize = 512;
/// How long somebody else may have the lock until it is done without.
const PATIENCE: Duration = Duration::from_millis(300);
/// What slots are sealed with.
const SEAL: &str = "mosrun 2026-11 page store: seal of a slot";

/// The files of a store.
const FILES: [&str; 4] = ["journal", "journal.new", "pages", "counts"];

/// The hash of a page.
pub type Hash = [u8; 32];

/// What a store has and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Counts {
    /// Pages that are there.
    pub entries: u64,
    /// What the store takes on the disk, bytes; at most its limit.
    pub bytes: u64,
    /// Pages that were asked for and there.
    pub hits: u64,
    /// What did not have to be sent because of that, bytes.
    pub saved_bytes: u64,
    /// Pages that were put in.
    pub inserted: u64,
    /// Pages that had to make room.
    pub evicted: u64,
    /// Pages that were not what they should be, and were dropped.
    pub corrupt: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.entries += other.entries;
        self.bytes += other.bytes;
        self.hits += other.hits;
        self.saved_bytes += other.saved_bytes;
        self.inserted += other.inserted;
        self.evicted += other.evicted;
        self.corrupt += other.corrupt;
    }
}

impl Counts {
    const WORDS: usize = 7;

    fn encode(self) -> [u8; 8 * Counts::WORDS] {
        let words = [
            self.entries,
            self.bytes,
            self.hits,
            self.saved_bytes,
            self.inserted,
            self.evicted,
            self.corrupt,
        ];
        let mut bytes = [0; 8 * Counts::WORDS];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8; 8 * Counts::WORDS]) -> Counts {
        let word = |n: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * n..8 * (n + 1)]);
            u64::from_le_bytes(word)
        };
        Counts {
            entries: word(0),
            bytes: word(1),
            hits: word(2),
            saved_bytes: word(3),
            inserted: word(4),
            evicted: word(5),
            corrupt: word(6),
        }
    }

    /// Those of the store in `dir`, as far as they have been written down.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn of(dir: &Path) -> io::Result<Counts> {
        let dir = open_dir(dir)?;
        let file = open_file(&dir, "counts", OFlag::O_RDONLY)?;
        Counts::read(&file)
    }

    fn read(file: &File) -> io::Result<Counts> {
        let mut bytes = [0; 8 * Counts::WORDS];
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok(Counts::decode(&bytes)),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(Counts::default()),
            Err(e) => Err(e),
        }
    }
}

/// How many pages a store of this size has.
fn slots_for(limit_bytes: u64) -> u32 {
    let slots = limit_bytes
        .clamp(MIN_BYTES, MAX_BYTES)
        .saturating_sub(OVERHEAD_BYTES)
        / PER_PAGE_BYTES;
    u32::try_from(slots).unwrap_or(u32::MAX)
}

/// Opens a directory that is ours, and that nobody else can enter.
fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = nix::fcntl::open(path, flags, Mode::empty())?;
    let meta = File::from(dir.try_clone()?).metadata()?;
    check_owner(&meta, meta.mode() & 0o077 == 0)?;
    Ok(dir)
}

fn open_file(dir: &OwnedFd, name: &str, flags: OFlag) -> io::Result<File> {
    let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = File::from(openat(dir, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
    let meta = file.metadata()?;
    check_owner(&meta, meta.is_file())?;
    Ok(file)
}

/// Whether something is this user's; root may look at everybody's.
fn check_owner(meta: &Metadata, as_it_should_be: bool) -> io::Result<()> {
    let own = nix::unistd::geteuid();
    if !as_it_should_be || (meta.uid() != own.as_raw() && !own.is_root()) {
        return Err(io::Error::other(
            "the page store is not a directory of this user's that nobody else can enter",
        ));
    }
    Ok(())
}

/// Makes `page` what it is not, or again what it was.
fn seal(hash: &Hash, page: &mut [u8; PAGE_BYTES]) {
    let mut stream = [0; PAGE_BYTES];
    let mut key = blake3::Hasher::new_derive_key(SEAL);
    key.update(hash);
    key.finalize_xof().fill(&mut stream);
    let (words, _) = page.as_chunks_mut::<8>();
    for (word, with) in words.iter_mut().zip(stream.as_chunks::<8>().0) {
        *word = (u64::from_ne_bytes(*word) ^ u64::from_ne_bytes(*with)).to_ne_bytes();
    }
}

/// A store that is open. Others may have it open, too.
#[derive(Debug)]
pub struct PageStore {
    dir: OwnedFd,
    pages: File,
    counts: File,
    state: Mutex<State>,
    hits: AtomicU64,
    corrupt: AtomicU64,
    /// Pages that were taken out and are not yet written down as used.
    used: Mutex<HashSet<Prefix>>,
}

#[derive(Debug)]
struct State {
    journal: Arc<File>,
    /// How far it has been read.
    read_bytes: u64,
    index: Index,
}

/// Who holds the lock.
type Lock = Flock<File>;

impl PageStore {
    /// Opens the store in `dir`, which is there, belongs to the caller, and cannot be entered by anybody else. From now on the store has at
    /// most `limit_bytes`, for all who have it open.
    ///
    /// # Errors
    /// The directory is not such a one, or the system's.
    pub fn open(dir: &Path, limit_bytes: u64) -> io::Result<PageStore> {
        let dir = open_dir(dir)?;
        let update = OFlag::O_RDWR | OFlag::O_CREAT;
        let pages = open_file(&dir, "pages", update)?;
        let counts = open_file(&dir, "counts", update)?;
        let journal = Arc::new(open_file(&dir, "journal", update)?);
        let store = PageStore {
            dir,
            pages,
            counts,
            state: Mutex::new(State {
                journal,
                read_bytes: 0,
                index: Index::new(0),
            }),
            hits: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            used: Mutex::default(),
        };
        let slots = slots_for(limit_bytes);
        let mut state = store.state.lock();
        let lock = store.lock(&mut state)?;
        if state.index.slots() != slots {
            state.index = state.index.resized(slots);
            store.rewrite(&mut state)?;
            let bytes = u64::from(slots) * PAGE;
            if store.pages.metadata()?.len() > bytes {
                store.pages.set_len(bytes)?;
            }
            store.note(&state, Counts::default())?;
        }
        drop(lock);
        drop(state);
        Ok(store)
    }

    /// How many pages there are, as far as this process knows.
    pub fn len(&self) -> usize {
        self.state.lock().index.len()
    }

    /// Whether there are none; somebody else may have put some in since it was opened.
    pub fn is_empty(&self) -> bool {
        let mut state = self.state.lock();
        if state.index.is_empty()
            && let Err(e) = self.catch_up(&mut state)
        {
            tracing::debug!(error = %e, "the page store's journal");
        }
        state.index.is_empty()
    }

    /// The pages that were used last, at most so many: the beginnings of their hashes.
    pub fn known(&self, most: usize) -> Vec<u64> {
        let mut state = self.state.lock();
        if let Err(e) = self.catch_up(&mut state) {
            tracing::debug!(error = %e, "the page store's journal");
        }
        state.index.pages().take(most).map(Prefix::get).collect()
    }

    /// Takes a page out. False when it is not there, or not what it should be.
    pub fn get(&self, hash: &Hash, page: &mut [u8; PAGE_BYTES]) -> bool {
        let prefix = journal::prefix(hash);
        let found = self.slot(prefix);
        let there = match found {
            Some(slot) if self.read(hash, slot, page) => true,
            // Somebody may have put another page there since the journal was read.
            Some(slot) => self.get_locked(hash, slot, page),
            None => false,
        };
        if there {
            self.hits.fetch_add(1, Ordering::Relaxed);
            self.used.lock().insert(prefix);
        }
        there
    }

    fn slot(&self, prefix: Prefix) -> Option<u32> {
        let mut state = self.state.lock();
        if let Some(slot) = state.index.slot(prefix) {
            return Some(slot);
        }
        self.catch_up(&mut state).ok()?;
        state.index.slot(prefix)
    }

    fn read(&self, hash: &Hash, slot: u32, page: &mut [u8; PAGE_BYTES]) -> bool {
        if self.pages.read_exact_at(page, u64::from(slot) * PAGE).is_err() {
            return false;
        }
        seal(hash, page);
        blake3::hash(page).as_bytes() == hash
    }

    /// The same while nobody changes anything: what does not have its hash now is dropped.
    fn get_locked(&self, hash: &Hash, before: u32, page: &mut [u8; PAGE_BYTES]) -> bool {
        let prefix = journal::prefix(hash);
        let mut state = self.state.lock();
        let Ok(lock) = self.lock(&mut state) else {
            return false;
        };
        let Some(slot) = state.index.slot(prefix) else {
            return false;
        };
        if self.read(hash, slot, page) {
            return true;
        }
        tracing::warn!(slot, before, "a page of the page store is not what it should be");
        self.corrupt.fetch_add(1, Ordering::Relaxed);
        if let Err(e) = self.append(&mut state, &[Change::Drop(prefix)]) {
            tracing::debug!(error = %e, "the page store's journal");
        }
        drop(lock);
        false
    }

    /// Puts pages in, as far as they are not there: those that are there have been used now. Pages of zeros are not kept, and no more
    /// pages than there is room for.
    ///
    /// # Errors
    /// The disk is full, or the system's: what was put in before is there.
    pub fn insert<'a>(&self, pages: impl Iterator<Item = &'a [u8]>) -> io::Result<()> {
        let slots = self.state.lock().index.slots() as usize;
        let mut seen = HashSet::new();
        let mut pages = pages
            .filter_map(|page| <&[u8; PAGE_BYTES]>::try_from(page).ok())
            .filter(|page| page.iter().any(|b| *b != 0))
            .map(|page| (*blake3::hash(page).as_bytes(), page))
            .filter(|(hash, _)| seen.insert(journal::prefix(hash)))
            .take(slots)
            .peekable();
        while pages.peek().is_some() {
            let batch: Vec<_> = pages.by_ref().take(BATCH).collect();
            self.insert_batch(&batch)?;
        }
        Ok(())
    }

    fn insert_batch(&self, batch: &[(Hash, &[u8; PAGE_BYTES])]) -> io::Result<()> {
        let mut state = self.state.lock();
        let lock = self.lock(&mut state)?;
        let mut changes = Vec::with_capacity(batch.len());
        let mut done = Counts::default();
        let mut failed = Ok(());
        for (hash, page) in batch {
            let prefix = journal::prefix(hash);
            if state.index.slot(prefix).is_some() {
                state.index.apply(Change::Use(prefix));
                changes.push(Change::Use(prefix));
                continue;
            }
            let Some(slot) = state.index.next_slot() else {
                break;
            };
            let mut sealed = **page;
            seal(hash, &mut sealed);
            failed = self.pages.write_all_at(&sealed, u64::from(slot) * PAGE);
            if failed.is_err() {
                break;
            }
            done.inserted += 1;
            done.evicted += u64::from(state.index.is_taken(slot));
            let put = Change::Put(prefix, slot);
            state.index.apply(put);
            changes.push(put);
        }
        let written = self.write_down(&mut state, &changes);
        if written.is_err() {
            // What was not written down is not so.
            state.read_bytes = 0;
            self.catch_up(&mut state)?;
        } else {
            self.note(&state, done)?;
        }
        drop(lock);
        failed.and(written)
    }

    /// Writes down what was counted and which pages were used.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        let lock = self.lock(&mut state)?;
        let used: Vec<_> = self.used.lock().drain().map(Change::Use).collect();
        let result = self
            .append(&mut state, &used)
            .and_then(|()| self.note(&state, Counts::default()));
        drop(lock);
        result
    }

    /// Takes the lock, and reads what others have done.
    fn lock(&self, state: &mut State) -> io::Result<Lock> {
        let until = Instant::now() + PATIENCE;
        loop {
            let file = state.journal.try_clone()?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) if lock.metadata()?.nlink() > 0 => {
                    self.mend(state)?;
                    if lock.metadata()?.nlink() > 0 {
                        return Ok(lock);
                    }
                    // It was replaced just now: the new one is not locked.
                }
                // It was replaced while we waited.
                Ok(_) => self.reopen(state)?,
                Err((_, nix::Error::EWOULDBLOCK)) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err((_, e)) => return Err(e.into()),
            }
        }
    }

    /// With the lock: reads the journal, and begins a new one in place of one that is new or damaged.
    fn mend(&self, state: &mut State) -> io::Result<()> {
        let len = state.journal.metadata()?.len();
        let torn = len.saturating_sub(HEADER_BYTES as u64) % RECORD_BYTES as u64;
        if torn > 0 {
            // Who wrote it last died on the way.
            state.journal.set_len(len - torn)?;
        }
        match self.catch_up(state) {
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                if len > 0 {
                    tracing::warn!(error = %e, "the page store begins anew");
                    self.corrupt.fetch_add(1, Ordering::Relaxed);
                }
                state.index = Index::new(state.index.slots());
                self.rewrite(state)
            }
            other => other,
        }
    }

    fn reopen(&self, state: &mut State) -> io::Result<()> {
        let update = OFlag::O_RDWR | OFlag::O_CREAT;
        state.journal = Arc::new(open_file(&self.dir, "journal", update)?);
        state.read_bytes = 0;
        Ok(())
    }

    /// Reads what has been written since.
    fn catch_up(&self, state: &mut State) -> io::Result<()> {
        let mut meta = state.journal.metadata()?;
        if meta.nlink() == 0 {
            self.reopen(state)?;
            meta = state.journal.metadata()?;
        }
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "damaged");
        if meta.len() < state.read_bytes {
            // What could not be written down whole was taken back.
            state.read_bytes = 0;
        }
        if state.read_bytes == 0 {
            let mut header = [0; HEADER_BYTES];
            state
                .journal
                .read_exact_at(&mut header, 0)
                .map_err(|_| damaged())?;
            let slots = journal::slots_of(&header)
                .filter(|s| *s <= slots_for(MAX_BYTES))
                .ok_or_else(damaged)?;
            state.index = Index::new(slots);
            state.read_bytes = HEADER_BYTES as u64;
        }
        if meta.len() == state.read_bytes {
            return Ok(());
        }
        let mut buffer = vec![0; 64 << 10];
        loop {
            let got = state.journal.read_at(&mut buffer, state.read_bytes)?;
            let whole = got - got % RECORD_BYTES;
            if whole == 0 {
                return Ok(());
            }
            for record in buffer[..whole].chunks_exact(RECORD_BYTES) {
                state.index.apply(Change::decode(record).ok_or_else(damaged)?);
            }
            state.read_bytes += whole as u64;
        }
    }

    /// With the lock: applies changes and writes them down.
    fn append(&self, state: &mut State, changes: &[Change]) -> io::Result<()> {
        changes.iter().for_each(|change| state.index.apply(*change));
        self.write_down(state, changes)
    }

    /// With the lock: writes down changes that have been applied.
    fn write_down(&self, state: &mut State, changes: &[Change]) -> io::Result<()> {
        let most = 2 * u64::from(state.index.slots()) + SPARE_RECORDS;
        let records = state.read_bytes / RECORD_BYTES as u64 + changes.len() as u64;
        if records > most {
            return self.rewrite(state);
        }
        let bytes: Vec<u8> = changes.iter().flat_map(|change| change.encode()).collect();
        let written = state.journal.write_all_at(&bytes, state.read_bytes);
        if let Err(e) = written {
            state.journal.set_len(state.read_bytes)?;
            return Err(e);
        }
        state.read_bytes += bytes.len() as u64;
        Ok(())
    }

    /// With the lock: replaces the journal by the shortest one that says the same.
    fn rewrite(&self, state: &mut State) -> io::Result<()> {
        let update = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_TRUNC;
        let new = open_file(&self.dir, "journal.new", update)?;
        let mut bytes = journal::header(state.index.slots()).to_vec();
        bytes.extend(state.index.changes().flat_map(Change::encode));
        new.write_all_at(&bytes, 0)?;
        renameat(&self.dir, "journal.new", &self.dir, "journal")?;
        state.journal = Arc::new(new);
        state.read_bytes = bytes.len() as u64;
        Ok(())
    }

    /// With the lock: adds to what was counted.
    fn note(&self, state: &State, done: Counts) -> io::Result<()> {
        let mut counts = Counts::read(&self.counts)?;
        let hits = self.hits.swap(0, Ordering::Relaxed);
        counts.hits += hits;
        counts.saved_bytes += hits * PAGE;
        counts.corrupt += self.corrupt.swap(0, Ordering::Relaxed);
        counts.inserted += done.inserted;
        counts.evicted += done.evicted;
        counts.entries = state.index.len() as u64;
        counts.bytes = self.pages.metadata()?.len() + state.journal.metadata()?.len();
        self.counts.write_all_at(&counts.encode(), 0)
    }
}

#[cfg(test)]
mod tests;
