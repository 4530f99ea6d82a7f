//! Threads that take the guests' notifications.
//!
//! Each listener has a pool that always has one thread waiting for the next notification: a thread that receives one
//! and finds nobody else waiting starts another, then handles its own to the end, which may take hours (a read from a
//! terminal). The thread that received a notification also sends the request home and reads the answer (LINK-FACTS:
//! leader/follower), so that a call needs no hand-over between threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use shim::notify::{Listener, Notification, Received};

use super::calls;
use super::guest::InCall;
use super::shared::Shared;

/// Idle threads that a pool keeps.
const KEEP_IDLE: i32 = 4;

/// The threads of one listener.
pub struct Pool {
    shared: Arc<Shared>,
    listener: Arc<Listener>,
    idle: AtomicI32,
}

impl Pool {
    /// Starts taking notifications; it ends by itself when the listener's last guest has ended.
    pub fn start(shared: Arc<Shared>, listener: Arc<Listener>) {
        let pool = Arc::new(Pool {
            shared,
            listener,
            idle: AtomicI32::new(1),
        });
        pool.add();
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
        loop {
            let notification = match self.listener.recv(None, -1) {
                Ok(Received::Call(n)) => n,
                Ok(Received::Woken) => continue,
                // The last guest of this listener is gone.
                Ok(Received::Ended) => return,
                Err(e) => {
                    tracing::error!(error = %e, "listener");
                    return;
                }
            };
            if self.idle.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.idle.fetch_add(1, Ordering::AcqRel);
                self.add();
            }
            self.handle(&notification);
            if self.idle.fetch_add(1, Ordering::AcqRel) >= KEEP_IDLE {
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
        *thread.call.lock() = InCall::Busy(notification.id);
        calls::handle(&self.shared, &thread, notification);
    }
}
