//! Certificates: the cluster's own authority, and what it says of a node.
//!
//! A cluster is a self-signed authority. A node is a key whose certificate this authority signed; the certificate holds
//! the node's number (as the DNS name `node-NUMBER.mosrun`) and name (as the common name). The authority's key is on the
//! node where the cluster was made and nowhere else; it is needed to let nodes join, not to run. Certificates do not
//! expire, so that a wrong clock locks nobody out; a key that got into wrong hands is answered with a new cluster.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SubjectPublicKeyInfo,
};
use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::names;

/// Why a certificate or key is of no use.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// It could not be made or parsed.
    #[error("certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// It is no certificate.
    #[error("not a certificate: {0}")]
    Parse(String),
    /// It is no certificate of a node.
    #[error("not the certificate of a node: {0}")]
    NotANode(&'static str),
    /// A name cannot be in a certificate.
    #[error(transparent)]
    Name(#[from] names::BadName),
}

/// Identifies a cluster: the hash (BLAKE3) of its authority's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, bincode::Encode, bincode::Decode)]
pub struct ClusterFingerprint(pub [u8; 32]);

impl ClusterFingerprint {
    /// The fingerprint of an authority's certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        ClusterFingerprint(*blake3::hash(certificate).as_bytes())
    }
}

impl std::fmt::Display for ClusterFingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// What a node's certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCertificate {
    /// The node's number.
    pub number: u32,
    /// The node's name.
    pub name: String,
}

/// The authority of a cluster, with its key.
pub struct Authority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes the authority of a new cluster of this name.
    ///
    /// # Errors
    /// The name is unfit, or there is no randomness.
    pub fn create(cluster: &str) -> Result<Self, CertificateError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, names::check(cluster)?);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.der().clone();
        Ok(Authority {
            certificate,
            issuer: Issuer::new(params, key),
        })
    }

    /// Takes up an authority from its certificate and its key (PEM).
    ///
    /// # Errors
    /// One of them is not what it should be.
    pub fn load(certificate: CertificateDer<'static>, key_pem: &str) -> Result<Self, CertificateError> {
        let issuer = Issuer::from_ca_cert_der(&certificate, KeyPair::from_pem(key_pem)?)?;
        Ok(Authority { certificate, issuer })
    }

    /// The authority's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The authority's key, as PEM. Whoever has it can make nodes of the cluster.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// The cluster's fingerprint.
    pub fn fingerprint(&self) -> ClusterFingerprint {
        ClusterFingerprint::of(&self.certificate)
    }

    /// Signs a certificate: the owner of `public_key` (SubjectPublicKeyInfo, DER) is node `number` called `name`.
    ///
    /// # Errors
    /// The name is unfit, or the key is no public key that we know how to use.
    pub fn issue(
        &self,
        number: u32,
        name: &str,
        public_key: &[u8],
    ) -> Result<CertificateDer<'static>, CertificateError> {
        let key = SubjectPublicKeyInfo::from_der(public_key)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, names::check(name)?);
        params.subject_alt_names = vec![SanType::DnsName(dns_name(number).try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(&key, &self.issuer)?.der().clone())
    }
}

/// The name in the certificate of node `number`.
fn dns_name(number: u32) -> String {
    format!("node-{number}.mosrun")
}

/// Reads what a certificate says of its node. Whether the authority signed it was checked before, by TLS.
///
/// # Errors
/// [`CertificateError::Parse`], [`CertificateError::NotANode`].
pub fn read_node(certificate: &CertificateDer<'_>) -> Result<NodeCertificate, CertificateError> {
    let parsed = parse(certificate)?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|e| CertificateError::Parse(e.to_string()))?
        .ok_or(CertificateError::NotANode("it has no alternative name"))?;
    let number = names
        .value
        .general_names
        .iter()
        .find_map(|name| match name {
            GeneralName::DNSName(name) => name.strip_prefix("node-")?.strip_suffix(".mosrun")?.parse().ok(),
            _ => None,
        })
        .filter(|number| *number != 0)
        .ok_or(CertificateError::NotANode("it has no node number"))?;
    Ok(NodeCertificate {
        number,
        name: common_name(&parsed)?,
    })
}

/// Reads the name of the cluster from its authority's certificate.
///
/// # Errors
/// [`CertificateError::Parse`], [`CertificateError::NotANode`].
pub fn read_cluster_name(certificate: &CertificateDer<'_>) -> Result<String, CertificateError> {
    common_name(&parse(certificate)?)
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, CertificateError> {
    let (_, parsed) =
        X509Certificate::from_der(certificate).map_err(|e| CertificateError::Parse(e.to_string()))?;
    Ok(parsed)
}

fn common_name(parsed: &X509Certificate<'_>) -> Result<String, CertificateError> {
    let name = parsed
        .subject()
        .iter_common_name()
        .next()
        .and_then(|cn| cn.as_str().ok());
    Ok(names::check(name.ok_or(CertificateError::NotANode("it has no name"))?)?.to_string())
}

#[cfg(test)]
mod tests {
    use rcgen::PublicKeyData;

    use super::*;

    #[test]
    fn a_certificate_says_what_was_signed() {
        let authority = Authority::create("lab").unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = authority
            .issue(7, "seven", &key.subject_public_key_info())
            .unwrap();
        let node = read_node(&certificate).unwrap();
        assert_eq!(
            node,
            NodeCertificate {
                number: 7,
                name: "seven".into()
            }
        );
        assert_eq!(read_cluster_name(authority.certificate()).unwrap(), "lab");
        assert!(read_node(authority.certificate()).is_err());

        let again = Authority::load(authority.certificate().clone(), &authority.key_pem()).unwrap();
        assert_eq!(again.fingerprint(), authority.fingerprint());
        assert_ne!(
            Authority::create("lab").unwrap().fingerprint(),
            authority.fingerprint()
        );
    }

    #[test]
    fn nonsense_is_not_signed() {
        let authority = Authority::create("lab").unwrap();
        assert!(authority.issue(7, "seven", b"no key").is_err());
        let key = KeyPair::generate().unwrap();
        assert!(authority.issue(7, "7", &key.subject_public_key_info()).is_err());
        assert!(read_node(&CertificateDer::from(vec![1, 2, 3])).is_err());
        assert!(Authority::create("").is_err());
    }
}
