//! Without root: daemons and programs of a plain user without capabilities; and jobs of several users, with the daemons
//! root's.

use std::process::Output;

use tests::build::{Link, guest};
use tests::compare::{Case, End, How, same};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::Running;

/// Users that no machine has.
const ADA: u32 = 47_110;
const BOB: u32 = 47_111;

fn plain() -> Result<Lab, tests::skip::Skip> {
    Lab::with(&["--nodes", "3", "--user", &ADA.to_string()])
}

/// Programs of the tests' own directories, where others can reach them.
fn case(name: &str) -> Result<Case, tests::skip::Skip> {
    let program = guest(name, Link::Dynamic)?;
    // The tests' directory may be closed to others: the guest goes with the case.
    // The caller's PATH may have directories that the user cannot enter.
    let case = Case::new([format!("./{name}")]).env("PATH", "/usr/bin:/bin");
    Ok(case.tree(name, program).owner(ADA, ADA))
}

macro_rules! guests {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() {
            let lab = or_skip!(plain());
            let native = same(&lab, &or_skip!(case(stringify!($name))), &[How::Home, How::Away(2)]);
            assert_eq!(native.end, End::Code(0), "natively: {native:?}");
        })*
    };
}

/// Guests that ask for nothing that only root has.
mod guests {
    use super::*;

    guests! {
        exec_forms, fds, fork_wait, locks, long_paths, memory, pipes, pollers, sessions, sigchld, signals, spawn, storms, tcp,
        tempmask, thread_ends, threads, timers, tree, unix_sockets, vfork,
    }
}

#[test]
fn a_shell_and_python() {
    let lab = or_skip!(plain());
    let programs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let case = |file: &str, interpreter: &str| {
        Case::new([interpreter, file])
            .tree(file, programs.join(file))
            .owner(ADA, ADA)
    };
    let native = same(&lab, &case("shell.sh", "bash"), &[How::Away(2)]);
    assert_eq!(native.end, End::Code(42), "{native:?}");
    let native = same(&lab, &case("python.py", "/usr/bin/python3"), &[How::Away(2)]);
    assert_eq!(native.end, End::Code(5), "{native:?}");
}

/// No process of the user has capabilities, at either end.
#[test]
fn no_capabilities_anywhere() {
    let lab = or_skip!(plain());
    let mut running = Running::script(&lab, How::Away(2), "echo $$; read line");
    running.number();
    for node in [1, 2] {
        // All but the node's first process, and those inside of user namespaces of the user's own.
        let seen = lab.inspect(
            node,
            "own=$(readlink /proc/1/ns/user)
for p in $(ps -e -o pid= | grep -v -w -e 1 -e $$); do
    [ \"$(readlink /proc/$p/ns/user)\" = \"$own\" ] || continue
    [ \"$(stat -c %u /proc/$p 2>/dev/null)\" = 0 ] && continue
    echo $(grep -E '^(Uid|CapEff|CapPrm):' /proc/$p/status)
done",
        );
        assert!(seen.lines().count() >= 1, "nothing runs on node {node}");
        for line in seen.lines() {
            assert!(
                line.contains(&format!("Uid: {ADA} {ADA} {ADA} {ADA}")),
                "node {node}: {seen}"
            );
            assert!(
                line.contains("CapPrm: 0000000000000000 CapEff: 0000000000000000"),
                "node {node}: {seen}"
            );
        }
    }
    running.write("\n");
    assert_eq!(running.wait(), End::Code(0));
}

fn as_user(lab: &Lab, user: u32, words: &[&str]) -> Output {
    let user = user.to_string();
    lab.exec_with(1, &["--user", &user])
        .args(words)
        .output()
        .expect("mosctl can be started")
}

/// The daemons are root's, and each job is its user's, at home and away.
#[test]
fn two_users() {
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    let start = |user: u32| {
        let user = user.to_string();
        let mut command = lab.exec_with(1, &["--user", &user]);
        command.args([
            "mosrun",
            "-r",
            "2",
            "--",
            "bash",
            "-c",
            "echo $$; id -u; read line; exit 5",
        ]);
        Running::spawn(command)
    };
    let mut jobs = [start(ADA), start(BOB)];
    let pids: Vec<_> = jobs.iter_mut().map(Running::number).collect();
    assert_eq!(
        jobs.iter_mut().map(|j| j.number() as u32).collect::<Vec<_>>(),
        [ADA, BOB]
    );
    // Away, what holds a guest runs as the guest's user.
    let seen = lab.inspect(2, "ps -e -o uid=");
    for user in [ADA, BOB] {
        assert!(
            seen.lines().any(|l| l.trim() == user.to_string()),
            "nothing of {user} on node 2: {seen}"
        );
    }
    // Neither sees or moves the other's.
    let list = as_user(&lab, ADA, &["mosps", "--json"]);
    let list: Vec<serde_json::Value> = serde_json::from_slice(&list.stdout).expect("JSON");
    let listed: Vec<_> = list.iter().map(|p| p["pid"].as_i64().unwrap() as i32).collect();
    assert_eq!(listed, [pids[0]]);
    let moved = as_user(&lab, ADA, &["mosmigrate", &pids[1].to_string(), "home"]);
    assert!(!moved.status.success(), "{}", text(&moved));
    let killed = as_user(&lab, ADA, &["sh", "-c", &format!("kill {}", pids[1])]);
    assert!(!killed.status.success(), "{}", text(&killed));
    for job in &mut jobs {
        job.write("\n");
        assert_eq!(job.wait(), End::Code(5));
    }
}
