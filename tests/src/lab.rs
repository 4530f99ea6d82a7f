//! A lab of the product, for the time of a test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::build::programs;
use crate::skip::Skip;

/// Labs of tests have names that begin so, and go on with the pid of the test.
const PREFIX: &str = "test-";

/// A user that no machine has.
pub const ADA: u32 = 47_110;

/// A lab; it is ended when this is dropped.
#[derive(Debug)]
pub struct Lab {
    name: String,
    user: Option<u32>,
}

static SHARED: Mutex<Weak<Lab>> = Mutex::new(Weak::new());
static COUNT: AtomicU32 = AtomicU32::new(0);

impl Lab {
    /// A lab of three nodes, which all tests of this process share as long as one of them uses it.
    pub fn shared() -> Result<Arc<Self>, Skip> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lab) = shared.upgrade() {
            return Ok(lab);
        }
        let lab = Arc::new(Self::with(&["--nodes", "3"])?);
        *shared = Arc::downgrade(&lab);
        Ok(lab)
    }

    /// A lab of its own in which daemons and programs are those of a plain user without capabilities, [`ADA`].
    pub fn plain(nodes: u32) -> Result<Self, Skip> {
        let mut lab = Self::with(&["--nodes", &nodes.to_string(), "--user", &ADA.to_string()])?;
        lab.user = Some(ADA);
        Ok(lab)
    }

    /// A lab of its own, with these options of `mosctl lab up`.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn with(options: &[&str]) -> Result<Self, Skip> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Skip::NotRoot);
        }
        crate::skip::program("ip")?;
        sweep();
        let name = format!(
            "{PREFIX}{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let output = mosctl()
            .args(["lab", "up", "--name", &name])
            .args(options)
            .output()
            .expect("mosctl can be started");
        assert!(
            output.status.success(),
            "lab up {options:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(Self { name, user: None })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The user whose programs run in it, when that is not root.
    pub fn user(&self) -> Option<u32> {
        self.user
    }

    /// `mosctl lab exec` for this lab and node; the command is to be added. With `options` of `lab exec`.
    pub fn exec_with(&self, node: u32, options: &[&str]) -> Command {
        let mut command = mosctl();
        command
            .args(["lab", "exec", "--name", &self.name])
            .args(options)
            .arg(node.to_string())
            .arg("--");
        if self.user.is_some() {
            // The caller's PATH may have directories that the user cannot enter.
            command.env("PATH", "/usr/bin:/bin");
        }
        command
    }

    /// `mosctl lab exec` for this lab and node; the command is to be added.
    pub fn exec(&self, node: u32) -> Command {
        self.exec_with(node, &[])
    }

    /// Runs a shell script with this machine's files in the namespaces of a node, and gives what it wrote.
    ///
    /// # Panics
    /// When the script fails.
    pub fn inspect(&self, node: u32, script: impl AsRef<OsStr>) -> String {
        let output = self
            .exec_with(node, &["--machine-files", "--user", "root"])
            .args(["sh", "-c"])
            .arg(script)
            .output()
            .expect("mosctl can be started");
        assert!(output.status.success(), "on node {node}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What `lab status --json` says of this lab.
    pub fn status(&self) -> serde_json::Value {
        let output = mosctl()
            .args(["lab", "status", "--json"])
            .output()
            .expect("mosctl can be started");
        let all: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).expect("JSON");
        all.into_iter()
            .find(|l| l["name"] == self.name.as_str())
            .unwrap_or_default()
    }

    /// The root directory of a node, as this machine sees it.
    ///
    /// # Panics
    /// When there is no such node.
    pub fn root_of(&self, node: u32) -> PathBuf {
        let status = self.status();
        let nodes = status["nodes"].as_array().expect("nodes");
        let node = nodes
            .iter()
            .find(|n| n["number"] == node)
            .expect("a node of the lab");
        PathBuf::from(format!("/proc/{}/root", node["pid"]))
    }

    /// The directory of its records and logs.
    pub fn dir(&self) -> PathBuf {
        labs_dir().join(&self.name)
    }

    /// What went on, for the message of a failed test: processes of all nodes, and the ends of the daemons' logs.
    pub fn diagnosis(&self) -> String {
        let mut all = String::new();
        for node in self.status()["nodes"].as_array().into_iter().flatten() {
            let number = node["number"].as_u64().unwrap_or(0) as u32;
            let ps = self
                .exec_with(number, &["--machine-files", "--user", "root"])
                .args(["ps", "-eLo", "pid,ppid,tid,stat,wchan:20,args", "--sort=pid"])
                .output();
            if let Ok(ps) = ps {
                all += &format!(
                    "--- processes of node {number}\n{}",
                    String::from_utf8_lossy(&ps.stdout)
                );
            }
            let log = self.dir().join(format!("node{number}.log"));
            let log = std::fs::read_to_string(log).unwrap_or_default();
            // Who wants the log of home wants those of the nodes, too.
            let lines = if std::env::var_os(crate::compare::LOG).is_some() {
                usize::MAX
            } else {
                30
            };
            let tail: Vec<_> = log.lines().rev().take(lines).collect();
            if !tail.is_empty() {
                all += &format!("--- log of node {number}\n");
                tail.iter().rev().for_each(|line| all += &format!("{line}\n"));
            }
        }
        all
    }

    /// Ends it now; `drop` will find nothing more to do.
    pub fn end(&self) {
        let _ = mosctl().args(["lab", "down", "--name", &self.name]).output();
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.dir().exists() {
            return;
        }
        let output = mosctl().args(["lab", "down", "--name", &self.name]).output();
        if let Ok(output) = output
            && !output.status.success()
            && !std::thread::panicking()
        {
            panic!("lab down: {}", text(&output));
        }
    }
}

/// Our `mosctl`.
pub fn mosctl() -> Command {
    Command::new(programs().join("mosctl"))
}

/// Both outputs of a finished command, and how it ended.
pub fn text(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn labs_dir() -> PathBuf {
    let rundir = std::env::var_os("MOSRUN_RUNDIR")
        .filter(|v| !v.is_empty())
        .unwrap_or_else(|| "/run/mosrun".into());
    PathBuf::from(rundir).join("labs")
}

/// Ends the labs of tests that were killed.
fn sweep() {
    for entry in std::fs::read_dir(labs_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if let Some(pid) = owner
            && !Path::new("/proc").join(pid).exists()
        {
            let _ = mosctl().args(["lab", "down", "--name", &name]).output();
        }
    }
}
