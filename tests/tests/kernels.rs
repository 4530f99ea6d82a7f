//! Two kernels and two kinds of processor: this machine, and a virtual one with Debian 12's kernel.

use std::process::Output;

use tests::build::{Link, guest};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::vm::Vm;

/// Number of the virtual machine in the cluster of a lab of two nodes.
const VM: &str = "3";
/// What only the virtual machine's processor is called.
const MODEL: &str = "E312xx";

/// Computes in three threads with memory of its own, asks for its own moves to the places that it is given, and says after each
/// whether it is on the virtual machine, whether its memory is what it was, its threads got on, and no clock went back.
const TRAVELLER: &str = "
import os, sys, threading, time, zlib
blocks = [os.urandom(1 << 18) for _ in range(3)]
sums = [zlib.crc32(b) for b in blocks]
count = [0] * 3
def work(i):
    while True:
        zlib.crc32(blocks[i]) == sums[i] or os._exit(99)
        count[i] += 1
for i in range(3):
    threading.Thread(target=work, args=(i,), daemon=True).start()
clocks = lambda: [time.clock_gettime(c) for c in (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_MONOTONIC_RAW)]
before, then = list(count), clocks()
for to in sys.argv[2:]:
    if os.system(f'mosmigrate {os.getpid()} {to}'):
        sys.exit(f'not moved to {to}')
    while not all(now > was for now, was in zip(count, before)):
        time.sleep(0.01)
    now = clocks()
    there = sys.argv[1] in open('/proc/cpuinfo').read()
    print(to, there, [zlib.crc32(b) for b in blocks] == sums, all(b >= a for a, b in zip(then, now)), flush=True)
    before, then = list(count), now
os._exit(7)
";

/// What a traveller says of its way, `there` being where the model is that it looks for.
fn says(way: &[&str], there: &[&str]) -> String {
    way.iter()
        .map(|to| {
            let seen = if there.contains(to) { "True" } else { "False" };
            format!("{to} {seen} True True\n")
        })
        .collect()
}

fn here(lab: &Lab, words: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("directory for what the program writes");
    lab.exec(1)
        .args(words)
        .current_dir(dir.path())
        .output()
        .expect("mosrun starts")
}

#[test]
fn processes_move_between_two_kernels() {
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    let mut vm = or_skip!(Vm::join(&lab));
    let python = "/usr/bin/python3";

    // From here to there, on, and back.
    let way = [VM, "home", "2", VM, "home"];
    let mut command = vec![
        "mosrun", "--cpu", "baseline", "-h", python, "-c", TRAVELLER, MODEL,
    ];
    command.extend(way);
    let output = here(&lab, &command);
    assert_eq!(
        (
            String::from_utf8_lossy(&output.stdout).as_ref(),
            output.status.code()
        ),
        (says(&way, &[VM]).as_str(), Some(7)),
        "{}",
        text(&output)
    );

    // From there to here. The program is written down first: a console's lines are short.
    for line in TRAVELLER.lines() {
        let quoted = line.replace('\'', "'\\''");
        assert_eq!(vm.run(&format!("echo '{quoted}' >> /tmp/traveller")).1, 0);
    }
    let way = ["1", "home", "2", "1", "home"];
    let (output, status) = vm.run(&format!(
        "mosrun -h {python} /tmp/traveller {MODEL} {}",
        way.join(" ")
    ));
    assert_eq!((output, status), (says(&way, &["home"]), 7));

    // Started there, from here.
    for name in ["fork_wait", "signals", "threads"] {
        let program = or_skip!(guest(name, Link::Dynamic));
        let program = program.to_string_lossy();
        let (native, away) = (
            here(&lab, &[&program]),
            here(&lab, &["mosrun", "--cpu", "baseline", "-r", VM, &program]),
        );
        assert_eq!(text(&away), text(&native), "{name}");
        assert_eq!(away.status.code(), Some(0), "{name}");
    }

    // What may use instructions that are not there stays.
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").expect("it is there");
    if cpuinfo.contains(" avx2 ") {
        let output = here(
            &lab,
            &["mosrun", "-w", "-r", VM, "grep", "-c", MODEL, "/proc/cpuinfo"],
        );
        assert_eq!(String::from_utf8_lossy(&output.stdout), "0\n");
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(why.contains("lacks") && why.contains("avx2"), "{why}");
    }
}
