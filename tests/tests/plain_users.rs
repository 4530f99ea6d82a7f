//! Users: without root at either end, and several of them with root's daemons.

use std::process::Output;

use tests::compare::{End, How};
use tests::lab::{Lab, text};
use tests::or_skip;
use tests::running::Running;

/// Plain users; no accounts are needed for them.
const ONE: &str = "12345";
const OTHER: &str = "12346";

fn sh(lab: &Lab, user: &str, script: &str) -> Output {
    lab.exec_with(1, &["--user", user])
        .args(["sh", "-c", script])
        .output()
        .expect("mosctl can be started")
}

fn start(lab: &Lab, user: &str) -> (Running, i32) {
    let mut line = lab.exec_with(1, &["--user", user]);
    line.args(How::Away(2).prefix())
        .args(["sh", "-c", "echo $$; read line; id -u; read line"]);
    let mut running = Running::spawn(line);
    let pid = running.number();
    (running, pid)
}

/// Neither the daemons nor mosrun have a capability; everything goes its way nevertheless.
#[test]
fn without_root_at_both_ends() {
    let lab = or_skip!(Lab::with(&["--nodes", "2", "--user", ONE]));
    let script = "
grep CapEff /proc/self/status; id -u; umask 027
d=$(mktemp -d) && cd $d && echo text > file && cat file | tr a-z A-Z && ls -l | cut -c1-10
(trap 'echo caught; exit 3' USR1; kill -USR1 $BASHPID; sleep 10); echo $?
sleep 1000 & kill $!; wait $!; echo $?
cd / && rm -r $d; kill -QUIT $$";
    let run = |how: How| {
        let mut command = lab.exec(1);
        command.args(how.prefix()).args(["bash", "-c", script]);
        command.output().expect("mosctl can be started")
    };
    let (native, away) = (run(How::Native), run(How::Away(2)));
    assert!(
        text(&native).contains("CapEff:\t0000000000000000"),
        "{}",
        text(&native)
    );
    assert_eq!(text(&native), text(&away));

    let (mut running, pid) = start(&lab, ONE);
    let moved = sh(&lab, ONE, &format!("mosmigrate {pid} home && mosps"));
    assert!(text(&moved).contains("home"), "{}", text(&moved));
    running.write("\n");
    assert_eq!(running.line(), ONE);
    assert_eq!(running.wait(), End::Code(1));
}

/// A program with another user's privileges has them: it runs at home, and nobody traces it.
#[test]
fn programs_with_privileges_have_them() {
    let lab = or_skip!(Lab::with(&["--nodes", "2", "--user", ONE]));
    let place = tests::compare::Place::new();
    let program = place.path().with_extension("id");
    std::fs::copy("/usr/bin/id", &program).expect("a copy of id");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o4755);
    std::fs::set_permissions(&program, mode).expect("its mode");
    let output = sh(&lab, ONE, &format!("mosrun -r 2 {} -u", program.display()));
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "0\n",
        "{}",
        text(&output)
    );
}

/// Jobs of two users on the same nodes neither see nor touch each other.
#[test]
fn two_users() {
    let lab = or_skip!(Lab::with(&["--nodes", "2"]));
    let (mut first, pid) = start(&lab, ONE);
    let (mut second, other) = start(&lab, OTHER);
    for (user, own, foreign) in [(ONE, pid, other), (OTHER, other, pid)] {
        let list = text(&sh(&lab, user, "mosps --json")).replace(char::is_whitespace, "");
        assert!(list.contains(&format!("\"pid\":{own},")), "{list}");
        assert!(!list.contains(&format!("\"pid\":{foreign},")), "{list}");
        for forbidden in ["mosmigrate PID home", "kill PID", "cat /proc/PID/environ"] {
            let output = sh(&lab, user, &forbidden.replace("PID", &foreign.to_string()));
            assert!(!output.status.success(), "{forbidden}: {}", text(&output));
        }
    }
    // On the other node all of a job belongs to its user.
    let there = lab.inspect(2, "ps -e -o uid=,comm=");
    for user in [ONE, OTHER] {
        for name in ["mosd-supervise", "sh"] {
            let found = there
                .lines()
                .filter(|l| l.split_whitespace().eq([user, name]))
                .count();
            assert_eq!(found, 1, "{user} {name}: {there}");
        }
    }
    for (running, user) in [(&mut first, ONE), (&mut second, OTHER)] {
        running.write("\n");
        assert_eq!(running.line(), user);
        assert_eq!(running.wait(), End::Code(1));
    }
}
