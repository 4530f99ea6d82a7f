//! Files that guests map: their content is served to supervisors by number.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use linklayer::image::PAGE;
use linklayer::stay::StayReason;
use linklayer::wire::{FileKey, FileRef, MAX_HASHED_BYTES, MapFile, MapFileReply};
use parking_lot::Mutex;

use crate::shared::next_id;

/// Largest range served at once, bytes.
const MAX_READ_BYTES: u32 = 1 << 20;

/// A file whose change time is younger than this may change again without its times telling: the kernel's coarse
/// clock ticks every 4 ms at most (CONFIG_HZ=250), 10 ms at HZ=100.
const SETTLED: Duration = Duration::from_millis(30);

struct Entry {
    file: Arc<File>,
    path: Vec<u8>,
}

/// The files of a job by number and by content key.
#[derive(Default)]
pub struct Files {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    by_key: HashMap<FileKey, u64>,
    by_id: HashMap<u64, Entry>,
}

impl Files {
    /// Takes up a file that is open for reading.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn register(&self, file: File, path: Vec<u8>) -> std::io::Result<FileRef> {
        let key = key_of(&file)?;
        let mut state = self.state.lock();
        if let Some(&id) = state.by_key.get(&key) {
            return Ok(FileRef { id, key, path });
        }
        let id = next_id();
        state.by_key.insert(key, id);
        state.by_id.insert(
            id,
            Entry {
                file: Arc::new(file),
                path: path.clone(),
            },
        );
        Ok(FileRef { id, key, path })
    }

    /// The open file with this number.
    pub fn file(&self, id: u64) -> Option<Arc<File>> {
        self.state.lock().by_id.get(&id).map(|e| e.file.clone())
    }

    /// Device and inode of the file with this number.
    pub fn inode(&self, id: u64) -> Option<(u64, u64)> {
        let file = self.file(id)?;
        let meta = file.metadata().ok()?;
        Some((meta.dev(), meta.ino()))
    }

    /// Path under which a file was taken up.
    pub fn path(&self, id: u64) -> Option<Vec<u8>> {
        self.state.lock().by_id.get(&id).map(|e| e.path.clone())
    }

    /// The hashes of the pages of a range ([`linklayer::wire::Kind::FileHashes`]), as far as the file goes.
    pub fn hashes(&self, id: u64, offset: u64, len: u32) -> Vec<u8> {
        let file = self.file(id);
        let mut hashes = Vec::new();
        let len = u64::from(len.min(MAX_HASHED_BYTES));
        let mut at = 0;
        while at < len {
            let mut data = read(
                file.as_deref(),
                offset.saturating_add(at),
                MAX_READ_BYTES.min((len - at) as u32),
            );
            if data.is_empty() {
                break;
            }
            at += data.len() as u64;
            data.resize(data.len().next_multiple_of(PAGE as usize), 0);
            for page in data.chunks(PAGE as usize) {
                hashes.extend_from_slice(blake3::hash(page).as_bytes());
            }
        }
        hashes
    }

    /// Whether a version of this file is among them.
    pub fn maps(&self, key: (u64, u64)) -> bool {
        let state = self.state.lock();
        state.by_key.keys().any(|known| (known.dev, known.ino) == key)
    }

    /// Answers what a mmap(2) of the vessel's descriptor (here as `fd`, a duplicate) is to become on the other node. `hold` answers what is
    /// shared and may be written, and `held` says what is mapped so already.
    pub fn map(
        &self,
        fd: OwnedFd,
        request: &MapFile,
        hold: impl FnOnce(OwnedFd) -> MapFileReply,
        held: impl FnOnce((u64, u64)) -> bool,
    ) -> MapFileReply {
        let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let file = File::from(fd);
        let Ok(meta) = file.metadata() else {
            return MapFileReply::Errno(libc::EBADF);
        };
        let Ok(status) = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_GETFL) else {
            return MapFileReply::Errno(libc::EBADF);
        };
        if status & libc::O_PATH != 0 {
            return MapFileReply::Errno(libc::EBADF);
        }
        if meta.is_dir() {
            return MapFileReply::Errno(libc::ENODEV);
        }
        if !meta.is_file() {
            // A device's mmap, or ENODEV/EACCES of pipes and sockets: exact only at home.
            return MapFileReply::GoHome(StayReason::DeviceMapping);
        }
        let access = status & libc::O_ACCMODE;
        let kind = request.flags & libc::MAP_TYPE;
        let shared = kind == libc::MAP_SHARED || kind == libc::MAP_SHARED_VALIDATE;
        if access == libc::O_WRONLY {
            return MapFileReply::Errno(libc::EACCES);
        }
        if shared {
            if request.prot & libc::PROT_WRITE != 0 && access != libc::O_RDWR {
                return MapFileReply::Errno(libc::EACCES);
            }
            // Of a descriptor that may write, the mapping could be made writable by mprotect.
            if access != libc::O_RDONLY {
                return hold(file.into());
            }
            // A file that others have open for writing could change under the mapping.
            if written_by_others(&file) {
                return MapFileReply::GoHome(StayReason::SharedMapping);
            }
        }
        if held((meta.dev(), meta.ino())) {
            return MapFileReply::GoHome(StayReason::SharedMapping);
        }
        // Virtual files have no size and no stable content.
        if meta.len() == 0 && meta.blocks() == 0 && is_virtual(&file) {
            return MapFileReply::GoHome(StayReason::DeviceMapping);
        }
        let path = path
            .map(|p| std::os::unix::ffi::OsStringExt::into_vec(p.into_os_string()))
            .unwrap_or_default();
        match self.register(file, path) {
            Ok(file) => MapFileReply::File(file),
            Err(e) => MapFileReply::Errno(e.raw_os_error().unwrap_or(libc::EIO)),
        }
    }
}

/// Reads a range; short at the end of the file, empty for no file or an error (the mapping then has zeros where native would give
/// SIGBUS).
pub fn read(file: Option<&File>, offset: u64, len: u32) -> Vec<u8> {
    let Some(file) = file else {
        return Vec::new();
    };
    let mut data = vec![0; len.min(MAX_READ_BYTES) as usize];
    let mut got = 0;
    while got < data.len() {
        match file.read_at(&mut data[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => {
                tracing::warn!(error = %e, "mapped file not readable");
                break;
            }
        }
    }
    data.truncate(got);
    data
}

fn is_virtual(file: &File) -> bool {
    use nix::sys::statfs;
    let Ok(fs) = statfs::fstatfs(file) else {
        return false;
    };
    [
        statfs::PROC_SUPER_MAGIC,
        statfs::SYSFS_MAGIC,
        statfs::DEBUGFS_MAGIC,
    ]
    .contains(&fs.filesystem_type())
}

/// Whether somebody may write the file: a read lease (fcntl(2), F_SETLEASE) is granted only while nobody has it open
/// for writing. Where leases are not permitted (another user's file), the answer rests on the permission bits.
fn written_by_others(file: &File) -> bool {
    match shim::fd::try_read_lease(file) {
        Ok(()) => false,
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => true,
        Err(_) => nix::unistd::faccessat(
            nix::fcntl::AT_FDCWD,
            format!("/proc/self/fd/{}", file.as_raw_fd()).as_str(),
            nix::unistd::AccessFlags::W_OK,
            nix::fcntl::AtFlags::empty(),
        )
        .is_ok(),
    }
}

/// The content key of an open file.
fn key_of(file: &File) -> std::io::Result<FileKey> {
    let meta = file.metadata()?;
    let ns = |s: i64, n: i64| s.wrapping_mul(1_000_000_000).wrapping_add(n);
    let ctime_ns = ns(meta.ctime(), meta.ctime_nsec());
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as i64);
    let fresh = if now.saturating_sub(ctime_ns) < SETTLED.as_nanos() as i64 {
        next_id()
    } else {
        0
    };
    Ok(FileKey {
        dev: meta.dev(),
        ino: meta.ino(),
        size: meta.len(),
        mtime_ns: ns(meta.mtime(), meta.mtime_nsec()),
        ctime_ns,
        fresh,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_fresh_file_gets_a_key_of_its_own_each_time() {
        let Ok(mut f) = tempfile() else { panic!("no file") };
        assert!(f.write_all(b"one").is_ok());
        let (Ok(a), Ok(b)) = (key_of(&f), key_of(&f)) else {
            panic!("no key")
        };
        assert_ne!(a, b);
    }

    #[test]
    fn hashes_are_those_of_the_pages_as_they_are_mapped() {
        let Ok(mut f) = tempfile() else { panic!("no file") };
        let content: Vec<u8> = (0..3 * PAGE + 7).map(|i| (i / 100) as u8).collect();
        assert!(f.write_all(&content).is_ok());
        let files = Files::default();
        let Ok(file) = files.register(f, Vec::new()) else {
            panic!("not registered")
        };
        let mut mapped = content;
        mapped.resize(4 * PAGE as usize, 0);
        let wanted: Vec<u8> = mapped
            .chunks(PAGE as usize)
            .flat_map(|page| *blake3::hash(page).as_bytes())
            .collect();
        assert_eq!(files.hashes(file.id, 0, u32::MAX), wanted);
        assert_eq!(files.hashes(file.id, PAGE, 2 * PAGE as u32), wanted[32..96]);
        assert!(files.hashes(file.id, 1 << 40, 4096).is_empty());
        assert!(files.hashes(file.id + 1, 0, 4096).is_empty());
    }

    fn tempfile() -> std::io::Result<File> {
        let fd = nix::sys::memfd::memfd_create("key", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        Ok(File::from(fd))
    }
}
