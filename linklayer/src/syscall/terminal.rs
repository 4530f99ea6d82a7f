//! Calls whose effect on a terminal depends on what the calling thread blocks.
//!
//! Before a process in the background reads from its terminal, writes to one that stops writers, or changes it, the
//! kernel asks whether the *calling thread* blocks SIGTTIN or SIGTTOU, or the process ignores them
//! (`drivers/tty/tty_jobctrl.c`, `__tty_check_change`); only if it does not, the process group is sent the signal.

/// What a call may do with a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TerminalUse {
    /// It may read from one: SIGTTIN.
    Reads,
    /// It may write to this descriptor: SIGTTOU, if the terminal has TOSTOP.
    Writes(i32),
    /// Both, of which it does one.
    ReadsOrWrites(i32),
    /// It changes one: SIGTTOU.
    Changes,
}

impl TerminalUse {
    /// The descriptor that it may write to.
    pub fn written(self) -> Option<i32> {
        match self {
            TerminalUse::Writes(fd) | TerminalUse::ReadsOrWrites(fd) => Some(fd),
            TerminalUse::Reads | TerminalUse::Changes => None,
        }
    }

    /// Whether it may read from one.
    pub fn reads(self) -> bool {
        matches!(self, TerminalUse::Reads | TerminalUse::ReadsOrWrites(_))
    }
}

/// Commands of ioctl(2) that change a terminal (`tty_check_change` in `drivers/tty`).
const CHANGES: [u32; 17] = [
    0x5402,      // TCSETS
    0x5403,      // TCSETSW
    0x5404,      // TCSETSF
    0x5406,      // TCSETA
    0x5407,      // TCSETAW
    0x5408,      // TCSETAF
    0x5409,      // TCSBRK
    0x540a,      // TCXONC
    0x540b,      // TCFLSH
    0x5410,      // TIOCSPGRP
    0x5423,      // TIOCSETD
    0x5425,      // TCSBRKP
    0x5427,      // TIOCSBRK
    0x5428,      // TIOCCBRK
    0x402c_542b, // TCSETS2
    0x402c_542c, // TCSETSW2
    0x402c_542d, // TCSETSF2
];

/// What a call with these arguments may do with a terminal; `None` for most.
pub fn terminal_use(nr: u32, args: &[u64; 6]) -> Option<TerminalUse> {
    const READ: u32 = 0;
    const WRITE: u32 = 1;
    const IOCTL: u32 = 16;
    const READV: u32 = 19;
    const WRITEV: u32 = 20;
    const SENDFILE: u32 = 40;
    const SPLICE: u32 = 275;
    const PREADV2: u32 = 327;
    const PWRITEV2: u32 = 328;
    match nr {
        READ | READV | PREADV2 => Some(TerminalUse::Reads),
        WRITE | WRITEV | PWRITEV2 | SENDFILE => Some(TerminalUse::Writes(args[0] as i32)),
        SPLICE => Some(TerminalUse::ReadsOrWrites(args[2] as i32)),
        IOCTL => CHANGES
            .contains(&(args[1] as u32))
            .then_some(TerminalUse::Changes),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::syscall::{resolve, row};

    #[test]
    fn numbers_are_those_of_the_table() {
        for (nr, name) in [
            (0, "read"),
            (1, "write"),
            (16, "ioctl"),
            (19, "readv"),
            (20, "writev"),
            (40, "sendfile"),
            (275, "splice"),
            (327, "preadv2"),
            (328, "pwritev2"),
        ] {
            assert_eq!(row(nr).map(|r| r.name), Some(name));
            assert!(name == "ioctl" || terminal_use(nr, &[0; 6]).is_some());
        }
        let changes = CHANGES
            .iter()
            .filter_map(|c| resolve(16, &[0, u64::from(*c), 0, 0, 0, 0]).sub)
            .count();
        assert_eq!(changes, CHANGES.len());
    }

    #[test]
    fn looking_at_a_terminal_changes_nothing() {
        const TIOCGPGRP: u64 = 0x540f;
        const TIOCSPGRP: u64 = 0x5410;
        assert_eq!(terminal_use(16, &[0, TIOCGPGRP, 0, 0, 0, 0]), None);
        assert_eq!(
            terminal_use(16, &[0, TIOCSPGRP, 0, 0, 0, 0]),
            Some(TerminalUse::Changes)
        );
        assert_eq!(
            terminal_use(40, &[7, 3, 0, 0, 0, 0]),
            Some(TerminalUse::Writes(7))
        );
    }
}
