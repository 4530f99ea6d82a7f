//! Files that guests map shared and writable.
//!
//! A mapping elsewhere is the same memory as the file only while nobody here sees or changes the file. So home *holds* it: a write lease
//! (fcntl(2)) proves that there is one open file description of it and makes everybody else who opens it wait; and a look at all processes,
//! that only vessels of the job whose guests are on that one node have this description. What they do with the file other than to map it
//! waits, too. In all these cases, and when it is wanted otherwise, the content comes back first, with the processes that map it if there
//! still are any, and then the file is held no more.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use linklayer::image::PAGE;
use linklayer::quic::ReplyTo;
use linklayer::stay::StayReason;
use linklayer::wire::{self, HeldFile, Kind, MAX_HELD_BYTES, MapFile, MapFileReply};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::statfs;
use parking_lot::{Condvar, Mutex};
use shim::capture::map_lines;
use shim::fd::WriteLease;
use shim::vessel::{KEEPERS, Vessel};

use crate::calls::{self, Worker};
use crate::shared::{Shared, next_id};

/// How long a call waits for its file at a time: a guest that is to go home with the file has to be stopped in between.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long those who bring a file home may take before they are asked again.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// How long the end of a job, or a homecoming, waits for files.
const LONGEST: Duration = Duration::from_secs(30);
/// Result of a call that is to be made again: the kernel's ERESTARTNOINTR.
const MAKE_AGAIN: i64 = -513;

/// A file that is held.
pub struct Held {
    id: u64,
    key: (u64, u64),
    /// Where it is mapped.
    node: u32,
    file: Arc<File>,
    path: Vec<u8>,
    size: u64,
    /// Where vessels keep it.
    keeper: Range<u64>,
    /// It is asked to come home.
    leaving: AtomicBool,
    /// None when it is held no more.
    lease: Mutex<Option<WriteLease>>,
}

impl Held {
    fn is_asked_for(&self) -> bool {
        self.lease.lock().as_ref().is_some_and(WriteLease::is_asked_for)
    }
}

/// The files that a job's guests map shared and writable.
pub struct HeldFiles {
    /// When the deputy began.
    began: SystemTime,
    count: AtomicUsize,
    state: Mutex<State>,
    /// One has come home.
    gone: Condvar,
    /// Only one file at a time is looked at.
    making: Mutex<()>,
    watched: AtomicBool,
}

#[derive(Default)]
struct State {
    files: BTreeMap<u64, Arc<Held>>,
    /// Processes that are on their way home or execute a program.
    departing: HashSet<i32>,
}

impl HeldFiles {
    /// None yet.
    pub fn new() -> HeldFiles {
        HeldFiles {
            began: SystemTime::now(),
            count: AtomicUsize::new(0),
            state: Mutex::default(),
            gone: Condvar::new(),
            making: Mutex::default(),
            watched: AtomicBool::new(false),
        }
    }

    /// Whether this is one of them.
    pub fn is_held(&self, key: (u64, u64)) -> bool {
        self.by_key(key).is_some()
    }

    /// Those whose content a call of a thread has to do with, by one of its descriptors or by giving one away.
    pub fn touched(&self, tid: i32, nr: u32, args: &[u64; 6]) -> Vec<Arc<Held>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        self.among(tid, &given_to(tid, nr, args))
    }

    /// Those that are behind these descriptors of a thread.
    fn among(&self, tid: i32, descriptors: &[i32]) -> Vec<Arc<Held>> {
        let keys: HashSet<(u64, u64)> = descriptors.iter().filter_map(|fd| key_of(tid, *fd)).collect();
        let mut all = if keys.is_empty() { Vec::new() } else { self.all() };
        all.retain(|held| keys.contains(&held.key));
        all
    }

    fn all(&self) -> Vec<Arc<Held>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        self.state.lock().files.values().cloned().collect()
    }

    fn by_key(&self, key: (u64, u64)) -> Option<Arc<Held>> {
        self.state.lock().files.values().find(|h| h.key == key).cloned()
    }

    /// Where vessels keep the file with this number.
    pub fn keeper(&self, id: u64) -> Option<Range<u64>> {
        Some(self.state.lock().files.get(&id)?.keeper.clone())
    }

    /// A range of the file with this number, if there is one.
    pub fn file(&self, id: u64) -> Option<Arc<File>> {
        Some(self.state.lock().files.get(&id)?.file.clone())
    }

    /// A process has come home, or has executed a program, or goes on where it is.
    pub fn settle(&self, pid: i32) {
        self.state.lock().departing.remove(&pid);
    }

    /// These are held no more; their content is there.
    pub fn finish(&self, ids: impl IntoIterator<Item = u64>) {
        let mut state = self.state.lock();
        for id in ids {
            if let Some(held) = state.files.remove(&id) {
                held.lease.lock().take();
                self.count.fetch_sub(1, Ordering::AcqRel);
                tracing::debug!(id, "file is held no more");
            }
        }
        drop(state);
        self.gone.notify_all();
    }

    /// A node's guests have given one back.
    pub fn given_back(&self, node: u32, id: u64) {
        if self.all().iter().any(|held| held.id == id && held.node == node) {
            self.finish([id]);
        }
    }

    /// The contact to a node is gone for good, and with it what its guests have written.
    pub fn lost(&self, node: u32) {
        let lost: Vec<u64> = self
            .all()
            .iter()
            .filter(|h| h.node == node)
            .map(|h| h.id)
            .collect();
        self.finish(lost);
    }

    /// Waits until it is held no more.
    fn wait_for(&self, held: &Held, until: Instant) -> bool {
        let mut state = self.state.lock();
        while state.files.contains_key(&held.id) {
            if self.gone.wait_until(&mut state, until).timed_out() {
                return !state.files.contains_key(&held.id);
            }
        }
        true
    }

    /// A free place for a file of this size in the vessels.
    fn place(&self, size: u64) -> Option<Range<u64>> {
        let len = size.next_multiple_of(PAGE);
        let state = self.state.lock();
        let mut taken: Vec<&Range<u64>> = state.files.values().map(|h| &h.keeper).collect();
        taken.sort_by_key(|range| range.start);
        let mut at = KEEPERS.start;
        for range in taken {
            if range.start - at >= len {
                break;
            }
            at = range.end;
        }
        (KEEPERS.end - at >= len).then(|| at..at + len)
    }
}

/// Answers a mmap(2) that is shared of a file that is open for reading and writing: the guest can map it when it can be held.
pub fn map(shared: &Arc<Shared>, node: u32, tid: i32, fd: OwnedFd, request: &MapFile) -> MapFileReply {
    let held = shared
        .worker(tid)
        .ok_or_else(|| "its thread has ended".to_string())
        .and_then(|worker| hold(shared, node, &worker, fd, request));
    match held {
        Ok(held) => MapFileReply::Held(HeldFile {
            id: held.id,
            size: held.size,
            dev: held.key.0,
            ino: held.key.1,
            path: held.path.clone(),
        }),
        Err(why) => {
            tracing::info!(tid, why, "a file cannot be held");
            MapFileReply::GoHome(StayReason::SharedMapping)
        }
    }
}

fn hold(
    shared: &Arc<Shared>,
    node: u32,
    worker: &Arc<Worker>,
    fd: OwnedFd,
    request: &MapFile,
) -> Result<Arc<Held>, String> {
    let file = File::from(fd);
    let meta = file.metadata().map_err(|e| e.to_string())?;
    let (key, size) = ((meta.dev(), meta.ino()), meta.len());
    suitable(&file, size, request)?;
    let files = &shared.held;
    let _one = files.making.lock();
    let (held, new) = match files.by_key(key) {
        Some(held) if held.node == node && !held.leaving.load(Ordering::Acquire) => (held, false),
        Some(held) => {
            release(shared, &held);
            return Err("it is mapped elsewhere, or on its way home".into());
        }
        None => (take(shared, node, file, key, size)?, true),
    };
    let done = if new {
        only_ours(shared, &held).and_then(|()| keep(shared, worker, &held, request.fd))
    } else {
        keep(shared, worker, &held, request.fd)
    };
    match done {
        Ok(()) => Ok(held),
        Err(why) => {
            if new {
                files.finish([held.id]);
            }
            Err(why)
        }
    }
}

/// Whether what is asked can be a mapping of a held file.
fn suitable(file: &File, size: u64, request: &MapFile) -> Result<(), String> {
    // Of others, and of what others export, not every opener is one of this kernel's.
    let kinds = [
        statfs::TMPFS_MAGIC,
        statfs::EXT4_SUPER_MAGIC,
        statfs::XFS_SUPER_MAGIC,
    ];
    let kind = statfs::fstatfs(file)
        .map_err(|e| e.to_string())?
        .filesystem_type();
    // This process writes for the guest, for whom no limit counts when it writes to memory.
    let (limit, _) =
        shim::process::limit(std::process::id() as i32, libc::RLIMIT_FSIZE).map_err(|e| e.to_string())?;
    let end = request.offset.checked_add(request.len.next_multiple_of(PAGE));
    let inside =
        request.offset.is_multiple_of(PAGE) && end.is_some_and(|end| end <= size.next_multiple_of(PAGE));
    if !kinds.contains(&kind) {
        Err("its file system has no leases that count".into())
    } else if request.prot & libc::PROT_EXEC != 0 || request.flags & libc::MAP_SYNC != 0 {
        Err("it is not mapped as memory is".into())
    } else if size == 0 || size > MAX_HELD_BYTES.min(limit) || request.len == 0 || !inside {
        Err(format!(
            "its {size} bytes are too many, or are not all that is mapped"
        ))
    } else {
        Ok(())
    }
}

/// Takes the lease. From here on others wait.
fn take(
    shared: &Arc<Shared>,
    node: u32,
    file: File,
    key: (u64, u64),
    size: u64,
) -> Result<Arc<Held>, String> {
    if shared.files.maps(key) {
        return Err("it is mapped in another way, too".into());
    }
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let path = path.map(|p| std::os::unix::ffi::OsStringExt::into_vec(p.into_os_string()));
    let keeper = shared.held.place(size).ok_or("too much is held already")?;
    let file = Arc::new(file);
    watch(shared)?;
    let lease = WriteLease::take(file.clone()).map_err(|e| format!("no lease: {e}"))?;
    let held = Arc::new(Held {
        id: next_id(),
        key,
        node,
        file,
        path: path.unwrap_or_default(),
        size,
        keeper,
        leaving: AtomicBool::new(false),
        lease: Mutex::new(Some(lease)),
    });
    shared.held.state.lock().files.insert(held.id, held.clone());
    shared.held.count.fetch_add(1, Ordering::AcqRel);
    // It may have been cut, or have grown, in between.
    let meta = held.file.metadata().map_err(|e| e.to_string());
    match meta {
        Ok(meta) if meta.len() == size => Ok(held),
        _ => {
            shared.held.finish([held.id]);
            Err("it changes its size".into())
        }
    }
}

/// Whether nobody but vessels of guests on its node has the description of a file, and none of them is doing something with it.
fn only_ours(shared: &Shared, held: &Held) -> Result<(), String> {
    let ours: HashSet<i32> = {
        let (table, homecoming) = (shared.table.lock(), shared.homecoming.lock());
        let departing = &shared.held.state.lock().departing;
        table
            .values()
            .filter(|view| view.node == held.node)
            .map(|view| view.pid)
            .filter(|pid| !homecoming.contains_key(pid) && !departing.contains(pid))
            .collect()
    };
    let own = std::process::id() as i32;
    let processes = std::fs::read_dir("/proc").map_err(|e| e.to_string())?;
    for pid in processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own && !ours.contains(pid))
    {
        match has(pid, held.key) {
            Ok(false) => {}
            Ok(true) => return Err(format!("process {pid} has it, too")),
            // It has ended.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
            Err(_) if is_newer(&held.file, shared.held.began) => {}
            Err(e) => return Err(format!("process {pid} may have it: {e}")),
        }
    }
    let busy = |worker: &&Arc<Worker>| {
        let call = *worker.call.lock();
        let given = call.map(|(nr, args)| given_to(worker.tid, nr, &args));
        let mut given = given.unwrap_or_default().into_iter();
        given.any(|fd| key_of(worker.tid, fd) == Some(held.key))
    };
    match shared.workers.read().values().find(busy) {
        Some(worker) => Err(format!("thread {} is doing something with it", worker.tid)),
        None => Ok(()),
    }
}

/// Whether a process has a file open or mapped.
fn has(pid: i32, key: (u64, u64)) -> std::io::Result<bool> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?
        .flatten()
        .filter_map(|entry| std::fs::metadata(entry.path()).ok())
        .any(|meta| (meta.dev(), meta.ino()) == key);
    if open {
        return Ok(true);
    }
    Ok(map_lines(pid, false)?
        .iter()
        .any(|line| line.ino == key.1 && line.dev == key.0))
}

/// Whether a file is younger than the job's deputy, so that nobody can have inherited it from before the job.
fn is_newer(file: &File, began: SystemTime) -> bool {
    let born = file.metadata().and_then(|meta| meta.created());
    born.is_ok_and(|born| born > began)
}

/// Has a vessel keep a mapping of the file, from which it can be mapped at homecoming.
fn keep(shared: &Shared, worker: &Arc<Worker>, held: &Held, fd: i32) -> Result<(), String> {
    let (send, receive) = crossbeam_channel::bounded(1);
    let (by, at) = (worker.clone(), held.keeper.clone());
    calls::in_turn(shared, worker.tid, move || {
        let _ = send.send(Vessel::keep(by.tid, &by.slot, fd, at));
    });
    match receive.recv() {
        Ok(Ok(())) => Ok(()),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err("its thread has ended".into()),
    }
}

/// Waits for those who want files that are held, on a thread of its own. SIGIO is blocked in all threads.
fn watch(shared: &Arc<Shared>) -> Result<(), String> {
    if shared.held.watched.swap(true, Ordering::AcqRel) {
        return Ok(());
    }
    let mut set = SigSet::empty();
    set.add(Signal::SIGIO);
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).map_err(|e| {
        shared.held.watched.store(false, Ordering::Release);
        e.to_string()
    })?;
    let shared = shared.clone();
    crate::contact::spawn("leases", move || {
        while signals.read_signal().is_ok() {
            for held in shared.held.all().iter().filter(|h| h.is_asked_for()) {
                release(&shared, held);
            }
        }
    });
    Ok(())
}

/// Has the content of a file brought home, with those who map it. Does not wait for it.
pub fn release(shared: &Arc<Shared>, held: &Arc<Held>) {
    if held.leaving.swap(true, Ordering::AcqRel) {
        return;
    }
    tracing::debug!(id = held.id, "file is wanted at home");
    let (shared, held) = (shared.clone(), held.clone());
    crate::contact::spawn("give-back", move || {
        loop {
            let link = shared.links.lock().get(&held.node).map(|c| c.link.clone());
            let Some(link) = link else {
                return shared.held.finish([held.id]);
            };
            let body = wire::encode(&wire::HeldId(held.id));
            let answer = link
                .ask(0, Kind::GiveBack, &body)
                .map_err(|e| e.to_string())
                .and_then(|body| wire::decode::<wire::Errno>(&body).map_err(|e| e.to_string()));
            match answer {
                Ok(wire::Errno(libc::EINPROGRESS)) => {}
                Ok(wire::Errno(errno)) => {
                    if errno != 0 {
                        tracing::error!(id = held.id, errno, "what was written to a file is not all there");
                    }
                    return shared.held.finish([held.id]);
                }
                Err(why) => {
                    tracing::error!(id = held.id, why, "what was written to a file is lost");
                    return shared.held.finish([held.id]);
                }
            }
            if shared.held.wait_for(&held, Instant::now() + ASK_AGAIN) {
                return;
            }
        }
    });
}

/// Has all files come home at the end of the job.
pub fn release_all(shared: &Arc<Shared>) {
    let all = shared.held.all();
    all.iter().for_each(|held| release(shared, held));
    let until = Instant::now() + LONGEST;
    for held in all {
        if !shared.held.wait_for(&held, until) {
            tracing::error!(id = held.id, "a file has not come home");
        }
    }
}

/// Writes what a guest of a node has changed. Gives an errno.
pub fn write(shared: &Shared, node: u32, id: u64, offset: u64, data: &[u8]) -> i32 {
    let held = shared.held.state.lock().files.get(&id).cloned();
    let Some(held) = held.filter(|held| held.node == node) else {
        return libc::ENOENT;
    };
    let inside = offset
        .checked_add(data.len() as u64)
        .is_some_and(|end| end <= held.size);
    if !inside {
        return libc::EFBIG;
    }
    let done = if data.is_empty() {
        held.file.sync_data()
    } else {
        held.file.write_all_at(data, offset)
    };
    done.map_or_else(|e| e.raw_os_error().unwrap_or(libc::EIO), |()| 0)
}

/// Tells after a while whether files have come home, which is asked for.
pub fn wait_a_while(shared: &Arc<Shared>, files: Vec<Arc<Held>>, then: impl FnOnce(bool) + Send + 'static) {
    let shared = shared.clone();
    crate::contact::spawn("parked", move || {
        files.iter().for_each(|held| release(&shared, held));
        let until = Instant::now() + PATIENCE;
        then(files.iter().all(|held| shared.held.wait_for(held, until)));
    });
}

/// The descriptors by which a call of a thread has to do with the content of files, or that it may give away.
fn given_to(tid: i32, nr: u32, args: &[u64; 6]) -> Vec<i32> {
    match i64::from(nr) {
        libc::SYS_sendmsg | libc::SYS_sendmmsg => descriptors(tid),
        _ => linklayer::syscall::content_of(nr, args),
    }
}

/// Device and inode of the file behind a descriptor.
fn key_of(tid: i32, fd: i32) -> Option<(u64, u64)> {
    let meta = std::fs::metadata(format!("/proc/{tid}/fd/{fd}")).ok()?;
    Some((meta.dev(), meta.ino()))
}

fn descriptors(tid: i32) -> Vec<i32> {
    let entries = std::fs::read_dir(format!("/proc/{tid}/fd"));
    let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(number)
        .collect()
}

/// Whether a descriptor survives an execve(2).
fn survives(tid: i32, fd: i32) -> bool {
    let info = std::fs::read_to_string(format!("/proc/{tid}/fdinfo/{fd}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|text| i32::from_str_radix(text.trim(), 8).ok());
    flags.is_none_or(|flags| flags & libc::O_CLOEXEC == 0)
}

/// A process is about to execute a program, which begins at home. Those files have to be there that it would have open. The answer
/// is an error that makes the call again when they are not; true: go on.
pub fn may_exec(shared: &Arc<Shared>, tid: i32, pid: i32, reply: &ReplyTo) -> bool {
    shared.held.state.lock().departing.insert(pid);
    if shared.held.all().is_empty() {
        return true;
    }
    let mut open = descriptors(tid);
    open.retain(|fd| survives(tid, *fd));
    let files = shared.held.among(tid, &open);
    if files.is_empty() {
        return true;
    }
    shared.held.settle(pid);
    let reply = reply.clone();
    wait_a_while(shared, files, move |_| reply.errno(-MAKE_AGAIN as i32));
    false
}

/// A process is on its way home. Files that it has open and does not bring with it have to come first: gives `body` back when there are
/// none, else hands it to `again` when they are there.
pub fn may_come(
    shared: &Arc<Shared>,
    reply: &ReplyTo,
    body: wire::Homecoming,
    again: impl FnOnce(wire::Homecoming) + Send + 'static,
) -> Option<wire::Homecoming> {
    let (pid, tid) = (body.image.pid, body.image.reached_by());
    shared.held.state.lock().departing.insert(pid);
    if shared.held.all().is_empty() {
        return Some(body);
    }
    let mut files = shared.held.among(tid, &descriptors(tid));
    files.retain(|held| !body.held.contains(&held.id));
    if files.is_empty() {
        return Some(body);
    }
    let (shared, reply) = (shared.clone(), reply.clone());
    crate::contact::spawn("files", move || {
        files.iter().for_each(|held| release(&shared, held));
        let until = Instant::now() + LONGEST;
        if files.iter().all(|held| shared.held.wait_for(held, until)) {
            return again(body);
        }
        shared.held.settle(pid);
        reply.errno(libc::EBUSY);
    });
    None
}

/// The answer to a call that is to be made again.
pub fn make_again(reply: &ReplyTo) {
    reply.send(&[&MAKE_AGAIN.to_le_bytes()]);
}
