//! Running processes are moved: home, to nodes, from node to node, with threads that compute and calls that wait.

use tests::compare::{End, How};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::Running;
use tests::skip::program;

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
        let moved = lab
            .exec(1)
            .args(["mosmigrate", &pid.to_string(), to])
            .output()
            .expect("mosmigrate starts");
        assert!(moved.status.success(), "to {to}: {}", text(&moved));
        job.write(&format!("{round}\n"));
        assert_eq!(job.line().trim(), format!("{round} True True"), "at {to}");
    }
    job.close();
    assert_eq!(job.wait(), End::Code(7));
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
