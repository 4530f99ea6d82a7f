//! Invitations on the side of the authority: one file each, in `invites/` of the state directory.
//!
//! An invitation is spent by renaming its file, so that exactly one of several joins at the same moment succeeds, with or
//! without a daemon, and so that a later one can be told when and for whom it was spent. Only the hash of the secret is
//! kept.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::authority::ClusterFingerprint;
use super::names;
use super::store::{StateDir, StoreError};
use super::token::{InviteId, InviteSecret, Token};

/// Invitations that may be outstanding at a time.
const MAX_OUTSTANDING: usize = 1000;
/// How long a spent or expired one is kept for the sake of better errors.
const KEEP: Duration = Duration::from_secs(30 * 24 * 3600);

/// An invitation is no good.
#[derive(Debug, thiserror::Error)]
pub enum InviteError {
    /// There is none such, or its secret is another. The two are not told apart.
    #[error("the cluster knows no such invitation: make a new one with `mosctl cluster invite`")]
    Unknown,
    /// It was used.
    #[error("the invitation was used already, by {0}: make a new one with `mosctl cluster invite`")]
    Used(String),
    /// It is too old.
    #[error("the invitation expired {0} s ago: make a new one with `mosctl cluster invite`")]
    Expired(u64),
    /// There are too many.
    #[error("{MAX_OUTSTANDING} invitations are outstanding already")]
    TooMany,
    /// The state directory failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InviteFile {
    secret_hash: String,
    expires_unix_s: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    used_by: Option<String>,
}

/// Seconds since 1970.
pub fn now_unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// Makes an invitation that is good for one join within `lifetime`.
///
/// # Errors
/// The authority is not here, or the directory cannot be written.
pub fn create(dir: &StateDir, addresses: Vec<SocketAddr>, lifetime: Duration) -> Result<Token, InviteError> {
    let cluster: ClusterFingerprint = dir.authority()?.fingerprint();
    dir.make("invites")?;
    let _lock = dir.lock()?;
    if sweep(dir) >= MAX_OUTSTANDING {
        return Err(InviteError::TooMany);
    }
    let token = Token {
        cluster,
        addresses,
        id: InviteId(rand::random()),
        secret: InviteSecret(rand::random()),
        expires_unix_s: now_unix_s().saturating_add(lifetime.as_secs()),
    };
    let file = InviteFile {
        secret_hash: token.secret.hash().to_hex().to_string(),
        expires_unix_s: token.expires_unix_s,
        used_by: None,
    };
    write(dir, &open_name(token.id), &file)?;
    Ok(token)
}

/// Whether any invitation is outstanding.
pub fn any_outstanding(dir: &StateDir) -> bool {
    entries(dir).any(|(name, _)| name.ends_with(".open"))
}

/// Whether [`spend`] would succeed now.
///
/// # Errors
/// As [`spend`].
pub fn check(dir: &StateDir, id: InviteId, secret: &InviteSecret) -> Result<(), InviteError> {
    match read(dir, &open_name(id))? {
        Some(file) => check_secret(&file, secret).and_then(|()| check_expiry(&file)),
        None => Err(why_not_open(dir, id, secret)?),
    }
}

fn why_not_open(dir: &StateDir, id: InviteId, secret: &InviteSecret) -> Result<InviteError, InviteError> {
    let Some(file) = read(dir, &used_name(id))? else {
        return Ok(InviteError::Unknown);
    };
    check_secret(&file, secret)?;
    Ok(InviteError::Used(file.used_by.unwrap_or_default()))
}

/// Spends an invitation for the node that is to be called `name`. Whatever happens later, it is spent.
///
/// # Errors
/// [`InviteError`]; the invitation is as it was.
pub fn spend(dir: &StateDir, id: InviteId, secret: &InviteSecret, name: &str) -> Result<(), InviteError> {
    let _lock = dir.lock()?;
    if let Some(mut file) = read(dir, &open_name(id))? {
        check_secret(&file, secret)?;
        check_expiry(&file)?;
        let used_by = names::check(name).map_or("somebody", |name| name);
        file.used_by = Some(used_by.to_string());
        write(dir, &used_name(id), &file)?;
        let open = dir.file(&open_name(id));
        return std::fs::remove_file(&open).map_err(|source| StoreError::Io { path: open, source }.into());
    }
    Err(why_not_open(dir, id, secret)?)
}

fn check_secret(file: &InviteFile, secret: &InviteSecret) -> Result<(), InviteError> {
    let kept = blake3::Hash::from_hex(&file.secret_hash).map_err(|_| InviteError::Unknown)?;
    // blake3 compares in constant time
    if kept == secret.hash() {
        Ok(())
    } else {
        Err(InviteError::Unknown)
    }
}

fn check_expiry(file: &InviteFile) -> Result<(), InviteError> {
    match now_unix_s().checked_sub(file.expires_unix_s) {
        Some(late) if late > 0 => Err(InviteError::Expired(late)),
        _ => Ok(()),
    }
}

fn open_name(id: InviteId) -> String {
    format!("invites/{id}.open")
}

fn used_name(id: InviteId) -> String {
    format!("invites/{id}.used")
}

fn read(dir: &StateDir, name: &str) -> Result<Option<InviteFile>, StoreError> {
    let Some(text) = dir.read(name)? else {
        return Ok(None);
    };
    let parsed = toml::from_str(&text);
    parsed.map(Some).map_err(|e| StoreError::Content {
        path: dir.file(name),
        why: e.to_string(),
    })
}

fn write(dir: &StateDir, name: &str, file: &InviteFile) -> Result<(), StoreError> {
    let text = toml::to_string(file).map_err(|e| StoreError::Content {
        path: dir.file(name),
        why: e.to_string(),
    })?;
    dir.write(name, text.as_bytes(), 0o600)
}

fn entries(dir: &StateDir) -> impl Iterator<Item = (String, std::path::PathBuf)> + use<> {
    let entries = std::fs::read_dir(dir.file("invites"))
        .into_iter()
        .flatten()
        .flatten();
    entries.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))
}

/// Removes what is long over, and counts what is outstanding.
fn sweep(dir: &StateDir) -> usize {
    let mut outstanding = 0;
    for (name, path) in entries(dir) {
        let Ok(Some(file)) = read(dir, &format!("invites/{name}")) else {
            continue;
        };
        if now_unix_s().saturating_sub(file.expires_unix_s) > KEEP.as_secs() {
            let _ = std::fs::remove_file(path);
        } else if name.ends_with(".open") {
            outstanding += 1;
        }
    }
    outstanding
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> (tempfile::TempDir, StateDir) {
        let top = tempfile::tempdir().unwrap();
        let dir = StateDir::new(top.path().join("s"));
        dir.create_cluster("lab", "one").unwrap();
        (top, dir)
    }

    fn addresses() -> Vec<SocketAddr> {
        vec!["127.0.0.1:1".parse().unwrap()]
    }

    #[test]
    fn an_invitation_is_good_once() {
        let (_top, dir) = cluster();
        assert!(!any_outstanding(&dir));
        let token = create(&dir, addresses(), Duration::from_secs(60)).unwrap();
        assert!(any_outstanding(&dir));
        let wrong = InviteSecret([1; 32]);
        assert!(matches!(
            spend(&dir, token.id, &wrong, "two"),
            Err(InviteError::Unknown)
        ));
        assert!(matches!(
            spend(&dir, InviteId([0; 8]), &token.secret, "two"),
            Err(InviteError::Unknown)
        ));
        check(&dir, token.id, &token.secret).unwrap();
        assert!(check(&dir, token.id, &wrong).is_err());
        spend(&dir, token.id, &token.secret, "two").unwrap();
        assert!(matches!(
            check(&dir, token.id, &token.secret),
            Err(InviteError::Used(_))
        ));
        assert!(!any_outstanding(&dir));
        let again = spend(&dir, token.id, &token.secret, "three");
        assert!(matches!(again, Err(InviteError::Used(by)) if by == "two"));
        assert!(matches!(
            spend(&dir, token.id, &wrong, "x"),
            Err(InviteError::Unknown)
        ));
    }

    #[test]
    fn an_invitation_expires() {
        let (_top, dir) = cluster();
        let token = create(&dir, addresses(), Duration::ZERO).unwrap();
        let mut file = read(&dir, &open_name(token.id)).unwrap().unwrap();
        file.expires_unix_s -= 5;
        write(&dir, &open_name(token.id), &file).unwrap();
        assert!(matches!(
            spend(&dir, token.id, &token.secret, "two"),
            Err(InviteError::Expired(_))
        ));
        file.expires_unix_s -= KEEP.as_secs();
        write(&dir, &open_name(token.id), &file).unwrap();
        assert_eq!(sweep(&dir), 0);
        assert!(!any_outstanding(&dir));
    }

    #[test]
    fn of_many_at_once_one_succeeds() {
        let (_top, dir) = cluster();
        let token = create(&dir, addresses(), Duration::from_secs(60)).unwrap();
        let tries: Vec<_> = (0..8)
            .map(|n| {
                let (dir, token) = (dir.clone(), token.clone());
                std::thread::spawn(move || spend(&dir, token.id, &token.secret, &format!("n{n}")).is_ok())
            })
            .collect();
        assert_eq!(
            tries
                .into_iter()
                .map(|t| t.join().unwrap())
                .filter(|ok| *ok)
                .count(),
            1
        );
    }

    #[test]
    fn only_the_authority_invites() {
        let (top, dir) = cluster();
        let other = StateDir::new(top.path().join("o"));
        other.save_credentials(&dir.make_node("two").unwrap()).unwrap();
        let refused = create(&other, addresses(), Duration::from_secs(1));
        assert!(matches!(
            refused,
            Err(InviteError::Store(StoreError::NoAuthority))
        ));
    }
}
