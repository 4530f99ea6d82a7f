//! Home's files on this node: one memfd per version of a file, shared by all guests of the job that map it.
//!
//! A private mapping of a memfd behaves as one of the file: the same size, SIGBUS beyond its end, copy on write, and
//! pages that several guests share. The content is fetched when a file is first mapped and kept while the job lives
//! or until the store's limit pushes it out; guests that still map it keep it alive. What of it an earlier job of the same user has brought is
//! taken from the page store: home says the hashes of the file's pages, so that it is the content that counts, and not a name or a time.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use linklayer::image::PAGE;
use linklayer::pages::known::{Hash, Source};
use linklayer::wire::{FileKey, FileRef, MAX_HASHED_BYTES};
use lru::LruCache;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::{Condvar, Mutex};

use super::stored::Stored as StoredPages;

/// Bytes asked for at a time.
pub const CHUNK_BYTES: u32 = 1 << 20;

/// Most files that are remembered; a guest that maps one more cannot go to another node but by way of home.
const MAX_KNOWN: usize = 1 << 20;

/// One file's content.
pub struct Stored {
    /// The memfd, named `mosrun-<id>`.
    pub fd: OwnedFd,
    /// The number under which home knows the file: areas of guests that map this memfd are named by it.
    pub id: u64,
    /// Size, bytes.
    pub size: u64,
    /// How home knows it.
    pub file: FileRef,
}

/// What may be known of a file's content.
pub struct Known<'a> {
    /// The page store.
    pub stored: &'a StoredPages,
    /// Asks home for the hashes of a range, at most [`MAX_HASHED_BYTES`].
    pub hashes: &'a dyn Fn(u64, u32) -> io::Result<Vec<u8>>,
}

enum Entry {
    Filling,
    Ready(Arc<Stored>),
}

struct State {
    entries: LruCache<FileKey, Entry>,
    /// All that were ever here: guests may go on mapping what was pushed out.
    known: HashMap<u64, FileRef>,
    bytes: u64,
}

/// The files of one job on this node.
pub struct FileStore {
    state: Mutex<State>,
    filled: Condvar,
    limit_bytes: u64,
}

impl FileStore {
    /// A store that forgets the least recently mapped files beyond `limit_bytes`.
    pub fn new(limit_bytes: u64) -> FileStore {
        let entries = LruCache::new(NonZeroUsize::new(65_536).unwrap_or(NonZeroUsize::MIN));
        FileStore {
            state: Mutex::new(State {
                entries,
                known: HashMap::new(),
                bytes: 0,
            }),
            filled: Condvar::new(),
            limit_bytes,
        }
    }

    /// The content of `file`, fetched by `fetch(offset, len)` when it is not here. Two callers that want the same
    /// file fetch it once.
    ///
    /// # Errors
    /// Those of `fetch` and of memfd_create(2) and write(2); nothing is kept then.
    pub fn get(
        &self,
        file: &FileRef,
        known: &Known<'_>,
        fetch: impl Fn(u64, u32) -> io::Result<Vec<u8>>,
    ) -> io::Result<Arc<Stored>> {
        {
            let mut state = self.state.lock();
            loop {
                match state.entries.get(&file.key) {
                    Some(Entry::Ready(s)) => return Ok(s.clone()),
                    Some(Entry::Filling) => self.filled.wait(&mut state),
                    None => break,
                }
            }
            state.entries.put(file.key, Entry::Filling);
        }
        let result = fill(file, known, fetch).map(Arc::new);
        let mut state = self.state.lock();
        match &result {
            Ok(stored) => {
                state.entries.put(file.key, Entry::Ready(stored.clone()));
                if state.known.len() < MAX_KNOWN {
                    state.known.insert(stored.id, stored.file.clone());
                }
                state.bytes += stored.size;
                self.shrink(&mut state);
            }
            Err(_) => {
                state.entries.pop(&file.key);
            }
        }
        self.filled.notify_all();
        result
    }

    /// How home knows the file with this number, if it was ever here.
    pub fn known(&self, id: u64) -> Option<FileRef> {
        self.state.lock().known.get(&id).cloned()
    }

    fn shrink(&self, state: &mut State) {
        while state.bytes > self.limit_bytes && state.entries.len() > 1 {
            let Some((key, entry)) = state.entries.pop_lru() else {
                break;
            };
            match entry {
                Entry::Ready(s) => state.bytes -= s.size,
                Entry::Filling => {
                    state.entries.put(key, Entry::Filling);
                    break;
                }
            }
        }
    }
}

/// A file that is being made.
struct Filling<'a, F> {
    out: File,
    size: u64,
    fetch: &'a F,
    /// What had to be fetched.
    fetched: Vec<Range<u64>>,
}

impl<F: Fn(u64, u32) -> io::Result<Vec<u8>>> Filling<'_, F> {
    fn write(&self, data: &[u8], at: u64) -> io::Result<()> {
        if data.iter().any(|b| *b != 0) {
            self.out.write_all_at(data, at)?;
        }
        Ok(())
    }

    /// Fetches a range. False when the file ended in it: it shrank while it was read, and what is missing reads as zeros, as a
    /// truncated page would.
    fn fetch(&mut self, range: Range<u64>) -> io::Result<bool> {
        let mut at = range.start;
        while at < range.end {
            let data = (self.fetch)(at, u64::from(CHUNK_BYTES).min(range.end - at) as u32)?;
            if data.is_empty() {
                return Ok(false);
            }
            self.write(&data, at)?;
            let end = (at + data.len() as u64).min(self.size);
            match self.fetched.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => self.fetched.push(at..end),
            }
            at = end;
        }
        Ok(true)
    }

    /// Makes a range of the pages that have these hashes, and fetches what is not in the page store. False as above.
    fn fill(&mut self, range: Range<u64>, hashes: &[Hash], stored: &StoredPages) -> io::Result<bool> {
        let mut page = [0; PAGE as usize];
        let mut missing = range.start;
        for (at, hash) in range.clone().step_by(PAGE as usize).zip(hashes) {
            if !stored.page(hash, &mut page) {
                continue;
            }
            if !self.fetch(missing..at)? {
                return Ok(false);
            }
            let len = PAGE.min(self.size - at) as usize;
            self.write(&page[..len], at)?;
            missing = at + PAGE;
        }
        self.fetch(missing.min(range.end)..range.end)
    }
}

fn fill(
    file: &FileRef,
    known: &Known<'_>,
    fetch: impl Fn(u64, u32) -> io::Result<Vec<u8>>,
) -> io::Result<Stored> {
    let name = format!("mosrun-{}", file.id);
    let size = file.key.size;
    let fd = memfd_create(name.as_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(fd.as_fd(), size as i64)?;
    let mut filling = Filling {
        out: File::from(fd),
        size,
        fetch: &fetch,
        fetched: Vec::new(),
    };
    let mut at = 0;
    while at < size {
        let end = size.min(at + u64::from(MAX_HASHED_BYTES));
        let hashes = if known.stored.has_some() {
            (known.hashes)(at, (end - at) as u32)?
        } else {
            Vec::new()
        };
        if !filling.fill(at..end, hashes.as_chunks::<32>().0, known.stored)? {
            break;
        }
        at = end;
    }
    let Filling { out, fetched, .. } = filling;
    // Guests map the same pages: none of them may write to what the others see.
    let seals =
        SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&out, FcntlArg::F_ADD_SEALS(seals))?;
    known.stored.keep_file(out.try_clone(), fetched);
    Ok(Stored {
        fd: out.into(),
        id: file.id,
        size,
        file: file.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(id: u64, size: u64) -> FileRef {
        let key = FileKey {
            dev: 1,
            ino: id,
            size,
            mtime_ns: 0,
            ctime_ns: 0,
            fresh: 0,
        };
        FileRef {
            id,
            key,
            path: Vec::new(),
        }
    }

    /// Without a page store.
    fn get(
        store: &FileStore,
        file: &FileRef,
        fetch: impl Fn(u64, u32) -> io::Result<Vec<u8>>,
    ) -> io::Result<Arc<Stored>> {
        let stored = StoredPages::none();
        let hashes = |_, _| panic!("nobody has hashes to compare with");
        let known = Known {
            stored: &stored,
            hashes: &hashes,
        };
        store.get(file, &known, fetch)
    }

    fn content_of(stored: &Stored) -> Vec<u8> {
        let mut back = vec![0; stored.size as usize];
        let Ok(clone) = stored.fd.try_clone() else {
            panic!("no descriptor")
        };
        assert!(File::from(clone).read_exact_at(&mut back, 0).is_ok());
        back
    }

    /// What an earlier job has brought is not fetched again, whatever the file is called; what is new is.
    #[test]
    fn what_is_in_the_page_store_is_not_fetched() {
        let dir = crate::supervisor::stored::directory();
        let config = crate::supervisor::StoreConfig::new(dir.path(), 8 << 20);
        let page = |n: u64| [vec![n as u8; PAGE as usize - 1], vec![1]].concat();
        let old: Vec<u8> = (0..300).flat_map(page).chain([5; 77]).collect();
        let mut new = old.clone();
        new.splice(10 * PAGE as usize..12 * PAGE as usize, [9; 2 * PAGE as usize]);
        for (id, content, wanted) in [(1, &old, old.len()), (2, &old, 0), (3, &new, 2 * PAGE as usize)] {
            let stored = StoredPages::start(Some(config.clone()));
            let read =
                |at: u64, len: u32| &content[at as usize..content.len().min(at as usize + len as usize)];
            let hashes = |at: u64, len: u32| {
                let mut mapped = read(at, len).to_vec();
                mapped.resize(mapped.len().next_multiple_of(PAGE as usize), 0);
                let pages = mapped.chunks(PAGE as usize);
                Ok(pages.flat_map(|p| *blake3::hash(p).as_bytes()).collect())
            };
            let known = Known {
                stored: &stored,
                hashes: &hashes,
            };
            let fetched = std::cell::Cell::new(0);
            let got = FileStore::new(1 << 30)
                .get(&file(id, content.len() as u64), &known, |at, len| {
                    let data = read(at, len).to_vec();
                    fetched.set(fetched.get() + data.len());
                    Ok(data)
                })
                .unwrap();
            assert!(content_of(&got) == *content);
            assert_eq!(fetched.get(), wanted, "file {id}");
            stored.finish(std::time::Duration::from_secs(20));
        }
    }

    #[test]
    fn content_is_fetched_once_and_equals_the_file() {
        let store = FileStore::new(1 << 30);
        let calls = std::cell::Cell::new(0);
        let content: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let fetch = |at: u64, len: u32| {
            calls.set(calls.get() + 1);
            Ok(content[at as usize..(at as usize + len as usize).min(content.len())].to_vec())
        };
        let f = file(3, content.len() as u64);
        let Ok(a) = get(&store, &f, fetch) else {
            panic!("not stored")
        };
        assert!(get(&store, &f, fetch).is_ok());
        assert_eq!(calls.get(), 3);
        assert!(content_of(&a) == content);
    }

    #[test]
    fn a_failed_fetch_is_not_remembered_and_the_limit_holds() {
        let store = FileStore::new(100);
        assert!(get(&store, &file(1, 10), |_, _| Err(io::Error::other("cut"))).is_err());
        for id in 1..50 {
            assert!(get(&store, &file(id, 10), |_, n| Ok(vec![1; n as usize])).is_ok());
        }
        assert!(store.state.lock().bytes <= 100);
    }
}
