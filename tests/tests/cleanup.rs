//! What is left when a job ends, in whatever way: nothing, on either side, within two seconds.

use std::collections::BTreeSet;
use std::process::{Command, Output};
use std::time::Duration;

use tests::compare::{End, How};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::{Running, wait_for};
use tests::skip::program;

const AWAY: How = How::Away(2);
/// What the product promises.
const SOON: Duration = Duration::from_secs(2);
/// ... and what is given to a machine that does other work besides.
const PATIENCE: Duration = Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 2 });

/// A job that is doing everything at once: it computes, sleeps, waits at home for input, for its children and for a
/// lock, and makes new processes all the time.
const BUSY: &str = "
import os, subprocess, sys, threading, time
os.setpgid(0, 0)
# Before there are threads: it would keep open what they have just made for their children.
if os.fork() == 0:
    os.setsid()
    time.sleep(1000)
def compute():
    while True: pass
made = 0
def make():
    global made
    while True:
        subprocess.run(['sh', '-c', 'cat /proc/self/stat | cat'], stdout=subprocess.DEVNULL)
        made += 1
lock = threading.Lock()
lock.acquire()
end, _ = os.pipe()
for what in compute, make, make, lock.acquire, lambda: os.read(end, 1), lambda: time.sleep(1000):
    threading.Thread(target=what, daemon=True).start()
waiting = [subprocess.Popen(['sleep', '1000']), subprocess.Popen(['cat'], stdin=subprocess.PIPE)]
print(os.getpid(), flush=True)
while made < 4: time.sleep(0.01)
print('busy', flush=True)
sys.stdin.readline()
os._exit(0)
";

/// A lab of its own, and what is in its nodes as long as no job is.
struct Scene {
    lab: Lab,
    empty: BTreeSet<String>,
}

impl Scene {
    fn set() -> Result<Self, tests::skip::Skip> {
        program("python3")?;
        let lab = Lab::with(&["--nodes", "2"])?;
        let empty = remote(&lab);
        Ok(Self { lab, empty })
    }

    fn busy(&self) -> (Running, i32) {
        let mut running = Running::start(&self.lab, AWAY, ["python3", "-c", BUSY]);
        let pid = running.number();
        assert_eq!(running.line(), "busy");
        assert_ne!(remote(&self.lab), self.empty, "nothing is away");
        (running, pid)
    }

    /// Node 2 is as if no job had been there, and none of the job's processes is left at home.
    fn nothing_is_left(&self, what: &str) {
        let mut before = BTreeSet::new();
        wait_for(&format!("node 2 to be empty after {what}"), PATIENCE, || {
            let now = remote(&self.lab);
            if now != self.empty && now != before {
                eprintln!(
                    "still there: {:?}",
                    now.difference(&self.empty).collect::<Vec<_>>()
                );
            }
            before.clone_from(&now);
            now == self.empty
        });
        wait_for(&format!("home to be empty after {what}"), SOON, || {
            home(&self.lab).is_empty()
        });
    }
}

/// Processes (by name), mounts, sockets, and files in memory of node 2.
fn remote(lab: &Lab) -> BTreeSet<String> {
    // Each line with how often it is there. A process that only looks is not counted.
    let script = "{ ps -e -o comm= | grep -v -x -e ps -e sh -e grep -e sort -e uniq -e sed
        sed 's/^[0-9]* [0-9]* /mount /' /proc/1/mountinfo
        sed 's/^.*$/udp/' /proc/net/udp /proc/net/udp6 2>/dev/null
        ls -A /proc/1/root/tmp /proc/1/root/dev/shm 2>/dev/null | sed 's/^/file /'
        } | sort | uniq -c";
    lab.inspect(2, script)
        .lines()
        .map(|l| l.trim().to_owned())
        .collect()
}

/// Processes of jobs at home.
fn home(lab: &Lab) -> Vec<String> {
    let all = lab.inspect(1, "ps -e -o comm=");
    all.lines()
        .filter(|l| ["mosrun", "python3", "sleep", "cat"].contains(&l.split(' ').next().unwrap_or("")))
        .map(str::to_owned)
        .collect()
}

fn on(lab: &Lab, node: u32, script: &str) -> Output {
    let mut command: Command = lab.exec_with(node, &["--machine-files", "--user", "root"]);
    command
        .args(["sh", "-c", script])
        .output()
        .expect("mosctl can be started")
}

/// The pid of the deputy: who traces the program.
fn deputy_of(lab: &Lab, pid: i32) -> i32 {
    let output = on(
        lab,
        1,
        &format!("sed -n 's/^TracerPid:[^0-9]*//p' /proc/{pid}/status"),
    );
    text(&output)
        .lines()
        .find_map(|l| l.trim().parse().ok().filter(|p| *p > 0))
        .unwrap_or_else(|| panic!("nobody traces {pid}: {}", text(&output)))
}

/// The supervisor's pid in its node: the parent of the cage.
fn supervisor_of(lab: &Lab) -> i32 {
    let output = lab.inspect(
        2,
        "ps -e -o pid=,args= | sed -n 's/^ *\\([0-9]*\\) .*[ ]supervise$/\\1/p'",
    );
    output
        .trim()
        .parse()
        .unwrap_or_else(|_| panic!("no supervisor: {output}"))
}

#[test]
fn the_program_ends() {
    let scene = or_skip!(Scene::set());
    let (mut running, _) = scene.busy();
    // Its children go on: a job lasts as long as one of its processes.
    running.write("end\n");
    assert_eq!(running.wait(), End::Code(0));
    assert_ne!(remote(&scene.lab), scene.empty, "the children are gone");
    on(&scene.lab, 1, "pkill -KILL -x sleep; pkill -KILL -x python3");
    scene.nothing_is_left("the end of the job");
}

#[test]
fn the_program_is_killed() {
    let scene = or_skip!(Scene::set());
    let (mut running, pid) = scene.busy();
    on(&scene.lab, 1, &format!("kill -KILL {pid}"));
    assert_eq!(running.wait(), End::Signal(9));
    let gone = || !remote(&scene.lab).iter().any(|l| l.ends_with("sh"));
    wait_for("its threads to end", PATIENCE, gone);
    on(&scene.lab, 1, "pkill -KILL -x sleep; pkill -KILL -x python3");
    scene.nothing_is_left("a kill of every process");
}

#[test]
fn the_group_is_killed() {
    let scene = or_skip!(Scene::set());
    for _ in 0..3 {
        let (mut running, pid) = scene.busy();
        on(
            &scene.lab,
            1,
            &format!("kill -KILL -$(ps -o pgid= -p {pid} | tr -d ' '); pkill -KILL -x python3"),
        );
        running.close();
        scene.nothing_is_left("a kill of the process group");
    }
}

#[test]
fn the_deputy_is_killed() {
    let scene = or_skip!(Scene::set());
    for _ in 0..3 {
        let (mut running, pid) = scene.busy();
        let deputy = deputy_of(&scene.lab, pid);
        on(&scene.lab, 1, &format!("kill -KILL {deputy}"));
        assert_eq!(running.wait(), End::Signal(9));
        scene.nothing_is_left("a kill of the deputy");
    }
    // Nothing that it left keeps the next job from running, or is listed as one.
    assert!(!text(&on(&scene.lab, 1, "mosps")).contains("python3"));
}

#[test]
fn the_supervisor_is_killed() {
    let scene = or_skip!(Scene::set());
    let log = std::env::temp_dir().join(format!("mosrun-cleanup-{}.log", std::process::id()));
    for _ in 0..3 {
        let mut line = scene.lab.exec(1);
        line.args(["mosrun", "--log"])
            .arg(&log)
            .args(["-r", "2", "python3", "-c", BUSY]);
        let mut running = Running::spawn(line);
        running.number();
        assert_eq!(running.line(), "busy");
        on(
            &scene.lab,
            2,
            &format!("kill -KILL {}", supervisor_of(&scene.lab)),
        );
        assert_eq!(running.wait(), End::Signal(9));
        scene.nothing_is_left("a kill of the supervisor");
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        assert!(said.contains("contact lost"), "{said}");
        let _ = std::fs::remove_file(&log);
    }
}

/// Killed at any moment of its beginning, a job leaves nothing either.
#[test]
fn killed_while_it_starts() {
    let scene = or_skip!(Scene::set());
    for delay in [0, 5, 10, 20, 40, 60, 80, 120, 200] {
        let delay = f64::from(delay) / 1000.0;
        let script = format!(
            "mosrun -r 2 python3 -c 'import time; time.sleep(1000)' & sleep {delay}; kill -KILL $!; wait $!; echo $?"
        );
        let output = scene
            .lab
            .exec(1)
            .args(["bash", "-c", &script])
            .output()
            .expect("bash");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            "137",
            "{}",
            text(&output)
        );
        scene.nothing_is_left(&format!("a kill {delay} s after the start"));
    }
}
