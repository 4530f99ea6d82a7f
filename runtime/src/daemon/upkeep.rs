//! What the daemon does by itself: measuring and telling the load, looking for nodes, remembering them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::seq::SliceRandom;

use super::membership::Event;
use super::node::Node;
use super::peers::PeerError;
use crate::cluster::load::Sampler;
use crate::cluster::protocol::{Datagram, LoadReport, MAX_REPORTS};
use crate::cluster::state::NodeStatus;

/// Nodes that are told the load in one round. In a cluster of up to one more it reaches everybody directly.
const FANOUT: usize = 5;
/// Loads older than this are not passed on, in milliseconds.
const MAX_AGE_MS: u32 = 10_000;
/// Time between two attempts to find nodes that do not answer.
const LOOK_PERIOD: Duration = Duration::from_secs(5);
/// Addresses that are tried at a time.
const MAX_TRIES: usize = 16;
/// Time between two looks at whether there is something to remember.
const SAVE_PERIOD: Duration = Duration::from_secs(2);

/// Measures the load and tells it around.
pub async fn loads(node: Arc<Node>) {
    let speed = node.config.load.speed;
    let measured = tokio::task::spawn_blocking(move || Sampler::new(speed)).await;
    let Ok(sampler) = measured else { return };
    let sampler = Arc::new(Mutex::new(sampler));
    tokio::spawn({
        let sampler = sampler.clone();
        async move {
            loop {
                let pause = sampler.lock().sample();
                tokio::time::sleep(pause).await;
            }
        }
    });
    loop {
        node.hosted.sweep();
        let load = sampler.lock().load(node.hosted.count(), node.admits());
        let now = Instant::now();
        let (peers, reports) = {
            let mut table = node.table.lock();
            table.load(
                &LoadReport {
                    number: node.id.number,
                    age_ms: 0,
                    load,
                },
                now,
            );
            (
                table.others(|status| status == NodeStatus::Alive),
                table.reports(now),
            )
        };
        tell(&node, peers, reports);
        tokio::time::sleep(node.config.load.report).await;
    }
}

fn tell(node: &Arc<Node>, mut peers: Vec<crate::cluster::store::MemberRecord>, mut reports: Vec<LoadReport>) {
    let mut rng = rand::rng();
    reports.retain(|r| r.age_ms <= MAX_AGE_MS);
    // the first is our own; of the others a random choice goes along
    if let Some((_, others)) = reports.split_first_mut() {
        others.shuffle(&mut rng);
    }
    reports.truncate(MAX_REPORTS);
    peers.shuffle(&mut rng);
    match Datagram::Loads(reports).encode() {
        Ok(bytes) => {
            for peer in peers.into_iter().take(FANOUT) {
                if let Some(addr) = peer.addr {
                    node.send_datagram(peer.number, addr, bytes.clone());
                }
            }
        }
        Err(e) => tracing::warn!("load reports: {e}"),
    }
}

/// Looks for the nodes known from before, and then, now and then, for those that do not answer.
pub async fn look_for_nodes(node: Arc<Node>) {
    let mut complained = BTreeSet::new();
    loop {
        let (mut lost, alone) = {
            let table = node.table.lock();
            let up = table.others(|s| s != NodeStatus::Down);
            (table.others(|s| s == NodeStatus::Down), up.is_empty())
        };
        lost.shuffle(&mut rand::rng());
        // with company, the membership protocol finds most of them; a split cluster is healed by trying
        lost.truncate(if alone { MAX_TRIES } else { 2 });
        let mut tries: Vec<(SocketAddr, Option<u32>)> = lost
            .iter()
            .filter_map(|m| Some((m.addr?, Some(m.number))))
            .collect();
        if alone {
            tries.extend(node.config.node.seeds.iter().map(|addr| (*addr, None)));
        }
        let attempts: Vec<_> = tries
            .into_iter()
            .map(|(addr, number)| {
                let node = node.clone();
                tokio::spawn(async move { (addr, contact(&node, addr, number).await) })
            })
            .collect();
        for attempt in attempts {
            match attempt.await {
                Ok((addr, Ok(()))) => drop(complained.remove(&addr)),
                Ok((addr, Err(e))) if complained.insert(addr) => tracing::info!("looking for nodes: {e}"),
                _ => {}
            }
        }
        let jitter = Duration::from_millis(rand::random_range(0..1000));
        tokio::time::sleep(LOOK_PERIOD + jitter).await;
    }
}

/// Calls on an address, and tells the membership protocol who lives there.
async fn contact(node: &Arc<Node>, addr: SocketAddr, number: Option<u32>) -> Result<(), PeerError> {
    let (connection, introduction) = node.dial(addr, number).await?;
    let id = &introduction.id;
    node.peers.adopt(id.number, id.generation, connection);
    if introduction.id.number != node.id.number {
        let _ = node.gossip.send(Event::Announce(introduction.id)).await;
    }
    Ok(())
}

/// Writes the nodes to disk when something about them has changed.
pub async fn remember(node: Arc<Node>) {
    let mut saved = None;
    loop {
        let revision = node.table.lock().revision();
        if saved != Some(revision) {
            save(&node).await;
            saved = Some(revision);
        }
        tokio::time::sleep(SAVE_PERIOD).await;
    }
}

/// Writes the nodes to disk.
pub async fn save(node: &Arc<Node>) {
    let node = node.clone();
    let saved = tokio::task::spawn_blocking(move || {
        let records = node.table.lock().records();
        node.state.save_members(&records)
    });
    if let Ok(Err(e)) = saved.await {
        tracing::warn!("the nodes cannot be remembered: {e}");
    }
}
