//! Why a process goes home.

/// Why a call makes the process go home.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum HomeReason {
    /// The table has no row for the number.
    UnknownCall = 1,
    /// The sub-table of the call has no row for the command.
    UnknownCommand = 2,
    /// io_uring shares memory with the kernel.
    IoUring = 3,
    /// Linux AIO writes to memory after the call has returned.
    Aio = 4,
    /// Traces or inspects another process.
    OtherProcess = 5,
    /// System V shared memory is mapped into the process.
    SharedMemory = 6,
    /// The kernel asks the process about its page faults.
    UserFault = 7,
    /// Performance counters map memory and count the process itself.
    Perf = 8,
    /// Loads or uses BPF.
    Bpf = 9,
    /// Changes the namespaces that the process is in.
    Namespace = 10,
    /// Changes the mounts, or reads them through a new interface.
    Mount = 11,
    /// Installs a filter that would hit the vessel as well.
    Confinement = 12,
    /// Uses the kernel's keyring.
    Keys = 13,
    /// Administers the machine.
    Administration = 14,
    /// State of the CPU or of the architecture that does not move.
    Hardware = 15,
    /// Memory is locked as a whole, or kept from everybody.
    LockedMemory = 16,
    /// The kernel keeps using the caller's pages after the call has returned.
    ZeroCopy = 17,
    /// Signals are read as data from a descriptor.
    SignalFd = 18,
    /// A call that Linux has removed or never finished.
    Obsolete = 19,
    /// The arguments do not fit into a message and cannot be split.
    TooBig = 20,
    /// A buffer of which only a part is accessible: the kernel at home must see it as it is.
    PartialBuffer = 21,
    /// A data structure with pointers inside that the table does not describe.
    Opaque = 22,
    /// A personality that changes how memory is mapped.
    Personality = 23,
    /// Reads or changes the memory of another process, which has to be at home, too.
    OtherMemory = 24,
}

impl HomeReason {
    /// Every reason, in the order of their numbers.
    pub const ALL: [HomeReason; 24] = {
        use HomeReason::*;
        [
            UnknownCall,
            UnknownCommand,
            IoUring,
            Aio,
            OtherProcess,
            SharedMemory,
            UserFault,
            Perf,
            Bpf,
            Namespace,
            Mount,
            Confinement,
            Keys,
            Administration,
            Hardware,
            LockedMemory,
            ZeroCopy,
            SignalFd,
            Obsolete,
            TooBig,
            PartialBuffer,
            Opaque,
            Personality,
            OtherMemory,
        ]
    };

    /// The reason with this number, as it travels.
    pub fn from_number(number: u8) -> Option<HomeReason> {
        Self::ALL.get(usize::from(number).checked_sub(1)?).copied()
    }

    /// The reason in a few words, for users.
    pub fn text(self) -> &'static str {
        match self {
            HomeReason::UnknownCall => "unknown system call",
            HomeReason::UnknownCommand => "unknown command of a system call",
            HomeReason::IoUring => "io_uring",
            HomeReason::Aio => "asynchronous I/O",
            HomeReason::OtherProcess => "works on another process",
            HomeReason::SharedMemory => "shared memory",
            HomeReason::UserFault => "userfaultfd",
            HomeReason::Perf => "performance counters",
            HomeReason::Bpf => "BPF",
            HomeReason::Namespace => "namespaces",
            HomeReason::Mount => "mounts",
            HomeReason::Confinement => "confines itself",
            HomeReason::Keys => "kernel keyring",
            HomeReason::Administration => "administers the machine",
            HomeReason::Hardware => "CPU state that does not move",
            HomeReason::LockedMemory => "locked memory",
            HomeReason::ZeroCopy => "zero-copy transfer",
            HomeReason::SignalFd => "signalfd",
            HomeReason::Obsolete => "obsolete system call",
            HomeReason::TooBig => "arguments too big to send",
            HomeReason::PartialBuffer => "buffer only partly accessible",
            HomeReason::Opaque => "data with pointers inside",
            HomeReason::Personality => "personality",
            HomeReason::OtherMemory => "works on the memory of another process",
        }
    }
}
