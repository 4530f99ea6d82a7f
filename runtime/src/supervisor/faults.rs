//! Faults that tests ask for: a supervisor that ends, or runs out of memory, in the middle of a move.
//!
//! Only builds with debug assertions have them. A file `fault` in the rundir names a point and what happens there, as
//! `source-transfer end`; it is looked for at the points, and removed when it is taken up.

/// Where a fault can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Point {
    /// The node that a process leaves sends memory while it runs.
    SourcePrecopy,
    /// ... stops it.
    SourceSeize,
    /// ... describes it.
    SourceDump,
    /// ... has sent the description, and sends pages.
    SourceTransfer,
    /// ... asks home to commit.
    SourceResume,
    /// ... has heard that it runs elsewhere.
    SourceAfter,
    /// The node that it goes to is asked to wait for it.
    TargetReach,
    /// ... gets pages while it runs.
    TargetPrecopy,
    /// ... gets the rest.
    TargetTransfer,
    /// ... builds it.
    TargetRestore,
    /// ... is told that it runs there.
    TargetResume,
}

/// Carries out what is asked for at this point; says what failed, if that is to be a failure that the supervisor survives.
///
/// # Errors
/// The fault, in words.
#[cfg(debug_assertions)]
pub(super) fn at(point: Point) -> Result<(), String> {
    let path = crate::rundir::path().join("fault");
    let Ok(text) = std::fs::read_to_string(&path) else {
        return Ok(());
    };
    let mut words = text.split_whitespace();
    if words.next() != Some(point.name()) {
        return Ok(());
    }
    let _ = std::fs::remove_file(&path);
    match words.next() {
        Some("end") => {
            tracing::warn!(?point, "ends, as a test asks");
            // As when it is killed: nothing is told to anybody.
            std::process::exit(137)
        }
        Some("memory") => Err("no memory, as a test asks".into()),
        _ => Ok(()),
    }
}

/// Nothing is asked for.
#[cfg(not(debug_assertions))]
pub(super) fn at(_point: Point) -> Result<(), String> {
    Ok(())
}

#[cfg(debug_assertions)]
impl Point {
    fn name(self) -> &'static str {
        match self {
            Point::SourcePrecopy => "source-precopy",
            Point::SourceSeize => "source-seize",
            Point::SourceDump => "source-dump",
            Point::SourceTransfer => "source-transfer",
            Point::SourceResume => "source-resume",
            Point::SourceAfter => "source-after",
            Point::TargetReach => "target-reach",
            Point::TargetPrecopy => "target-precopy",
            Point::TargetTransfer => "target-transfer",
            Point::TargetRestore => "target-restore",
            Point::TargetResume => "target-resume",
        }
    }
}
