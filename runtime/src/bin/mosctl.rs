//! mosctl: looks at and changes a cluster.

use clap::{Parser, Subcommand};

/// Look at and change a cluster
#[derive(Parser)]
#[command(name = "mosctl", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Lab(runtime::lab::LabCommand),
}

fn main() -> std::process::ExitCode {
    let done = match Cli::parse().verb {
        Verb::Lab(lab) => lab.run(),
    };
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mosctl: {error}");
            std::process::ExitCode::from(125)
        }
    }
}
