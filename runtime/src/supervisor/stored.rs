//! The page store as a supervisor uses it: opened and filled on a thread of its own, so that nobody waits for the disk but those who
//! want a page. Whatever is wrong with the store, processes move without it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError};
use linklayer::image::PAGE;
use linklayer::pages::known::{Hash, Known, MAX_KNOWN, Source};
use linklayer::pages::{self, Kept};
use parking_lot::Mutex;
use shim::faults::{self, Point};

use super::arrivals::Frames;
use super::handshake::StoreConfig;
use crate::pagestore::PageStore;

/// What may wait to be put in, and how many bytes of memory besides what is put in at that moment. What is more is not kept.
const MOST_WAITING: usize = 1024;
const MOST_WAITING_BYTES: usize = 1 << 30;
/// Bytes of a file that are read at a time.
const FILE_CHUNK_BYTES: u64 = 1 << 20;

/// Something to be put in.
enum Work {
    /// The memory of a process that came: what was kept of it, and frames of what was not.
    Memory(Box<Kept>, Frames),
    /// Ranges of a file that were fetched.
    File(File, Vec<Range<u64>>),
    /// Nothing: write down what was used.
    Used,
}

/// The page store of a supervisor, if it has one.
#[derive(Clone)]
pub struct Stored {
    opened: Arc<OnceLock<Option<PageStore>>>,
    work: Arc<Mutex<Option<Sender<Work>>>>,
    done: Receiver<()>,
    /// Bytes of memory that wait.
    waiting_bytes: Arc<AtomicUsize>,
    limit_bytes: u64,
}

impl Stored {
    /// No store.
    #[cfg(test)]
    pub fn none() -> Stored {
        Stored {
            opened: Arc::new(OnceLock::from(None)),
            work: Arc::default(),
            done: crossbeam_channel::never(),
            waiting_bytes: Arc::default(),
            limit_bytes: 0,
        }
    }

    /// Begins to open the store. For a thread that is confined, as the one that is started for it is then.
    pub fn start(config: Option<StoreConfig>) -> Stored {
        let (work, works) = crossbeam_channel::bounded(MOST_WAITING);
        let (ended, done) = crossbeam_channel::bounded(1);
        let stored = Stored {
            opened: Arc::default(),
            work: Arc::new(Mutex::new(Some(work))),
            done,
            waiting_bytes: Arc::default(),
            limit_bytes: config.as_ref().map_or(0, |config| config.limit_bytes),
        };
        let waiting_bytes = stored.waiting_bytes.clone();
        let Some(config) = config else {
            let _ = stored.opened.set(None);
            return stored;
        };
        let opened = stored.opened.clone();
        let work = move || {
            let store = PageStore::open(&config.path(), config.limit_bytes);
            if let Err(e) = &store {
                tracing::warn!(dir = %config.path().display(), error = %e, "no page store");
            }
            let _ = opened.set(store.ok());
            if let Some(Some(store)) = opened.get() {
                serve(store, &works, &waiting_bytes);
            }
            drop(ended);
        };
        let thread = std::thread::Builder::new().name("store".into());
        if let Err(e) = thread.spawn(work) {
            tracing::warn!(error = %e, "no page store");
            let _ = stored.opened.set(None);
        }
        stored
    }

    /// How much of a process it has room for.
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// The store, when it is open.
    fn store(&self) -> Option<&PageStore> {
        self.opened.wait().as_ref()
    }

    /// Whether there are pages in it.
    pub fn has_some(&self) -> bool {
        self.store().is_some_and(|store| !store.is_empty())
    }

    /// The pages that it has, for a sender.
    pub fn known(&self) -> Known {
        Known::of(
            self.store()
                .map(|store| store.known(MAX_KNOWN))
                .unwrap_or_default(),
        )
    }

    /// Keeps the memory that a process brought.
    pub fn keep_memory(&self, pages: Kept, landed: Frames) {
        let bytes = bytes(&pages, &landed);
        if self.waiting_bytes.load(Ordering::Relaxed) > MOST_WAITING_BYTES {
            tracing::debug!(bytes, "the page store is busy; not kept");
            return;
        }
        self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        if !self.put(Work::Memory(Box::new(pages), landed)) {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    /// Keeps ranges of a file that had to be fetched, or takes note that nothing had.
    pub fn keep_file(&self, file: io::Result<File>, fetched: Vec<Range<u64>>) {
        let _kept = match file {
            Ok(file) if !fetched.is_empty() => self.put(Work::File(file, fetched)),
            _ => self.put(Work::Used),
        };
    }

    /// False when it is not kept.
    fn put(&self, work: Work) -> bool {
        if matches!(self.opened.get(), Some(None)) {
            return false;
        }
        match self.work.lock().as_ref().map(|queue| queue.try_send(work)) {
            Some(Ok(())) => true,
            Some(Err(TrySendError::Full(_))) => {
                tracing::debug!("the page store is busy; not kept");
                false
            }
            Some(Err(TrySendError::Disconnected(_))) | None => false,
        }
    }

    /// The job is over: waits until everything is put in, but not longer than this.
    pub fn finish(&self, patience: Duration) {
        let queue = self.work.lock().take();
        drop(queue);
        if !matches!(self.opened.get(), Some(None)) {
            let _ = self.done.recv_timeout(patience);
        }
    }
}

impl Source for Stored {
    fn page(&self, hash: &Hash, page: &mut [u8; PAGE as usize]) -> bool {
        self.store().is_some_and(|store| store.get(hash, page))
    }
}

fn serve(store: &PageStore, works: &Receiver<Work>, waiting_bytes: &AtomicUsize) {
    let complained = AtomicBool::new(false);
    for work in works {
        let result = match work {
            Work::Memory(pages, landed) => {
                waiting_bytes.fetch_sub(bytes(&pages, &landed), Ordering::Relaxed);
                let pages = pages.runs().flat_map(|(_, run)| run.chunks(PAGE as usize));
                let there_is_room = faults::at(Point::TargetKeep, 0).map_err(io::Error::other);
                there_is_room
                    .and_then(|()| store.insert(pages))
                    .and_then(|()| insert_frames(store, &landed))
            }
            Work::File(file, fetched) => insert_file(store, &file, &fetched),
            Work::Used => Ok(()),
        };
        if let Err(e) = result.and_then(|()| store.flush())
            && !complained.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(error = %e, "the page store does not take everything");
        }
    }
}

/// Bytes that wait.
fn bytes(pages: &Kept, landed: &Frames) -> usize {
    pages.bytes() + landed.iter().map(|(_, payload)| payload.len()).sum::<usize>()
}

fn insert_frames(store: &PageStore, landed: &Frames) -> io::Result<()> {
    for (kind, payload) in landed {
        // They were read before.
        if let Ok(piece) = pages::decode(*kind, payload) {
            store.insert(piece.data.chunks(PAGE as usize))?;
        }
    }
    Ok(())
}

fn insert_file(store: &PageStore, file: &File, fetched: &[Range<u64>]) -> io::Result<()> {
    for range in fetched {
        let mut at = range.start;
        while at < range.end {
            let len = FILE_CHUNK_BYTES.min(range.end - at);
            // A last page that the file does not fill ends with zeros, as when it is mapped.
            let mut data = vec![0; len.next_multiple_of(PAGE) as usize];
            file.read_exact_at(&mut data[..len as usize], at)?;
            store.insert(data.chunks(PAGE as usize))?;
            at += len;
        }
    }
    Ok(())
}

/// A directory for a store.
#[cfg(test)]
pub(super) fn directory() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    dir
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_supervisor_keeps_the_next_one_has() {
        let dir = directory();
        let config = StoreConfig::new(dir.path(), 1 << 20);
        let first = Stored::start(Some(config.clone()));
        assert!(!first.has_some());
        let mut file = vec![3; PAGE as usize + 100];
        file[0] = 4;
        let on_disk = tempfile::tempfile().unwrap();
        on_disk.write_all_at(&file, 0).unwrap();
        first.keep_file(Ok(on_disk), std::iter::once(0..file.len() as u64).collect());
        let mut kept = Kept::default();
        let address = 0x1000;
        let data = vec![9; PAGE as usize].into();
        kept.put(&linklayer::pages::Piece { address, data }, 1 << 20)
            .unwrap();
        first.keep_memory(kept, Vec::new());
        first.finish(Duration::from_secs(20));
        let second = Stored::start(Some(config));
        assert!(second.has_some());
        file.resize(2 * PAGE as usize, 0);
        let mut page = [0; PAGE as usize];
        for wanted in file.chunks(PAGE as usize).chain([&[9; PAGE as usize][..]]) {
            let hash = *blake3::hash(wanted).as_bytes();
            assert!(second.known().has(&hash));
            assert!(second.page(&hash, &mut page) && page[..] == *wanted);
        }
    }

    #[test]
    fn without_a_store_there_is_nothing() {
        let missing = StoreConfig::new("/nonexistent/store".as_ref(), 1 << 20);
        for config in [None, Some(missing)] {
            let stored = Stored::start(config);
            assert!(!stored.has_some() && stored.known().is_empty());
            stored.keep_memory(Kept::default(), Vec::new());
            assert!(!stored.page(&[0; 32], &mut [0; PAGE as usize]));
            stored.finish(Duration::from_secs(20));
        }
    }
}
