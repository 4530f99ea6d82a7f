//! `mosctl cluster`: making a cluster and letting machines join it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};

use crate::cluster::store::{MemberRecord, StateDir};
use crate::cluster::token::Token;
use crate::cluster::{invites, join, names};
use crate::control::Client;
use crate::daemon::config::{Config, DEFAULT_PORT, TEMPLATE};
use crate::daemon::node::advertised;
use crate::rundir;

/// How long an invitation is good, when nothing was said.
const DEFAULT_EXPIRY: &str = "1h";
/// Longest lifetime of an invitation.
const MAX_EXPIRY: Duration = Duration::from_secs(365 * 24 * 3600);

/// Make a cluster, invite machines to it, join one
#[derive(Debug, Args)]
pub struct ClusterCommand {
    #[command(subcommand)]
    verb: Verb,

    /// Configuration file of the daemon, from which the state directory and port are taken
    #[arg(long, short, value_name = "FILE", env = "MOSRUN_CONFIG", global = true)]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a new cluster, with this machine as its node 1 and the holder of the cluster's key
    Init {
        /// Name of the cluster
        #[arg(long, default_value = "mosrun")]
        name: String,
        /// Name of this node, instead of its host name
        #[arg(long, value_name = "NAME")]
        node_name: Option<String>,
    },
    /// Print an invitation, with which one machine can join
    Invite {
        /// How long it is good: 30s, 10m, 2h, 7d
        #[arg(long, value_name = "TIME", default_value = DEFAULT_EXPIRY, value_parser = parse_time)]
        expires: Duration,
        /// Where the joining machine reaches mosd of this node, instead of the address that mosd tells; may be repeated
        #[arg(long, value_name = "ADDRESS:PORT")]
        address: Vec<SocketAddr>,
    },
    /// Make this machine a node of the cluster that the invitation is from
    Join {
        /// The invitation
        token: String,
        /// Name of this node, instead of its host name
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
    },
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no time: write 30s, 10m, 2h or 7d");
    let (digits, unit) = text
        .split_at_checked(text.len().saturating_sub(1))
        .ok_or_else(bad)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    let time = number
        .checked_mul(seconds)
        .map(Duration::from_secs)
        .filter(|t| !t.is_zero() && *t <= MAX_EXPIRY);
    time.ok_or_else(|| format!("{text} is not between 1s and 365d"))
}

impl ClusterCommand {
    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let config = match &self.verb {
            // before there is a cluster there need not be a configuration: one is written
            Verb::Init { .. } | Verb::Join { .. } => load_or_write(self.config)?,
            Verb::Invite { .. } => Config::load(self.config.as_deref())?,
        };
        let dir = config.state_dir();
        match self.verb {
            Verb::Init { name, node_name } => init(&config, &dir, &name, node_name),
            Verb::Invite { expires, address } => invite(&config, &dir, expires, address),
            Verb::Join { token, name } => join_cluster(&config, &dir, &token, name),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

fn load_or_write(path: Option<PathBuf>) -> anyhow::Result<Config> {
    let path = path.unwrap_or_else(Config::default_path);
    if !path.exists() {
        let dir = path.parent().context("the configuration file has no directory")?;
        std::fs::create_dir_all(dir)
            .and_then(|()| std::fs::write(&path, TEMPLATE))
            .with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("wrote {} (all defaults)", path.display());
    }
    Ok(Config::load(Some(&path))?)
}

fn node_name(given: Option<String>) -> String {
    given.unwrap_or_else(names::default_node_name)
}

fn init(config: &Config, dir: &StateDir, cluster: &str, name: Option<String>) -> anyhow::Result<()> {
    let credentials = dir.create_cluster(cluster, &node_name(name))?;
    dir.save_members(&[MemberRecord {
        number: credentials.number,
        name: credentials.name.clone(),
        host: names::host(),
        addr: config.node.advertise,
    }])?;
    println!(
        "made cluster {cluster}; this machine is its node 1 ({})",
        credentials.name
    );
    eprintln!("start mosd here; then `mosctl cluster invite` prints what another machine needs to join");
    Ok(())
}

fn invite(
    config: &Config,
    dir: &StateDir,
    expires: Duration,
    mut addresses: Vec<SocketAddr>,
) -> anyhow::Result<()> {
    let credentials = dir.credentials()?;
    // the daemon knows best where it can be reached, when it is the one of this cluster
    let fingerprint = credentials.fingerprint().to_string();
    let socket = rundir::daemon_socket(&config.rundir());
    let status = Client::connect_to(&socket).and_then(|mut daemon| daemon.status());
    let status = status
        .ok()
        .filter(|s| s.cluster_fingerprint == fingerprint && s.node == credentials.number);
    if addresses.is_empty() {
        addresses.push(match &status {
            Some(status) => status.advertised,
            None => {
                let own = dir
                    .members()?
                    .into_iter()
                    .find(|m| m.number == credentials.number);
                let guess = advertised(config.node.listen, own.and_then(|m| m.addr));
                config.node.advertise.unwrap_or(guess)
            }
        });
    }
    if addresses.len() > 8 {
        bail!("at most 8 addresses fit in an invitation");
    }
    if let Some(bad) = addresses
        .iter()
        .find(|a| a.port() == 0 || a.ip().is_unspecified())
    {
        bail!("nobody can dial {bad}: say with --address where this node can be reached");
    }
    let token = invites::create(dir, addresses.clone(), expires)?;
    println!("{token}");
    let list = addresses
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    eprintln!(
        "good for one machine that reaches {list} by UDP, for {} s; there: mosctl cluster join INVITATION",
        expires.as_secs()
    );
    if status.is_none() {
        eprintln!("note: mosd of this node does not run; start it before the invitation is used");
    }
    if addresses.iter().all(|a| a.ip().is_loopback()) {
        eprintln!("note: that address is reachable from this machine only; see --address");
    }
    Ok(())
}

fn join_cluster(config: &Config, dir: &StateDir, token: &str, name: Option<String>) -> anyhow::Result<()> {
    let token: Token = token.parse()?;
    let port = config
        .node
        .advertise
        .map_or(config.node.listen.port(), |a| a.port());
    let port = if port == 0 { DEFAULT_PORT } else { port };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let credentials = runtime.block_on(join::join(dir, &token, &node_name(name), port))?;
    let (number, name, cluster) = (credentials.number, &credentials.name, &credentials.cluster);
    println!("joined cluster {cluster}; this machine is its node {number} ({name})");
    eprintln!("start mosd to take part");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(parse_time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_time("2h"), Ok(Duration::from_secs(7200)));
        for bad in [
            "",
            "s",
            "10",
            "0s",
            "-1m",
            "1x",
            "400d",
            "99999999999999999d",
            "1é",
        ] {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
    }
}
