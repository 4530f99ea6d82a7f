//! `mosctl status`: the nodes, this node's jobs, and what was counted.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::ps;
use super::table::{Align, Table, bytes};
use crate::cluster::state::NodeState;
use crate::control::{Client, ClientError, DaemonStatus, NodeStore};
use crate::jobs::{Counters, JobInfo};
use crate::pagestore::Counts;

/// Show the nodes, the jobs of this node, and what was counted
#[derive(Debug, Args)]
#[command(after_help = "Exit status: 0; 1 when mosd does not answer (the jobs are shown nevertheless).")]
pub struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Everything, as `--json` shows it.
#[derive(Debug, Serialize)]
struct Status {
    daemon: Option<DaemonStatus>,
    error: Option<String>,
    jobs: Vec<JobInfo>,
    totals: Counters,
}

/// Writes the table of nodes.
///
/// # Errors
/// The channel's.
pub fn write_nodes(out: &mut impl Write, nodes: &[NodeState]) -> std::io::Result<()> {
    let mut table = Table::new(&[
        ("NODE", Align::Right),
        ("NAME", Align::Left),
        ("STATE", Align::Left),
        ("LOAD", Align::Right),
        ("CORES", Align::Right),
        ("SPEED", Align::Right),
        ("FREE", Align::Right),
        ("MEMORY", Align::Right),
        ("GUESTS", Align::Right),
        ("ADDRESS", Align::Left),
    ]);
    for node in nodes {
        let number = |n: u32| n.to_string();
        let load = |text: fn(&crate::cluster::state::LoadVector) -> String| {
            node.load.as_ref().map_or_else(|| "-".into(), text)
        };
        table.row(vec![
            number(node.number),
            if node.is_self {
                format!("{} (here)", node.name)
            } else {
                node.name.clone()
            },
            node.status.to_string(),
            load(|l| format!("{:.2}", l.runnable())),
            load(|l| l.cores.to_string()),
            load(|l| l.speed.to_string()),
            load(|l| bytes(l.memory_free_bytes)),
            load(|l| bytes(l.memory_total_bytes)),
            load(|l| {
                if l.admits {
                    l.guests.to_string()
                } else {
                    format!("{} (closed)", l.guests)
                }
            }),
            node.addr.map_or_else(|| "-".into(), |a| a.to_string()),
        ]);
    }
    table.write(out)
}

impl StatusArgs {
    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let asked: Result<DaemonStatus, ClientError> =
            Client::connect().and_then(|mut daemon| daemon.status());
        let jobs = ps::jobs();
        let mut totals = Counters::default();
        jobs.iter().for_each(|job| totals += job.totals);
        let (daemon, error) = match asked {
            Ok(status) => (Some(status), None),
            Err(e) => (None, Some(e.to_string())),
        };
        let code = if daemon.is_some() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
        let status = Status {
            daemon,
            error,
            jobs,
            totals,
        };
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?;
        } else {
            status.write(&mut out)?;
        }
        Ok(code)
    }
}

impl Status {
    fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        if let Some(daemon) = &self.daemon {
            writeln!(
                out,
                "cluster {}, node {}; mosd {} runs since {} s as process {}, listens on {}",
                daemon.cluster,
                daemon.node,
                daemon.version,
                daemon.uptime_ms / 1000,
                daemon.pid,
                daemon.listen
            )?;
            write_nodes(out, &daemon.nodes)?;
            for NodeStore { node, counts } in daemon
                .page_stores
                .iter()
                .filter(|s| s.counts != Counts::default())
            {
                writeln!(
                    out,
                    "page stores of node {node}: {} in {} pages, {} hits saved {}, {} evicted, {} corrupt",
                    bytes(counts.bytes),
                    counts.entries,
                    counts.hits,
                    bytes(counts.saved_bytes),
                    counts.evicted,
                    counts.corrupt
                )?;
            }
            for hosted in &daemon.supervisors {
                writeln!(
                    out,
                    "guests of job {} (uid {}), supervisor {}",
                    hosted.job, hosted.uid, hosted.pid
                )?;
            }
        }
        if let Some(error) = &self.error {
            eprintln!("mosctl: {error}");
        }
        if !self.jobs.is_empty() {
            let names = self
                .daemon
                .iter()
                .flat_map(|d| &d.nodes)
                .map(|n| (n.number, n.name.clone()))
                .collect();
            writeln!(out)?;
            ps::write_table(out, &self.jobs, &names, false)?;
            let t = self.totals;
            writeln!(
                out,
                "calls forwarded {}, cache hits {}, misses {}, invalidations {}, moves out {}, home {}",
                t.calls_forwarded,
                t.cache_hits,
                t.cache_misses,
                t.cache_invalidations,
                t.moves_out,
                t.moves_home
            )?;
        }
        Ok(())
    }
}
