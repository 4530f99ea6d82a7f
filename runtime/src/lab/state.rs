//! What is known about a lab: its directory, its record, and the processes that hold it.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::LabError;
use super::user::User;

/// Most nodes of a lab: they share 10.77.0.0/24 and one machine.
pub const MAX_NODES: u32 = 64;

/// How the links and nodes of a lab are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Number of nodes, 1 to [`MAX_NODES`].
    pub nodes: u32,
    /// CPU time per node in cores, if limited.
    pub cpu_quota_cores: Option<f64>,
    /// Delay of each frame from node to node, one way.
    pub delay_us: u64,
    /// Probability that a frame is lost on its way, 0 to 1.
    pub loss: f64,
    /// Bits per second that each node can send, if limited.
    pub rate_bits: Option<u64>,
    /// The largest packet on the links, in bytes, if not as usual.
    #[serde(default)]
    pub mtu_bytes: Option<u32>,
    /// Seed of the losses.
    pub seed: u64,
    /// Whom the daemons and commands run as, if not root.
    pub user: Option<User>,
    /// Whether the nodes run `mosd` as one cluster.
    pub daemons: bool,
}

impl Options {
    /// Whether frames have to pass through our own relay.
    pub fn needs_relay(&self) -> bool {
        self.delay_us > 0 || self.loss > 0.0
    }
}

/// A process that holds namespaces, in a form that a reused pid does not match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keeper {
    /// Its pid as seen from the machine.
    pub pid: i32,
    /// Its start time in clock ticks since boot (field 22 of proc_pid_stat(5)).
    pub start_ticks: u64,
}

impl Keeper {
    /// Records the live process `pid`.
    pub fn of(pid: i32) -> Result<Self, LabError> {
        let start_ticks = start_ticks(pid).ok_or_else(|| LabError::System {
            tried: format!("reading /proc/{pid}/stat"),
            source: std::io::Error::from_raw_os_error(libc::ESRCH),
        })?;
        Ok(Self { pid, start_ticks })
    }

    /// A pidfd, if the process still lives (a zombie counts as dead).
    pub fn open(&self) -> Option<OwnedFd> {
        let fd = shim::lab::pidfd_open(self.pid).ok()?;
        (start_ticks(self.pid) == Some(self.start_ticks) && !ended(&fd, Duration::ZERO)).then_some(fd)
    }

    /// Kills the process, and with it everything in its pid namespace. Returns whether it is gone within `patience`.
    pub fn kill(&self, patience: Duration) -> bool {
        let Some(fd) = self.open() else { return true };
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        ended(&fd, patience)
    }
}

fn ended(pidfd: &OwnedFd, patience: Duration) -> bool {
    use std::os::fd::AsFd;
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    loop {
        match poll(&mut fds, timeout) {
            Err(nix::errno::Errno::EINTR) => continue,
            answer => return answer.unwrap_or(0) > 0,
        }
    }
}

/// Start time of a process, or `None` when there is none such.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field may hold blanks and parentheses: count from behind the last one.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// One node as recorded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    /// From 1.
    pub number: u32,
    /// Its hostname.
    pub name: String,
    /// Its IPv4 address in the lab.
    pub address: String,
    /// Its first process.
    pub keeper: Keeper,
    /// Directory of its control group, if it has one.
    pub cgroup: Option<PathBuf>,
    /// Its run directory, as seen inside of it.
    pub rundir: PathBuf,
}

/// The record `lab.json` in the lab's directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Name of the lab.
    pub name: String,
    /// How it was made.
    pub options: Options,
    /// The boot it belongs to: processes of an earlier one are gone.
    pub boot_id: String,
    /// The process that holds the bridge or relays frames.
    pub hub: Option<Keeper>,
    /// The nodes that exist so far.
    pub nodes: Vec<Node>,
    /// Control groups to remove, innermost first.
    pub cgroups: Vec<PathBuf>,
    /// Whether `up` was completed.
    pub complete: bool,
}

impl Record {
    /// The node of that number, which must be alive.
    pub fn node(&self, number: u32) -> Result<&Node, LabError> {
        let node = self
            .nodes
            .iter()
            .find(|n| n.number == number)
            .ok_or_else(|| LabError::NoSuchNode {
                lab: self.name.clone(),
                node: number.to_string(),
                nodes: self.options.nodes,
            })?;
        Ok(node)
    }

    /// Whether the hub and all nodes are alive.
    pub fn alive(&self) -> bool {
        self.boot_id == boot_id()
            && self.complete
            && self
                .hub
                .iter()
                .chain(self.nodes.iter().map(|n| &n.keeper))
                .all(|k| k.open().is_some())
    }
}

/// The random identity of this boot of the machine.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// The directory of one lab: `<rundir>/labs/NAME`.
#[derive(Clone, Debug)]
pub struct LabDir {
    name: String,
    path: PathBuf,
}

impl LabDir {
    /// Names the directory; nothing is created.
    pub fn new(name: &str) -> Result<Self, LabError> {
        let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 32 || name.starts_with('.') || !name.chars().all(usable) {
            return Err(LabError::BadName(name.to_owned()));
        }
        Ok(Self {
            name: name.to_owned(),
            path: labs_dir().join(name),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Name of the lab.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn record_path(&self) -> PathBuf {
        self.path.join("lab.json")
    }

    /// Takes the lock that creating and ending hold. It is released when its owner dies, however that happens.
    pub fn lock(&self) -> Result<Flock<File>, LabError> {
        let path = self.path.join("lock");
        let file = File::create(&path).map_err(LabError::system(format!("creating {}", path.display())))?;
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => LabError::Busy(self.name.clone()),
            other => LabError::System {
                tried: format!("locking {}", path.display()),
                source: other.into(),
            },
        })
    }

    /// Reads the record; `None` if the lab has none (yet).
    pub fn read(&self) -> Result<Option<Record>, LabError> {
        let path = self.record_path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(LabError::system(format!("reading {}", path.display()))(e)),
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|e| LabError::Record {
                path,
                message: e.to_string(),
            })
    }

    /// Writes the record, replacing the old one in one step.
    pub fn write(&self, record: &Record) -> Result<(), LabError> {
        let path = self.record_path();
        let fresh = self.path.join("lab.json.new");
        let text = serde_json::to_vec_pretty(record).map_err(|e| LabError::Record {
            path: path.clone(),
            message: e.to_string(),
        })?;
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&fresh)?;
            file.write_all(&text)?;
            fs::rename(&fresh, &path)
        };
        write().map_err(LabError::system(format!("writing {}", path.display())))
    }

    /// Removes the directory, and the ones above it if they are empty now.
    pub fn remove(&self) -> Result<(), LabError> {
        match fs::remove_dir_all(&self.path) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(LabError::system(format!("removing {}", self.path.display()))(e)),
        }
        let labs = labs_dir();
        let _ = fs::remove_dir(&labs);
        let _ = labs.parent().map(fs::remove_dir);
        Ok(())
    }
}

/// Where labs are recorded.
pub fn labs_dir() -> PathBuf {
    crate::rundir::path().join("labs")
}

/// The names of all labs that left a directory.
pub fn lab_names() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(labs_dir())
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keeper_is_recognised_until_it_is_gone() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let keeper = Keeper::of(child.id() as i32).unwrap();
        assert!(keeper.open().is_some());
        let other = Keeper {
            start_ticks: keeper.start_ticks + 1,
            ..keeper.clone()
        };
        assert!(other.open().is_none(), "another start time is another process");
        assert!(other.kill(Duration::ZERO), "and is never killed");
        assert!(keeper.kill(Duration::from_secs(5)));
        child.wait().unwrap();
        assert!(keeper.open().is_none());
    }

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "a/b", ".hidden", &"x".repeat(33), "a b"] {
            assert!(matches!(LabDir::new(name), Err(LabError::BadName(_))), "{name}");
        }
        assert!(LabDir::new("ci-1.a_B").is_ok());
    }
}
