//! Talking to the daemon of this machine, blocking.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::{Answer, DaemonStatus, Failure, PREAMBLE, Placement, Request, SupervisorRequest, VERSION};
use crate::cluster::state::NodeState;
use crate::codec::{self, CodecError, MAX_MESSAGE};
use crate::rundir;

/// Longer than the daemon lets a remote node think (see `daemon::peers`).
const TIMEOUT: Duration = Duration::from_secs(30);

/// The daemon could not be asked, or said no.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon listens at any of the places where one could.
    #[error("no mosd runs here (looked at {}); start it with `mosd`, or `systemctl start mosd`", list(.0))]
    NoDaemon(Vec<PathBuf>),
    /// The socket is there and cannot be used.
    #[error("{path}: {source}", path = .path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The socket belongs to somebody who is neither the caller nor root.
    #[error("{path} is served by uid {uid}, who is neither you nor root", path = .path.display())]
    Impostor {
        /// The socket.
        path: PathBuf,
        /// Who it is.
        uid: u32,
    },
    /// The other side speaks another version.
    #[error(
        "mosd speaks version {daemon} of the control protocol, this program version {VERSION}: restart mosd after an upgrade"
    )]
    Version {
        /// Its version.
        daemon: u16,
    },
    /// The other side is no mosd.
    #[error("whoever listens there is no mosd")]
    Stranger,
    /// The conversation broke off. Whether the request was carried out is unknown.
    #[error("mosd did not answer: {0}")]
    Channel(#[from] CodecError),
    /// mosd answered something else than what was asked.
    #[error("mosd answered out of turn")]
    OutOfTurn,
    /// mosd, or the node it asked, said no.
    #[error(transparent)]
    Failed(#[from] Failure),
}

fn list(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|p| p.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

/// A connection to the daemon. Requests are made one after the other.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects to the daemon that serves the caller: the one of `$MOSRUN_RUNDIR` when that is set; else the caller's
    /// own, if there is one; else the machine's.
    ///
    /// # Errors
    /// [`ClientError::NoDaemon`] when there is none.
    pub fn connect() -> Result<Self, ClientError> {
        let mut rundirs = vec![rundir::path()];
        if std::env::var_os("MOSRUN_RUNDIR").is_none_or(|v| v.is_empty()) {
            rundirs.push(rundir::SYSTEM.into());
            rundirs.dedup();
        }
        Self::connect_first(rundirs.iter().map(|dir| rundir::daemon_socket(dir)).collect())
    }

    fn connect_first(paths: Vec<PathBuf>) -> Result<Self, ClientError> {
        for path in &paths {
            match Self::connect_to(path) {
                Err(ClientError::Socket { source, .. })
                    if matches!(
                        source.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) => {}
                other => return other,
            }
        }
        Err(ClientError::NoDaemon(paths))
    }

    /// Connects to the daemon whose socket is `path`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect_to(path: &Path) -> Result<Self, ClientError> {
        let socket = |source| ClientError::Socket {
            path: path.to_owned(),
            source,
        };
        let mut stream = UnixStream::connect(path).map_err(socket)?;
        let peer = getsockopt(&stream, PeerCredentials).map_err(|e| socket(e.into()))?;
        if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
            return Err(ClientError::Impostor {
                path: path.to_owned(),
                uid: peer.uid(),
            });
        }
        stream.set_read_timeout(Some(TIMEOUT)).map_err(socket)?;
        stream.set_write_timeout(Some(TIMEOUT)).map_err(socket)?;
        let mut preamble = PREAMBLE.to_vec();
        preamble.extend_from_slice(&VERSION.to_le_bytes());
        stream.write_all(&preamble).map_err(socket)?;
        let mut theirs = [0; 6];
        stream.read_exact(&mut theirs).map_err(socket)?;
        if theirs[..4] != PREAMBLE {
            return Err(ClientError::Stranger);
        }
        match u16::from_le_bytes([theirs[4], theirs[5]]) {
            VERSION => Ok(Client { stream }),
            daemon => Err(ClientError::Version { daemon }),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Answer, ClientError> {
        codec::write_message(&mut self.stream, request)?;
        match codec::read_message(&mut self.stream, MAX_MESSAGE)? {
            Answer::Failed(failure) => Err(failure.into()),
            answer => Ok(answer),
        }
    }

    /// The nodes as this one knows them, in the order of their numbers; input for [`crate::placement::place`].
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn nodes(&mut self) -> Result<Vec<NodeState>, ClientError> {
        match self.ask(&Request::Nodes)? {
            Answer::Nodes(nodes) => Ok(nodes),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// Has a supervisor started for a job of the calling user. It waits for the owner of the key named in the request.
    ///
    /// # Errors
    /// [`ClientError::Failed`] with [`super::FailureKind::NodeDown`] when the node does not answer: another may be tried.
    pub fn request_supervisor(&mut self, request: SupervisorRequest) -> Result<Placement, ClientError> {
        match self.ask(&Request::Supervisor(request))? {
            Answer::Placed(placement) => Ok(placement),
            _ => Err(ClientError::OutOfTurn),
        }
    }

    /// What the daemon says of itself.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn status(&mut self) -> Result<DaemonStatus, ClientError> {
        match self.ask(&Request::Status)? {
            Answer::Status(status) => Ok(status),
            _ => Err(ClientError::OutOfTurn),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn served_by(bytes: &'static [u8]) -> Result<Client, ClientError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 6]).unwrap();
            stream.write_all(bytes).unwrap();
        });
        let client = Client::connect_to(&path);
        server.join().unwrap();
        client
    }

    #[test]
    fn strangers_and_other_versions_are_told_apart() {
        assert!(matches!(served_by(b"HTTP/1.1"), Err(ClientError::Stranger)));
        assert!(matches!(
            served_by(b"MOSd\x09\x00"),
            Err(ClientError::Version { daemon: 9 })
        ));
        assert!(matches!(served_by(b"MO"), Err(ClientError::Socket { .. })));
        assert!(served_by(b"MOSd\x01\x00").is_ok());
    }

    #[test]
    fn no_daemon_is_said_with_the_places() {
        let dir = tempfile::tempdir().unwrap();
        let dead = dir.path().join("dead");
        drop(UnixListener::bind(&dead).unwrap());
        let error = Client::connect_first(vec![dead.clone(), dir.path().join("none")]).unwrap_err();
        assert!(matches!(&error, ClientError::NoDaemon(tried) if tried.len() == 2));
        assert!(error.to_string().contains(&*dead.to_string_lossy()));
    }
}
