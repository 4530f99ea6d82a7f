//! The threads of a link: leader, followers, and the link's own.
//!
//! One thread at a time receives, the *leader*. It may be in the kernel's receive for up to [`TICK`] ([`Leader::Busy`]),
//! or, once nothing has come for that long, in poll(2) ([`Leader::Polling`]), out of which a thread that starts a call
//! takes the leadership without waking it: the old leader notices when the next datagram wakes it. The new one then
//! gets its reply straight from the kernel. A leader that is done hands over to the latest caller that still waits, or
//! to nobody; in the latter case the link's own thread takes over when no call has been made for [`IDLE_AFTER`], so
//! that it does not get in the way of a thread that makes one call after the other.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::conn::Via;
use super::core::{Core, Notice, Request};
use super::socket::{RECEIVE_BYTES, Sock, TICK};
use super::{Fingerprint, LinkError, OneTimeKey, Options, Stats};
use crate::frame::{Header, flags};

/// How long after the last call the link's own thread takes over.
const IDLE_AFTER: Duration = Duration::from_millis(2);
/// Traffic of the other side's making within this time makes the link's own thread take over at once.
const SERVING_FOR: Duration = Duration::from_millis(50);
/// A sleeping leader is woken when a timer is due this much before it would wake by itself.
const WAKE_MARGIN: Duration = Duration::from_millis(1);
/// The longest sleep in poll(2).
const POLL_MAX: Duration = Duration::from_secs(5);
/// How long [`Link::close`] waits for the peer to acknowledge what was sent.
const LINGER: Duration = Duration::from_secs(1);
/// Datagram batches that are read from one socket before anything else is looked at.
const BATCHES: usize = 8;

/// The user of a link. All methods are called by the thread that leads at that moment, one at a time and without any
/// lock held: they may send on the link but must not block, and must not call on the same link.
pub trait Handler: Send + Sync + 'static {
    /// A frame that is not the reply to a waiting call arrived. Frames of a lane come in the order they were sent.
    fn frame(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>);
    /// The link is over; said once. Not said when this end closed it.
    fn lost(&self, why: &LinkError);
    /// Nothing is heard from the peer, or the connection broke; the link tries to go on.
    fn interrupted(&self) {}
    /// The link goes on. Nothing was lost and nothing comes twice.
    fn restored(&self) {}
}

/// One end of a link; clones are the same end. When the last clone is dropped, the link is closed as by [`Link::close`]
/// but without waiting.
pub struct Link {
    shared: Arc<Shared>,
    /// Whether it is one of the user's, which keep the link open.
    counted: bool,
}

type CallKey = (u32, i32, u64);

struct Shared {
    state: Mutex<State>,
    /// Where the link's own thread waits while others lead.
    idle: Condvar,
    /// Where threads wait for anything but a reply.
    progress: Condvar,
    wake: EventFd,
    handler: Arc<dyn Handler>,
    users: AtomicUsize,
    seq: AtomicU64,
    local: SocketAddr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leader {
    Nobody,
    /// Receiving or delivering.
    Busy(u64),
    /// In poll(2) until the given time: can be replaced.
    Polling(u64, Instant),
}

struct Waiter {
    /// Set while the thread sleeps.
    sleeper: Arc<Condvar>,
    reply: Option<(Header, Vec<u8>)>,
}

struct State {
    core: Core,
    main: Option<Arc<Sock>>,
    side: Option<Arc<Sock>>,
    options: Options,
    leader: Leader,
    next_leader: u64,
    calls: HashMap<CallKey, Waiter>,
    /// Calls in the order they began, with some that are done.
    order: Vec<CallKey>,
    /// Threads that wait for `progress`.
    waiting: usize,
    /// The link's own thread sleeps without a timeout.
    idle_asleep: bool,
    /// When a leader that was a caller last left.
    released: Instant,
    /// When a frame for the handler last came.
    served: Instant,
    lost: Option<LinkError>,
    receive: Option<Box<[u8]>>,
    transmit: Vec<u8>,
}

thread_local! {
    /// The link whose handler this thread is in, by address.
    static DELIVERING: Cell<usize> = const { Cell::new(0) };
}

impl Link {
    /// Connects to the listener at `remote` whose key has the fingerprint `peer`, and returns when both ends have
    /// proved who they are.
    pub fn connect(
        remote: SocketAddr,
        key: &OneTimeKey,
        peer: Fingerprint,
        handler: Arc<dyn Handler>,
        options: Options,
    ) -> Result<Self, LinkError> {
        let side = Sock::connected(remote).map_err(LinkError::io("open a socket to the peer"))?;
        side.tune(&options);
        let core = Core::connecting(Instant::now(), remote, key, peer, options.clone())?;
        let timeout = options.connect_timeout;
        Self::start(core, side, handler, options)?.established(timeout)
    }

    pub(super) fn start(
        core: Core,
        side: Sock,
        handler: Arc<dyn Handler>,
        options: Options,
    ) -> Result<Self, LinkError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| LinkError::io("make an eventfd")(errno.into()))?;
        let local = side
            .local_addr()
            .map_err(LinkError::io("ask for the socket's address"))?;
        let now = Instant::now();
        let name = options.thread_name.clone();
        let state = State {
            core,
            main: None,
            side: Some(Arc::new(side)),
            options,
            leader: Leader::Nobody,
            next_leader: 1,
            calls: HashMap::new(),
            order: Vec::new(),
            waiting: 0,
            idle_asleep: false,
            released: now - IDLE_AFTER,
            served: now - SERVING_FOR,
            lost: None,
            receive: Some(vec![0; RECEIVE_BYTES].into()),
            transmit: Vec::new(),
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            idle: Condvar::new(),
            progress: Condvar::new(),
            wake,
            handler,
            users: AtomicUsize::new(1),
            seq: AtomicU64::new(1),
            local,
        });
        let own = Self {
            shared: Arc::clone(&shared),
            counted: false,
        };
        std::thread::Builder::new()
            .name(name)
            .spawn(move || own.run())
            .map_err(LinkError::io("start the link's thread"))?;
        Ok(Self {
            shared,
            counted: true,
        })
    }

    /// Waits until the first connection stands.
    pub(super) fn established(self, timeout: Duration) -> Result<Self, LinkError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        while !state.core.is_live() {
            if let Some(error) = &state.lost {
                return Err(error.clone());
            }
            if Instant::now() >= deadline {
                state.lost = Some(LinkError::ShutDown);
                return Err(LinkError::TimedOut(timeout));
            }
            state.waiting += 1;
            self.shared.progress.wait_until(&mut state, deadline);
            state.waiting -= 1;
        }
        drop(state);
        Ok(self)
    }

    /// Sends a frame on `lane`: `header`, whose length is set here, and `parts` one after the other.
    ///
    /// Returns when the frame is queued. When the peer has not acknowledged [`Options::queue_bytes`], it waits until
    /// there is room; inside [`Handler::frame`] it never waits. An `Ok` means that the frame will be delivered exactly
    /// once unless the link is lost.
    pub fn send(&self, lane: u32, header: Header, parts: &[&[u8]]) -> Result<(), LinkError> {
        let mut state = self.shared.state.lock();
        if !self.delivering() {
            state = self.await_room(state)?;
        }
        self.queue(&mut state, lane, header, parts)?;
        self.shared.wake_if_late(&mut state);
        Ok(())
    }

    /// Sends a frame and waits for the one with [`flags::REPLY`] and the same lane, `tid` and `seq`.
    ///
    /// No two calls with the same three may wait at the same time. Must not be used inside [`Handler::frame`] of the
    /// same link ([`LinkError::Nested`]).
    pub fn call(&self, lane: u32, header: Header, parts: &[&[u8]]) -> Result<(Header, Vec<u8>), LinkError> {
        if self.delivering() {
            debug_assert!(false, "a call from inside the frame handler of the same link");
            return Err(LinkError::Nested);
        }
        let key = (lane, header.tid, header.seq);
        let mut state = self.await_room(self.shared.state.lock())?;
        let header = Header {
            flags: header.flags & !flags::REPLY,
            ..header
        };
        let sleeper = Arc::new(Condvar::new());
        let twin = state.calls.insert(
            key,
            Waiter {
                sleeper: Arc::clone(&sleeper),
                reply: None,
            },
        );
        debug_assert!(twin.is_none(), "two calls with lane, tid and seq {key:?}");
        if let Err(error) = self.queue(&mut state, lane, header, parts) {
            state.calls.remove(&key);
            return Err(error);
        }
        state.remember(key);
        let outcome = self.drive(&mut state, Some(&sleeper), |state| {
            if state.calls.get(&key).is_some_and(|waiter| waiter.reply.is_some()) {
                return state.calls.remove(&key).and_then(|waiter| waiter.reply);
            }
            None
        });
        state.calls.remove(&key);
        outcome
    }

    /// A number that this end has not used before on this link.
    pub fn next_seq(&self) -> u64 {
        self.shared.seq.fetch_add(1, Ordering::Relaxed)
    }

    /// Ends the link after the peer has acknowledged what was sent, for which it waits up to a second (not inside
    /// [`Handler::frame`]). The peer is told that this was meant; waiting calls end with [`LinkError::ShutDown`].
    pub fn close(&self) {
        let mut state = self.shared.state.lock();
        if !self.delivering() && state.lost.is_none() && state.core.is_live() && state.core.kept_bytes() > 0 {
            state.core.ask_acks();
            self.shared.flush(&mut state, Instant::now());
            let deadline = Instant::now() + LINGER;
            while state.lost.is_none() && state.core.kept_bytes() > 0 && Instant::now() < deadline {
                self.shared.rouse_idle(&mut state);
                state.waiting += 1;
                self.shared.progress.wait_for(&mut state, IDLE_AFTER * 5);
                state.waiting -= 1;
            }
        }
        self.shared.shut_down(&mut state);
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.shared.state.lock().core.stats()
    }

    /// The address of this end's first socket.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.local
    }

    /// Why the link is over, once it is.
    pub fn lost(&self) -> Option<LinkError> {
        self.shared.state.lock().lost.clone()
    }

    fn delivering(&self) -> bool {
        DELIVERING.get() == Arc::as_ptr(&self.shared).addr()
    }

    fn queue(&self, state: &mut State, lane: u32, header: Header, parts: &[&[u8]]) -> Result<(), LinkError> {
        if let Some(error) = &state.lost {
            return Err(error.clone());
        }
        state.core.send(lane, header, parts)?;
        self.shared.flush(state, Instant::now());
        Ok(())
    }

    fn await_room<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
    ) -> Result<MutexGuard<'a, State>, LinkError> {
        if state.core.kept_bytes() < state.options.queue_bytes {
            return Ok(state);
        }
        self.drive(&mut state, None, |state| {
            (state.core.kept_bytes() < state.options.queue_bytes).then_some(())
        })?;
        Ok(state)
    }

    /// Receives for everybody, or waits for the one who does, until `done` gives something.
    fn drive<T>(
        &self,
        state: &mut MutexGuard<'_, State>,
        sleeper: Option<&Condvar>,
        mut done: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, LinkError> {
        let me = state.leader_id();
        // Fresh threads wait in the kernel's receive; those that have waited for long can be replaced.
        let mut fresh = true;
        let outcome = loop {
            if let Some(value) = done(state) {
                break Ok(value);
            }
            if let Some(error) = &state.lost {
                break Err(error.clone());
            }
            match state.leader {
                Leader::Busy(other) if other != me => match sleeper {
                    Some(sleeper) => sleeper.wait(state),
                    None => {
                        state.waiting += 1;
                        self.shared.progress.wait(state);
                        state.waiting -= 1;
                    }
                },
                Leader::Polling(other, _) if other != me && !fresh => match sleeper {
                    Some(sleeper) => sleeper.wait(state),
                    None => {
                        state.waiting += 1;
                        self.shared.progress.wait(state);
                        state.waiting -= 1;
                    }
                },
                _ => fresh = self.lead(state, me, fresh) && fresh,
            }
        };
        if state.leader == Leader::Busy(me) {
            self.release(state);
        }
        outcome
    }

    /// Hands the leadership on.
    fn release(&self, state: &mut State) {
        state.leader = Leader::Nobody;
        while let Some(key) = state.order.last() {
            if let Some(waiter) = state.calls.get(key)
                && waiter.reply.is_none()
            {
                waiter.sleeper.notify_one();
                return;
            }
            state.order.pop();
        }
        if state.waiting > 0 {
            self.shared.progress.notify_all();
            return;
        }
        state.released = Instant::now();
        self.shared.rouse_idle(state);
    }

    /// Receives once, as the leader `me`, and does all that follows from it. Returns whether something came; the
    /// leadership may be somebody else's afterwards.
    fn lead(&self, state: &mut MutexGuard<'_, State>, me: u64, in_kernel: bool) -> bool {
        let now = Instant::now();
        let next = state
            .core
            .next_timeout()
            .unwrap_or(now + POLL_MAX)
            .min(now + POLL_MAX);
        let came = match &state.main {
            Some(main) if in_kernel && state.core.is_live() && next > now + TICK => {
                let main = Arc::clone(main);
                state.leader = Leader::Busy(me);
                self.shared.receive(state, Via::Main, &main)
            }
            _ => match self.shared.poll(state, me, next) {
                Some(came) => came,
                None => return false,
            },
        };
        let now = Instant::now();
        state.core.advance(now);
        if state.core.next_timeout().is_some_and(|at| at <= now) {
            state.core.handle_timeout(now);
        }
        self.deliver(state);
        self.shared.flush(state, now);
        // Requests that failed in the flush may have ended the link.
        self.notify(state);
        if state.waiting > 0 {
            self.shared.progress.notify_all();
        }
        came
    }

    /// Gives replies to their callers and all other frames to the handler.
    fn deliver(&self, state: &mut MutexGuard<'_, State>) {
        while let Some((lane, header, payload)) = state.core.poll_delivery() {
            if header.is_reply()
                && let Some(waiter) = state.calls.get_mut(&(lane, header.tid, header.seq))
                && waiter.reply.is_none()
            {
                waiter.reply = Some((header, payload));
                waiter.sleeper.notify_one();
                continue;
            }
            state.served = Instant::now();
            MutexGuard::unlocked(state, || {
                let outer = DELIVERING.replace(Arc::as_ptr(&self.shared).addr());
                self.shared.handler.frame(self, lane, header, payload);
                DELIVERING.set(outer);
            });
        }
        self.notify(state);
    }

    fn notify(&self, state: &mut MutexGuard<'_, State>) {
        while let Some(notice) = state.core.poll_notice() {
            if let Notice::Lost(error) = &notice {
                if state.lost.is_some() {
                    continue;
                }
                state.lost = Some(error.clone());
                self.shared.flush(state, Instant::now());
                state.wake_all();
            }
            self.shared.progress.notify_all();
            MutexGuard::unlocked(state, || {
                let outer = DELIVERING.replace(Arc::as_ptr(&self.shared).addr());
                match &notice {
                    Notice::Established => {}
                    Notice::Interrupted => self.shared.handler.interrupted(),
                    Notice::Restored => self.shared.handler.restored(),
                    Notice::Lost(error) => self.shared.handler.lost(error),
                }
                DELIVERING.set(outer);
            });
        }
    }

    /// The link's own thread.
    fn run(self) {
        let mut state = self.shared.state.lock();
        let me = state.leader_id();
        while state.lost.is_none() {
            match state.leader {
                Leader::Busy(other) | Leader::Polling(other, _) if other != me => {
                    state.idle_asleep = true;
                    self.shared.idle.wait(&mut state);
                    state.idle_asleep = false;
                }
                Leader::Nobody if !state.idle_is_due() => {
                    self.shared.idle.wait_for(&mut state, IDLE_AFTER);
                }
                _ => {
                    // Serving a busy peer, it waits in the kernel; but not in the way of this end's own callers.
                    let now = Instant::now();
                    let serving = now.saturating_duration_since(state.served) < TICK
                        && now.saturating_duration_since(state.released) > SERVING_FOR;
                    self.lead(&mut state, me, serving);
                    if state.leader == Leader::Busy(me) && !state.calls.is_empty() {
                        // Those who wait can do it themselves, without another thread in between.
                        self.release(&mut state);
                    }
                }
            }
        }
        if state.leader == Leader::Busy(me) {
            state.leader = Leader::Nobody;
        }
        self.shared.shut_down(&mut state);
    }
}

#[cfg(test)]
impl Link {
    /// Forgets the connection in use, as if the peer's machine had forgotten it.
    pub(super) fn drop_connection(&self) {
        let mut state = self.shared.state.lock();
        state.core.drop_connection(Instant::now());
        self.shared.wake();
    }

    /// Closes the sockets and says nothing, as if the process were killed.
    pub(super) fn vanish(&self) {
        let mut state = self.shared.state.lock();
        state.main = None;
        state.side = None;
        state.lost = Some(LinkError::ShutDown);
        self.shared.wake();
    }
}

impl Clone for Link {
    fn clone(&self) -> Self {
        self.shared.users.fetch_add(1, Ordering::Relaxed);
        Self {
            shared: Arc::clone(&self.shared),
            counted: true,
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.counted && self.shared.users.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.shut_down(&mut self.shared.state.lock());
        }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("local", &self.shared.local)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// Tells the peer, ends what waits. Does nothing on a link that is over.
    fn shut_down(&self, state: &mut State) {
        state.lost.get_or_insert(LinkError::ShutDown);
        let now = Instant::now();
        state.core.close(now);
        self.flush(state, now);
        state.wake_all();
        self.progress.notify_all();
        self.idle.notify_all();
        self.wake();
    }

    fn wake(&self) {
        // Full means that it is awake already.
        let _ = self.wake.write(1);
    }

    /// Wakes the link's own thread if it sleeps while nobody leads.
    fn rouse_idle(&self, state: &mut State) {
        if state.idle_asleep && state.leader == Leader::Nobody {
            state.idle_asleep = false;
            self.idle.notify_one();
        }
    }

    /// After a send: a leader that sleeps too long for the timers that it does not know of is woken.
    fn wake_if_late(&self, state: &mut State) {
        if let Leader::Polling(_, until) = state.leader
            && state
                .core
                .next_timeout()
                .is_some_and(|at| at + WAKE_MARGIN < until)
        {
            // It takes no notice of who is leader when it wakes by itself, so once is enough.
            state.leader = match state.leader {
                Leader::Polling(id, _) => Leader::Polling(id, Instant::now()),
                other => other,
            };
            self.wake();
        }
        self.rouse_idle(state);
    }

    /// Receives from `sock` without the lock.
    fn receive(&self, state: &mut MutexGuard<'_, State>, via: Via, sock: &Sock) -> bool {
        let mut buffer = state
            .receive
            .take()
            .unwrap_or_else(|| vec![0; RECEIVE_BYTES].into());
        let outcome = MutexGuard::unlocked(state, || sock.receive(&mut buffer));
        let now = Instant::now();
        let came = match outcome {
            Ok(meta) => {
                let mut data = BytesMut::from(&buffer[..meta.len.min(buffer.len())]);
                while !data.is_empty() {
                    let piece = data.split_to(meta.stride.clamp(1, data.len()));
                    state
                        .core
                        .handle_datagram(now, via, meta.addr, meta.dst_ip, piece);
                }
                true
            }
            Err(error) => {
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    state.core.refused(now);
                }
                false
            }
        };
        state.receive = Some(buffer);
        came
    }

    /// Waits until `until` for any of the sockets or to be woken; then receives. `None` when the leadership was lost
    /// meanwhile.
    fn poll(&self, state: &mut MutexGuard<'_, State>, me: u64, until: Instant) -> Option<bool> {
        state.leader = Leader::Polling(me, until);
        let (main, side) = (state.main.clone(), state.side.clone());
        let ready = MutexGuard::unlocked(state, || {
            let socks: Vec<(Via, &Arc<Sock>)> = main
                .iter()
                .map(|sock| (Via::Main, sock))
                .chain(side.iter().map(|sock| (Via::Side, sock)))
                .collect();
            let mut fds: Vec<PollFd<'_>> = socks
                .iter()
                .map(|(_, sock)| PollFd::new(sock.as_fd(), PollFlags::POLLIN))
                .collect();
            fds.push(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN));
            let wait = until.saturating_duration_since(Instant::now());
            let timeout = TimeSpec::from(wait);
            if ppoll(&mut fds, Some(timeout), None).is_err() {
                return Vec::new();
            }
            if fds.pop().and_then(|fd| fd.any()) == Some(true) {
                let _ = self.wake.read();
            }
            let ready: Vec<(Via, Arc<Sock>)> = socks
                .iter()
                .zip(&fds)
                .filter(|(_, fd)| fd.any() == Some(true))
                .map(|((via, sock), _)| (*via, Arc::clone(sock)))
                .collect();
            ready
        });
        if !matches!(state.leader, Leader::Polling(id, _) if id == me) {
            return None;
        }
        state.leader = Leader::Busy(me);
        let mut came = false;
        for (via, sock) in ready {
            came |= self.receive(state, via, &sock);
            for _ in 1..BATCHES {
                if !readable(&sock) || !self.receive(state, via, &sock) {
                    break;
                }
            }
        }
        Some(came)
    }

    /// Carries out what the core asks for and sends all that it has to send.
    fn flush(&self, state: &mut State, now: Instant) {
        while let Some(request) = state.core.poll_request() {
            if let Err(error) = state.carry_out(request) {
                // As lost datagrams are: the core's timers try again.
                tracing::debug!(%error, ?request, "socket not made");
            }
        }
        let mut buffer = std::mem::take(&mut state.transmit);
        loop {
            buffer.clear();
            let (main, side) = (&state.main, &state.side);
            let any = main.as_ref().or(side.as_ref());
            let segments = |mtu| any.map_or(1, |sock| sock.segments(mtu));
            let Some((via, transmit)) = state.core.poll_transmit(now, segments, &mut buffer) else {
                break;
            };
            let sock = match via {
                Via::Main => main.as_ref().or(side.as_ref()),
                Via::Side => side.as_ref().or(main.as_ref()),
            };
            let Some(sock) = sock else { continue };
            let contents = &buffer[..transmit.size.min(buffer.len())];
            if sock.send(&transmit, contents) {
                state.core.refused(now);
            }
        }
        state.transmit = buffer;
    }
}

impl State {
    fn leader_id(&mut self) -> u64 {
        self.next_leader += 1;
        self.next_leader
    }

    /// Whether the link's own thread is to lead although calls were made a moment ago.
    fn idle_is_due(&self) -> bool {
        let now = Instant::now();
        now.saturating_duration_since(self.released) >= IDLE_AFTER
            || now.saturating_duration_since(self.served) < SERVING_FOR
            || !self.core.is_live()
    }

    /// Notes a call as the latest one.
    fn remember(&mut self, key: CallKey) {
        if self.order.len() > 2 * self.calls.len() + 64 {
            let calls = &self.calls;
            self.order.retain(|key| calls.contains_key(key));
        }
        self.order.push(key);
    }

    fn wake_all(&mut self) {
        for waiter in self.calls.values() {
            waiter.sleeper.notify_all();
        }
    }

    fn carry_out(&mut self, request: Request) -> io::Result<()> {
        match request {
            Request::OpenSide { remote } => {
                // The first attempt finds the socket that the link was made with.
                if self.main.is_some() || self.side.is_none() {
                    let sock = Sock::connected(remote)?;
                    sock.tune(&self.options);
                    self.side = Some(Arc::new(sock));
                }
            }
            Request::Promote { remote, local_ip } => {
                let Some(side) = &self.side else { return Ok(()) };
                if side.is_connected() {
                    self.main = self.side.take();
                } else {
                    let mut local = side.local_addr()?;
                    if let Some(ip) = local_ip {
                        local.set_ip(ip);
                    }
                    let sock = Sock::accepted(local, remote)?;
                    sock.tune(&self.options);
                    self.main = Some(Arc::new(sock));
                }
                self.core.promoted();
            }
        }
        Ok(())
    }
}

/// Whether a receive would not wait.
fn readable(sock: &Sock) -> bool {
    let mut fds = [PollFd::new(sock.as_fd(), PollFlags::POLLIN)];
    ppoll(&mut fds, Some(TimeSpec::from(Duration::ZERO)), None).is_ok_and(|ready| ready > 0)
}
