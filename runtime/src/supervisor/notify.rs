//! Threads that take the guests' notifications.
//!
//! Each listener has a pool that always has one thread waiting for the next notification: a thread that receives one
//! and finds nobody else waiting starts another, then handles its own to the end, which may take hours (a read from a
//! terminal). The thread that received a notification also sends the request home and reads the answer (LINK-FACTS:
//! leader/follower), so that a call needs no hand-over between threads. Nor does waking the next receiver cost anything
//! as long as nobody else could call: a listener's only guest thread calls again after its answer at the earliest
//! ([`Turn`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use parking_lot::{Condvar, Mutex};
use shim::notify::{Listener, Notification, Received};

use super::calls;
use super::guest::InCall;
use super::shared::Shared;

/// Idle threads that a pool keeps.
const KEEP_IDLE: i32 = 4;

/// Whose turn it is to receive from a listener, and how many guest threads may call.
#[derive(Default)]
pub struct Turn {
    state: Mutex<TurnState>,
    free: Condvar,
}

#[derive(Default)]
struct TurnState {
    holder: Holder,
    /// Guest threads that this listener serves.
    callers: u32,
    /// Number of the last time that it was kept.
    kept: u64,
}

#[derive(Default, PartialEq)]
enum Holder {
    /// Nobody.
    #[default]
    Nobody,
    /// A thread that receives.
    Receiver,
    /// A thread that handles the call of the only guest thread, and receives again after it.
    Keeper(u64),
}

impl Turn {
    /// A guest thread comes. It must not run yet: its calls must not wait for the end of another's.
    pub fn join(&self) {
        let mut state = self.state.lock();
        state.callers += 1;
        if let Holder::Keeper(_) = state.holder {
            state.holder = Holder::Nobody;
            self.free.notify_one();
        }
    }

    /// A guest thread has ended.
    pub fn leave(&self) {
        self.state.lock().callers -= 1;
    }

    fn take(&self) {
        let mut state = self.state.lock();
        while state.holder != Holder::Nobody {
            self.free.wait(&mut state);
        }
        state.holder = Holder::Receiver;
    }

    fn pass(&self) {
        self.state.lock().holder = Holder::Nobody;
        self.free.notify_one();
    }

    /// After a call was received: passes the turn on, or keeps it when nobody else can call meanwhile.
    fn keep_or_pass(&self) -> Option<u64> {
        let mut state = self.state.lock();
        if state.callers == 1 {
            state.kept += 1;
            state.holder = Holder::Keeper(state.kept);
            return Some(state.kept);
        }
        state.holder = Holder::Nobody;
        drop(state);
        self.free.notify_one();
        None
    }

    /// Takes the turn again that was kept, unless it had to be given away.
    fn take_back(&self, kept: u64) {
        let mut state = self.state.lock();
        if state.holder == Holder::Keeper(kept) {
            state.holder = Holder::Receiver;
            return;
        }
        drop(state);
        self.take();
    }
}

/// The threads of one listener.
pub struct Pool {
    shared: Arc<Shared>,
    listener: Arc<Listener>,
    turn: Arc<Turn>,
    idle: AtomicI32,
}

impl Pool {
    /// Starts taking notifications; it ends by itself when the listener's last guest has ended.
    pub fn start(shared: Arc<Shared>, listener: Arc<Listener>, turn: Arc<Turn>) {
        let pool = Arc::new(Pool {
            shared,
            listener,
            turn,
            idle: AtomicI32::new(1),
        });
        let starter = pool.shared.starter.clone();
        starter.start("notify", move || pool.serve());
    }

    fn add(self: &Arc<Self>) {
        let pool = self.clone();
        let spawned = std::thread::Builder::new()
            .name("notify".into())
            .stack_size(512 << 10)
            .spawn(move || pool.serve());
        if let Err(e) = spawned {
            tracing::error!(error = %e, "no thread for notifications");
        }
    }

    fn serve(self: Arc<Self>) {
        let mut kept = None;
        loop {
            match kept.take() {
                Some(kept) => self.turn.take_back(kept),
                None => self.turn.take(),
            }
            let received = self.listener.recv(None, -1);
            let notification = match received {
                Ok(Received::Call(n)) => n,
                Ok(Received::Woken) => {
                    self.turn.pass();
                    continue;
                }
                // The last guest of this listener is gone.
                Ok(Received::Ended) => return self.turn.pass(),
                Err(e) => {
                    tracing::error!(error = %e, "listener");
                    return self.turn.pass();
                }
            };
            // Somebody must be there to receive when the turn is passed on, now or by a new guest thread.
            if self.idle.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.idle.fetch_add(1, Ordering::AcqRel);
                self.add();
            }
            kept = self.turn.keep_or_pass();
            self.handle(&notification);
            if self.idle.fetch_add(1, Ordering::AcqRel) >= KEEP_IDLE && kept.is_none() {
                self.idle.fetch_sub(1, Ordering::AcqRel);
                return;
            }
        }
    }

    fn handle(&self, notification: &Notification) {
        let outer = notification.tid;
        let Some(thread) = self.shared.thread(outer) else {
            // Its thread was reaped between the notification and now.
            tracing::debug!(outer, "notification of an unknown thread");
            return;
        };
        thread.answered.store(false, Ordering::Release);
        *thread.call.lock() = InCall::Busy(notification.id);
        calls::handle(&self.shared, &thread, notification);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_turn_is_kept_while_one_thread_calls() {
        let turn = Arc::new(Turn::default());
        turn.join();
        turn.take();
        let first = turn.keep_or_pass();
        assert!(first.is_some());
        turn.take_back(first.unwrap_or(0));

        let kept = turn.keep_or_pass().unwrap_or(0);
        let (say, said) = mpsc::channel();
        let other = turn.clone();
        let waiting = std::thread::spawn(move || {
            other.take();
            let _ = say.send(());
            other.pass();
        });
        assert!(said.recv_timeout(Duration::from_millis(50)).is_err());
        // A second thread must not wait for the end of the first one's call.
        turn.join();
        assert!(said.recv_timeout(Duration::from_secs(10)).is_ok());
        assert!(waiting.join().is_ok());
        turn.take_back(kept);
        assert_eq!(turn.keep_or_pass(), None);
        turn.leave();
        turn.take();
        assert!(turn.keep_or_pass().is_some());
    }
}
