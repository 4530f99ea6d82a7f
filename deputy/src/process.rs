//! A process of the job and its threads, as the tracer keeps them.

use std::sync::Arc;

use crate::entry::Breakpoint;
use crate::hop::Hop;
use crate::kept::Kept;
use crate::outward::{Done, Leaving, Wish};
use crossbeam_channel::Sender;
use linklayer::image::{Area, SigAction, Sleep};
use linklayer::quic::{Link, ReplyTo};
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind};
use shim::postcopy::Pager;
use shim::ptrace::Stopped;
use shim::restore::Room;
use shim::timed::{Look, Timed};
use shim::vessel::Vessel;

use crate::calls::Worker;
use crate::shared::ProcessView;

/// What a thread of the job is at home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It runs its program at home.
    Native,
    /// It executes forwarded calls.
    Worker,
    /// It takes the vessel's signals.
    Catcher,
}

/// A thread.
pub struct Task {
    /// Its id.
    pub tid: i32,
    /// Its process.
    pub pid: i32,
    /// What it is.
    pub role: Role,
    /// The call to be interrupted at its next stop: set by a request to interrupt.
    pub interrupting: Option<u64>,
    /// A clone in progress in it.
    pub cloning: Option<Cloning>,
    /// Where the answer to an exec in progress goes, and what the new image inherits.
    pub executing: Option<(ReplyTo, wire::Exec)>,
    /// Who waits for its end, and whether it is the process's last thread.
    pub ending: Option<(ReplyTo, bool)>,
    /// Its worker, when that has been told to end: until the thread has ended, it reads that in its slot, which must not be
    /// another's.
    pub ends: Option<Arc<Worker>>,
    /// The wait that it was seen in, which the kernel restarts under another number, and the registers that tell it again.
    pub waiting: Option<(u32, [u64; 8])>,
    /// How it looked when it was interrupted so as to leave home.
    pub seen: Option<Look>,
    /// The wait with a relative timeout that it was then taken out of.
    pub timed: Option<Timed>,
    /// It is in a group-stop.
    pub group_stopped: bool,
    /// It makes calls for us that cannot wait until its group-stop has ended.
    pub lent: bool,
    /// Signals for this thread alone, which its worker must not block.
    pub unblocked: u64,
    /// Calls that make such signals come, with their results; they end when the signal is unblocked.
    pub unblocking: Vec<(crate::calls::Pending, i64)>,
    /// What is to be done at its next stop for a call that a terminal may stop.
    pub exposure: Option<crate::terminal::Step>,
}

/// A clone that a vessel thread executes.
pub struct Cloning {
    /// Where the answer goes.
    pub reply: ReplyTo,
    /// What was asked.
    pub request: wire::Clone,
    /// The child's slot.
    pub slot: Option<shim::vessel::Slot>,
    /// The child, once its parent's event told.
    pub child: Option<i32>,
    /// The call's result, once it ended.
    pub ret: Option<i64>,
    /// The child is set up and waits in its stub.
    pub ready: bool,
}

impl Task {
    /// A running thread.
    pub fn new(tid: i32, pid: i32, role: Role) -> Task {
        Task {
            tid,
            pid,
            role,
            interrupting: None,
            cloning: None,
            executing: None,
            ending: None,
            ends: None,
            waiting: None,
            seen: None,
            timed: None,
            group_stopped: false,
            lent: false,
            unblocked: 0,
            unblocking: Vec::new(),
            exposure: None,
        }
    }

    /// It is gone: nobody must wait for its calls any longer.
    pub fn end_calls(&mut self) {
        for (pending, ret) in self.unblocking.drain(..) {
            pending.finish(ret);
        }
        if let Some(step) = self.exposure.take() {
            step.give_up();
        }
    }
}

/// Where a process is and what is happening to it.
pub enum Mode {
    /// It runs at home.
    Native,
    /// It stands at its entry point while a guest is built from it.
    Launching(Vec<Stopped>, u32),
    /// Its user half is away; here is its vessel.
    Away(Box<Away>),
}

/// The home half of a process whose user half is away.
pub struct Away {
    /// The emptied process.
    pub vessel: Vessel,
    /// Node its guest runs on.
    pub node: u32,
    /// Contact to its supervisor.
    pub link: Link,
    /// The vessel is stopped by job control.
    pub frozen: bool,
    /// Somebody has asked that the guest stands still.
    pub asked: bool,
    /// The guest was told to stand still.
    pub told: bool,
    /// The catcher has taken the SIGCONT that ended the last group-stop.
    pub continued: bool,
    /// Workers that left a group-stop, kept until the SIGCONT that ended it has been relayed.
    pub parked: Vec<Stopped>,
    /// The image of a guest on its way home, and how long it took to adapt the layout to it.
    pub coming: Option<(Box<wire::Homecoming>, std::time::Duration)>,
    /// Attempts to move it with lower numbers were made before it got there.
    pub since: u64,
    /// What its guest was sent.
    pub sent: crate::resend::Sent,
    /// What its catcher has taken of several signals that were pending at once, with the lane of each.
    pub gathered: Vec<(u32, wire::Signal)>,
    /// What is kept back for a guest that stands still so as to move.
    pub kept: Option<Kept>,
    /// Calls that a terminal may stop.
    pub exposed: crate::terminal::Exposed,
    /// The vessel is not empty: pages of its guest, which may be old, have been put into it.
    pub has_pages: bool,
    /// Private memory of a guest that comes home, for which there is to be room, and who waits for that.
    pub wants_room: Option<(Vec<Area>, WantsRoom)>,
    /// All of its memory is where its guest is: who waits until the vessel has dropped its pages. It is said by dropping this.
    pub emptying: Option<Sender<()>>,
}

/// Who waits for room in a vessel.
pub type WantsRoom = Sender<Result<Room, String>>;

impl Away {
    /// Of a vessel that runs.
    pub fn new(vessel: Vessel, node: u32, link: Link) -> Away {
        Away {
            vessel,
            node,
            link,
            frozen: false,
            asked: false,
            told: false,
            continued: false,
            parked: Vec::new(),
            coming: None,
            since: crate::shared::next_id(),
            sent: crate::resend::Sent::default(),
            gathered: Vec::new(),
            exposed: crate::terminal::Exposed::default(),
            kept: None,
            emptying: None,
            has_pages: false,
            wants_room: None,
        }
    }
}

/// A process.
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// Where it is.
    pub mode: Mode,
    /// The breakpoint at its entry point, while its loader runs.
    pub breakpoint: Option<Breakpoint>,
    /// The node it is to start on when it gets to its entry point.
    pub target: Option<u32>,
    /// Signal dispositions of the guest.
    pub actions: Vec<SigAction>,
    /// It is being stopped so as to leave home.
    pub leaving: Option<Leaving>,
    /// The move that is under way.
    pub departure: Option<Wish>,
    /// The move whose process runs at its new place already, but without all of its memory.
    pub arriving: Option<(Wish, wire::MoveReport)>,
    /// Where it goes when it has come home.
    pub next: Option<Wish>,
    /// It is to go from its node to another.
    pub hop: Option<Hop>,
    /// Somebody has asked that it stands still where it is.
    pub frozen: bool,
    /// Its threads that stand still at home for that.
    pub standing: Vec<Stopped>,
    /// How often it has left home or gone from node to node.
    pub moves_out: u64,
    /// How often it has come home.
    pub moves_home: u64,
    /// It is being stopped to leave home with others: the one that was asked for.
    pub together: Option<i32>,
    /// Moves that wait until no thread waits for the child of a vfork, and of which process.
    pub after_vfork: Vec<(i32, Wish)>,
    /// Threads that wait for the child of a vfork.
    pub vforking: u32,
    /// Why it is at home.
    pub stay: Option<StayReason>,
    /// How it got where it is.
    pub how: &'static str,
    /// The signal of which its guest died and it is to die.
    pub dying: Option<i32>,
    /// The stop signal that its guest has taken.
    pub stopping: Option<i32>,
    /// Signals that were pending when it was described for another node: they went with it, and its vessel forgets them.
    pub carried: Vec<linklayer::image::SigInfo>,
    /// Waits with a relative timeout of its threads at home, which begin anew when they go on.
    pub sleeps: Vec<(i32, Sleep)>,
    /// The processes on whose memory its program has worked, and may work again without being seen.
    pub works_on: Vec<i32>,
    /// Who waits for it to come home.
    pub waiters: Vec<Waiter>,
    /// It is at home, but some of its memory is still coming.
    pub pager: Option<Arc<Pager>>,
    /// Who is to be told what when it has come.
    pub came: Option<(Vec<Waiter>, wire::MoveReport)>,
}

/// Who waits for a process to come home.
pub struct Waiter {
    /// The attempt that was begun for it ([`wire::Bring::attempt`]).
    pub attempt: u64,
    /// Told what came of it.
    pub done: Done,
}

impl Process {
    /// A process in this mode.
    pub fn new(pid: i32, mode: Mode) -> Process {
        let actions = vec![SigAction::default(); 64];
        Process {
            pid,
            mode,
            breakpoint: None,
            target: None,
            actions,
            leaving: None,
            departure: None,
            arriving: None,
            next: None,
            together: None,
            after_vfork: Vec::new(),
            hop: None,
            frozen: false,
            standing: Vec::new(),
            moves_out: 0,
            moves_home: 0,
            vforking: 0,
            stay: None,
            how: "started",
            dying: None,
            stopping: None,
            carried: Vec::new(),
            sleeps: Vec::new(),
            works_on: Vec::new(),
            waiters: Vec::new(),
            pager: None,
            came: None,
        }
    }

    /// The node its user half is on; 0 is home.
    pub fn node(&self) -> u32 {
        match &self.mode {
            Mode::Away(away) => away.node,
            _ => 0,
        }
    }

    /// Whether its threads are being stopped so that it can leave home.
    pub fn stops_to_leave(&self) -> bool {
        self.together.is_some() || self.leaving.as_ref().is_some_and(Leaving::stops)
    }

    /// Whether its threads stand still, or are to, while it runs at home.
    pub fn is_to_be_held(&self) -> bool {
        self.frozen || self.stops_to_leave()
    }

    /// Its home half, when its user half is away.
    pub fn away(&mut self) -> Option<&mut Away> {
        match &mut self.mode {
            Mode::Away(away) => Some(away),
            _ => None,
        }
    }

    /// Whether somebody has asked for a move of it that has not ended.
    pub fn is_moving(&self) -> bool {
        self.breakpoint.is_some()
            || self.leaving.is_some()
            || self.hop.is_some()
            || self.next.is_some()
            || self.together.is_some()
            || !self.waiters.is_empty()
    }

    /// It was to be moved and cannot be.
    pub fn stay_at_home(&mut self, reason: StayReason) {
        if let Some(wish) = self.departure.take() {
            wish.fail(format!("process {} stays at home: {reason}", self.pid));
        }
        self.stay = Some(reason);
    }

    /// Tells the supervisor that the guest's process is no more.
    pub fn discard_guest(&self) {
        if let Mode::Away(away) = &self.mode {
            send(
                &away.link,
                self.pid,
                Kind::Discard,
                &wire::encode(&wire::Pid(self.pid)),
            );
        }
    }

    /// It has ended or executed another program: what was still coming of its memory is of no use.
    pub fn needs_no_more(&mut self) {
        if let Some((waiters, report)) = self.came.take() {
            // It may have been killed because the rest is lost, which is told later.
            let lost = self.pager.as_ref().and_then(|pager| pager.loss());
            let outcome = match lost {
                Some(why) => Err(crate::postcopy::lost_words(self.pid, "home", &why)),
                None => Ok(crate::postcopy::ended_before(report)),
            };
            for waiter in waiters {
                let _ = waiter.done.send(outcome.clone());
            }
        }
        if let Some((wish, report)) = self.arriving.take() {
            wish.fulfil(crate::postcopy::ended_before(report));
        }
    }

    /// It has ended: answers all who wait for something of it.
    pub fn fail_waiters(mut self, why: &str) {
        self.needs_no_more();
        self.fail_moves(why);
    }

    /// Answers those who wait for it to come home or to go somewhere: it did not.
    pub fn fail_moves(&mut self, why: &str) {
        let wishes = [
            self.leaving.take().map(|l| l.wish),
            self.departure.take(),
            self.next.take(),
        ];
        for wish in wishes.into_iter().flatten() {
            wish.fail(why.to_string());
        }
        if let Some(hop) = self.hop.take() {
            hop.fail(self.pid, why.to_string());
        }
        for waiter in self.waiters.drain(..) {
            let _ = waiter.done.send(Err(why.to_string()));
        }
    }

    /// What others may know of it.
    pub fn view(&self, forwarded: u64) -> ProcessView {
        ProcessView {
            pid: self.pid,
            node: self.node(),
            how: self.how.into(),
            stay: self.stay.clone(),
            forwarded,
            moves_out: self.moves_out,
            moves_home: self.moves_home,
        }
    }
}

/// Sends a message about a process on the lane of its pid. A lost contact is noticed elsewhere.
pub fn send(link: &Link, pid: i32, kind: Kind, body: &[u8]) {
    if let Err(e) = link.tell(pid, pid, kind, &[body]) {
        tracing::debug!(pid, ?kind, error = %e, "message not sent");
    }
}
