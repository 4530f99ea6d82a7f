//! `mosctl check`, `mosctl syscalls` and `mosctl stay-reasons`: what this kernel can do, what becomes of each system call, and why
//! processes do not move.

use std::io::Write;
use std::process::ExitCode;

use clap::Args;
use linklayer::stay::{self, StayReason};
use shim::probe::{self, Need, Outcome};

/// Try every kernel feature that is used, and say what is missing, what that costs, and how to get it
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0; 1 when guests cannot run here or processes of this node cannot run away."
)]
pub struct CheckArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Print what becomes of each system call of a program that is away
#[derive(Debug, Args)]
pub struct SyscallsArgs {
    /// Print the document that the table is part of (docs/SYSCALLS.md)
    #[arg(long)]
    markdown: bool,

    /// Print the commands of fcntl, ioctl, prctl and the like as well
    #[arg(long, short, conflicts_with = "markdown")]
    verbose: bool,
}

/// Print why a process may be at home, may have to go there, or does not move
#[derive(Debug, Args)]
pub struct StayReasonsArgs {
    /// Print the document that they are part of (docs/STAY-REASONS.md)
    #[arg(long)]
    markdown: bool,
}

impl CheckArgs {
    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let probes = probe::run();
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&probes)?)?;
        } else {
            writeln!(out, "kernel {}", probe::kernel_release())?;
            for probe in &probes {
                let (word, found) = match &probe.outcome {
                    Outcome::Works => ("works", None),
                    Outcome::Limited(how) => ("limited", Some(how)),
                    Outcome::Missing(why) => ("MISSING", Some(why)),
                };
                writeln!(out, "{word:<8} {:<18} {}", probe.name, probe.purpose)?;
                if let Some(found) = found {
                    writeln!(out, "{:<28}found: {found}", "")?;
                    writeln!(out, "{:<28}so: {}", "", probe.consequence)?;
                    writeln!(out, "{:<28}remedy: {}", "", probe.remedy)?;
                }
            }
        }
        let lacking = |need| probes.iter().any(|p| p.need == need && !p.works());
        let (guests, home) = (!lacking(Need::Guests), !lacking(Need::Home));
        if !self.json {
            let can = |yes| if yes { "can" } else { "CANNOT" };
            writeln!(
                out,
                "guests {} run on this node; its own processes {} run away",
                can(guests),
                can(home)
            )?;
        }
        Ok(if guests && home {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

impl StayReasonsArgs {
    /// Carries the command out.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mut out = std::io::stdout().lock();
        if self.markdown {
            out.write_all(stay::markdown().as_bytes())?;
        } else {
            for reason in StayReason::all() {
                writeln!(out, "{}: {reason}\n    {}", reason.name(), reason.meaning())?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl SyscallsArgs {
    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let text = if self.markdown {
            linklayer::syscall::markdown()
        } else {
            linklayer::syscall::text(self.verbose)
        };
        std::io::stdout().lock().write_all(text.as_bytes())?;
        Ok(ExitCode::SUCCESS)
    }
}
