//! The state directory: what a node knows of its cluster when its daemon does not run.
//!
//!     ca.pem        certificate of the cluster's authority
//!     ca.key        its key; only on the node that can invite others
//!     node.pem      certificate of this node
//!     node.key      its key
//!     members.toml  the nodes this one has heard of, and where they listened last
//!     generation    the last life of this node (see [`super::gossip::GossipId`])
//!     last-number   highest node number given away; with ca.key only
//!     invites/      invitations; with ca.key only (see [`super::invites`])
//!
//! The directory has mode 0700. Files are replaced whole (written aside and renamed), so that a crash leaves the old or
//! the new one.

use std::fs::DirBuilder;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use rcgen::{KeyPair, PublicKeyData};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::authority::{self, Authority, CertificateError, ClusterFingerprint};
use super::names;

/// Most members that are remembered.
pub const MAX_MEMBERS: usize = 4096;

/// The state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file could not be read or written.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// A file is there and holds something else than it should.
    #[error("{path}: {why}", path = .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A certificate could not be made.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The machine is in no cluster.
    #[error(
        "this machine is in no cluster ({dir} has no node.pem): `mosctl cluster init` makes one, `mosctl cluster join` joins one",
        dir = .dir.display()
    )]
    NoCluster {
        /// The state directory.
        dir: PathBuf,
    },
    /// The machine is in a cluster already.
    #[error("this machine is node {number} ({name}) of cluster {cluster} already; remove {dir} to leave it", dir = .dir.display())]
    Taken {
        /// Its number.
        number: u32,
        /// Its name.
        name: String,
        /// The cluster's name.
        cluster: String,
        /// The state directory.
        dir: PathBuf,
    },
    /// The node cannot do what needs the authority's key.
    #[error(
        "this node does not hold the key of the cluster's authority: do this on the node where the cluster was made"
    )]
    NoAuthority,
}

/// A node that was heard of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, bincode::Encode, bincode::Decode)]
#[serde(deny_unknown_fields)]
pub struct MemberRecord {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Its host name.
    #[serde(default)]
    pub host: String,
    /// Where its daemon listens, when that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addr: Option<SocketAddr>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MembersFile {
    #[serde(default)]
    member: Vec<MemberRecord>,
}

/// What makes this machine a node of a cluster.
#[derive(Debug)]
pub struct Credentials {
    /// The node's number.
    pub number: u32,
    /// The node's name.
    pub name: String,
    /// The cluster's name.
    pub cluster: String,
    /// The authority's certificate.
    pub authority: CertificateDer<'static>,
    /// The node's certificate.
    pub certificate: CertificateDer<'static>,
    /// The node's key.
    pub key: PrivatePkcs8KeyDer<'static>,
}

impl Credentials {
    /// Puts credentials together, and reads from the certificates who the node is.
    ///
    /// # Errors
    /// A certificate is not what it should be.
    pub fn new(
        authority: CertificateDer<'static>,
        certificate: CertificateDer<'static>,
        key: PrivatePkcs8KeyDer<'static>,
    ) -> Result<Self, CertificateError> {
        let node = authority::read_node(&certificate)?;
        let cluster = authority::read_cluster_name(&authority)?;
        Ok(Credentials {
            number: node.number,
            name: node.name,
            cluster,
            authority,
            certificate,
            key,
        })
    }

    /// The cluster's fingerprint.
    pub fn fingerprint(&self) -> ClusterFingerprint {
        ClusterFingerprint::of(&self.authority)
    }
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        Credentials {
            number: self.number,
            name: self.name.clone(),
            cluster: self.cluster.clone(),
            authority: self.authority.clone(),
            certificate: self.certificate.clone(),
            key: self.key.clone_key(),
        }
    }
}

/// A node's state directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// The directory at `path`. Nothing is read or made.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        StateDir { path: path.into() }
    }

    /// The usual place: `/var/lib/mosrun` for root, else `$XDG_STATE_HOME/mosrun` or `~/.local/state/mosrun`.
    pub fn default_path() -> PathBuf {
        if nix::unistd::geteuid().is_root() {
            return "/var/lib/mosrun".into();
        }
        crate::rundir::of_user("XDG_STATE_HOME", ".local/state").unwrap_or_else(|| "/tmp/mosrun".into())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn io(&self, name: &str) -> impl Fn(io::Error) -> StoreError + use<> {
        let path = self.file(name);
        move |source| StoreError::Io {
            path: path.clone(),
            source,
        }
    }

    fn content(&self, name: &str, why: impl ToString) -> StoreError {
        StoreError::Content {
            path: self.file(name),
            why: why.to_string(),
        }
    }

    /// Makes the directory if need be, and tries to write to it.
    ///
    /// # Errors
    /// It cannot be made or written.
    pub fn check_writable(&self) -> Result<(), StoreError> {
        self.make("")?;
        self.write("try", b"", 0o600)?;
        std::fs::remove_file(self.file("try")).map_err(self.io("try"))
    }

    /// Makes the directory and `sub` in it.
    pub(super) fn make(&self, sub: &str) -> Result<(), StoreError> {
        let path = self.file(sub);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|source| StoreError::Io { path, source })
    }

    /// Replaces a file.
    pub(super) fn write(&self, name: &str, content: &[u8], mode: u32) -> Result<(), StoreError> {
        let target = self.file(name);
        let dir = target.parent().unwrap_or(&self.path);
        let replace = || -> io::Result<()> {
            let mut aside = tempfile::NamedTempFile::new_in(dir)?;
            aside
                .as_file()
                .set_permissions(std::fs::Permissions::from_mode(mode))?;
            aside.write_all(content)?;
            aside.as_file().sync_all()?;
            aside.persist(&target)?;
            Ok(())
        };
        replace().map_err(self.io(name))
    }

    pub(super) fn read(&self, name: &str) -> Result<Option<String>, StoreError> {
        match std::fs::read_to_string(self.file(name)) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.io(name)(e)),
        }
    }

    fn certificate(&self, name: &str) -> Result<Option<CertificateDer<'static>>, StoreError> {
        let Some(text) = self.read(name)? else {
            return Ok(None);
        };
        let parsed = CertificateDer::from_pem_slice(text.as_bytes());
        parsed
            .map(Some)
            .map_err(|e| self.content(name, format!("not a certificate: {e}")))
    }

    /// Reads who this machine is.
    ///
    /// # Errors
    /// [`StoreError::NoCluster`] when it is in none; otherwise what is wrong with the files.
    pub fn credentials(&self) -> Result<Credentials, StoreError> {
        let none = || StoreError::NoCluster {
            dir: self.path.clone(),
        };
        let certificate = self.certificate("node.pem")?.ok_or_else(none)?;
        let authority = self
            .certificate("ca.pem")?
            .ok_or_else(|| self.content("ca.pem", "is missing"))?;
        let key = self
            .read("node.key")?
            .ok_or_else(|| self.content("node.key", "is missing"))?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(key.as_bytes())
            .map_err(|e| self.content("node.key", format!("not a key: {e}")))?;
        Credentials::new(authority, certificate, key).map_err(|e| self.content("node.pem", e))
    }

    /// Writes who this machine is, from now on.
    ///
    /// # Errors
    /// [`StoreError::Taken`] when it is somebody already; then nothing was changed.
    pub fn save_credentials(&self, credentials: &Credentials) -> Result<(), StoreError> {
        self.check_free()?;
        self.make("")?;
        let pem = |label: &str, der: &[u8]| to_pem(label, der);
        self.write(
            "ca.pem",
            pem("CERTIFICATE", &credentials.authority).as_bytes(),
            0o644,
        )?;
        let key = pem("PRIVATE KEY", credentials.key.secret_pkcs8_der());
        self.write("node.key", key.as_bytes(), 0o600)?;
        // last: a node is in a cluster when it has this file
        self.write(
            "node.pem",
            pem("CERTIFICATE", &credentials.certificate).as_bytes(),
            0o644,
        )
    }

    fn check_free(&self) -> Result<(), StoreError> {
        match self.credentials() {
            Ok(Credentials {
                number,
                name,
                cluster,
                ..
            }) => Err(StoreError::Taken {
                number,
                name,
                cluster,
                dir: self.path.clone(),
            }),
            Err(StoreError::NoCluster { .. }) => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// Makes a new cluster, with this machine as its node 1 and the holder of its authority.
    ///
    /// # Errors
    /// [`StoreError::Taken`], an unfit name, or a directory that cannot be written.
    pub fn create_cluster(&self, cluster: &str, node: &str) -> Result<Credentials, StoreError> {
        self.check_free()?;
        names::check(node).map_err(CertificateError::from)?;
        let authority = Authority::create(cluster)?;
        self.make("invites")?;
        self.write("ca.key", authority.key_pem().as_bytes(), 0o600)?;
        self.write("last-number", b"1\n", 0o600)?;
        let credentials = new_node(&authority, 1, node)?;
        self.save_credentials(&credentials)?;
        Ok(credentials)
    }

    /// Makes the next node of the cluster whose authority is here, key and all, for who sets several up at once (a lab,
    /// an installation image). Over a network `mosctl cluster join` is the way, which never sends a key.
    ///
    /// # Errors
    /// [`StoreError::NoAuthority`], an unfit name, or a directory that cannot be written.
    pub fn make_node(&self, name: &str) -> Result<Credentials, StoreError> {
        names::check(name).map_err(CertificateError::from)?;
        new_node(&self.authority()?, self.next_number()?, name)
    }

    /// The cluster's authority.
    ///
    /// # Errors
    /// [`StoreError::NoAuthority`] when its key is not here.
    pub fn authority(&self) -> Result<Authority, StoreError> {
        let key = self.read("ca.key")?.ok_or(StoreError::NoAuthority)?;
        let certificate = self
            .certificate("ca.pem")?
            .ok_or_else(|| self.content("ca.pem", "is missing"))?;
        Authority::load(certificate, &key).map_err(|e| self.content("ca.key", e))
    }

    /// Whether the authority's key is here.
    pub fn has_authority(&self) -> bool {
        self.file("ca.key").exists()
    }

    /// Takes the next node number. A number is never given twice.
    ///
    /// # Errors
    /// The directory's.
    pub fn next_number(&self) -> Result<u32, StoreError> {
        let _lock = self.lock()?;
        let text = self.read("last-number")?.unwrap_or_else(|| "1".into());
        let last: u32 = text
            .trim()
            .parse()
            .map_err(|_| self.content("last-number", "is no number"))?;
        let number = last
            .checked_add(1)
            .ok_or_else(|| self.content("last-number", "no number is left"))?;
        self.write("last-number", format!("{number}\n").as_bytes(), 0o600)?;
        Ok(number)
    }

    /// The generation for a new life of this node: `now` (microseconds since 1970), but later than every life before,
    /// even when the clock has been put back: the others would take a node with an older generation for a ghost.
    pub fn next_generation(&self, now: u64) -> u64 {
        let before = self
            .read("generation")
            .ok()
            .flatten()
            .and_then(|text| text.trim().parse::<u64>().ok());
        // each time a node was given up while it lived it has gone one further by itself: leave room for that
        let generation = before.map_or(now, |before| now.max(before.saturating_add(1 << 20)));
        if let Err(e) = self.write("generation", format!("{generation}\n").as_bytes(), 0o600) {
            tracing::warn!("{e}; this matters only if the clock is put back");
        }
        generation
    }

    /// Keeps others from changing the directory until the result is dropped.
    pub(super) fn lock(&self) -> Result<Flock<std::fs::File>, StoreError> {
        let open = std::fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.file("lock"));
        let file = open.map_err(self.io("lock"))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| self.io("lock")(e.into()))
    }

    /// The nodes that were heard of.
    ///
    /// # Errors
    /// The file is there and makes no sense.
    pub fn members(&self) -> Result<Vec<MemberRecord>, StoreError> {
        let Some(text) = self.read("members.toml")? else {
            return Ok(Vec::new());
        };
        let file: MembersFile = toml::from_str(&text).map_err(|e| self.content("members.toml", e))?;
        Ok(file.member.into_iter().take(MAX_MEMBERS).collect())
    }

    /// Remembers nodes, instead of those remembered before.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save_members(&self, members: &[MemberRecord]) -> Result<(), StoreError> {
        let file = MembersFile {
            member: members.to_vec(),
        };
        let text = toml::to_string(&file).map_err(|e| self.content("members.toml", e))?;
        let text = format!("# Written by mosd: the nodes it has heard of.\n{text}");
        self.write("members.toml", text.as_bytes(), 0o600)
    }
}

fn new_node(authority: &Authority, number: u32, name: &str) -> Result<Credentials, StoreError> {
    let key = KeyPair::generate().map_err(CertificateError::from)?;
    let certificate = authority.issue(number, name, &key.subject_public_key_info())?;
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    Ok(Credentials::new(
        authority.certificate().clone(),
        certificate,
        key,
    )?)
}

/// Wraps DER in PEM (RFC 7468).
fn to_pem(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in der.chunks(48) {
        for group in line.chunks(3) {
            let word = group
                .iter()
                .enumerate()
                .fold(0u32, |w, (i, b)| w | u32::from(*b) << (16 - 8 * i));
            for i in 0..4 {
                text.push(if i <= group.len() {
                    ALPHABET[(word >> (18 - 6 * i)) as usize & 63] as char
                } else {
                    '='
                });
            }
        }
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_made_once_and_read_again() {
        let top = tempfile::tempdir().unwrap();
        let dir = StateDir::new(top.path().join("a/state"));
        assert!(matches!(dir.credentials(), Err(StoreError::NoCluster { .. })));
        let made = dir.create_cluster("lab", "one").unwrap();
        let read = dir.credentials().unwrap();
        assert_eq!((read.number, &*read.name, &*read.cluster), (1, "one", "lab"));
        assert_eq!(read.certificate, made.certificate);
        assert_eq!(read.key.secret_pkcs8_der(), made.key.secret_pkcs8_der());
        assert_eq!(dir.authority().unwrap().fingerprint(), read.fingerprint());
        assert!(matches!(
            dir.create_cluster("lab", "one"),
            Err(StoreError::Taken { number: 1, .. })
        ));
        let mode = |name| std::fs::metadata(dir.file(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(
            (mode(""), mode("ca.key"), mode("node.key")),
            (0o700, 0o600, 0o600)
        );
    }

    #[test]
    fn nodes_made_here_have_numbers_of_their_own() {
        let top = tempfile::tempdir().unwrap();
        let dir = StateDir::new(top.path().join("1"));
        dir.create_cluster("lab", "one").unwrap();
        let two = dir.make_node("two").unwrap();
        assert!(dir.make_node("3").is_err());
        let three = dir.make_node("three").unwrap();
        assert_eq!((two.number, three.number), (2, 3));
        let other = StateDir::new(top.path().join("2"));
        other.save_credentials(&two).unwrap();
        assert_eq!(
            other.credentials().unwrap().fingerprint(),
            dir.credentials().unwrap().fingerprint()
        );
        assert!(matches!(other.make_node("four"), Err(StoreError::NoAuthority)));
    }

    #[test]
    fn each_life_is_later_than_the_one_before() {
        let top = tempfile::tempdir().unwrap();
        let dir = StateDir::new(top.path());
        let first = dir.next_generation(5_000_000);
        let clock_put_back = dir.next_generation(1_000_000);
        let later = dir.next_generation(900_000_000);
        assert_eq!((first, later), (5_000_000, 900_000_000));
        assert!(clock_put_back > first && clock_put_back < later);
    }

    #[test]
    fn members_are_remembered() {
        let top = tempfile::tempdir().unwrap();
        let dir = StateDir::new(top.path());
        assert!(dir.members().unwrap().is_empty());
        let record = |number: u32, addr: Option<&str>| MemberRecord {
            number,
            name: format!("n{number}"),
            host: "h".into(),
            addr: addr.map(|a| a.parse().unwrap()),
        };
        let members = vec![record(1, Some("10.0.0.1:1")), record(2, None)];
        dir.save_members(&members).unwrap();
        assert_eq!(dir.members().unwrap(), members);
        dir.write("members.toml", b"[[member]]\nnumber = 'x'", 0o600)
            .unwrap();
        assert!(dir.members().unwrap_err().to_string().contains("line 2"));
    }
}
