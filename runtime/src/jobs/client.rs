//! Visiting the sockets of jobs.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use linklayer::wire::{Mode, MoveReport, Progress};
use nix::sys::socket::{UnixCredentials, getsockopt, sockopt::PeerCredentials};
use shim::process::tracer_of;

use super::{JobAnswer, JobInfo, JobRequest};
use crate::codec::{self, CodecError, MAX_MESSAGE};
use crate::rundir;

/// How long a deputy may take to describe its job.
const LIST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a migration may take before we stop waiting for word of it. It goes on without us.
const MIGRATE_TIMEOUT: Duration = Duration::from_secs(600);

/// A job could not be asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// Nobody listens.
    #[error("{path}: {source}", path = .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What connect(2) said.
        source: io::Error,
    },
    /// The conversation failed. Whether a migration was done is unknown.
    #[error("the job did not answer: {0}")]
    Channel(#[from] CodecError),
    /// The deputy refused; nothing changed.
    #[error("{0}")]
    Refused(String),
    /// Who listens is not the deputy that it says it is.
    #[error("{path} is served by process {pid} of uid {uid}, which is not the deputy of the job that it describes", path = .path.display())]
    Impostor {
        /// The socket.
        path: PathBuf,
        /// The process.
        pid: i32,
        /// Its user.
        uid: u32,
    },
    /// The deputy answered something else than what was asked.
    #[error("the job answered out of turn")]
    OutOfTurn,
    /// No job has such a process.
    #[error(
        "process {0} belongs to no job of yours; `mosps` lists those that do (a program takes part when it is started with mosrun, or taken up with `mosctl adopt`)"
    )]
    NoSuchProcess(u32),
    /// No job that answers has such a process, and one does not answer.
    #[error("process {pid} belongs to no job that answers; the one at {} does not: {why}", path.display())]
    Unanswered {
        /// The process.
        pid: u32,
        /// The socket of the job.
        path: PathBuf,
        /// What is wrong with it.
        why: Box<JobError>,
    },
}

fn ask(
    path: &Path,
    request: &JobRequest,
    timeout: Duration,
) -> Result<(JobAnswer, UnixCredentials), JobError> {
    ask_telling(path, request, timeout, &mut |_| {})
}

fn ask_telling(
    path: &Path,
    request: &JobRequest,
    timeout: Duration,
    tell: &mut dyn FnMut(&Progress),
) -> Result<(JobAnswer, UnixCredentials), JobError> {
    let connect = |source| JobError::Connect {
        path: path.to_owned(),
        source,
    };
    let mut stream = UnixStream::connect(path).map_err(connect)?;
    let peer = getsockopt(&stream, PeerCredentials).map_err(|e| connect(e.into()))?;
    stream.set_read_timeout(Some(timeout)).map_err(CodecError::from)?;
    stream
        .set_write_timeout(Some(LIST_TIMEOUT))
        .map_err(CodecError::from)?;
    codec::write_message(&mut stream, request)?;
    loop {
        match codec::read_message(&mut stream, MAX_MESSAGE)? {
            JobAnswer::Refused(why) => return Err(JobError::Refused(why)),
            JobAnswer::Progress(progress) => tell(&progress),
            answer => return Ok((answer, peer)),
        }
    }
}

/// Asks the job at `path` to describe itself.
///
/// # Errors
/// See [`JobError`].
pub fn list(path: &Path) -> Result<JobInfo, JobError> {
    let (JobAnswer::Job(mut job), peer) = ask(path, &JobRequest::List, LIST_TIMEOUT)? else {
        return Err(JobError::OutOfTurn);
    };
    if peer.uid() != nix::unistd::geteuid().as_raw() {
        // Root believes nobody who tells of other users' processes as of his own.
        if (peer.uid(), peer.pid() as u32) != (job.uid, job.deputy_pid) {
            return Err(JobError::Impostor {
                path: path.to_owned(),
                pid: peer.pid(),
                uid: peer.uid(),
            });
        }
        job.processes
            .retain(|p| tracer_of(p.pid as i32) == Some(job.deputy_pid as i32));
    }
    Ok(job)
}

/// Asks the job at `path` to move one of its processes; returns when it has arrived. `tell` hears how far it is.
///
/// # Errors
/// See [`JobError`].
pub fn migrate(
    path: &Path,
    pid: u32,
    to: u32,
    mode: Mode,
    tell: &mut dyn FnMut(&Progress),
) -> Result<MoveReport, JobError> {
    let request = JobRequest::Migrate { pid, to, mode };
    match ask_telling(path, &request, MIGRATE_TIMEOUT, tell)?.0 {
        JobAnswer::Moved(report) => Ok(report),
        _ => Err(JobError::OutOfTurn),
    }
}

/// Asks the job at `path` to stop one of its processes where it is, or to let it go on.
///
/// # Errors
/// See [`JobError`].
pub fn freeze(path: &Path, pid: u32, stop: bool) -> Result<(), JobError> {
    match ask(path, &JobRequest::Freeze { pid, stop }, LIST_TIMEOUT)?.0 {
        JobAnswer::Done => Ok(()),
        _ => Err(JobError::OutOfTurn),
    }
}

/// Asks the job at `path` to let its processes go; returns when they are free.
///
/// # Errors
/// See [`JobError`].
pub fn release(path: &Path) -> Result<(), JobError> {
    match ask(path, &JobRequest::Release, MIGRATE_TIMEOUT)?.0 {
        JobAnswer::Done => Ok(()),
        _ => Err(JobError::OutOfTurn),
    }
}

/// The rundirs whose jobs the caller may see: its own; for root also those of all users, wherever they are.
pub fn rundirs() -> Vec<PathBuf> {
    let mut dirs = vec![rundir::path()];
    if nix::unistd::geteuid().is_root() {
        // Paths are not text, so the file need not be.
        let table = std::fs::read("/proc/net/unix").unwrap_or_default();
        dirs.extend(listening(&table));
        dirs.sort();
        dirs.dedup();
    }
    dirs
}

/// The rundirs of the job sockets that are in a /proc/net/unix (proc(5)): the path is the eighth field.
fn listening(table: &[u8]) -> Vec<PathBuf> {
    let lines = table.split(|b| *b == b'\n');
    lines
        .filter_map(|line| line.windows(2).position(|w| w == b" /").map(|at| &line[at + 1..]))
        .map(|path| Path::new(OsStr::from_bytes(path)))
        .filter(|path| deputy_of(path).is_some())
        .filter_map(|path| {
            let jobs = path.parent()?;
            let rundir = jobs.parent()?;
            (rundir::jobs_dir(rundir) == jobs).then(|| rundir.to_owned())
        })
        .collect()
}

/// Something of each job, with its socket.
type BySocket<T> = Vec<(PathBuf, T)>;

/// Describes every job in `rundirs`, in the order of their deputies' pids, with the socket of each. A socket that nobody
/// listens on any more is removed when its deputy is dead; a job that does not answer is left out.
pub fn all(rundirs: &[PathBuf]) -> Vec<(PathBuf, JobInfo)> {
    visit(rundirs).0
}

/// As [`all`], with those that do not answer, and why.
fn visit(rundirs: &[PathBuf]) -> (BySocket<JobInfo>, BySocket<JobError>) {
    let mut jobs = Vec::new();
    let mut silent = Vec::new();
    for dir in rundirs {
        let Ok(entries) = std::fs::read_dir(rundir::jobs_dir(dir)) else {
            continue;
        };
        for path in entries.flatten().map(|e| e.path()) {
            let Some(pid) = deputy_of(&path) else { continue };
            match list(&path) {
                Ok(job) => jobs.push((path, job)),
                // It has just ended.
                Err(JobError::Connect { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(JobError::Connect { source, .. })
                    if source.kind() == io::ErrorKind::ConnectionRefused =>
                {
                    if !Path::new(&format!("/proc/{pid}")).exists() {
                        let _ = std::fs::remove_file(&path);
                    }
                }
                Err(e) => {
                    tracing::debug!("{}: {e}", path.display());
                    silent.push((path, e));
                }
            }
        }
    }
    jobs.sort_by_key(|(_, job)| job.deputy_pid);
    (jobs, silent)
}

fn deputy_of(socket: &Path) -> Option<u32> {
    socket.file_name()?.to_str()?.strip_suffix(".sock")?.parse().ok()
}

/// Finds the job of process `pid`, which may also be the pid of its `mosrun`, and the pid to speak of.
///
/// # Errors
/// [`JobError::NoSuchProcess`], [`JobError::Unanswered`].
pub fn find(rundirs: &[PathBuf], pid: u32) -> Result<(PathBuf, JobInfo, u32), JobError> {
    let (jobs, mut silent) = visit(rundirs);
    for (path, job) in jobs {
        if job.processes.iter().any(|p| p.pid == pid) {
            return Ok((path, job, pid));
        }
        if pid == job.front_pid || pid == job.deputy_pid {
            let main = job.main_pid;
            return Ok((path, job, main));
        }
    }
    Err(match silent.pop() {
        Some((path, why)) => JobError::Unanswered {
            pid,
            path,
            why: Box::new(why),
        },
        None => JobError::NoSuchProcess(pid),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use super::super::{Arrival, Counters, HOME, JobControl, JobServer, ProcInfo};
    use super::*;
    use crate::job_id::JobId;

    struct Fake(JobInfo);

    impl JobControl for Fake {
        fn list(&self) -> JobInfo {
            self.0.clone()
        }
        fn migrate(
            &self,
            pid: u32,
            to: u32,
            mode: Mode,
            tell: &mut dyn FnMut(Progress),
        ) -> Result<MoveReport, String> {
            if pid == 12 && to == HOME {
                tell(Progress {
                    pid: 12,
                    left: 5,
                    ..Progress::default()
                });
                Ok(MoveReport {
                    mode,
                    ..MoveReport::default()
                })
            } else {
                Err(format!("{pid} stays"))
            }
        }
        fn freeze(&self, pid: u32, stop: bool) -> Result<(), String> {
            if pid == 12 && stop {
                Ok(())
            } else {
                Err(format!("{pid} is not frozen"))
            }
        }
        fn release(&self) -> Result<(), String> {
            Err("13 is away".into())
        }
    }

    fn fake() -> Fake {
        let process = ProcInfo {
            pid: 12,
            ppid: 11,
            comm: "sleep".into(),
            node: 2,
            home: 1,
            arrival: Arrival::WentHome("io_uring_setup".into()),
            threads: 1,
            rss_bytes: 1 << 20,
            cpu_ms: 5,
            counters: Counters {
                calls_forwarded: 7,
                ..Counters::default()
            },
            calls_per_s: 1.5,
            stay: None,
        };
        Fake(JobInfo {
            id: JobId::new(1, 11),
            front_pid: 10,
            deputy_pid: 11,
            main_pid: 12,
            uid: 0,
            started_unix_ms: 1,
            processes: vec![process],
            totals: Counters::default(),
        })
    }

    #[test]
    fn a_job_is_found_listed_and_steered() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("run");
        let dirs = [dir.clone()];
        let fake = fake();
        let info = fake.0.clone();
        let server = JobServer::start(&rundir::job_socket(&dir, 11), Arc::new(fake)).unwrap();
        let (path, job, pid) = find(&dirs, 10).unwrap();
        assert_eq!((&*path, &job, pid), (server.path(), &info, 12));
        let mut heard = 0;
        let report = migrate(&path, pid, HOME, Mode::Freeze, &mut |p| heard += p.left).unwrap();
        assert_eq!((report.mode, heard), (Mode::Freeze, 5));
        freeze(&path, pid, true).unwrap();
        assert!(freeze(&path, pid, false).is_err());
        let refused = migrate(&path, pid, 3, Mode::Auto, &mut |_| {});
        assert!(matches!(refused, Err(JobError::Refused(why)) if why == "12 stays"));
        assert!(matches!(release(&path), Err(JobError::Refused(why)) if why == "13 is away"));
        assert!(matches!(find(&dirs, 99), Err(JobError::NoSuchProcess(99))));
        drop(server);
        assert!(!path.exists());
        assert!(all(&dirs).is_empty());
    }

    #[test]
    fn sockets_of_other_users_are_found_where_they_listen() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 17 /run/user/7/mosrun/jobs/12.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 18\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 19 /run/mosrun/mosd.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 20 @/x/jobs/3.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 21 /tmp/a b\xff/jobs/3.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 22 /tmp/other/4.sock\n";
        let found = listening(table);
        let odd = Path::new(OsStr::from_bytes(b"/tmp/a b\xff"));
        assert_eq!(found, [Path::new("/run/user/7/mosrun"), odd]);
    }

    #[test]
    fn garbage_ends_only_its_own_connection() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("run");
        let _server = JobServer::start(&rundir::job_socket(&dir, 1), Arc::new(fake())).unwrap();
        let path = rundir::job_socket(&dir, 1);
        for garbage in [&[0xff; 16][..], &[3, 0, 0, 0, 9, 9, 9], &[200, 0]] {
            let mut stream = UnixStream::connect(&path).unwrap();
            let _ = stream.write_all(garbage);
            drop(stream);
        }
        assert_eq!(all(&[dir]).len(), 1);
    }

    #[test]
    fn a_dead_jobs_socket_is_swept() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("run");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        let path = rundir::job_socket(&dir, pid);
        rundir::ensure(&dir).unwrap();
        rundir::ensure(&rundir::jobs_dir(&dir)).unwrap();
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        assert!(all(&[dir]).is_empty());
        assert!(!path.exists());
    }
}
