//! The lab: a cluster of several nodes on one machine, for trying things out and for the tests.
//!
//! A node is a set of namespaces (network, mount, pid, uts, ipc) held by a first process of its own. The nodes are
//! joined by a bridge, or by a [`relay`] that delays and loses frames, in a network namespace of its own: the machine's
//! network is not touched, and labs do not see each other. Node 1 sees this machine's files; every other node has a
//! nearly empty root of its own, so that a program that touches the wrong machine's files fails at once.

mod cgroup;
mod cluster;
mod enter;
mod error;
mod keeper;
mod net;
pub mod relay;
mod root;
mod state;
mod up;
mod user;

use std::ffi::OsString;

use clap::{Args, Subcommand};

pub use enter::{Ended, Entry};
pub use error::LabError;
pub use state::{Keeper, LabDir, Node, Options, Record, lab_names};
pub use up::{down, up};
pub use user::User;

/// Name of the lab when none is given.
const DEFAULT_NAME: &str = "lab";

/// Try a cluster out on this one machine
#[derive(Debug, Args)]
pub struct LabCommand {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a lab
    Up {
        #[command(flatten)]
        name: Name,
        #[command(flatten)]
        shape: Shape,
    },
    /// Run a command in a node, with this terminal and (on node 1) in this directory
    Exec {
        #[command(flatten)]
        name: Name,
        /// Run it as this user (name or number) instead of the lab's
        #[arg(long, value_name = "USER")]
        user: Option<String>,
        /// Keep this machine's files: enter all of the node but its file tree (to look at it with ps, ss, gdb)
        #[arg(long)]
        machine_files: bool,
        /// Number or name of the node
        node: String,
        /// The command and its arguments
        #[arg(
            required = true,
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "CMD"
        )]
        command: Vec<OsString>,
    },
    /// List the labs of this machine
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// End a lab and everything that runs in it
    Down {
        #[command(flatten)]
        name: Name,
    },
    /// Make a lab, run a command on its node 1, end the lab; the exit status is the command's
    Run {
        #[command(flatten)]
        shape: Shape,
        /// The command and its arguments
        #[arg(
            required = true,
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "CMD"
        )]
        command: Vec<OsString>,
    },
    #[command(hide = true)]
    Keeper {
        #[command(subcommand)]
        stage: Stage,
    },
}

#[derive(Debug, Subcommand)]
enum Stage {
    Hold,
    Init,
    Proc {
        #[arg(long)]
        uid: Option<u32>,
        #[arg(long)]
        gid: Option<u32>,
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

#[derive(Debug, Args)]
struct Name {
    /// Name of the lab
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
}

#[derive(Debug, Args)]
struct Shape {
    /// Number of nodes
    #[arg(long, default_value_t = 2)]
    nodes: u32,
    /// CPU time that each node gets, in cores (0.5 is half a core)
    #[arg(long, value_name = "CORES_PER_NODE")]
    cpu_quota: Option<f64>,
    /// Delay of every frame between nodes, in microseconds, one way
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0)]
    delay_us: u64,
    /// Share of the frames that get lost: 0.01 or 1%
    #[arg(long, value_name = "SHARE", default_value = "0", value_parser = parse_share)]
    loss: f64,
    /// What each node can send in a second: 10mbit, 1gbit
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    rate: Option<u64>,
    /// Largest packet on the links, in bytes (9000: jumbo frames)
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1280..=9216))]
    mtu: Option<u32>,
    /// Seed that decides which frames get lost
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Make nodes only: no cluster, no daemons
    #[arg(long)]
    bare: bool,
    /// Run the daemons and all commands as this plain user (name or number), without capabilities
    #[arg(long, value_name = "USER")]
    user: Option<String>,
}

fn parse_share(text: &str) -> Result<f64, String> {
    let (number, scale) = match text.strip_suffix('%') {
        Some(percent) => (percent, 0.01),
        None => (text, 1.0),
    };
    let share = number.parse::<f64>().map_err(|e| e.to_string())? * scale;
    if (0.0..1.0).contains(&share) {
        Ok(share)
    } else {
        Err("give a share from 0 to below 1, or a percentage".into())
    }
}

fn parse_rate(text: &str) -> Result<u64, String> {
    let units = [("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3), ("bit", 1.0)];
    let lower = text.to_ascii_lowercase();
    let (number, scale) = units
        .iter()
        .find_map(|(unit, scale)| lower.strip_suffix(unit).map(|n| (n, *scale)))
        .ok_or("give a number with bit, kbit, mbit or gbit")?;
    let bits = number.parse::<f64>().map_err(|e| e.to_string())? * scale;
    // tc takes 34 Gbit/s and more, but no less than a frame in a moment is of use.
    if (8_000.0..=1e12).contains(&bits) {
        Ok(bits as u64)
    } else {
        Err("give a rate from 8kbit to 1000gbit".into())
    }
}

impl Shape {
    fn options(self) -> Result<Options, LabError> {
        if !(1..=state::MAX_NODES).contains(&self.nodes) {
            return Err(LabError::BadOption(format!(
                "a lab has 1 to {} nodes",
                state::MAX_NODES
            )));
        }
        if let Some(cores) = self.cpu_quota
            && !(0.05..=1024.0).contains(&cores)
        {
            return Err(LabError::BadOption("a CPU quota is 0.05 to 1024 cores".into()));
        }
        if self.delay_us > 60_000_000 {
            return Err(LabError::BadOption("a delay is at most a minute".into()));
        }
        Ok(Options {
            nodes: self.nodes,
            cpu_quota_cores: self.cpu_quota,
            delay_us: self.delay_us,
            loss: self.loss,
            rate_bits: self.rate,
            mtu_bytes: self.mtu,
            seed: self.seed,
            user: self.user.as_deref().map(User::find).transpose()?.flatten(),
            daemons: !self.bare,
        })
    }
}

impl LabCommand {
    /// Carries the command out. `exec` and `run` end this process the way the command ended. The process must have one
    /// thread only.
    pub fn run(self) -> Result<(), LabError> {
        match self.verb {
            Verb::Up { name, shape } => {
                let record = up(&name.name, &shape.options()?)?;
                println!("lab `{}` is up: {}", record.name, describe(&record));
                println!("try: mosctl lab exec --name {} 1 -- bash", record.name);
                Ok(())
            }
            Verb::Exec {
                name,
                user,
                machine_files,
                node,
                command,
            } => {
                let record = find(&name.name)?;
                let user = user
                    .as_deref()
                    .map(User::find)
                    .transpose()?
                    .unwrap_or_else(|| record.options.user.clone());
                exec(&record, &node, user.as_ref(), machine_files, &command)?.follow()
            }
            Verb::Status { json } => status(json),
            Verb::Down { name } => down(&name.name),
            Verb::Run { shape, command } => {
                let name = format!("run-{}", std::process::id());
                let record = up(&name, &shape.options()?)?;
                let ended = enter::run_apart(&record.name, "1", &command);
                // Ended also when the command could not be run.
                down(&name)?;
                ended?.follow()
            }
            Verb::Keeper { stage } => match stage {
                Stage::Hold => keeper::hold(),
                Stage::Init => keeper::init(),
                Stage::Proc { uid, gid, command } => enter::mount_proc(&command, uid, gid),
            },
        }
    }
}

fn find(name: &str) -> Result<Record, LabError> {
    LabDir::new(name)?
        .read()?
        .filter(|r| r.complete)
        .ok_or_else(|| LabError::Unknown(name.to_owned()))
}

fn exec(
    lab: &Record,
    node: &str,
    user: Option<&User>,
    machine_files: bool,
    command: &[OsString],
) -> Result<Ended, LabError> {
    let number = lab
        .nodes
        .iter()
        .find(|n| n.name == node || n.number.to_string() == node)
        .map(|n| n.number);
    let no_such = || LabError::NoSuchNode {
        lab: lab.name.clone(),
        node: node.to_owned(),
        nodes: lab.options.nodes,
    };
    let node = lab.node(number.ok_or_else(no_such)?)?;
    Entry {
        lab,
        node,
        user,
        machine_files,
    }
    .run(command)
}

fn describe(record: &Record) -> String {
    let nodes: Vec<_> = record
        .nodes
        .iter()
        .map(|n| format!("{} {}", n.name, n.address))
        .collect();
    nodes.join(", ")
}

fn status(json: bool) -> Result<(), LabError> {
    let mut all = Vec::new();
    for name in lab_names() {
        if let Some(record) = LabDir::new(&name)?.read()? {
            all.push(record);
        }
    }
    if json {
        let list: Vec<_> = all
            .iter()
            .map(|r| {
                let nodes: Vec<_> = r
                    .nodes
                    .iter()
                    .map(|n| {
                        serde_json::json!({
                            "number": n.number, "name": n.name, "address": n.address,
                            "pid": n.keeper.pid, "alive": n.keeper.open().is_some(), "rundir": n.rundir,
                        })
                    })
                    .collect();
                serde_json::json!({ "name": r.name, "up": r.alive(), "options": r.options, "nodes": nodes })
            })
            .collect();
        return say(&format!("{}\n", serde_json::Value::from(list)));
    }
    let mut text = String::new();
    for record in &all {
        let how = if record.alive() {
            "up"
        } else {
            "dead (`lab down` cleans up)"
        };
        text += &format!("{}: {how}\n", record.name);
        for node in &record.nodes {
            let life = if node.keeper.open().is_some() {
                "alive"
            } else {
                "dead"
            };
            let (number, name, address, pid) = (node.number, &node.name, &node.address, node.keeper.pid);
            text += &format!("  node {number}  {name}  {address}  pid {pid}  {life}\n");
        }
    }
    say(&text)
}

/// Writes to standard output, whose reader may have seen enough.
fn say(text: &str) -> Result<(), LabError> {
    use std::io::Write;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(LabError::system("writing to standard output")(e))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_rates() {
        assert_eq!(parse_share("0.25"), Ok(0.25));
        assert_eq!(parse_share("5%"), Ok(0.05));
        assert!(parse_share("1").is_err());
        assert!(parse_share("-0.1").is_err());
        assert!(parse_share("NaN").is_err());
        assert_eq!(parse_rate("10mbit"), Ok(10_000_000));
        assert_eq!(parse_rate("1.5Gbit"), Ok(1_500_000_000));
        assert!(parse_rate("10").is_err());
        assert!(parse_rate("1bit").is_err());
    }
}
