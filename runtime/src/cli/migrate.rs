//! `mosmigrate`: moving processes of jobs, stopping them where they are, and letting them go on.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, CommandFactory, ValueEnum};
use linklayer::wire::{Mode, MoveReport, Phase, Progress, Way};
use serde::Serialize;

use super::table::bytes;
use crate::control::Client;
use crate::jobs::{HOME, JobInfo, client};
use crate::placement::{NodeRef, Place, Want, elsewhere, place};

/// Move a process to a node, or home; returns when it is there
///
/// A process that is frozen executes nothing until it is continued; it can be moved meanwhile.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The process (or its mosrun), then where to: a node's number, name, host name or address; "home"; "out" (another node, as
    /// the placement chooses); or "freeze" or "continue"
    #[arg(value_names = ["PID", "WHERE"], num_args = 1..=2, required = true)]
    words: Vec<String>,

    /// All processes of this job in place of PID: its name, or the pid of its mosrun or of its first program
    #[arg(short = 'J', long)]
    job: Option<String>,

    /// How its memory is moved
    #[arg(long, value_enum, default_value_t = ModeArg::Auto)]
    mode: ModeArg,

    /// Tell how far it is, and what it took
    #[arg(long, short)]
    verbose: bool,

    /// Print what it took as JSON
    #[arg(long)]
    json: bool,
}

/// How memory is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ModeArg {
    /// As its size, and how fast it changes its memory, suggest
    Auto,
    /// The process stands still while its memory is sent
    Freeze,
    /// Most of its memory is sent while it runs
    Precopy,
    /// It runs at its new place at once, and its memory is sent while it runs there: if its old node or the link is lost
    /// meanwhile, it is lost
    Postcopy,
    /// Most of its memory is sent while it runs, and the rest while it runs at its new place
    Hybrid,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Mode {
        match mode {
            ModeArg::Auto => Mode::Auto,
            ModeArg::Freeze => Mode::Freeze,
            ModeArg::Precopy => Mode::Precopy,
            ModeArg::Postcopy => Mode::Postcopy,
            ModeArg::Hybrid => Mode::Hybrid,
        }
    }
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Order {
    Home,
    Out,
    Freeze,
    Continue,
    To(NodeRef),
}

impl Order {
    fn parse(word: &str) -> Order {
        match word {
            "home" => Order::Home,
            "out" => Order::Out,
            "freeze" => Order::Freeze,
            "continue" => Order::Continue,
            other => {
                let Ok(node) = other.parse::<NodeRef>();
                if node == NodeRef::Number(HOME) {
                    Order::Home
                } else {
                    Order::To(node)
                }
            }
        }
    }
}

/// Whom it concerns.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Whom {
    Process(u32),
    Job(String),
}

/// A move as `--json` shows it.
#[derive(Debug, Serialize)]
struct Row<'a> {
    pid: u32,
    error: Option<&'a str>,
    frozen_ms: Option<f64>,
    #[serde(flatten)]
    report: Option<&'a MoveReport>,
}

impl MigrateArgs {
    fn parsed(&self) -> Result<(Whom, Order), String> {
        match (&self.job, self.words.as_slice()) {
            (Some(job), [to]) => Ok((Whom::Job(job.clone()), Order::parse(to))),
            (Some(_), _) => Err("with -J there is no PID, only where to".into()),
            (None, [pid, to]) => match pid.parse() {
                Ok(pid) => Ok((Whom::Process(pid), Order::parse(to))),
                Err(_) => Err(format!("`{pid}` is no process id")),
            },
            (None, _) => Err("it is not said where to".into()),
        }
    }

    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person; the process is where it was, unless the message says otherwise.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let (whom, order) = match self.parsed() {
            Ok(parsed) => parsed,
            Err(why) => Usage::command()
                .error(clap::error::ErrorKind::WrongNumberOfValues, why)
                .exit(),
        };
        let (socket, job, pids) = find(&whom)?;
        let mut failed = false;
        let mut reports = Vec::new();
        for pid in &pids {
            match self.carry_out(&socket, &job, *pid, &order) {
                Ok(report) => reports.push((*pid, Ok(report))),
                Err(e) if pids.len() == 1 && !self.json => return Err(e),
                Err(e) => {
                    failed = true;
                    if !self.json {
                        eprintln!("mosmigrate: {e:#}");
                    }
                    reports.push((*pid, Err(format!("{e:#}"))));
                }
            }
        }
        let mut out = std::io::stdout().lock();
        if self.json {
            let rows: Vec<Row<'_>> = reports.iter().map(|(pid, result)| row(*pid, result)).collect();
            writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
        } else if self.verbose {
            for (pid, report) in &reports {
                if let Ok(Some(report)) = report {
                    write!(out, "{}", text(*pid, report))?;
                }
            }
        }
        Ok(if failed {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }

    fn carry_out(
        &self,
        socket: &Path,
        job: &JobInfo,
        pid: u32,
        order: &Order,
    ) -> anyhow::Result<Option<MoveReport>> {
        let to = match order {
            Order::Freeze | Order::Continue => {
                client::freeze(socket, pid, *order == Order::Freeze)?;
                return Ok(None);
            }
            Order::Home => HOME,
            Order::To(node) => {
                let nodes = Client::connect()?.nodes()?;
                match place(&Want::Node(node.clone()), &nodes, 0)?.first() {
                    Some(Place::Node(number)) => *number,
                    Some(Place::Home) => HOME,
                    None => bail!("there is no such place"),
                }
            }
            Order::Out => {
                let now = job
                    .processes
                    .iter()
                    .find(|p| p.pid == pid)
                    .map_or(HOME, |p| p.node);
                let first = elsewhere(&Client::connect()?.nodes()?, now).first().copied();
                first.context("there is no other node that takes it")?
            }
        };
        let verbose = self.verbose && !self.json;
        let report = client::migrate(socket, pid, to, self.mode.into(), &mut |progress| {
            if verbose {
                eprintln!("{}", progress_text(progress));
            }
        })?;
        Ok(Some(report))
    }
}

/// For messages about the command line.
#[derive(Debug, clap::Parser)]
#[command(name = "mosmigrate")]
struct Usage {
    #[command(flatten)]
    args: MigrateArgs,
}

fn find(whom: &Whom) -> anyhow::Result<(PathBuf, JobInfo, Vec<u32>)> {
    match whom {
        Whom::Process(pid) => {
            let (socket, job, pid) = client::find(&client::rundirs(), *pid)?;
            Ok((socket, job, vec![pid]))
        }
        Whom::Job(name) => {
            let number = name.parse::<u32>().ok();
            let (socket, job) = client::all(&client::rundirs())
                .into_iter()
                .find(|(_, job)| {
                    job.id.to_string() == *name
                        || number.is_some_and(|n| [job.front_pid, job.deputy_pid, job.main_pid].contains(&n))
                })
                .with_context(|| format!("you have no job {name}; `mosps --json` shows their names"))?;
            let pids = job.processes.iter().map(|p| p.pid).collect();
            Ok((socket, job, pids))
        }
    }
}

fn row(pid: u32, result: &Result<Option<MoveReport>, String>) -> Row<'_> {
    let report = result.as_ref().ok().and_then(Option::as_ref);
    Row {
        pid,
        error: result.as_ref().err().map(String::as_str),
        frozen_ms: report.map(|r| r.times.frozen_us() as f64 / 1000.0),
        report,
    }
}

fn ms(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1000.0)
}

fn way_text(report: &MoveReport) -> &'static str {
    match report.way {
        Way::Direct => "directly",
        Way::Home => "by way of home",
    }
}

fn text(pid: u32, report: &MoveReport) -> String {
    let t = &report.times;
    let p = &report.pages;
    let mut out = format!(
        "process {pid}: moved {}, stood still for {}\n",
        way_text(report),
        ms(t.frozen_us())
    );
    if matches!(report.mode, Mode::Precopy | Mode::Hybrid) {
        let rounds = report.rounds;
        out += &format!("  sent while it ran  {} in {rounds} rounds\n", ms(t.precopy_us));
    }
    for (name, us) in [
        ("seize", t.seize_us),
        ("dump", t.dump_us),
        ("final pages", t.pages_us),
        ("transfer", t.transfer_us),
        ("restore", t.restore_us),
        ("resume", t.resume_us),
    ] {
        out += &format!("  {name:<18} {}\n", ms(us));
    }
    out += &format!(
        "  pages              {} ({} zero, {} compressed), {} sent\n",
        p.pages,
        p.zero,
        p.compressed,
        bytes(p.bytes)
    );
    if p.stored > 0 {
        let saved = bytes(p.saved_bytes);
        out += &format!(
            "  page store         {} pages were there, {saved} saved\n",
            p.stored
        );
    }
    if report.mode.is_lazy() {
        let after = &report.after;
        out += &format!(
            "  while it ran there {} pages ({} zero, {} compressed), {} sent, the last after {}; waited for a page {} times\n",
            after.pages.pages,
            after.pages.zero,
            after.pages.compressed,
            bytes(after.pages.bytes),
            ms(after.last_page_us),
            after.faults
        );
    }
    if !report.note.is_empty() {
        out += &format!("  {}\n", report.note);
    }
    out
}

fn progress_text(progress: &Progress) -> String {
    let report = &progress.report;
    if progress.phase == Phase::Postcopy {
        return format!(
            "process {}: {}, {} sent, {} left, waited for a page {} times",
            progress.pid,
            progress.phase,
            bytes(report.after.pages.bytes),
            bytes(progress.left * linklayer::image::PAGE),
            report.after.faults
        );
    }
    format!(
        "process {}: {}, round {}, {} sent, {} changed in the last round",
        progress.pid,
        progress.phase,
        report.rounds,
        bytes(report.pages.bytes),
        bytes(progress.left * linklayer::image::PAGE)
    )
}

/// `mosmigrate`'s arguments from a line, as its main function takes them.
#[cfg(test)]
fn from_line(line: &str) -> Result<MigrateArgs, clap::Error> {
    Usage::command()
        .try_get_matches_from(line.split_whitespace())
        .and_then(|matches| clap::FromArgMatches::from_arg_matches(&matches))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_and_jobs_are_told_apart() {
        let parsed = |line: &str| {
            from_line(line)
                .map_err(|e| e.to_string())
                .and_then(|a| a.parsed())
        };
        assert_eq!(parsed("mosmigrate 12 home"), Ok((Whom::Process(12), Order::Home)));
        assert_eq!(parsed("mosmigrate 12 0"), Ok((Whom::Process(12), Order::Home)));
        assert_eq!(parsed("mosmigrate 12 out"), Ok((Whom::Process(12), Order::Out)));
        assert_eq!(
            parsed("mosmigrate -J 1.2.3 freeze"),
            Ok((Whom::Job("1.2.3".into()), Order::Freeze))
        );
        assert_eq!(
            parsed("mosmigrate --mode precopy 12 3"),
            Ok((Whom::Process(12), Order::To(NodeRef::Number(3))))
        );
        for bad in [
            "mosmigrate",
            "mosmigrate 12",
            "mosmigrate x home",
            "mosmigrate -J 5 12 home",
            "mosmigrate --mode slow 12 3",
            "mosmigrate 12 3 4",
        ] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_report_names_its_parts() {
        let mut report = MoveReport {
            mode: Mode::Precopy,
            rounds: 3,
            note: "because".into(),
            ..MoveReport::default()
        };
        report.times.seize_us = 1500;
        let said = text(7, &report);
        for part in [
            "directly",
            "stood still for 1.5 ms",
            "3 rounds",
            "final pages",
            "because",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        let mut late = report.clone();
        late.mode = Mode::Postcopy;
        late.after.faults = 12;
        late.after.last_page_us = 2_500_000;
        let said = text(7, &late);
        assert!(
            said.contains("waited for a page 12 times") && said.contains("2500.0 ms"),
            "{said}"
        );
        let json = serde_json::to_value(row(7, &Ok(Some(late)))).unwrap();
        assert_eq!(
            (&json["mode"], &json["after"]["faults"]),
            (&"postcopy".into(), &12.into())
        );
        let json = serde_json::to_value(row(7, &Ok(Some(report)))).unwrap();
        assert_eq!(json["way"], "direct");
        assert_eq!(json["mode"], "precopy");
        assert_eq!(json["times"]["seize_us"], 1500);
        assert_eq!(json["frozen_ms"], 1.5);
    }
}
