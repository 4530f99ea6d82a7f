//! The processes that hold a lab: the first process of each node, and the hub's.
//!
//! `up` starts `mosctl lab keeper hold`, which makes the namespaces, starts `keeper init` in them, reports its pid and
//! leaves. `init` takes a [`Plan`] and then [`Order`]s, a line of JSON each, from `up`; it answers each with a line. If
//! `up` dies before the order to stay, `init` sees the end of its input and ends, and its namespaces with it.

use std::io::{self, BufRead, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use serde::{Deserialize, Serialize};

use super::net::{INTERFACE, Network};
use super::root::{Files, propagate};
use super::state::Keeper;
use super::user::User;
use super::{LabError, relay};

/// What an `init` is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Plan {
    /// The namespace that holds the bridge.
    Bridge,
    /// The switch that delays and loses frames.
    Relay {
        /// First processes of the nodes, as the machine numbers them.
        nodes: Vec<i32>,
        /// Delay of each frame.
        delay_us: u64,
        /// Probability of a loss.
        loss: f64,
        /// Seed of the losses.
        seed: u64,
    },
    /// A node.
    Node(Files),
}

/// What `up` asks of an `init`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Start a program that runs as long as the node.
    Start(Program),
    /// Stay when `up` has gone.
    Stay,
}

/// A program to start in a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Program {
    /// Its file and arguments.
    pub command: Vec<String>,
    /// Environment variables to set.
    pub environment: Vec<(String, String)>,
    /// Who runs it, if not root.
    pub user: Option<User>,
}

type Answer = Result<Option<i32>, String>;

/// The side of `up`: an `init` that was started and takes orders.
#[derive(Debug)]
pub struct Started {
    /// The process.
    pub keeper: Keeper,
    who: String,
    orders: ChildStdin,
    answers: io::BufReader<ChildStdout>,
}

impl Started {
    /// Starts a process with namespaces of its own. `who` names it in errors; what it writes goes to `log`.
    pub fn new(who: &str, log: std::fs::File) -> Result<Self, LabError> {
        let program = std::env::current_exe().map_err(LabError::system("finding our own program"))?;
        let mut child = Command::new(program)
            .args(["lab", "keeper", "hold"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(LabError::system("starting a node's first process"))?;
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(LabError::Keeper {
                who: who.to_owned(),
                message: "it has no pipes".into(),
            });
        };
        let mut answers = io::BufReader::new(answers);
        let pid = read_answer(who, &mut answers)?;
        child
            .wait()
            .map_err(LabError::system("waiting for the process that makes namespaces"))?;
        let pid = pid.ok_or_else(|| LabError::Keeper {
            who: who.to_owned(),
            message: "it reported no pid".into(),
        })?;
        Ok(Self {
            keeper: Keeper::of(pid)?,
            who: who.to_owned(),
            orders,
            answers,
        })
    }

    /// Hands over the plan and waits until it is carried out.
    pub fn plan(&mut self, plan: &Plan) -> Result<(), LabError> {
        self.ask(plan).map(|_| ())
    }

    /// Gives an order and waits until it is carried out. [`Order::Start`] gives the pid inside the node.
    pub fn order(&mut self, order: &Order) -> Result<Option<i32>, LabError> {
        self.ask(order)
    }

    fn ask(&mut self, what: &impl Serialize) -> Result<Option<i32>, LabError> {
        let mut line = serde_json::to_vec(what)
            .map_err(io::Error::from)
            .map_err(LabError::system("writing an order"))?;
        line.push(b'\n');
        // If the process is gone its last words, read below, tell more than our EPIPE.
        let _ = self.orders.write_all(&line);
        read_answer(&self.who, &mut self.answers)
    }
}

fn read_answer(who: &str, from: &mut impl BufRead) -> Result<Option<i32>, LabError> {
    let fail = |message: String| LabError::Keeper {
        who: who.to_owned(),
        message,
    };
    let mut line = String::new();
    from.read_line(&mut line)
        .map_err(|e| fail(format!("reading its answer: {e}")))?;
    if line.is_empty() {
        return Err(fail("it ended without an answer; its log may tell why".into()));
    }
    let answer: Answer =
        serde_json::from_str(&line).map_err(|e| fail(format!("answered `{}`: {e}", line.trim())))?;
    answer.map_err(fail)
}

fn answer(answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}

/// `keeper hold`: makes the namespaces, starts the first process in them, and reports its pid.
pub fn hold() -> Result<(), LabError> {
    let made = (|| {
        nix::unistd::setsid().map_err(LabError::system("setsid"))?;
        // The node's daemon is in it.
        shim::process::prefer_session();
        let all = CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC;
        unshare(all).map_err(LabError::system("making namespaces"))?;
        let program = std::env::current_exe().map_err(LabError::system("finding our own program"))?;
        Command::new(program)
            .arg0("mosrun-lab")
            .args(["lab", "keeper", "init"])
            .current_dir("/")
            .spawn()
            .map_err(LabError::system("starting the first process"))
    })();
    let report = made
        .as_ref()
        .map(|child| Some(child.id() as i32))
        .map_err(ToString::to_string);
    answer(&report).map_err(LabError::system("answering"))?;
    made.map(|_| ())
}

/// `keeper init`: the first process of a node or the hub. Returns only when `up` died before it was told to stay.
pub fn init() -> Result<(), LabError> {
    let mut lines = io::stdin().lock().lines();
    let Some(Ok(plan)) = lines.next() else {
        return Ok(());
    };
    let done = serde_json::from_str(&plan)
        .map_err(|e| e.to_string())
        .and_then(|p| carry_out(p).map_err(|e| e.to_string()));
    answer(&done.as_ref().map(|()| None).map_err(Clone::clone)).map_err(LabError::system("answering"))?;
    if done.is_err() {
        return Ok(());
    }
    let mut children = Vec::new();
    for line in lines {
        let Ok(line) = line else { break };
        let order: Result<Order, _> = serde_json::from_str(&line);
        match order {
            Ok(Order::Start(program)) => {
                let started = start(&program);
                let report = started
                    .as_ref()
                    .map(|c| Some(c.id() as i32))
                    .map_err(ToString::to_string);
                children.extend(started);
                answer(&report).map_err(LabError::system("answering"))?;
            }
            Ok(Order::Stay) => {
                answer(&Ok(None)).map_err(LabError::system("answering"))?;
                return stay();
            }
            Err(e) => answer(&Err(e.to_string())).map_err(LabError::system("answering"))?,
        }
    }
    Ok(())
}

fn carry_out(plan: Plan) -> Result<(), LabError> {
    match plan {
        // Its mounts are a copy of the machine's and must not keep what is unmounted there.
        Plan::Bridge => propagate(nix::mount::MsFlags::MS_SLAVE),
        Plan::Node(files) => {
            nix::unistd::sethostname(&files.hostname).map_err(LabError::system("sethostname"))?;
            files.set_up()
        }
        Plan::Relay {
            nodes,
            delay_us,
            loss,
            seed,
        } => {
            propagate(nix::mount::MsFlags::MS_SLAVE)?;
            // Frames that leave a millisecond late because of timer slack would make the delay a lie.
            let _ = nix::sys::prctl::set_timerslack(1);
            let devices = nodes.into_iter().map(tap).collect::<Result<Vec<_>, _>>()?;
            std::thread::spawn(move || {
                let failed = relay::run(devices, Duration::from_micros(delay_us), loss, seed);
                eprintln!("mosrun lab: the relay ended: {failed:?}");
                std::process::exit(1);
            });
            Ok(())
        }
    }
}

fn tap(pid: i32) -> Result<OwnedFd, LabError> {
    Network::of(pid)?.within(|| {
        shim::lab::open_tap(INTERFACE)
            .map_err(LabError::system("making a TAP device (is /dev/net/tun there?)"))
    })
}

fn start(program: &Program) -> Result<Child, LabError> {
    let Some((file, arguments)) = program.command.split_first() else {
        return Err(LabError::BadOption("no program to start".into()));
    };
    let mut command = Command::new(file);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .current_dir("/");
    command.envs(program.environment.iter().map(|(k, v)| (k, v)));
    if let Some(user) = &program.user {
        // Dropping to another user also drops the supplementary groups and all capabilities.
        command.uid(user.uid).gid(user.gid);
    }
    command.process_group(0);
    command
        .spawn()
        .map_err(LabError::system(format!("starting {file}")))
}

/// Lets go of `up`'s pipes, then reaps whatever ends in this pid namespace, until the lab ends.
fn stay() -> Result<(), LabError> {
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(LabError::system("opening /dev/null"))?;
    nix::unistd::dup2_stdin(&null).map_err(LabError::system("closing the pipe"))?;
    nix::unistd::dup2_stdout(&null).map_err(LabError::system("closing the pipe"))?;
    drop(null);
    // Blocked only now, for children inherit the mask.
    let mut child_ended = SigSet::empty();
    child_ended.add(Signal::SIGCHLD);
    child_ended
        .thread_block()
        .map_err(LabError::system("blocking SIGCHLD"))?;
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            match status {
                WaitStatus::StillAlive => break,
                WaitStatus::Signaled(pid, signal, _) => {
                    eprintln!("mosrun lab: process {pid} died of {signal}")
                }
                _ => {}
            }
        }
        let _ = child_ended.wait();
    }
}
