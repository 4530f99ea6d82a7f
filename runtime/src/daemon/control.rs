//! The daemon's unix socket, for the programs of this machine.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::frames::{self, within};
use super::node::Node;
use super::supervise;
use crate::cluster::protocol::{PeerAnswer, PeerRequest, RemoteSupervisor};
use crate::cluster::state::NodeStatus;
use crate::codec::CodecError;
use crate::control::{
    Answer, DaemonStatus, Failure, FailureKind, MAX_REQUEST, NodeStore, PREAMBLE, Placement, Request,
    SupervisorRequest, VERSION,
};
use crate::rundir;
use crate::supervisor::SupervisorConfig;

/// Connections at a time.
const MAX_CONNECTIONS: usize = 512;
/// How long a connection may stay silent.
const IDLE: Duration = Duration::from_secs(300);
/// How long a client may take for its first bytes.
const GREETING: Duration = Duration::from_secs(5);

/// How long another node may take to say what its page stores have done.
const STORES: Duration = Duration::from_millis(500);

/// The socket. Dropping it removes it.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    _lock: Flock<std::fs::File>,
}

impl ControlSocket {
    /// Listens in `dir`, which is made if need be. A socket that a dead daemon left is replaced.
    ///
    /// # Errors
    /// The directory is not ours, or another daemon serves it.
    pub fn bind(dir: &Path) -> io::Result<Self> {
        rundir::ensure(dir)?;
        let path = rundir::daemon_socket(dir);
        let lock = std::fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join("mosd.lock"))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
            nix::Error::EWOULDBLOCK => io::Error::new(
                io::ErrorKind::AddrInUse,
                format!(
                    "another mosd serves {} (set MOSRUN_RUNDIR to run a second one)",
                    dir.display()
                ),
            ),
            other => other.into(),
        })?;
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        // the daemon of the machine serves everybody; who is who is known from the kernel
        let mode = if nix::unistd::geteuid().is_root() {
            0o666
        } else {
            0o600
        };
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))?;
        Ok(ControlSocket {
            listener,
            path,
            _lock: lock,
        })
    }

    /// Serves clients for ever.
    pub async fn run(&self, node: &Arc<Node>) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(e) => {
                    tracing::warn!("control socket: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                continue;
            };
            let node = node.clone();
            tokio::spawn(async move {
                if let Err(e) = serve(&node, stream).await {
                    tracing::debug!("control socket: {e}");
                }
                drop(place);
            });
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Who asks, from the kernel.
struct Caller {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

async fn serve(node: &Arc<Node>, mut stream: UnixStream) -> Result<(), CodecError> {
    let credentials = stream.peer_cred()?;
    let groups = shim::peer::groups(stream.as_fd())?;
    let caller = Caller {
        uid: credentials.uid(),
        gid: credentials.gid(),
        groups,
    };
    let mut preamble = [0; 6];
    let greeted = within(GREETING, stream.read_exact(&mut preamble)).await;
    greeted.ok_or(io::Error::from(io::ErrorKind::TimedOut))??;
    if preamble[..4] != PREAMBLE {
        return Err(CodecError::Malformed("not a client of ours".into()));
    }
    let mut ours = PREAMBLE.to_vec();
    ours.extend_from_slice(&VERSION.to_le_bytes());
    stream.write_all(&ours).await?;
    if u16::from_le_bytes([preamble[4], preamble[5]]) != VERSION {
        // the client knows now, and says so to its user
        return Ok(());
    }
    loop {
        let request = match within(IDLE, frames::read::<Request>(&mut stream, MAX_REQUEST)).await {
            Some(Ok(request)) => request,
            None | Some(Err(CodecError::Closed)) => return Ok(()),
            Some(Err(e)) => {
                let failure = Failure::new(FailureKind::Protocol, e.to_string());
                frames::write(&mut stream, &Answer::Failed(failure)).await?;
                return Err(e);
            }
        };
        let answer = match request {
            Request::Nodes => Answer::Nodes(node.table.lock().states(Instant::now())),
            Request::Status => Answer::Status(status(node).await),
            Request::Supervisor(wanted) => match supervisor(node, &caller, wanted).await {
                Ok(placement) => Answer::Placed(placement),
                Err(failure) => Answer::Failed(failure),
            },
        };
        frames::write(&mut stream, &answer).await?;
    }
}

/// What is said of this node, and by the others of their page stores.
async fn status(node: &Arc<Node>) -> DaemonStatus {
    let mut status = node.status();
    let asked: Vec<_> = status
        .nodes
        .iter()
        .filter(|other| other.is_self || other.status == NodeStatus::Alive)
        .map(|other| tokio::spawn(page_stores(node.clone(), other.number, other.addr)))
        .collect();
    for answer in asked {
        if let Ok(Some(store)) = answer.await {
            status.page_stores.push(store);
        }
    }
    status
}

async fn page_stores(node: Arc<Node>, number: u32, addr: Option<SocketAddr>) -> Option<NodeStore> {
    let counts = if number == node.id.number {
        node.page_stores().await
    } else {
        let asked = node.ask(number, addr?, &PeerRequest::PageStores);
        match within(STORES, asked).await?.ok()? {
            PeerAnswer::PageStores(counts) => counts,
            _ => return None,
        }
    };
    Some(NodeStore { node: number, counts })
}

async fn supervisor(
    node: &Arc<Node>,
    caller: &Caller,
    wanted: SupervisorRequest,
) -> Result<Placement, Failure> {
    let own = nix::unistd::geteuid();
    if !own.is_root() && caller.uid != own.as_raw() {
        let text = format!("this mosd is uid {own}'s own");
        return Err(Failure::new(FailureKind::Denied, text));
    }
    let SupervisorRequest {
        node: number,
        mut job,
        peer_fingerprint,
    } = wanted;
    job.home = node.id.number;
    let (uid, gid, groups) = (caller.uid, caller.gid, caller.groups.clone());
    node.table.lock().placed(number, Instant::now());
    if number == node.id.number {
        let config = SupervisorConfig {
            job,
            node: number,
            node_name: node.id.name.clone(),
            home_node: number,
            home_name: node.id.name.clone(),
            uid,
            gid,
            groups,
            peer_fingerprint,
            listen: std::net::Ipv4Addr::LOCALHOST.into(),
            limits: node.config.guests.limits(),
            store: None,
        };
        return supervise::start(node, config).await;
    }
    let found = node.table.lock().get(number).map(|(record, _)| record.clone());
    let Some(record) = found else {
        return Err(Failure::new(
            FailureKind::UnknownNode,
            format!("there is no node {number} in this cluster"),
        ));
    };
    let Some(addr) = record.addr else {
        let text = format!("node {number} ({}) has not been seen yet", record.name);
        return Err(Failure::new(FailureKind::NodeDown, text));
    };
    let request = PeerRequest::Supervisor(RemoteSupervisor {
        job,
        uid,
        gid,
        groups,
        peer_fingerprint,
    });
    match node.ask(number, addr, &request).await {
        Ok(PeerAnswer::Placed(placement)) => Ok(placement),
        Ok(PeerAnswer::Failed(failure)) => Err(failure),
        Ok(PeerAnswer::PageStores(_)) => Err(Failure::new(
            FailureKind::Protocol,
            format!("node {number} ({}) answers something else", record.name),
        )),
        Err(e) => Err(e.failure(number, &record.name)),
    }
}
