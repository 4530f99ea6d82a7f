//! A fault in each part of a move, on each side: the process goes on at one place, or ends because the node with its only copy was
//! lost; whoever asked for the move is told in which part it failed.

use std::time::{Duration, Instant};

use linklayer::wire::Mode;
use tests::build::{Link, guest};
use tests::compare::{End, How};
use tests::faults::await_none;
use tests::lab::Lab;
use tests::mover::Steering;
use tests::or_skip;
use tests::running::Running;
use tests::skip::Skip;

/// What is left of a process that was to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// It goes on where it was.
    There,
    /// It goes on where it was to go.
    Gone,
    /// It was lost with its node.
    Lost,
}

/// How soon somebody who waits for a move hears that a supervisor has ended, on a busy machine: before a link is given up
/// on which nothing is heard.
const SOON: Duration = Duration::from_secs(40);

struct Faults {
    lab: std::sync::Arc<Lab>,
    points: tests::faults::Faults,
    steering: Steering,
    program: String,
}

impl Faults {
    fn new() -> Result<Self, Skip> {
        let lab = Lab::shared()?;
        let program = guest("rain", Link::Dynamic)?;
        Ok(Self {
            points: tests::faults::Faults::of(&lab, 3),
            steering: Steering::of(&lab),
            program: program.to_string_lossy().into_owned(),
            lab,
        })
    }

    /// Moves a process from node 2 to `to` with a fault on node `at`, and looks at what becomes of it. `words`: what the error says.
    fn try_out(&self, to: u32, at: u32, fault: &str, left: Left, words: &[&str]) {
        self.try_way((2, to), (Mode::Precopy, at), fault, left, words);
    }

    /// The same from any node, and in any way.
    fn try_way(
        &self,
        (from, to): (u32, u32),
        (mode, at): (Mode, u32),
        fault: &str,
        left: Left,
        words: &[&str],
    ) {
        let how = if from == 0 { How::Home } else { How::Away(from) };
        let mut job = Running::start(&self.lab, how, [&self.program]);
        let pid = job.number();
        let (point, does) = fault.split_once(' ').expect("a point and what happens");
        let what = format!("{fault} on node {at}, from {from} to {to} by {mode:?}");
        // A supervisor is there already, as when it has been there before.
        if to != 0 {
            self.steering
                .migrate(pid as u32, to, Mode::Freeze)
                .expect("a move");
            self.steering
                .migrate(pid as u32, from, Mode::Freeze)
                .expect("a move");
        }
        let fault = self.points.arm(at, point, Some(pid), does);
        let begun = Instant::now();
        let result = self.steering.migrate_into(pid as u32, (from, to), mode, &fault);
        let took = begun.elapsed();
        eprintln!("{what}: {took:?}: {:?}", result.as_ref().map(|r| &r.note));
        // The last part of a move may come after it was reported.
        assert!(fault.await_it(), "{what}: it did not come to that: {result:?}");
        assert!(took < SOON, "{what}: it took {took:?} to hear of it");
        match left {
            Left::There | Left::Gone => {
                assert_eq!(result.is_ok(), left == Left::Gone, "{what}: {result:?}");
                if let Err(why) = &result {
                    assert!(words.iter().all(|word| why.contains(word)), "{what}: {why}");
                }
                // It runs, and all of its threads get on.
                job.write("\n");
                assert_eq!(job.line(), "0 0", "{what}");
                // And it can be moved.
                self.steering
                    .migrate(pid as u32, 0, Mode::Auto)
                    .unwrap_or_else(|why| panic!("{what}: then home: {why}"));
                job.write("\n");
                assert_eq!(job.line(), "0 0", "{what}, at home");
                assert_eq!(job.wait(), End::Code(0), "{what}");
            }
            Left::Lost => {
                assert!(result.is_err(), "{what}: {result:?}");
                assert_eq!(job.wait(), End::Signal(9), "{what}");
            }
        }
        // Exactly one, or none: nothing runs on, anywhere.
        await_none(&self.lab, &[1, 2, 3], "guests/.*/[r]ain", Duration::from_secs(10));
    }
}

impl Faults {
    /// The page store of node 3 has no room for what a process brings.
    fn try_keeping(&self, mode: Mode) {
        let mut job = Running::start(&self.lab, How::Away(2), [&self.program]);
        let pid = job.number();
        let fault = self.points.arm(3, "target-keep", None, "memory");
        self.steering.migrate(pid as u32, 3, mode).expect("a move");
        assert!(fault.await_it(), "{mode:?}: nothing is kept");
        for to in [0, 3] {
            job.write("\n");
            assert_eq!(job.line(), "0 0");
            self.steering.migrate(pid as u32, to, mode).expect("a move");
        }
        job.write("\n");
        assert_eq!(job.line(), "0 0");
        assert_eq!(job.wait(), End::Code(0));
    }
}

#[test]
fn the_target_is_lost() {
    let faults = or_skip!(Faults::new());
    let sending: &[&str] = &["stays at node 2", "sending it"];
    faults.try_out(3, 3, "target-reach end", Left::There, &["stays"]);
    faults.try_out(3, 3, "target-precopy end", Left::There, &["stays at node 2"]);
    faults.try_out(3, 3, "target-transfer end", Left::There, sending);
    faults.try_out(3, 3, "target-restore end", Left::There, sending);
}

/// From the commit on its only copy is there.
#[test]
fn the_target_is_lost_when_it_runs_there() {
    let faults = or_skip!(Faults::new());
    let mut job = Running::start(&faults.lab, How::Away(2), [&faults.program]);
    let pid = job.number();
    let fault = faults.points.arm(3, "target-resume", Some(pid), "end");
    let moved = faults.steering.migrate(pid as u32, 3, Mode::Freeze);
    assert!(moved.is_ok(), "{moved:?}");
    assert_eq!(job.wait_within(SOON), End::Signal(9));
    assert!(fault.happened());
}

#[test]
fn the_target_has_no_memory() {
    let faults = or_skip!(Faults::new());
    let building: &[&str] = &["stays at node 2", "building it there", "no memory"];
    faults.try_out(
        3,
        3,
        "target-reach memory",
        Left::There,
        &["stays", "reaching", "no memory"],
    );
    faults.try_out(3, 3, "target-restore memory", Left::There, building);
}

#[test]
fn the_source_has_no_memory() {
    let faults = or_skip!(Faults::new());
    for to in [3, 0] {
        faults.try_out(to, 2, "source-precopy memory", Left::Gone, &[]);
        faults.try_out(
            to,
            2,
            "source-seize memory",
            Left::There,
            &["stays at node 2", "no memory"],
        );
        faults.try_out(
            to,
            2,
            "source-dump memory",
            Left::There,
            &["stays at node 2", "no memory"],
        );
        faults.try_out(
            to,
            2,
            "source-transfer memory",
            Left::There,
            &["stays at node 2", "sending it"],
        );
    }
    faults.try_out(
        3,
        2,
        "source-resume memory",
        Left::There,
        &["stays at node 2", "going over"],
    );
}

/// Until the commit its only copy is there.
#[test]
fn the_source_is_lost() {
    let faults = or_skip!(Faults::new());
    for to in [3, 0] {
        for point in ["precopy", "seize", "dump", "transfer", "resume"] {
            faults.try_out(to, 2, &format!("source-{point} end"), Left::Lost, &[]);
        }
    }
}

#[test]
fn the_source_is_lost_when_it_has_left() {
    let faults = or_skip!(Faults::new());
    for to in [3, 0] {
        faults.try_out(to, 2, "source-after end", Left::Gone, &[]);
    }
}

/// Home is an end of a move like any other.
#[test]
fn home_has_no_memory() {
    let faults = or_skip!(Faults::new());
    let out =
        |fault: &str, left, words: &[&str]| faults.try_way((0, 2), (Mode::Precopy, 1), fault, left, words);
    out("source-precopy memory", Left::Gone, &[]);
    out(
        "source-seize memory",
        Left::There,
        &["stays at home", "no memory"],
    );
    out("source-dump memory", Left::There, &["stays at home", "no memory"]);
    out(
        "source-transfer memory",
        Left::There,
        &["stays at home", "sending it"],
    );
    out(
        "source-resume memory",
        Left::There,
        &["stays at home", "going over"],
    );
    let home =
        |fault: &str, left, words: &[&str]| faults.try_way((2, 0), (Mode::Precopy, 1), fault, left, words);
    // Then it comes by the contact.
    home("target-reach memory", Left::Gone, &[]);
    home(
        "target-precopy memory",
        Left::There,
        &["stays at node 2", "sending it"],
    );
    home(
        "target-transfer memory",
        Left::There,
        &["stays at node 2", "sending it"],
    );
    home(
        "target-restore memory",
        Left::There,
        &["stays at node 2", "sending it"],
    );
    home(
        "target-resume memory",
        Left::There,
        &["stays at node 2", "going over"],
    );
    faults.try_way(
        (2, 3),
        (Mode::Precopy, 1),
        "home-switch memory",
        Left::There,
        &["stays at node 2", "going over"],
    );
}

/// A job ends with its deputy, whatever that was doing, but for what was started to be at home and has not left it.
#[test]
fn the_deputy_is_lost() {
    let faults = or_skip!(Faults::new());
    for point in [
        "target-reach",
        "target-precopy",
        "target-restore",
        "target-resume",
    ] {
        faults.try_way(
            (2, 0),
            (Mode::Precopy, 1),
            &format!("{point} end"),
            Left::Lost,
            &[],
        );
    }
    faults.try_way((2, 3), (Mode::Precopy, 1), "home-switch end", Left::Lost, &[]);
    faults.try_way((0, 2), (Mode::Precopy, 1), "source-after end", Left::Lost, &[]);
    for point in ["precopy", "seize", "dump", "transfer", "resume"] {
        let mut job = Running::start(&faults.lab, How::Home, [&faults.program]);
        let pid = job.number();
        let fault = faults.points.arm(1, &format!("source-{point}"), Some(pid), "end");
        let result = faults.steering.migrate(pid as u32, 2, Mode::Precopy);
        assert!(result.is_err() && fault.happened(), "{point}: {result:?}");
        for _ in 0..2 {
            job.write("\n");
            assert_eq!(job.line(), "0 0", "{point}");
        }
        assert_eq!(job.wait(), End::Code(0), "{point}");
        // One after the other: a kernel tells only once a second that nobody listens any more.
        await_none(&faults.lab, &[2], "exe [s]upervise", Duration::from_secs(20));
    }
}

/// A page that cannot be put in is put in later; a page store that has no room is done without.
#[test]
fn there_is_no_memory_for_pages() {
    let faults = or_skip!(Faults::new());
    for (way, at) in [((0, 2), 2), ((2, 3), 3), ((2, 0), 1)] {
        faults.try_way(way, (Mode::Postcopy, at), "target-rest memory", Left::Gone, &[]);
        if at != 1 {
            faults.try_way(
                way,
                (Mode::Freeze, at),
                "target-restore memory",
                Left::There,
                &["no memory"],
            );
            faults.try_way(
                way,
                (Mode::Postcopy, at),
                "target-restore memory",
                Left::There,
                &["no memory"],
            );
        }
    }
    for mode in [Mode::Freeze, Mode::Precopy] {
        faults.try_keeping(mode);
    }
}

/// Whoever has a part of it that nobody else has takes all of it with them.
#[test]
fn an_end_is_lost_before_all_pages_have_come() {
    let faults = or_skip!(Faults::new());
    for mode in [Mode::Postcopy, Mode::Hybrid] {
        for (way, at) in [((0, 2), 1), ((2, 3), 2), ((2, 0), 2)] {
            faults.try_way(way, (mode, at), "source-rest end", Left::Lost, &[]);
        }
        // Not the deputy's end: a process at home may read zeros before it is killed (ARCHITECTURE.md says so).
        for (way, at) in [((0, 2), 2), ((2, 3), 3)] {
            faults.try_way(way, (mode, at), "target-rest end", Left::Lost, &[]);
        }
    }
}

/// What had come of it by then is not there when it comes home after all: it may have given that up.
#[test]
fn nothing_is_left_at_home_of_a_homecoming_that_came_to_nothing() {
    let faults = or_skip!(Faults::new());
    let program = or_skip!(guest("bulk", Link::Dynamic));
    let program = program.to_str().expect("a path");
    let mut job = Running::start(&faults.lab, How::Away(2), [program, "16"]);
    let pid = job.number();
    let mut does = |what: &str, from: u64, count: u64| {
        job.write(&format!("{what} {from} {count}\n"));
        assert_eq!(job.line(), format!("ok {what}"));
    };
    let mut at = 0;
    for mode in [Mode::Freeze, Mode::Precopy, Mode::Postcopy] {
        let fault = faults.points.arm(1, "target-resume", Some(pid), "memory");
        let result = faults.steering.migrate(pid as u32, 0, mode);
        assert!(result.is_err() && fault.happened(), "{mode:?}: {result:?}");
        for what in ["drop", "unmap"] {
            does(what, at, 100);
            at += 200;
        }
        faults
            .steering
            .migrate(pid as u32, 0, mode)
            .expect("it comes home");
        does("check", 0, 16 << 8);
        faults.steering.migrate(pid as u32, 2, mode).expect("a move");
        does("check", 0, 16 << 8);
    }
    assert_eq!(job.wait(), End::Code(0));
}
