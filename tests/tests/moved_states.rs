//! What a process's threads are doing when it is moved makes no difference to them.

use std::time::{Duration, Instant};

use tests::build::{Link, guest};
use tests::compare::{End, How};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::Running;

/// Starts a guest that tells its pid and then answers lines, and moves it about.
fn moved(name: &str, how: How, ways: &[&str], pause: Duration) -> Running {
    let lab = Lab::shared().expect("the caller has it");
    let program = guest(name, Link::Dynamic).expect("the caller has it");
    let mut job = Running::start(&lab, how, [program]);
    let pid = job.number().to_string();
    for (round, to) in ways.iter().enumerate() {
        let next = Instant::now() + pause;
        let moved = lab
            .exec(1)
            .args(["mosmigrate", &pid, to])
            .output()
            .expect("mosmigrate starts");
        assert!(moved.status.success(), "{name} to {to}: {}", text(&moved));
        job.write(&format!("{round}\n"));
        assert_eq!(job.line(), round.to_string(), "{name} at {to}");
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    job.close();
    job
}

/// Sleeps, waits with deadlines and waits without end go on for as long as they should. The pauses are for them to be waited
/// out in several places.
#[test]
fn waits_keep_their_deadlines() {
    let _lab = or_skip!(Lab::shared());
    or_skip!(guest("sleepers", Link::Dynamic));
    for (how, ways) in [
        (How::Home, ["2", "home", "3", "home", "2"]),
        (How::Away(2), ["3", "2", "home", "2", "home"]),
    ] {
        let mut job = moved("sleepers", how, &ways, Duration::from_millis(700));
        assert_eq!(job.line(), "slept", "begun {how:?}");
        assert_eq!(job.wait(), End::Code(0));
    }
}

/// Timers that were made at home, or on a node that the process has left since, too.
#[test]
fn a_timer_of_one_thread_goes_on() {
    let _lab = or_skip!(Lab::shared());
    or_skip!(guest("own_timer", Link::Dynamic));
    for (how, ways) in [
        (How::Home, ["2", "home", "3", "2"]),
        (How::Away(2), ["3", "home", "2", "home"]),
    ] {
        let mut job = moved("own_timer", how, &ways, Duration::ZERO);
        assert_eq!(job.wait(), End::Code(0), "begun {how:?}");
    }
}

#[test]
fn a_process_without_its_first_thread() {
    let _lab = or_skip!(Lab::shared());
    or_skip!(guest("headless", Link::Dynamic));
    let ways = ["2", "home", "3", "2", "home", "3"];
    let mut job = moved("headless", How::Home, &ways, Duration::ZERO);
    assert_eq!(job.wait(), End::Code(7));
}

/// A process that job control has stopped goes where it is sent, stopped, and its parent hears of nothing.
#[test]
fn a_stopped_process() {
    let _lab = or_skip!(Lab::shared());
    or_skip!(guest("stopped", Link::Dynamic));
    for (how, ways) in [
        (How::Home, vec!["2", "home", "3", "2", "home"]),
        (How::Home, vec!["2", "3"]),
        (How::Away(2), vec!["home", "3", "home", "2"]),
        (How::Away(2), vec!["home"]),
        (How::Away(2), vec!["3"]),
    ] {
        let mut job = moved("stopped", how, &ways, Duration::ZERO);
        assert_eq!(job.line(), "continued, and ended with 3", "{how:?} {ways:?}");
        assert_eq!(job.wait(), End::Code(0));
    }
}
