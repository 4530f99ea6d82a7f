//! The words in which the table describes a system call.
//!
//! A row says everything that anybody needs to know about a call: what its arguments are, in which direction the
//! memory behind them is copied and how much of it, where the call runs, and how long it may take. The filter, the
//! marshaller, the log, the document and the coverage test read the same row.

pub use super::home::HomeReason;
use super::sub::SubTable;

/// Where a call runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Disposition {
    /// On the node where the guest is, by that node's kernel, without anybody being told.
    Local,
    /// At home, by the vessel's thread. Arguments and results are copied as the row says.
    Forward,
    /// Both sides have a part in it: the supervisor has a handler for it.
    Split(SplitKind),
    /// The process goes home and the call runs there natively.
    GoHome(HomeReason),
}

/// The handlers that a supervisor has for calls with two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SplitKind {
    /// `mmap` other than private anonymous: the file is at home, the mapping is here.
    Mmap,
    /// `mremap`: areas that the supervisor keeps account of may move.
    Mremap,
    /// `msync`: what has changed of files that are mapped shared and writable is written at home.
    Msync,
    /// The clone family: the vessel makes the real child or thread, then the guest gets one with the same id.
    Clone,
    /// `execve` and `execveat`: executed by the vessel; the new image is placed anew.
    Exec,
    /// `exit`: ends a thread on both sides.
    ExitThread,
    /// `exit_group`: ends the process on both sides with the same status.
    ExitGroup,
    /// The kill family: sent by the vessel; a signal to the caller itself is taken before the call returns.
    SignalSend,
    /// `rt_sigtimedwait`: waits here, stopped on its way out, for the signals that are queued here carry no siginfo of home.
    SignalWait,
    /// `rt_sigaction`: takes effect here, and home is told so that it knows what is ignored or handled.
    SigAction,
    /// Relative sleeps: run here; their start is recorded so that the rest can be slept elsewhere.
    Sleep,
    /// `restart_syscall`: here, unless what is restarted is a wait that began at home, whose deadline the vessel's thread has.
    Restart,
    /// `open` and its kind: home, except for the few files that describe this node or this guest's memory.
    Open,
    /// `readlink` and `readlinkat`: as [`SplitKind::Open`].
    Readlink,
    /// `prctl` commands that concern both sides.
    Prctl,
    /// Resource limits: kept at home; those that concern memory are set here too.
    Rlimit,
    /// CPU time: what was used at the node where it runs; of children, which end at home, what was used there.
    Times,
    /// Interval timers that count CPU time: they run here and move with the process.
    CpuTimer,
    /// Calls with a temporary signal mask: forwarded without the mask, which takes effect here
    /// ([`super::Gathered::temp_mask`]).
    TempMask,
    /// CPU affinity of a thread named by its id: here when it is one of this node's guests, otherwise home.
    Affinity,
}

/// How long a call may take at home, which decides how the deputy waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Blocking {
    /// It does not wait for anybody: the deputy waits inline.
    Never = 0,
    /// It often returns at once: the deputy waits for a moment.
    May = 1,
    /// It is made to wait: the deputy does not.
    Long = 2,
}

impl Blocking {
    /// The value with this number, as it travels.
    pub fn from_number(number: u8) -> Option<Blocking> {
        [Blocking::Never, Blocking::May, Blocking::Long]
            .get(usize::from(number))
            .copied()
    }
}

/// What a cached result depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum CacheClass {
    /// User and group ids and capabilities. They belong to a *thread*: the key must contain its tid.
    Creds = 1,
    /// The session of the caller, when the argument names the caller.
    Session = 2,
    /// Name and version of the home machine. An administrator could change the host name; a guest sees that when it
    /// moves or executes a new program.
    Machine = 4,
}

/// A condition on one argument: `args[arg] & mask == value`. It is what a seccomp filter can check as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cmp {
    /// Index of the argument, 0 to 5.
    pub arg: u8,
    /// The bits that are looked at.
    pub mask: u64,
    /// What they must be.
    pub value: u64,
}

impl Cmp {
    /// Whether the condition holds for these arguments.
    pub fn holds(&self, args: &[u64; 6]) -> bool {
        args[usize::from(self.arg)] & self.mask == self.value
    }
}

/// All bits of `mask` are set in the argument.
pub const fn has(arg: u8, mask: u64) -> Cmp {
    Cmp {
        arg,
        mask,
        value: mask,
    }
}

/// The argument, a 32-bit one, has this value.
pub const fn is(arg: u8, value: u32) -> Cmp {
    Cmp {
        arg,
        mask: 0xffff_ffff,
        value: value as u64,
    }
}

/// A disposition that differs from the row's when all conditions hold. The first rule that applies decides.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The conditions, all of which must hold.
    pub when: &'static [Cmp],
    /// The disposition then.
    pub then: Disposition,
}

/// One system call, or one command of a call, as the table describes it.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The number in `asm/unistd_64.h`.
    pub nr: u32,
    /// The name there, without the prefix.
    pub name: &'static str,
    /// The arguments that the call takes.
    pub args: &'static [Arg],
    /// Where it runs.
    pub disposition: Disposition,
    /// Exceptions to that by argument.
    pub rules: &'static [Rule],
    /// How long it may take at home.
    pub blocking: Blocking,
    /// The call does not block at all when one of these conditions holds.
    pub quick: &'static [Cmp],
    /// What its result depends on when it may be kept and given again; `None`: it must be asked every time.
    pub cache: Option<CacheClass>,
    /// The cached results that it may change.
    pub clears: &'static [CacheClass],
    /// What a user should know about this call.
    pub note: &'static str,
}

impl Row {
    /// The values that a row has when nothing else is said.
    pub(super) const BASE: Row = Row {
        nr: 0,
        name: "",
        args: &[],
        disposition: Disposition::GoHome(HomeReason::UnknownCall),
        rules: &[],
        blocking: Blocking::Never,
        quick: &[],
        cache: None,
        clears: &[],
        note: "",
    };
}

/// One command of a call that is a family of calls by itself, such as `ioctl`.
#[derive(Clone, Copy, Debug)]
pub struct SubRow {
    /// The command; for socket options, the level in the upper and the option in the lower 32 bits.
    pub code: u64,
    /// Its name in the header file.
    pub name: &'static str,
    /// The arguments that follow the command.
    pub args: &'static [Arg],
    /// Where it runs.
    pub disposition: Disposition,
    /// How long it may take at home.
    pub blocking: Blocking,
    /// What a user should know about it.
    pub note: &'static str,
}

/// One argument.
#[derive(Clone, Copy, Debug)]
pub struct Arg {
    /// Its name in the manual.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
}

/// What an argument is.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Passed as it is.
    Val(Scalar),
    /// A NUL-terminated string of which the kernel looks at no more than this many bytes, the NUL included.
    Str(u32),
    /// A pointer to a block of memory.
    Buf(Buf),
    /// A NULL-terminated array of pointers to strings (`argv`, `envp`).
    StrArray,
    /// An array of `struct iovec` with the body's direction; the number of entries is argument `count`.
    Iovec {
        /// Index of the argument that holds the number of entries.
        count: u8,
        /// Direction of the bodies.
        dir: Dir,
    },
    /// A `struct msghdr`, for sending (`In`) or receiving (`Out`).
    Msg(Dir),
    /// An array of `struct mmsghdr`; the number of entries is argument `count`.
    Mmsg {
        /// Index of the argument that holds the number of entries.
        count: u8,
        /// Direction of the messages.
        dir: Dir,
    },
    /// A temporary signal mask; its size is argument `size`. It is read here and not sent.
    TempMask {
        /// Index of the argument that holds the size of the mask in bytes.
        size: u8,
    },
    /// `pselect6`'s pair of pointer and size of a temporary signal mask.
    TempMaskPair,
    /// A `struct sigevent` with, for `SIGEV_THREAD`, a cookie behind its value (`mq_notify`).
    MqNotify,
    /// A `struct ifconf` with a buffer behind it (`SIOCGIFCONF`).
    Ifconf,
    /// This argument and those behind it depend on the command: see the sub-table.
    Sub(SubTable),
}

/// How a plain argument is to be understood: the width that the kernel looks at, and how it is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scalar {
    /// A C `int`.
    Int,
    /// A C `unsigned int`.
    Uint,
    /// A C `long`, `off_t` or the like.
    Long,
    /// A C `size_t` or `unsigned long`.
    Size,
    /// A file descriptor, or `AT_FDCWD`.
    Fd,
    /// A set of flags.
    Flags,
    /// Permission bits.
    Mode,
    /// A process, thread or group of processes.
    Pid,
    /// A user or group id.
    Id,
    /// A signal number.
    Signal,
    /// A clock.
    Clock,
    /// An address in the guest that must not reach the home kernel: [`super::gather`] refuses the call. Only calls that
    /// are never forwarded have such arguments, and those whose handler composes the forwarded half itself.
    Addr,
}

impl Scalar {
    /// The value that the kernel takes from a register, sign-extended.
    pub fn value(self, register: u64) -> i64 {
        match self {
            Scalar::Int | Scalar::Fd | Scalar::Pid | Scalar::Signal | Scalar::Clock => {
                i64::from(register as u32 as i32)
            }
            Scalar::Uint | Scalar::Id | Scalar::Mode => i64::from(register as u32),
            Scalar::Long | Scalar::Size | Scalar::Flags | Scalar::Addr => register as i64,
        }
    }
}

/// Direction of a block of memory, from the call's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dir {
    /// The kernel reads it.
    In,
    /// The kernel writes it.
    Out,
    /// Both; or it is written only in part, so that the rest must come back as it was.
    InOut,
}

/// How many bytes a block of memory has, as known before the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Always the same.
    Fixed(u32),
    /// The argument's value.
    Arg(u8),
    /// The argument's value; a large body may be transferred in several calls ([`super::Transfer`]).
    Stream(u8),
    /// The argument's value; where it is larger than `.1` the argument is reduced, which the call allows.
    Clamp(u8, u32),
    /// The argument's value, of which the kernel never touches more than `.1`; the argument stays as it is.
    Limit(u8, u32),
    /// The argument's value and `.1` bytes more.
    Plus(u8, u32),
    /// The argument's value times `.1`.
    Count(u8, u32),
    /// As `Count`, but the argument is reduced to what fits, which the call allows.
    ClampCount(u8, u32),
    /// A set of that many descriptors, in whole 64-bit words.
    FdSet(u8),
    /// What the 32-bit length behind pointer argument `.0` says, of which the kernel never touches more than `.1`.
    Word(u8, u32),
    /// What the block's own first 32-bit word says plus `plus`, at least `min` and at most `max` bytes.
    Head {
        /// Added to the word.
        plus: u32,
        /// Lower bound.
        min: u32,
        /// Upper bound: the kernel refuses more.
        max: u32,
    },
    /// The capability sets that the version in the header behind argument `.0` has.
    CapData(u8),
}

/// When a block has been written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// When the call gave no error.
    Success,
    /// When the result is above zero.
    Positive,
    /// Whatever the result is.
    Always,
    /// When it has other content than before, whatever the result is.
    Changed,
    /// When the call gave no error; after an error as `Changed`.
    SuccessOrChanged,
}

/// How many bytes of a block have been written, as known after the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actual {
    /// All of it.
    Whole,
    /// The result times `scale`, and `plus` more.
    Ret {
        /// Bytes per unit of the result.
        scale: u32,
        /// Bytes in front of them.
        plus: u32,
    },
    /// What the length word that the size came from says now.
    Word,
}

/// A block of memory behind a pointer. A null pointer is always passed as it is: the kernel knows what it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buf {
    /// Direction.
    pub dir: Dir,
    /// Size before the call.
    pub size: Size,
    /// Whether it has been written.
    pub when: When,
    /// How much of it has been written.
    pub actual: Actual,
    /// The effect of the call could not be undone if the result found no place: look before.
    pub early: bool,
    /// The kernel does not mind if the result finds no place.
    pub quiet: bool,
    /// How long the call may wait: all zero, it does not wait at all.
    pub timeout: bool,
}

/// A block that the kernel reads.
pub const fn inp(size: Size) -> Kind {
    Kind::Buf(Buf {
        dir: Dir::In,
        size,
        when: When::Success,
        actual: Actual::Whole,
        early: false,
        quiet: false,
        timeout: false,
    })
}

/// A block that the kernel writes on success, all of it.
pub const fn out(size: Size) -> Kind {
    let actual = if let Size::Word(..) = size {
        Actual::Word
    } else {
        Actual::Whole
    };
    Kind::Buf(Buf {
        dir: Dir::Out,
        size,
        when: When::Success,
        actual,
        early: false,
        quiet: false,
        timeout: false,
    })
}

/// A block that the kernel reads and, on success, writes.
pub const fn inout(size: Size) -> Kind {
    let actual = if let Size::Word(..) = size {
        Actual::Word
    } else {
        Actual::Whole
    };
    Kind::Buf(Buf {
        dir: Dir::InOut,
        size,
        when: When::Success,
        actual,
        early: false,
        quiet: false,
        timeout: false,
    })
}

impl Kind {
    const fn with(self, change: Buf, mask: u8) -> Kind {
        match self {
            Kind::Buf(mut buf) => {
                match mask {
                    0 => buf.when = change.when,
                    1 => buf.actual = change.actual,
                    2 => buf.early = true,
                    3 => buf.quiet = true,
                    _ => buf.timeout = true,
                }
                Kind::Buf(buf)
            }
            other => other,
        }
    }

    const PLAIN: Buf = Buf {
        dir: Dir::Out,
        size: Size::Fixed(0),
        when: When::Success,
        actual: Actual::Whole,
        early: false,
        quiet: false,
        timeout: false,
    };

    /// Written whatever the result is.
    pub const fn always(self) -> Kind {
        self.with(
            Buf {
                when: When::Always,
                ..Kind::PLAIN
            },
            0,
        )
    }

    /// Written only if it is changed.
    pub const fn changed(self) -> Kind {
        self.with(
            Buf {
                when: When::Changed,
                ..Kind::PLAIN
            },
            0,
        )
    }

    /// Written on success, and after an error if it was changed.
    pub const fn or_changed(self) -> Kind {
        self.with(
            Buf {
                when: When::SuccessOrChanged,
                ..Kind::PLAIN
            },
            0,
        )
    }

    /// Written when the result is above zero.
    pub const fn positive(self) -> Kind {
        self.with(
            Buf {
                when: When::Positive,
                ..Kind::PLAIN
            },
            0,
        )
    }

    /// As many bytes as the result says, times `scale`.
    pub const fn ret(self, scale: u32) -> Kind {
        self.with(
            Buf {
                actual: Actual::Ret { scale, plus: 0 },
                ..Kind::PLAIN
            },
            1,
        )
    }

    /// As many bytes as the result says and `plus` in front of them.
    pub const fn ret_plus(self, plus: u32) -> Kind {
        self.with(
            Buf {
                actual: Actual::Ret { scale: 1, plus },
                ..Kind::PLAIN
            },
            1,
        )
    }

    /// Must be known to be writable before the call is made.
    pub const fn early(self) -> Kind {
        self.with(Kind::PLAIN, 2)
    }

    /// A failure to write it is not an error.
    pub const fn quiet(self) -> Kind {
        self.with(Kind::PLAIN, 3)
    }

    /// How long the call may wait.
    pub const fn timeout(self) -> Kind {
        self.with(Kind::PLAIN, 4)
    }
}
