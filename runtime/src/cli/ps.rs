//! `mosps`: looking at the processes of jobs.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::table::{Align, Table, bytes, cpu_time, rate};
use crate::control::Client;
use crate::jobs::{Arrival, HOME, JobInfo, ProcInfo, client};

/// List the processes of your jobs (root: of all jobs of this node), and where they run
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Print JSON: a list of processes
    #[arg(long)]
    json: bool,

    /// Show threads, caching and moves as well
    #[arg(long, short)]
    verbose: bool,
}

/// A process as `mosps --json` shows it.
#[derive(Debug, Serialize)]
struct Row<'a> {
    job: String,
    uid: u32,
    node_name: Option<&'a str>,
    #[serde(flatten)]
    process: &'a ProcInfo,
}

/// Names of nodes by their numbers, as far as a daemon knows them.
pub fn node_names() -> BTreeMap<u32, String> {
    let nodes = Client::connect()
        .and_then(|mut daemon| daemon.nodes())
        .unwrap_or_default();
    nodes.into_iter().map(|n| (n.number, n.name)).collect()
}

/// The place of a process for a table.
fn place_text(node: u32, names: &BTreeMap<u32, String>) -> String {
    match (node, names.get(&node)) {
        (HOME, _) => "home".into(),
        (number, Some(name)) => format!("{number} {name}"),
        (number, None) => number.to_string(),
    }
}

/// Writes the table of processes.
///
/// # Errors
/// The channel's.
pub fn write_table(
    out: &mut impl Write,
    jobs: &[JobInfo],
    names: &BTreeMap<u32, String>,
    verbose: bool,
) -> std::io::Result<()> {
    let mut columns = vec![
        ("PID", Align::Right),
        ("NODE", Align::Left),
        ("HOME", Align::Right),
        ("HOW", Align::Left),
        ("MEM", Align::Right),
        ("CPU", Align::Right),
        ("CALLS/S", Align::Right),
    ];
    if verbose {
        columns.extend([
            ("THR", Align::Right),
            ("CALLS", Align::Right),
            ("HITS", Align::Right),
            ("MISSES", Align::Right),
            ("INVAL", Align::Right),
            ("OUT", Align::Right),
            ("BACK", Align::Right),
        ]);
    }
    columns.extend([("COMMAND", Align::Left), ("STAYS BECAUSE", Align::Left)]);
    let mut table = Table::new(&columns);
    for process in jobs.iter().flat_map(|job| &job.processes) {
        let how = match &process.arrival {
            Arrival::WentHome(why) if verbose => format!("went home: {why}"),
            other => other.word().into(),
        };
        let mut row = vec![
            process.pid.to_string(),
            place_text(process.node, names),
            process.home.to_string(),
            how,
            bytes(process.rss_bytes),
            cpu_time(process.cpu_ms),
            rate(process.calls_per_s),
        ];
        if verbose {
            let c = process.counters;
            let counts = [
                c.calls_forwarded,
                c.cache_hits,
                c.cache_misses,
                c.cache_invalidations,
                c.moves_out,
                c.moves_home,
            ];
            row.push(process.threads.to_string());
            row.extend(counts.map(|n| n.to_string()));
        }
        row.extend([process.comm.clone(), process.stay.clone().unwrap_or_default()]);
        table.row(row);
    }
    table.write(out)
}

/// All jobs that the caller may see.
pub fn jobs() -> Vec<JobInfo> {
    client::all(&client::rundirs())
        .into_iter()
        .map(|(_, job)| job)
        .collect()
}

impl PsArgs {
    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let (jobs, names) = (jobs(), node_names());
        let mut out = std::io::stdout().lock();
        if self.json {
            let rows: Vec<Row<'_>> = jobs
                .iter()
                .flat_map(|job| {
                    job.processes.iter().map(|process| Row {
                        job: job.id.to_string(),
                        uid: job.uid,
                        node_name: names.get(&process.node).map(String::as_str),
                        process,
                    })
                })
                .collect();
            writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
        } else {
            write_table(&mut out, &jobs, &names, self.verbose)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job_id::JobId;
    use crate::jobs::Counters;

    fn job() -> JobInfo {
        let process = ProcInfo {
            pid: 12,
            ppid: 11,
            comm: "sleep".into(),
            node: 2,
            home: 1,
            arrival: Arrival::Named,
            threads: 1,
            rss_bytes: 1 << 20,
            cpu_ms: 5,
            counters: Counters {
                calls_forwarded: 7,
                cache_hits: 3,
                ..Counters::default()
            },
            calls_per_s: 1.5,
            stay: None,
        };
        let went = ProcInfo {
            pid: 13,
            node: HOME,
            arrival: Arrival::WentHome("shmat".into()),
            ..process.clone()
        };
        JobInfo {
            id: JobId {
                home: 1,
                deputy_pid: 11,
                nonce: 5,
            },
            front_pid: 10,
            deputy_pid: 11,
            main_pid: 12,
            uid: 0,
            started_unix_ms: 1,
            processes: vec![process, went],
            totals: Counters::default(),
        }
    }

    #[test]
    fn the_table_has_what_was_promised() {
        let names = BTreeMap::from([(2, "two".to_string())]);
        let text = |verbose| {
            let mut out = Vec::new();
            write_table(&mut out, &[job()], &names, verbose).unwrap();
            String::from_utf8(out).unwrap()
        };
        let plain = text(false);
        assert!(plain.lines().nth(1).unwrap().contains("2 two") && plain.contains("went-home"));
        assert!(text(true).contains("went home: shmat") && text(true).contains("INVAL"));
    }

    #[test]
    fn json_is_flat() {
        let job = job();
        let row = Row {
            job: job.id.to_string(),
            uid: 0,
            node_name: Some("two"),
            process: &job.processes[1],
        };
        let value = serde_json::to_value(&row).unwrap();
        assert_eq!(value["pid"], 13);
        assert_eq!(
            value["arrival"],
            serde_json::json!({"by": "went-home", "why": "shmat"})
        );
        assert_eq!(value["counters"]["cache_hits"], 3);
        assert_eq!(value["job"], "1.11.0000000000000005");
    }
}
