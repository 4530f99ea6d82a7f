//! The lab itself: what a node is, that commands in it are themselves, and that nothing is left of it.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tests::compare::{End, Place};
use tests::lab::{Lab, mosctl, text};
use tests::or_skip;
use tests::skip::program;
use tests::terminal::Terminal;

fn sh(lab: &Lab, node: u32, script: &str) -> Output {
    lab.exec(node)
        .args(["sh", "-c", script])
        .output()
        .expect("mosctl can be started")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", text(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_command_is_itself() {
    let lab = or_skip!(Lab::shared());
    let mut child = lab
        .exec(1)
        .args(["sh", "-c", "cat; echo to stderr >&2; exit 7"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"through\0\xff").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"through\0\xff");
    assert_eq!(output.stderr, b"to stderr\n");
    assert_eq!(output.status.code(), Some(7));

    assert_eq!(sh(&lab, 1, "kill -9 $$").status.signal(), Some(9));
    assert_eq!(sh(&lab, 1, "kill -SEGV $$").status.signal(), Some(11));
    assert_eq!(
        lab.exec(1).arg("no-such-program").output().unwrap().status.code(),
        Some(127)
    );
    assert_eq!(
        lab.exec(1).arg("/etc/passwd").output().unwrap().status.code(),
        Some(126)
    );
    assert_eq!(lab.exec(4).arg("true").output().unwrap().status.code(), Some(125));
    // Words are passed on as they are, options and all.
    let words = ["printf", "%s|", "-n", "--", "a b", "", "$HOME"];
    assert_eq!(
        stdout(&lab.exec(1).args(words).output().unwrap()),
        "-n|--|a b||$HOME|"
    );
    assert_eq!(
        stdout(&lab.exec(1).arg("pwd").current_dir("/usr").output().unwrap()),
        "/usr\n"
    );
    assert_eq!(
        stdout(&lab.exec(1).arg("env").env("GIVEN", "yes").output().unwrap())
            .matches("GIVEN=yes")
            .count(),
        1
    );
}

#[test]
fn signals_are_passed_on() {
    let lab = or_skip!(Lab::shared());
    let place = Place::new();
    fs::create_dir(place.path()).unwrap();
    let script = "trap 'echo term; exit 3' TERM; mkfifo gate; echo ready; read x < gate";
    let mut child = lab
        .exec(1)
        .args(["bash", "-c", script])
        .current_dir(place.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    assert_eq!(line, "ready\n");
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    // bash runs a trap only when the command in the foreground (the open of the FIFO) is done or interrupted.
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(3), "{status}");
}

#[test]
fn the_terminal_is_the_commands() {
    let lab = or_skip!(Lab::shared());
    let mut command = lab.exec(1);
    command.args(["bash", "--norc", "--noprofile", "-i"]);
    let mut terminal = Terminal::start(&command);
    terminal.send("tty; stty size\n");
    terminal.expect("/dev/pts/");
    terminal.expect("24 80");
    // Before its prompt the shell sets the size that it has read (readline, set_winsize).
    terminal.expect("$ ");
    terminal.resize(30, 100);
    terminal.send("stty size\n");
    terminal.expect("30 100");
    terminal.send("sleep 1000\n");
    terminal.expect("sleep 1000");
    // The key counts when the command has the terminal.
    wait_for("sleep to run", || {
        lab.inspect(1, "ps -eo args").contains("\nsleep 1000\n")
    });
    terminal.send("\x1a");
    terminal.expect("Stopped");
    terminal.send("fg\n");
    terminal.expect("sleep 1000");
    wait_for("sleep to go on", || {
        lab.inspect(1, "ps -eo stat,args").contains("S+   sleep 1000")
    });
    terminal.send("\x03");
    terminal.send("echo status $((100 + $?))\n");
    terminal.expect("status 230");
    terminal.send("exit 5\n");
    assert_eq!(terminal.wait(), End::Code(5));
}

/// A stopped command stops `lab exec`, so that the shell around it gets its terminal back.
#[test]
fn stopping_and_going_on() {
    let lab = or_skip!(Lab::shared());
    let mut command = Command::new("bash");
    command.args(["--norc", "--noprofile", "-i"]);
    let mut terminal = Terminal::start(&command);
    let exec = lab.exec(1);
    let words: Vec<_> = exec.get_args().map(|a| a.to_string_lossy()).collect();
    terminal.send(&format!(
        "{} {} cat\n",
        exec.get_program().to_string_lossy(),
        words.join(" ")
    ));
    terminal.expect("cat");
    wait_for("cat to run", || lab.inspect(1, "ps -eo args").contains("\ncat\n"));
    terminal.send("one\n");
    terminal.expect("one\r\none");
    terminal.send("\x1a");
    terminal.expect("Stopped");
    terminal.expect("$ ");
    terminal.send("fg\n");
    terminal.expect("cat\r\n");
    terminal.send("two\n");
    terminal.expect("two\r\ntwo");
    terminal.send("\x04");
    terminal.send("echo status $((100 + $?))\n");
    terminal.expect("status 100");
    terminal.send("exit\n");
    assert_eq!(terminal.wait(), End::Code(0));
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_a_node_sees() {
    let lab = or_skip!(Lab::shared());
    // Node 1: this machine's files, but a network, processes and a hostname of its own.
    let own = fs::read_link("/proc/self/ns/net")
        .unwrap()
        .to_string_lossy()
        .into_owned();
    let seen = stdout(&sh(
        &lab,
        1,
        "readlink /proc/self/ns/net; hostname; ps -e -o comm= | head -1; cat /etc/passwd",
    ));
    let lines: Vec<_> = seen.lines().collect();
    assert_ne!(lines[0], own);
    assert_eq!(&lines[1..3], ["node1", "mosctl"]);
    assert_eq!(
        lines[3..].join("\n"),
        fs::read_to_string("/etc/passwd").unwrap().trim_end()
    );
    for name in ["mosrun", "mosd", "mosctl", "mosps", "mosmigrate", "mosmon"] {
        stdout(&sh(&lab, 1, &format!("command -v {name}")));
    }
    // Node 2: nearly nothing.
    assert_eq!(
        lab.exec(2).args(["sh"]).output().unwrap().status.code(),
        Some(127)
    );
    let seen = lab.inspect(
        2,
        "cd /proc/1/root; ls; ls etc usr/bin; cat etc/hostname; cat etc/hosts; ls -A tmp | wc -l",
    );
    for expected in [
        "bin\ndev\netc",
        "group\nhostname\nhosts\npasswd\n",
        "mosctl\nmosd\nmosmigrate",
        "node2\n",
        "10.77.0.3 node3\n",
        "\n0\n",
    ] {
        assert!(seen.contains(expected), "{expected:?} is not in {seen}");
    }
    let namespaces = |node: u32| {
        ["net", "pid", "mnt", "uts", "ipc"].map(|n| lab.inspect(node, format!("readlink /proc/1/ns/{n}")))
    };
    let all: BTreeSet<_> = (1..=3).flat_map(namespaces).collect();
    assert_eq!(all.len(), 15);
    // A process of a node is not seen by another.
    assert!(!lab.inspect(2, "ps -e -o pid=,args=").contains("node1"));
    // What a node writes to its /tmp stays there.
    assert!(!Path::new("/tmp/of-node-2").exists());
    lab.inspect(2, "touch /proc/1/root/tmp/of-node-2");
    assert!(!Path::new("/tmp/of-node-2").exists());
}

const PING: &str = r"
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, 10, 2) # IP_MTU_DISCOVER, IP_PMTUDISC_DO: no fragments
times, lost = [], 0
for i in range(int(sys.argv[2])):
    start = time.monotonic()
    text = (b'%d ' % i).ljust(int(sys.argv[4]), b'.')
    s.sendto(text, (sys.argv[1], 4711))
    s.settimeout(float(sys.argv[3]))
    try:
        while s.recv(65536) != text: pass
        times.append(time.monotonic() - start)
    except socket.timeout: lost += 1
print(lost, int(min(times) * 1e6))
";
const ECHO: &str = r"
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('', 4711))
print('ready', flush=True)
while True:
    data, who = s.recvfrom(65536)
    s.sendto(data, who)
";

/// Round trips from node 1 to node 2: how many were lost, and the fastest in microseconds, which says something of the link and not of what else
/// the machine does.
fn ping(lab: &Lab, count: u32, patience_s: f64) -> (u32, u64) {
    ping_with(lab, count, patience_s, 0)
}

/// The same with so many bytes, which are not to be sent in pieces.
fn ping_with(lab: &Lab, count: u32, patience_s: f64, bytes: u32) -> (u32, u64) {
    let mut server = lab
        .exec_with(2, &["--machine-files"])
        .args(["python3", "-c", ECHO])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(
        &mut std::io::BufReader::new(server.stdout.take().unwrap()),
        &mut line,
    )
    .unwrap();
    assert_eq!(line, "ready\n");
    let words = [
        "python3",
        "-c",
        PING,
        "10.77.0.2",
        &count.to_string(),
        &patience_s.to_string(),
        &bytes.to_string(),
    ];
    let output = stdout(&lab.exec(1).args(words).output().unwrap());
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(server.id() as i32),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    server.wait().unwrap();
    let (lost, fastest) = output.trim().split_once(' ').unwrap();
    (lost.parse().unwrap(), fastest.parse().unwrap())
}

#[test]
fn links_as_they_are() {
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    or_skip!(program("python3"));
    let (lost, fastest_us) = ping(&lab, 50, 2.0);
    assert_eq!(lost, 0);
    assert!(fastest_us < 2000, "{fastest_us} us");
}

#[test]
fn links_with_delay_and_loss() {
    let lab = or_skip!(Lab::with(&["--nodes", "2", "--delay-us", "5000"]));
    or_skip!(program("python3"));
    let (lost, fastest_us) = ping(&lab, 50, 2.0);
    assert_eq!(lost, 0);
    assert!((10_000..14_000).contains(&fastest_us), "{fastest_us} us");
    drop(lab);
    let lab = or_skip!(Lab::with(&["--nodes", "2", "--loss", "20%", "--seed", "3"]));
    let (lost, _) = ping(&lab, 200, 0.1);
    // Each of two ways loses a fifth: 36 in 100.
    assert!((40..110).contains(&lost), "{lost} of 200");
}

#[test]
fn links_with_large_packets() {
    or_skip!(program("python3"));
    for more in [&[][..], &["--delay-us", "10"]] {
        let options = ["--nodes", "2", "--mtu", "9000"];
        let lab = or_skip!(Lab::with(&[&options, more].concat()));
        assert_eq!(ping_with(&lab, 3, 5.0, 8900).0, 0);
    }
}

#[test]
fn links_with_a_rate() {
    let lab = or_skip!(Lab::with(&["--nodes", "2", "--rate", "40mbit"]));
    or_skip!(program("python3"));
    let server = r"
import socket, time
l = socket.socket(); l.bind(('', 4712)); l.listen(1)
print('ready', flush=True)
c = l.accept()[0]
n, start = 0, time.monotonic()
while d := c.recv(1 << 20): n += len(d)
print(n * 8 / (time.monotonic() - start) / 1e6)
";
    let mut server = lab
        .exec_with(2, &["--machine-files"])
        .args(["python3", "-c", server])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = std::io::BufReader::new(server.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    let client =
        "import socket; s = socket.create_connection(('10.77.0.2', 4712)); s.sendall(bytes(5 << 20))";
    stdout(&lab.exec(1).args(["python3", "-c", client]).output().unwrap());
    line.clear();
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    server.wait().unwrap();
    let mbit: f64 = line.trim().parse().unwrap();
    assert!((25.0..48.0).contains(&mbit), "{mbit} Mbit/s");
}

#[test]
fn a_quota_is_kept() {
    let lab = or_skip!(Lab::with(&["--nodes", "1", "--cpu-quota", "0.25"]));
    or_skip!(program("python3"));
    // Of the kernel's periods, which are of 20 ms (cpu.stat, in both versions of cgroups), of which a machine that stalls has no more than it uses.
    let count = |what: &str| {
        let name = format!("*{}*", lab.name());
        let find = [
            "/sys/fs/cgroup",
            "-path",
            &name,
            "-name",
            "cpu.stat",
            "-exec",
            "cat",
            "{}",
            "+",
        ];
        let output = Command::new("find").args(find).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let counts = text.lines().filter_map(|line| line.strip_prefix(what));
        counts.map(|n| n.trim().parse::<u64>().unwrap()).sum::<u64>()
    };
    let before = ["nr_periods ", "nr_throttled "].map(count);
    let script = "import time\nwhile time.process_time() < 0.5: pass";
    let output = lab.exec(1).args(["python3", "-c", script]).output().unwrap();
    assert!(output.status.success());
    let after = ["nr_periods ", "nr_throttled "].map(count);
    // At 0.1 to 0.4 s of CPU time in a second.
    let periods = after[0] - before[0];
    assert!(
        (62..=250).contains(&periods),
        "half a second of CPU time in {periods} periods"
    );
    assert!(after[1] > before[1], "it was never held back");
    let groups = || fs::read_to_string("/proc/self/cgroup").unwrap();
    assert!(!groups().contains(lab.name()));
}

/// Everything outside that a lab could leave: network devices, mounts, control groups, files.
fn traces() -> Vec<String> {
    let mut all: Vec<String> = fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .map(Into::into)
        .collect();
    all.extend(
        fs::read_dir("/sys/class/net")
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned()),
    );
    let find = Command::new("find")
        .args(["/sys/fs/cgroup", "-name", "mosrun-*"])
        .output()
        .unwrap();
    all.push(String::from_utf8_lossy(&find.stdout).into_owned());
    all
}

fn processes_of(lab: &Lab) -> Vec<String> {
    let status = lab.status();
    status["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n["pid"].to_string())
        .collect()
}

#[test]
fn nothing_is_left() {
    let before = traces();
    let lab = or_skip!(Lab::with(&["--nodes", "3", "--cpu-quota", "1"]));
    let pids = processes_of(&lab);
    assert_eq!(pids.len(), 3);
    assert_ne!(traces().last(), before.last(), "the quota has a control group");
    // Also when commands run, in the foreground and as daemons.
    let mut running = lab.exec(1).args(["sleep", "1000"]).spawn().unwrap();
    stdout(&sh(&lab, 1, "setsid -f sleep 1000 >/dev/null 2>&1"));
    let dir = lab.dir();
    assert!(dir.exists());
    drop(lab);
    assert_eq!(running.wait().unwrap().signal(), Some(9));
    assert!(!dir.exists());
    assert_eq!(traces(), before);
    for pid in pids {
        // Whoever reaps this machine's orphans may take its time.
        let status = fs::read_to_string(Path::new("/proc").join(&pid).join("status")).unwrap_or_default();
        assert!(
            status.is_empty() || status.contains("State:\tZ"),
            "{pid} lives: {status}"
        );
    }
}

#[test]
fn several_at_once() {
    let (a, b) = (
        or_skip!(Lab::with(&["--nodes", "2"])),
        or_skip!(Lab::with(&["--nodes", "2"])),
    );
    let place = Place::new();
    fs::create_dir(place.path()).unwrap();
    let of = |lab: &Lab| {
        stdout(&sh(
            lab,
            1,
            "readlink /proc/self/ns/net; ip -4 -br address show eth0",
        ))
    };
    let (one, two) = (of(&a), of(&b));
    assert!(one.contains("10.77.0.1/24") && two.contains("10.77.0.1/24"));
    assert_ne!(one, two);
    b.end();
    assert_eq!(sh(&a, 1, "exit 3").status.code(), Some(3));
    let again = mosctl().args(["lab", "up", "--name", a.name()]).output().unwrap();
    assert_eq!(again.status.code(), Some(125));
    assert!(text(&again).contains("already up"), "{}", text(&again));
}

#[test]
fn run_is_up_command_down() {
    or_skip!(Lab::shared());
    let place = Place::new();
    fs::create_dir(place.path()).unwrap();
    let output = mosctl()
        .args([
            "lab",
            "run",
            "--nodes",
            "2",
            "--",
            "sh",
            "-c",
            "hostname; pwd; exit 9",
        ])
        .current_dir(place.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(9), "{}", text(&output));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("node1\n{}\n", place.path().display())
    );
    let output = mosctl()
        .args(["lab", "run", "--nodes", "1", "--", "sh", "-c", "kill -15 $$"])
        .output()
        .unwrap();
    assert_eq!(output.status.signal(), Some(15));
    let output = mosctl()
        .args(["lab", "run", "--nodes", "1", "--", "no-such-program"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(127));
    let status = mosctl().args(["lab", "status"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&status.stdout).contains("run-"));
}

/// The creator is killed at any moment of `up`: no process stays, and the name can be used again.
#[test]
fn a_killed_creator_leaves_nothing_running() {
    or_skip!(Lab::shared());
    let name = format!("test-{}-killed", std::process::id());
    for delay_us in (0..60_000).step_by(7_500) {
        let mut up = mosctl()
            .args(["lab", "up", "--nodes", "3", "--name", &name])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(delay_us));
        up.kill().unwrap();
        let finished = up.wait().unwrap().success();
        let dir = std::env::var("MOSRUN_RUNDIR").unwrap_or_else(|_| "/run/mosrun".into());
        let dir = Path::new(&dir).join("labs").join(&name);
        if dir.exists() {
            let down = mosctl().args(["lab", "down", "--name", &name]).output().unwrap();
            assert!(
                down.status.success(),
                "killed after {delay_us} us (finished: {finished}): {}",
                text(&down)
            );
        }
        assert!(!dir.exists());
    }
    // And without a `down` in between: what an interrupted `up` left does not stop the next.
    let mut up = mosctl()
        .args(["lab", "up", "--nodes", "3", "--name", &name])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(12));
    up.kill().unwrap();
    up.wait().unwrap();
    let again = mosctl()
        .args(["lab", "up", "--nodes", "1", "--name", &name])
        .output()
        .unwrap();
    let down = mosctl().args(["lab", "down", "--name", &name]).output().unwrap();
    assert!(down.status.success(), "{}", text(&down));
    assert!(
        again.status.success() || text(&again).contains("already up"),
        "{}",
        text(&again)
    );
}

#[test]
fn a_dead_node_is_told() {
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    let pid = lab.status()["nodes"][1]["pid"].as_i64().unwrap() as i32;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_for("the node to die", || lab.status()["nodes"][1]["alive"] == false);
    assert_eq!(lab.status()["up"], false);
    let output = lab.exec(2).arg("mosctl").output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output).contains("is dead"), "{}", text(&output));
    assert_eq!(sh(&lab, 1, "exit 4").status.code(), Some(4));
}

#[test]
fn a_plain_user() {
    let lab = or_skip!(Lab::with(&["--nodes", "2", "--user", "4711"]));
    let seen = stdout(&sh(
        &lab,
        1,
        "id -u; id -G; grep -E '^Cap(Prm|Eff|Inh)' /proc/self/status; ls -ld $MOSRUN_RUNDIR",
    ));
    let lines: Vec<_> = seen.lines().collect();
    assert_eq!(&lines[..2], ["4711", "4711"]);
    for capabilities in &lines[2..5] {
        assert!(capabilities.ends_with("\t0000000000000000"), "{seen}");
    }
    assert!(
        lines[5].starts_with("drwx------ ") && lines[5].contains(" 4711 4711 "),
        "{seen}"
    );
    // And another one on request.
    let output = lab
        .exec_with(1, &["--user", "0"])
        .args(["id", "-u"])
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "0\n");
    let output = lab
        .exec_with(1, &["--user", "nobody-of-that-name"])
        .args(["id", "-u"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
}

#[test]
fn wrong_command_lines() {
    for (words, expected) in [
        (&["up", "--nodes", "0"][..], "1 to 64 nodes"),
        (&["up", "--loss", "2"], "share"),
        (&["up", "--rate", "fast"], "gbit"),
        (&["up", "--name", "../x"], "not usable"),
        (&["up", "--cpu-quota", "0"], "quota"),
        (&["up", "--user", "nobody-of-that-name"], "no user"),
        (&["down", "--name", "none-of-that-name"], "no lab"),
        (
            &["exec", "--name", "none-of-that-name", "1", "--", "true"],
            "no lab",
        ),
    ] {
        let output = mosctl().arg("lab").args(words).output().unwrap();
        assert!(!output.status.success());
        assert!(text(&output).contains(expected), "{words:?}: {}", text(&output));
    }
}
