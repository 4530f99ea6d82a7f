//! Where the daemon's words go.

use std::fs::File;
use std::io;
use std::path::Path;

use tracing_subscriber::EnvFilter;

fn filter(level: &str) -> EnvFilter {
    EnvFilter::try_from_env("MOSRUN_LOG")
        .or_else(|_| EnvFilter::try_new(level))
        .unwrap_or_else(|_| EnvFilter::new("info"))
}

/// Logs to standard error. A standard error that nobody reads any more is no reason to die: what cannot be written is
/// dropped.
pub fn to_stderr(level: &str) {
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter(level))
        .with_writer(io::stderr)
        .with_ansi(false)
        .log_internal_errors(false)
        .finish();
    // a second call in one process (tests) changes nothing
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Makes `path` standard error, for this process and the supervisors that it starts. It is appended to, and made
/// readable for its owner only.
///
/// # Errors
/// The file cannot be opened.
pub fn stderr_to(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let file: File = File::options().create(true).append(true).mode(0o600).open(path)?;
    nix::unistd::dup2_stderr(&file)?;
    Ok(())
}
