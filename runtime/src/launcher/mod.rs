//! `mosrun`: starts a program under a deputy, and becomes it.
//!
//! The process that the shell started *is* the program: it forks the deputy away (a session of its own, nobody's
//! child), lets it attach, and executes the program. So whoever looks at home sees the very process that was started:
//! its pid, parent, session, terminal, status. The deputy holds none of its descriptors.

pub mod adopt;
mod job;

use std::ffi::{CString, OsStr, OsString};
use std::fs::Metadata;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use linklayer::cpu::GLIBC_BASELINE;

use crate::cli::mosrun::{Args, Cpu};

/// Exit status when the program was not started.
const NOT_STARTED: u8 = 125;
/// ... because it may not be executed.
const NOT_EXECUTABLE: u8 = 126;
/// ... because there is no such program.
const NOT_FOUND: u8 = 127;

/// The environment variable with switches of the C library (ld.so(8)).
const TUNABLES: &str = "GLIBC_TUNABLES";

/// What the deputy tells the process that is about to become the program.
enum Verdict {
    /// Execute it; nobody traces. What the user asked to be told about that, if anything.
    Alone(Option<String>),
    /// Execute it; the deputy has attached.
    Attached,
    /// Do not.
    Failed(String),
}

/// The whole of `mosrun`. Returns only when the program could not be executed.
pub fn main() -> ExitCode {
    let args = Args::parse_or_exit();
    match prepare(&args) {
        Ok(Verdict::Attached | Verdict::Alone(None)) => {}
        Ok(Verdict::Alone(Some(notice))) => eprintln!("mosrun: {notice}"),
        Ok(Verdict::Failed(why)) => return complain(&why, NOT_STARTED),
        Err(e) => return complain(&format!("{e:#}"), NOT_STARTED),
    }
    if args.cpu == Cpu::Baseline
        && let Err(e) = tell_c_library()
    {
        return complain(&e.to_string(), NOT_STARTED);
    }
    let errno = execute(&args.command);
    let program = args.program().to_string_lossy();
    let status = if errno == nix::errno::Errno::ENOENT {
        NOT_FOUND
    } else {
        NOT_EXECUTABLE
    };
    complain(&format!("{program}: {}", errno.desc()), status)
}

fn complain(why: &str, status: u8) -> ExitCode {
    eprintln!("mosrun: {why}");
    ExitCode::from(status)
}

/// Forks the deputy and waits for its verdict.
fn prepare(args: &Args) -> anyhow::Result<Verdict> {
    if gains_privileges(&args.command[0]) {
        return Ok(Verdict::Alone(None));
    }
    let (mut ours, theirs) = UnixStream::pair().context("socket to the deputy")?;
    let program = std::process::id() as i32;
    let log = job::Log::open(args)?;
    let args = args.clone();
    let own_end = ours.as_raw_fd();
    shim::process::spawn_detached(move || {
        let mut keep = vec![theirs.as_raw_fd()];
        keep.extend(log.descriptor());
        debug_assert!(!keep.contains(&own_end));
        job::deputy(&args, program, theirs, log, &keep);
    })
    .context("cannot start the deputy")?;
    let mut pid = [0; 4];
    ours.read_exact(&mut pid).context("the deputy died")?;
    shim::process::allow_tracer(i32::from_le_bytes(pid));
    ours.write_all(&[1])?;
    let mut verdict = [0];
    ours.read_exact(&mut verdict).context("the deputy died")?;
    let mut said = String::new();
    match verdict[0] {
        b'T' => Ok(Verdict::Attached),
        word => {
            ours.read_to_string(&mut said)?;
            Ok(match word {
                b'N' => Verdict::Alone((!said.is_empty()).then_some(said)),
                _ => Verdict::Failed(said),
            })
        }
    }
}

/// Whether a program is one of those that run with other privileges than those of the user who starts them. They run at
/// home; without CAP_SYS_PTRACE they must not even have a tracer, with which execve(2) would not give them theirs.
fn gains_privileges(program: &OsStr) -> bool {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    if uid.is_root() {
        return false;
    }
    let candidates = candidates(program, std::env::var_os("PATH"));
    candidates
        .iter()
        .filter(|c| nix::unistd::access(c.as_c_str(), nix::unistd::AccessFlags::X_OK).is_ok())
        .map(|c| Path::new(OsStr::from_bytes(c.as_bytes())))
        .find_map(|path| Some((path, path.metadata().ok().filter(Metadata::is_file)?)))
        .is_some_and(|(path, meta)| shim::privileges::grants(path, &meta, uid.as_raw(), gid.as_raw()))
}

/// Keeps the C library of the program and its descendants from choosing instructions that not all processors have.
fn tell_c_library() -> std::io::Result<()> {
    let mut value = std::env::var_os(TUNABLES).unwrap_or_default();
    if !value.is_empty() {
        value.push(":");
    }
    value.push(GLIBC_BASELINE);
    shim::startup::set_variable(TUNABLES, &value)
}

/// Replaces this process by the program, with everything the shell gave it.
fn execute(command: &[OsString]) -> nix::errno::Errno {
    let strings: Result<Vec<CString>, _> = command
        .iter()
        .map(|a| CString::new(a.clone().into_vec()))
        .collect();
    let Ok(strings) = strings else {
        return nix::errno::Errno::EINVAL;
    };
    let Some(program) = strings.first() else {
        return nix::errno::Errno::ENOENT;
    };
    shim::startup::restore_inherited();
    let candidates = candidates(OsStr::from_bytes(program.as_bytes()), std::env::var_os("PATH"));
    let mut worst = nix::errno::Errno::ENOENT;
    for candidate in candidates {
        let errno = match nix::unistd::execv(&candidate, &strings) {
            Err(e) => e,
            Ok(never) => match never {},
        };
        match errno {
            nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR => {}
            // execvp(3) goes on looking after these, and reports EACCES in the end.
            nix::errno::Errno::EACCES => worst = errno,
            nix::errno::Errno::ENOEXEC => {
                let mut shell = vec![c"/bin/sh".to_owned(), candidate.clone()];
                shell.extend(strings.iter().skip(1).cloned());
                return match nix::unistd::execv(c"/bin/sh", &shell) {
                    Err(e) => e,
                    Ok(never) => match never {},
                };
            }
            _ => return errno,
        }
    }
    worst
}

/// Where execvp(3) looks for a program.
fn candidates(program: &OsStr, path: Option<OsString>) -> Vec<CString> {
    let bytes = program.as_bytes();
    if bytes.contains(&b'/') || bytes.is_empty() {
        return CString::new(bytes).into_iter().collect();
    }
    let path = path.unwrap_or_else(|| "/bin:/usr/bin".into());
    path.as_bytes()
        .split(|b| *b == b':')
        .filter_map(|dir| {
            let mut full = if dir.is_empty() {
                b".".to_vec()
            } else {
                dir.to_vec()
            };
            full.push(b'/');
            full.extend_from_slice(bytes);
            CString::new(full).ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_as_execvp_does() {
        let found = candidates(OsStr::new("ls"), Some("/bin::/x".into()));
        assert_eq!(
            found,
            [c"/bin/ls".to_owned(), c"./ls".to_owned(), c"/x/ls".to_owned()]
        );
        assert_eq!(
            candidates(OsStr::new("a/ls"), Some("/bin".into())),
            [c"a/ls".to_owned()]
        );
        assert_eq!(candidates(OsStr::new(""), Some("/bin".into())), [c"".to_owned()]);
    }
}
