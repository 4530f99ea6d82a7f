//! A program on a terminal of its own, driven as by somebody who types.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};

use crate::compare::End;

/// A terminal with a session that has it as its controlling terminal.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    master: File,
    path: PathBuf,
    output: Receiver<Vec<u8>>,
    reading: JoinHandle<()>,
    closing: Arc<AtomicBool>,
    /// Everything that was shown since the last match of [`expect`](Self::expect).
    shown: String,
    log: String,
}

impl Terminal {
    /// Starts the command as leader of a session on a new terminal of 24 lines and 80 columns.
    ///
    /// # Panics
    /// When there is no terminal, or `setsid` (util-linux) is not there.
    pub fn start(command: &Command) -> Self {
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).expect("a terminal");
        for end in [&pty.master, &pty.slave] {
            // In the session, the other end would keep the terminal from being hung up.
            fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("a flag");
        }
        let path = nix::unistd::ttyname(&pty.slave).expect("the terminal's name");
        let slave = || Stdio::from(pty.slave.as_fd().try_clone_to_owned().expect("a duplicate"));
        let mut session = Command::new("setsid");
        session
            .args(["--ctty", "--wait"])
            .arg(command.get_program())
            .args(command.get_args());
        session.env("TERM", "xterm").env("PS1", "$ ");
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => session.env(name, value),
                None => session.env_remove(name),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            session.current_dir(dir);
        }
        let child = session
            .stdin(slave())
            .stdout(slave())
            .stderr(slave())
            .spawn()
            .expect("setsid can be started");
        drop(pty.slave);
        let master = File::from(pty.master);
        let mut reader = master.try_clone().expect("a duplicate");
        let (send, output) = channel();
        let closing = Arc::new(AtomicBool::new(false));
        let asked = closing.clone();
        let reading = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while !asked.load(Ordering::Relaxed) {
                // Looks up now and then, for a terminal is hung up only when nobody has it open.
                let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
                if poll(&mut fds, PollTimeout::from(20u8)) == Ok(0) {
                    continue;
                }
                // EIO is how a terminal ends whose last process is gone.
                match reader.read(&mut buffer) {
                    Ok(n @ 1..) if send.send(buffer[..n].to_vec()).is_ok() => {}
                    _ => break,
                }
            }
        });
        Self {
            child,
            master,
            path,
            output,
            reading,
            closing,
            shown: String::new(),
            log: String::new(),
        }
    }

    /// Types the text. Control characters are written as they are: "\x03" is Ctrl-C.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn send(&mut self, keys: &str) {
        self.master
            .write_all(keys.as_bytes())
            .expect("the terminal takes keys");
    }

    /// Waits until the terminal shows the text, and forgets everything up to there; gives what came before it.
    ///
    /// # Panics
    /// When it does not within 20 seconds.
    pub fn expect(&mut self, text: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(at) = self.shown.find(text) {
                let before = self.shown[..at].to_owned();
                self.shown.drain(..at + text.len());
                return before;
            }
            match self
                .output
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(bytes) => {
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    self.shown += &text;
                    self.log += &text;
                }
                Err(why) => panic!(
                    "`{text}` was not shown ({why}); all that was shown:\n{}",
                    self.log
                ),
            }
        }
    }

    /// Types the text again and again until the terminal shows the other, as somebody does who waits for it.
    ///
    /// # Panics
    /// When it does not within 20 seconds.
    pub fn send_until(&mut self, keys: &str, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.shown.contains(text) && Instant::now() < deadline {
            self.send(keys);
            if let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(200)) {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                self.shown += &text;
                self.log += &text;
            }
        }
        self.expect(text);
    }

    /// Changes the size of the terminal.
    ///
    /// # Panics
    /// When `stty` cannot.
    pub fn resize(&self, rows: u16, columns: u16) {
        let status = Command::new("stty")
            .args(["rows", &rows.to_string(), "cols", &columns.to_string(), "-F"])
            .arg(&self.path)
            .status()
            .expect("stty can be started");
        assert!(status.success(), "stty: {status}");
    }

    /// Closes the terminal, as when its window is closed, and waits for the session's end.
    ///
    /// # Panics
    /// When the session does not end.
    pub fn hang_up(self) -> End {
        let Self {
            mut child,
            master,
            reading,
            closing,
            ..
        } = self;
        closing.store(true, Ordering::Relaxed);
        reading.join().expect("the reader ends");
        drop(master);
        child.wait().expect("the session's status").into()
    }

    /// Waits for the end of the session.
    ///
    /// # Panics
    /// When it does not end within 20 seconds.
    pub fn wait(mut self) -> End {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            // What is still written has to be read, or the session could not end.
            match self
                .output
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(bytes) => self.log += &String::from_utf8_lossy(&bytes),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
                Err(why) => panic!(
                    "the session did not end ({why}); all that was shown:\n{}",
                    self.log
                ),
            }
        }
        self.child.wait().expect("the session's status").into()
    }
}
