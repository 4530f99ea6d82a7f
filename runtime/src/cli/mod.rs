//! The command lines of our programs: one definition each, from which parsing, help, man pages and shell completions
//! come; and what the verbs of `mosctl` do.

pub mod adopt;
pub mod cluster;
pub mod docs;
pub mod info;
pub mod migrate;
pub mod mon;
pub mod mosctl;
pub mod mosd;
pub mod mosrun;
pub mod ps;
pub mod status;
pub mod table;

/// Exit status for a command line that makes no sense.
pub const EXIT_USAGE: i32 = 2;
