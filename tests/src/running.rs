//! A program that goes on while the test looks at it.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::compare::{End, How};
use crate::lab::Lab;

/// A program on node 1 of a lab, run in some way, with pipes for its input and output.
#[derive(Debug)]
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Running {
    /// Starts it.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start<S: AsRef<OsStr>>(lab: &Lab, how: How, command: impl IntoIterator<Item = S>) -> Self {
        let mut line = lab.exec(1);
        line.args(how.prefix()).args(command);
        Self::spawn(line)
    }

    /// Starts a shell script that gets `name=value` for its own variables.
    pub fn script(lab: &Lab, how: How, script: &str) -> Self {
        Self::start(lab, how, ["bash", "-c", script])
    }

    /// Starts a command line that is complete.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program can be started");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, input, output }
    }

    /// The next line that it writes, without its end; empty at the end of its output.
    ///
    /// # Panics
    /// When it cannot be read.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("its output");
        line.trim_end_matches('\n').to_owned()
    }

    /// The next line as a number (a pid, most of the time).
    ///
    /// # Panics
    /// When it is none.
    pub fn number(&mut self) -> i32 {
        let line = self.line();
        line.trim()
            .parse()
            .unwrap_or_else(|_| panic!("`{line}` is no number"))
    }

    /// Writes to its input.
    ///
    /// # Panics
    /// When it does not take it.
    pub fn write(&mut self, text: &str) {
        self.input
            .as_mut()
            .expect("its input")
            .write_all(text.as_bytes())
            .expect("it reads");
    }

    /// Closes its input.
    pub fn close(&mut self) {
        self.input = None;
    }

    /// Sends a signal to `mosctl lab exec`, which passes it on.
    ///
    /// # Panics
    /// When it has been waited for.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("it is there");
    }

    /// Whether it has ended, without waiting.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    /// Closes its input, and waits for its end.
    ///
    /// # Panics
    /// When it does not end within 30 seconds.
    pub fn wait(&mut self) -> End {
        self.wait_within(Duration::from_secs(30))
    }

    /// As [`Running::wait`], with another limit.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn wait_within(&mut self, limit: Duration) -> End {
        self.close();
        let mut end = None;
        wait_for("the program to end", limit, || {
            end = self.child.try_wait().expect("its status");
            end.is_some()
        });
        end.expect("just seen").into()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Only the way to it: the lab ends what runs in it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `done`, looking again every few milliseconds.
///
/// # Panics
/// When it takes longer than `limit`.
pub fn wait_for(what: &str, limit: Duration, done: impl FnMut() -> bool) {
    assert!(within(limit, done), "waited {limit:?} in vain for {what}");
}

/// Whether `done` comes true before the limit, looking again every few milliseconds.
pub fn within(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}
