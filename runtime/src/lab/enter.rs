//! Running a command in a node: as the command itself would run, with the caller's terminal.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use nix::mount::MsFlags;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal, kill, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgid, getpgrp, getpid, getsid};

use super::state::{Node, Record};
use super::user::User;
use super::{LabError, cgroup};

/// What to run where.
#[derive(Debug)]
pub struct Entry<'a> {
    /// The lab.
    pub lab: &'a Record,
    /// The node in it.
    pub node: &'a Node,
    /// Who runs it, if not root.
    pub user: Option<&'a User>,
    /// Keep the machine's files, and enter all but the node's file tree.
    pub machine_files: bool,
}

impl Entry<'_> {
    /// Moves this process into the node and prepares `command` to be spawned there. The process must have one thread
    /// only. Only children made from now on are in the node's pid namespace.
    pub fn enter(&self, command: &[OsString]) -> Result<Command, LabError> {
        let dead = || LabError::NodeDead {
            lab: self.lab.name.clone(),
            node: self.node.number,
        };
        let cwd = std::env::current_dir();
        let open = |kind: &str| File::open(format!("/proc/{}/ns/{kind}", self.node.keeper.pid));
        let kinds = [
            ("net", CloneFlags::CLONE_NEWNET),
            ("uts", CloneFlags::CLONE_NEWUTS),
            ("ipc", CloneFlags::CLONE_NEWIPC),
            ("pid", CloneFlags::CLONE_NEWPID),
            ("mnt", CloneFlags::CLONE_NEWNS),
        ];
        let mut open_ones = Vec::new();
        for (kind, flag) in kinds {
            open_ones.push((kind, flag, open(kind).map_err(|_| dead())?));
        }
        // Looked at after opening: what was opened then belongs to the recorded process, and not to a later one.
        self.node.keeper.open().ok_or_else(dead)?;
        for (kind, flag, namespace) in open_ones {
            if kind == "mnt" && self.machine_files {
                unshare(CloneFlags::CLONE_NEWNS).map_err(LabError::system("making a mount namespace"))?;
                super::root::propagate(MsFlags::MS_SLAVE)?;
                continue;
            }
            setns(namespace, flag)
                .map_err(LabError::system(format!("entering the node's {kind} namespace")))?;
        }
        let own_files = self.node.number != 1 && !self.machine_files;
        let mut line = Command::new("");
        if self.machine_files {
            // Only a process of the pid namespace can mount its /proc.
            let program = std::env::current_exe().map_err(LabError::system("finding our own program"))?;
            line = Command::new(program);
            line.args(["lab", "keeper", "proc"]);
            if let Some(user) = self.user {
                line.args(["--uid", &user.uid.to_string(), "--gid", &user.gid.to_string()]);
            }
            line.arg("--").args(command);
        } else if let Some((program, arguments)) = command.split_first() {
            line = Command::new(program);
            line.args(arguments);
        }
        match cwd {
            Ok(dir) if !own_files => {
                std::env::set_current_dir(&dir).map_err(LabError::system(format!(
                    "entering {} in the node",
                    dir.display()
                )))?;
            }
            _ => std::env::set_current_dir("/").map_err(LabError::system("entering /"))?,
        }
        self.environment(&mut line, own_files)?;
        if let Some(user) = self.user
            && !self.machine_files
        {
            line.uid(user.uid).gid(user.gid);
        }
        Ok(line)
    }

    fn environment(&self, line: &mut Command, own_files: bool) -> Result<(), LabError> {
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
        if own_files {
            line.env("PATH", "/usr/bin")
                .env("HOME", "/root")
                .env_remove("TMPDIR");
        } else if !self.machine_files {
            let mut with = self.node.rundir.join("bin").into_os_string();
            with.push(":");
            with.push(path);
            line.env("PATH", with);
        }
        line.envs(super::cluster::environment(self.node));
        if let Some(user) = self.user {
            line.env("HOME", &user.home)
                .env("USER", &user.name)
                .env("LOGNAME", &user.name);
        }
        // A guest of the lab's owner finds the daemon where every user of a machine does, and has sockets of his own.
        if let Some(user) = self.user
            && self.lab.options.user.as_ref() != Some(user)
            && !self.machine_files
        {
            let dir = self.node.rundir.join("users").join(user.uid.to_string());
            super::root::make_private(&dir, user)?;
            line.env_remove("MOSRUN_RUNDIR").env_remove("MOSRUN_CONFIG");
            line.env("XDG_RUNTIME_DIR", dir);
        }
        Ok(())
    }

    /// Runs `command` in the node to its end. See [`enter`](Self::enter) for what becomes of this process.
    pub fn run(&self, command: &[OsString]) -> Result<Ended, LabError> {
        // The control groups are not visible from every node, so open the way there and back first.
        let groups = match &self.node.cgroup {
            Some(group) => Some((
                Procs::open(group)?,
                cgroup::current(group)
                    .map(|back| Procs::open(&back))
                    .transpose()?,
            )),
            None => None,
        };
        let mut line = self.enter(command)?;
        if let Some((inside, _)) = &groups {
            inside.enter()?;
        }
        let child = line.spawn();
        if let Some((_, Some(back))) = &groups {
            // Only the command counts against the node's quota, and this process must not keep the group in use.
            back.enter()?;
        }
        match child {
            Ok(child) => watch(child.id() as i32).map_err(LabError::system("waiting for the command")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Ended::not_started(127, command, &e)),
            Err(e) => Ok(Ended::not_started(126, command, &e)),
        }
    }
}

/// Runs `mosctl lab exec` as a child, so that this process stays outside of the lab.
pub fn run_apart(lab: &str, node: &str, command: &[OsString]) -> Result<Ended, LabError> {
    let program = std::env::current_exe().map_err(LabError::system("finding our own program"))?;
    let child = Command::new(program)
        .args(["lab", "exec", "--name", lab, node, "--"])
        .args(command)
        .spawn()
        .map_err(LabError::system("starting the command"))?;
    watch(child.id() as i32).map_err(LabError::system("waiting for the command"))
}

struct Procs {
    file: File,
    path: PathBuf,
}

impl Procs {
    fn open(group: &Path) -> Result<Self, LabError> {
        let path = group.join("cgroup.procs");
        let file = File::options()
            .write(true)
            .open(&path)
            .map_err(LabError::system(format!("opening {}", path.display())))?;
        Ok(Self { file, path })
    }

    fn enter(&self) -> Result<(), LabError> {
        use std::io::Write;
        (&self.file)
            .write_all(b"0")
            .map_err(LabError::system(format!("writing to {}", self.path.display())))
    }
}

/// How a command in a node ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By exiting.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl Ended {
    fn not_started(code: i32, command: &[OsString], why: &io::Error) -> Self {
        let name = command
            .first()
            .map(|c| c.to_string_lossy().into_owned())
            .unwrap_or_default();
        eprintln!("mosctl: {name}: {why}");
        Self::Code(code)
    }

    /// Ends this process in the same way.
    pub fn follow(self) -> ! {
        match self {
            Self::Code(code) => std::process::exit(code),
            Self::Signal(signal) => shim::lab::die_of(signal),
        }
    }
}

impl From<ExitStatus> for Ended {
    fn from(status: ExitStatus) -> Self {
        match status.signal() {
            Some(signal) => Self::Signal(signal),
            None => Self::Code(status.code().unwrap_or(1)),
        }
    }
}

/// Signals that are passed on to the command. Those of a terminal that stop are among them: this process stops when the command has
/// stopped, and not by itself as well, for what it finds then, after it was continued, may be that the command is still to be continued.
const PASSED_ON: [Signal; 10] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGCONT,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
];

/// Waits for the child, and stands in for it towards our own parent: passes signals on, stops when it stops.
fn watch(child: i32) -> io::Result<Ended> {
    let child = Pid::from_raw(child);
    let ignored = ignored_signals();
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    for signal in PASSED_ON {
        if !ignored.contains(&(signal as i32)) {
            set.add(signal);
        }
    }
    // Blocked after the spawn, for a child inherits the mask.
    set.thread_block()?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?;
    loop {
        loop {
            match waitpid(child, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(Ended::Code(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Ended::Signal(signal as i32)),
                // What SIGSTOP stopped, somebody will continue by its pid, and this process would not learn of it.
                Ok(WaitStatus::Stopped(_, Signal::SIGSTOP)) => break,
                // What its terminal stopped, the shell above us will continue, which has to see a stopped job.
                Ok(WaitStatus::Stopped(..)) => {
                    raise(Signal::SIGSTOP)?;
                    wake(child);
                }
                Ok(_) => break,
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let Some(info) = signals.read_signal()? else {
            continue;
        };
        // What the terminal sent (SI_KERNEL) the command got as well, being in our process group; only the end of the
        // terminal is told to the leader of the session alone.
        let leader = info.ssi_signo == Signal::SIGHUP as u32 && getsid(None) == Ok(getpid());
        let sent_by_someone = info.ssi_code <= 0 || leader;
        match Signal::try_from(info.ssi_signo as i32) {
            Ok(Signal::SIGCHLD) | Err(_) => {}
            Ok(Signal::SIGCONT) => wake(child),
            Ok(signal) if sent_by_someone => {
                let _ = kill(child, signal);
            }
            Ok(_) => {}
        }
    }
}

/// Continues the command, and its process group if it made one of its own.
fn wake(child: Pid) {
    match getpgid(Some(child)) {
        Ok(group) if group != getpgrp() && group.as_raw() > 0 => {
            let _ = kill(Pid::from_raw(-group.as_raw()), Signal::SIGCONT);
        }
        _ => {
            let _ = kill(child, Signal::SIGCONT);
        }
    }
}

/// Signals that this process was started with as ignored (nohup, `&` in a shell): they stay so for the command.
fn ignored_signals() -> HashSet<i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|l| l.strip_prefix("SigIgn:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    (1..=64).filter(|n| mask & (1 << (n - 1)) != 0).collect()
}

/// `keeper proc`: mounts the /proc of this pid namespace and becomes the command, as the given user and group.
pub fn mount_proc(command: &[OsString], uid: Option<u32>, gid: Option<u32>) -> Result<(), LabError> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    super::root::attach("proc", "proc", Path::new("/proc"), quiet, "")?;
    let Some((program, arguments)) = command.split_first() else {
        return Err(LabError::BadOption("no command".into()));
    };
    let mut line = Command::new(program);
    line.args(arguments);
    uid.map(|uid| line.uid(uid));
    gid.map(|gid| line.gid(gid));
    let error = line.exec();
    let code = if error.kind() == io::ErrorKind::NotFound {
        127
    } else {
        126
    };
    let Ended::Code(code) = Ended::not_started(code, command, &error) else {
        return Ok(());
    };
    std::process::exit(code)
}
