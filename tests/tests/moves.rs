//! Running processes are moved: home, to nodes, from node to node, with threads that compute and calls that wait.

use std::process::Output;
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use tests::build::{Link, guest};
use tests::compare::{End, How};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::{Running, wait_for};
use tests::skip::program;

fn mosmigrate(lab: &Lab, args: &[&str]) -> Output {
    lab.exec(1)
        .arg("mosmigrate")
        .args(args)
        .output()
        .expect("mosmigrate starts")
}

/// Moves a process and gives what is reported of it.
fn moved(lab: &Lab, pid: i32, to: &str, mode: &str) -> Value {
    let output = mosmigrate(lab, &["--json", "--mode", mode, &pid.to_string(), to]);
    assert!(output.status.success(), "to {to}: {}", text(&output));
    let all: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    all[0].clone()
}

/// Where a process is, as `mosps` tells.
fn node_of(lab: &Lab, pid: i32) -> u64 {
    let output = lab
        .exec(1)
        .args(["mosps", "--json"])
        .output()
        .expect("mosps starts");
    let all: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let process = all.iter().find(|p| p["pid"] == pid).expect("the process");
    process["node"].as_u64().expect("a number")
}

/// Threads that compute with memory of their own, and a main thread whose read waits at home all the time. Each answer
/// says whether the memory is what it was and whether the threads got on.
const WORK: &str = "
import hashlib, os, sys, threading, time
blocks = [bytearray(os.urandom(1 << 20)) for _ in range(3)]
sums = [hashlib.sha256(b).hexdigest() for b in blocks]
count = [0] * 3
def work(i):
    while True:
        hashlib.sha256(blocks[i]).hexdigest() == sums[i] or os._exit(99)
        count[i] += 1
for i in range(3):
    threading.Thread(target=work, args=(i,), daemon=True).start()
print(os.getpid(), flush=True)
before, clock = list(count), time.monotonic()
while line := sys.stdin.readline():
    while not all(now > then for now, then in zip(count, before)):
        time.sleep(0.01)
    before = list(count)
    on, clock = time.monotonic() >= clock, time.monotonic()
    print(line.strip(), [hashlib.sha256(b).hexdigest() for b in blocks] == sums, on, flush=True)
os._exit(7)
";

#[test]
fn a_process_with_threads_goes_everywhere() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::shared());
    let mut job = Running::start(&lab, How::Away(2), ["python3", "-c", WORK]);
    let pid = job.number();
    for (round, to) in ["home", "2", "3", "home", "3", "2", "3", "home"]
        .into_iter()
        .enumerate()
    {
        let mode = ["freeze", "precopy"][round % 2];
        let report = moved(&lab, pid, to, mode);
        let old_kernel = report["note"].as_str().is_some_and(|n| n.contains("this kernel"));
        assert!(report["mode"] == mode || old_kernel, "to {to}: {report}");
        assert_eq!(report["way"], "direct", "to {to}: {report}");
        assert!(
            report["frozen_ms"].as_f64().is_some_and(|ms| ms > 0.0),
            "{report}"
        );
        job.write(&format!("{round}\n"));
        assert_eq!(job.line().trim(), format!("{round} True True"), "at {to}");
    }
    job.close();
    assert_eq!(job.wait(), End::Code(7));
}

/// A process that reads the memory of its child whenever it gets a line.
const PEEKS: &str = "
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
class Iovec(ctypes.Structure):
    _fields_ = [('at', ctypes.c_void_p), ('len', ctypes.c_size_t)]
value, copy = ctypes.c_int(1), ctypes.c_int(2)
here, there = Iovec(ctypes.addressof(copy), 4), Iovec(ctypes.addressof(value), 4)
gate, told = os.pipe()
child = os.fork()
if child == 0:
    value.value = 5678
    os.write(told, b'x')
    while True:
        signal.pause()
os.read(gate, 1)
print(os.getpid(), child, sep='\\n', flush=True)
while sys.stdin.readline():
    got = libc.process_vm_readv(child, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    print(got, copy.value, flush=True)
os.kill(child, signal.SIGKILL)
os._exit(os.WTERMSIG(os.waitpid(child, 0)[1]))
";

/// A shell that begins a program for each line, and tells its number.
const BEGINS: &str = "echo $$; while read line; do sleep 1000 & echo $!; done; kill $(jobs -p); exit 5";

#[test]
fn what_a_locked_process_executes_begins_where_it_is() {
    let lab = or_skip!(Lab::shared());
    for (lock, ways) in [("-L", [2, 0, 3]), ("-l", [2, 2, 2])] {
        let command = ["mosrun", lock, "-r", "2", "--", "bash", "-c", BEGINS];
        let mut job = Running::start(&lab, How::Native, command);
        let pid = job.number();
        let mut begun = Vec::new();
        for (to, expected) in ["", "home", "3"].into_iter().zip(ways) {
            if !to.is_empty() {
                moved(&lab, pid, to, "auto");
            }
            job.write("\n");
            let child = job.number();
            let minute = Duration::from_secs(60);
            let name = format!("cat /proc/{child}/comm");
            wait_for("it executes", minute, || lab.inspect(1, &name) == "sleep\n");
            wait_for("it is there", minute, || node_of(&lab, child) == expected);
            begun.push((child, expected));
        }
        for (child, expected) in begun {
            assert_eq!(node_of(&lab, child), expected, "{lock}");
        }
        job.close();
        assert_eq!(job.wait(), End::Code(5));
    }
}

#[test]
fn who_works_on_the_memory_of_another_stays_at_home_with_it() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::shared());
    let mut job = Running::start(&lab, How::Away(2), ["python3", "-c", PEEKS]);
    let (pid, child) = (job.number(), job.number());
    assert_eq!((node_of(&lab, pid), node_of(&lab, child)), (2, 2));
    for _ in 0..2 {
        job.write("\n");
        assert_eq!(job.line(), "4 5678");
        for (which, why) in [
            (pid, format!("works on the memory of process {child}")),
            (child, format!("process {pid} works on its memory")),
        ] {
            assert_eq!(node_of(&lab, which), 0);
            let output = mosmigrate(&lab, &[&which.to_string(), "3"]);
            assert_eq!(output.status.code(), Some(1), "{}", text(&output));
            assert!(text(&output).contains(&why), "{}", text(&output));
        }
    }
    assert_eq!(job.wait(), End::Code(9));
}

#[test]
fn what_cannot_move_says_why_and_goes_on() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::shared());
    let shared = "
import mmap, os, sys, tempfile
f = tempfile.TemporaryFile()
f.truncate(4096)
m = mmap.mmap(f.fileno(), 4096)
print(os.getpid(), flush=True)
print(sys.stdin.readline().strip(), flush=True)
";
    let mut job = Running::start(&lab, How::Away(2), ["python3", "-c", shared]);
    let pid = job.number().to_string();
    let go = |to: &str| {
        lab.exec(1)
            .args(["mosmigrate", &pid, to])
            .output()
            .expect("mosmigrate starts")
    };
    // It went home by itself.
    let refused = go("3");
    assert!(!refused.status.success());
    assert!(
        text(&refused).contains("maps a file shared and writable"),
        "{}",
        text(&refused)
    );
    let unknown = lab
        .exec(1)
        .args(["mosmigrate", &pid, "99"])
        .output()
        .expect("mosmigrate starts");
    assert!(!unknown.status.success());
    job.write("still here\n");
    assert_eq!(job.line().trim(), "still here");
    assert_eq!(job.wait(), End::Code(0));
}

/// The rest of a line of numbers.
fn numbers(line: &str) -> Vec<i64> {
    line.split_whitespace()
        .map(|n| n.parse().expect("a number"))
        .collect()
}

#[test]
fn no_signal_is_lost_or_doubled_by_moves() {
    const DROPS: i64 = 3000;
    let lab = or_skip!(Lab::shared());
    let program = or_skip!(guest("rain", Link::Dynamic));
    let program = program.to_str().expect("a path");
    let mut job = Running::start(&lab, How::Away(2), [program]);
    let pid = job.number();
    let mut rain = Running::start(&lab, How::Native, [program, &pid.to_string(), &DROPS.to_string()]);
    let mut moves = 0;
    for to in ["3", "home", "2", "3", "2", "home"].into_iter().cycle() {
        if rain.ended() && moves >= 6 {
            break;
        }
        let report = moved(&lab, pid, to, ["freeze", "precopy"][moves % 2]);
        assert!(report["error"].is_null(), "{report}");
        moves += 1;
    }
    assert_eq!(rain.wait(), End::Code(0));
    let mut last = Vec::new();
    wait_for("all signals", Duration::from_secs(20), || {
        job.write("\n");
        last = numbers(&job.line());
        last[0] >= DROPS
    });
    assert_eq!(last, [DROPS, DROPS * (DROPS + 1) / 2], "after {moves} moves");
    assert_eq!(job.wait(), End::Code(0));
}

#[test]
fn a_stopped_process_moves_and_stays_stopped() {
    let lab = or_skip!(Lab::shared());
    let program = or_skip!(guest("rain", Link::Dynamic));
    let mut job = Running::start(&lab, How::Away(2), [program]);
    let pid = job.number();
    let state = || {
        let stat = lab.inspect(1, format!("cat /proc/{pid}/stat"));
        stat[stat.rfind(')').expect("a name") + 1..].trim().chars().next()
    };
    lab.inspect(1, format!("kill -STOP {pid}"));
    wait_for("the stop", Duration::from_secs(10), || {
        matches!(state(), Some('T' | 't'))
    });
    job.write("\n");
    for to in ["3", "2", "3"] {
        moved(&lab, pid, to, "freeze");
        assert_eq!(node_of(&lab, pid), to.parse::<u64>().expect("a number"));
        assert!(matches!(state(), Some('T' | 't')), "at {to}");
    }
    lab.inspect(1, format!("kill -CONT {pid}"));
    assert_eq!(numbers(&job.line()), [0, 0]);
    assert_eq!(job.wait(), End::Code(0));
}

#[test]
fn a_frozen_process_executes_nothing_until_it_is_continued() {
    let lab = or_skip!(Lab::shared());
    let program = or_skip!(guest("rain", Link::Dynamic));
    let mut job = Running::start(&lab, How::Away(2), [program]);
    let pid = job.number();
    let name = pid.to_string();
    let done = |args: &[&str]| {
        let output = mosmigrate(&lab, args);
        assert!(output.status.success(), "{args:?}: {}", text(&output));
    };
    let cpu_ms = || {
        let output = lab
            .exec(1)
            .args(["mosps", "--json"])
            .output()
            .expect("mosps starts");
        let all: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
        all[0]["cpu_ms"].as_u64().expect("a number")
    };
    for place in ["3", "home"] {
        done(&[&name, place]);
        job.write("\n");
        assert_eq!(numbers(&job.line()), [0, 0]);
        done(&[&name, "freeze"]);
        // It stands still wherever it is sent.
        for next in ["2", "home", "3"] {
            done(&[&name, next]);
        }
        // Its threads compute all the time, and a node tells once a second what they used.
        let mut before = cpu_ms();
        wait_for("the process to stand still", Duration::from_secs(20), || {
            std::thread::sleep(Duration::from_millis(1100));
            let now = cpu_ms();
            std::mem::replace(&mut before, now) == now
        });
        done(&[&name, "continue"]);
        job.write("\n");
        assert_eq!(numbers(&job.line()), [0, 0], "at {place}");
    }
    done(&["-J", &name, "out"]);
    assert!([2, 3].contains(&node_of(&lab, pid)));
    assert_eq!(job.wait(), End::Code(0));
}

#[test]
fn nodes_that_do_not_reach_each_other_are_brought_together_by_home() {
    let lab = or_skip!(Lab::with(&["--nodes", "3"]));
    let program = or_skip!(guest("rain", Link::Dynamic));
    let mut job = Running::start(&lab, How::Away(2), [program]);
    let pid = job.number();
    let address = lab.inspect(
        3,
        "ip -4 -o address show scope global | awk '{sub(\"/.*\", \"\", $4); print $4}'",
    );
    lab.inspect(2, format!("ip route add unreachable {}", address.trim()));
    let report = moved(&lab, pid, "3", "freeze");
    assert_eq!(report["way"], "home", "{report}");
    let note = report["note"].as_str().unwrap_or_default();
    assert!(note.contains("by way of home"), "{report}");
    assert_eq!(node_of(&lab, pid), 3);
    job.write("\n");
    assert_eq!(numbers(&job.line()), [0, 0]);
    assert_eq!(job.wait(), End::Code(0));
}

/// Memory that does not shrink, so that it takes seconds on a slow link.
const BULKY: &str = "
import hashlib, os, sys
block = os.urandom(48 << 20)
before = hashlib.sha256(block).hexdigest()
print(os.getpid(), flush=True)
for line in sys.stdin:
    print(line.strip(), hashlib.sha256(block).hexdigest() == before, flush=True)
";

#[test]
fn a_process_survives_where_it_is_when_its_next_node_is_lost() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::with(&["--nodes", "3", "--rate", "40mbit"]));
    let mut job = Running::start(&lab, How::Away(2), ["python3", "-c", BULKY]);
    let pid = job.number();
    let supervisor = "pgrep -f 'exe [s]upervise' || true";
    for mode in ["freeze", "precopy"] {
        let before = lab.inspect(3, supervisor);
        let mut line = lab.exec(1);
        line.args(["mosmigrate", "--mode", mode, &pid.to_string(), "3"]);
        let mut migrating = Some(std::thread::spawn(move || {
            line.output().expect("mosmigrate starts")
        }));
        let mut receiver = String::new();
        // Home may have to notice first that the supervisor that was there before is gone.
        wait_for("a part of it to be there", Duration::from_secs(90), || {
            if migrating.as_ref().is_some_and(JoinHandle::is_finished) {
                let ended = migrating.take().map(JoinHandle::join);
                panic!("{mode}: it ended before: {ended:?}\n{}", lab.diagnosis());
            }
            let now = lab.inspect(3, supervisor);
            receiver = now
                .lines()
                .find(|p| !before.lines().any(|old| old == *p))
                .unwrap_or_default()
                .to_owned();
            let status = lab.inspect(3, format!("grep VmRSS: /proc/{receiver}/status || true"));
            let kib = status
                .split_whitespace()
                .nth(1)
                .and_then(|n| n.parse::<u64>().ok());
            !receiver.is_empty() && kib.is_some_and(|kib| kib > 24 << 10)
        });
        lab.inspect(3, format!("kill -KILL {receiver}"));
        let output = migrating.take().map(JoinHandle::join);
        let output = output.and_then(Result::ok).expect("mosmigrate ends");
        assert!(!output.status.success(), "{mode}: {}", text(&output));
        assert!(
            text(&output).contains("stays at node 2"),
            "{mode}: {}",
            text(&output)
        );
        assert_eq!(node_of(&lab, pid), 2);
        job.write(&format!("{mode}\n"));
        assert_eq!(job.line().trim(), format!("{mode} True"));
    }
    assert_eq!(job.wait(), End::Code(0));
}
