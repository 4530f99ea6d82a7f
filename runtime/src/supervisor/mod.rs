//! The supervisor: the process on a remote node that owns the guests of one job.
//!
//! `mosd` starts it as `mosd supervise`, writes one [`SupervisorConfig`] to its standard input, and reads one
//! [`SupervisorAnswer`] from its standard output. After that the two have nothing to do with each other: the supervisor
//! is in a session of its own, and lives until its job ends or its contact is lost for good. A restart of `mosd` does
//! not touch it.

pub mod handshake;

pub use handshake::{
    SupervisorAnswer, SupervisorConfig, SupervisorLimits, SupervisorReady, answer_and_detach,
};

/// Runs the supervisor of one job, in a process that has the job's user already, until the job has ended.
///
/// Listens on an address of its own, and says so to `mosd` with [`answer_and_detach`].
///
/// # Errors
/// What made it impossible to serve the job; `mosd` was told when it had not been answered before.
pub fn run(config: SupervisorConfig) -> anyhow::Result<()> {
    let why = format!("job {}: this build of mosd cannot hold guests", config.job);
    answer_and_detach(&SupervisorAnswer::Failed(why.clone()))?;
    anyhow::bail!(why)
}
