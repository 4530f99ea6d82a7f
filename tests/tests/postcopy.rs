//! Processes run at their new place before their memory has come, and do what they like meanwhile.

use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use tests::build::{Link, guest};
use tests::compare::{End, How};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::{Running, wait_for};

/// A move that is under way.
struct Moving(JoinHandle<Result<Value, String>>);

impl Moving {
    fn ask(lab: &Lab, pid: i32, to: &str, mode: &str) -> Moving {
        let mut line = lab.exec(1);
        line.args(["mosmigrate", "--json", "--mode", mode, &pid.to_string(), to]);
        Moving(std::thread::spawn(move || {
            let output = line.output().expect("mosmigrate starts");
            if !output.status.success() {
                return Err(text(&output));
            }
            let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            Ok(all[0].clone())
        }))
    }

    /// Whether the last page has not come yet.
    fn goes_on(&self) -> bool {
        !self.0.is_finished()
    }

    fn report(self) -> Result<Value, String> {
        self.0.join().expect("mosmigrate ends")
    }
}

fn node_of(lab: &Lab, pid: i32) -> Option<u64> {
    let output = lab.exec(1).args(["mosps", "--json"]).output().ok()?;
    let all: Vec<Value> = serde_json::from_slice(&output.stdout).ok()?;
    all.iter().find(|p| p["pid"] == pid)?["node"].as_u64()
}

fn await_node(lab: &Lab, pid: i32, node: u64) {
    wait_for("the process to be there", Duration::from_secs(60), || {
        node_of(lab, pid) == Some(node)
    });
}

fn node_number(to: &str) -> u64 {
    to.parse().unwrap_or(0)
}

fn does(job: &mut Running, what: &str, from: u64, count: u64) {
    job.write(&format!("{what} {from} {count}\n"));
    assert_eq!(job.line(), format!("ok {what}"), "page {from} and {count} on");
}

const MIB: u64 = 256;

fn program(mib: u64) -> Result<[String; 2], tests::skip::Skip> {
    let path = guest("bulk", Link::Dynamic)?;
    Ok([path.to_str().expect("a path").to_owned(), mib.to_string()])
}

#[test]
fn a_process_runs_before_its_memory_has_come() {
    let lab = or_skip!(Lab::with(&["--nodes", "3", "--rate", "400mbit"]));
    let mut job = Running::start(&lab, How::Away(2), or_skip!(program(512)));
    let pid = job.number();
    let mut frozen = Vec::new();
    for to in ["3", "home", "2"] {
        let moving = Moving::ask(&lab, pid, to, "postcopy");
        await_node(&lab, pid, node_number(to));
        for page in [131_000, 77_777, 10] {
            does(&mut job, "check", page, 3);
        }
        assert!(moving.goes_on(), "to {to}: it had all of its memory at once");
        let report = moving.report().unwrap_or_else(|e| panic!("to {to}: {e}"));
        assert_eq!(report["mode"], "postcopy", "to {to}: {report}");
        let number = |of: &Value| of.as_u64().expect("a number");
        let after = &report["after"];
        assert!(number(&after["pages"]["pages"]) >= 512 << 8, "to {to}: {report}");
        assert!(number(&report["pages"]["pages"]) < 5000, "to {to}: {report}");
        assert!(number(&after["faults"]) >= 3, "to {to}: {report}");
        assert!(number(&after["last_page_us"]) > 1_000_000, "to {to}: {report}");
        frozen.push(report["frozen_ms"].as_f64().expect("a number"));
        does(&mut job, "check", 0, 512 << 8);
    }
    // All of it takes eleven seconds on this link.
    assert!(
        frozen.iter().all(|ms| *ms < 1500.0),
        "stood still for {frozen:?} ms"
    );
    assert_eq!(job.wait(), End::Code(0));
}

#[test]
fn what_a_process_does_while_its_memory_comes() {
    let lab = or_skip!(Lab::with(&["--nodes", "3", "--rate", "100mbit"]));
    let mut job = Running::start(&lab, How::Away(2), or_skip!(program(MIB)));
    let pid = job.number();
    let tasks = [
        ("threads", 20_000, 400),
        ("move", 60_000, 300),
        ("check", 60_000, 300),
        ("drop", 50_000, 200),
        ("unmap", 40_000, 200),
        ("protect", 30_000, 200),
        ("heap", 0, 0),
        ("stack", 0, 0),
        ("write", 10_000, 600),
        ("read", 15_000, 600),
        ("vfork", 0, 0),
        ("check", 0, 100),
    ];
    let mut begin = 0;
    for to in ["3", "home", "2"] {
        let moving = Moving::ask(&lab, pid, to, "postcopy");
        await_node(&lab, pid, node_number(to));
        for (what, from, count) in tasks {
            // Each time elsewhere.
            let from = if count == 0 { 0 } else { from + begin };
            does(&mut job, what, from, count);
        }
        assert!(moving.goes_on(), "to {to}: it had all of its memory at once");
        does(&mut job, "fork", 0, 0);
        let report = moving.report().unwrap_or_else(|e| panic!("to {to}: {e}"));
        assert_eq!(report["mode"], "postcopy", "to {to}: {report}");
        does(&mut job, "check", 0, MIB << 8);
        begin += 1000;
    }
    let moving = Moving::ask(&lab, pid, "3", "postcopy");
    await_node(&lab, pid, 3);
    job.write("exec 0 0\n");
    assert_eq!(job.number(), pid, "it has executed itself");
    assert!(moving.report().is_ok());
    does(&mut job, "check", 0, MIB << 8);
    assert_eq!(job.wait(), End::Code(0));
}

#[test]
fn moves_follow_each_other_while_memory_comes() {
    let lab = or_skip!(Lab::with(&["--nodes", "3", "--rate", "200mbit"]));
    let mut job = Running::start(&lab, How::Away(2), or_skip!(program(32)));
    let pid = job.number();
    for to in ["3", "home", "3", "home"] {
        let first = Moving::ask(&lab, pid, to, "postcopy");
        await_node(&lab, pid, node_number(to));
        // Asked while the rest of it is still coming.
        let next = if to == "2" { "3" } else { "2" };
        let second = Moving::ask(&lab, pid, next, "freeze");
        does(&mut job, "check", 8000, 100);
        first.report().unwrap_or_else(|e| panic!("to {to}: {e}"));
        second.report().unwrap_or_else(|e| panic!("on to {next}: {e}"));
        await_node(&lab, pid, node_number(next));
        does(&mut job, "check", 0, 32 << 8);
    }
    assert_eq!(job.wait(), End::Code(0));
}

#[test]
fn what_changes_too_fast_comes_at_last() {
    let lab = or_skip!(Lab::with(&["--nodes", "3", "--rate", "200mbit"]));
    let mut job = Running::start(&lab, How::Away(2), or_skip!(program(96)));
    let pid = job.number();
    does(&mut job, "dirty", 0, 18_000);
    for (to, mode) in [("3", "hybrid"), ("home", "auto"), ("2", "hybrid"), ("3", "auto")] {
        let report = Moving::ask(&lab, pid, to, mode).report();
        let report = report.unwrap_or_else(|e| panic!("to {to}: {e}"));
        assert_eq!(report["mode"], "hybrid", "to {to}: {report}");
        assert!(report["rounds"].as_u64() >= Some(1), "to {to}: {report}");
        assert!(
            report["after"]["pages"]["pages"].as_u64() > Some(1000),
            "to {to}: {report}"
        );
        does(&mut job, "check", 18_000, 6_000);
        assert_eq!(node_of(&lab, pid), Some(node_number(to)));
    }
    assert_eq!(job.wait(), End::Code(0));
}

#[test]
fn what_has_all_of_its_memory_at_once_is_complete() {
    let lab = or_skip!(Lab::with(&["--nodes", "3"]));
    let mut job = Running::start(&lab, How::Away(2), or_skip!(program(1)));
    let pid = job.number();
    for to in ["3", "home", "2"] {
        // It waits for its input, so that nothing is left after the rounds.
        let report = Moving::ask(&lab, pid, to, "hybrid").report();
        let report = report.unwrap_or_else(|e| panic!("to {to}: {e}"));
        assert_eq!(report["mode"], "hybrid", "to {to}: {report}");
        does(&mut job, "fork", 0, 0);
    }
    assert_eq!(job.wait(), End::Code(0));
}

#[test]
fn a_cut_link_is_waited_for() {
    let lab = or_skip!(Lab::with(&["--nodes", "2", "--rate", "100mbit"]));
    let mut job = Running::start(&lab, How::Away(2), or_skip!(program(64)));
    let pid = job.number();
    let moving = Moving::ask(&lab, pid, "home", "postcopy");
    await_node(&lab, pid, 0);
    let address = "ip -4 -o address show scope global | awk '{sub(\"/.*\", \"\", $4); print $4}'";
    let address = lab.inspect(1, address);
    lab.inspect(2, format!("ip route add unreachable {}", address.trim()));
    job.write("check 16000 100\n");
    // Longer than a link is kept on which a process comes that could go on where it is.
    std::thread::sleep(Duration::from_secs(13));
    assert!(moving.goes_on(), "nothing can have come");
    lab.inspect(2, format!("ip route del unreachable {}", address.trim()));
    assert_eq!(job.line(), "ok check");
    assert_eq!(moving.report().expect("it comes")["mode"], "postcopy");
    does(&mut job, "check", 0, 64 << 8);
    assert_eq!(job.wait(), End::Code(0));
}

#[test]
fn a_process_whose_memory_is_lost_ends_and_says_why() {
    let lab = or_skip!(Lab::with(&["--nodes", "3", "--rate", "100mbit"]));
    let mut job = Running::start(&lab, How::Away(2), or_skip!(program(64)));
    let pid = job.number();
    let moving = Moving::ask(&lab, pid, "3", "postcopy");
    await_node(&lab, pid, 3);
    lab.inspect(2, "kill -KILL $(pgrep -f 'exe [s]upervise')");
    let why = moving.report().expect_err("it cannot have all of its memory");
    assert!(why.contains("is lost at node 3"), "{why}");
    assert_eq!(job.wait(), End::Signal(nix::libc::SIGKILL));
}

#[test]
fn where_it_is_not_possible_it_is_refused_with_what_to_do() {
    let lab = or_skip!(Lab::with(&["--nodes", "2", "--user", "nobody"]));
    if std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|t| t.trim() == "1") {
        return;
    }
    let mut job = Running::start(&lab, How::Away(2), or_skip!(program(8)));
    let pid = job.number();
    for to in ["home", "2"] {
        let before = node_of(&lab, pid);
        for mode in ["postcopy", "hybrid"] {
            let why = Moving::ask(&lab, pid, to, mode)
                .report()
                .expect_err("it is not possible");
            assert!(
                why.contains("/dev/userfaultfd") && why.contains("sysctl"),
                "{why}"
            );
            assert_eq!(node_of(&lab, pid), before);
        }
        let report = Moving::ask(&lab, pid, to, "freeze").report();
        assert_eq!(report.expect("another way")["mode"], "freeze");
    }
    does(&mut job, "check", 0, 8 << 8);
    assert_eq!(job.wait(), End::Code(0));
}
