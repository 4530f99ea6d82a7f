//! One end of a link, as its users see it.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::core::Core;
use super::lead::{DELIVERING, Shared, State, Waiter};
use super::socket::Sock;
use super::{Fingerprint, LinkError, OneTimeKey, Options, Stats};
use crate::frame::{Header, flags};

/// How long [`Link::close`] waits for the peer to acknowledge what was sent.
const LINGER: Duration = Duration::from_secs(1);

/// The user of a link. All methods are called by the thread that leads at that moment, one at a time and without any
/// lock held: they may send on the link but must not block, and must not call on the same link.
pub trait Handler: Send + Sync + 'static {
    /// A frame that is not the reply to a waiting call arrived. Frames of a lane come in the order they were sent.
    fn frame(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>);
    /// The link is over; said once. Not said when this end closed it, nor of a link that never stood.
    fn lost(&self, why: &LinkError);
    /// Nothing is heard from the peer, or the connection broke; the link tries to go on.
    fn interrupted(&self) {}
    /// The link goes on. Nothing was lost and nothing comes twice.
    fn restored(&self) {}
}

/// One end of a link; clones are the same end. When the last clone is dropped, the link is closed as by [`Link::close`]
/// but without waiting.
pub struct Link {
    pub(super) shared: Arc<Shared>,
    /// Whether it is one of the user's, which keep the link open.
    counted: bool,
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
        let options = options.clone().fitted(side.tune(&options));
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
        let name = options.thread_name.clone();
        let state = State::new(core, side, options);
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

    /// Waits until the peer has acknowledged all but so much of what was sent. Not inside [`Handler::frame`].
    ///
    /// # Errors
    /// The link is lost.
    pub fn await_sent(&self, most_bytes: usize) -> Result<(), LinkError> {
        let mut state = self.shared.state.lock();
        self.drive(&mut state, None, |state| {
            (state.core.kept_bytes() <= most_bytes).then_some(())
        })
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
                begun: Instant::now(),
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
                self.shared.progress.wait_for(&mut state, LINGER / 100);
                state.waiting -= 1;
            }
        }
        self.shared.shut_down(&mut state);
    }

    /// Changes [`Options::give_up_after`] of this end.
    pub fn be_patient(&self, give_up_after: Duration) {
        self.shared.state.lock().core.be_patient(give_up_after);
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.shared.state.lock().core.stats()
    }

    /// The address of this end's first socket.
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.local
    }

    /// Whether a connection stands on which the peer was heard of lately ([`Options::silence`]).
    pub fn is_live(&self) -> bool {
        self.shared.state.lock().core.is_live()
    }

    /// Waits until it does, or is lost, or for so long; says whether it does. Not inside [`Handler::frame`].
    pub fn await_live(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.state.lock();
        while !state.core.is_live() {
            if state.lost.is_some() || Instant::now() >= deadline {
                return false;
            }
            self.shared.rouse_idle(&mut state);
            state.waiting += 1;
            self.shared.progress.wait_until(&mut state, deadline);
            state.waiting -= 1;
        }
        true
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
