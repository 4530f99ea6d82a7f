//! Letting a machine with an invitation become a node.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use tokio::sync::Semaphore;

use super::frames::{self, within};
use super::node::Node;
use crate::cluster::invites::{self, InviteError};
use crate::cluster::names;
use crate::cluster::protocol::{JoinAnswer, JoinRequest, MAX_JOIN_MESSAGE};
use crate::cluster::store::{MemberRecord, StateDir, StoreError};

/// How long somebody without a certificate may keep us busy.
const LIMIT: Duration = Duration::from_secs(5);
/// How many of them at a time.
static PLACES: Semaphore = Semaphore::const_new(8);

/// Serves one connection of somebody who wants to join.
///
/// # Errors
/// For the log: why it did not.
pub async fn serve(node: &Arc<Node>, connection: &Connection) -> Result<(), String> {
    let Ok(_place) = PLACES.try_acquire() else {
        connection.close(3u32.into(), b"busy");
        return Err("too many joins at a time".into());
    };
    let served = within(LIMIT, converse(node, connection)).await;
    connection.close(0u32.into(), b"");
    served.unwrap_or_else(|| Err("joining took too long".into()))
}

async fn converse(node: &Arc<Node>, connection: &Connection) -> Result<(), String> {
    let (mut send, mut receive) = connection.accept_bi().await.map_err(|e| e.to_string())?;
    let request: JoinRequest = frames::read(&mut receive, MAX_JOIN_MESSAGE)
        .await
        .map_err(|e| format!("join: {e}"))?;
    let seen_as = SocketAddr::new(connection.remote_address().ip().to_canonical(), request.port);
    let name = request.name.clone();
    let deciding = node.clone();
    let decided = tokio::task::spawn_blocking(move || decide(&deciding, &request, seen_as)).await;
    let (answer, result) = match decided.map_err(|e| e.to_string())? {
        Ok((answer, member)) => {
            tracing::info!("node {} ({name}) has joined from {seen_as}", member.number);
            node.table.lock().heard(member);
            (answer, Ok(()))
        }
        Err(why) => (
            JoinAnswer::Refused(why.clone()),
            Err(format!("join refused: {why}")),
        ),
    };
    frames::write(&mut send, &answer)
        .await
        .map_err(|e| e.to_string())?;
    let _ = send.finish();
    let _ = send.stopped().await;
    result
}

/// Checks everything before the invitation is spent, so that a mistake in the rest does not cost a new one.
fn decide(
    node: &Node,
    request: &JoinRequest,
    seen_as: SocketAddr,
) -> Result<(JoinAnswer, MemberRecord), String> {
    let dir: &StateDir = &node.state;
    let authority = dir.authority().map_err(|e| match e {
        StoreError::NoAuthority => e.to_string(),
        // what is wrong on our disk is nothing to strangers
        other => {
            tracing::error!("{other}");
            "this node cannot let anybody join at the moment".into()
        }
    })?;
    let text = |e: InviteError| match e {
        InviteError::Store(e) => {
            tracing::error!("{e}");
            "this node cannot let anybody join at the moment".to_string()
        }
        other => other.to_string(),
    };
    invites::check(dir, request.id, &request.secret).map_err(text)?;
    names::check(&request.name).map_err(|e| e.to_string())?;
    let host: String = request
        .host
        .chars()
        .filter(|c| !c.is_control())
        .take(names::MAX_HOST / 4)
        .collect();
    let members = node.table.lock().records();
    if let Some(other) = members.iter().find(|m| m.name == request.name) {
        return Err(format!(
            "node {} has the name {} already: choose another with --name",
            other.number, other.name
        ));
    }
    // a key that cannot be signed must not cost the invitation either
    authority
        .issue(u32::MAX, &request.name, &request.public_key)
        .map_err(|e| e.to_string())?;
    invites::spend(dir, request.id, &request.secret, &request.name).map_err(text)?;
    let number = dir.next_number().map_err(|e| text(e.into()))?;
    let certificate = authority
        .issue(number, &request.name, &request.public_key)
        .map_err(|e| e.to_string())?;
    let member = MemberRecord {
        number,
        name: request.name.clone(),
        host,
        addr: Some(seen_as),
    };
    let answer = JoinAnswer::Welcome {
        certificate: certificate.to_vec(),
        authority: authority.certificate().to_vec(),
        seen_as,
        members: members.into_iter().take(64).collect(),
    };
    Ok((answer, member))
}
