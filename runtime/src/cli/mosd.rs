//! `mosd`'s command line.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use super::EXIT_USAGE;
use crate::daemon::config::Config;
use crate::daemon::{start, supervise};

/// The daemon of a node: takes part in the cluster, answers mosrun and mosctl, and starts supervisors for jobs of other
/// nodes.
///
/// Without --foreground it goes into the background, and the command returns when the daemon serves its socket. SIGTERM
/// ends it; jobs and supervisors go on. Works for root, who serves all users of the machine, and for a plain user, who
/// serves himself.
#[derive(Debug, Parser)]
#[command(
    name = "mosd",
    version,
    args_conflicts_with_subcommands = true,
    max_term_width = 100,
    after_help = "Exit status: 0; 1 when the daemon cannot start; 2 for a wrong command line or configuration."
)]
pub struct Args {
    /// Configuration file, instead of /etc/mosrun/mosd.toml (root) or ~/.config/mosrun/mosd.toml
    #[arg(long, short, value_name = "FILE", env = "MOSRUN_CONFIG")]
    pub config: Option<PathBuf>,

    /// Stay in the foreground and log to standard error
    #[arg(long, short)]
    pub foreground: bool,

    /// Read the configuration, say whether it is good, and end
    #[arg(long)]
    pub check_config: bool,

    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Hold the guests of one job (started by mosd itself)
    #[command(hide = true)]
    Supervise,
}

/// The whole of `mosd`.
pub fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(Verb::Supervise) = args.verb {
        return supervise::child_main();
    }
    let config = match Config::load(args.config.as_deref()) {
        Ok(config) => config,
        Err(e) => {
            eprintln!("mosd: {e}");
            return ExitCode::from(EXIT_USAGE as u8);
        }
    };
    if args.check_config {
        match &config.file {
            Some(file) => println!("{}: good", file.display()),
            None => println!("no configuration file: the defaults hold"),
        }
        return ExitCode::SUCCESS;
    }
    let ended = if args.foreground {
        start::run(config).map(|()| ExitCode::SUCCESS)
    } else {
        start::background(std::env::args_os().skip(1))
    };
    ended.unwrap_or_else(|e| {
        eprintln!("mosd: {e:#}");
        ExitCode::FAILURE
    })
}
