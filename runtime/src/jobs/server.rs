//! The deputy's side of a job socket: plain threads, as the rest of the deputy.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use linklayer::wire::{Mode, MoveReport, Progress};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use parking_lot::{Condvar, Mutex};

use super::{JobAnswer, JobInfo, JobRequest};
use crate::codec::{self, CodecError};
use crate::rundir;

/// Connections served at a time; one more is closed at once.
const MAX_CONNECTIONS: usize = 32;
/// A request has no list in it.
const MAX_REQUEST: usize = 4096;
/// How long a job that has ended waits until those who asked have their answers.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// How long a connection may stay silent.
const IDLE: Duration = Duration::from_secs(60);

/// What a job can be asked. Called from the server's threads, several at a time.
pub trait JobControl: Send + Sync + 'static {
    /// Describes the job.
    fn list(&self) -> JobInfo;

    /// Moves a process, and returns when it has arrived. `tell` is called now and then while that takes.
    ///
    /// # Errors
    /// Why it is still where it was, for a person to read.
    fn migrate(
        &self,
        pid: u32,
        to: u32,
        mode: Mode,
        tell: &mut dyn FnMut(Progress),
    ) -> Result<MoveReport, String>;

    /// Stops a process where it is, or lets it go on.
    ///
    /// # Errors
    /// Why that cannot be done.
    fn freeze(&self, pid: u32, stop: bool) -> Result<(), String>;

    /// Lets all processes of the job go.
    ///
    /// # Errors
    /// Why it still has them.
    fn release(&self) -> Result<(), String>;
}

/// Requests that are not answered yet.
#[derive(Debug, Default)]
struct Unanswered {
    count: Mutex<usize>,
    none: Condvar,
}

impl Unanswered {
    fn add(&self) {
        *self.count.lock() += 1;
    }

    fn remove(&self) {
        let mut count = self.count.lock();
        *count -= 1;
        if *count == 0 {
            self.none.notify_all();
        }
    }

    fn await_none(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut count = self.count.lock();
        while *count > 0 && !self.none.wait_until(&mut count, deadline).timed_out() {}
    }
}

/// A job's socket. Dropping it removes the socket and waits a moment for the answers to what was asked; connections end with the
/// process.
#[derive(Debug)]
pub struct JobServer {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    unanswered: Arc<Unanswered>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl JobServer {
    /// Listens at `path` (see [`rundir::job_socket`]; its directory is made) and answers from threads of its own.
    ///
    /// # Errors
    /// The directory or socket cannot be made. A socket that a dead process of the same pid left is replaced.
    pub fn start(path: &Path, control: Arc<dyn JobControl>) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            if let Some(top) = dir.parent() {
                rundir::ensure(top)?;
            }
            rundir::ensure(dir)?;
        }
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        let stop = Arc::new(AtomicBool::new(false));
        let unanswered: Arc<Unanswered> = Arc::default();
        let thread = std::thread::Builder::new().name("job-socket".into()).spawn({
            let (stop, unanswered) = (stop.clone(), unanswered.clone());
            move || accept_loop(&listener, &stop, &unanswered, &control)
        })?;
        Ok(JobServer {
            path: path.to_owned(),
            stop,
            unanswered,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for JobServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // accept() has no other way to be told
        let woken = UnixStream::connect(&self.path).is_ok();
        let _ = std::fs::remove_file(&self.path);
        if let (true, Some(thread)) = (woken, self.thread.take()) {
            let _ = thread.join();
        }
        self.unanswered.await_none(LAST_ANSWERS);
    }
}

fn accept_loop(
    listener: &UnixListener,
    stop: &AtomicBool,
    unanswered: &Arc<Unanswered>,
    control: &Arc<dyn JobControl>,
) {
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let accepted = listener.accept();
        if stop.load(Ordering::Acquire) {
            return;
        }
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::warn!("job socket: accept: {e}");
                // out of descriptors or memory: it may pass
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if connections.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
            connections.fetch_sub(1, Ordering::AcqRel);
            continue;
        }
        let (control, unanswered) = (control.clone(), unanswered.clone());
        let count = connections.clone();
        let spawned = std::thread::Builder::new()
            .name("job-client".into())
            .spawn(move || {
                if let Err(e) = serve(stream, &unanswered, &*control) {
                    tracing::debug!("job socket: {e}");
                }
                count.fetch_sub(1, Ordering::AcqRel);
            });
        if spawned.is_err() {
            connections.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn serve(
    mut stream: UnixStream,
    unanswered: &Unanswered,
    control: &dyn JobControl,
) -> Result<(), CodecError> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let peer = getsockopt(&stream, PeerCredentials).map_err(io::Error::from)?;
    let own = nix::unistd::geteuid().as_raw();
    if peer.uid() != own && peer.uid() != 0 {
        let text = format!("this job belongs to uid {own}");
        return codec::write_message(&mut stream, &JobAnswer::Refused(text));
    }
    loop {
        let request = match codec::read_message::<JobRequest>(&mut stream, MAX_REQUEST) {
            Ok(request) => request,
            Err(CodecError::Closed) => return Ok(()),
            Err(e) => return Err(e),
        };
        unanswered.add();
        let answer = match request {
            JobRequest::List => JobAnswer::Job(control.list()),
            JobRequest::Migrate { pid, to, mode } => {
                let mut tell = |progress| {
                    // Who does not listen any more hears of it at the answer.
                    let _ = codec::write_message(&mut stream, &JobAnswer::Progress(progress));
                };
                match control.migrate(pid, to, mode, &mut tell) {
                    Ok(report) => JobAnswer::Moved(report),
                    Err(why) => JobAnswer::Refused(why),
                }
            }
            JobRequest::Freeze { pid, stop } => match control.freeze(pid, stop) {
                Ok(()) => JobAnswer::Done,
                Err(why) => JobAnswer::Refused(why),
            },
            JobRequest::Release => match control.release() {
                Ok(()) => JobAnswer::Done,
                Err(why) => JobAnswer::Refused(why),
            },
        };
        let written = codec::write_message(&mut stream, &answer);
        unanswered.remove();
        written?;
    }
}
