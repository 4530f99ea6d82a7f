//! The command lines of our programs: one definition each, from which parsing, help, man pages and shell completions
//! come.

pub mod mosrun;

/// Exit status for a command line that makes no sense.
pub const EXIT_USAGE: i32 = 2;
