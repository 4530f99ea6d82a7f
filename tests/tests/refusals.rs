//! What cannot be done is refused with a reason, or done at home; a program is never left half started.

use std::fs;
use std::process::Output;
use std::time::Duration;

use tests::compare::{Case, End, How, Place, same};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::{Running, wait_for};

fn mosrun(lab: &Lab, words: &[&str]) -> Output {
    let mut command = lab.exec(1);
    command.arg("mosrun").args(words);
    command.output().expect("mosctl can be started")
}

/// The program was not started: status 125, a reason, and nothing on standard output.
fn refused(output: &Output, reason: &str) {
    assert_eq!(output.status.code(), Some(125), "{}", text(output));
    assert!(output.stdout.is_empty(), "{}", text(output));
    assert!(
        text(output).contains(reason),
        "{reason:?} is not said: {}",
        text(output)
    );
}

#[test]
fn unknown_nodes() {
    let lab = or_skip!(Lab::shared());
    for node in ["17", "no-such-node", "10.77.0.99"] {
        refused(&mosrun(&lab, &["-r", node, "echo", "started"]), node);
    }
    refused(&mosrun(&lab, &["-17", "echo", "started"]), "17");
    refused(&mosrun(&lab, &["-j", "17-19", "echo", "started"]), "");
}

#[test]
fn wrong_command_lines() {
    let lab = or_skip!(Lab::shared());
    for words in [
        &["--no-such-option", "true"][..],
        &[],
        &["-r"],
        &["-r", "2", "-h", "true"],
        &["-j", "x-", "true"],
    ] {
        let output = mosrun(&lab, words);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {}", text(&output));
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{words:?}: {}",
            text(&output)
        );
    }
}

#[test]
fn programs_that_cannot_be_started() {
    let lab = or_skip!(Lab::shared());
    for how in [["-r", "2"], ["-h", "--"]] {
        let run = |program: &str| mosrun(&lab, &[how[0], how[1], program]);
        for (program, status) in [
            ("no-such-program", 127),
            ("/no/such/program", 127),
            ("/etc/passwd", 126),
            ("/", 126),
            ("/etc/passwd/x", 127),
        ] {
            let output = run(program);
            assert_eq!(
                output.status.code(),
                Some(status),
                "{how:?} {program}: {}",
                text(&output)
            );
            assert!(text(&output).contains(program), "{}", text(&output));
        }
    }
}

#[test]
fn a_node_that_is_down() {
    let lab = or_skip!(Lab::with(&["--nodes", "3"]));
    let pid = lab.status()["nodes"][2]["pid"].as_i64().unwrap() as i32;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    // At once, before anybody has noticed, and later, when the cluster knows.
    refused(&mosrun(&lab, &["-r", "3", "echo", "started"]), "3");
    wait_for("the cluster to notice", Duration::from_secs(30), || {
        let output = lab.exec(1).args(["mosctl", "status"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .any(|l| l.contains("node3") && l.contains("down"))
    });
    refused(&mosrun(&lab, &["-r", "3", "echo", "started"]), "down");
    let output = mosrun(&lab, &["-F", "-r", "3", "echo", "started"]);
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(0), &b"started\n"[..]),
        "{}",
        text(&output)
    );
    let notice = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(notice.lines().count(), 1, "{notice}");
    assert!(
        notice.contains("node 3 (node3) is down; the program runs here"),
        "{notice}"
    );
    // The others are not concerned, and the best node is one that answers.
    assert_eq!(mosrun(&lab, &["-r", "2", "echo", "started"]).stdout, b"started\n");
    for _ in 0..5 {
        let output = mosrun(&lab, &["-b", "echo", "started"]);
        assert_eq!(output.stdout, b"started\n", "{}", text(&output));
    }
}

#[test]
fn without_a_daemon() {
    let lab = or_skip!(Lab::with(&["--nodes", "2", "--bare"]));
    assert_eq!(mosrun(&lab, &["echo", "at home"]).stdout, b"at home\n");
    assert_eq!(mosrun(&lab, &["-b", "echo", "at home"]).stdout, b"at home\n");
    assert_eq!(mosrun(&lab, &["-h", "echo", "at home"]).stdout, b"at home\n");
    refused(&mosrun(&lab, &["-r", "2", "echo", "started"]), "mosd");
    let fallen_back = mosrun(&lab, &["-F", "-r", "2", "echo", "at home"]);
    assert_eq!(fallen_back.stdout, b"at home\n");
    assert!(
        text(&fallen_back).contains("the program runs here"),
        "{}",
        text(&fallen_back)
    );
}

/// mosrun itself writes nothing unless asked, and says what it does when asked.
#[test]
fn silence() {
    let lab = or_skip!(Lab::shared());
    for words in [
        &["-r", "2", "true"][..],
        &["-h", "true"],
        &["-b", "true"],
        &["-r", "2", "--", "sh", "-c", "exit 0"],
    ] {
        let output = mosrun(&lab, words);
        assert_eq!(
            (output.status.code(), output.stdout.len(), output.stderr.len()),
            (Some(0), 0, 0),
            "{}",
            text(&output)
        );
    }
    assert!(!mosrun(&lab, &["-v", "-r", "2", "true"]).stderr.is_empty());
    let place = Place::new();
    fs::create_dir(place.path()).unwrap();
    let log = place.path().join("log");
    let output = mosrun(&lab, &["--log", &log.to_string_lossy(), "-r", "2", "true"]);
    assert_eq!(
        (output.status.code(), output.stderr.len()),
        (Some(0), 0),
        "{}",
        text(&output)
    );
    // The deputy writes its last word when the program has ended.
    wait_for("the log", Duration::from_secs(10), || {
        fs::read_to_string(&log).unwrap().contains("the job has ended")
    });
}

#[test]
fn full_and_read_only_disks() {
    let lab = or_skip!(Lab::shared());
    let script = r#"
mkdir small ro
mount -t tmpfs -o size=100k none small || exit 77
mount -t tmpfs -o ro none ro || exit 77
dd if=/dev/zero of=small/f bs=4k count=100 2>&1 | grep -v copied; echo ${PIPESTATUS[0]}; stat -c %s small/f
seq 1 100000 > small/g; echo $?
echo x > ro/f; echo $?
umount small ro
echo full > /dev/full; echo $?
"#;
    same(&lab, &Case::bash(script), &[How::Away(2)]);
}

/// Limits on what one process may open, write and start.
#[test]
fn limits_of_the_shell() {
    let lab = or_skip!(Lab::shared());
    // What bash tells of its children has their pids.
    let script = r#"
exec 2>/dev/null
(ulimit -n 6; cat /etc/passwd /etc/group > /dev/null; echo $?; exec 7< /etc/passwd; echo not reached)
(ulimit -f 1; seq 1 10000 > big; echo $?)
(ulimit -v 50000; /usr/bin/python3 -c 'x = bytearray(200 << 20)' 2>&1 | tail -1)
(ulimit -t 1; /usr/bin/python3 -c 'while True: pass'; echo $?)
(ulimit -s 256; /bin/echo small stack)
(ulimit -c 0; sh -c 'kill -SEGV $$'; echo $?)
"#;
    same(&lab, &Case::bash(script), &[How::Away(2)]);
}

/// A cluster's nodes serve nobody else: not another cluster's node, and nothing that is sent to their port at random.
#[test]
fn strangers() {
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    // A node of another cluster, in the same network, that asks ours to let it in.
    let other = r#"
top=$(mktemp -d); export MOSRUN_CONFIG=$top/mosd.toml MOSRUN_RUNDIR=$top/run
printf '[node]\nlisten = "10.77.0.1:7118"\nseeds = ["10.77.0.2:7117"]\nstate_dir = "%s/state"\n[load]\nspeed = 1000\n' $top > $MOSRUN_CONFIG
mosctl cluster init --name other > /dev/null 2>&1 || exit 1
mosd || exit 2
echo up; read line
mosctl status --json | grep -c '"status": "alive"'
mosrun -r 2 echo started
kill $(mosctl status --json | sed -n 's/^    "pid": \([0-9]*\),$/\1/p'); rm -r $top
"#;
    let mut stranger = lab.exec(1);
    stranger.args(["sh", "-c", other]);
    let mut stranger = Running::spawn(stranger);
    assert_eq!(stranger.line(), "up");
    wait_for("the stranger to ask", Duration::from_secs(20), || {
        let log = fs::read_to_string(lab.dir().join("node2.log")).unwrap();
        log.lines()
            .any(|l| l.contains("connection from 10.77.0.1:7118") && l.contains("certificate"))
    });
    stranger.write("go on\n");
    // It knows itself, and nobody else.
    assert_eq!((stranger.line(), stranger.line()), ("1".into(), String::new()));
    stranger.wait();
    let status = lab.exec(1).args(["mosctl", "status"]).output().unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("node2") && !status.contains("7118"), "{status}");
    // Datagrams that mean nothing, or begin like something, do not stop a node from serving.
    let noise = r"
import os, random, socket
random.seed(1)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range(3000):
    n = random.choice([0, 1, 20, 1200, 1400, 9000, 60000])
    d = random.randbytes(n)
    if i % 3 == 0: d = b'\xc0\x00\x00\x00\x01' + d[:1195]
    try: s.sendto(d, ('10.77.0.2', 7117))
    except OSError: pass
";
    let output = lab.exec(1).args(["python3", "-c", noise]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(mosrun(&lab, &["-r", "2", "echo", "served"]).stdout, b"served\n");
}

/// The control socket of a daemon, and a job's own, take what is sent to them as what it is: bytes of a stranger.
#[test]
fn noise_at_the_sockets() {
    let lab = or_skip!(Lab::shared());
    let mut running = Running::script(&lab, How::Away(2), "echo $$; read line; exit 4");
    running.number();
    let noise = r"
import glob, os, random, socket
random.seed(2)
paths = glob.glob(os.environ['MOSRUN_RUNDIR'] + '/*.sock') + glob.glob(os.environ['MOSRUN_RUNDIR'] + '/jobs/*.sock')
assert len(paths) >= 2, paths
for path in paths:
    for n in (0, 1, 4, 100, 100000):
        for head in (b'', b'\xff' * 8, (1 << 31).to_bytes(4, 'little'), (5).to_bytes(4, 'little')):
            s = socket.socket(socket.AF_UNIX)
            s.settimeout(1)
            try:
                s.connect(path)
                s.sendall(head + random.randbytes(n))
                s.shutdown(socket.SHUT_WR)
                while s.recv(1000): pass
            except OSError: pass
            s.close()
print('sent')
";
    let output = lab.exec(1).args(["python3", "-c", noise]).output().unwrap();
    assert_eq!(output.stdout, b"sent\n", "{}", text(&output));
    assert_eq!(mosrun(&lab, &["-r", "2", "echo", "served"]).stdout, b"served\n");
    running.write("go\n");
    assert_eq!(running.wait(), End::Code(4));
}

/// A process that cannot leave home says why, and goes on there.
#[test]
fn processes_that_stay_at_home() {
    let lab = or_skip!(Lab::shared());
    let prepare = [
        (
            "maps a file shared and writable",
            "f = open('/tmp/mapped', 'w+b'); f.truncate(4096); os.unlink('/tmp/mapped'); m = mmap.mmap(f.fileno(), 4096)",
        ),
        (
            "uses io_uring",
            "libc = ctypes.CDLL(None); ring = libc.syscall(425, 8, (ctypes.c_char * 120)()); assert ring >= 0; m = mmap.mmap(ring, 4096)",
        ),
        (
            "uses userfaultfd",
            "libc = ctypes.CDLL(None); fd = libc.syscall(323, 0); assert fd >= 0
assert libc.ioctl(fd, 0xc018aa3f, struct.pack('QQQ', 0xaa, 0, 0)) == 0
m = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
at = ctypes.addressof(ctypes.c_char.from_buffer(m))
assert libc.ioctl(fd, 0xc020aa00, struct.pack('QQQQ', at, 4096, 1, 0)) == 0",
        ),
    ];
    for (reason, prepare) in prepare {
        let script = format!(
            "import ctypes, mmap, os, signal, struct, sys\nprint(os.getpid(), flush=True)\n{prepare}\nprint('ready', flush=True)\nsys.stdin.readline()\nsys.exit(6)"
        );
        let mut running = Running::start(&lab, How::Home, ["python3", "-c", &script]);
        let pid = running.number();
        assert_eq!(running.line(), "ready");
        let run = |words: &[&str]| lab.exec(1).args(words).output().expect("mosctl can be started");
        let pid = pid.to_string();
        let moved = run(&["mosmigrate", &pid, "2"]);
        assert!(!moved.status.success(), "{}", text(&moved));
        assert!(text(&moved).contains(reason), "{reason:?}: {}", text(&moved));
        let list = run(&["mosps"]);
        let shown = String::from_utf8_lossy(&list.stdout);
        let line = shown.lines().find(|l| l.contains(&pid)).unwrap_or_default();
        assert!(line.contains(reason), "{shown}");
        running.write("\n");
        assert_eq!(running.wait(), End::Code(6), "{reason}");
    }
}
