//! A fault in each part of a move, on each side: the process goes on at one place, or ends because the node with its only copy was
//! lost; whoever asked for the move is told in which part it failed.

use std::time::{Duration, Instant};

use linklayer::wire::Mode;
use tests::build::{Link, guest};
use tests::compare::{End, How};
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

/// How soon somebody who waits for a move hears that a supervisor has ended.
const SOON: Duration = Duration::from_secs(15);

struct Faults {
    lab: std::sync::Arc<Lab>,
    steering: Steering,
    program: String,
}

impl Faults {
    fn new() -> Result<Self, Skip> {
        let lab = Lab::shared()?;
        let program = guest("rain", Link::Dynamic)?;
        Ok(Self {
            steering: Steering::of(&lab),
            program: program.to_string_lossy().into_owned(),
            lab,
        })
    }

    /// Has something happen at this point of the next move, on a node.
    fn arm(&self, node: u32, fault: &str) {
        let path = self.lab.root_of(node).join("run/mosrun/fault");
        std::fs::write(path, fault).expect("the fault is written");
    }

    /// Whether the fault has happened.
    fn happened(&self, node: u32) -> bool {
        !self.lab.root_of(node).join("run/mosrun/fault").exists()
    }

    /// Moves a process from node 2 to `to` with a fault on node `at`, and looks at what becomes of it. `words`: what the error says.
    fn try_out(&self, to: u32, at: u32, fault: &str, left: Left, words: &[&str]) {
        let mut job = Running::start(&self.lab, How::Away(2), [&self.program]);
        let pid = job.number();
        let what = format!("{fault} on node {at}, to {to}");
        // A supervisor is there already, as when it has been there before.
        if to != 0 {
            self.steering
                .migrate(pid as u32, to, Mode::Freeze)
                .expect("a move");
            self.steering
                .migrate(pid as u32, 2, Mode::Freeze)
                .expect("a move");
        }
        self.arm(at, fault);
        let begun = Instant::now();
        let result = self.steering.migrate(pid as u32, to, Mode::Precopy);
        let took = begun.elapsed();
        eprintln!("{what}: {took:?}: {:?}", result.as_ref().map(|r| &r.note));
        if !self.happened(at) {
            self.arm(at, "");
            panic!("{what}: it did not come to that: {result:?}");
        }
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
        tests::running::wait_for("nothing to run on", Duration::from_secs(10), || {
            [2, 3].iter().all(|node| {
                let script = "pgrep -f 'guests/.*/[r]ain' || true";
                self.lab.inspect(*node, script).trim().is_empty()
            })
        });
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
    faults.arm(3, "target-resume end");
    let moved = faults.steering.migrate(pid as u32, 3, Mode::Freeze);
    assert!(moved.is_ok(), "{moved:?}");
    assert_eq!(job.wait_within(SOON), End::Signal(9));
    assert!(faults.happened(3));
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
