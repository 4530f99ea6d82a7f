//! TLS for daemons: who may talk to whom.
//!
//! Two protocols share a daemon's UDP port, told apart by ALPN (RFC 7301). [`CONTROL`] needs a certificate of the
//! cluster on both sides. [`JOIN`] is for who has none yet: the joining side knows the authority's fingerprint from its
//! invitation and believes exactly the nodes of that authority; the daemon's side believes nothing and checks the
//! invitation. The number of a peer is read from its certificate after the handshake ([`peer_of`]), since who dials an
//! address need not know who lives there.

use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{IdleTimeout, TransportConfig, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError as TlsCertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

use super::authority::{self, ClusterFingerprint, NodeCertificate};
use super::store::Credentials;

/// ALPN name of the conversation between nodes.
pub const CONTROL: &[u8] = b"mosrun-control";
/// ALPN name of joining.
pub const JOIN: &[u8] = b"mosrun-join";
/// What every node answers to as a server; the real identity is in the certificate.
pub const SERVER_NAME: &str = "mosd.mosrun";

/// A connection that hears nothing is given up after this time.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// So often does a connection that has nothing to say show that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(4);
/// Requests of one peer at a time.
const MAX_REQUESTS: u32 = 64;
/// Bytes that a peer may have under way on one stream, and on all together.
const STREAM_WINDOW: u32 = 256 << 10;
const WINDOW: u32 = 2 << 20;
/// Bytes of datagrams that wait to be read or sent.
const DATAGRAM_BUFFER: usize = 256 << 10;

/// TLS could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// rustls does not accept a certificate or key.
    #[error("TLS: {0}")]
    Rustls(#[from] rustls::Error),
    /// The verifier cannot be built from the authority's certificate.
    #[error("TLS: {0}")]
    Verifier(String),
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(authority: &CertificateDer<'static>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    Ok(roots)
}

fn chain(credentials: &Credentials) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    // the authority's certificate goes along for those who know only its fingerprint
    let chain = vec![credentials.certificate.clone(), credentials.authority.clone()];
    (chain, PrivateKeyDer::Pkcs8(credentials.key.clone_key()))
}

fn transport() -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    let idle = IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32));
    transport
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_bidi_streams(MAX_REQUESTS.into())
        .max_concurrent_uni_streams(0u32.into())
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(WINDOW.into())
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
        .datagram_send_buffer_size(DATAGRAM_BUFFER);
    Arc::new(transport)
}

/// How a daemon answers.
///
/// # Errors
/// [`TlsError`].
pub fn server_config(credentials: &Credentials) -> Result<quinn::ServerConfig, TlsError> {
    let roots = Arc::new(roots(&credentials.authority)?);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .allow_unauthenticated()
        .build()
        .map_err(|e| TlsError::Verifier(e.to_string()))?;
    let (chain, key) = chain(credentials);
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![CONTROL.to_vec(), JOIN.to_vec()];
    let crypto = QuicServerConfig::try_from(config).map_err(|e| TlsError::Verifier(e.to_string()))?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server.transport_config(transport());
    Ok(server)
}

/// How a daemon dials another.
///
/// # Errors
/// [`TlsError`].
pub fn control_client_config(credentials: &Credentials) -> Result<quinn::ClientConfig, TlsError> {
    let verifier = NodeVerifier {
        trust: Trust::Authority(roots(&credentials.authority)?),
        provider: provider(),
    };
    let (chain, key) = chain(credentials);
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(chain, key)?;
    client_config(config, CONTROL)
}

/// How somebody with an invitation dials.
///
/// # Errors
/// [`TlsError`].
pub fn join_client_config(cluster: ClusterFingerprint) -> Result<quinn::ClientConfig, TlsError> {
    let verifier = NodeVerifier {
        trust: Trust::Fingerprint(cluster),
        provider: provider(),
    };
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    client_config(config, JOIN)
}

fn client_config(mut config: rustls::ClientConfig, alpn: &[u8]) -> Result<quinn::ClientConfig, TlsError> {
    config.alpn_protocols = vec![alpn.to_vec()];
    let crypto = QuicClientConfig::try_from(config).map_err(|e| TlsError::Verifier(e.to_string()))?;
    let mut client = quinn::ClientConfig::new(Arc::new(crypto));
    client.transport_config(transport());
    Ok(client)
}

/// Who is at the other end of a connection whose handshake is done; `None` for somebody without a certificate.
pub fn peer_of(connection: &quinn::Connection) -> Option<NodeCertificate> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    authority::read_node(chain.first()?).ok()
}

/// The protocol that was agreed on.
pub fn protocol_of(connection: &quinn::Connection) -> Option<Vec<u8>> {
    connection
        .handshake_data()?
        .downcast::<quinn::crypto::rustls::HandshakeData>()
        .ok()?
        .protocol
}

/// Accepts exactly the certificates of one cluster's nodes, whatever name was dialled.
#[derive(Debug)]
struct NodeVerifier {
    trust: Trust,
    provider: Arc<CryptoProvider>,
}

#[derive(Debug)]
enum Trust {
    Authority(RootCertStore),
    /// The authority's certificate comes with the chain, and has this hash.
    Fingerprint(ClusterFingerprint),
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found;
        let roots = match &self.trust {
            Trust::Authority(roots) => roots,
            Trust::Fingerprint(fingerprint) => {
                let authority = intermediates
                    .iter()
                    .find(|c| ClusterFingerprint::of(c) == *fingerprint);
                let mut roots = RootCertStore::empty();
                roots.add(
                    authority
                        .ok_or(TlsCertificateError::UnknownIssuer)?
                        .clone()
                        .into_owned(),
                )?;
                found = roots;
                &found
            }
        };
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, roots, &[], now, algorithms)?;
        authority::read_node(end_entity).map_err(|_| TlsCertificateError::BadEncoding)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::store::StateDir;

    fn verify(verifier: &NodeVerifier, chain: &[CertificateDer<'static>]) -> Result<(), rustls::Error> {
        let name = ServerName::try_from(SERVER_NAME).unwrap();
        verifier
            .verify_server_cert(&chain[0], &chain[1..], &name, &[], UnixTime::now())
            .map(|_| ())
    }

    #[test]
    fn only_nodes_of_the_cluster_are_believed() {
        let top = tempfile::tempdir().unwrap();
        let dirs = ["a", "b"].map(|n| StateDir::new(top.path().join(n)));
        let ours = dirs[0].create_cluster("lab", "one").unwrap();
        let two = dirs[0].make_node("two").unwrap();
        let theirs = dirs[1].create_cluster("lab", "one").unwrap();
        let by_authority = NodeVerifier {
            trust: Trust::Authority(roots(&ours.authority).unwrap()),
            provider: provider(),
        };
        let by_fingerprint = NodeVerifier {
            trust: Trust::Fingerprint(ours.fingerprint()),
            provider: provider(),
        };
        for verifier in [&by_authority, &by_fingerprint] {
            verify(verifier, &chain(&two).0).unwrap();
            assert!(verify(verifier, &chain(&theirs).0).is_err());
            // a foreign node that shows our authority's certificate, and the authority itself as a node
            assert!(verify(verifier, &[theirs.certificate.clone(), ours.authority.clone()]).is_err());
            assert!(verify(verifier, &[ours.authority.clone(), ours.authority.clone()]).is_err());
        }
        assert!(verify(&by_fingerprint, std::slice::from_ref(&two.certificate)).is_err());
        for credentials in [&ours, &two] {
            server_config(credentials).unwrap();
            control_client_config(credentials).unwrap();
        }
        join_client_config(ours.fingerprint()).unwrap();
    }
}
