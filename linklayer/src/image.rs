//! The image of a process: what is taken from it where it stops and given to it where it goes on.
//!
//! These are wire types. An image that came from the other end is hostile until [`ProcessImage::validate`] accepted it:
//! afterwards its areas are sorted, page-aligned, disjoint, inside user space and outside [`RESERVED`], and every list is
//! bounded. Page contents do not travel in the image.

use std::ops::Range;

use bincode::{Decode, Encode};
use thiserror::Error;

/// Size of a page in bytes on x86_64.
pub const PAGE: u64 = 4096;
/// First address that user space cannot map (47-bit address space, with the guard page the kernel keeps).
pub const USER_END: u64 = 0x7fff_ffff_f000;
/// Addresses that a vessel keeps for itself (stub page and arena segments): no area of an image may lie there.
pub const RESERVED: Range<u64> = 0x0fff_ffff_0000..0x1001_0000_0000;
/// Most areas of one image: the kernel's default vm.max_map_count.
pub const MAX_AREAS: usize = 65_530;
/// Most threads of one image.
pub const MAX_THREADS: usize = 32_768;
/// Most bytes of one thread's extended register state (AMX included, with room).
pub const MAX_XSTATE: usize = 16 * 1024;
/// Most bytes of the auxiliary vector.
pub const MAX_AUXV: usize = 4096;
/// Most bytes of a vDSO.
pub const MAX_VDSO: usize = 64 * 1024;
/// Most pending signals of one queue.
pub const MAX_PENDING: usize = 16_384;
/// Number of signals of x86_64 Linux (1..=64).
pub const SIGNALS: usize = 64;

/// Why an image was not accepted. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ImageError {
    /// A list is longer than its bound.
    #[error("{what} of the image has {len} elements, at most {max} are accepted")]
    TooLong {
        /// which list
        what: &'static str,
        /// its length
        len: usize,
        /// its bound
        max: usize,
    },
    /// An area is empty, misaligned, outside user space, or has unknown bits.
    #[error("area {start:#x}-{end:#x} is malformed")]
    Area {
        /// first address
        start: u64,
        /// address after the last
        end: u64,
    },
    /// Two areas overlap or are out of order.
    #[error("area {start:#x}-{end:#x} overlaps its predecessor")]
    Overlap {
        /// first address
        start: u64,
        /// address after the last
        end: u64,
    },
    /// An area lies where the vessel's stub and arena are.
    #[error("area {start:#x}-{end:#x} lies in the reserved range")]
    Reserved {
        /// first address
        start: u64,
        /// address after the last
        end: u64,
    },
    /// No thread, two threads with one id, an id below 1, or the process's own id behind others.
    #[error("the thread list is malformed at tid {tid}")]
    Threads {
        /// the offending id
        tid: i32,
    },
}

/// Protection of an area: bits of PROT_READ, PROT_WRITE, PROT_EXEC (mmap(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Encode, Decode)]
pub struct Prot(pub u8);

impl Prot {
    /// Bit of readable areas.
    pub const READ: u8 = 1;
    /// Bit of writable areas.
    pub const WRITE: u8 = 2;
    /// Bit of executable areas.
    pub const EXEC: u8 = 4;

    /// May be read.
    pub fn readable(self) -> bool {
        self.0 & Self::READ != 0
    }
    /// May be written.
    pub fn writable(self) -> bool {
        self.0 & Self::WRITE != 0
    }
    /// May be executed.
    pub fn executable(self) -> bool {
        self.0 & Self::EXEC != 0
    }
}

/// What else is to be known of an area (the VmFlags of proc_pid_smaps(5) that a process can set).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Encode, Decode)]
pub struct AreaFlags(pub u32);

impl AreaFlags {
    /// MAP_SHARED.
    pub const SHARED: u32 = 1;
    /// Grows downwards (the main stack, MAP_GROWSDOWN).
    pub const GROWSDOWN: u32 = 1 << 1;
    /// MAP_NORESERVE: not accounted.
    pub const NORESERVE: u32 = 1 << 2;
    /// mlock(2)ed.
    pub const LOCKED: u32 = 1 << 3;
    /// MADV_DONTFORK.
    pub const DONTFORK: u32 = 1 << 4;
    /// MADV_WIPEONFORK.
    pub const WIPEONFORK: u32 = 1 << 5;
    /// MADV_DONTDUMP.
    pub const DONTDUMP: u32 = 1 << 6;
    /// MADV_HUGEPAGE.
    pub const HUGEPAGE: u32 = 1 << 7;
    /// MADV_NOHUGEPAGE.
    pub const NOHUGEPAGE: u32 = 1 << 8;
    /// MADV_MERGEABLE.
    pub const MERGEABLE: u32 = 1 << 9;
    /// MADV_SEQUENTIAL.
    pub const SEQUENTIAL: u32 = 1 << 10;
    /// MADV_RANDOM.
    pub const RANDOM: u32 = 1 << 11;
    /// mseal(2)ed.
    pub const SEALED: u32 = 1 << 12;
    /// Has guard regions (MADV_GUARD_INSTALL).
    pub const GUARDED: u32 = 1 << 13;
    /// Huge pages of hugetlbfs.
    pub const HUGETLB: u32 = 1 << 14;
    /// Registered with userfaultfd.
    pub const UFFD: u32 = 1 << 15;
    /// Shared, and can be made writable (mprotect(2)).
    pub const MAY_WRITE: u32 = 1 << 16;
    /// Every known bit.
    pub const ALL: u32 = (1 << 17) - 1;

    /// Whether the bit (or all of the bits) `flag` is set.
    pub fn has(self, flag: u32) -> bool {
        self.0 & flag == flag
    }
}

/// What backs an area.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode)]
pub enum AreaKind {
    /// Private anonymous memory (heap, stacks, bss ...).
    Anon,
    /// A mapping of a file, named by the job's id for this version of the file.
    File {
        /// the job's id of the file version
        file_id: u64,
        /// where the area begins in the file, bytes
        offset: u64,
    },
    /// Shared anonymous memory (MAP_SHARED|MAP_ANONYMOUS, or a System V segment).
    SharedAnon {
        /// the inode behind it: equal ids of one capture are the same memory
        id: u64,
        /// where the area begins in it, bytes
        offset: u64,
        /// attached with shmat(2)
        sysv: bool,
    },
    /// A file mapped shared and writable, which home holds for the processes that map it ([`crate::wire::HeldFile`]).
    Held {
        /// its number
        id: u64,
        /// where the area begins in the file, bytes
        offset: u64,
    },
    /// The kernel's vDSO code.
    Vdso,
    /// The vDSO's data.
    Vvar,
    /// The vDSO's per-hypervisor clock pages.
    VvarVclock,
}

/// One memory area: a VMA of /proc/PID/maps (without [vsyscall], which is not a real one).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode)]
pub struct Area {
    /// first address, page-aligned
    pub start: u64,
    /// address after the last, page-aligned
    pub end: u64,
    /// protection
    pub prot: Prot,
    /// flags
    pub flags: AreaFlags,
    /// what backs it
    pub kind: AreaKind,
}

impl Area {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }
    /// Never true for an area of a valid image.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }
    /// Shared with whoever maps the same object.
    pub fn shared(&self) -> bool {
        self.flags.has(AreaFlags::SHARED)
    }
    /// The addresses as a range.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }
    /// Whether it is a part of the vDSO, whose content belongs to the kernel that runs it.
    pub fn is_kernel(&self) -> bool {
        matches!(self.kind, AreaKind::Vdso | AreaKind::Vvar | AreaKind::VvarVclock)
    }
}

/// The mm fields that PR_SET_MM_MAP sets (prctl(2)): addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
#[allow(missing_docs)] // the names are the kernel's
pub struct MmFields {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// General registers: struct user_regs_struct of sys/user.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
#[repr(C)]
#[allow(missing_docs)] // the names are the processor's
pub struct Regs {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

impl Regs {
    /// The six arguments of the system call that these registers ask for (syscall(2)).
    pub fn call_args(&self) -> [u64; 6] {
        [self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9]
    }

    /// What tells one wait of a thread from another, of registers in front of its call.
    pub fn marks(&self) -> [u64; 8] {
        let [a, b, c, d, e, f] = self.call_args();
        [self.rip, self.rsp, a, b, c, d, e, f]
    }

    /// Sets the number and the six arguments of a system call.
    pub fn set_call(&mut self, nr: u64, args: [u64; 6]) {
        self.rax = nr;
        [self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9] = args;
    }
}

/// A siginfo_t as the kernel lays it out (128 bytes; sigaction(2)).
///
/// On the wire it ends with its last byte that is not zero: most take a quarter of it, and thousands may be pending.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct SigInfo(pub [u8; 128]);

impl Encode for SigInfo {
    fn encode<E: bincode::enc::Encoder>(&self, encoder: &mut E) -> Result<(), bincode::error::EncodeError> {
        let used = self.0.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        self.0[..used].encode(encoder)
    }
}

impl<Context> Decode<Context> for SigInfo {
    fn decode<D: bincode::de::Decoder<Context = Context>>(
        decoder: &mut D,
    ) -> Result<Self, bincode::error::DecodeError> {
        let mut info = SigInfo::default();
        let len = usize::try_from(u64::decode(decoder)?).unwrap_or(usize::MAX);
        let used = info
            .0
            .get_mut(..len)
            .ok_or(bincode::error::DecodeError::Other("a siginfo_t has 128 bytes"))?;
        for byte in used {
            *byte = u8::decode(decoder)?;
        }
        Ok(info)
    }
}

bincode::impl_borrow_decode!(SigInfo);

impl Default for SigInfo {
    fn default() -> Self {
        SigInfo([0; 128])
    }
}

impl std::fmt::Debug for SigInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "SigInfo(signo {}, code {}, pid {})",
            self.signo(),
            self.code(),
            self.pid()
        )
    }
}

impl SigInfo {
    fn word(&self, at: usize) -> i32 {
        i32::from_ne_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }
    /// si_signo.
    pub fn signo(&self) -> i32 {
        self.word(0)
    }
    /// si_errno.
    pub fn errno(&self) -> i32 {
        self.word(4)
    }
    /// si_code.
    pub fn code(&self) -> i32 {
        self.word(8)
    }
    /// si_pid, where the code has one.
    pub fn pid(&self) -> i32 {
        self.word(16)
    }
    /// si_uid, where the code has one.
    pub fn uid(&self) -> u32 {
        self.word(20) as u32
    }
    /// si_addr of a fault.
    pub fn addr(&self) -> u64 {
        u64::from(self.word(16) as u32) | u64::from(self.word(20) as u32) << 32
    }
    /// A siginfo as kill(2) makes it.
    pub fn user(signo: i32, code: i32, pid: i32, uid: u32) -> Self {
        let mut info = SigInfo::default();
        info.0[0..4].copy_from_slice(&signo.to_ne_bytes());
        info.0[8..12].copy_from_slice(&code.to_ne_bytes());
        info.0[16..20].copy_from_slice(&pid.to_ne_bytes());
        info.0[20..24].copy_from_slice(&uid.to_ne_bytes());
        info
    }
}

/// The kernel's struct sigaction of one signal (rt_sigaction(2)); the default is SIG_DFL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
#[repr(C)]
pub struct SigAction {
    /// 0 = SIG_DFL, 1 = SIG_IGN, else an address
    pub handler: u64,
    /// SA_*
    pub flags: u64,
    /// address of the return trampoline
    pub restorer: u64,
    /// signals blocked while the handler runs
    pub mask: u64,
}

/// Alternate signal stack (sigaltstack(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub struct AltStack {
    /// lowest address
    pub sp: u64,
    /// SS_DISABLE (also when it was disabled, but not when there never was one), SS_AUTODISARM (SS_ONSTACK is derived from
    /// the stack pointer)
    pub flags: u32,
    /// bytes
    pub size: u64,
}

/// A registration with rseq(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Rseq {
    /// address of the struct rseq
    pub pointer: u64,
    /// its size in bytes
    pub size: u32,
    /// the signature before abort handlers
    pub signature: u32,
    /// registration flags
    pub flags: u32,
}

/// A call that was interrupted for the capture and will be made again by the thread when it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Rewound {
    /// number of the call
    pub nr: u32,
    /// the kernel's raw code with which it was interrupted: -512, -513, -514 or -516. With -516 (ERESTART_RESTARTBLOCK)
    /// the time left is not in the image: who knows it must put it into the arguments.
    pub code: i32,
}

/// One thread.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ThreadImage {
    /// thread id
    pub tid: i32,
    /// name, at most 15 bytes
    pub comm: Vec<u8>,
    /// general registers; orig_rax is -1 (an interrupted call is rewound)
    pub regs: Regs,
    /// NT_X86_XSTATE register set, empty: initial state
    pub xstate: Vec<u8>,
    /// blocked signals, bit signo-1
    pub sigmask: u64,
    /// alternate signal stack
    pub altstack: AltStack,
    /// robust futex list: head address and length (get_robust_list(2)); 0 = none
    pub robust_list: (u64, u64),
    /// address cleared and woken at the thread's exit (set_tid_address(2)); 0 = none
    pub clear_child_tid: u64,
    /// rseq registration
    pub rseq: Option<Rseq>,
    /// pending signals directed at the thread
    pub pending: Vec<SigInfo>,
    /// the interrupted call, if there was one
    pub rewound: Option<Rewound>,
    /// the sleep that it will make again, when that is one of a known length
    pub sleep: Option<Sleep>,
}

impl ThreadImage {
    /// The registers with which it goes on where it is built, in a stop before the kernel looks for signals. A call that was
    /// interrupted is left to that kernel, which makes it again, or ends it if a signal's handler runs first (signal(7);
    /// arch/x86/kernel/signal.c, handle_signal). A signal that came while the thread stood still does to its call what it does natively.
    pub fn resumed(&self) -> Regs {
        let code = match self.rewound.map(|rewound| rewound.code) {
            Some(code @ (-514..=-512)) => code,
            // The restart block stayed behind; both end with EINTR when a handler runs.
            Some(-516) => -514,
            _ => return self.regs,
        };
        Regs {
            rip: self.regs.rip.wrapping_add(2),
            orig_rax: self.regs.rax,
            rax: i64::from(code) as u64,
            ..self.regs
        }
    }
}

/// A wait with a relative timeout that a thread makes again when it goes on. The timeout is to be set to what is left then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Sleep {
    /// where its timeout is
    pub place: Place,
    /// when it ends by home's CLOCK_MONOTONIC, nanoseconds
    pub until_ns: i64,
}

/// Where a call has its timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Place {
    /// in a `struct timespec` at this address
    Timespec(u64),
    /// in this argument of the call, milliseconds
    Milliseconds(u8),
}

impl Sleep {
    /// What the timespec is to hold at this time of home's CLOCK_MONOTONIC.
    pub fn left(&self, now_ns: i64) -> [u8; 16] {
        let left_ns = self.until_ns.saturating_sub(now_ns).max(0);
        let mut bytes = [0; 16];
        let (seconds, nanoseconds) = bytes.split_at_mut(8);
        seconds.copy_from_slice(&(left_ns / 1_000_000_000).to_ne_bytes());
        nanoseconds.copy_from_slice(&(left_ns % 1_000_000_000).to_ne_bytes());
        bytes
    }

    /// Puts what is left at this time of home's CLOCK_MONOTONIC into the registers of its call, if it is there and the call has not been
    /// made yet.
    pub fn put_left(&self, regs: &mut Regs, now_ns: i64) {
        let Place::Milliseconds(argument) = self.place else {
            return;
        };
        if regs.orig_rax != u64::MAX {
            return;
        }
        let left_ns = self.until_ns.saturating_sub(now_ns).max(0) as u64;
        let mut args = regs.call_args();
        // Not earlier, and not negative, which is for ever.
        if let Some(arg) = args.get_mut(usize::from(argument)) {
            *arg = left_ns.div_ceil(1_000_000).min(i32::MAX as u64);
        }
        regs.set_call(regs.rax, args);
    }
}

/// Where a CPU has a component of the extended register state in XSAVE's standard form (CPUID leaf 0xd).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct XstateComponent {
    /// its bit
    pub number: u8,
    /// where it begins, bytes
    pub offset: u32,
    /// bytes
    pub size: u32,
}

/// A resource limit (getrlimit(2)); u64::MAX = infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Limit {
    /// RLIMIT_*
    pub resource: u32,
    /// soft limit
    pub soft: u64,
    /// hard limit
    pub hard: u64,
}

/// What the clocks of a node show that continue home's on others, nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub struct Clocks {
    /// CLOCK_MONOTONIC
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME
    pub boottime_ns: i64,
}

impl std::ops::Sub for Clocks {
    type Output = Clocks;

    /// How far the first ones are ahead.
    fn sub(self, other: Clocks) -> Clocks {
        Clocks {
            monotonic_ns: self.monotonic_ns.saturating_sub(other.monotonic_ns),
            boottime_ns: self.boottime_ns.saturating_sub(other.boottime_ns),
        }
    }
}

/// A whole process, without the contents of its pages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ProcessImage {
    /// process id
    pub pid: i32,
    /// memory areas by address
    pub areas: Vec<Area>,
    /// mm fields
    pub mm: MmFields,
    /// auxiliary vector
    pub auxv: Vec<u8>,
    /// threads; the leader first, if it lives
    pub threads: Vec<ThreadImage>,
    /// signal dispositions of the signals 1..=64, or empty: all default
    pub actions: Vec<SigAction>,
    /// pending signals directed at the process
    pub pending: Vec<SigInfo>,
    /// resource limits
    pub rlimits: Vec<Limit>,
    /// personality(2)
    pub personality: u32,
    /// PR_GET_DUMPABLE
    pub dumpable: u32,
    /// how the CPU lays out the threads' extended register state
    pub xstate_layout: Vec<XstateComponent>,
    /// the bytes of the vDSO area, so that a node with another kernel can take its place; empty: not told
    pub vdso: Vec<u8>,
}

impl ProcessImage {
    /// The held files that it maps, once each ([`AreaKind::Held`]).
    pub fn held(&self) -> std::collections::BTreeSet<u64> {
        let held = |area: &Area| match area.kind {
            AreaKind::Held { id, .. } => Some(id),
            _ => None,
        };
        self.areas.iter().filter_map(held).collect()
    }

    /// Checks an image that came from elsewhere. See the module's text for what holds afterwards.
    pub fn validate(&self) -> Result<(), ImageError> {
        bound("auxv", self.auxv.len(), MAX_AUXV)?;
        bound("threads", self.threads.len(), MAX_THREADS)?;
        bound("actions", self.actions.len(), SIGNALS)?;
        bound("pending", self.pending.len(), MAX_PENDING)?;
        bound("rlimits", self.rlimits.len(), 32)?;
        bound("xstate_layout", self.xstate_layout.len(), 64)?;
        bound("vdso", self.vdso.len(), MAX_VDSO)?;
        validate_areas(&self.areas)?;
        let mut tids = std::collections::HashSet::with_capacity(self.threads.len());
        for thread in &self.threads {
            bound("xstate", thread.xstate.len(), MAX_XSTATE)?;
            bound("comm", thread.comm.len(), 15)?;
            bound("pending", thread.pending.len(), MAX_PENDING)?;
            if thread.tid < 1 || !tids.insert(thread.tid) {
                return Err(ImageError::Threads { tid: thread.tid });
            }
        }
        let leader_behind = self.threads.iter().skip(1).any(|t| t.tid == self.pid);
        if self.pid < 1 || self.threads.is_empty() || leader_behind {
            return Err(ImageError::Threads { tid: self.pid });
        }
        Ok(())
    }

    /// Whether its first thread has ended before others: then it is not among the threads.
    pub fn leader_ended(&self) -> bool {
        self.threads.first().is_none_or(|t| t.tid != self.pid)
    }

    /// A living thread, by which its memory can be reached.
    pub fn reached_by(&self) -> i32 {
        self.threads.first().map_or(self.pid, |t| t.tid)
    }
}

/// Checks areas that came from elsewhere: what [`ProcessImage::validate`] says about those of an image.
///
/// # Errors
/// What is wrong with them.
pub fn validate_areas(areas: &[Area]) -> Result<(), ImageError> {
    bound("areas", areas.len(), MAX_AREAS)?;
    let mut last_end = 0;
    for area in areas {
        let (start, end) = (area.start, area.end);
        let aligned = start % PAGE == 0 && end % PAGE == 0 && start < end && end <= USER_END;
        let known = area.prot.0 <= 7 && area.flags.0 & !AreaFlags::ALL == 0;
        let offset_ok = match area.kind {
            AreaKind::File { offset, .. }
            | AreaKind::SharedAnon { offset, .. }
            | AreaKind::Held { offset, .. } => {
                offset % PAGE == 0
                    && offset
                        .checked_add(end.wrapping_sub(start))
                        .is_some_and(|e| e <= i64::MAX as u64)
            }
            _ => true,
        };
        if !aligned || !known || !offset_ok {
            return Err(ImageError::Area { start, end });
        }
        if start < last_end {
            return Err(ImageError::Overlap { start, end });
        }
        if start < RESERVED.end && end > RESERVED.start {
            return Err(ImageError::Reserved { start, end });
        }
        last_end = end;
    }
    Ok(())
}

fn bound(what: &'static str, len: usize, max: usize) -> Result<(), ImageError> {
    if len > max {
        Err(ImageError::TooLong { what, len, max })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(tid: i32) -> ThreadImage {
        ThreadImage {
            tid,
            comm: b"guest".to_vec(),
            regs: Regs::default(),
            xstate: vec![0; 576],
            sigmask: 0,
            altstack: AltStack::default(),
            robust_list: (0, 0),
            clear_child_tid: 0,
            rseq: None,
            pending: Vec::new(),
            rewound: None,
            sleep: None,
        }
    }

    fn area(start: u64, end: u64) -> Area {
        Area {
            start,
            end,
            prot: Prot(3),
            flags: AreaFlags(0),
            kind: AreaKind::Anon,
        }
    }

    fn image(areas: Vec<Area>) -> ProcessImage {
        ProcessImage {
            pid: 7,
            areas,
            mm: MmFields::default(),
            auxv: Vec::new(),
            threads: vec![thread(7), thread(8)],
            actions: vec![SigAction::default(); SIGNALS],
            pending: Vec::new(),
            rlimits: Vec::new(),
            personality: 0,
            dumpable: 1,
            xstate_layout: Vec::new(),
            vdso: Vec::new(),
        }
    }

    #[test]
    fn a_sound_image_is_accepted_and_survives_the_codec() {
        let image = image(vec![area(0x1000, 0x3000), area(0x3000, 0x5000)]);
        image.validate().unwrap();
        let bytes = bincode::encode_to_vec(&image, bincode::config::standard()).unwrap();
        let (back, used): (ProcessImage, _) =
            bincode::decode_from_slice(&bytes, bincode::config::standard()).unwrap();
        assert_eq!(used, bytes.len());
        assert_eq!(back, image);
    }

    #[test]
    fn pending_signals_take_what_they_need() {
        let config = bincode::config::standard();
        let mut full = SigInfo([7; 128]);
        full.0[3] = 0;
        for (info, most) in [
            (SigInfo::user(10, 0, 77, 1000), 25),
            (SigInfo::default(), 1),
            (full, 129),
        ] {
            let bytes = bincode::encode_to_vec(info, config).unwrap();
            assert!(bytes.len() <= most, "{} bytes", bytes.len());
            let (back, used): (SigInfo, _) = bincode::decode_from_slice(&bytes, config).unwrap();
            assert_eq!((back, used), (info, bytes.len()));
        }
        let long = bincode::encode_to_vec(vec![1u8; 129], config).unwrap();
        assert!(bincode::decode_from_slice::<SigInfo, _>(&long, config).is_err());
    }

    #[test]
    fn an_interrupted_call_is_the_kernels_to_restart() {
        let mut image = thread(7);
        image.regs.rip = 0x1000;
        image.regs.orig_rax = u64::MAX;
        image.regs.set_call(128, [1, 2, 3, 4, 5, 6]);
        assert_eq!(image.resumed(), image.regs);
        for (code, resumed) in [(-512, -512), (-513, -513), (-514, -514), (-516, -514)] {
            image.rewound = Some(Rewound { nr: 35, code });
            let regs = image.resumed();
            assert_eq!((regs.rip, regs.orig_rax, regs.rax as i64), (0x1002, 128, resumed));
            assert_eq!(regs.call_args(), [1, 2, 3, 4, 5, 6]);
        }
        // What a peer makes up is no result of a call.
        image.rewound = Some(Rewound { nr: 35, code: -515 });
        assert_eq!(image.resumed(), image.regs);
    }

    #[test]
    fn malformed_areas_are_refused() {
        let cases = [
            vec![area(0x1001, 0x3000)],
            vec![area(0x3000, 0x3000)],
            vec![area(0x4000, 0x3000)],
            vec![area(0x1000, 0x3000), area(0x2000, 0x4000)],
            vec![area(0x3000, 0x4000), area(0x1000, 0x2000)],
            vec![area(0x1000, !0xfff)],
            vec![area(RESERVED.start, RESERVED.start + 0x1000)],
            vec![Area {
                prot: Prot(8),
                ..area(0x1000, 0x2000)
            }],
            vec![Area {
                flags: AreaFlags(1 << 31),
                ..area(0x1000, 0x2000)
            }],
            vec![Area {
                kind: AreaKind::File {
                    file_id: 1,
                    offset: !0xfff,
                },
                ..area(0x1000, 0x2000)
            }],
        ];
        for areas in cases {
            assert!(image(areas.clone()).validate().is_err(), "{areas:?}");
        }
    }

    #[test]
    fn malformed_thread_lists_are_refused() {
        let mut twice = image(vec![]);
        twice.threads = vec![thread(7), thread(7)];
        assert!(twice.validate().is_err());
        let mut none = image(vec![]);
        none.threads.clear();
        assert!(none.validate().is_err());
        let mut other = image(vec![]);
        other.pid = 8;
        assert!(other.validate().is_err());
        let mut fat = image(vec![]);
        fat.threads[0].xstate = vec![0; MAX_XSTATE + 1];
        assert!(fat.validate().is_err());
    }
}
