//! From one node to another: the pages go there directly, and home only switches its contact.
//!
//! The guest stands still at its node until home commits ([`Home::moved`]); until then whatever fails lets it go on there. The
//! vessel has no part in it: its workers are idle.

use linklayer::quic::{Link, ReplyTo, STANDSTILL};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind, MoveReport, Phase, Place};

use shim::faults::{self, Point};

use crate::home::Home;
use crate::outward::{HAS_ENDED, Wish};
use crate::process::{Away, Mode, Waiter, send};
use crate::road::{self, Waiting};
use crate::shared::Command;

/// A process that is to go from node to node.
pub struct Hop {
    /// What is asked.
    pub wish: Wish,
    /// The number of this attempt.
    attempt: u64,
    /// The contact to the new node, once that waits for it.
    to: Option<Link>,
}

impl Hop {
    /// It does not come about: nothing of it is left at the new node.
    pub fn fail(self, pid: i32, why: String) {
        self.withdraw(pid).fail(why);
    }

    /// It is not needed any more: the guest has left its node.
    pub fn cancel(self) -> Wish {
        self.wish
    }

    fn withdraw(self, pid: i32) -> Wish {
        if let Some(link) = &self.to {
            send(link, pid, Kind::Discard, &wire::encode(&wire::Pid(pid)));
        }
        self.wish
    }
}

/// The new node waits.
pub struct HopReady {
    contact: Link,
    place: Place,
    key: Vec<u8>,
    /// It can run there before all of its memory has come.
    postcopy: bool,
}

impl Home {
    /// Has a guest sent from its node to another.
    pub(crate) fn hop(&mut self, pid: i32, wish: Wish) {
        let (node, mode) = (wish.node, wish.mode);
        let Some(process) = self.processes.get_mut(&pid) else {
            return;
        };
        let attempt = crate::shared::next_id();
        process.hop = Some(Hop {
            wish,
            attempt,
            to: None,
        });
        let shared = self.shared.clone();
        crate::contact::spawn("hop", move || {
            let ready = shared.contact(node).and_then(|contact| {
                let Waiting {
                    place,
                    key,
                    no_postcopy,
                } = road::listen(&contact, pid).map_err(|e| format!("{e:#}"))?;
                if mode.is_lazy() && !no_postcopy.is_empty() {
                    send(&contact, pid, Kind::Discard, &wire::encode(&wire::Pid(pid)));
                    return Err(format!(
                        "node {node} cannot run it before its memory has come: {no_postcopy}"
                    ));
                }
                Ok(HopReady {
                    contact,
                    place,
                    key: key.to_bytes(),
                    postcopy: no_postcopy.is_empty(),
                })
            });
            shared.post(Command::HopReady(pid, attempt, ready));
        });
    }

    /// The new node waits, or cannot be reached.
    pub(crate) fn hop_ready(
        &mut self,
        pid: i32,
        attempt: u64,
        ready: Result<HopReady, String>,
    ) -> anyhow::Result<()> {
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        // An earlier one may have come to nothing meanwhile.
        let Some(mut hop) = process.hop.take_if(|hop| hop.attempt == attempt) else {
            return Ok(());
        };
        match (ready, &process.mode) {
            (Ok(ready), Mode::Away(away)) => {
                let order = wire::MoveTo {
                    pid,
                    attempt: hop.attempt,
                    place: ready.place,
                    key: ready.key,
                    mode: hop.wish.mode,
                    postcopy: ready.postcopy,
                };
                send(&away.link, pid, Kind::MoveTo, &wire::encode(&order));
                hop.to = Some(ready.contact);
                process.hop = Some(hop);
            }
            (Ok(_), _) => hop.fail(pid, format!("process {pid} has come home meanwhile")),
            (Err(why), _) => hop.fail(
                pid,
                format!("process {pid} stays where it is: {}: {why}", Phase::Reach),
            ),
        }
        Ok(())
    }

    /// The guest stands ready at the new node (the frame came from node `from`): from here on it runs there.
    pub(crate) fn moved(&mut self, reply: ReplyTo, from: u32, moved: wire::Moved) -> anyhow::Result<()> {
        let begun = std::time::Instant::now();
        let pid = moved.pid;
        let Some(process) = self.processes.get_mut(&pid) else {
            // Killed meanwhile, and its guests were discarded.
            reply.errno(libc::ESRCH);
            return Ok(());
        };
        let hop = process.hop.take();
        let (Some(mut hop), Mode::Away(away)) = (hop, &mut process.mode) else {
            reply.errno(libc::EPROTO);
            return Ok(());
        };
        let possible = faults::at(Point::HomeSwitch, pid).is_ok();
        if let Some(to) = hop.to.as_ref().filter(|l| !l.is_live() && l.lost().is_none()) {
            // Whom nothing is heard of does not hear that it is to let it run. It may be heard of soon.
            let (to, shared) = (to.clone(), self.shared.clone());
            process.hop = Some(hop);
            crate::contact::spawn("moved", move || {
                if to.await_live(STANDSTILL) {
                    shared.post(Command::Moved(reply, from, Box::new(moved)));
                } else {
                    reply.errno(libc::EHOSTUNREACH);
                }
            });
            return Ok(());
        }
        let reachable = |l: &&Link| away.node == from && l.lost().is_none();
        let Some(link) = hop.to.as_ref().filter(reachable).filter(|_| possible).cloned() else {
            reply.errno(libc::EHOSTUNREACH);
            // Its node says that it goes on there.
            process.hop = Some(hop);
            return Ok(());
        };
        hop.to = None;
        away.link = link;
        away.node = hop.wish.node;
        away.since = crate::shared::next_id();
        // What was kept comes before the first instruction.
        away.give_kept(pid, true);
        send(&away.link, pid, Kind::LaunchGo, &wire::encode(&wire::Pid(pid)));
        reply.errno(0);
        process.stay = None;
        process.how = "asked";
        process.moves_out += 1;
        let mut report: MoveReport = moved.report;
        report.times.resume_us = begun.elapsed().as_micros() as u64;
        self.publish(pid);
        match self.processes.get_mut(&pid) {
            // The rest of it is on its way.
            Some(process) if report.mode.is_lazy() => process.arriving = Some((hop.wish, report)),
            _ => hop.wish.fulfil(report),
        }
        Ok(())
    }

    /// A guest did not leave its node (`from`).
    pub(crate) fn move_failed(&mut self, from: u32, failed: wire::MoveFailed) -> anyhow::Result<()> {
        let (pid, why) = (failed.pid, &failed.why);
        let mode = self.processes.get(&pid).map(|process| &process.mode);
        let current =
            |away: &Away| away.node == from && (failed.attempt == 0 || failed.attempt >= away.since);
        if !matches!(mode, Some(Mode::Away(away)) if current(away)) {
            // It has got somewhere else in another way, and may be on its way from there.
            tracing::debug!(pid, why, "an earlier move");
            return Ok(());
        }
        tracing::error!(pid, phase = %failed.phase, why, "does not move");
        let away = self.processes.get_mut(&pid).and_then(|p| p.away());
        if failed.stood && away.is_some_and(|away| away.has_pages) {
            self.shared.coming.forget(pid);
            if let Err(e) = self.drop_now(pid) {
                tracing::debug!(pid, error = format!("{e:#}"), "its vessel is not emptied");
            }
        }
        let Some(process) = self.processes.get_mut(&pid) else {
            return Ok(());
        };
        if failed.stood {
            if let Some(away) = process.away() {
                away.give_kept(pid, false);
                away.coming = None;
            }
            self.shared.homecoming.lock().remove(&pid);
            self.shared.held.settle(pid);
            self.shared.objects.forget(pid);
            self.shared.coming.forget(pid);
        }
        // Otherwise those who wait now may wait for another move.
        let of_it = |attempt: u64| failed.stood || attempt == failed.attempt;
        let stays = if shim::process::is_dying(pid) {
            HAS_ENDED.into()
        } else {
            format!(
                "process {pid} stays at node {}: {}: {why}",
                process.node(),
                failed.phase
            )
        };
        let Some(hop) = process.hop.take_if(|hop| of_it(hop.attempt)) else {
            let (over, others) = (process.waiters.drain(..)).partition(|waiter| of_it(waiter.attempt));
            let over: Vec<Waiter> = over;
            process.waiters = others;
            let mut ends = failed.stood;
            for waiter in over {
                ends = true;
                let _ = waiter.done.send(Err(stays.clone()));
            }
            // What is to follow waits for the process to come home, too.
            if ends
                && process.waiters.is_empty()
                && let Some(next) = process.next.take()
            {
                next.fail(stays);
            }
            return Ok(());
        };
        if failed.phase != Phase::Reach {
            hop.fail(pid, stays);
            return Ok(());
        }
        // The nodes do not reach each other, but home reaches both; and those who share memory come together there.
        let mut wish = hop.withdraw(pid);
        wish.before = Some(MoveReport {
            note: format!(
                "by way of home, because it does not go straight to node {}: {why}",
                wish.node
            ),
            ..MoveReport::default()
        });
        process.next = Some(wish);
        let mode = process.next.as_ref().map_or(wire::Mode::Auto, |w| w.mode);
        // On the way home it is not to be refused; whether it can be so at the node is seen there.
        let mode = if mode.is_lazy() { wire::Mode::Auto } else { mode };
        let (arrived, _) = crossbeam_channel::bounded(1);
        self.bring(pid, StayReason::Asked, mode, arrived)
    }
}
