//! Connections that others make to this node.
//!
//! Whoever connects is believed nothing but its certificate: a message that is too long, makes no sense or comes at the
//! wrong time ends its stream or its connection and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{Connection, Incoming, RecvStream, SendStream};

use super::frames::{self, within};
use super::membership::Event;
use super::node::Node;
use super::{join, supervise};
use crate::cluster::authority::NodeCertificate;
use crate::cluster::gossip;
use crate::cluster::protocol::{
    Datagram, Introduction, MAX_PEER_MESSAGE, Offer, PeerAnswer, PeerRequest, RemoteSupervisor,
};
use crate::cluster::tls;
use crate::codec::CodecError;
use crate::control::{Failure, FailureKind};
use crate::supervisor::SupervisorConfig;

/// How long a peer may take for the handshake, and for its introduction.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// How long a peer may take to send one request.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// Connections at a time.
const MAX_CONNECTIONS: usize = 4096;

/// Accepts connections until the endpoint is closed.
pub async fn run(node: Arc<Node>) {
    let count = Arc::new(AtomicUsize::new(0));
    while let Some(incoming) = node.endpoint.accept().await {
        if count.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
            count.fetch_sub(1, Ordering::AcqRel);
            incoming.refuse();
            continue;
        }
        let (node, count) = (node.clone(), count.clone());
        tokio::spawn(async move {
            let from = incoming.remote_address();
            if let Err(why) = connection(&node, incoming).await {
                tracing::info!("connection from {from}: {why}");
            }
            count.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

async fn connection(node: &Arc<Node>, incoming: Incoming) -> Result<(), String> {
    let connecting = incoming.accept().map_err(|e| e.to_string())?;
    let connected = within(GREETING_LIMIT, connecting)
        .await
        .ok_or("the handshake took too long")?;
    let connection = connected.map_err(|e| format!("refused: {e}"))?;
    if tls::protocol_of(&connection).as_deref() == Some(tls::JOIN) {
        return join::serve(node, &connection).await;
    }
    let Some(peer) = tls::peer_of(&connection) else {
        connection.close(1u32.into(), b"a certificate of the cluster is needed");
        return Err("refused: it has no certificate of this cluster".into());
    };
    let greeted = within(GREETING_LIMIT, greet(node, &connection, &peer)).await;
    match greeted.unwrap_or_else(|| Err("did not introduce itself".into())) {
        Ok(()) => {}
        Err(why) => {
            connection.close(2u32.into(), why.as_bytes().get(..64).unwrap_or(why.as_bytes()));
            return Err(format!("node {} ({}): {why}", peer.number, peer.name));
        }
    }
    tracing::debug!(
        "node {} ({}) connected from {}",
        peer.number,
        peer.name,
        connection.remote_address()
    );
    serve(node, &connection, &peer).await;
    Ok(())
}

async fn greet(node: &Arc<Node>, connection: &Connection, peer: &NodeCertificate) -> Result<(), String> {
    let (mut send, mut receive) = connection.accept_bi().await.map_err(|e| e.to_string())?;
    let mut offer = [0; Offer::LEN];
    receive.read_exact(&mut offer).await.map_err(|e| e.to_string())?;
    let offer = Offer::decode(&offer).map_err(|e| e.to_string())?;
    let verdict = Offer::OURS.answer(offer);
    send.write_all(&verdict.encode())
        .await
        .map_err(|e| e.to_string())?;
    if verdict.chosen == 0 {
        let _ = send.finish();
        // the peer reads the verdict and hangs up
        let _ = within(Duration::from_secs(1), connection.closed()).await;
        return Err(format!(
            "it speaks versions {} to {} of the control protocol, we speak {} to {}",
            offer.min,
            offer.max,
            Offer::OURS.min,
            Offer::OURS.max
        ));
    }
    let text = |e: CodecError| e.to_string();
    frames::write(&mut send, &node.introduction())
        .await
        .map_err(text)?;
    let introduction: Introduction = frames::read(&mut receive, MAX_PEER_MESSAGE).await.map_err(text)?;
    let _ = send.finish();
    if introduction.id.number != peer.number
        || introduction.id.name != peer.name
        || !introduction.id.is_sound()
    {
        return Err("introduces itself as somebody else".into());
    }
    node.introduced(&introduction);
    Ok(())
}

async fn serve(node: &Arc<Node>, connection: &Connection, peer: &NodeCertificate) {
    loop {
        tokio::select! {
            datagram = connection.read_datagram() => match datagram {
                Ok(bytes) => take_datagram(node, peer, &bytes),
                Err(_) => return,
            },
            stream = connection.accept_bi() => match stream {
                Ok((send, receive)) => {
                    let (node, connection, peer) = (node.clone(), connection.clone(), peer.clone());
                    tokio::spawn(async move { request(&node, &connection, &peer, send, receive).await });
                }
                Err(_) => return,
            },
        }
    }
}

fn take_datagram(node: &Arc<Node>, peer: &NodeCertificate, bytes: &Bytes) {
    match Datagram::decode(bytes) {
        Ok(Datagram::Gossip(packet)) => {
            // packets are never relayed, so that nobody can speak for another
            if gossip::sender(&packet) == Some(peer.number) {
                // a full queue drops it, as a network would
                let _ = node.gossip.try_send(Event::Packet(packet));
            } else {
                tracing::info!(
                    "node {} ({}) speaks in another's name; ignored",
                    peer.number,
                    peer.name
                );
            }
        }
        Ok(Datagram::Loads(reports)) => {
            let now = Instant::now();
            let mut table = node.table.lock();
            // nobody knows our load better than we do
            reports
                .iter()
                .filter(|r| r.number != node.id.number)
                .for_each(|report| table.load(report, now));
        }
        Err(e) => tracing::debug!("datagram of node {}: {e}", peer.number),
    }
}

async fn request(
    node: &Arc<Node>,
    connection: &Connection,
    peer: &NodeCertificate,
    mut send: SendStream,
    mut receive: RecvStream,
) {
    let read = within(
        REQUEST_LIMIT,
        frames::read::<PeerRequest>(&mut receive, MAX_PEER_MESSAGE),
    )
    .await;
    let answer = match read {
        Some(Ok(PeerRequest::Supervisor(wanted))) => {
            match supervise::start(node, config(node, connection, peer, wanted)).await {
                Ok(placement) => PeerAnswer::Placed(placement),
                Err(failure) => PeerAnswer::Failed(failure),
            }
        }
        Some(Ok(PeerRequest::PageStores)) => PeerAnswer::PageStores(node.page_stores().await),
        Some(Err(e)) => {
            tracing::info!("request of node {} ({}): {e}", peer.number, peer.name);
            let _ = receive.stop(1u32.into());
            PeerAnswer::Failed(Failure::new(FailureKind::Protocol, e.to_string()))
        }
        None => {
            let _ = receive.stop(1u32.into());
            return;
        }
    };
    if let Err(e) = frames::write(&mut send, &answer).await {
        tracing::debug!("answer to node {}: {e}", peer.number);
        return;
    }
    let _ = send.finish();
    // the stream must not be dropped before the answer has arrived
    let _ = within(REQUEST_LIMIT, send.stopped()).await;
}

fn config(
    node: &Node,
    connection: &Connection,
    peer: &NodeCertificate,
    wanted: RemoteSupervisor,
) -> SupervisorConfig {
    // a wildcard socket knows by which of its addresses a peer came
    let listen = connection
        .local_ip()
        .map_or(node.id.addr.ip(), |ip| ip.to_canonical());
    SupervisorConfig {
        job: wanted.job,
        node: node.id.number,
        node_name: node.id.name.clone(),
        home_node: peer.number,
        home_name: peer.name.clone(),
        uid: wanted.uid,
        gid: wanted.gid,
        groups: wanted.groups,
        peer_fingerprint: wanted.peer_fingerprint,
        listen: if listen.is_unspecified() {
            node.id.addr.ip()
        } else {
            listen
        },
        limits: node.config.guests.limits(),
        store: None,
    }
}
