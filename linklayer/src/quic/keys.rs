//! One-time keys and the pinning of the peer's.

use std::fmt;
use std::sync::Arc;

use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use serde::{Deserialize, Serialize};

use super::LinkError;

/// The application protocol that both ends must speak.
const ALPN: &[u8] = b"mosrun/1";
/// The name in every one-time certificate. It is not what anybody is known by: the fingerprint is.
pub(super) const SERVER_NAME: &str = "mosrun";
/// The longest encoded key that [`OneTimeKey::from_bytes`] looks at, in bytes.
const MAX_KEY_BYTES: usize = 8192;

/// BLAKE3 of a certificate in DER: what one end knows the other by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// A key pair with a self-signed certificate, made for one end of one link and thrown away with it.
#[derive(Clone)]
pub struct OneTimeKey {
    certificate: Vec<u8>,
    secret: Vec<u8>,
}

impl fmt::Debug for OneTimeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OneTimeKey")
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

impl OneTimeKey {
    /// Makes a new key from the system's entropy.
    pub fn generate() -> Result<Self, LinkError> {
        let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])
            .map_err(|error| LinkError::BadKey(error.to_string()))?;
        Ok(Self {
            certificate: made.cert.der().to_vec(),
            secret: made.signing_key.serialize_der(),
        })
    }

    /// What the peer pins.
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.certificate)
    }

    /// The key as bytes, secret part included, for [`OneTimeKey::from_bytes`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(4 + self.certificate.len() + self.secret.len());
        out.extend_from_slice(&(self.certificate.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.certificate);
        out.extend_from_slice(&self.secret);
        out
    }

    /// Reads what [`OneTimeKey::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, LinkError> {
        let bad = |what: &str| LinkError::BadKey(what.to_owned());
        if bytes.len() > MAX_KEY_BYTES {
            return Err(bad("it is too long"));
        }
        let (len, rest) = bytes
            .split_first_chunk::<4>()
            .ok_or_else(|| bad("it is too short"))?;
        let (certificate, secret) = rest
            .split_at_checked(u32::from_le_bytes(*len) as usize)
            .ok_or_else(|| bad("it is cut off"))?;
        let key = Self {
            certificate: certificate.to_vec(),
            secret: secret.to_vec(),
        };
        key.client_config(Fingerprint([0; 32]))?;
        Ok(key)
    }

    fn chain(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let secret = PrivatePkcs8KeyDer::from(self.secret.clone());
        (
            vec![CertificateDer::from(self.certificate.clone())],
            secret.into(),
        )
    }

    /// TLS of the end that connects, accepting `peer` alone.
    pub(super) fn client_config(&self, peer: Fingerprint) -> Result<Arc<QuicClientConfig>, LinkError> {
        let (chain, secret) = self.chain();
        let pinned = Arc::new(Pinned {
            peer,
            provider: provider(),
        });
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(bad_key)?
            .dangerous()
            .with_custom_certificate_verifier(pinned)
            .with_client_auth_cert(chain, secret)
            .map_err(bad_key)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(
            QuicClientConfig::try_from(config).map_err(|error| LinkError::BadKey(error.to_string()))?,
        ))
    }

    /// TLS of the end that listens, accepting `peer` alone.
    pub(super) fn server_config(&self, peer: Fingerprint) -> Result<Arc<QuicServerConfig>, LinkError> {
        let (chain, secret) = self.chain();
        let pinned = Arc::new(Pinned {
            peer,
            provider: provider(),
        });
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(bad_key)?
            .with_client_cert_verifier(pinned)
            .with_single_cert(chain, secret)
            .map_err(bad_key)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(Arc::new(
            QuicServerConfig::try_from(config).map_err(|error| LinkError::BadKey(error.to_string()))?,
        ))
    }
}

fn bad_key(error: Error) -> LinkError {
    LinkError::BadKey(error.to_string())
}

fn fingerprint(certificate: &[u8]) -> Fingerprint {
    Fingerprint(*blake3::hash(certificate).as_bytes())
}

/// *ring*, with AES-128-GCM preferred: the cheapest per byte where the CPU has AES.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites = vec![
        rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        rustls::crypto::ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

/// Accepts one certificate, whatever it says; that the peer holds its key is checked as always.
#[derive(Debug)]
struct Pinned {
    peer: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    fn check(&self, end_entity: &CertificateDer<'_>) -> Result<(), Error> {
        if fingerprint(end_entity) == self.peer {
            return Ok(());
        }
        Err(Error::InvalidCertificate(
            CertificateError::ApplicationVerificationFailure,
        ))
    }

    fn signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }
}

/// Nothing here speaks TLS 1.2; a handshake that asks for its signatures is refused.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("TLS 1.2 is not spoken".to_owned()))
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
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

    #[test]
    fn a_key_survives_its_bytes() {
        let key = OneTimeKey::generate().unwrap();
        let bytes = key.to_bytes();
        let back = OneTimeKey::from_bytes(&bytes).unwrap();
        assert_eq!(back.fingerprint(), key.fingerprint());
        assert_ne!(OneTimeKey::generate().unwrap().fingerprint(), key.fingerprint());
        assert!(!format!("{key:?}").contains("secret"));
        for cut in 0..bytes.len() {
            assert!(OneTimeKey::from_bytes(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        assert!(OneTimeKey::from_bytes(&[0xff; 9000]).is_err());
    }
}
