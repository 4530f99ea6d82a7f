//! Guests that run before all of their memory has come.
//!
//! Nothing of this node reads a page that is still missing without waiting for it ([`ProcessMemory::comes_by`]), and what copies a
//! whole memory waits until it is whole: a fork (the kernel would give the child zeros), and a capture.
//!
//! [`ProcessMemory::comes_by`]: shim::memory::ProcessMemory::comes_by

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use linklayer::image::ProcessImage;
use linklayer::quic::Link;
use linklayer::wire::{self, Kind, Settled};
use shim::postcopy::{End, Pager, watched};
use shim::ptrace::Stopped;
use shim::userfault::Userfault;

use super::guest::Guest;
use super::shared::{Command, Shared};
use super::tracer::Tracer;

/// Where a link's frames find who brings the pages that come later.
pub type PagerSlot = Arc<OnceLock<Arc<Pager>>>;

/// Pages that come when the guest runs.
pub struct Later {
    /// Which, in the order of addresses.
    pub runs: Vec<(u64, u64)>,
    /// The link by which they come.
    pub link: Link,
    /// Who is to get what comes.
    pub pager: PagerSlot,
}

/// Makes a guest that stands ready, and does not run yet, one whose pages come later. `userfault` was made by it.
///
/// # Errors
/// The kernel does not watch its memory.
pub(super) fn begin(
    shared: &Arc<Shared>,
    guest: &Arc<Guest>,
    image: &ProcessImage,
    userfault: OwnedFd,
    later: Later,
) -> anyhow::Result<()> {
    let memory = Userfault::begin(userfault, false).context("userfaultfd")?;
    for range in watched(image, &later.runs) {
        memory
            .register(&range)
            .with_context(|| format!("watching memory at {:#x}", range.start))?;
    }
    let runs = later.runs.iter().map(|(start, end)| *start..*end);
    let pager = Arc::new(Pager::new(guest.pid, memory, runs, later.link)?);
    guest.memory.comes_by(pager.clone());
    let _ = later.pager.set(pager.clone());
    let (starter, shared, guest) = (shared.starter.clone(), shared.clone(), guest.clone());
    starter.start("pager", move || {
        let tell = &mut |progress| super::departure::tell_progress(&shared, guest.pid, &progress);
        pager.serve(tell, |end| ended(&shared, &guest, end));
    });
    Ok(())
}

/// A guest has all of its memory, or never will.
fn ended(shared: &Shared, guest: &Guest, end: End) {
    let pid = guest.pid;
    let (after, lost) = match end {
        End::Whole(after) | End::Needless(after) => (after, String::new()),
        End::Lost(why) => {
            tracing::error!(
                pid,
                why,
                "its memory cannot be had any more from where it came; it is killed"
            );
            (wire::After::default(), why)
        }
    };
    let is_lost = !lost.is_empty();
    // Home hears why before it hears that it has ended.
    let body = Settled { pid, after, lost };
    shared.tell(pid, Kind::Settled, &wire::encode(&body));
    if is_lost {
        // With those that borrow its memory: they would go on with zeros.
        let guests: Vec<Arc<Guest>> = shared.guests.read().values().cloned().collect();
        for one in guests.iter().filter(|one| one.space == guest.space) {
            if let Err(e) = shim::signal::kill_by(&one.exited) {
                tracing::debug!(pid = one.pid, error = %e, "kill");
            }
        }
    }
    shared.post(Command::Settled);
}

impl Tracer {
    /// Whether a guest runs without all of its memory.
    pub(super) fn is_incomplete(&self, pid: i32) -> bool {
        self.shared
            .guests
            .read()
            .get(&pid)
            .is_some_and(|guest| guest.memory.pager().is_some())
    }

    /// A thread that is about to fork waits until its guest has all of its memory.
    pub(super) fn fork_later(&mut self, outer: i32, stopped: Stopped) {
        self.forks.insert(outer, stopped);
    }

    /// A guest has all of its memory: what waited for that goes on.
    pub(super) fn settled(&mut self) -> anyhow::Result<()> {
        let whole: Vec<i32> = self
            .forks
            .keys()
            .copied()
            .filter(|outer| {
                let thread = self.threads.get(outer);
                thread.is_none_or(|t| t.thread.guest.memory.pager().is_none())
            })
            .collect();
        for outer in whole {
            if let Some(stopped) = self.forks.remove(&outer)
                && self.threads.contains_key(&outer)
                && let Err(e) = self.clone_begins(outer, stopped)
            {
                tracing::debug!(outer, error = format!("{e:#}"), "fork");
            }
        }
        let held: Vec<i32> = self.holds.keys().copied().collect();
        held.into_iter().try_for_each(|pid| self.all_held(pid))
    }
}
