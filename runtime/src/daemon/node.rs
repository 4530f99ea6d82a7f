//! The daemon's state, which all its tasks share.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::config::{Accept, Config};
use super::hosted::Hosted;
use super::membership::Event;
use super::peers::Peers;
use super::spawner::Spawner;
use crate::cluster::gossip::GossipId;
use crate::cluster::members::MemberTable;
use crate::cluster::names;
use crate::cluster::protocol::Introduction;
use crate::cluster::store::{Credentials, MAX_MEMBERS, StateDir};
use crate::cluster::tls::{self, TlsError};
use crate::control::DaemonStatus;
use crate::pagestore::{self, Counts};

/// Members told in an introduction, so that it stays well below the limit of a message.
const MAX_INTRODUCED: usize = if MAX_MEMBERS < 2048 { MAX_MEMBERS } else { 2048 };

/// The daemon could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The port cannot be listened on.
    #[error("cannot listen on {addr}: {source} (is another mosd running?)")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// What went wrong.
        source: std::io::Error,
    },
    /// TLS refused our certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// One daemon.
#[derive(Debug)]
pub struct Node {
    /// Its configuration.
    pub config: Config,
    /// Its place in the cluster.
    pub credentials: Credentials,
    /// Its state directory.
    pub state: StateDir,
    /// Whether it can let nodes join.
    pub authority: bool,
    /// Who it is, in this life.
    pub id: GossipId,
    /// Its UDP port.
    pub endpoint: quinn::Endpoint,
    /// When it started.
    pub started: Instant,
    /// What it knows of the nodes.
    pub table: Mutex<MemberTable>,
    /// Its connections to others.
    pub peers: Peers,
    /// The way to the membership task.
    pub gossip: mpsc::Sender<Event>,
    /// Supervisors here.
    pub hosted: Hosted,
    /// The program that is run as `mosd supervise`.
    pub program: PathBuf,
    /// Starts it.
    pub spawner: Spawner,
}

impl Node {
    /// Binds the port and puts everything together. No task runs yet; `gossip` leads to the one for membership.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn new(
        config: Config,
        credentials: Credentials,
        gossip: mpsc::Sender<Event>,
        spawner: Spawner,
    ) -> Result<Arc<Self>, StartError> {
        let listen = config.node.listen;
        let server = tls::server_config(&credentials)?;
        let endpoint = quinn::Endpoint::server(server, listen)
            .map_err(|source| StartError::Listen { addr: listen, source })?;
        let bound = endpoint
            .local_addr()
            .map_err(|source| StartError::Listen { addr: listen, source })?;
        let state = config.state_dir();
        let known = state.members().unwrap_or_else(|e| {
            tracing::warn!("the nodes known from before are lost: {e}");
            Vec::new()
        });
        let own_before = known
            .iter()
            .find(|m| m.number == credentials.number)
            .and_then(|m| m.addr);
        let advertised = config
            .node
            .advertise
            .unwrap_or_else(|| advertised(bound, own_before));
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = GossipId {
            number: credentials.number,
            generation: state.next_generation(since_epoch.as_micros() as u64),
            addr: advertised,
            name: credentials.name.clone(),
            host: names::host(),
        };
        let mut table = MemberTable::new(&id);
        known.into_iter().for_each(|member| table.heard(member));
        let peers = Peers::new(tls::control_client_config(&credentials)?);
        let hosted = Hosted::open(&config.rundir());
        Ok(Arc::new(Node {
            authority: state.has_authority(),
            config,
            credentials,
            state,
            id,
            endpoint,
            started: Instant::now(),
            table: Mutex::new(table),
            peers,
            gossip,
            hosted,
            program: "/proc/self/exe".into(),
            spawner,
        }))
    }

    /// How it introduces itself.
    pub fn introduction(&self) -> Introduction {
        let mut members = self.table.lock().records();
        members.truncate(MAX_INTRODUCED);
        Introduction {
            id: self.id.clone(),
            software: env!("CARGO_PKG_VERSION").into(),
            members,
        }
    }

    /// Takes in what another said about itself and others. Its number was compared with its certificate before.
    pub fn introduced(&self, introduction: &Introduction) {
        let mut table = self.table.lock();
        for member in introduction.members.iter().take(MAX_INTRODUCED) {
            let sound = names::check(&member.name).is_ok() && member.host.len() <= names::MAX_HOST;
            if sound {
                table.heard(member.clone());
            }
        }
    }

    /// Whether programs that nobody named this node for are welcome.
    pub fn admits(&self) -> bool {
        self.config.guests.accept == Accept::All && !self.is_full()
    }

    /// Whether it has as many jobs as it wants.
    pub fn is_full(&self) -> bool {
        self.config
            .guests
            .max_jobs
            .is_some_and(|max| self.hosted.count() >= max)
    }

    /// What the page stores here have and have done.
    pub async fn page_stores(&self) -> Counts {
        let dir = self.config.store_dir();
        let counted = tokio::task::spawn_blocking(move || pagestore::counts(&dir)).await;
        counted.unwrap_or_default()
    }

    /// What it says of itself.
    pub fn status(&self) -> DaemonStatus {
        DaemonStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            node: self.credentials.number,
            cluster: self.credentials.cluster.clone(),
            cluster_fingerprint: self.credentials.fingerprint().to_string(),
            authority: self.authority,
            config: self.config.file.clone(),
            listen: self.endpoint.local_addr().unwrap_or(self.config.node.listen),
            advertised: self.id.addr,
            nodes: self.table.lock().states(Instant::now()),
            supervisors: self.hosted.list(),
            page_stores: Vec::new(),
        }
    }
}

/// The address that others should dial, when nobody has said: the one we listen on; else the one we were seen as when we
/// joined, while it is ours; else that of the interface of the default route; else any that is up; else loopback.
pub fn advertised(bound: SocketAddr, seen_as: Option<SocketAddr>) -> SocketAddr {
    if !bound.ip().is_unspecified() {
        return bound;
    }
    let seen = seen_as
        .map(|a| a.ip())
        .filter(|ip| UdpSocket::bind((*ip, 0)).is_ok());
    let ip = seen
        .or_else(default_route_ip)
        .or_else(first_interface_ip)
        .unwrap_or(Ipv4Addr::LOCALHOST.into());
    SocketAddr::new(ip, bound.port())
}

/// Connecting a UDP socket sends nothing, and chooses the source address. (The target is a documentation address.)
fn default_route_ip() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified() && !ip.is_loopback())
}

fn first_interface_ip() -> Option<IpAddr> {
    use nix::net::if_::InterfaceFlags;
    let interfaces = nix::ifaddrs::getifaddrs().ok()?;
    let up = interfaces.filter(|i| {
        i.flags.contains(InterfaceFlags::IFF_UP) && !i.flags.contains(InterfaceFlags::IFF_LOOPBACK)
    });
    up.filter_map(|i| i.address?.as_sockaddr_in().map(|a| IpAddr::V4(a.ip())))
        .next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_dial() {
        let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(
            advertised(addr("10.9.9.9:5"), Some(addr("127.0.0.1:1"))),
            addr("10.9.9.9:5")
        );
        assert_eq!(
            advertised(addr("0.0.0.0:5"), Some(addr("127.0.0.1:1"))),
            addr("127.0.0.1:5")
        );
        let guessed = advertised(addr("0.0.0.0:5"), Some(addr("192.0.2.77:1")));
        assert!(
            !guessed.ip().is_unspecified()
                && guessed.port() == 5
                && guessed.ip() != addr("192.0.2.77:1").ip()
        );
    }
}
