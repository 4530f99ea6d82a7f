//! Daemons with directories of their own on the loopback interface.
#![allow(dead_code, missing_docs, reason = "each test program uses a part of it")]

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use runtime::cluster::state::NodeState;
use runtime::cluster::store::{MemberRecord, StateDir};
use runtime::control::{Client, ClientError, DaemonStatus, Failure, Placement, SupervisorRequest};
use runtime::job_id::JobId;

pub const MOSD: &str = env!("CARGO_BIN_EXE_mosd");
pub const MOSCTL: &str = env!("CARGO_BIN_EXE_mosctl");

/// The longest that anything may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds, and panics with `what` when it does not in time.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn kill_pid(pid: u32) {
    let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
}

/// A port that was free a moment ago.
pub fn free_addr() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub struct Done(pub Output);

impl Done {
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }

    pub fn assert_ok(&self) -> &Self {
        assert!(self.0.status.success(), "{}: {}", self.0.status, self.stderr());
        self
    }

    pub fn assert_fails(&self, text: &str) {
        assert!(!self.0.status.success(), "succeeded: {}", self.stdout());
        assert!(
            self.stderr().contains(text),
            "expected {text:?} in: {}",
            self.stderr()
        );
    }
}

pub struct TestNode {
    pub name: String,
    pub dir: tempfile::TempDir,
    pub addr: SocketAddr,
    child: Option<Child>,
}

impl TestNode {
    pub fn new(name: &str) -> Self {
        let node = TestNode {
            name: name.into(),
            dir: tempfile::tempdir().unwrap(),
            addr: free_addr(),
            child: None,
        };
        node.configure("");
        node
    }

    /// Writes the configuration, with `more` at its end.
    pub fn configure(&self, more: &str) {
        let dir = self.dir.path().display();
        let text = format!(
            "[node]\nlisten = \"{}\"\nstate_dir = \"{dir}/state\"\nrundir = \"{dir}/run\"\n\
             [membership]\nprobe_ms = 300\nsuspect_ms = 900\n[load]\nspeed = 1000\nreport_ms = 100\n\
             [store]\ndir = \"{dir}/store\"\n{more}",
            self.addr
        );
        std::fs::write(self.config(), text).unwrap();
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("mosd.toml")
    }

    pub fn rundir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub fn state(&self) -> StateDir {
        StateDir::new(self.dir.path().join("state"))
    }

    /// Starts the daemon, and waits until it answers.
    pub fn start(&mut self) {
        assert!(self.child.is_none());
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .unwrap();
        let mut command = Command::new(MOSD);
        command
            .arg("--foreground")
            .arg("--config")
            .arg(self.config())
            .stdin(Stdio::null())
            .stderr(log);
        command
            .env_remove("MOSRUN_RUNDIR")
            .env("MOSRUN_LOG", "info,runtime=debug");
        self.child = Some(command.spawn().unwrap());
        eventually("mosd answers", || {
            let gone = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(gone.is_none(), "mosd ended: {}", self.log());
            self.try_client().is_ok()
        });
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Asks the daemon to end, and waits until it has, well.
    pub fn terminate(&mut self) {
        let mut child = self.child.take().unwrap();
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(status.success(), "{status}: {}", self.log());
                return;
            }
            assert!(Instant::now() < end, "mosd does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub fn try_client(&self) -> Result<Client, ClientError> {
        Client::connect_to(&self.rundir().join("mosd.sock"))
    }

    pub fn client(&self) -> Client {
        self.try_client()
            .unwrap_or_else(|e| panic!("{}: {e}: {}", self.name, self.log()))
    }

    pub fn nodes(&self) -> Vec<NodeState> {
        self.client().nodes().unwrap()
    }

    pub fn status(&self) -> DaemonStatus {
        self.client().status().unwrap()
    }

    pub fn request_supervisor(&self, node: u32) -> Result<Placement, Failure> {
        let request = SupervisorRequest {
            node,
            job: JobId::new(0, 1),
            peer_fingerprint: [7; 32],
        };
        match self.client().request_supervisor(request) {
            Ok(placement) => Ok(placement),
            Err(ClientError::Failed(failure)) => Err(failure),
            Err(other) => panic!("{other}: {}", self.log()),
        }
    }

    pub fn mosctl(&self, arguments: &[&str]) -> Done {
        let mut command = Command::new(MOSCTL);
        command
            .args(arguments)
            .env("MOSRUN_CONFIG", self.config())
            .env("MOSRUN_RUNDIR", self.rundir());
        Done(command.output().unwrap())
    }

    pub fn invite(&self, more: &[&str]) -> String {
        let done = self.mosctl(&[&["cluster", "invite"], more].concat());
        done.assert_ok();
        done.stdout().trim().to_string()
    }

    pub fn join(&self, token: &str) -> Done {
        self.mosctl(&["cluster", "join", "--name", &self.name, token])
    }

    /// Makes the (ended) daemon remember a node.
    pub fn remember(&self, number: u32, name: &str, addr: SocketAddr) {
        let mut members = self.state().members().unwrap();
        members.push(MemberRecord {
            number,
            name: name.into(),
            host: String::new(),
            addr: Some(addr),
        });
        self.state().save_members(&members).unwrap();
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("---- log of {}\n{}", self.name, self.log());
        }
    }
}

pub struct TestCluster {
    pub nodes: Vec<TestNode>,
}

impl TestCluster {
    /// A running cluster; the members have heard of each other, but may not have met yet.
    pub fn of(count: u32) -> Self {
        let mut first = TestNode::new("n1");
        first
            .mosctl(&["cluster", "init", "--name", "test", "--node-name", "n1"])
            .assert_ok();
        first.start();
        let mut nodes = vec![first];
        for number in 2..=count {
            let mut node = TestNode::new(&format!("n{number}"));
            node.join(&nodes[0].invite(&[])).assert_ok();
            node.start();
            nodes.push(node);
        }
        TestCluster { nodes }
    }
}
