//! Faults that tests ask for, in the middle of a move: a process of ours that ends, has no memory, or stands until something else has
//! happened, as that a link was cut.
//!
//! Only builds with debug assertions have them. A file in the directory `faults` of the rundir names the point, as `source-transfer` or,
//! for one process, `source-transfer.4711`, and has in it what happens there, once: `end`, `memory` or `wait`. When it does, the file
//! is called `source-transfer.reached`; who waits goes on when that is removed. At home and at the nodes the points have the same
//! names: the source is whom a process leaves, the target where it goes.

/// Where a fault can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// The source sends memory while the process runs.
    SourcePrecopy,
    /// ... stops it.
    SourceSeize,
    /// ... describes it.
    SourceDump,
    /// ... is about to send the description and the pages of one that stands still.
    SourceTransfer,
    /// ... knows that it stands ready at its new place, and commits or asks home to.
    SourceResume,
    /// ... has heard that it runs elsewhere.
    SourceAfter,
    /// ... sends what that still lacks.
    SourceRest,
    /// The target is asked to wait for a process.
    TargetReach,
    /// ... gets pages while it runs.
    TargetPrecopy,
    /// ... gets the rest.
    TargetTransfer,
    /// ... builds it.
    TargetRestore,
    /// ... is told that it runs there.
    TargetResume,
    /// ... gets pages that it runs without.
    TargetRest,
    /// ... puts its pages into the page store.
    TargetKeep,
    /// Home is asked to switch its contact to the node that a process has gone to.
    HomeSwitch,
}

#[cfg(debug_assertions)]
mod armed {
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::time::Duration;

    use super::Point;

    static DIR: OnceLock<PathBuf> = OnceLock::new();

    /// Faults are asked for below this rundir.
    pub fn look_in(rundir: PathBuf) {
        let _ = DIR.set(rundir.join("faults"));
    }

    /// Carries out what is asked for at this point of a move of a process; says what failed, if that is to be a failure that is
    /// survived.
    ///
    /// # Errors
    /// The fault, in words.
    pub fn at(point: Point, pid: i32) -> Result<(), String> {
        let Some(dir) = DIR.get() else { return Ok(()) };
        let of_all = point.name().to_owned();
        for name in [format!("{of_all}.{pid}"), of_all] {
            let reached = dir.join(format!("{name}.reached"));
            if std::fs::rename(dir.join(name), &reached).is_err() {
                continue;
            }
            let what = std::fs::read_to_string(&reached).unwrap_or_default();
            tracing::warn!(?point, pid, what, "as a test asks");
            match what.trim() {
                // As when it is killed: nothing is told to anybody.
                "end" => std::process::exit(137),
                "memory" => return Err("no memory, as a test asks".into()),
                "wait" => {
                    while reached.exists() {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    impl Point {
        fn name(self) -> &'static str {
            match self {
                Point::SourcePrecopy => "source-precopy",
                Point::SourceSeize => "source-seize",
                Point::SourceDump => "source-dump",
                Point::SourceTransfer => "source-transfer",
                Point::SourceResume => "source-resume",
                Point::SourceAfter => "source-after",
                Point::SourceRest => "source-rest",
                Point::TargetReach => "target-reach",
                Point::TargetPrecopy => "target-precopy",
                Point::TargetTransfer => "target-transfer",
                Point::TargetRestore => "target-restore",
                Point::TargetResume => "target-resume",
                Point::TargetRest => "target-rest",
                Point::TargetKeep => "target-keep",
                Point::HomeSwitch => "home-switch",
            }
        }
    }
}

#[cfg(debug_assertions)]
pub use armed::{at, look_in};

/// Nothing is asked for.
#[cfg(not(debug_assertions))]
pub fn look_in(_rundir: std::path::PathBuf) {}

/// Nothing is asked for.
///
/// # Errors
/// Never.
#[cfg(not(debug_assertions))]
pub fn at(_point: Point, _pid: i32) -> Result<(), String> {
    Ok(())
}
