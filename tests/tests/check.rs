//! `mosctl check`: says what a kernel lacks, what that costs, and how to get it, to root and to everybody else.

use std::process::Output;

use tests::lab::{Lab, text};
use tests::or_skip;
use tests::skip::program;

fn check(lab: &Lab, user: &str, before: &[&str], options: &[&str]) -> Output {
    let mut command = lab.exec_with(1, &["--user", user]);
    command.args(before).args(["mosctl", "check"]).args(options);
    command.output().expect("mosctl can be started")
}

#[test]
fn what_there_is() {
    let lab = or_skip!(Lab::with(&["--nodes", "1", "--bare"]));
    for user in ["root", "47110"] {
        let output = check(&lab, user, &[], &[]);
        assert_eq!(output.status.code(), Some(0), "{user}: {}", text(&output));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.starts_with("kernel "), "{said}");
        assert!(
            said.ends_with("guests can run on this node; its own processes can run away\n"),
            "{said}"
        );
        let output = check(&lab, user, &[], &["--json"]);
        let probes: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).expect("JSON");
        assert!(probes.len() >= 17, "{}", text(&output));
        for probe in &probes {
            for what in ["name", "purpose", "need", "consequence", "remedy"] {
                assert!(probe[what].as_str().is_some_and(|s| !s.is_empty()), "{probe}");
            }
            let name = probe["name"].as_str().unwrap_or_default();
            assert!(said.contains(&format!(" {name} ")), "{name} is not in {said}");
        }
    }
}

#[test]
fn what_is_missing_is_said() {
    or_skip!(program("unshare"));
    let lab = or_skip!(Lab::with(&["--nodes", "1", "--bare"]));
    // In a user namespace that must not have further ones.
    let script = "echo 0 > /proc/sys/user/max_user_namespaces; exec \"$@\"";
    let without = ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh"];
    let output = check(&lab, "47110", &without, &[]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(said.contains("MISSING  cage "), "{said}");
    for line in [
        "found: ",
        "so: no guest can run on this node",
        "remedy: allow user namespaces: user.max_user_namespaces",
        "guests CANNOT run on this node; its own processes can run away",
    ] {
        assert!(said.contains(line), "{line:?} is not in {said}");
    }
    let output = check(&lab, "47110", &without, &["--json"]);
    assert_eq!(output.status.code(), Some(1));
    let probes: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let cage = probes.iter().find(|p| p["name"] == "cage").expect("a probe");
    assert!(cage["outcome"]["missing"].is_string(), "{cage}");
}
