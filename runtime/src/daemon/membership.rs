//! The task that owns the membership protocol.
//!
//! foca is a state machine; this task gives it packets, timers and wishes, one at a time, carries its packets to
//! [`super::peers`], and keeps the table of nodes in step with what it believes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foca::{AccumulatingRuntime, Foca, NoCustomBroadcast, OwnedNotification, State, Timer};
use rand_foca::SeedableRng;
use rand_foca::rngs::SmallRng;
use tokio::sync::{mpsc, oneshot};

use super::node::Node;
use crate::cluster::gossip::{self, GossipId, PacketCodec};
use crate::cluster::protocol::Datagram;

/// Events that may wait. More packets are dropped, as a network would.
pub const QUEUE: usize = 1024;

/// What the task is told.
#[derive(Debug)]
pub enum Event {
    /// A packet came.
    Packet(Bytes),
    /// Time has passed.
    Timer(Timer<GossipId>),
    /// This node is up, and should know that we are.
    Announce(GossipId),
    /// Say goodbye; answered when the packets are on their way.
    Leave(oneshot::Sender<()>),
}

type Protocol = Foca<GossipId, PacketCodec, SmallRng, NoCustomBroadcast>;

/// Runs the membership protocol until it is told to leave.
pub async fn run(node: Arc<Node>, mut events: mpsc::Receiver<Event>) {
    let tuning = &node.config.membership;
    let config = gossip::config(tuning.probe, tuning.suspect);
    let rng = SmallRng::seed_from_u64(rand::random());
    let mut foca = Foca::new(node.id.clone(), config, rng, PacketCodec);
    let mut out = AccumulatingRuntime::new();
    while let Some(event) = events.recv().await {
        let mut leaving = None;
        let result = match event {
            Event::Packet(packet) => foca.handle_data(&packet, &mut out),
            Event::Timer(timer) => foca.handle_timer(timer, &mut out),
            Event::Announce(id) => foca.announce(id, &mut out),
            Event::Leave(done) => {
                leaving = Some(done);
                foca.leave_cluster(&mut out)
            }
        };
        if let Err(e) = result {
            tracing::debug!("membership: {e}");
        }
        carry_out(&node, &foca, &mut out, leaving.is_some());
        if let Some(done) = leaving {
            let _ = done.send(());
            return;
        }
    }
}

fn carry_out(node: &Arc<Node>, foca: &Protocol, out: &mut AccumulatingRuntime<GossipId>, leaving: bool) {
    while let Some((to, packet)) = out.to_send() {
        match Datagram::Gossip(packet).encode() {
            Ok(bytes) => node.send_datagram(to.number, to.addr, bytes),
            Err(e) => tracing::warn!("membership packet to node {}: {e}", to.number),
        }
    }
    while let Some((after, timer)) = out.to_schedule() {
        let gossip = node.gossip.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            // a timer must not be lost: foca's cycle would stop
            let _ = gossip.send(Event::Timer(timer)).await;
        });
    }
    while let Some(notification) = out.to_notify() {
        // our own goodbye is no news
        if !leaving {
            note(node, &notification);
        }
    }
    let mut table = node.table.lock();
    let mut renewed = Vec::new();
    for member in foca.iter_members() {
        let id = member.id();
        if id.number == node.id.number {
            continue;
        }
        if table.alive(id) {
            renewed.push((id.number, id.generation));
        }
        if member.state() == State::Suspect {
            table.suspect(id.number, id.generation);
        }
    }
    drop(table);
    for (number, generation) in renewed {
        node.peers.forget(number, generation);
    }
}

fn note(node: &Node, notification: &OwnedNotification<GossipId>) {
    match notification {
        OwnedNotification::MemberUp(id) => {
            tracing::info!("node {} ({}) is up at {}", id.number, id.name, id.addr)
        }
        OwnedNotification::MemberDown(id) => {
            tracing::info!("node {} ({}) is down", id.number, id.name);
            node.table.lock().down(id.number, id.generation);
            node.peers.forget(id.number, id.generation + 1);
        }
        OwnedNotification::Rejoin(id) => {
            tracing::warn!(
                "the others had given this node up; it is back as generation {}",
                id.generation
            );
        }
        OwnedNotification::Defunct => tracing::warn!("the others have given this node up"),
        OwnedNotification::Active | OwnedNotification::Idle | OwnedNotification::Rename(..) => {}
    }
}

/// Tells the others goodbye, so that they need not find out. Best effort, within `limit`.
pub async fn leave(node: &Node, limit: Duration) {
    let (done, left) = oneshot::channel();
    let goodbye = async {
        if node.gossip.send(Event::Leave(done)).await.is_ok() {
            let _ = left.await;
        }
    };
    let _ = tokio::time::timeout(limit, goodbye).await;
}
