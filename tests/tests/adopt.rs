//! Processes that were started without mosrun are taken up, moved, and let go again.

use tests::compare::{End, How};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::Running;
use tests::skip::program;

/// Two threads that compute, a child, and a main thread that waits for input. Each answer says whether the threads got on.
const WORK: &str = "
import os, subprocess, sys, threading
count = [0, 0]
def work(i):
    while True:
        count[i] += 1
for i in range(2):
    threading.Thread(target=work, args=(i,), daemon=True).start()
child = subprocess.Popen(['cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
print(os.getpid(), flush=True)
print(child.pid, flush=True)
before = list(count)
for line in sys.stdin:
    while not all(now > then for now, then in zip(count, before)):
        pass
    before = list(count)
    child.stdin.write(line)
    child.stdin.flush()
    print(child.stdout.readline().strip(), flush=True)
child.stdin.close()
os._exit(child.wait() + 7)
";

struct Told {
    well: bool,
    text: String,
}

fn mosctl(lab: &Lab, words: &[&str]) -> Told {
    let output = lab
        .exec(1)
        .arg("mosctl")
        .args(words)
        .output()
        .expect("mosctl starts");
    Told {
        well: output.status.success(),
        text: text(&output),
    }
}

#[track_caller]
fn well(told: &Told) {
    assert!(told.well, "{}", told.text);
}

#[track_caller]
fn refused(told: &Told, why: &str) {
    assert!(!told.well && told.text.contains(why), "{}", told.text);
}

fn tracer(lab: &Lab, pid: &str) -> String {
    lab.inspect(1, format!("grep TracerPid: /proc/{pid}/status"))
        .trim_start_matches("TracerPid:")
        .trim()
        .to_owned()
}

#[test]
fn a_running_process_is_taken_up_moved_and_let_go() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::shared());
    let mut job = Running::start(&lab, How::Native, ["python3", "-c", WORK]);
    let pid = job.number().to_string();
    let child = job.number().to_string();
    let mut answers = |word: &str| {
        job.write(&format!("{word}\n"));
        assert_eq!(job.line(), word);
    };
    answers("free");
    well(&mosctl(&lab, &["adopt", &pid]));
    answers("adopted");
    assert_eq!(tracer(&lab, &pid), tracer(&lab, &child));
    assert_ne!(tracer(&lab, &pid), "0");
    refused(&mosctl(&lab, &["adopt", &child]), "already");
    let listed = mosctl(&lab, &["ps"]);
    assert!(listed.text.contains("adopted"), "{}", listed.text);

    well(&mosctl(&lab, &["migrate", &pid, "2"]));
    answers("away");
    well(&mosctl(&lab, &["migrate", &child, "3"]));
    answers("both away");
    refused(&mosctl(&lab, &["release", &pid]), "bring them home first");
    answers("still there");
    well(&mosctl(&lab, &["migrate", &pid, "home"]));
    well(&mosctl(&lab, &["migrate", &child, "home"]));
    well(&mosctl(&lab, &["release", &child]));
    assert_eq!((&*tracer(&lab, &pid), &*tracer(&lab, &child)), ("0", "0"));
    answers("free again");
    refused(&mosctl(&lab, &["release", &pid]), "belongs to no job");

    // Once more, and this time the deputy is killed: those at home go on.
    well(&mosctl(&lab, &["adopt", &pid]));
    answers("adopted again");
    lab.inspect(1, format!("kill -9 {}", tracer(&lab, &pid)));
    answers("without deputy");
    assert_eq!(job.wait(), End::Code(7));
}

#[test]
fn what_cannot_be_taken_up_says_why() {
    let lab = or_skip!(Lab::shared());
    refused(
        &mosctl(&lab, &["adopt", "4194303"]),
        "has ended, or there is none",
    );
    let usage = lab
        .exec(1)
        .args(["mosctl", "adopt", "1"])
        .output()
        .expect("mosctl starts");
    assert_eq!(usage.status.code(), Some(2));
}
