//! What the tests of process surgery share: small C guests, started under trace.
#![allow(dead_code)] // no test uses all of it

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use shim::entry::{Entered, run_to_entry};
use shim::ptrace::{self, Options, Status, Stop, Stopped, Target, wait, wait_stop};

/// Compiles a C program; extra arguments go to gcc.
pub fn compile(dir: &Path, name: &str, source: &str, extra: &[&str]) -> PathBuf {
    let (file, program) = (dir.join(format!("{name}.c")), dir.join(name));
    std::fs::write(&file, source).unwrap();
    let status = Command::new("gcc")
        .args(["-O1", "-g0", "-w", "-pthread", "-o"])
        .args([&program, &file])
        .args(extra)
        .status()
        .expect("gcc is needed to build the guests");
    assert!(status.success());
    program
}

/// A guest that this test traces.
pub struct Guest {
    pub pid: i32,
    pub stdin: Option<ChildStdin>,
    pub stdout: ChildStdout,
    child: Child,
}

impl Guest {
    /// Starts a program and leaves it stopped in its exec stop.
    pub fn start(program: &Path, args: &[&str]) -> (Guest, Stopped) {
        // The shell waits for a line before it executes the program, so that it can be seized before.
        let mut child = Command::new("/bin/sh")
            .args(["-c", "read go; exec \"$0\" \"$@\"", program.to_str().unwrap()])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        ptrace::seize(pid, ptrace::usual_options() | Options::PTRACE_O_EXITKILL).unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, b"\n").unwrap();
        let stopped = next_stop(pid, |stop| matches!(stop, Stop::Exec { .. }));
        let stdout = child.stdout.take().unwrap();
        (
            Guest {
                pid,
                stdin: Some(stdin),
                stdout,
                child,
            },
            stopped,
        )
    }

    /// Starts a program and leaves it stopped at its entry point.
    pub fn at_entry(program: &Path, args: &[&str]) -> (Guest, Stopped) {
        let (guest, stopped) = Guest::start(program, args);
        match run_to_entry(stopped).unwrap() {
            Entered::AtEntry(stopped) => (guest, stopped),
            other => panic!("{other:?}"),
        }
    }

    /// Everything that it writes until it closes its output.
    pub fn output(&mut self) -> String {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut self.stdout, &mut text).unwrap();
        text
    }

    /// One line that it writes.
    pub fn line(&mut self) -> String {
        let mut text = Vec::new();
        let mut byte = [0];
        while std::io::Read::read(&mut self.stdout, &mut byte).unwrap() == 1 && byte[0] != b'\n' {
            text.push(byte[0]);
        }
        String::from_utf8(text).unwrap()
    }
}

/// Passes over stops of a thread (delivering its signals) until one that is wanted.
pub fn next_stop(tid: i32, wanted: impl Fn(Stop) -> bool) -> Stopped {
    loop {
        let stopped = wait_stop(tid).unwrap();
        match stopped.stop() {
            stop if wanted(stop) => return stopped,
            Stop::Signal(sig) => stopped.cont(sig).unwrap(),
            _ => stopped.cont(0).unwrap(),
        }
    }
}

/// Runs a traced process to its end, delivering its signals.
pub fn run_to_end(pid: i32) -> Status {
    loop {
        match wait(Target::Mine, false).unwrap().expect("the process is there") {
            (_, Status::Stopped(stopped)) => match stopped.stop() {
                Stop::Signal(sig) => drop(stopped.cont(sig)),
                _ => drop(stopped.cont(0)),
            },
            (tid, status) if tid == pid => return status,
            _ => {}
        }
    }
}

/// Stops all threads of a running traced process; the leader is the first.
pub fn stop_all(pid: i32) -> Vec<Stopped> {
    let mut tids: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|e| e.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    tids.sort_by_key(|tid| (*tid != pid, *tid));
    tids.into_iter()
        .map(|tid| {
            ptrace::interrupt(tid).unwrap();
            next_stop(tid, |stop| stop == Stop::Interrupt)
        })
        .collect()
}
