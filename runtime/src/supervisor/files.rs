//! Home's files on this node: one memfd per version of a file, shared by all guests of the job that map it.
//!
//! A private mapping of a memfd behaves as one of the file: the same size, SIGBUS beyond its end, copy on write, and
//! pages that several guests share. The content is fetched when a file is first mapped and kept while the job lives
//! or until the store's limit pushes it out; guests that still map it keep it alive.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use linklayer::wire::{FileKey, FileRef};
use lru::LruCache;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use parking_lot::{Condvar, Mutex};

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
        let result = fill(file, fetch).map(Arc::new);
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

fn fill(file: &FileRef, fetch: impl Fn(u64, u32) -> io::Result<Vec<u8>>) -> io::Result<Stored> {
    let name = format!("mosrun-{}", file.id);
    let fd = memfd_create(name.as_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(fd.as_fd(), file.key.size as i64)?;
    let mut out = File::from(fd);
    let mut at = 0;
    while at < file.key.size {
        let want = u64::from(CHUNK_BYTES).min(file.key.size - at) as u32;
        let data = fetch(at, want)?;
        if data.is_empty() {
            // The file shrank while it was read: what is missing reads as zeros, as a truncated page would.
            break;
        }
        if data.iter().any(|b| *b != 0) {
            out.seek(SeekFrom::Start(at))?;
            out.write_all(&data)?;
        }
        at += data.len() as u64;
    }
    // Guests map the same pages: none of them may write to what the others see.
    let seals =
        SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&out, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(Stored {
        fd: out.into(),
        id: file.id,
        size: file.key.size,
        file: file.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

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
        let Ok(a) = store.get(&f, fetch) else {
            panic!("not stored")
        };
        assert!(store.get(&f, fetch).is_ok());
        assert_eq!(calls.get(), 3);
        let mut back = vec![0; content.len()];
        let Ok(clone) = a.fd.try_clone() else {
            panic!("no descriptor")
        };
        assert!(File::from(clone).read_exact_at(&mut back, 0).is_ok());
        assert!(back == content);
    }

    #[test]
    fn a_failed_fetch_is_not_remembered_and_the_limit_holds() {
        let store = FileStore::new(100);
        assert!(
            store
                .get(&file(1, 10), |_, _| Err(io::Error::other("cut")))
                .is_err()
        );
        for id in 1..50 {
            assert!(store.get(&file(id, 10), |_, n| Ok(vec![1; n as usize])).is_ok());
        }
        assert!(store.state.lock().bytes <= 100);
    }
}
