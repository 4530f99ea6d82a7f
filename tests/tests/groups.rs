//! Processes that share memory are moved: all of them, by a request for any of them, and the memory stays one.

use std::time::Duration;

use tests::compare::{End, How};
use tests::lab::{Lab, text};

use tests::or_skip;
use tests::running::{Running, wait_for};
use tests::skip::program;

/// A process with a thread that computes, and three processes that count in memory that all share, and look at it; they
/// talk by pipes as well. Each answer says whether all got on and all memory is what it was.
const WORK: &str = "
import ctypes, hashlib, mmap, multiprocessing, os, signal, struct, sys, threading, time
N = 3
multiprocessing.set_start_method('fork')
m = mmap.mmap(-1, 64 * mmap.PAGESIZE)
data = os.urandom(60 * mmap.PAGESIZE)
m[4 * mmap.PAGESIZE:] = data
right = hashlib.sha256(data).hexdigest()
private = os.urandom(1 << 20)
private_right = hashlib.sha256(private).hexdigest()
def shared_is_right():
    return hashlib.sha256(m[4 * mmap.PAGESIZE:]).hexdigest() == right
def get(i): return struct.unpack_from('<q', m, 8 * i)[0]
def put(i, v): struct.pack_into('<q', m, 8 * i, v)
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
segment = []
def attach(*_):
    number = libc.shmget(0, 4096, 0o1600)
    segment.extend([number, libc.shmat(number, None, 0)])
def detach(*_):
    libc.shmdt(ctypes.c_void_p(segment.pop()))
    libc.shmctl(segment.pop(), 0, None)
def work(n, pipe):
    signal.signal(signal.SIGUSR1, attach)
    signal.signal(signal.SIGUSR2, detach)
    def listen():
        while (word := pipe.recv()) is not None:
            pipe.send((n, word))
    threading.Thread(target=listen, daemon=True).start()
    while get(N) == 0:
        put(n, get(n) + 1)
        if get(n) % 50 == 0 and not shared_is_right():
            os._exit(99)
    os._exit(n)
pipes, kids = [], []
for n in range(N):
    ours, theirs = multiprocessing.Pipe()
    kid = multiprocessing.Process(target=work, args=(n, theirs))
    kid.start()
    pipes.append(ours)
    kids.append(kid)
count = [0]
def compute():
    while True:
        hashlib.sha256(private).hexdigest() == private_right or os._exit(98)
        count[0] += 1
threading.Thread(target=compute, daemon=True).start()
print(os.getpid(), *[kid.pid for kid in kids], flush=True)
before = [0] * N + [0]
while line := sys.stdin.readline().strip():
    while not all(now > then for now, then in zip([get(i) for i in range(N)] + count, before)):
        time.sleep(0.005)
    before = [get(i) for i in range(N)] + list(count)
    for pipe in pipes:
        pipe.send(line)
    heard = [pipe.recv() for pipe in pipes] == [(n, line) for n in range(N)]
    print(line, heard, shared_is_right(), flush=True)
put(N, 1)
for kid in kids:
    kid.join()
print([kid.exitcode for kid in kids], flush=True)
os._exit(7)
";

struct Group<'a> {
    lab: &'a Lab,
    job: Running,
    pids: Vec<i32>,
}

impl<'a> Group<'a> {
    fn start(lab: &'a Lab, how: How) -> Group<'a> {
        let mut job = Running::start(lab, how, ["/usr/bin/python3", "-c", WORK]);
        let line = job.line();
        let pids: Vec<i32> = line
            .split_whitespace()
            .map(|w| w.parse().expect("a pid"))
            .collect();
        assert_eq!(pids.len(), 4, "{line}");
        Group { lab, job, pids }
    }

    /// Where each of them is, as `mosps` tells.
    fn places(&self) -> Vec<String> {
        let output = self.lab.exec(1).arg("mosps").output().expect("mosps starts");
        let table = String::from_utf8_lossy(&output.stdout).into_owned();
        let place = |pid: &i32| {
            let mut lines = table.lines().map(str::split_whitespace);
            lines.find_map(|mut words| {
                (words.next() == Some(&pid.to_string())).then(|| words.next().unwrap_or("").to_owned())
            })
        };
        self.pids
            .iter()
            .map(|pid| place(pid).unwrap_or_default())
            .collect()
    }

    fn migrate(&self, which: usize, to: &str) -> std::process::Output {
        self.lab
            .exec(1)
            .args(["mosmigrate", &self.pids[which].to_string(), to])
            .output()
            .expect("mosmigrate starts")
    }

    fn go(&mut self, which: usize, to: &str, round: usize) {
        let moved = self.migrate(which, to);
        assert!(moved.status.success(), "round {round} to {to}: {}", text(&moved));
        assert!(
            self.places().iter().all(|place| place == to),
            "round {round} to {to}: {:?}",
            self.places()
        );
        self.works(round);
    }

    fn works(&mut self, round: usize) {
        self.job.write(&format!("{round}\n"));
        assert_eq!(self.job.line().trim(), format!("{round} True True"));
    }

    fn end(mut self) {
        self.job.close();
        assert_eq!(self.job.line(), "[0, 1, 2]");
        assert_eq!(self.job.wait(), End::Code(7));
    }
}

#[test]
fn they_move_together() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::shared());
    let mut group = Group::start(&lab, How::Away(2));
    let ways = ["home", "2", "3", "home", "3", "2", "home"];
    for (round, to) in ways.into_iter().enumerate() {
        group.go(round % 4, to, round);
    }
    group.end();
    // The memory was made at home.
    let mut group = Group::start(&lab, How::Home);
    for (round, to) in ["3", "home", "2"].into_iter().enumerate() {
        group.go(3 - round, to, round);
    }
    group.end();
}

/// Without the right to open mapped memory, what they share is a memfd at home.
#[test]
fn they_move_together_without_root() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::plain(2));
    let mut group = Group::start(&lab, How::Away(2));
    for (round, to) in ["home", "2", "home", "2"].into_iter().enumerate() {
        group.go(round, to, round);
    }
    group.end();
}

#[test]
fn soak() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::shared());
    let mut group = Group::start(&lab, How::Away(2));
    for round in 0..50 {
        let to = ["home", "3", "2", "home", "2"][round % 5];
        group.go(round % 4, to, round);
    }
    group.end();
}

/// One that has a segment of System V cannot go; then nobody goes, and all go on. One that job control has stopped goes with the
/// others, and one that dies away takes nobody with it.
#[test]
fn all_or_none() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::shared());
    let mut group = Group::start(&lab, How::Home);
    let one = group.pids[2];
    let signal = |name: &str| {
        let sent = lab
            .exec(1)
            .args(["kill", name, &one.to_string()])
            .status()
            .expect("kill");
        assert!(sent.success());
    };
    let wait_for_segment = |there: bool| {
        wait_for("the segment", Duration::from_secs(20), || {
            let maps = lab.inspect(1, format!("cat /proc/{one}/maps"));
            maps.contains("SYSV") == there
        });
    };
    signal("-USR1");
    wait_for_segment(true);
    let refused = group.migrate(0, "3");
    assert!(!refused.status.success());
    assert!(
        text(&refused).contains(&one.to_string()) && text(&refused).contains("shares memory"),
        "{}",
        text(&refused)
    );
    assert!(
        group.places().iter().all(|place| place == "home"),
        "{:?}",
        group.places()
    );
    signal("-USR2");
    wait_for_segment(false);
    group.works(0);
    for to in ["2", "home", "3", "home"] {
        signal("-STOP");
        let moved = group.migrate(0, to);
        assert!(moved.status.success(), "{}", text(&moved));
        signal("-CONT");
        group.works(0);
    }
    group.go(1, "3", 1);
    signal("-KILL");
    let moved = group.migrate(0, "home");
    assert!(moved.status.success(), "{}", text(&moved));
    let places = group.places();
    assert_eq!(
        (places[0].as_str(), places[1].as_str()),
        ("home", "home"),
        "{places:?}"
    );
}
