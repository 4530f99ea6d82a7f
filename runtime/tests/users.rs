//! Whose supervisors are: the kernel says who asks, and the supervisor is theirs and nobody else's.

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{TestCluster, TestNode, eventually, kill_pid};
use runtime::control::{Client, ClientError, FailureKind, SupervisorRequest};
use runtime::job_id::JobId;
use tests::or_skip;
use tests::skip::Skip;

const USER: u32 = 65_534;
const GROUPS: [u32; 2] = [1001, 1002];
const SOCKET: &str = "TEST_MOSD_SOCKET";
const NODE: &str = "TEST_MOSD_NODE";

fn root() -> Result<(), Skip> {
    let found = Command::new("setpriv")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    match (nix::unistd::geteuid().is_root(), found) {
        (false, _) => Err(Skip::NotRoot),
        (true, Err(_)) => Err(Skip::NoProgram("setpriv".into())),
        (true, Ok(_)) => Ok(()),
    }
}

fn as_user(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={USER}"), &format!("--regid={USER}")]);
    command
        .arg(format!("--groups={},{}", GROUPS[0], GROUPS[1]))
        .arg(program);
    command
}

/// Not a test of its own: what [`ask_as_user`] runs as another user.
#[test]
#[ignore = "a part of other tests"]
fn as_another_user() {
    let (Some(socket), Ok(node)) = (std::env::var_os(SOCKET), std::env::var(NODE)) else {
        return;
    };
    let mut client = Client::connect_to(Path::new(&socket)).unwrap();
    let request = SupervisorRequest {
        node: node.parse().unwrap(),
        job: JobId::new(0, std::process::id()),
        peer_fingerprint: [1; 32],
    };
    match client.request_supervisor(request) {
        Ok(placement) => println!("placed {}", placement.pid),
        Err(e) => println!("failed {e}"),
    }
}

/// Has a supervisor started for the other user; its pid, or why not.
fn ask_as_user(socket: &Path, node: u32) -> Result<u32, String> {
    let mut command = as_user(&std::env::current_exe().unwrap());
    command.args(["--exact", "as_another_user", "--ignored", "--nocapture"]);
    let output = command
        .env(SOCKET, socket)
        .env(NODE, node.to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = |word: &str| text.lines().find_map(|l| Some(l.split_once(word)?.1.to_string()));
    match said("placed ") {
        Some(pid) => Ok(pid.trim().parse().unwrap()),
        None => {
            Err(said("failed ")
                .unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr))))
        }
    }
}

fn status_line(pid: u32, key: &str) -> Vec<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap();
    line.split_whitespace().map(str::to_string).collect()
}

#[test]
fn a_supervisor_is_the_callers_and_has_no_rights_of_root() {
    or_skip!(root());
    let cluster = TestCluster::of(2);
    std::fs::set_permissions(cluster.nodes[0].path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let socket = cluster.nodes[0].rundir().join("mosd.sock");
    // on another node: who asks is told by the home node; on this one: by the kernel
    for (node, host) in [(2, &cluster.nodes[1]), (1, &cluster.nodes[0])] {
        let pid = ask_as_user(&socket, node).unwrap();
        assert_eq!(host.status().supervisors[0].uid, USER);
        assert_eq!(status_line(pid, "Uid:"), [&*USER.to_string(); 4]);
        assert_eq!(status_line(pid, "Gid:"), [&*USER.to_string(); 4]);
        assert_eq!(status_line(pid, "Groups:"), GROUPS.map(|g| g.to_string()));
        for set in ["CapEff:", "CapPrm:", "CapAmb:"] {
            assert_eq!(status_line(pid, set), ["0000000000000000"], "{set}");
        }
        // its /proc files are its own again: it must write the id maps of its cage
        assert_eq!(
            std::fs::metadata(format!("/proc/{pid}/uid_map")).unwrap().uid(),
            USER
        );
        kill_pid(pid);
    }
}

#[test]
fn a_users_own_daemon_serves_that_user_only() {
    or_skip!(root());
    let rooted = TestCluster::of(1);
    let node = TestNode::new("n2");
    node.join(&rooted.nodes[0].invite(&[])).assert_ok();
    let own = |path: PathBuf| std::os::unix::fs::chown(path, Some(USER), Some(USER)).unwrap();
    own(node.path().to_owned());
    for entry in ["state", "mosd.toml"] {
        own(node.path().join(entry));
    }
    for entry in std::fs::read_dir(node.path().join("state")).unwrap() {
        own(entry.unwrap().path());
    }
    let log = std::fs::File::create(node.path().join("log")).unwrap();
    let mut command = as_user(Path::new(common::MOSD));
    command
        .args(["--foreground", "--config"])
        .arg(node.config())
        .stdin(Stdio::null())
        .stderr(log);
    let mut daemon = command.env_remove("MOSRUN_RUNDIR").spawn().unwrap();
    let socket = node.rundir().join("mosd.sock");
    eventually("it serves its socket", || {
        assert!(daemon.try_wait().unwrap().is_none(), "{}", node.log());
        socket.exists()
    });
    let pid = ask_as_user(&socket, 2).unwrap();
    assert_eq!(status_line(pid, "Uid:"), [&*USER.to_string(); 4]);
    kill_pid(pid);
    // not even root takes it for the machine's daemon
    assert!(matches!(
        Client::connect_to(&socket),
        Err(ClientError::Impostor { uid: USER, .. })
    ));
    // a job of root that comes from another node is refused, and says how that can be changed
    eventually("they have met", || {
        rooted.nodes[0]
            .nodes()
            .iter()
            .any(|n| n.number == 2 && n.load.is_some())
    });
    let failure = rooted.nodes[0].request_supervisor(2).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Refused);
    assert!(
        failure
            .text
            .contains("takes no jobs of uid 0 (guests.other_users"),
        "{failure}"
    );
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
