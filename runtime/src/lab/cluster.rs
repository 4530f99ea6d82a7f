//! The cluster of a lab: an authority, certificates and a daemon for each node.

use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::LabError;
use super::keeper::Program;
use super::state::{LabDir, Node, Record};
use super::up::node_name;
use crate::cluster::store::{Credentials, MemberRecord, StateDir, StoreError};
use crate::daemon::config::DEFAULT_PORT;

/// How long the daemons may take until all know each other.
const PATIENCE: Duration = Duration::from_secs(30);

/// A file of a node's run directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Placed {
    /// Its path below the run directory.
    pub path: PathBuf,
    /// Its mode.
    pub mode: u32,
    /// What is in it.
    pub text: String,
}

/// Makes a cluster, and gives for each node what belongs into its run directory. The keys are nowhere else afterwards.
pub fn make(dir: &LabDir, addresses: &[Ipv4Addr], rundirs: &[PathBuf]) -> Result<Vec<Vec<Placed>>, LabError> {
    let top = dir.path().join("cluster");
    let made = make_in(&top, dir.name(), addresses, rundirs);
    let removed = fs::remove_dir_all(&top).map_err(LabError::system(format!("removing {}", top.display())));
    let made = made?;
    removed?;
    Ok(made)
}

fn make_in(
    top: &Path,
    name: &str,
    addresses: &[Ipv4Addr],
    rundirs: &[PathBuf],
) -> Result<Vec<Vec<Placed>>, LabError> {
    let fail = |e: StoreError| LabError::Cluster(e.to_string());
    let state = |number: u32| StateDir::new(top.join(node_name(number)).join("state"));
    let first = state(1);
    let numbers = 1..=addresses.len() as u32;
    let members: Vec<MemberRecord> = numbers
        .clone()
        .zip(addresses)
        .map(|(number, address)| MemberRecord {
            number,
            name: node_name(number),
            host: node_name(number),
            addr: Some(SocketAddr::from((*address, DEFAULT_PORT))),
        })
        .collect();
    let mut all = Vec::new();
    for (number, rundir) in numbers.zip(rundirs) {
        let dir = state(number);
        if number == 1 {
            dir.create_cluster(name, &node_name(1)).map_err(fail)?;
        } else {
            let credentials: Credentials = first.make_node(&node_name(number)).map_err(fail)?;
            dir.save_credentials(&credentials).map_err(fail)?;
        }
        dir.save_members(&members).map_err(fail)?;
        let address = addresses[number as usize - 1];
        let mut files = read_tree(&top.join(node_name(number)))?;
        files.push(Placed {
            path: "mosd.toml".into(),
            mode: 0o644,
            text: format!(
                "[node]\nlisten = \"{address}:{DEFAULT_PORT}\"\nstate_dir = \"{0}/state\"\nrundir = \"{0}\"\n\n\
                 [store]\ndir = \"{0}/store\"\n\n[load]\n# The nodes of a lab are equally fast, so that is not measured.\nspeed = 1000\n",
                rundir.display()
            ),
        });
        all.push(files);
    }
    // The number given away last is known when all have theirs.
    for file in read_tree(&top.join(node_name(1)))? {
        if let Some(old) = all[0].iter_mut().find(|f| f.path == file.path) {
            *old = file;
        }
    }
    Ok(all)
}

fn read_tree(top: &Path) -> Result<Vec<Placed>, LabError> {
    let mut files = Vec::new();
    let mut dirs = vec![top.to_owned()];
    while let Some(dir) = dirs.pop() {
        let tried = || LabError::system(format!("reading {}", dir.display()));
        for entry in fs::read_dir(&dir).map_err(tried())? {
            let entry = entry.map_err(tried())?;
            let meta = entry.metadata().map_err(tried())?;
            if meta.is_dir() {
                dirs.push(entry.path());
                continue;
            }
            let path = entry.path();
            files.push(Placed {
                mode: meta.permissions().mode() & 0o777,
                text: fs::read_to_string(&path).map_err(tried())?,
                path: path.strip_prefix(top).unwrap_or(&path).to_owned(),
            });
        }
    }
    Ok(files)
}

/// The variables by which our programs find the daemon of a node.
pub fn environment(node: &Node) -> [(&'static str, OsString); 2] {
    [
        ("MOSRUN_RUNDIR", node.rundir.clone().into_os_string()),
        ("MOSRUN_CONFIG", node.rundir.join("mosd.toml").into_os_string()),
    ]
}

/// The daemon of a node, to be started by the node's first process.
pub fn daemon(record: &Record, node: &Node) -> Program {
    let path = |p: PathBuf| p.to_string_lossy().into_owned();
    let bin = if node.number == 1 {
        node.rundir.join("bin")
    } else {
        PathBuf::from("/usr/bin")
    };
    let mut environment: Vec<(String, String)> = environment(node)
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_string_lossy().into_owned()))
        .collect();
    environment.push((
        "PATH".into(),
        format!("{}:/usr/bin:/bin:/usr/sbin:/sbin", bin.display()),
    ));
    if let Some(user) = &record.options.user {
        environment.push(("HOME".into(), path(user.home.clone())));
        environment.push(("USER".into(), user.name.clone()));
    }
    Program {
        command: vec![path(bin.join("mosd")), "--foreground".into()],
        environment,
        user: record.options.user.clone(),
    }
}

/// Waits until the daemon of node 1 sees that of every node.
pub fn wait(record: &Record) -> Result<(), LabError> {
    let program = std::env::current_exe().map_err(LabError::system("finding our own program"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let output = Command::new(&program)
            .args([
                "lab",
                "exec",
                "--name",
                &record.name,
                "1",
                "--",
                "mosctl",
                "status",
                "--json",
            ])
            .output()
            .map_err(LabError::system("asking the daemon of node 1"))?;
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let nodes = status["daemon"]["nodes"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        let alive = nodes.iter().filter(|n| {
            n["status"]
                .as_str()
                .is_some_and(|s| s.eq_ignore_ascii_case("alive"))
        });
        let alive = alive.count();
        if alive >= record.options.nodes as usize {
            return Ok(());
        }
        if Instant::now() > deadline {
            let error = status["error"].as_str().unwrap_or("");
            let all = record.options.nodes;
            return Err(LabError::Cluster(format!(
                "node 1 sees {alive} of {all} daemons after {PATIENCE:?} {error}"
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
