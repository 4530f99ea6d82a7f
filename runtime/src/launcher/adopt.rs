//! Making a deputy for a process that was started without one.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use anyhow::Context;

use super::job;

/// Puts a running process of the caller's under a deputy, with its descendants. Gives what there is to tell about those that
/// were left out, a line each.
///
/// # Errors
/// When the process may not be traced or is gone; it is as it was.
pub fn adopt(pid: i32) -> anyhow::Result<String> {
    let (mut ours, theirs) = UnixStream::pair().context("socket to the deputy")?;
    shim::process::spawn_detached(move || deputy(pid, theirs)).context("cannot start the deputy")?;
    let mut verdict = String::new();
    ours.read_to_string(&mut verdict).context("word of the deputy")?;
    match verdict.split_at_checked(1) {
        Some(("T", left_out)) => Ok(left_out.into()),
        Some((_, why)) => anyhow::bail!("{why}"),
        None => anyhow::bail!("the deputy died"),
    }
}

/// The deputy's main function; its process ends when it returns.
fn deputy(pid: i32, mut socket: UnixStream) {
    let ready = shim::process::close_all_but(&[socket.as_raw_fd()])
        .context("descriptors")
        .and_then(|()| {
            std::env::set_current_dir("/")?;
            shim::process::raise_nofile();
            job::adopt(pid)
        });
    match ready {
        Ok((ready, left_out)) => {
            let lines: String = left_out.into_iter().map(|(_, why)| format!("{why}\n")).collect();
            let listens = ready.listen();
            // Who asked may be gone; the process is adopted all the same.
            let _ = socket.write_all(format!("T{lines}").as_bytes());
            drop(socket);
            listens.serve();
        }
        Err(e) => {
            let _ = socket.write_all(format!("E{e:#}").as_bytes());
        }
    }
}
