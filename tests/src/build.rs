//! Our own programs, and the guests, as the tests find them: built when they are not up to date.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

use nix::fcntl::{Flock, FlockArg};

use crate::skip::Skip;

/// Environment variable with a directory of programs to test instead of the ones of this workspace.
pub const PROGRAMS: &str = "MOSRUN_TESTS_PROGRAMS";

/// The top directory of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The directory `target/.../debug` (or release) that this test was built into.
fn profile_dir() -> PathBuf {
    let own = std::env::current_exe().expect("the test's own path");
    let dir = own.parent().expect("a directory");
    if dir.ends_with("deps") {
        dir.parent().expect("a directory").to_owned()
    } else {
        dir.to_owned()
    }
}

/// Serialises work of all test processes; released when the file is dropped.
fn exclusive(name: &str) -> Flock<File> {
    let dir = profile_dir().join("guests");
    fs::create_dir_all(&dir).expect("a directory for guests");
    let file = File::create(dir.join(name)).expect("a lock file");
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, e)| e)
        .expect("the lock")
}

/// The directory of `mosrun`, `mosd` and `mosctl`. They are built first, unless [`PROGRAMS`] names others.
pub fn programs() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        if let Some(dir) = std::env::var_os(PROGRAMS).filter(|d| !d.is_empty()) {
            return dir.into();
        }
        let dir = profile_dir();
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build
            .args(["build", "--quiet", "--package", "runtime", "--bins"])
            .current_dir(workspace());
        if dir.ends_with("release") {
            build.arg("--release");
        }
        let _lock = exclusive("programs.lock");
        let status = build.status().expect("cargo can be started");
        assert!(status.success(), "the programs do not build");
        dir
    })
}

/// How a guest is linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Dynamically, position independent.
    Dynamic,
    /// Dynamically, at a fixed address.
    NoPie,
    /// Statically, at a fixed address.
    Static,
    /// Statically, position independent.
    StaticPie,
}

impl Link {
    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Dynamic => &["-fPIE", "-pie"],
            Self::NoPie => &["-fno-pie", "-no-pie"],
            Self::Static => &["-static"],
            Self::StaticPie => &["-fPIE", "-static-pie"],
        }
    }
}

fn stamp(path: &Path) -> SystemTime {
    let metadata = fs::metadata(path).and_then(|m| m.modified());
    metadata.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Compiles a Rust program of one file, unless that was done already, and gives the program's path.
pub fn rust(source: &Path) -> Result<PathBuf, Skip> {
    let rustc = crate::skip::program("rustc")?;
    let _lock = exclusive("rust.lock");
    let target = profile_dir().join("guests").join("rust_program");
    if stamp(&target) <= stamp(source) {
        let mut command = Command::new(rustc);
        let status = command.arg("-O").arg("-o").arg(&target).arg(source).status();
        assert!(
            status.expect("rustc can be started").success(),
            "{} does not compile",
            source.display()
        );
    }
    Ok(target)
}

/// Compiles `tests/guests/NAME.c`, unless that was done already, and gives the program's path.
pub fn guest(name: &str, link: Link) -> Result<PathBuf, Skip> {
    let gcc = crate::skip::program("gcc")?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests");
    let source = sources.join(format!("{name}.c"));
    // A directory for each way to link: the program's own name is part of what is compared.
    let dir = profile_dir()
        .join("guests")
        .join(format!("{link:?}").to_lowercase());
    let target = dir.join(name);
    let _lock = exclusive(&format!("{name}.lock"));
    if stamp(&target) > stamp(&source).max(stamp(&sources.join("guest.h"))) {
        return Ok(target);
    }
    fs::create_dir_all(&dir).expect("a directory for guests");
    let fresh = dir.join(format!("{name}.new"));
    let status = Command::new(gcc)
        .args(["-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror"])
        .args(
            [
                "clobbered",
                "maybe-uninitialized",
                "nonnull",
                "stringop-overflow",
                "stringop-overread",
            ]
            .map(|w| format!("-Wno-{w}")),
        )
        .args(["-Wno-unused-result", "-Wno-format-truncation"])
        .args(link.flags())
        .arg("-o")
        .arg(&fresh)
        .arg(&source)
        .args(["-lrt", "-lutil"])
        .status()
        .expect("gcc can be started");
    assert!(status.success(), "{name}.c does not compile");
    fs::rename(&fresh, &target).expect("the guest can be put into its place");
    Ok(target)
}
