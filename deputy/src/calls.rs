//! Executing forwarded calls in the vessel.
//!
//! A call takes effect exactly once: the contact delivers its frame once, a vessel thread has one call at a time, and
//! its answer is sent once. A call that does not end at once is left to a waiter thread, so that the contact's leader
//! goes on serving the other threads.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use linklayer::image::SigInfo;
use linklayer::quic::ReplyTo;
use linklayer::syscall::{self, Blocking, CallView, Malformed, TerminalUse};
use linklayer::wire;
use parking_lot::{Mutex, MutexGuard};
use shim::vessel::Slot;

use crate::shared::{Command, Shared};
use crate::terminal;

/// A vessel thread, as the threads that feed it calls see it.
pub struct Worker {
    /// Its tid, the guest thread's as well.
    pub tid: i32,
    /// Its process.
    pub pid: i32,
    /// Where its calls are put.
    pub slot: Slot,
    /// Sequence number of the call in progress.
    pub current: Mutex<Option<u64>>,
    /// The call in progress and its arguments.
    pub call: Mutex<Option<(u32, [u64; 6])>>,
    /// Sequence number of the last call that was to be interrupted: it may come after that was asked.
    pub early: AtomicU64,
    /// What is made in the slot without being a call of the guest's.
    aside: Mutex<AsideState>,
}

#[derive(Default)]
struct AsideState {
    /// Something such is in the slot.
    busy: bool,
    /// A thread is carrying out what has waited for it.
    draining: bool,
    waiting: VecDeque<Box<dyn FnOnce() + Send>>,
}

impl Worker {
    /// One that is idle.
    pub fn new(tid: i32, pid: i32, slot: Slot) -> Worker {
        Worker {
            tid,
            pid,
            slot,
            current: Mutex::new(None),
            call: Mutex::new(None),
            early: AtomicU64::new(0),
            aside: Mutex::default(),
        }
    }

    /// Whether what comes now has to wait for its turn.
    fn is_aside(&self) -> bool {
        let aside = self.aside.lock();
        aside.busy || aside.draining || !aside.waiting.is_empty()
    }

    /// Carries out what has waited, one after the other, until something is in the slot again.
    fn drain(&self) {
        let mut aside = self.aside.lock();
        if aside.draining {
            return;
        }
        aside.draining = true;
        while !aside.busy
            && let Some(job) = aside.waiting.pop_front()
        {
            MutexGuard::unlocked(&mut aside, job);
        }
        aside.draining = false;
    }
}

/// Runs what uses the slot of a thread's worker, after what an earlier message has begun there. The calling thread does not wait
/// for that.
pub fn in_turn(shared: &Shared, tid: i32, job: impl FnOnce() + Send + 'static) {
    if let Some(worker) = shared.worker(tid).filter(|w| w.is_aside()) {
        worker.aside.lock().waiting.push_back(Box::new(job));
        // It may have ended in between.
        worker.drain();
        return;
    }
    job();
}

/// How long the contact's thread waits for a call that usually ends at once. A timer that is due after the kernel's next
/// tick (4 ms at 250 Hz) costs next to nothing to set and to cancel; an earlier one makes it program the hardware twice.
const INLINE_WAIT: Duration = Duration::from_millis(5);
/// ... for one that is to be interrupted if it does,
const INTERRUPTED_WAIT: Duration = Duration::from_millis(2);
/// ... and for one that may wait for somebody.
const BRIEF_WAIT: Duration = Duration::from_micros(60);

/// Takes up a forwarded call.
pub fn begin(shared: &Arc<Shared>, reply: ReplyTo, payload: Vec<u8>) {
    let tid = reply.header.tid;
    // A thread that has just been killed: the supervisor learns of it by another message.
    let Some(worker) = shared.worker(tid) else { return };
    if worker.is_aside() {
        let later = shared.clone();
        return in_turn(shared, tid, move || match later.worker(tid) {
            Some(worker) => begin_now(&later, &worker, reply, payload),
            None => reply.send(&[&(-i64::from(libc::ESRCH)).to_le_bytes()]),
        });
    }
    begin_now(shared, &worker, reply, payload);
}

fn begin_now(shared: &Arc<Shared>, worker: &Arc<Worker>, reply: ReplyTo, payload: Vec<u8>) {
    let (tid, worker) = (worker.tid, worker.clone());
    let refuse = |e: Malformed| {
        tracing::error!(tid, error = %e, "call refused");
        reply.send(&[&(-i64::from(libc::EPROTO)).to_le_bytes()]);
    };
    let call = match CallView::parse(&payload) {
        Ok(view) => (view.nr, view.args),
        Err(e) => return refuse(e),
    };
    // Before it is known which files are held: who holds one after that finds the call.
    *worker.call.lock() = Some(call);
    let files = shared.held.touched(tid, call.0, &call.1);
    if !files.is_empty() {
        *worker.call.lock() = None;
        let later = shared.clone();
        return crate::held::wait_a_while(shared, files, move |there| match there {
            true => begin(&later, reply, payload),
            false => crate::held::make_again(&reply),
        });
    }
    let (nr, blocking, args) = match CallView::parse(&payload) {
        Ok(view) => {
            let args = syscall::place(&view, &worker.slot, worker.slot.data_address());
            (view.nr, view.blocking, args)
        }
        Err(e) => return refuse(e),
    };
    shared.count(worker.pid);
    let after = After::of(shared, &worker, nr, &args);
    *worker.current.lock() = Some(reply.header.seq);
    let terminal = syscall::terminal_use(nr, &args);
    let seq = reply.header.seq;
    let interrupt =
        reply.header.flags & wire::INTERRUPT_AT_ONCE != 0 || worker.early.load(Ordering::Acquire) == seq;
    let patience = match blocking {
        _ if interrupt => INTERRUPTED_WAIT,
        Blocking::Never => INLINE_WAIT,
        Blocking::May => BRIEF_WAIT,
        Blocking::Long => Duration::ZERO,
    };
    let pending = Pending {
        shared: shared.clone(),
        after,
        worker,
        request: payload,
        reply,
        nr,
        args,
        terminal,
        exposed: false,
    };
    if terminal.is_some() && pending.mask_known() {
        if pending.guest_mask() != terminal::SIGNALS && terminal::in_background(pending.worker.pid) {
            return shared.post(Command::Expose(Box::new(pending)));
        }
        pending.post();
    } else if let Some(fd) = terminal.and_then(TerminalUse::written) {
        pending.worker.slot.post_guarded(u64::from(nr), args, fd);
    } else {
        pending.post();
    }
    match pending.worker.slot.wait(Some(patience)) {
        Some(ret) if !signals_by_itself(ret) => pending.ended(ret),
        _ => {
            WAITERS.with_pool(|p| p.hand(pending));
            if interrupt {
                shared.post(Command::Interrupt(wire::Interrupt { tid, seq }));
            }
        }
    }
}

/// Results with which the kernel also sends the calling thread a signal.
fn signals_by_itself(ret: i64) -> bool {
    ret == -i64::from(libc::EPIPE) || ret == -i64::from(libc::EFBIG)
}

/// What the end of a call has to wait for.
enum After {
    Nothing,
    /// Signals that it may have sent to its own process, and to another one of the job that is away.
    Signals(Option<i32>),
    /// A thread (first) to let a signal (second) through that is for it alone.
    Unblock(i32, i32),
}

impl After {
    /// For a call whose arguments are in the slot.
    fn of(shared: &Shared, worker: &Worker, nr: u32, args: &[u64; 6]) -> After {
        match i64::from(nr) {
            libc::SYS_kill | libc::SYS_rt_sigqueueinfo if args[1] != 0 => {
                let target = args[0] as i32;
                if target <= 0 || target == worker.pid {
                    return After::Signals(None);
                }
                if shared.catchers.read().contains_key(&target) {
                    return After::Signals(Some(target));
                }
            }
            libc::SYS_tkill | libc::SYS_tgkill | libc::SYS_rt_tgsigqueueinfo => {
                let at = usize::from(i64::from(nr) != libc::SYS_tkill);
                let (tid, signal) = (args[at] as i32, args[at + 1] as i32);
                let never_waits = [libc::SIGKILL, libc::SIGSTOP, libc::SIGCONT].contains(&signal);
                if (1..=64).contains(&signal) && !never_waits && shared.worker(tid).is_some() {
                    return After::Unblock(tid, signal);
                }
            }
            libc::SYS_pidfd_send_signal if args[1] != 0 => return After::Signals(None),
            libc::SYS_timer_create => {
                let mut event = [0; 20];
                let at = args[1].wrapping_sub(worker.slot.data_address());
                if at >= syscall::SLOT_DATA_LEN as u64 {
                    return After::Nothing;
                }
                worker.slot.read(at as usize, &mut event);
                // struct sigevent: value, signal at 8, kind of notification at 12, thread at 16.
                let word =
                    |i: usize| i32::from_ne_bytes([event[i], event[i + 1], event[i + 2], event[i + 3]]);
                let (signal, kind, tid) = (word(8), word(12), word(16));
                let known = shared.worker(tid).is_some_and(|w| w.pid == worker.pid);
                if kind == libc::SIGEV_THREAD_ID && (1..=64).contains(&signal) && known {
                    return After::Unblock(tid, signal);
                }
            }
            _ => {}
        }
        After::Nothing
    }
}

/// A call in progress.
pub struct Pending {
    shared: Arc<Shared>,
    after: After,
    worker: Arc<Worker>,
    /// The encoded request, which says what to send back.
    request: Vec<u8>,
    reply: ReplyTo,
    nr: u32,
    args: [u64; 6],
    terminal: Option<TerminalUse>,
    /// Its worker blocks of the terminal's signals only what the guest thread does.
    exposed: bool,
}

impl Pending {
    fn post(&self) {
        self.worker.slot.post(u64::from(self.nr), self.args);
    }

    fn mask_known(&self) -> bool {
        self.reply.header.flags & wire::MASK_KNOWN != 0
    }

    /// What the guest thread blocks of the signals of terminals.
    pub fn guest_mask(&self) -> u64 {
        let bit = |flag: u16, signal: i32| {
            if self.reply.header.flags & flag != 0 {
                1u64 << (signal - 1)
            } else {
                0
            }
        };
        bit(wire::BLOCKS_TTIN, libc::SIGTTIN) | bit(wire::BLOCKS_TTOU, libc::SIGTTOU)
    }

    /// Makes the call now that its worker is exposed to the terminal's signals.
    pub fn begin_exposed(mut self) {
        self.exposed = true;
        self.post();
        WAITERS.with_pool(|p| p.hand(self));
    }

    /// Its thread is gone. The guest goes too; whoever waits there must not wait on.
    pub fn give_up(&self) {
        self.reply.send(&[&(-i64::from(libc::ESRCH)).to_le_bytes()]);
    }

    /// Waits for the end, on a waiter's thread.
    fn complete(self) {
        let Some(ret) = self.worker.slot.wait(None) else {
            return self.give_up();
        };
        if signals_by_itself(ret) {
            let outs = self.collect(ret);
            let signal = if ret == -i64::from(libc::EPIPE) {
                libc::SIGPIPE
            } else {
                libc::SIGXFSZ
            };
            self.relay_own(signal);
            return self.conclude(outs);
        }
        self.ended(ret);
    }

    /// Whether the call was not made, or failed, for want of the guest thread's mask.
    fn wants_mask(&self, ret: i64) -> bool {
        if self.mask_known() {
            return false;
        }
        let reads = self.terminal.is_some_and(TerminalUse::reads);
        ret == wire::MASK_WANTED
            || (reads && ret == -i64::from(libc::EIO) && terminal::in_background(self.worker.pid))
    }

    /// The vessel has made it.
    fn ended(self, ret: i64) {
        if self.wants_mask(ret) {
            return self.answer(&wire::MASK_WANTED.to_le_bytes());
        }
        let shared = self.shared.clone();
        match self.after {
            After::Signals(_) if ret >= 0 => shared.post(Command::Settle(Box::new(self), ret)),
            After::Unblock(..) if ret >= 0 => shared.post(Command::Unblock(Box::new(self), ret)),
            _ => self.finish(ret),
        }
    }

    /// The thread that makes it.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Another process to which it has sent a signal.
    pub fn signalled(&self) -> Option<i32> {
        match self.after {
            After::Signals(other) => other,
            _ => None,
        }
    }

    /// The thread to let a signal through, and the signal.
    pub fn unblocks(&self) -> Option<(i32, i32)> {
        match self.after {
            After::Unblock(tid, signal) => Some((tid, signal)),
            _ => None,
        }
    }

    /// Answers.
    pub fn finish(self, ret: i64) {
        let outs = self.collect(ret);
        self.conclude(outs);
    }

    /// Answers, after the worker has been covered again.
    fn conclude(mut self, reply: Vec<u8>) {
        if std::mem::take(&mut self.exposed) {
            let shared = self.shared.clone();
            return shared.post(Command::Exposed(Box::new(self), reply));
        }
        self.answer(&reply);
    }

    /// The reply: the result and what the call wrote.
    fn collect(&self, mut ret: i64) -> Vec<u8> {
        let mut reply = Vec::new();
        match CallView::parse(&self.request) {
            Ok(view) => {
                if view.nr == libc::SYS_getdents64 as u32 && ret > 0 {
                    ret = self.hide_catcher(&view, ret);
                }
                syscall::collect(&view, &self.worker.slot, ret, &mut reply);
            }
            Err(e) => tracing::error!(tid = self.worker.tid, error = %e, "reply"),
        }
        reply
    }

    /// Takes the catcher, a thread that the program does not have, out of a listing of its own threads. Gives the new
    /// length of the listing.
    fn hide_catcher(&self, view: &CallView<'_>, len: i64) -> i64 {
        let pid = self.worker.pid;
        let Some(out) = view.outs().next() else { return len };
        let listed = std::fs::read_link(format!("/proc/{pid}/fd/{}", view.args[0] as i32));
        if listed
            .ok()
            .and_then(|p| p.to_str().map(|p| p == format!("/proc/{pid}/task")))
            != Some(true)
        {
            return len;
        }
        let Some(catcher) = self.shared.catchers.read().get(&pid).map(ToString::to_string) else {
            return len;
        };
        let mut records = vec![0; (len as usize).min(out.len as usize)];
        self.worker.slot.read(out.offset as usize, &mut records);
        // struct linux_dirent64: inode, offset, u16 length at 16, type, name at 19 (getdents(2)).
        let (mut at, mut end) = (0, records.len());
        while at + 19 < end {
            let size = usize::from(u16::from_ne_bytes([records[at + 16], records[at + 17]]));
            if size < 20 || at + size > end {
                break;
            }
            let name = &records[at + 19..at + size];
            if name.split(|b| *b == 0).next() == Some(catcher.as_bytes()) {
                records.copy_within(at + size..end, at);
                end -= size;
            } else {
                at += size;
            }
        }
        self.worker.slot.write(out.offset as usize, &records[..end]);
        end as i64
    }

    /// Answers at once.
    pub fn answer(&self, reply: &[u8]) {
        *self.worker.current.lock() = None;
        *self.worker.call.lock() = None;
        self.reply.send(&[reply]);
    }

    /// The worker has all signals blocked, so a signal the kernel sent it for this call is pending there. It is taken
    /// off the queue and follows the guest thread. It is sent on the call's own lane, so it arrives before the answer.
    fn relay_own(&self, signal: i32) {
        let slot = &self.worker.slot;
        let set = 1u64 << (signal - 1);
        slot.write(0, &set.to_ne_bytes());
        slot.write(16, &[0; 16]);
        slot.write(64, &[0; 128]);
        let base = slot.data_address();
        slot.post(
            libc::SYS_rt_sigtimedwait as u64,
            [base, base + 64, base + 16, 8, 0, 0],
        );
        if slot.wait(None) == Some(i64::from(signal)) {
            let mut info = SigInfo::default();
            slot.read(64, &mut info.0);
            let body = wire::Signal {
                pid: self.worker.pid,
                tid: self.worker.tid,
                signal,
                info: info.0.to_vec(),
                counted: false,
            };
            crate::signals::send(&self.reply.link, self.reply.lane, &body);
        }
    }
}

/// Threads that wait for calls; as many as there are calls in progress, plus a few idle ones.
struct Waiters {
    pool: Mutex<Option<Pool>>,
}

#[derive(Clone)]
struct Pool {
    send: Sender<Pending>,
    receive: Receiver<Pending>,
    idle: Arc<AtomicU32>,
}

static WAITERS: Waiters = Waiters {
    pool: Mutex::new(None),
};

impl Waiters {
    fn with_pool(&self, f: impl FnOnce(&Pool)) {
        let pool = self
            .pool
            .lock()
            .get_or_insert_with(|| {
                let (send, receive) = crossbeam_channel::unbounded();
                Pool {
                    send,
                    receive,
                    idle: Arc::default(),
                }
            })
            .clone();
        f(&pool);
    }
}

impl Pool {
    fn hand(&self, pending: Pending) {
        // An idle thread is claimed before it is given work, so that a call never queues behind another.
        let claimed = self
            .idle
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1))
            .is_ok();
        if !claimed {
            let pool = self.clone();
            crate::contact::spawn("waiter", move || pool.serve());
        }
        let _ = self.send.send(pending);
    }

    fn serve(&self) {
        while let Ok(pending) = self.receive.recv() {
            pending.complete();
            if self.idle.fetch_add(1, Ordering::AcqRel) >= 16
                && self
                    .idle
                    .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1))
                    .is_ok()
            {
                return;
            }
        }
    }
}

/// Opens a file with the given content in the vessel: /proc files about the guest, and the node's own topology. Gives
/// the descriptor or a negative errno.
pub fn synthetic(shared: &Arc<Shared>, tid: i32, file: &wire::Synthetic) -> i64 {
    let Some(worker) = shared.worker(tid) else {
        return -i64::from(libc::ESRCH);
    };
    let slot = &worker.slot;
    let base = slot.data_address();
    let call = |nr: i64, args: [u64; 6]| {
        slot.post(nr as u64, args);
        slot.wait(None).unwrap_or(-i64::from(libc::ESRCH))
    };
    let mut name = file.name.clone();
    name.truncate(200);
    name.push(0);
    slot.write(0, &name);
    let cloexec = if file.flags & libc::O_CLOEXEC != 0 {
        u64::from(libc::MFD_CLOEXEC)
    } else {
        0
    };
    let fd = call(libc::SYS_memfd_create, [base, cloexec, 0, 0, 0, 0]);
    if fd < 0 {
        return fd;
    }
    let mut at = 0usize;
    for chunk in file.content.chunks(128 << 10) {
        slot.write(0, chunk);
        let n = call(
            libc::SYS_pwrite64,
            [fd as u64, base, chunk.len() as u64, at as u64, 0, 0],
        );
        if n != chunk.len() as i64 {
            call(libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]);
            return if n < 0 { n } else { -i64::from(libc::ENOSPC) };
        }
        at += chunk.len();
    }
    fd
}

/// Gives the vessel a signal disposition of its guest. The handler's address is never jumped to: what arrives at the
/// vessel is taken by its tracer.
pub fn set_action(shared: &Arc<Shared>, tid: i32, action: wire::Action) {
    let Some(worker) = shared.worker(tid) else { return };
    in_turn(shared, tid, move || {
        begin_sigaction(&worker, action.signal, action.action);
        if let Some(ret) = worker.slot.wait(Some(INLINE_WAIT)) {
            return end_sigaction(&worker, ret);
        }
        // The vessel is stopped. The thread's next calls wait for this, and nobody else does.
        crate::contact::spawn("action", move || {
            let ret = worker.slot.wait(None);
            end_sigaction(&worker, ret.unwrap_or(0));
        });
    });
}

/// Gives the vessel the default disposition of the signal of which it is to die.
pub fn set_default(shared: &Arc<Shared>, worker: Arc<Worker>, signal: i32) {
    let (later, tid, pid) = (shared.clone(), worker.tid, worker.pid);
    in_turn(shared, tid, move || {
        begin_sigaction(&worker, signal, [0; 4]);
        crate::contact::spawn("death", move || {
            if let Some(ret) = worker.slot.wait(None) {
                end_sigaction(&worker, ret);
                later.post(Command::Dies(pid, signal));
            }
        });
    });
}

/// Begins a change of a disposition in an idle worker.
fn begin_sigaction(worker: &Worker, signal: i32, action: [u64; 4]) {
    worker.aside.lock().busy = true;
    let mut bytes = [0; 32];
    for (place, word) in bytes.chunks_exact_mut(8).zip(action) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
    worker.slot.write(0, &bytes);
    let base = worker.slot.data_address();
    worker
        .slot
        .post(libc::SYS_rt_sigaction as u64, [signal as u64, base, 0, 8, 0, 0]);
}

fn end_sigaction(worker: &Worker, ret: i64) {
    if ret < 0 {
        tracing::warn!(tid = worker.tid, ret, "disposition not set at home");
    }
    worker.aside.lock().busy = false;
    worker.drain();
}

/// The content of a file of /proc about the vessel that asks; empty when there is none.
pub fn read_proc(shared: &Arc<Shared>, tid: i32, path: &[u8]) -> Vec<u8> {
    let Some(worker) = shared.worker(tid) else {
        return Vec::new();
    };
    let Some(name) = std::str::from_utf8(path).ok().and_then(|p| p.rsplit('/').next()) else {
        return Vec::new();
    };
    if !matches!(name, "status" | "stat") {
        return Vec::new();
    }
    std::fs::read(format!("/proc/{}/{name}", worker.pid)).unwrap_or_default()
}

/// Waits on a thread of its own for the end of a clone that the vessel executes.
pub fn watch_clone(shared: &Arc<Shared>, worker: Arc<Worker>) {
    let shared = shared.clone();
    crate::contact::spawn("clone", move || {
        if let Some(ret) = worker.slot.wait(None) {
            shared.post(Command::CloneEnded { tid: worker.tid, ret });
        }
    });
}

/// ... and of an exec that fails; one that succeeds never ends in the slot.
pub fn watch_exec(shared: &Arc<Shared>, worker: Arc<Worker>) {
    let shared = shared.clone();
    crate::contact::spawn("exec", move || {
        if let Some(ret) = worker.slot.wait(None) {
            shared.post(Command::ExecFailed { tid: worker.tid, ret });
        }
    });
}
