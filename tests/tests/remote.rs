//! What a job is on the other node: what the supervisor made and nothing else, with little memory of its own, whatever the
//! link is like.

use std::collections::BTreeMap;
use std::fs;

use tests::build::{Link, guest};
use tests::compare::{Case, End, How, Place, same};
use tests::lab::Lab;
use tests::or_skip;
use tests::running::Running;
use tests::skip::program;

/// Deputy and supervisor may have this much memory at any time. A call of a GiB passes through both.
const MEMORY_KIB: u64 = 64 << 10;

fn lines(lab: &Lab, node: u32, script: &str) -> Vec<String> {
    lab.inspect(node, script)
        .lines()
        .map(|l| l.trim().to_owned())
        .collect()
}

/// Of each process of node 2 its pid and name, without the one that looks.
fn processes(lab: &Lab) -> BTreeMap<i32, String> {
    let all = lines(lab, 2, "ps -e -o pid=,comm= | grep -v -w -e ps -e sh -e grep");
    all.iter()
        .filter_map(|l| l.split_once(' '))
        .map(|(pid, name)| (pid.parse().expect("a pid"), name.trim().to_owned()))
        .collect()
}

/// A job of known processes, with files, sockets and shared memory of its own.
const TREE: &str = "
import os, socket, sys, threading, time
files = [open('/etc/passwd'), open('file', 'w'), socket.create_server(('127.0.0.1', 0)), socket.socketpair()]
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
children = []
for i in range(3):
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(theirs, b'x')
        time.sleep(1000)
    os.read(ours, 1)
    children.append(pid)
print(os.getpid(), *children, flush=True)
sys.stdin.readline()
for pid in children: os.kill(pid, 9)
";

#[test]
fn what_the_supervisor_made_and_nothing_else() {
    or_skip!(program("python3"));
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    let place = Place::new();
    fs::create_dir(place.path()).unwrap();
    let state = "
        cat /proc/1/mountinfo | sort | sed 's/^/mount /'
        sed -n 's/^.* \\([@/].*\\)$/unix \\1/p' /proc/net/unix | sort
        sed 1d /proc/net/tcp /proc/net/tcp6 | wc -l
        find /proc/1/root -xdev | grep -v -e '^/proc/1/root/proc' -e '/state/' -e '/store' | sort
        ip -br address";
    let before = (processes(&lab), lines(&lab, 2, state));
    let udp = "cat /proc/net/udp /proc/net/udp6 | grep -vc local";
    let sockets: u32 = lines(&lab, 2, udp)[0].parse().unwrap();

    let mut command = lab.exec(1);
    command
        .args(How::Away(2).prefix())
        .args(["/usr/bin/python3", "-c", TREE])
        .current_dir(place.path());
    let mut running = Running::spawn(command);
    let line = running.line();
    let pids: Vec<i32> = line.split(' ').map(|p| p.parse().expect("a pid")).collect();
    assert_eq!(pids.len(), 4, "{line}");

    // One supervisor, the two processes of the cage, a guest for each process: no more.
    let mut new = processes(&lab);
    new.retain(|pid, _| !before.0.contains_key(pid));
    let mut names: Vec<_> = new.values().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "mosd-supervise",
            "mosrun-init",
            "mosrun-nursery",
            "python3",
            "python3",
            "python3",
            "python3"
        ]
    );
    let guests: Vec<i32> = new
        .iter()
        .filter(|(_, name)| *name == "python3")
        .map(|(pid, _)| *pid)
        .collect();
    // In the cage they have the pids of home.
    let inside: Vec<String> = guests
        .iter()
        .flat_map(|pid| lines(&lab, 2, &format!("sed -n 's/^NSpid:.*\\t//p' /proc/{pid}/status")))
        .collect();
    let mut wanted: Vec<String> = pids.iter().map(ToString::to_string).collect();
    let mut found = inside.clone();
    wanted.sort();
    found.sort();
    assert_eq!(found, wanted);
    // Threads as at home.
    let threads = lines(&lab, 2, &format!("ls /proc/{}/task | wc -l", guests[0]));
    assert_eq!(threads, ["2"]);

    let first = guests[0];
    for pid in &guests {
        let of = |what: &str| lines(&lab, 2, &what.replace("PID", &pid.to_string()));
        // No descriptors but those of the contents of files that it has mapped.
        for descriptor in of("for f in /proc/PID/fd/*; do readlink $f; done || true") {
            assert!(descriptor.starts_with("/memfd:mosrun-"), "{descriptor}");
        }
        assert_eq!(of("sed -n 's/^Seccomp:\\t//p' /proc/PID/status"), ["2"]);
        assert_eq!(of("sed -n 's/^NoNewPrivs:\\t//p' /proc/PID/status"), ["1"]);
        assert_eq!(
            of("sed -n 's/^CapEff:\\t//p' /proc/PID/status"),
            ["0000000000000000"]
        );
        // An empty root, on which nothing can be written, is all that is mounted.
        let mounts = of("cut -d' ' -f5- /proc/PID/mountinfo");
        assert_eq!(mounts.len(), 1, "{mounts:?}");
        assert!(mounts[0].starts_with("/ ro,"), "{mounts:?}");
        assert_eq!(of("ls -A /proc/PID/root | wc -l"), ["0"]);
        // No network, and no socket in it.
        assert_eq!(of("sed 1,2d /proc/PID/net/dev | grep -v lo: | wc -l"), ["0"]);
        for table in ["tcp", "tcp6", "udp", "udp6", "unix", "raw"] {
            assert_eq!(
                of(&format!("sed 1d /proc/PID/net/{table} | wc -l")),
                ["0"],
                "{table}"
            );
        }
        for namespace in ["user", "pid", "mnt", "net", "ipc", "uts", "time"] {
            let own = of(&format!("readlink /proc/PID/ns/{namespace}"));
            assert_eq!(
                own,
                lines(&lab, 2, &format!("readlink /proc/{first}/ns/{namespace}"))
            );
            assert_ne!(
                own,
                lines(&lab, 2, &format!("readlink /proc/1/ns/{namespace}")),
                "{namespace}"
            );
        }
    }
    // On the node itself: the supervisor's port (with a socket that listens and one that is connected), and not a file,
    // mount or address.
    let now: u32 = lines(&lab, 2, udp)[0].parse().unwrap();
    assert_eq!(now, sockets + 2);
    let mut more = lines(&lab, 2, state);
    more.retain(|line| !before.1.contains(line));
    // The daemon's note of its supervisor.
    more.retain(|line| !line.starts_with("/proc/1/root/run/mosrun/supervisors/"));
    assert_eq!(more, [""; 0]);
    running.write("end\n");
    assert_eq!(running.wait(), End::Code(0));
}

/// The most memory that a process has had, in KiB.
fn peak(lab: &Lab, node: u32, pid: i32) -> u64 {
    let found = lines(
        lab,
        node,
        &format!("sed -n 's/^VmHWM:[^0-9]*\\([0-9]*\\) kB/\\1/p' /proc/{pid}/status"),
    );
    found.first().and_then(|l| l.parse().ok()).expect("a size")
}

#[test]
fn a_gib_in_one_call_needs_no_gib_of_buffers() {
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    let huge = or_skip!(guest("huge", Link::Dynamic));
    let huge = huge.to_string_lossy();
    // In memory: this is not about disks.
    let place = tempfile::tempdir_in("/dev/shm").expect("/dev/shm");
    let file = place.path().join("big");
    let file = file.to_string_lossy();
    for (what, script) in [
        (
            "write",
            format!("mosrun -r 2 {huge} write 2>&3 | tee {file} | {huge} sum >&3"),
        ),
        (
            "read",
            format!("mosrun -r 2 {huge} read {file} 2>&3; {huge} sum <{file} >&3"),
        ),
    ] {
        let mut command = lab.exec(1);
        command.args(["bash", "-c", &format!("exec 3>&1; {script}")]);
        let mut running = Running::spawn(command);
        let pid = running.number();
        let sum = running.line();
        let deputy = lines(
            &lab,
            1,
            &format!("sed -n 's/^TracerPid:[^0-9]*//p' /proc/{pid}/status"),
        );
        let deputy = deputy[0].parse().expect("a pid");
        let supervisor = processes(&lab)
            .into_iter()
            .find(|(_, name)| name == "mosd-supervise")
            .expect("a supervisor")
            .0;
        for (who, kib) in [
            ("deputy", peak(&lab, 1, deputy)),
            ("supervisor", peak(&lab, 2, supervisor)),
        ] {
            eprintln!("{what}: {who} had {kib} KiB");
            assert!(kib < MEMORY_KIB, "{what}: the {who} had {kib} KiB");
        }
        running.write("\n");
        assert_eq!(running.line(), sum, "{what}");
        assert_eq!(running.wait(), End::Code(0), "{what}");
    }
}

/// On links that are slow and lose packets nothing is lost or done twice.
#[test]
fn bad_links() {
    for options in [
        &["--delay-us", "1000", "--loss", "5%", "--seed", "7"][..],
        &["--rate", "20mbit", "--loss", "1%", "--seed", "8"],
    ] {
        let lab = or_skip!(Lab::with(&[&["--nodes", "2"], options].concat()));
        for name in ["fds", "fork_wait", "signals", "threads", "unix_sockets"] {
            let program = or_skip!(guest(name, Link::Dynamic));
            let native = same(&lab, &Case::new([program]), &[How::Away(2)]);
            assert_eq!(native.end, End::Code(0), "natively: {native:?}");
        }
        let script = "seq 1 20000 > n; tr 1-9 2-91 < n | sort -n | md5sum; for i in 1 2 3; do (exit $i) & wait $!; echo $?; done";
        same(&lab, &Case::bash(script), &[How::Away(2)]);
    }
}
