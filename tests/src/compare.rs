//! Running a program in several ways, and finding what differs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::lab::Lab;
use crate::mover::{Mover, Tally};

/// Environment variable with the name of a file for the log of the home side of programs that are moved about.
pub const LOG: &str = "MOSRUN_TESTS_LOG";

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// On node 1, without mosrun: what everything else must equal.
    Native,
    /// By mosrun, at home.
    Home,
    /// By mosrun, on that node.
    Away(u32),
    /// By mosrun, on node 2 at first; somebody moves it about, so that it is at home at times.
    Moved,
}

impl How {
    /// The words that come before a command to run it so.
    pub fn prefix(self) -> Vec<OsString> {
        match self {
            Self::Native => vec![],
            // At home the deputy is seen in /proc/PID/status.
            Self::Home => ["env", "TRACED_AT_HOME=1", "mosrun", "-h", "--"]
                .map(Into::into)
                .to_vec(),
            Self::Away(node) => vec!["mosrun".into(), "-r".into(), node.to_string().into(), "--".into()],
            Self::Moved => {
                let mut words = vec!["env".into(), "TRACED_AT_HOME=1".into(), "mosrun".into()];
                if let Some(file) = std::env::var_os(LOG).filter(|file| !file.is_empty()) {
                    words.extend(["-vv".into(), "--log".into(), file]);
                }
                words.extend(["-r", "2", "--"].map(Into::into));
                words
            }
        }
    }
}

/// A program to run, with everything that it starts from.
#[derive(Clone)]
pub struct Case {
    command: Vec<OsString>,
    input: Vec<u8>,
    environment: Vec<(OsString, OsString)>,
    prepare: Vec<(PathBuf, Content)>,
    patience: Duration,
}

#[derive(Clone)]
enum Content {
    Bytes(Vec<u8>, u32),
    Copy(PathBuf),
}

impl Case {
    /// A command line; it runs in an empty directory.
    pub fn new<I: Into<OsString>>(command: impl IntoIterator<Item = I>) -> Self {
        Self {
            command: command.into_iter().map(Into::into).collect(),
            input: Vec::new(),
            environment: Vec::new(),
            prepare: Vec::new(),
            patience: Duration::from_secs(120),
        }
    }

    /// A script for bash.
    pub fn bash(script: &str) -> Self {
        Self::new(["bash", "script.sh"]).file("script.sh", script)
    }

    /// What it reads from its standard input, a pipe.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// A variable of its environment.
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// A file that is in its directory.
    pub fn file(mut self, path: impl Into<PathBuf>, content: impl AsRef<[u8]>) -> Self {
        self.prepare
            .push((path.into(), Content::Bytes(content.as_ref().to_vec(), 0o644)));
        self
    }

    /// A directory tree that is copied into its directory.
    pub fn tree(mut self, path: impl Into<PathBuf>, from: impl Into<PathBuf>) -> Self {
        self.prepare.push((path.into(), Content::Copy(from.into())));
        self
    }

    /// How long it may take (2 minutes if not set).
    pub fn patience(mut self, limit: Duration) -> Self {
        self.patience = limit;
        self
    }

    fn prepare(&self, dir: &Path) -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
        for (path, content) in &self.prepare {
            let to = dir.join(path);
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            match content {
                Content::Bytes(bytes, mode) => {
                    fs::write(&to, bytes)?;
                    fs::set_permissions(&to, fs::Permissions::from_mode(*mode))?;
                }
                Content::Copy(from) => {
                    let status = std::process::Command::new("cp")
                        .arg("-a")
                        .arg(from)
                        .arg(&to)
                        .status()?;
                    assert!(status.success(), "cp {} {}", from.display(), to.display());
                }
            }
        }
        Ok(())
    }
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With an exit status.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl From<ExitStatus> for End {
    fn from(status: ExitStatus) -> Self {
        match status.signal() {
            Some(signal) => Self::Signal(signal),
            None => Self::Code(status.code().unwrap_or(-1)),
        }
    }
}

/// A file as it was left: kind and mode, and content or target.
#[derive(Clone, PartialEq, Eq)]
pub struct Left {
    mode: u32,
    content: Vec<u8>,
}

impl fmt::Debug for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "mode {:o}, {} bytes: {}",
            self.mode,
            self.content.len(),
            excerpt(&self.content)
        )
    }
}

/// Everything that can be seen of a finished program.
#[derive(Clone, PartialEq, Eq)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// And to its standard error.
    pub stderr: Vec<u8>,
    /// What it left in its directory.
    pub files: BTreeMap<PathBuf, Left>,
}

impl Outcome {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}", self.end)?;
        writeln!(f, "--- stdout: {}", excerpt(&self.stdout))?;
        writeln!(f, "--- stderr: {}", excerpt(&self.stderr))?;
        write!(f, "--- {} files", self.files.len())
    }
}

fn excerpt(bytes: &[u8]) -> String {
    const MOST: usize = 4000;
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(MOST)]).into_owned();
    if bytes.len() > MOST {
        format!("{shown}... ({} bytes)", bytes.len())
    } else {
        shown
    }
}

/// A directory that programs run in, under a path that does not change from one run to the next.
#[derive(Debug)]
pub struct Place {
    top: tempfile::TempDir,
}

impl Place {
    /// A new one, which every user can reach.
    ///
    /// # Panics
    /// When it cannot be made.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let top = tempfile::Builder::new()
            .prefix("mosrun-test-")
            .tempdir()
            .expect("a temporary directory");
        fs::set_permissions(top.path(), fs::Permissions::from_mode(0o755)).expect("its mode");
        Self { top }
    }

    /// A new one that is there already, and belongs to whom the programs in this lab belong to.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn made(lab: &Lab) -> Self {
        let place = Self::new();
        fs::create_dir(place.path()).expect("the directory");
        if let Some(user) = lab.user() {
            lchown(place.path(), Some(user), Some(user)).expect("its owner");
        }
        place
    }

    /// The directory itself.
    pub fn path(&self) -> PathBuf {
        self.top.path().join("work")
    }
}

/// Runs the case once, in a fresh directory at `place`.
///
/// # Panics
/// When it takes longer than it may; the lab is ended then.
pub fn observe(lab: &Lab, place: &Place, case: &Case, how: How) -> Outcome {
    let dir = place.path();
    if dir.exists() {
        fs::remove_dir_all(&dir).expect("the last run's directory can be removed");
    }
    case.prepare(&dir).expect("the directory of the case");
    for entry in walk(&dir) {
        if let Some(user) = lab.user() {
            lchown(entry, Some(user), Some(user)).expect("its owner");
        }
    }
    let mut command = lab.exec(1);
    command.args(how.prefix()).args(&case.command).current_dir(&dir);
    command.envs(case.environment.iter().map(|(k, v)| (k, v)));
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().expect("mosctl can be started");
    let (end, stdout, stderr) = match finish(child, case.input.clone(), case.patience) {
        Ok(done) => done,
        Err(so_far) => {
            let diagnosis = lab.diagnosis();
            lab.end();
            panic!(
                "{how:?}: {:?} was not done after {:?}\n--- output: {}\n{diagnosis}",
                case.command,
                case.patience,
                excerpt(&so_far)
            );
        }
    };
    Outcome {
        end,
        stdout,
        stderr,
        files: left_in(&dir),
    }
}

/// Feeds the child, collects what it writes, and waits for its end; or gives what it wrote until the time was up.
fn finish(mut child: Child, input: Vec<u8>, patience: Duration) -> Result<(End, Vec<u8>, Vec<u8>), Vec<u8>> {
    enum Event {
        Out(Vec<u8>),
        Err(Vec<u8>),
        Closed,
    }
    let (events, received) = mpsc::channel();
    let mut stdin = child.stdin.take().expect("a pipe");
    std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let reader = |mut pipe: Box<dyn Read + Send>, wrap: fn(Vec<u8>) -> Event| {
        let events = events.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(n @ 1..) = pipe.read(&mut buffer) {
                let _ = events.send(wrap(buffer[..n].to_vec()));
            }
            let _ = events.send(Event::Closed);
        })
    };
    reader(Box::new(child.stdout.take().expect("a pipe")), Event::Out);
    reader(Box::new(child.stderr.take().expect("a pipe")), Event::Err);
    let deadline = Instant::now() + patience;
    let (mut stdout, mut stderr, mut open) = (Vec::new(), Vec::new(), 2);
    while open > 0 {
        match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Out(bytes)) => stdout.extend(bytes),
            Ok(Event::Err(bytes)) => stderr.extend(bytes),
            Ok(Event::Closed) => open -= 1,
            Err(_) => {
                stdout.extend(stderr);
                return Err(stdout);
            }
        }
    }
    let status = child.wait().expect("the child's status");
    Ok((status.into(), stdout, stderr))
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut all = vec![dir.to_owned()];
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            all.extend(walk(&entry.path()));
        } else {
            all.push(entry.path());
        }
    }
    all
}

fn left_in(dir: &Path) -> BTreeMap<PathBuf, Left> {
    let mut files = BTreeMap::new();
    for path in walk(dir) {
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        let content = if meta.is_symlink() {
            fs::read_link(&path)
                .map(|t| t.into_os_string().into_encoded_bytes())
                .unwrap_or_default()
        } else if meta.is_file() {
            fs::read(&path).unwrap_or_default()
        } else {
            Vec::new()
        };
        let name = path.strip_prefix(dir).unwrap_or(&path).to_owned();
        files.insert(
            name,
            Left {
                mode: meta.mode(),
                content,
            },
        );
    }
    files
}

/// Runs the case natively and in each of the given ways, and checks that everything is equal; gives the native outcome.
///
/// # Panics
/// When something differs, with what it is and how to see it again.
pub fn same(lab: &Lab, case: &Case, ways: &[How]) -> Outcome {
    let place = Place::new();
    let native = observe(lab, &place, case, How::Native);
    for how in ways {
        let other = observe(lab, &place, case, *how);
        let differences = differences(&native, &other);
        assert!(
            differences.is_empty(),
            "{how:?} is not as native\n{}\nagain: {}\n{}",
            differences.join("\n"),
            replay(case, *how, &place),
            lab.diagnosis(),
        );
    }
    native
}

/// Runs the case natively and while all its processes are moved from node to node and home, and checks that everything is
/// equal; gives the native outcome and what came of the moves.
///
/// # Panics
/// When something differs, when a move fails for no reason that a user may be given, and when nothing was moved that lived
/// long enough for it.
pub fn same_moved(lab: &Lab, case: &Case) -> (Outcome, Tally) {
    /// Who has lived so long, and was not refused, has been moved. That it was being placed or brought home all the time, which is
    /// no refusal, is no wonder for less.
    const LONG: Duration = Duration::from_secs(5);
    let place = Place::new();
    let native = observe(lab, &place, case, How::Native);
    let mover = Mover::start(lab);
    let other = observe(lab, &place, case, How::Moved);
    let tally = mover.stop();
    eprintln!("{:?}: {tally}", case.command);
    let mut found = differences(&native, &other);
    found.extend(tally.failed.iter().map(|why| format!("a move: {why}")));
    let (alive, moves, refused) = tally.longest;
    if alive > LONG && moves + refused == 0 {
        found.push(format!("a process lived {alive:?} and was never moved"));
    }
    assert!(
        found.is_empty(),
        "moved about, it is not as native\n{}\nagain: {}\n{tally}\n{}",
        found.join("\n"),
        replay(case, How::Moved, &place),
        lab.diagnosis(),
    );
    (native, tally)
}

fn replay(case: &Case, how: How, place: &Place) -> String {
    let quote = |word: &OsString| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"));
    let words: Vec<_> = how.prefix().iter().chain(&case.command).map(quote).collect();
    format!(
        "(in a directory such as {}) mosctl lab run --nodes 3 -- {}",
        place.path().display(),
        words.join(" ")
    )
}

/// What differs between two outcomes, a line or some for each.
pub fn differences(native: &Outcome, other: &Outcome) -> Vec<String> {
    let mut found = Vec::new();
    if native.end != other.end {
        found.push(format!("end: {:?}, natively {:?}", other.end, native.end));
    }
    for (name, was, is) in [
        ("stdout", &native.stdout, &other.stdout),
        ("stderr", &native.stderr, &other.stderr),
    ] {
        if was != is {
            found.push(format!("{name}: {}", first_difference(was, is)));
        }
    }
    for (path, was) in &native.files {
        match other.files.get(path) {
            None => found.push(format!("file {} is missing", path.display())),
            Some(is) if is.mode != was.mode => {
                found.push(format!(
                    "file {}: mode {:o}, natively {:o}",
                    path.display(),
                    is.mode,
                    was.mode
                ));
            }
            Some(is) if is != was => {
                found.push(format!(
                    "file {}: {}",
                    path.display(),
                    first_difference(&was.content, &is.content)
                ));
            }
            Some(_) => {}
        }
    }
    for path in other.files.keys().filter(|p| !native.files.contains_key(*p)) {
        found.push(format!("file {} is not there natively", path.display()));
    }
    found
}

fn first_difference(native: &[u8], other: &[u8]) -> String {
    let was: Vec<_> = native.split(|b| *b == b'\n').collect();
    let is: Vec<_> = other.split(|b| *b == b'\n').collect();
    let at = was.iter().zip(&is).take_while(|(a, b)| a == b).count();
    let line = |lines: &[&[u8]]| lines.get(at).map_or("(its end)".into(), |l| excerpt(l));
    format!(
        "line {}: `{}`, natively `{}` ({} and {} bytes)\n--- all of it: {}",
        at + 1,
        line(&is),
        line(&was),
        other.len(),
        native.len(),
        excerpt(other)
    )
}
