//! Links that are cut in each part of a move, in each direction: for a moment, which costs time, or for good, and then the process
//! goes on at one place or ends with the node that has its only copy.
//!
//! Many processes move at the same time. Each stands at another point of its move when the link is cut.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use linklayer::wire::{Mode, MoveReport};
use tests::build::{Link, guest};
use tests::compare::{End, How};
use tests::faults::{Cut, Fault, Faults, await_none};
use tests::lab::Lab;
use tests::mover::Steering;
use tests::or_skip;
use tests::running::Running;

/// So much memory each has, MiB.
const SIZE: &str = "8";
const PAGES: u64 = 8 << 8;
/// So much of it somebody changes all the time whose changes come later.
const CHANGED: u64 = 1000;
/// Longer than silence is unnoticed, and shorter than anybody gives up.
const MOMENT: Duration = Duration::from_secs(5);
/// The longest that somebody waits for a peer of which nothing is heard, and then some.
const FOR_GOOD: Duration = Duration::from_secs(80);

/// What is left of a process that was to move while a link was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// It goes on where it was.
    There,
    /// It goes on where it was to go.
    Gone,
    /// It is killed.
    Lost,
    /// It goes on at one of the two.
    Somewhere,
}

/// A move, the point at which it stands when the link is cut, and what is left then.
struct Case {
    from: u32,
    to: u32,
    mode: Mode,
    /// The node whose program stands there.
    at: u32,
    point: &'static str,
    left: Left,
}

/// A process that moves.
struct Moving {
    what: String,
    case: Case,
    job: Running,
    pid: u32,
    fault: Option<Arc<Fault>>,
    result: Option<JoinHandle<Result<MoveReport, String>>>,
}

impl Moving {
    fn does(&mut self, what: &str, from: u64, count: u64) -> Result<(), String> {
        self.job.write(&format!("{what} {from} {count}\n"));
        match self.job.line() {
            said if said == format!("ok {what}") => Ok(()),
            said => Err(format!("it said `{said}`")),
        }
    }
}

/// Those who stand at one of these do not read their link meanwhile, so they come last.
const READING: [&str; 3] = ["target-precopy", "target-transfer", "target-rest"];

/// Points and what is left, for one direction and mode.
fn cases(way: (u32, u32), mode: Mode, points: &[(u32, &'static str, Left)]) -> impl Iterator<Item = Case> {
    points.iter().map(move |(at, point, left)| Case {
        from: way.0,
        to: way.1,
        mode,
        at: *at,
        point,
        left: *left,
    })
}

fn start(lab: &Lab, program: &str, case: Case) -> Moving {
    let how = match case.from {
        0 => How::Home,
        node => How::Away(node),
    };
    let mut job = Running::start(lab, how, [program, SIZE]);
    let pid = job.number() as u32;
    let Case {
        from,
        to,
        mode,
        at,
        point,
        ..
    } = case;
    Moving {
        what: format!("{pid} from {from} to {to} by {mode:?}, {point} at node {at}"),
        case,
        job,
        pid,
        fault: None,
        result: None,
    }
}

/// Has all of them move and stand at their points, cuts links, lets them go on when `noticed` has passed, and makes the links whole
/// when `healed` has passed after that; then looks what has become of each.
fn try_all(
    lab: &Lab,
    mut cases: Vec<Case>,
    pairs: &[(u32, u32)],
    (noticed, healed): (Duration, Option<Duration>),
) {
    let program = guest("bulk", Link::Dynamic).unwrap_or_else(|why| panic!("{why}"));
    let program = program.to_str().expect("a path");
    let points = Faults::of(lab, 3);
    cases.sort_by_key(|case| READING.contains(&case.point));
    let begun = Instant::now();
    let mut all: Vec<Moving> = cases.into_iter().map(|case| start(lab, program, case)).collect();
    eprintln!("{} processes after {:?}", all.len(), begun.elapsed());
    for one in &mut all {
        let Case {
            at,
            point,
            from,
            to,
            mode,
            ..
        } = one.case;
        let fault = Arc::new(points.arm(at.max(1), point, Some(one.pid as i32), "wait"));
        if mode == Mode::Hybrid {
            one.does("dirty", 0, CHANGED).expect("its memory changes");
        }
        let (steering, pid, armed) = (Steering::of(lab), one.pid, fault.clone());
        one.result = Some(std::thread::spawn(move || {
            steering.migrate_into(pid, (from, to), mode, &armed)
        }));
        one.fault = Some(fault);
    }
    for one in &all {
        let fault = one.fault.as_ref().expect("just armed");
        assert!(fault.await_it(), "{}: it does not come to that", one.what);
    }
    eprintln!("all stand there after {:?}", begun.elapsed());
    let cut = Cut::between(lab, pairs);
    std::thread::sleep(noticed);
    for one in &mut all {
        one.fault.take().expect("it stands there").go();
    }
    let cut = match healed {
        Some(after) => {
            std::thread::sleep(after);
            drop(cut);
            None
        }
        None => Some(cut),
    };
    let limit = Instant::now() + FOR_GOOD;
    let mut bad = Vec::new();
    for one in &mut all {
        let thread = one.result.take().expect("it was asked");
        while !thread.is_finished() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(5));
        }
        if !thread.is_finished() {
            bad.push(format!("{}: nobody says what became of it", one.what));
            continue;
        }
        let result = thread.join().expect("an answer");
        eprintln!(
            "{:?} {}: {:?}",
            begun.elapsed(),
            one.what,
            result.as_ref().map(|report| &report.note)
        );
        if let Err(why) = look(one, &result) {
            bad.push(format!("{}: {why} ({result:?})", one.what));
        }
    }
    // Where nobody hears of home any more, nothing of a job is left.
    if cut.is_some() {
        let left = limit.saturating_duration_since(Instant::now());
        await_none(lab, &[2], "guests/.*/[b]ulk|exe [s]upervise", left);
    }
    drop(cut);
    drop(all);
    assert!(bad.is_empty(), "{} of them:\n{}", bad.len(), bad.join("\n"));
    await_none(
        lab,
        &[1, 2, 3],
        "guests/.*/[b]ulk|exe [s]upervise",
        Duration::from_secs(20),
    );
}

/// Whether a process is what it is to be.
fn look(one: &mut Moving, result: &Result<MoveReport, String>) -> Result<(), String> {
    match (one.case.left, result) {
        (Left::There | Left::Lost, Ok(_))
            if one.case.point != "source-after" && one.case.point != "target-resume" =>
        {
            return Err("it was reported to have moved".into());
        }
        (Left::Lost, Err(why)) if !why.contains("is lost ") => {
            return Err("it does not say so".into());
        }
        (Left::Gone, Err(_)) => return Err("it was reported to have stayed".into()),
        _ => {}
    }
    if one.case.left == Left::Lost {
        let end = one.job.wait_within(FOR_GOOD);
        return (end == End::Signal(9)).then_some(()).ok_or(format!("{end:?}"));
    }
    let from = if one.case.mode == Mode::Hybrid { CHANGED } else { 0 };
    one.does("check", from, PAGES - from)?;
    match one.job.wait() {
        End::Code(0) => Ok(()),
        end => Err(format!("{end:?}")),
    }
}

use Left::{Gone, Lost, Somewhere, There};

/// Every point of a move out, home and from node to node, with what is left when node 2 is cut off there.
fn everything() -> Vec<Case> {
    let out = [
        (1, "source-precopy", There),
        (1, "source-seize", There),
        (1, "source-dump", There),
        (1, "source-transfer", There),
        (1, "source-resume", There),
        (1, "source-after", Lost),
        (2, "target-reach", There),
        (2, "target-precopy", There),
        (2, "target-transfer", There),
        (2, "target-restore", There),
        (2, "target-resume", Lost),
    ];
    let home = [
        (2, "source-precopy", Lost),
        (2, "source-seize", Lost),
        (2, "source-dump", Lost),
        (2, "source-transfer", Lost),
        (2, "source-resume", Lost),
        (2, "source-after", Gone),
        (1, "target-reach", Lost),
        (1, "target-precopy", Lost),
        (1, "target-transfer", Lost),
        (1, "target-restore", Lost),
        (1, "target-resume", Gone),
    ];
    let on = [
        (2, "source-precopy", Lost),
        (2, "source-seize", Lost),
        (2, "source-dump", Lost),
        (2, "source-transfer", Lost),
        (2, "source-resume", Lost),
        (2, "source-after", Gone),
        (3, "target-reach", Lost),
        (3, "target-precopy", Lost),
        (3, "target-transfer", Lost),
        (3, "target-restore", Lost),
        (3, "target-resume", Gone),
        (1, "home-switch", Gone),
    ];
    let there = [
        (3, "source-precopy", There),
        (3, "source-transfer", There),
        (3, "source-resume", There),
        (3, "source-after", Lost),
        (2, "target-reach", There),
        (2, "target-transfer", There),
        (2, "target-restore", There),
        (2, "target-resume", Lost),
        (1, "home-switch", There),
    ];
    cases((0, 2), Mode::Precopy, &out)
        .chain(cases((2, 0), Mode::Precopy, &home))
        .chain(cases((2, 3), Mode::Precopy, &on))
        .chain(cases((3, 2), Mode::Precopy, &there))
        .chain(lacking(Lost))
        .collect()
}

/// Processes that run already where they go when the link is cut, but not with all of their memory.
fn lacking(left: Left) -> impl Iterator<Item = Case> {
    [(0, 2), (2, 0), (2, 3), (3, 2)]
        .into_iter()
        .flat_map(move |(from, to)| {
            let points = [
                (u32::max(from, 1), "source-rest", left),
                (u32::max(to, 1), "target-rest", left),
            ];
            let changing = [(u32::max(from, 1), "source-rest", left)];
            let changing = cases((from, to), Mode::Hybrid, &changing).filter(|case| case.from != 3);
            let all = cases((from, to), Mode::Postcopy, &points);
            all.chain(changing).collect::<Vec<_>>()
        })
}

#[test]
fn a_link_that_is_cut_for_a_moment_costs_time() {
    let lab = or_skip!(Lab::with(&["--nodes", "3"]));
    let mut cases = everything();
    for case in &mut cases {
        // A move that was about to be committed may be given up; all others go on.
        let asked = ["source-resume", "home-switch", "target-reach"].contains(&case.point);
        case.left = if asked { Somewhere } else { Gone };
    }
    try_all(&lab, cases, &[(1, 2), (2, 3)], (Duration::ZERO, Some(MOMENT)));
}

#[test]
fn a_node_that_is_cut_off_for_good_leaves_each_process_at_one_place_or_ends_it() {
    let lab = or_skip!(Lab::with(&["--nodes", "3"]));
    // So long that it is known everywhere that nothing is heard of it.
    let noticed = Duration::from_secs(4);
    try_all(&lab, everything(), &[(1, 2), (2, 3)], (noticed, None));
}

/// Home is heard of at both ends, so nothing is lost but what one node alone had.
#[test]
fn nodes_that_do_not_hear_of_each_other_keep_what_they_have() {
    let lab = or_skip!(Lab::with(&["--nodes", "3"]));
    let on = [
        (2, "source-precopy", There),
        (2, "source-seize", There),
        (2, "source-dump", There),
        (2, "source-transfer", There),
        (2, "source-resume", Gone),
        (2, "source-after", Gone),
        // By way of home.
        (3, "target-reach", Gone),
        (3, "target-precopy", There),
        (3, "target-transfer", There),
        (3, "target-restore", There),
        (3, "target-resume", Gone),
        (1, "home-switch", Gone),
    ];
    let cases = cases((2, 3), Mode::Precopy, &on).collect();
    try_all(
        &lab,
        cases,
        &[(2, 3)],
        (Duration::ZERO, Some(Duration::from_secs(20))),
    );
}
