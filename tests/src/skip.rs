//! Tests that cannot run somewhere say so, in a way that is counted and can be made an error.

use std::fmt;
use std::io::Write;

/// Environment variable that makes every skip a failure; CI sets it.
pub const NO_SKIP: &str = "MOSRUN_TESTS_NO_SKIP";
/// Environment variable with the name of a file to which every skip is appended, a line each.
pub const SKIP_LOG: &str = "MOSRUN_TESTS_SKIP_LOG";

/// Why a test does not run here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Skip {
    /// A lab needs root.
    NotRoot,
    /// A program is not installed (`tests/setup.sh` installs all of them).
    NoProgram(String),
    /// The source package for the compiler tests was not fetched (`tests/setup.sh` does).
    NoSources,
    /// The other kernel was not fetched (`tests/setup.sh` does).
    NoKernel,
    /// The kernel, or the machine, lacks something.
    Kernel(String),
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRoot => write!(f, "not root"),
            Self::NoProgram(name) => write!(f, "{name} is not installed (tests/setup.sh)"),
            Self::NoKernel => write!(f, "target/kernel is missing (tests/setup.sh)"),
            Self::NoSources => write!(f, "target/sources is missing (tests/setup.sh)"),
            Self::Kernel(what) => write!(f, "this kernel or machine: {what}"),
        }
    }
}

impl Skip {
    /// Notes the skip. The test is to return after it.
    ///
    /// # Panics
    /// When [`NO_SKIP`] is set.
    pub fn note(&self) {
        let test = std::thread::current().name().unwrap_or("?").to_owned();
        eprintln!("SKIPPED {test}: {self}");
        if let Some(log) = std::env::var_os(SKIP_LOG)
            && let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(log)
        {
            let _ = writeln!(file, "{test}: {self}");
        }
        let forbidden = std::env::var_os(NO_SKIP).is_some_and(|v| !v.is_empty() && v != "0");
        assert!(!forbidden, "skipped although {NO_SKIP} is set: {self}");
    }
}

/// Gives the value, or notes the skip and returns from the test.
#[macro_export]
macro_rules! or_skip {
    ($result:expr) => {
        match $result {
            Ok(value) => value,
            Err(skip) => return $crate::skip::Skip::note(&skip),
        }
    };
}

/// The path of an installed program.
pub fn program(name: &str) -> Result<std::path::PathBuf, Skip> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(Into::into))
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
        .ok_or_else(|| Skip::NoProgram(name.to_owned()))
}
