//! Without root: daemons and programs of a plain user without capabilities; and jobs of several users, with the daemons
//! root's.

use std::process::Output;

use tests::build::{Link, guest};
use tests::compare::{Case, End, How, same};
use tests::lab::{ADA, Lab, text};
use tests::or_skip;
use tests::running::Running;

/// Another user that no machine has.
const BOB: u32 = 47_111;

/// Programs of the tests' own directories, where others can reach them.
fn case(name: &str) -> Result<Case, tests::skip::Skip> {
    let program = guest(name, Link::Dynamic)?;
    // The tests' directory may be closed to others: the guest goes with the case.
    Ok(Case::new([format!("./{name}")]).tree(name, program))
}

macro_rules! guests {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() {
            let lab = or_skip!(Lab::plain(3));
            let native = same(&lab, &or_skip!(case(stringify!($name))), &[How::Home, How::Away(2)]);
            assert_eq!(native.end, End::Code(0), "natively: {native:?}");
        })*
    };
}

/// Guests that ask for nothing that only root has.
mod guests {
    use super::*;

    guests! {
        borrowed_memory, exec_forms, fds, fork_wait, locks, long_paths, memory, pipes, pollers, sessions, shared_memory, sigchld,
        signals, spawn, storms, tcp,
        tempmask, thread_ends, threads, timers, tree, unix_sockets, vfork,
    }
}

/// No process of the user has capabilities, at either end.
#[test]
fn no_capabilities_anywhere() {
    let lab = or_skip!(Lab::plain(3));
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
    // Each job has a supervisor of its own, which is its user's.
    let there = lab.inspect(2, "ps -e -o uid=,comm=");
    for user in [ADA, BOB] {
        let of_user = |name: &str| {
            let words = [&user.to_string(), name];
            there.lines().filter(|l| l.split_whitespace().eq(words)).count()
        };
        assert_eq!((of_user("mosd-supervise"), of_user("bash")), (1, 1), "{there}");
    }
    // Neither sees or moves the other's.
    let list = as_user(&lab, ADA, &["mosps", "--json"]);
    let list: Vec<serde_json::Value> = serde_json::from_slice(&list.stdout).expect("JSON");
    let listed: Vec<_> = list.iter().map(|p| p["pid"].as_i64().unwrap() as i32).collect();
    assert_eq!(listed, [pids[0]]);
    let moved = as_user(&lab, ADA, &["mosmigrate", &pids[1].to_string(), "home"]);
    assert!(!moved.status.success(), "{}", text(&moved));
    for forbidden in ["kill PID", "cat /proc/PID/environ", "cat /proc/PID/mem"] {
        let script = forbidden.replace("PID", &pids[1].to_string());
        let output = as_user(&lab, ADA, &["sh", "-c", &script]);
        assert!(!output.status.success(), "{forbidden}: {}", text(&output));
    }
    // Root sees and moves both.
    let list = lab.exec(1).args(["mosps", "--json"]).output().expect("mosps");
    let list: Vec<serde_json::Value> = serde_json::from_slice(&list.stdout).expect("JSON");
    let seen = |pid: i32, uid: u32, node: u64| {
        list.iter()
            .any(|p| p["pid"] == pid && p["uid"] == uid && p["node"] == node)
    };
    assert!(seen(pids[0], ADA, 2) && seen(pids[1], BOB, 2), "{list:?}");
    let mut command = lab.exec(1);
    command.args(["mosmigrate", &pids[1].to_string(), "home"]);
    let moved = command.output().expect("mosmigrate");
    assert!(moved.status.success(), "{}", text(&moved));
    for job in &mut jobs {
        job.write("\n");
        assert_eq!(job.wait(), End::Code(5));
    }
}

/// A program with another user's privileges has them, whoever executes it: it runs at home, and nobody traces it.
#[test]
fn programs_with_privileges_have_them() {
    let lab = or_skip!(Lab::plain(2));
    let place = tests::compare::Place::new();
    let copy = |name: &str, mode: u32| {
        let program = place.path().with_extension(name);
        std::fs::copy("/usr/bin/id", &program).expect("a copy of id");
        std::os::unix::fs::chown(&program, Some(0), Some(4)).expect("its owner");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(&program, mode).expect("its mode");
        program.to_string_lossy().into_owned()
    };
    let (user, group) = (copy("user", 0o4755), copy("group", 0o2755));
    for how in ["", "-h", "-r 2"] {
        let script = format!(
            "mosrun {how} {user} -u; mosrun {how} {group} -g
mosrun {how} sh -c '{user} -u; {group} -g; (exec {user} -u) | cat; cd ${{0%/*}}; ./${{0##*/}} -u; exec ./${{0##*/}} -u' {user}
mosrun {how} sh -c '{user} -u & wait $!; echo $?; {user} --no-such-option 2>/dev/null; echo $?'"
        );
        let output = lab.exec(1).args(["sh", "-c", &script]).output().expect("a shell");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "0\n4\n0\n4\n0\n0\n0\n0\n0\n1\n",
            "mosrun {how}: {}",
            text(&output)
        );
    }
}
