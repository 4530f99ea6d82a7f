//! The table: one row for each system call of x86_64, in groups by subject.
//!
//! Argument blocks are described from the caller's point of view: `inp` is read by the kernel, `out` written. Sizes
//! are those of the x86_64 ABI (`include/uapi`), checked by the tests against what libc says where it knows.

mod files;
mod ipc;
mod machine;
mod memory;
mod net;
mod paths;
mod process;
mod signals;
mod time;

use super::kind::{CacheClass, Row};
use std::sync::LazyLock;

/// The highest number that the table knows: Linux 6.18.
pub const LATEST: u32 = 469;

/// The groups of rows with their titles, in the order in which they are printed.
pub const fn groups() -> [(&'static str, &'static [Row]); 9] {
    [
        ("Files and descriptors", files::ROWS),
        ("Paths and metadata", paths::ROWS),
        ("Memory", memory::ROWS),
        ("Processes, threads and scheduling", process::ROWS),
        ("Identity, machine and administration", machine::ROWS),
        ("Signals", signals::ROWS),
        ("Time", time::ROWS),
        ("Sockets", net::ROWS),
        ("System V and POSIX IPC", ipc::ROWS),
    ]
}

include!(concat!(env!("OUT_DIR"), "/kernel_calls.rs"));

/// Every call of the kernel's list has exactly one row, and no row has a number that the list lacks.
const _: () = {
    let mut rows = [0u8; LATEST as usize + 1];
    let groups = groups();
    let mut group = 0;
    while group < groups.len() {
        let mut index = 0;
        while index < groups[group].1.len() {
            rows[groups[group].1[index].nr as usize] += 1;
            index += 1;
        }
        group += 1;
    }
    let mut call = 0;
    while call < KERNEL.len() {
        let number = KERNEL[call].0;
        assert!(
            number <= LATEST,
            "the kernel headers have a call that is newer than the table"
        );
        assert!(
            rows[number as usize] == 1,
            "a call of the kernel has no row in the table, or more than one"
        );
        rows[number as usize] = 0;
        call += 1;
    }
    let mut number = 0;
    while number < rows.len() {
        assert!(
            rows[number] == 0,
            "a row of the table has a number that the kernel does not use"
        );
        number += 1;
    }
};

static INDEX: LazyLock<Vec<Option<&'static Row>>> = LazyLock::new(|| {
    let mut index = vec![None; LATEST as usize + 1];
    for row in groups().into_iter().flat_map(|(_, rows)| rows) {
        index[row.nr as usize] = Some(row);
    }
    index
});

/// The row of a call; `None` for a number that Linux 6.18 does not use.
pub fn row(nr: u32) -> Option<&'static Row> {
    INDEX.get(nr as usize).copied().flatten()
}

/// All rows, by number.
pub fn rows() -> impl Iterator<Item = &'static Row> {
    INDEX.iter().filter_map(|row| *row)
}

/// Rows in a compact notation: `number name(argument: kind, ...) disposition [, field: value ...];`
macro_rules! define_rows {
    ($( $nr:literal $name:ident ( $($arg:ident : $kind:expr),* ) $disposition:expr $(, $field:ident : $value:expr)* ; )*) => {
        /// The rows of this group.
        pub(super) const ROWS: &[super::Row] = &[ $(
            #[allow(clippy::needless_update)] // a row may name every field
            super::Row {
                nr: $nr,
                name: stringify!($name),
                args: &[ $( crate::syscall::kind::Arg { name: stringify!($arg), kind: $kind } ),* ],
                disposition: $disposition,
                $( $field: $value, )*
                ..super::Row::BASE
            },
        )* ];
    };
}
use define_rows;

/// Calls that change identity invalidate what was kept about it.
const CREDS: &[CacheClass] = &[CacheClass::Creds];

/// What the rows are written with.
pub(super) mod words {
    pub use crate::syscall::kind::Blocking::{Long, May};
    pub use crate::syscall::kind::Disposition::{self, Forward, GoHome, Local, Split};
    pub use crate::syscall::kind::Kind::{self, Iovec, Mmsg, Msg, Str, StrArray, Sub, TempMask, Val};
    pub use crate::syscall::kind::Size::{
        Arg, CapData, Clamp, ClampCount, Count, FdSet, Fixed, Head, Limit, Plus, Stream, Word,
    };
    pub use crate::syscall::kind::{
        CacheClass, Dir, HomeReason, Rule, Scalar, SplitKind, has, inout, inp, is, out,
    };
    pub use crate::syscall::sub::SubTable;

    pub const INT: Kind = Val(Scalar::Int);
    pub const UINT: Kind = Val(Scalar::Uint);
    pub const LONG: Kind = Val(Scalar::Long);
    pub const SIZE: Kind = Val(Scalar::Size);
    pub const FD: Kind = Val(Scalar::Fd);
    pub const FLAGS: Kind = Val(Scalar::Flags);
    pub const MODE: Kind = Val(Scalar::Mode);
    pub const PID: Kind = Val(Scalar::Pid);
    pub const ID: Kind = Val(Scalar::Id);
    pub const SIG: Kind = Val(Scalar::Signal);
    pub const CLOCK: Kind = Val(Scalar::Clock);
    /// An address that does not reach home.
    pub const ADDR: Kind = Val(Scalar::Addr);
    /// A path: the kernel looks at `PATH_MAX` bytes.
    pub const PATH: Kind = Str(4096);
    /// The name of an extended attribute (`XATTR_NAME_MAX`, and its NUL).
    pub const XATTR: Kind = Str(256);
    /// `struct stat`.
    pub const STAT: Kind = out(Fixed(144));
    /// `struct statfs`.
    pub const STATFS: Kind = out(Fixed(120));
    /// `struct timespec` or `struct timeval`, read.
    pub const TIME_IN: Kind = inp(Fixed(16));
    /// The time that is left, which the kernel writes if it can.
    pub const TIME_LEFT: Kind = inout(Fixed(16)).always().quiet().timeout();
    /// Two words of a descriptor each, whose descriptors nobody would know if they could not be written.
    pub const FD_PAIR: Kind = out(Fixed(8)).early();
    /// `struct rusage`.
    pub const RUSAGE_LEN: u32 = 144;
}

#[cfg(test)]
mod tests;
