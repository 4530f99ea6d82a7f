//! The threads of a link: leader, followers, and the link's own.
//!
//! One thread at a time receives, the *leader*. It may be in the kernel's receive for up to [`TICK`] ([`Leader::Busy`]),
//! or, once nothing has come for that long, in poll(2) ([`Leader::Polling`]), out of which a thread that starts a call
//! takes the leadership without waking it: the old leader notices when the next datagram wakes it. The new one then
//! gets its reply straight from the kernel. A leader that is done hands over to a thread that has just called, or to
//! nobody; in the latter case the link's own thread takes over when no call has been made for [`IDLE_AFTER`], so that
//! neither it nor a thread that waits for long gets in the way of one that makes one call after the other.
//!
//! System calls that it needs once a link stands: recvmsg, sendto, sendmsg, ppoll, read and write (eventfd), futex;
//! and socket, bind, connect, setsockopt, getsockopt, getsockname, fcntl, getrandom, close to connect anew.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::SigSet;
use nix::sys::time::TimeSpec;
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustc_hash::FxHashMap;

use super::conn::Via;
use super::core::{Core, Notice, Request};
use super::link::{Handler, Link};
use super::socket::{RECEIVE_BYTES, Sock, TICK};
use super::spin::Spin;
use super::{LinkError, Options};
use crate::frame::Header;

/// How long after the last call the link's own thread takes over.
const IDLE_AFTER: Duration = Duration::from_millis(2);
/// The same when a call waits for its reply, which may come at any time.
const WAITED_AFTER: Duration = Duration::from_micros(200);
/// Traffic of the other side's making within this time makes the link's own thread take over at once.
const SERVING_FOR: Duration = Duration::from_millis(50);
/// A sleeping leader is woken when a timer is due this much before it would wake by itself.
const WAKE_MARGIN: Duration = Duration::from_millis(1);
/// A timer that is due this soon is waited for precisely, in poll(2); any other may be late by [`TICK`].
const SOON: Duration = Duration::from_millis(2);
/// The longest sleep in poll(2).
const POLL_MAX: Duration = Duration::from_secs(5);
/// Datagram batches that are read from one socket before anything else is looked at.
const BATCHES: usize = 8;

pub(super) type CallKey = (u32, i32, u64);

pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    /// Where the link's own thread waits while others lead.
    pub(super) idle: Condvar,
    /// Where threads wait for anything but a reply.
    pub(super) progress: Condvar,
    pub(super) wake: EventFd,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) users: AtomicUsize,
    pub(super) seq: AtomicU64,
    pub(super) local: SocketAddr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leader {
    Nobody,
    /// Receiving or delivering.
    Busy(u64),
    /// In poll(2) until the given time: can be replaced.
    Polling(u64, Instant),
}

pub(super) struct Waiter {
    pub(super) sleeper: Arc<Condvar>,
    pub(super) begun: Instant,
    pub(super) reply: Option<(Header, Vec<u8>)>,
}

pub(super) struct State {
    pub(super) core: Core,
    pub(super) main: Option<Arc<Sock>>,
    pub(super) side: Option<Arc<Sock>>,
    pub(super) options: Options,
    pub(super) leader: Leader,
    pub(super) next_leader: u64,
    pub(super) calls: FxHashMap<CallKey, Waiter>,
    /// Calls in the order they began, with some that are done.
    pub(super) order: Vec<CallKey>,
    /// Threads that wait for `progress`.
    pub(super) waiting: usize,
    /// The link's own thread sleeps without a timeout.
    pub(super) idle_asleep: bool,
    /// When a leader that was a caller last left.
    pub(super) released: Instant,
    /// When a frame for the handler last came.
    pub(super) served: Instant,
    pub(super) lost: Option<LinkError>,
    /// Whether a connection has ever stood.
    established: bool,
    pub(super) receive: Option<Box<[u8]>>,
    pub(super) transmit: Vec<u8>,
    spin: Spin,
}

thread_local! {
    /// The link whose handler this thread is in, by address.
    pub(super) static DELIVERING: Cell<usize> = const { Cell::new(0) };
}

impl Link {
    /// Receives for everybody, or waits for the one who does, until `done` gives something.
    pub(super) fn drive<T>(
        &self,
        state: &mut MutexGuard<'_, State>,
        sleeper: Option<&Condvar>,
        mut done: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, LinkError> {
        let me = state.leader_id();
        let begun = Instant::now();
        // Fresh threads wait in the kernel's receive; those that have waited for long can be replaced.
        let mut fresh = true;
        let outcome = loop {
            if let Some(value) = done(state) {
                break Ok(value);
            }
            if let Some(error) = &state.lost {
                break Err(error.clone());
            }
            let follow = match state.leader {
                Leader::Nobody => false,
                Leader::Busy(other) => other != me,
                Leader::Polling(other, _) => other != me && !fresh,
            };
            if !follow {
                fresh = self.lead(state, me, fresh) && fresh;
                continue;
            }
            match sleeper {
                Some(sleeper) => sleeper.wait(state),
                None => {
                    state.waiting += 1;
                    self.shared.progress.wait(state);
                    state.waiting -= 1;
                }
            }
            fresh = fresh && begun.elapsed() < TICK;
        };
        match state.leader {
            Leader::Busy(leader) if leader == me => self.release(state),
            // It was woken to lead, and what it waited for had come already.
            Leader::Nobody => self.shared.rouse_idle(state),
            _ => {}
        }
        outcome
    }

    /// Hands the leadership on: to a thread that has just called, or else to nobody for a moment, after which the
    /// link's own thread takes it. A thread that waits for long is better served by that than by being woken after
    /// each call of another.
    fn release(&self, state: &mut State) {
        state.leader = Leader::Nobody;
        let now = Instant::now();
        if let Some(waiter) = state.fresh_caller(now) {
            waiter.sleeper.notify_one();
            return;
        }
        if state.waiting > 0 {
            self.shared.progress.notify_all();
            return;
        }
        state.released = now;
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
            Some(main) if in_kernel && state.core.is_live() && next > now + SOON => {
                let main = Arc::clone(main);
                state.leader = Leader::Busy(me);
                let spin = state.spin.allowance(now);
                let came = self.shared.receive(state, Via::Main, &main, spin);
                if !spin.is_zero() {
                    state.spin.outcome(came && now.elapsed() < spin);
                }
                came
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
                let _inside = Inside::enter(&self.shared);
                self.shared.handler.frame(self, lane, header, payload);
            });
        }
        self.notify(state);
    }

    fn notify(&self, state: &mut MutexGuard<'_, State>) {
        while let Some(notice) = state.core.poll_notice() {
            state.established |= matches!(notice, Notice::Established);
            let established = state.established;
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
                let _inside = Inside::enter(&self.shared);
                match &notice {
                    Notice::Established => {}
                    // Whoever connects or accepts is told by that.
                    Notice::Lost(_) if !established => {}
                    Notice::Interrupted => self.shared.handler.interrupted(),
                    Notice::Restored => self.shared.handler.restored(),
                    Notice::Lost(error) => self.shared.handler.lost(error),
                }
            });
        }
    }

    /// The link's own thread.
    pub(super) fn run(self) {
        // Signals are for the threads of the program, which may count on where they are taken.
        let _ = SigSet::all().thread_block();
        let mut state = self.shared.state.lock();
        let me = state.leader_id();
        while state.lost.is_none() {
            let now = Instant::now();
            let nap = state.idle_nap(now);
            match state.leader {
                Leader::Busy(other) | Leader::Polling(other, _) if other != me => {
                    // While calls come one after the other it keeps its naps: to be woken from a sleep costs the caller.
                    if now.saturating_duration_since(state.released) < SERVING_FOR {
                        self.shared.idle.wait_for(&mut state, nap.unwrap_or(IDLE_AFTER));
                    } else {
                        state.idle_asleep = true;
                        self.shared.idle.wait(&mut state);
                        state.idle_asleep = false;
                    }
                }
                Leader::Nobody if nap.is_some() => {
                    self.shared.idle.wait_for(&mut state, nap.unwrap_or(IDLE_AFTER));
                }
                _ => {
                    // Serving a busy peer, it waits in the kernel; but not in the way of this end's own callers.
                    let serving = now.saturating_duration_since(state.served) < 2 * TICK
                        && now.saturating_duration_since(state.released) > SERVING_FOR;
                    self.lead(&mut state, me, serving);
                    if state.leader == Leader::Busy(me)
                        && let Some(waiter) = state.fresh_caller(now)
                    {
                        // It can do so itself, without another thread in between.
                        waiter.sleeper.notify_one();
                        state.leader = Leader::Nobody;
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

/// Marks the thread as one that is inside the handler. A handler that panics takes its link with it: nobody else
/// would ever lead again.
struct Inside<'a> {
    shared: &'a Shared,
    outer: usize,
}

impl<'a> Inside<'a> {
    fn enter(shared: &'a Shared) -> Self {
        Self {
            shared,
            outer: DELIVERING.replace(std::ptr::from_ref(shared).addr()),
        }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        DELIVERING.set(self.outer);
        if std::thread::panicking() {
            self.shared.shut_down(&mut self.shared.state.lock());
        }
    }
}

impl Shared {
    /// Tells the peer, ends what waits. Does nothing on a link that is over.
    pub(super) fn shut_down(&self, state: &mut State) {
        state.lost.get_or_insert(LinkError::ShutDown);
        let now = Instant::now();
        state.core.close(now);
        self.flush(state, now);
        state.wake_all();
        self.progress.notify_all();
        self.idle.notify_all();
        self.wake();
    }

    pub(super) fn wake(&self) {
        // Full means that it is awake already.
        let _ = self.wake.write(1);
    }

    /// Wakes the link's own thread if it sleeps while nobody leads.
    pub(super) fn rouse_idle(&self, state: &mut State) {
        if state.idle_asleep && state.leader == Leader::Nobody {
            state.idle_asleep = false;
            self.idle.notify_one();
        }
    }

    /// After a send: a leader that sleeps too long for the timers that it does not know of is woken.
    pub(super) fn wake_if_late(&self, state: &mut State) {
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
    fn receive(&self, state: &mut MutexGuard<'_, State>, via: Via, sock: &Sock, spin: Duration) -> bool {
        let mut buffer = state
            .receive
            .take()
            .unwrap_or_else(|| vec![0; RECEIVE_BYTES].into());
        let outcome = MutexGuard::unlocked(state, || sock.receive(&mut buffer, spin));
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
        let (ready, woken) = MutexGuard::unlocked(state, || {
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
                return (Vec::new(), false);
            }
            let woken = fds.pop().and_then(|fd| fd.any()) == Some(true);
            let ready: Vec<(Via, Arc<Sock>)> = socks
                .iter()
                .zip(&fds)
                .filter(|(_, fd)| fd.any() == Some(true))
                .map(|((via, sock), _)| (*via, Arc::clone(sock)))
                .collect();
            (ready, woken)
        });
        if !matches!(state.leader, Leader::Polling(id, _) if id == me) {
            return None;
        }
        // Only now: one that has been replaced must not take the wake-up from the one that it is meant for.
        if woken {
            let _ = self.wake.read();
        }
        state.leader = Leader::Busy(me);
        let mut came = false;
        for (via, sock) in ready {
            came |= self.receive(state, via, &sock, Duration::ZERO);
            for _ in 1..BATCHES {
                if !readable(&sock) || !self.receive(state, via, &sock, Duration::ZERO) {
                    break;
                }
            }
        }
        Some(came)
    }

    /// Carries out what the core asks for and sends all that it has to send.
    pub(super) fn flush(&self, state: &mut State, now: Instant) {
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
    pub(super) fn new(core: Core, side: Sock, options: Options) -> Self {
        let now = Instant::now();
        let spin = Spin::new(options.spin);
        Self {
            core,
            main: None,
            side: Some(Arc::new(side)),
            options,
            leader: Leader::Nobody,
            next_leader: 1,
            calls: FxHashMap::default(),
            order: Vec::new(),
            waiting: 0,
            idle_asleep: false,
            released: now.checked_sub(SERVING_FOR).unwrap_or(now),
            served: now.checked_sub(SERVING_FOR).unwrap_or(now),
            lost: None,
            established: false,
            receive: Some(vec![0; RECEIVE_BYTES].into()),
            transmit: Vec::new(),
            spin,
        }
    }

    pub(super) fn leader_id(&mut self) -> u64 {
        self.next_leader += 1;
        self.next_leader
    }

    /// How long the link's own thread is to leave the leadership to those who call one time after the other; `None`:
    /// not at all.
    fn idle_nap(&self, now: Instant) -> Option<Duration> {
        let after = if self.calls.is_empty() {
            IDLE_AFTER
        } else {
            WAITED_AFTER
        };
        let rest = after.saturating_sub(now.saturating_duration_since(self.released));
        let serving = now.saturating_duration_since(self.served) < SERVING_FOR || !self.core.is_live();
        (!serving && !rest.is_zero()).then_some(rest)
    }

    /// The latest caller that waits for its reply, if it has not waited for long.
    fn fresh_caller(&mut self, now: Instant) -> Option<&Waiter> {
        while let Some(key) = self.order.last() {
            if self.calls.get(key).is_some_and(|waiter| waiter.reply.is_none()) {
                break;
            }
            self.order.pop();
        }
        let waiter = self.calls.get(self.order.last()?)?;
        (now.saturating_duration_since(waiter.begun) < TICK).then_some(waiter)
    }

    /// Notes a call as the latest one.
    pub(super) fn remember(&mut self, key: CallKey) {
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
                if self
                    .main
                    .as_ref()
                    .is_some_and(|main| !side.is_connected() && main.peer() == Some(remote))
                {
                    // The peer came again from where it was.
                } else if side.is_connected() {
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
