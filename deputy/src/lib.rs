//! The home half of a job: vessel control, execution of forwarded calls, signal relay, children.
//!
//! [`serve`] is a deputy's life. It seizes the job's first process and ends when its last one has ended.

mod adopt;
pub mod calls;
mod coming;
mod contact;
mod entry;
mod files;
mod held;
mod home;
mod homeward;
mod hop;
mod kept;
mod launch;
mod others;
mod outward;
mod postcopy;
mod process;
mod resend;
mod restarts;
mod road;
pub mod shared;
mod signals;
mod terminal;
mod together;
mod vessel;
mod waits;

use std::sync::Arc;

use anyhow::Context;
use linklayer::frame::Header;
use linklayer::wire::{self, Kind};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};

pub use adopt::LeftOut;
pub use outward::{Done, Outcome, Wish};
pub use shared::{Cluster, Command, Contacted, ProcessView, Shared};

/// A deputy that has not seized anybody yet.
pub struct Deputy {
    shared: Arc<Shared>,
    home: home::Home,
}

impl Deputy {
    /// Prepares a deputy; the calling thread becomes the tracer. To be called before any other thread exists, so that
    /// all inherit a blocked SIGCHLD and SIGIO.
    ///
    /// # Errors
    /// When the kernel gives no descriptors or no memory.
    pub fn new(cluster: Arc<dyn Cluster>) -> anyhow::Result<Deputy> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        // Tells that somebody wants a file that is held.
        set.add(Signal::SIGIO);
        set.thread_block()?;
        let (send, receive) = crossbeam_channel::unbounded();
        let wake = Arc::new(EventFd::from_flags(
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?);
        let shared = Shared::new(send, wake.clone(), cluster);
        let home = home::Home::new(shared.clone(), receive, wake)?;
        Ok(Deputy { shared, home })
    }

    /// What other threads may use.
    pub fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Becomes the tracer of a process, which is about to execute the job's program. With `outlives`, processes at home go on when
    /// the deputy ends before them.
    ///
    /// # Errors
    /// When it may not be traced: another tracer has it, or a security module forbids it.
    pub fn seize(&mut self, pid: i32, outlives: bool) -> anyhow::Result<()> {
        if outlives {
            home::Home::let_outlive();
        }
        shim::ptrace::seize(pid, home::Home::options()).context("the program cannot be traced")?;
        self.home.adopt_first(pid);
        Ok(())
    }

    /// Becomes the tracer of a process that runs already, with all its threads and descendants; gives the descendants that
    /// were left out, with reasons.
    ///
    /// # Errors
    /// When the process itself may not be traced; it is as it was.
    pub fn adopt(&mut self, pid: i32) -> anyhow::Result<Vec<LeftOut>> {
        home::Home::let_outlive();
        self.home.adopt_tree(pid)
    }

    /// Serves the job to its end, then ends its supervisors.
    ///
    /// # Errors
    /// When the tracer itself fails; the kernel then kills what is traced.
    pub fn serve(mut self) -> anyhow::Result<()> {
        let result = self.home.run();
        held::release_all(&self.shared);
        for Contacted { link, .. } in self.shared.links.lock().values() {
            let header = Header::new(Kind::End as u16, 0, link.next_seq());
            if let Err(e) = link.send(0, header, &[&wire::encode(&wire::Errno(0))]) {
                tracing::debug!(error = %e, "end not said");
            }
            link.close();
        }
        result
    }
}
