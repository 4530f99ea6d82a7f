//! Connections that this node makes to others.
//!
//! A node sends requests and datagrams only on connections that it made itself, and answers on those that others made:
//! so a request always arrives at an address by which its sender can reach the node, which is where a supervisor for it
//! must listen. There is at most one such connection per node; it is made when it is needed.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use quinn::{Connection, ConnectionError};

use super::frames::{self, within};
use super::node::Node;
use crate::cluster::protocol::{
    Introduction, MAX_PEER_MESSAGE, Offer, PeerAnswer, PeerRequest, Verdict, VersionError,
};
use crate::cluster::tls;
use crate::codec::CodecError;
use crate::control::{Failure, FailureKind};

/// How long a node may take to let us in.
const CONNECT_LIMIT: Duration = Duration::from_secs(4);
/// How long a node may take to answer a request, starting a supervisor included.
const REQUEST_LIMIT: Duration = Duration::from_secs(15);
/// After a failure, datagrams do not make us try again before this time has passed.
const PAUSE: Duration = Duration::from_millis(1000);
/// Datagrams that wait for a connection; older ones are dropped.
const MAX_WAITING: usize = 16;

/// A node could not be talked to.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It did not answer in time.
    #[error("no answer from {0}")]
    Silent(SocketAddr),
    /// The connection failed.
    #[error("{addr}: {source}")]
    Connection {
        /// The address.
        addr: SocketAddr,
        /// What went wrong.
        source: ConnectionError,
    },
    /// One of the two does not accept the other's certificate.
    #[error("{0} is in another cluster, or does not believe that we are in its")]
    OtherCluster(SocketAddr),
    /// Another node lives there.
    #[error("{addr} is node {found}, not node {expected}")]
    OtherNode {
        /// The address.
        addr: SocketAddr,
        /// Who was expected.
        expected: u32,
        /// Who it is.
        found: u32,
    },
    /// It is of another version.
    #[error("{addr}: {source}")]
    Version {
        /// The address.
        addr: SocketAddr,
        /// What it says.
        source: VersionError,
    },
    /// It says what makes no sense.
    #[error("{addr}: {source}")]
    Codec {
        /// The address.
        addr: SocketAddr,
        /// What makes no sense.
        source: CodecError,
    },
}

impl PeerError {
    /// The same for a program of this machine that waits for the node called `name`.
    pub fn failure(&self, number: u32, name: &str) -> Failure {
        let kind = match self {
            PeerError::Silent(_) | PeerError::Connection { .. } => FailureKind::NodeDown,
            PeerError::OtherCluster(_) | PeerError::OtherNode { .. } => FailureKind::NodeDown,
            PeerError::Version { .. } | PeerError::Codec { .. } => FailureKind::Protocol,
        };
        Failure::new(kind, format!("node {number} ({name}) does not answer: {self}"))
    }
}

fn connection_error(addr: SocketAddr, source: ConnectionError) -> PeerError {
    // alerts of TLS (RFC 8446 section 6.2) that are about certificates
    // (decrypt_error: two clusters of the same name have authorities of the same name, but not the same key)
    const CERTIFICATE_ALERTS: [u8; 9] = [42, 43, 44, 45, 46, 48, 49, 51, 116];
    let code = match &source {
        ConnectionError::TransportError(e) => u64::from(e.code),
        ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
        ConnectionError::TimedOut => return PeerError::Silent(addr),
        _ => 0,
    };
    // RFC 9001 section 4.8: a TLS alert is the code 0x100 + alert
    if CERTIFICATE_ALERTS
        .iter()
        .any(|alert| code == 0x100 + u64::from(*alert))
    {
        return PeerError::OtherCluster(addr);
    }
    PeerError::Connection { addr, source }
}

#[derive(Debug, Default)]
struct Peer {
    /// The connection, and which life of the node it leads to.
    current: Mutex<Option<(Connection, u64)>>,
    dialling: tokio::sync::Mutex<()>,
    waiting: Mutex<VecDeque<Bytes>>,
    not_before: Mutex<Option<Instant>>,
}

impl Peer {
    fn connection(&self) -> Option<Connection> {
        let mut current = self.current.lock();
        if current.as_ref().is_some_and(|(c, _)| c.close_reason().is_some()) {
            *current = None;
        }
        current.as_ref().map(|(c, _)| c.clone())
    }
}

/// The connections.
#[derive(Debug)]
pub struct Peers {
    config: quinn::ClientConfig,
    map: Mutex<HashMap<u32, Arc<Peer>>>,
}

impl Peers {
    /// None yet. `config` is that of [`tls::control_client_config`].
    pub fn new(config: quinn::ClientConfig) -> Self {
        Peers {
            config,
            map: Mutex::new(HashMap::new()),
        }
    }

    fn peer(&self, number: u32) -> Arc<Peer> {
        self.map.lock().entry(number).or_default().clone()
    }

    /// Takes up a connection that [`Node::dial`] made to this life of a node, unless there is one already.
    pub fn adopt(&self, number: u32, generation: u64, connection: Connection) {
        let peer = self.peer(number);
        if peer.connection().is_none() {
            *peer.current.lock() = Some((connection, generation));
        } else {
            connection.close(0u32.into(), b"");
        }
    }

    /// Drops the connection to a node if it leads to a life before `generation`. One that leads to a later life may carry
    /// requests already: that node can be talked to before the membership protocol knows of its return.
    pub fn forget(&self, number: u32, generation: u64) {
        let Some(peer) = self.map.lock().get(&number).cloned() else {
            return;
        };
        let mut current = peer.current.lock();
        if let Some((connection, _)) = current.take_if(|(_, of)| *of < generation) {
            connection.close(0u32.into(), b"");
        }
    }
}

impl Node {
    /// Sends a datagram, sooner or later or never. Does not block.
    pub fn send_datagram(self: &Arc<Self>, number: u32, addr: SocketAddr, bytes: Bytes) {
        let peer = self.peers.peer(number);
        if let Some(connection) = peer.connection() {
            if let Err(e) = connection.send_datagram(bytes) {
                tracing::debug!("datagram to node {number}: {e}");
            }
            return;
        }
        {
            let mut waiting = peer.waiting.lock();
            waiting.push_back(bytes);
            while waiting.len() > MAX_WAITING {
                waiting.pop_front();
            }
        }
        let pausing = peer.not_before.lock().is_some_and(|at| Instant::now() < at);
        if pausing || peer.dialling.try_lock().is_err() {
            return;
        }
        let node = self.clone();
        tokio::spawn(async move {
            if let Err(e) = node.connection_to(number, addr).await {
                tracing::debug!("node {number}: {e}");
            }
        });
    }

    /// The connection to node `number`, made if need be.
    ///
    /// # Errors
    /// [`PeerError`].
    pub async fn connection_to(
        self: &Arc<Self>,
        number: u32,
        addr: SocketAddr,
    ) -> Result<Connection, PeerError> {
        let peer = self.peers.peer(number);
        if let Some(connection) = peer.connection() {
            return Ok(connection);
        }
        let _alone = peer.dialling.lock().await;
        if let Some(connection) = peer.connection() {
            return Ok(connection);
        }
        match self.dial(addr, Some(number)).await {
            Ok((connection, introduction)) => {
                *peer.not_before.lock() = None;
                *peer.current.lock() = Some((connection.clone(), introduction.id.generation));
                for bytes in peer.waiting.lock().drain(..) {
                    let _ = connection.send_datagram(bytes);
                }
                Ok(connection)
            }
            Err(e) => {
                *peer.not_before.lock() = Some(Instant::now() + PAUSE);
                peer.waiting.lock().clear();
                Err(e)
            }
        }
    }

    /// Makes a connection, and introduces the two sides to each other.
    ///
    /// # Errors
    /// [`PeerError`]; the connection is closed then.
    pub async fn dial(
        &self,
        addr: SocketAddr,
        expected: Option<u32>,
    ) -> Result<(Connection, Introduction), PeerError> {
        let dialled = within(CONNECT_LIMIT, self.dial_without_limit(addr, expected)).await;
        let (connection, introduction) = dialled.unwrap_or(Err(PeerError::Silent(addr)))?;
        self.introduced(&introduction);
        Ok((connection, introduction))
    }

    async fn dial_without_limit(
        &self,
        addr: SocketAddr,
        expected: Option<u32>,
    ) -> Result<(Connection, Introduction), PeerError> {
        let connecting = self
            .endpoint
            .connect_with(self.peers.config.clone(), addr, tls::SERVER_NAME)
            .map_err(|e| PeerError::Codec {
                addr,
                source: std::io::Error::other(e).into(),
            })?;
        let connection = connecting.await.map_err(|e| connection_error(addr, e))?;
        let found = tls::peer_of(&connection).map_or(0, |peer| peer.number);
        if let Some(expected) = expected.filter(|e| *e != found) {
            connection.close(0u32.into(), b"");
            return Err(PeerError::OtherNode {
                addr,
                expected,
                found,
            });
        }
        match self.introduce(&connection, found).await {
            Ok(introduction) => Ok((connection, introduction)),
            // a refusal of our certificate comes after TLS is done on our side, and shows up anywhere
            Err(IntroduceError::Codec(source)) => match connection.close_reason() {
                Some(reason) => Err(connection_error(addr, reason)),
                None => {
                    connection.close(0u32.into(), b"");
                    Err(PeerError::Codec { addr, source })
                }
            },
            Err(IntroduceError::Version(source)) => {
                connection.close(0u32.into(), b"");
                Err(PeerError::Version { addr, source })
            }
        }
    }

    async fn introduce(&self, connection: &Connection, number: u32) -> Result<Introduction, IntroduceError> {
        let io = |e: std::io::Error| CodecError::Io(e);
        let (mut send, mut receive) = connection.open_bi().await.map_err(|e| io(e.into()))?;
        send.write_all(&Offer::OURS.encode())
            .await
            .map_err(|e| io(e.into()))?;
        let mut verdict = [0; Verdict::LEN];
        receive
            .read_exact(&mut verdict)
            .await
            .map_err(|e| io(std::io::Error::other(e)))?;
        Verdict::decode(&verdict, Offer::OURS)?;
        frames::write(&mut send, &self.introduction()).await?;
        let introduction: Introduction = frames::read(&mut receive, MAX_PEER_MESSAGE).await?;
        let _ = send.finish();
        if introduction.id.number != number || !introduction.id.is_sound() {
            return Err(CodecError::Malformed("introduces itself as somebody else".into()).into());
        }
        Ok(introduction)
    }

    /// Asks a node.
    ///
    /// # Errors
    /// [`PeerError`]. When it was silent, whether it did what was asked is unknown.
    pub async fn ask(
        self: &Arc<Self>,
        number: u32,
        addr: SocketAddr,
        request: &PeerRequest,
    ) -> Result<PeerAnswer, PeerError> {
        let connection = self.connection_to(number, addr).await?;
        let asked = within(REQUEST_LIMIT, converse(&connection, request)).await;
        match asked {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(source)) => match connection.close_reason() {
                Some(reason) => Err(connection_error(addr, reason)),
                None => Err(PeerError::Codec { addr, source }),
            },
            None => {
                connection.close(0u32.into(), b"");
                Err(PeerError::Silent(addr))
            }
        }
    }
}

#[derive(Debug)]
enum IntroduceError {
    Version(VersionError),
    Codec(CodecError),
}

impl From<VersionError> for IntroduceError {
    fn from(e: VersionError) -> Self {
        IntroduceError::Version(e)
    }
}

impl From<CodecError> for IntroduceError {
    fn from(e: CodecError) -> Self {
        IntroduceError::Codec(e)
    }
}

async fn converse(connection: &Connection, request: &PeerRequest) -> Result<PeerAnswer, CodecError> {
    let (mut send, mut receive) = connection.open_bi().await.map_err(std::io::Error::from)?;
    frames::write(&mut send, request).await?;
    let _ = send.finish();
    frames::read(&mut receive, MAX_PEER_MESSAGE).await
}
