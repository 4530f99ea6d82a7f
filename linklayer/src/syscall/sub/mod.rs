//! Calls that are families of calls: the command decides what the arguments are and where the call runs.

mod fcntl;
mod ioctl;
mod ipc;
mod prctl;
mod sockopt;

use super::kind::{Cmp, SubRow, is};

/// Which family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SubTable {
    /// `fcntl` by command.
    Fcntl,
    /// `ioctl` by request.
    Ioctl,
    /// `prctl` by option.
    Prctl,
    /// `arch_prctl` by option.
    ArchPrctl,
    /// `setsockopt` by level and option.
    SetSockopt,
    /// `getsockopt` by level and option.
    GetSockopt,
    /// `semctl` by command.
    Semctl,
    /// `msgctl` by command.
    Msgctl,
    /// `shmctl` by command.
    Shmctl,
}

impl SubTable {
    /// Every family, in the order in which they are printed.
    pub const ALL: [SubTable; 9] = [
        SubTable::Fcntl,
        SubTable::Ioctl,
        SubTable::Prctl,
        SubTable::ArchPrctl,
        SubTable::SetSockopt,
        SubTable::GetSockopt,
        SubTable::Semctl,
        SubTable::Msgctl,
        SubTable::Shmctl,
    ];

    /// The call's name.
    pub fn name(self) -> &'static str {
        match self {
            SubTable::Fcntl => "fcntl",
            SubTable::Ioctl => "ioctl",
            SubTable::Prctl => "prctl",
            SubTable::ArchPrctl => "arch_prctl",
            SubTable::SetSockopt => "setsockopt",
            SubTable::GetSockopt => "getsockopt",
            SubTable::Semctl => "semctl",
            SubTable::Msgctl => "msgctl",
            SubTable::Shmctl => "shmctl",
        }
    }

    /// The rows of the family.
    pub fn rows(self) -> &'static [SubRow] {
        match self {
            SubTable::Fcntl => fcntl::ROWS,
            SubTable::Ioctl => ioctl::ROWS,
            SubTable::Prctl => prctl::PRCTL,
            SubTable::ArchPrctl => prctl::ARCH_PRCTL,
            SubTable::SetSockopt => sockopt::SET,
            SubTable::GetSockopt => sockopt::GET,
            SubTable::Semctl => ipc::SEMCTL,
            SubTable::Msgctl => ipc::MSGCTL,
            SubTable::Shmctl => ipc::SHMCTL,
        }
    }

    /// Index of the argument that holds the command.
    fn command_arg(self) -> u8 {
        match self {
            SubTable::Prctl | SubTable::ArchPrctl => 0,
            SubTable::Fcntl | SubTable::Ioctl | SubTable::Msgctl | SubTable::Shmctl => 1,
            SubTable::Semctl | SubTable::SetSockopt | SubTable::GetSockopt => 2,
        }
    }

    /// The row for these arguments; `None` for a command that is not in the table.
    pub fn find(self, args: &[u64; 6]) -> Option<&'static SubRow> {
        let command = u64::from(args[usize::from(self.command_arg())] as u32);
        let code = match self {
            SubTable::SetSockopt | SubTable::GetSockopt => u64::from(args[1] as u32) << 32 | command,
            _ => command,
        };
        self.rows().iter().find(|row| row.code == code)
    }

    /// The conditions under which a call is this row's command.
    pub fn cmps(self, row: &SubRow) -> Vec<Cmp> {
        let mut cmps = vec![is(self.command_arg(), row.code as u32)];
        if let SubTable::SetSockopt | SubTable::GetSockopt = self {
            cmps.push(is(1, (row.code >> 32) as u32));
        }
        cmps
    }
}

/// Rows in a compact notation: `code NAME(argument: kind, ...) disposition [, blocking] [=> note];`
macro_rules! sub_rows {
    ($( $code:literal $name:ident ( $($arg:ident : $kind:expr),* ) $disposition:expr $(, $blocking:ident)? $(=> $note:literal)? ; )*) => {
        &[ $( crate::syscall::kind::SubRow {
            code: $code,
            name: stringify!($name),
            args: &[ $( crate::syscall::kind::Arg { name: stringify!($arg), kind: $kind } ),* ],
            disposition: $disposition,
            blocking: {
                #[allow(unused_mut, unused_assignments)]
                let mut blocking = crate::syscall::kind::Blocking::Never;
                $( blocking = $blocking; )?
                blocking
            },
            note: concat!($($note)?),
        }, )* ]
    };
}
use sub_rows;
