//! Where the sockets are.
//!
//! `$MOSRUN_RUNDIR`, else `/run/mosrun` for root, else `$XDG_RUNTIME_DIR/mosrun`, else `/tmp/mosrun-<uid>`. In it:
//! `mosd.sock` (the daemon of this rundir) and `jobs/<deputy pid>.sock` (one per job of its owner). A directory that this
//! module makes has mode 0700, except root's: it is 0755, since everybody may talk to the system's daemon.

use std::fs::{DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;

/// Rundir of the daemon that serves all users of a machine.
pub const SYSTEM: &str = "/run/mosrun";

/// The path of the caller's rundir. Nothing is created.
pub fn path() -> PathBuf {
    let uid = nix::unistd::geteuid();
    choose(
        std::env::var_os("MOSRUN_RUNDIR"),
        std::env::var_os("XDG_RUNTIME_DIR"),
        uid,
    )
}

fn choose(own: Option<std::ffi::OsString>, xdg: Option<std::ffi::OsString>, uid: Uid) -> PathBuf {
    match (own.filter(|p| !p.is_empty()), xdg.filter(|p| !p.is_empty())) {
        (Some(own), _) => own.into(),
        (None, _) if uid.is_root() => SYSTEM.into(),
        (None, Some(xdg)) => PathBuf::from(xdg).join("mosrun"),
        (None, None) => format!("/tmp/mosrun-{uid}").into(),
    }
}

/// A user's own directory `mosrun` of another kind: below `$VARIABLE`, else below `below_home` in the home directory; none
/// without either (XDG Base Directory Specification).
pub fn of_user(variable: &str, below_home: &str) -> Option<PathBuf> {
    let var = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let top = var(variable).or_else(|| var("HOME").map(|home| home.join(below_home)))?;
    Some(top.join("mosrun"))
}

/// Makes sure that `dir` exists, belongs to the caller, and cannot be written by anybody else.
///
/// # Errors
/// It cannot be made, or it is somebody else's (in `/tmp` anybody may have been first), or others may write to it.
pub fn ensure(dir: &Path) -> io::Result<()> {
    let uid = nix::unistd::geteuid();
    let mode = if uid.is_root() { 0o755 } else { 0o700 };
    if let Some(parent) = dir.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    }
    match DirBuilder::new().mode(mode).create(dir) {
        Ok(()) => {
            // the umask may have taken more than we meant
            return std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode));
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e),
    }
    check_owned(dir, &std::fs::symlink_metadata(dir)?, uid)
}

fn check_owned(dir: &Path, meta: &Metadata, uid: Uid) -> io::Result<()> {
    let refuse = |why: String| {
        Err(io::Error::other(format!(
            "{}: {why}; set MOSRUN_RUNDIR to a directory of your own",
            dir.display()
        )))
    };
    if !meta.is_dir() {
        refuse("is not a directory".into())
    } else if meta.uid() != uid.as_raw() {
        refuse(format!("belongs to uid {}", meta.uid()))
    } else if meta.mode() & 0o022 != 0 {
        refuse(format!(
            "others may write to it (mode {:04o})",
            meta.mode() & 0o7777
        ))
    } else {
        Ok(())
    }
}

/// The daemon's socket in `rundir`.
pub fn daemon_socket(rundir: &Path) -> PathBuf {
    rundir.join("mosd.sock")
}

/// The directory of job sockets in `rundir`.
pub fn jobs_dir(rundir: &Path) -> PathBuf {
    rundir.join("jobs")
}

/// The socket of the job whose deputy is `pid`.
pub fn job_socket(rundir: &Path, pid: u32) -> PathBuf {
    jobs_dir(rundir).join(format!("{pid}.sock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_choice() {
        let user = Uid::from_raw(1000);
        let root = Uid::from_raw(0);
        let some = |s: &str| Some(s.into());
        assert_eq!(choose(some("/a"), some("/x"), user), Path::new("/a"));
        assert_eq!(choose(some(""), some("/x"), user), Path::new("/x/mosrun"));
        assert_eq!(choose(None, None, user), Path::new("/tmp/mosrun-1000"));
        assert_eq!(choose(None, some("/x"), root), Path::new(SYSTEM));
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("a/b");
        ensure(&dir).unwrap();
        ensure(&dir).unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(ensure(&dir).unwrap_err().to_string().contains("others may write"));
        let link = top.path().join("link");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        assert!(ensure(&link).unwrap_err().to_string().contains("not a directory"));
        let file = top.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(ensure(&file).is_err());
    }
}
