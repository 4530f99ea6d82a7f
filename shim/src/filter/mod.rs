//! The filter under which guests run: what the table calls local passes, the clone family stops for the tracer, everything else is
//! a notification (seccomp(2), seccomp_unotify(2)).
//!
//! The program has two parts. The *head* looks at the architecture and the number alone as long as it can: the kernel recognises
//! that and keeps the numbers that always pass in a bitmap, so that they cost next to nothing. The *body*, with the rules that look
//! at arguments, is libseccomp's.
//!
//! **The pass key.** To inspect, capture or finish a guest the supervisor makes calls in its name that a guest may not make. Such a
//! call is let through when its sixth argument register holds a random number that is drawn for each installation, so only calls
//! with at most five arguments can be passed. The number is in the kernel and in the supervisor, and in the guest's registers only
//! while all of its threads are stopped. A passing *address* instead would be open to a guest that maps code there; a pass is bound
//! to an address in addition where one is given.

mod install;

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::sync::OnceLock;

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use linklayer::syscall::{Cmp, Disposition, LocalRule, SplitKind, local_rule, rows};
use thiserror::Error;

pub use install::{InstallError, Installed, install};

/// Data of SECCOMP_RET_TRACE stops (`ptrace::Stop::Seccomp`) for the clone family.
pub const TRACE_CLONE: u16 = 1;
/// ... and for the wait for signals.
pub const TRACE_WAIT: u16 = 2;

/// Why a filter could not be made.
#[derive(Debug, Error)]
pub enum FilterError {
    /// libseccomp refused.
    #[error("libseccomp: {0}")]
    Seccomp(#[from] libseccomp::error::SeccompError),
    /// The program could not be taken from libseccomp, or no random number was to be had.
    #[error("{op}: {source}")]
    Os {
        /// the call
        op: &'static str,
        /// the kernel's error
        source: std::io::Error,
    },
    /// It is longer than the kernel accepts (4096 instructions).
    #[error("the filter has {0} instructions")]
    TooLong(usize),
}

/// What happens to calls that are not of the x86-64 architecture (`int 0x80`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ForeignArch {
    /// A notification like all others, which names the architecture.
    #[default]
    Notify,
    /// The process dies of SIGSYS.
    Kill,
}

/// Which calls pass, and which stop for the tracer. All others are notifications.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Numbers that pass whatever their arguments are.
    pub allow: Vec<u32>,
    /// Numbers that pass when all conditions of one of the lists hold.
    pub allow_when: BTreeMap<u32, Vec<Vec<Cmp>>>,
    /// Numbers that give a ptrace stop, with its data: [`TRACE_CLONE`] or [`TRACE_WAIT`].
    pub trace: BTreeMap<u32, u16>,
    /// Calls of other architectures.
    pub foreign: ForeignArch,
}

impl Rules {
    /// The rules of the system call table.
    pub fn from_table() -> Rules {
        let mut rules = Rules::default();
        for row in rows() {
            let trace = match row.disposition {
                Disposition::Split(SplitKind::Clone) => Some(TRACE_CLONE),
                Disposition::Split(SplitKind::SignalWait) => Some(TRACE_WAIT),
                _ => None,
            };
            if let Some(data) = trace {
                rules.trace.insert(row.nr, data);
                continue;
            }
            match local_rule(row) {
                LocalRule::Always => rules.allow.push(row.nr),
                LocalRule::When(lists) => drop(rules.allow_when.insert(row.nr, lists)),
                LocalRule::Never => {}
            }
        }
        rules
    }
}

/// Whether a call with this number can become a notification (depending on its arguments, for some).
pub fn is_notified(nr: u32) -> bool {
    static RULES: OnceLock<Rules> = OnceLock::new();
    let rules = RULES.get_or_init(Rules::from_table);
    !rules.allow.contains(&nr) && !rules.trace.contains_key(&nr)
}

/// One instruction of classic BPF (struct sock_filter).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// BPF_* code
    pub code: u16,
    /// instructions to skip when a comparison is true
    pub if_true: u8,
    /// instructions to skip when it is false
    pub if_false: u8,
    /// operand
    pub k: u32,
}

const fn op(code: u16, k: u32) -> Instruction {
    Instruction {
        code,
        if_true: 0,
        if_false: 0,
        k,
    }
}

const LD_ABS: u16 = 0x20;
const JA: u16 = 0x05;
const JEQ: u16 = 0x15;
const JGE: u16 = 0x35;
const RET: u16 = 0x06;
const RET_ALLOW: u32 = 0x7fff_0000;
const RET_NOTIFY: u32 = 0x7fc0_0000;
const RET_KILL_PROCESS: u32 = 0x8000_0000;
const ARCH_X86_64: u32 = 0xc000_003e;
const X32_BIT: u32 = 0x4000_0000;
// struct seccomp_data.
const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ADDRESS: u32 = 8;
const OFFSET_ARG5: u32 = 16 + 5 * 8;
/// Jumps reach 255 instructions; the list is cut into pieces with a return of their own.
const PIECE: usize = 200;
/// BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;

/// What lets a call of the supervisor's own pass. See the module's text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    key: u64,
    address: Option<u64>,
}

impl Pass {
    /// A random pass. With `address`, calls must also come from the `syscall` instruction there.
    ///
    /// # Errors
    /// None in practice (getrandom(2) of 8 bytes).
    pub fn random(address: Option<u64>) -> Result<Pass, FilterError> {
        let mut bytes = [0u8; 8];
        loop {
            // SAFETY: the kernel writes at most 8 bytes.
            let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
            if got == 8 {
                break;
            }
            let source = std::io::Error::last_os_error();
            if got >= 0 || source.kind() == std::io::ErrorKind::Interrupted {
                continue;
            }
            return Err(FilterError::Os {
                op: "getrandom",
                source,
            });
        }
        Ok(Pass {
            // No small number that an unused register might hold by itself.
            key: u64::from_ne_bytes(bytes) | 1 << 63,
            address,
        })
    }

    /// The value that the sixth argument register must hold.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// The arguments of a call with `N` of them, at most five, that pass.
    pub fn args<const N: usize>(&self, args: [u64; N]) -> [u64; 6] {
        const { assert!(N <= 5) };
        let mut all = [0; 6];
        all[..N].copy_from_slice(&args);
        all[5] = self.key;
        all
    }
}

impl std::fmt::Debug for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key stays out of logs.
        f.debug_struct("Pass")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// A filter, ready to be installed.
#[derive(Debug, Clone)]
pub struct Program {
    instructions: Vec<Instruction>,
}

impl Program {
    /// Makes a filter. The part that does not depend on the pass takes libseccomp about a millisecond: see [`Template`].
    ///
    /// # Errors
    /// See [`FilterError`].
    pub fn new(rules: &Rules, pass: Option<&Pass>) -> Result<Program, FilterError> {
        Template::new(rules)?.program(pass)
    }

    /// The instructions.
    pub fn instructions(&self) -> &[Instruction] {
        &self.instructions
    }

    /// The instructions as the kernel reads them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.instructions.len() * 8);
        for i in &self.instructions {
            bytes.extend_from_slice(&i.code.to_ne_bytes());
            bytes.extend_from_slice(&[i.if_true, i.if_false]);
            bytes.extend_from_slice(&i.k.to_ne_bytes());
        }
        bytes
    }
}

/// A filter without a pass, from which filters with one are made cheaply.
#[derive(Debug, Clone)]
pub struct Template {
    head: Vec<Instruction>,
    body: Vec<Instruction>,
}

impl Template {
    /// The template of the system call table's rules, made at the first call.
    ///
    /// # Errors
    /// See [`FilterError`].
    pub fn of_table() -> Result<&'static Template, FilterError> {
        static TEMPLATE: OnceLock<Template> = OnceLock::new();
        if let Some(template) = TEMPLATE.get() {
            return Ok(template);
        }
        let made = Template::new(&Rules::from_table())?;
        Ok(TEMPLATE.get_or_init(|| made))
    }

    /// A template of other rules.
    ///
    /// # Errors
    /// See [`FilterError`].
    pub fn new(rules: &Rules) -> Result<Template, FilterError> {
        Ok(Template {
            head: head(rules),
            body: body(rules)?,
        })
    }

    /// A filter. Without a pass, nothing but the rules lets a call through.
    ///
    /// # Errors
    /// [`FilterError::TooLong`].
    pub fn program(&self, pass: Option<&Pass>) -> Result<Program, FilterError> {
        let mut instructions = self.head.clone();
        if let Some(pass) = pass {
            let mut words = vec![(OFFSET_ARG5, pass.key)];
            if let Some(address) = pass.address {
                // The address that is seen is the one after the instruction.
                words.push((OFFSET_ADDRESS, address.wrapping_add(2)));
            }
            let comparisons: Vec<(u32, u32)> = words
                .iter()
                .flat_map(|(offset, word)| [(*offset, *word as u32), (offset + 4, (word >> 32) as u32)])
                .collect();
            for (index, (offset, value)) in comparisons.iter().enumerate() {
                let after = (comparisons.len() - 1 - index) * 2 + 1;
                instructions.push(op(LD_ABS, *offset));
                instructions.push(Instruction {
                    code: JEQ,
                    if_true: 0,
                    if_false: after as u8,
                    k: *value,
                });
            }
            instructions.push(op(RET, RET_ALLOW));
        }
        instructions.extend_from_slice(&self.body);
        if instructions.len() > MAX_INSTRUCTIONS {
            return Err(FilterError::TooLong(instructions.len()));
        }
        Ok(Program { instructions })
    }
}

/// What is decided by architecture and number. Falls through to what follows it.
fn head(rules: &Rules) -> Vec<Instruction> {
    let foreign = match rules.foreign {
        ForeignArch::Notify => RET_NOTIFY,
        ForeignArch::Kill => RET_KILL_PROCESS,
    };
    let skip_if = |code, k| Instruction {
        code,
        if_true: 1,
        if_false: 0,
        k,
    };
    let skip_unless = |code, k| Instruction {
        code,
        if_true: 0,
        if_false: 1,
        k,
    };
    let mut head = vec![
        op(LD_ABS, OFFSET_ARCH),
        skip_if(JEQ, ARCH_X86_64),
        op(RET, foreign),
        op(LD_ABS, OFFSET_NR),
        // Numbers of x32 have no row, as natively they mostly have no call.
        skip_unless(JGE, X32_BIT),
        op(RET, RET_NOTIFY),
    ];
    for piece in rules.allow.chunks(PIECE) {
        for (index, nr) in piece.iter().enumerate() {
            head.push(Instruction {
                code: JEQ,
                if_true: (piece.len() - index) as u8,
                if_false: 0,
                k: *nr,
            });
        }
        head.push(op(JA, 1));
        head.push(op(RET, RET_ALLOW));
    }
    head
}

/// What looks at arguments, and the default: a whole filter of libseccomp's.
fn body(rules: &Rules) -> Result<Vec<Instruction>, FilterError> {
    let mut context = ScmpFilterContext::new(ScmpAction::Notify)?;
    // The head has decided on these.
    context.set_act_badarch(ScmpAction::Notify)?;
    if !context.is_arch_present(ScmpArch::X8664)? {
        context.add_arch(ScmpArch::X8664)?;
    }
    for (nr, data) in &rules.trace {
        context.add_rule(ScmpAction::Trace(*data), ScmpSyscall::from(*nr as i32))?;
    }
    for (nr, lists) in &rules.allow_when {
        for list in lists {
            if let Some(comparisons) = merged(list) {
                context.add_rule_conditional(
                    ScmpAction::Allow,
                    ScmpSyscall::from(*nr as i32),
                    &comparisons,
                )?;
            }
        }
    }
    let os = |op| move |source| FilterError::Os { op, source };
    let memory = nix::sys::memfd::memfd_create("filter", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map_err(|e| os("memfd_create")(e.into()))?;
    context.export_bpf(&memory)?;
    let mut file = std::fs::File::from(memory);
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).map_err(os("seek"))?;
    file.read_to_end(&mut bytes).map_err(os("read"))?;
    Ok(bytes
        .chunks_exact(8)
        .map(|b| Instruction {
            code: u16::from_ne_bytes([b[0], b[1]]),
            if_true: b[2],
            if_false: b[3],
            k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        })
        .collect())
}

/// The conditions as libseccomp wants them: at most one for each argument. `None` if they contradict each other.
fn merged(list: &[Cmp]) -> Option<Vec<ScmpArgCompare>> {
    let mut by_arg: BTreeMap<u8, (u64, u64)> = BTreeMap::new();
    for cmp in list {
        let (mask, value) = by_arg.entry(cmp.arg).or_default();
        let both = *mask & cmp.mask;
        if *value & both != cmp.value & both || cmp.value & !cmp.mask != 0 {
            return None;
        }
        *mask |= cmp.mask;
        *value |= cmp.value;
    }
    Some(
        by_arg
            .into_iter()
            .map(|(arg, (mask, value))| {
                ScmpArgCompare::new(u32::from(arg), ScmpCompareOp::MaskedEqual(mask), value)
            })
            .collect(),
    )
}

#[cfg(test)]
mod tests;
