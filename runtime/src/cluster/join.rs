//! Joining a cluster with an invitation.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rcgen::{KeyPair, PublicKeyData};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::authority::{CertificateError, ClusterFingerprint};
use super::names;
use super::protocol::{JoinAnswer, JoinRequest, MAX_PEER_MESSAGE};
use super::store::{Credentials, MAX_MEMBERS, MemberRecord, StateDir, StoreError};
use super::tls::{self, TlsError};
use super::token::Token;
use crate::daemon::frames::{self, within};

/// How long one address may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The cluster could not be joined; nothing was changed here.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nobody answered as somebody who could have made the invitation.
    #[error("no node of the cluster answered: {0} (is mosd running there, and does UDP get through?)")]
    NoAnswer(String),
    /// The cluster said no.
    #[error("the cluster refused: {0}")]
    Refused(String),
    /// The cluster answered nonsense.
    #[error("the cluster's answer makes no sense: {0}")]
    Nonsense(String),
    /// This side's fault.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// This side's fault.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// This side's fault.
    #[error("no socket: {0}")]
    Socket(std::io::Error),
    /// This side's fault.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

/// Joins, and writes what makes this machine a node to `dir`. `port` is where its daemon will listen.
///
/// # Errors
/// [`JoinError`].
pub async fn join(dir: &StateDir, token: &Token, name: &str, port: u16) -> Result<Credentials, JoinError> {
    names::check(name).map_err(CertificateError::from)?;
    // before the invitation is spent
    match dir.credentials() {
        Err(StoreError::NoCluster { .. }) => dir.check_writable()?,
        Ok(c) => {
            let dir = dir.path().to_owned();
            return Err(StoreError::Taken {
                number: c.number,
                name: c.name,
                cluster: c.cluster,
                dir,
            }
            .into());
        }
        Err(e) => return Err(e.into()),
    }
    let key = KeyPair::generate().map_err(CertificateError::from)?;
    let request = JoinRequest {
        id: token.id,
        secret: token.secret.clone(),
        name: name.to_string(),
        host: names::host(),
        public_key: key.subject_public_key_info(),
        port,
    };
    let mut failures = Vec::new();
    for addr in &token.addresses {
        match within(LIMIT, ask(token.cluster, *addr, &request)).await {
            Some(Ok(answer)) => return finish(dir, token, &key, answer),
            Some(Err(AskError::Own(e))) => return Err(e),
            Some(Err(AskError::Theirs(e))) => failures.push(format!("{addr}: {e}")),
            None => failures.push(format!("{addr}: silence")),
        }
    }
    Err(JoinError::NoAnswer(failures.join("; ")))
}

enum AskError {
    Own(JoinError),
    Theirs(String),
}

async fn ask(
    cluster: ClusterFingerprint,
    addr: SocketAddr,
    request: &JoinRequest,
) -> Result<JoinAnswer, AskError> {
    let own = |e: JoinError| AskError::Own(e);
    let any: SocketAddr = match addr {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let endpoint = quinn::Endpoint::client(any).map_err(|e| own(JoinError::Socket(e)))?;
    let config = tls::join_client_config(cluster).map_err(|e| own(e.into()))?;
    let theirs = |e: &dyn std::fmt::Display| AskError::Theirs(e.to_string());
    let connecting = endpoint
        .connect_with(config, addr, tls::SERVER_NAME)
        .map_err(|e| theirs(&e))?;
    let connection = connecting.await.map_err(|e| match e {
        quinn::ConnectionError::TransportError(e) if e.reason.contains("invalid peer certificate") => {
            theirs(&"it is of another cluster than the invitation")
        }
        other => theirs(&other),
    })?;
    let (mut send, mut receive) = connection.open_bi().await.map_err(|e| theirs(&e))?;
    frames::write(&mut send, request).await.map_err(|e| theirs(&e))?;
    let _ = send.finish();
    let answer = frames::read(&mut receive, MAX_PEER_MESSAGE)
        .await
        .map_err(|e| theirs(&e))?;
    connection.close(0u32.into(), b"");
    endpoint.wait_idle().await;
    Ok(answer)
}

fn finish(
    dir: &StateDir,
    token: &Token,
    key: &KeyPair,
    answer: JoinAnswer,
) -> Result<Credentials, JoinError> {
    let (certificate, authority, seen_as, mut members) = match answer {
        JoinAnswer::Welcome {
            certificate,
            authority,
            seen_as,
            members,
        } => (
            CertificateDer::from(certificate),
            CertificateDer::from(authority),
            seen_as,
            members,
        ),
        JoinAnswer::Refused(why) => return Err(JoinError::Refused(why.chars().take(500).collect())),
    };
    if ClusterFingerprint::of(&authority) != token.cluster {
        return Err(JoinError::Nonsense("it is of another cluster".into()));
    }
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    let credentials = Credentials::new(authority, certificate, key)?;
    // would a daemon accept them?
    tls::server_config(&credentials)?;
    dir.save_credentials(&credentials)?;
    members.retain(|m| m.number != credentials.number && names::check(&m.name).is_ok());
    members.truncate(MAX_MEMBERS - 1);
    members.push(MemberRecord {
        number: credentials.number,
        name: credentials.name.clone(),
        host: names::host(),
        addr: Some(seen_as),
    });
    dir.save_members(&members)?;
    Ok(credentials)
}
