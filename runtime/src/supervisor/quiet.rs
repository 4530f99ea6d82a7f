//! A guest that stands still is captured only when nothing more can arrive for it.
//!
//! Home is asked to keep back what comes for it. What home sent before has arrived when the answer does, because it travels on
//! the lanes of its threads, whose calls have all been answered, or on the process's own.

use linklayer::wire::{self, Kind};

use super::shared::Command;
use super::tracer::Tracer;

/// What home was asked about a guest that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quiet {
    /// It was asked, with this number, and has not answered.
    Asked(u64),
    /// It keeps everything back.
    Kept,
}

impl Tracer {
    /// Whether home keeps back what arrives for these guests. If not, it is asked to, and the guests' stops are looked at again
    /// when it does.
    pub(super) fn is_quiet(&mut self, pids: &[i32]) -> bool {
        let mut quiet = true;
        for pid in pids {
            match self.quiet.get(pid) {
                Some(Quiet::Kept) => continue,
                Some(Quiet::Asked(_)) => {}
                None => {
                    let number = self.next_quiet;
                    self.next_quiet += 1;
                    self.quiet.insert(*pid, Quiet::Asked(number));
                    let (shared, pid) = (self.shared.clone(), *pid);
                    self.shared.starter.start("quiet", move || {
                        let body = wire::encode(&wire::Pid(pid));
                        let answer = shared.ask(pid, pid, Kind::KeepBack, &body);
                        let kept = answer
                            .ok()
                            .and_then(|answer| wire::decode(&answer).ok())
                            .is_some_and(|wire::Errno(errno)| errno == 0);
                        shared.post(Command::Quiet(pid, number, kept));
                    });
                }
            }
            quiet = false;
        }
        quiet
    }

    /// Home answered.
    pub(super) fn home_keeps_back(&mut self, pid: i32, number: u64, kept: bool) -> anyhow::Result<()> {
        if self.quiet.get(&pid) != Some(&Quiet::Asked(number)) {
            // It goes on already, and may have been stopped again; or it is another guest.
            return Ok(());
        }
        self.quiet.remove(&pid);
        if !kept {
            // The process ends at home at this moment, and its guest is going to be discarded.
            return Ok(());
        }
        self.quiet.insert(pid, Quiet::Kept);
        self.all_held(pid)
    }
}
