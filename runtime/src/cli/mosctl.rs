//! `mosctl`'s command line, and the names by which some of its verbs are known: `mosps`, `mosmigrate`, `mosmon`.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use clap::{Args, Command, CommandFactory, Parser, Subcommand};

use super::adopt::{AdoptArgs, ReleaseArgs};
use super::cluster::ClusterCommand;
use super::docs::{CompletionsArgs, ManArgs};
use super::info::{CheckArgs, StayReasonsArgs, SyscallsArgs};
use super::migrate::MigrateArgs;
use super::mon::MonArgs;
use super::ps::PsArgs;
use super::status::StatusArgs;
use crate::lab::LabCommand;

/// Exit status when a lab's command could not be run.
const EXIT_LAB: u8 = 125;

/// Look at and change a cluster
#[derive(Debug, Parser)]
#[command(name = "mosctl", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Cluster(ClusterCommand),
    Status(StatusArgs),
    #[command(visible_alias = "mosps")]
    Ps(PsArgs),
    #[command(visible_alias = "mosmigrate")]
    Migrate(MigrateArgs),
    #[command(visible_alias = "mosmon")]
    Mon(MonArgs),
    Adopt(AdoptArgs),
    Release(ReleaseArgs),
    Check(CheckArgs),
    Syscalls(SyscallsArgs),
    StayReasons(StayReasonsArgs),
    Lab(LabCommand),
    Man(ManArgs),
    Completions(CompletionsArgs),
}

/// The verbs that have a name of their own.
pub const NAMES: [(&str, &str); 3] = [("mosps", "ps"), ("mosmigrate", "migrate"), ("mosmon", "mon")];

/// The definition of a verb with a name of its own.
pub fn named(name: &'static str) -> Option<Command> {
    let (_, verb) = NAMES.iter().find(|(n, _)| *n == name)?;
    let command = Cli::command();
    let found = command.find_subcommand(verb)?.clone();
    Some(
        found
            .name(name)
            .bin_name(name)
            .version(env!("CARGO_PKG_VERSION"))
            .max_term_width(100),
    )
}

/// The whole of `mosctl`, `mosps`, `mosmigrate`, and `mosmon`.
pub fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    let called = argv
        .first()
        .map(Path::new)
        .and_then(Path::file_name)
        .and_then(OsStr::to_str);
    let name = NAMES
        .iter()
        .find(|(name, _)| Some(*name) == called)
        .map(|(name, _)| *name);
    match name.and_then(named) {
        Some(command) => {
            let matches = command.get_matches_from(argv);
            match name {
                Some("mosps") => run_parsed(&matches, PsArgs::run),
                Some("mosmigrate") => run_parsed(&matches, MigrateArgs::run),
                _ => run_parsed(&matches, MonArgs::run),
            }
        }
        None => run(Cli::parse().verb),
    }
}

fn run_parsed<A: Args>(matches: &clap::ArgMatches, run: fn(A) -> anyhow::Result<ExitCode>) -> ExitCode {
    match A::from_arg_matches(matches) {
        Ok(args) => finish(run(args)),
        Err(e) => e.exit(),
    }
}

fn finish(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|e| {
        // a reader that has seen enough is no error
        if e.downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
        {
            return ExitCode::SUCCESS;
        }
        eprintln!("{}: {e:#}", called_as());
        ExitCode::FAILURE
    })
}

/// By what name this program was called.
fn called_as() -> String {
    let name = std::env::args_os().next().unwrap_or_default();
    Path::new(&name)
        .file_name()
        .map_or_else(|| "mosctl".into(), |n| n.to_string_lossy().into_owned())
}

fn run(verb: Verb) -> ExitCode {
    finish(match verb {
        Verb::Cluster(args) => args.run(),
        Verb::Status(args) => args.run(),
        Verb::Ps(args) => args.run(),
        Verb::Migrate(args) => args.run(),
        Verb::Mon(args) => args.run(),
        Verb::Adopt(args) => args.run(),
        Verb::Release(args) => args.run(),
        Verb::Check(args) => args.run(),
        Verb::Syscalls(args) => args.run(),
        Verb::StayReasons(args) => args.run(),
        Verb::Man(args) => args.run(),
        Verb::Completions(args) => args.run(),
        Verb::Lab(lab) => match lab.run() {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(e) => {
                eprintln!("{}: {e}", called_as());
                Ok(ExitCode::from(EXIT_LAB))
            }
        },
    })
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use super::*;

    #[test]
    fn clap_agrees_with_the_definitions() {
        Cli::command().debug_assert();
        super::super::mosd::Args::command().debug_assert();
        for (name, _) in NAMES {
            named(name).unwrap().debug_assert();
        }
        assert!(named("mosrun").is_none());
    }

    #[test]
    fn lines_that_must_parse_and_lines_that_must_not() {
        let parse = |line: &str| Cli::try_parse_from(line.split_whitespace());
        for good in [
            "mosctl cluster init",
            "mosctl cluster init --name c --node-name n",
            "mosctl cluster invite --expires 10m --address 10.0.0.1:7117",
            "mosctl cluster join mosrun-00 --name x",
            "mosctl status --json",
            "mosctl ps -v --json",
            "mosctl migrate 12 home",
            "mosctl migrate 12 3",
            "mosctl migrate --mode precopy -v 12 out",
            "mosctl migrate -J 1.2.3 freeze",
            "mosctl mon --interval 0.5 --once",
            "mosctl check",
            "mosctl syscalls --markdown",
            "mosctl stay-reasons --markdown",
            "mosctl man /tmp/x",
            "mosctl completions bash",
            "mosctl lab status",
        ] {
            parse(good).unwrap_or_else(|e| panic!("{good}: {e}"));
        }
        for bad in [
            "mosctl",
            "mosctl cluster",
            "mosctl cluster join",
            "mosctl cluster invite --expires never",
            "mosctl cluster invite --address here",
            "mosctl migrate",
            "mosctl migrate 12 3 4",
            "mosctl mon --interval 0",
            "mosctl completions csh",
            "mosctl frobnicate",
        ] {
            assert_eq!(parse(bad).expect_err(bad).exit_code(), 2, "{bad}");
        }
        let ps = named("mosps")
            .unwrap()
            .try_get_matches_from(["mosps", "--json"])
            .unwrap();
        assert!(PsArgs::from_arg_matches(&ps).is_ok());
    }
}
