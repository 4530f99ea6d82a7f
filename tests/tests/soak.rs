//! A process with threads of all kinds is moved many times under a rain of signals, and nothing of it is lost, nor left anywhere.

use std::time::{Duration, Instant};

use linklayer::wire::Mode;
use tests::build::{Link, guest};
use tests::compare::{End, How};
use tests::lab::Lab;
use tests::mover::Steering;
use tests::or_skip;
use tests::running::{Running, wait_for};

/// How often it is moved, unless [`MOVES_VARIABLE`] says otherwise.
const MOVES: usize = 1000;
/// Environment variable with another number.
const MOVES_VARIABLE: &str = "MOSRUN_TESTS_SOAK_MOVES";
/// A move is begun so often at most; one takes longer on a busy machine.
const PAUSE: Duration = Duration::from_millis(20);
/// Each way from one place to another once.
const WAYS: [u32; 6] = [3, 0, 2, 0, 3, 2];

fn numbers(line: &str) -> Vec<i64> {
    line.split_whitespace()
        .map(|n| n.parse().expect("a number"))
        .collect()
}

/// Open descriptors of the supervisors of a node, or of the deputies at home, and how many processes there are of ours.
fn used(lab: &Lab, node: u32) -> (usize, usize) {
    let what = if node == 1 { "^mosrun" } else { "exe [s]upervise" };
    let script = format!(
        "for p in $(pgrep -f '{what}'); do ls /proc/$p/fd; done | wc -l; \
         pgrep -f 'exe [s]upervise|[m]osrun-cage|^mosrun|guests/.*/[s]oak' | wc -l"
    );
    let text = lab.inspect(node, script);
    let counts = numbers(&text);
    (counts[0] as usize, counts[1] as usize)
}

#[test]
fn nothing_is_lost_or_left_by_many_moves() {
    let moves: usize = std::env::var(MOVES_VARIABLE)
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(MOVES);
    let lab = or_skip!(Lab::shared());
    let program = or_skip!(guest("soak", Link::Dynamic));
    let program = program.to_str().expect("a path");
    let empty = [1, 2, 3].map(|node| used(&lab, node));
    let mut job = Running::start(&lab, How::Away(2), [program]);
    let pid = job.number();
    let steering = Steering::of(&lab);
    let modes = [Mode::Freeze, Mode::Precopy, Mode::Auto];
    let mut slowest = Duration::ZERO;
    let mut go = |round: usize| {
        let (to, mode) = (WAYS[round % 6], modes[(round / 6 + round) % 3]);
        let begun = Instant::now();
        let report = steering.migrate(pid as u32, to, mode);
        slowest = slowest.max(begun.elapsed());
        let report = report
            .unwrap_or_else(|why| panic!("move {round} to {to} by {mode:?}: {why}\n{}", lab.diagnosis()));
        std::thread::sleep(PAUSE.saturating_sub(begun.elapsed()));
        report
    };
    // What is kept from one move to the next is there after some.
    (0..12).for_each(|round| drop(go(round)));
    let before = [1, 2, 3].map(|node| used(&lab, node));
    let drops = 25 * moves as i64;
    let mut rain = Running::start(&lab, How::Native, [program, &pid.to_string(), &drops.to_string()]);
    let mut precopied = 0;
    for round in 0..moves {
        precopied += usize::from(go(round).mode == Mode::Precopy);
        if round % 10 == 9 {
            // All its threads get on.
            job.write("\n");
            numbers(&job.line());
        }
    }
    assert!(
        precopied * 4 > moves,
        "{precopied} of {moves} were sent while it ran"
    );
    let rained = rain.wait_within(Duration::from_secs(120));
    assert_eq!(rained, End::Code(0));
    let mut last = Vec::new();
    wait_for("all signals", Duration::from_secs(20), || {
        job.write("\n");
        last = numbers(&job.line());
        last[0] >= drops && last[2] >= drops
    });
    let sum = drops * (drops + 1) / 2;
    assert_eq!(last, [drops, sum, drops, sum], "after {moves} moves");
    // It is where it was when they were counted first: the same number of moves after its beginning, but for whole rounds.
    (moves..moves + 12 - moves % 6).for_each(|round| drop(go(round)));
    let after = [1, 2, 3].map(|node| used(&lab, node));
    for (node, (before, after)) in before.iter().zip(&after).enumerate() {
        // A thread that waits for work has one or two of its own.
        assert!(
            after.0 <= before.0 + 8 && after.1 <= before.1 + 1,
            "at node {}: {before:?} descriptors and processes became {after:?} by {moves} moves",
            node + 1
        );
    }
    eprintln!(
        "{moves} moves, {drops} signals twice; slowest move {slowest:?}; descriptors and processes {before:?}, {after:?}"
    );
    assert_eq!(job.wait(), End::Code(0));
    wait_for("nothing to be left", Duration::from_secs(10), || {
        [1, 2, 3].map(|node| used(&lab, node)) == empty
    });
}
