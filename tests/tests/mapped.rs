//! Files that are mapped shared and writable: where the programs are meanwhile, and what others see of the files.

use std::time::Duration;

use tests::compare::{End, How, Place};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::{Running, wait_for};
use tests::skip::program;

const AWAY: How = How::Away(2);

/// Where a process is, as `mosps` tells.
fn place_of(lab: &Lab, pid: i32) -> String {
    let output = lab.exec(1).arg("mosps").output().expect("mosps starts");
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut lines = table.lines().map(str::split_whitespace);
    let found = lines.find_map(|mut words| {
        (words.next() == Some(&pid.to_string())).then(|| words.next().map(str::to_owned))
    });
    found.flatten().unwrap_or(table)
}

/// Locks, values and pools of Python are semaphores and memory in files, which nobody else opens.
const POOL: &str = "
import multiprocessing, os, sys
multiprocessing.set_start_method('fork')
lock, value, queue = multiprocessing.Lock(), multiprocessing.Value('i', 0), multiprocessing.Queue()
def work(n):
    with lock:
        value.value += n
    return os.getpid()
def serve():
    while (n := queue.get()) is not None:
        with lock:
            value.value += n
kid = multiprocessing.Process(target=serve)
kid.start()
with multiprocessing.Pool(2) as pool:
    pool.map(work, range(100))
    print(os.getpid(), kid.pid, flush=True)
    sys.stdin.readline()
    pool.map(work, range(100))
    queue.put(1000)
    queue.put(None)
    kid.join()
    print(value.value, flush=True)
";

fn a_pool_stays_away(lab: &Lab) {
    or_skip!(program("python3"));
    let mut job = Running::start(lab, AWAY, ["/usr/bin/python3", "-c", POOL]);
    let line = job.line();
    let pids: Vec<i32> = line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
    assert_eq!(pids.len(), 2, "{line}");
    assert!(pids.iter().all(|pid| place_of(lab, *pid) == "2"));
    job.write("\n");
    assert_eq!(job.line(), "10900");
    assert_eq!(job.wait(), End::Code(0));
}

#[test]
fn semaphores_do_not_take_home() {
    let lab = or_skip!(Lab::shared());
    a_pool_stays_away(&lab);
}

#[test]
fn semaphores_do_not_take_home_without_root() {
    let lab = or_skip!(Lab::plain(2));
    a_pool_stays_away(&lab);
}

/// Maps a file, changes it when it is told to, and tells what is there.
const VIEW: &str = "
import mmap, os, sys
fd = os.open('mapped', os.O_RDWR | os.O_CREAT)
if os.fstat(fd).st_size == 0:
    os.write(fd, b'.' * 10000)
view = mmap.mmap(fd, 0)
os.close(fd)
print(os.getpid(), flush=True)
while line := sys.stdin.readline().strip():
    view[5000:5000 + len(line)] = line.encode()
    print(view[100:105].decode(), flush=True)
";

struct View<'a> {
    lab: &'a Lab,
    place: Place,
    job: Running,
    pid: i32,
}

impl<'a> View<'a> {
    fn start(lab: &'a Lab) -> View<'a> {
        let place = Place::made(lab);
        if lab.user().is_none() {
            // A plain user cannot look who has a file that was there before.
            std::fs::write(place.path().join("mapped"), [b'.'; 10_000]).expect("a file");
        }
        let mut line = lab.exec(1);
        line.args(AWAY.prefix())
            .args(["/usr/bin/python3", "-c", VIEW])
            .current_dir(place.path());
        let mut job = Running::spawn(line);
        let pid = job.number();
        View { lab, place, job, pid }
    }

    /// Writes, and gives what is read elsewhere in the file.
    fn write(&mut self, word: &str) -> String {
        self.job.write(&format!("{word}\n"));
        self.job.line()
    }

    /// What a program at home finds in the file.
    fn found(&self) -> String {
        let script = "dd if=mapped bs=1 skip=5000 count=5 2> /dev/null";
        let output = self
            .lab
            .exec(1)
            .args(["sh", "-c", script])
            .current_dir(self.place.path())
            .output()
            .expect("mosctl starts");
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// Who opens the file finds what was written, and what it writes is found; the program is at home from then on.
#[test]
fn whoever_opens_it_finds_what_was_written() {
    or_skip!(program("python3"));
    for lab in [or_skip!(Lab::shared()), or_skip!(Lab::plain(2)).into()] {
        let mut view = View::start(&lab);
        assert_eq!(view.write("first"), ".....");
        assert_eq!(place_of(&lab, view.pid), "2");
        assert_eq!(view.found(), "first");
        wait_for("the program to be home", Duration::from_secs(20), || {
            place_of(&lab, view.pid) == "home"
        });
        let script = "printf there | dd of=mapped bs=1 seek=100 conv=notrunc 2> /dev/null";
        let written = lab
            .exec(1)
            .args(["sh", "-c", script])
            .current_dir(view.place.path())
            .status();
        assert!(written.is_ok_and(|status| status.success()));
        assert_eq!(view.write("again"), "there");
        assert_eq!(view.found(), "again");
        assert_eq!(view.job.wait(), End::Code(0));
    }
}

/// A program that is killed leaves what it has written.
#[test]
fn what_was_written_survives_the_program() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::shared());
    let mut view = View::start(&lab);
    assert_eq!(view.write("words"), ".....");
    assert_eq!(place_of(&lab, view.pid), "2");
    let killed = lab
        .exec(1)
        .args(["kill", "-KILL", &view.pid.to_string()])
        .status();
    assert!(killed.is_ok_and(|status| status.success()));
    assert_eq!(view.job.wait(), End::Signal(9));
    assert_eq!(view.found(), "words");
}

/// A file that somebody else has open, or whose very description somebody else has, cannot be held: the program goes home for it.
#[test]
fn a_file_of_others_takes_home() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::shared());
    let place = Place::made(&lab);
    std::fs::write(place.path().join("mapped"), [b'.'; 10_000]).expect("a file");
    let run: Vec<_> = AWAY
        .prefix()
        .iter()
        .map(|w| w.to_string_lossy().into_owned())
        .collect();
    let named = "os.open(\"mapped\", os.O_RDWR)";
    for (shell, descriptor) in [("3<", named), ("3<>", named), ("3<>", "3")] {
        let python = format!(
            "import mmap, os\nview = mmap.mmap({descriptor}, 0)\nview[0:2] = b\"ok\"\nprint(os.getpid(), flush=True)\ninput()"
        );
        let script = format!(
            "exec {shell}mapped; {} python3 -c '{python}'; head -c 2 <&3; exit 3",
            run.join(" ")
        );
        let mut line = lab.exec(1);
        line.args(["bash", "-c", &script]).current_dir(place.path());
        let mut job = Running::spawn(line);
        let pid = job.number();
        assert_eq!(place_of(&lab, pid), "home", "{shell} {descriptor}");
        job.write("\n");
        assert_eq!(job.line(), "ok");
        assert_eq!(job.wait(), End::Code(3));
    }
}
