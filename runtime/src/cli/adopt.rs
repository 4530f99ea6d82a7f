//! `mosctl adopt` and `mosctl release`: processes that were not started with mosrun.

use std::process::ExitCode;

use clap::Args;

use crate::jobs::client;

/// Put a running process, with its descendants, under a deputy, so that it can be moved
///
/// The process notices nothing, stays where it is, and stays when the deputy is released or killed. It must be yours and
/// have no debugger.
#[derive(Debug, Args)]
pub struct AdoptArgs {
    /// The process
    #[arg(value_parser = clap::value_parser!(i32).range(2..))]
    pid: i32,
}

/// Let a job's processes go: undoes `mosctl adopt`; all of them must be home
#[derive(Debug, Args)]
pub struct ReleaseArgs {
    /// A process of the job
    pid: u32,
}

impl AdoptArgs {
    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person; the process is as it was.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if let Ok((_, job, _)) = client::find(&client::rundirs(), self.pid as u32) {
            anyhow::bail!("process {} belongs to job {} already", self.pid, job.id);
        }
        for line in crate::launcher::adopt::adopt(self.pid)?.lines() {
            eprintln!("mosctl: left out: {line}");
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl ReleaseArgs {
    /// Carries the command out.
    ///
    /// # Errors
    /// What went wrong, for a person; the job is as it was.
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let (socket, _, _) = client::find(&client::rundirs(), self.pid)?;
        client::release(&socket)?;
        Ok(ExitCode::SUCCESS)
    }
}
