//! The page store of a node: what has been there is not sent again, and whatever becomes of the store, programs do not notice.

use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use tests::compare::End;
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::{Running, wait_for};
use tests::skip::program;

/// Memory that does not shrink and is the same each time it is started, and an answer that tells whether it is what it was.
const SAME: &str = "
import hashlib, os, random, sys
random.seed(7)
block = random.randbytes(SIZE << 20)
before = hashlib.sha256(block).hexdigest()
print(os.getpid(), flush=True)
for line in sys.stdin:
    print(line.strip(), hashlib.sha256(block).hexdigest() == before, flush=True)
";
/// Its size in MiB.
const SIZE: u64 = 24;
const BYTES: u64 = SIZE << 20;

/// A program with that memory that runs on node 1.
struct Job {
    running: Running,
    pid: String,
    user: Option<u32>,
}

fn exec(lab: &Lab, user: Option<u32>) -> Command {
    match user {
        Some(user) => lab.exec_with(1, &["--user", &user.to_string()]),
        None => lab.exec(1),
    }
}

impl Job {
    fn start(lab: &Lab, user: Option<u32>) -> Job {
        let mut command = exec(lab, user);
        let source = SAME.replace("SIZE", &SIZE.to_string());
        command.args(["mosrun", "-h", "python3", "-c", &source]);
        let mut running = Running::spawn(command);
        let pid = running.number().to_string();
        Job { running, pid, user }
    }

    /// Moves it, and gives what is said of its pages: bytes that were sent, and bytes that were there.
    fn moved(&mut self, lab: &Lab, to: &str, mode: &str) -> (u64, u64) {
        let output: Output = exec(lab, self.user)
            .args(["mosmigrate", "--json", "--mode", mode, &self.pid, to])
            .output()
            .expect("mosmigrate starts");
        assert!(output.status.success(), "to {to}: {}", text(&output));
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let pages = &report[0]["pages"];
        self.running.write("well?\n");
        assert_eq!(self.running.line(), "well? True", "at {to}");
        let number = |name: &str| pages[name].as_u64().expect("a number");
        assert_eq!(number("saved_bytes"), number("stored") * 4096);
        (number("bytes"), number("saved_bytes"))
    }

    /// Moves it to a node and waits until that has kept its memory.
    fn kept(&mut self, lab: &Lab, node: u64, mode: &str) -> (u64, u64) {
        let moved = self.moved(lab, &node.to_string(), mode);
        wait_for(
            "the memory to be in the page store",
            Duration::from_secs(20),
            || count(lab, node, "entries") >= BYTES / 4096,
        );
        moved
    }

    fn end(mut self) {
        assert_eq!(self.running.wait(), End::Code(0));
    }
}

/// What the page stores of a node say.
fn count(lab: &Lab, node: u64, what: &str) -> u64 {
    let output = lab
        .exec(1)
        .args(["mosctl", "status", "--json"])
        .output()
        .expect("mosctl starts");
    let status: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let stores = status["daemon"]["page_stores"].as_array().expect("a list");
    let store = stores.iter().find(|s| s["node"] == node);
    store.and_then(|s| s["counts"][what].as_u64()).unwrap_or(0)
}

/// The directory of the page stores of a node, from outside.
fn directory(lab: &Lab, node: usize) -> String {
    let status = lab.status();
    let rundir = status["nodes"][node - 1]["rundir"].as_str().expect("a path");
    format!("{rundir}/store")
}

/// Waits until no job has a supervisor on node 2: then everything is in its page store.
fn nobody_is_there(lab: &Lab) {
    wait_for("the supervisor to end", Duration::from_secs(20), || {
        lab.inspect(2, "pgrep -f 'exe [s]upervise' || true").is_empty()
    });
}

#[test]
fn what_a_node_has_is_not_sent_again() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::with(&["--nodes", "3"]));
    let mut job = Job::start(&lab, None);
    let (first, saved) = job.kept(&lab, 2, "freeze");
    assert!(first > BYTES && saved == 0, "first {first} bytes, {saved} saved");
    let (on, _) = job.kept(&lab, 3, "precopy");
    assert!(on > BYTES, "{on} bytes to the next node");
    // Where it was before, from the other node and from home.
    for (to, mode) in [
        ("2", "freeze"),
        ("home", "freeze"),
        ("3", "precopy"),
        ("home", "precopy"),
        ("2", "precopy"),
    ] {
        let (sent, saved) = job.moved(&lab, to, mode);
        if to != "home" {
            assert!(sent < first / 10, "{sent} bytes to {to}, {mode}");
            assert!(saved >= BYTES, "{saved} bytes saved to {to}, {mode}");
        }
    }
    job.end();
    // Another run of the same program.
    let mut job = Job::start(&lab, None);
    let (second, saved) = job.moved(&lab, "2", "precopy");
    assert!(second < first / 4, "first {first} bytes, second {second}");
    // The block begins behind the header of its object, so that it has one whole page less; of the two at its ends nobody knows.
    assert!(saved >= BYTES - 4096, "{saved} bytes saved by the other run");
    job.end();
}

#[test]
fn a_program_that_ran_there_is_not_fetched_again() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    let run = || {
        let output = lab
            .exec(1)
            .args(["mosrun", "-r", "2", "python3", "-c"])
            .arg("import json, ssl; print(json.dumps(sum(range(1000))))")
            .output()
            .expect("mosrun starts");
        assert_eq!(output.stdout, b"499500\n", "{}", text(&output));
        nobody_is_there(&lab);
        ["inserted", "saved_bytes"].map(|what| count(&lab, 2, what))
    };
    let [first, saved] = run();
    assert!(first > 1000, "{first} pages were fetched at first");
    let [second, saved_then] = run();
    assert_eq!(second, first, "pages were fetched again");
    assert!(saved_then >= saved + first * 4096, "{saved_then} bytes saved");
}

#[test]
fn what_one_user_brought_is_not_there_for_another() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    let (ada, bob) = (Some(47_110), Some(47_111));
    let mut job = Job::start(&lab, ada);
    job.kept(&lab, 2, "freeze");
    job.end();
    let mut job = Job::start(&lab, bob);
    let (sent, saved) = job.moved(&lab, "2", "freeze");
    assert!(sent > BYTES && saved == 0, "{sent} bytes, {saved} saved");
    job.end();
    let mut job = Job::start(&lab, ada);
    let (sent, saved) = job.moved(&lab, "2", "freeze");
    assert!(sent < BYTES / 4 && saved >= BYTES, "{sent} bytes, {saved} saved");
    job.end();
    let dir = directory(&lab, 2);
    let rights = lab.inspect(2, format!("cd /proc/1/root{dir} && stat -c '%n %u %a' *"));
    assert_eq!(rights, "47110 47110 700\n47111 47111 700\n");
}

#[test]
fn a_store_that_was_tampered_with_costs_time_and_nothing_else() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    let mut job = Job::start(&lab, None);
    let (first, _) = job.kept(&lab, 2, "freeze");
    job.moved(&lab, "home", "freeze");
    let pages = format!("/proc/1/root{}/0/pages", directory(&lab, 2));
    lab.inspect(
        2,
        format!("head -c $(stat -c %s {pages}) /dev/urandom | dd of={pages} conv=notrunc status=none"),
    );
    let (again, saved) = job.moved(&lab, "2", "freeze");
    // Some of it may have been put in after that.
    assert!(
        again > first - BYTES / 8 && saved < BYTES / 8,
        "{again} bytes, {saved} saved"
    );
    wait_for("the wrong pages to be counted", Duration::from_secs(20), || {
        count(&lab, 2, "corrupt") >= (BYTES - BYTES / 8) / 4096
    });
    job.end();
}

#[test]
fn a_full_disk_keeps_nobody_from_moving() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::with(&["--nodes", "3"]));
    for node in [2, 3] {
        // A file system of 2 MiB in place of its stores.
        let dir = directory(&lab, node);
        let mount = format!(
            "python3 -c '
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.setns(os.open(\"/proc/1/ns/mnt\", 0), 0x20000) == 0, ctypes.get_errno()
os.makedirs(\"{dir}\", mode=0o711, exist_ok=True)
assert libc.mount(b\"none\", b\"{dir}\", b\"tmpfs\", 0, b\"size=2m,mode=0711\") == 0, ctypes.get_errno()
'"
        );
        lab.inspect(node as u32, mount);
    }
    let mut job = Job::start(&lab, None);
    for mode in ["freeze", "precopy", "postcopy", "hybrid"] {
        for to in ["2", "3", "home"] {
            let whole = ["freeze", "precopy"].contains(&mode);
            // What was started at home goes on without its deputy, and so does not run there before its memory has come.
            let mode = if to == "home" && !whole { "precopy" } else { mode };
            let (sent, _) = job.moved(&lab, to, mode);
            // What comes later is counted apart.
            assert!(!whole || sent > BYTES - (2 << 20), "{sent} bytes to {to}, {mode}");
        }
    }
    for node in [2, 3] {
        let entries = count(&lab, node, "entries");
        assert!(entries > 0 && entries <= 512, "{entries} pages on a full disk");
    }
    job.end();
}
