//! `mosmon`: the nodes and jobs, again and again.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::{ps, status};
use crate::control::Client;

/// Watch the nodes and the jobs of this node
#[derive(Debug, Args)]
pub struct MonArgs {
    /// Time between two looks, in seconds
    #[arg(long, short, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    interval: Duration,

    /// Look once and end
    #[arg(long)]
    once: bool,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(s) if (0.1..=3600.0).contains(&s) => Ok(Duration::from_secs_f64(s)),
        _ => Err("give a number of seconds from 0.1 to 3600".into()),
    }
}

impl MonArgs {
    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let stdout = std::io::stdout();
        let clears = stdout.is_terminal() && !self.once;
        loop {
            // composed first and written at once, so that the screen does not flicker
            let mut text = Vec::new();
            let nodes = Client::connect().and_then(|mut daemon| daemon.nodes());
            match &nodes {
                Ok(nodes) => status::write_nodes(&mut text, nodes)?,
                Err(e) => writeln!(text, "{e}")?,
            }
            let jobs = ps::jobs();
            if !jobs.is_empty() {
                let names = nodes
                    .iter()
                    .flatten()
                    .map(|n| (n.number, n.name.clone()))
                    .collect();
                writeln!(text)?;
                ps::write_table(&mut text, &jobs, &names, false)?;
            }
            let mut out = stdout.lock();
            if clears {
                // home, the text with the rest of each line erased, the rest of the screen erased (ECMA-48)
                out.write_all(b"\x1b[H")?;
                for line in String::from_utf8_lossy(&text).lines() {
                    write!(out, "{line}\x1b[K\r\n")?;
                }
                out.write_all(b"\x1b[J")?;
            } else {
                out.write_all(&text)?;
            }
            out.flush()?;
            drop(out);
            if self.once {
                return Ok(ExitCode::SUCCESS);
            }
            std::thread::sleep(self.interval);
        }
    }
}
