//! Where the page stores of a node are: a directory of the daemon's with one for each user, by number, which only that user can enter.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid};

use super::{Counts, FILES};
use crate::rundir;

/// The directory, unless the configuration names another: `/var/cache/mosrun` for root, else `$XDG_CACHE_HOME/mosrun` or
/// `~/.cache/mosrun`.
pub fn default_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return "/var/cache/mosrun".into();
    }
    rundir::of_user("XDG_CACHE_HOME", ".cache")
        .unwrap_or_else(|| format!("/tmp/mosrun-cache-{}/mosrun", nix::unistd::geteuid()).into())
}

/// Makes sure that the directory of a user's store is there, and gives its path. Done by the daemon, whose supervisors have no rights to.
///
/// # Errors
/// It cannot be made, or `dir` or the user's directory is not what it should be.
pub fn prepare(dir: &Path, uid: u32, gid: u32) -> io::Result<PathBuf> {
    let own = nix::unistd::geteuid();
    // Users pass through root's; nobody else's daemon has other users' supervisors.
    let mode = if own.is_root() { 0o711 } else { 0o700 };
    if let Some(parent) = dir.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    make(dir, mode)?;
    let meta = std::fs::symlink_metadata(dir)?;
    if !meta.is_dir() || meta.uid() != own.as_raw() || meta.mode() & 0o022 != 0 {
        return Err(io::Error::other(format!(
            "{} is not a directory of mosd's that nobody else may write to",
            dir.display()
        )));
    }
    let users = dir.join(uid.to_string());
    if make(&users, 0o700)? && own.is_root() {
        // Nobody but root can have put something else there meanwhile.
        nix::unistd::chown(&users, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    Ok(users)
}

/// Makes a directory with this mode, whatever the umask. False when it was there.
fn make(dir: &Path, mode: u32) -> io::Result<bool> {
    match DirBuilder::new().mode(mode).create(dir) {
        Ok(()) => {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode))?;
            Ok(true)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    }
}

/// The directories of users in `dir`.
fn users(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.parse::<u32>().is_ok())
        })
}

/// What the stores of all users have and have done, together.
pub fn counts(dir: &Path) -> Counts {
    let mut all = Counts::default();
    users(dir)
        .filter_map(|user| Counts::of(&user).ok())
        .for_each(|counts| all += counts);
    all
}

/// Removes the stores of all users, and nothing else.
///
/// # Errors
/// Something could not be removed.
pub fn remove_all(dir: &Path) -> io::Result<()> {
    for user in users(dir) {
        for name in FILES {
            match std::fs::remove_file(user.join(name)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        std::fs::remove_dir(&user)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pagestore::PageStore;

    #[test]
    fn each_user_has_a_directory_of_their_own() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("cache/mosrun");
        let own = nix::unistd::geteuid().as_raw();
        let mine = prepare(&dir, own, nix::unistd::getegid().as_raw()).unwrap();
        assert_eq!(prepare(&dir, own, 0).unwrap(), mine);
        assert_eq!(mine.metadata().unwrap().mode() & 0o777, 0o700);
        let store = PageStore::open(&mine, super::super::MIN_BYTES).unwrap();
        store.insert([[7; 4096].as_slice()].into_iter()).unwrap();
        let other = prepare(&dir, 12345, 12345).unwrap();
        assert_ne!(mine, other);
        if own == 0 {
            assert_eq!(other.metadata().unwrap().uid(), 12345);
            // Its user's, and readable for root's daemon, which counts.
            assert!(Counts::of(&other).is_err(), "there is no store yet");
        }
        assert_eq!(counts(&dir).entries, 1);
        std::fs::write(dir.join("keep"), "not ours").unwrap();
        remove_all(&dir).unwrap();
        assert!(!mine.exists() && dir.join("keep").exists());
        assert_eq!(counts(&dir), Counts::default());
        // A directory that others may write to is refused.
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(prepare(&dir, own, 0).is_err());
    }
}
