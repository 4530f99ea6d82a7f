//! Stay reasons: why a process may not be, or may not stay, away from home.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use strum::EnumCount;
use thiserror::Error;

/// Why a process is at home, must go there, or does not move now. One enum for logs, `mosps` and errors; [`StayReason::meaning`]
/// says more (`mosctl stay-reasons`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Encode, Decode, EnumCount, Error)]
pub enum StayReason {
    /// Somebody asked for it.
    #[error("asked to be at home")]
    Asked,
    /// It was started at home and nobody asked to move it.
    #[error("started at home")]
    StartedHome,
    /// A call that can only be executed exactly at home.
    #[error("system call {nr} runs at home: {note}")]
    Call {
        /// Number of the call.
        nr: u32,
        /// What about it.
        note: String,
    },
    /// It maps a file shared and writable, which others may write too.
    #[error("maps a file shared and writable")]
    SharedMapping,
    /// It shares memory with other processes.
    #[error("shares memory with other processes")]
    SharedMemory,
    /// It shares memory with a process that is not of its job.
    #[error("shares memory with process {0}, which is not one of its job")]
    Stranger(i32),
    /// It has the whole memory of another process.
    #[error("has the memory of process {0} (CLONE_VM)")]
    OneMemory(i32),
    /// It works on the memory of another process.
    #[error("works on the memory of process {0}")]
    WorksOn(i32),
    /// Another process works on its memory.
    #[error("process {0} works on its memory")]
    WorkedOn(i32),
    /// It maps a device.
    #[error("maps a device")]
    DeviceMapping,
    /// It uses io_uring(7).
    #[error("uses io_uring")]
    IoUring,
    /// It uses userfaultfd(2).
    #[error("uses userfaultfd")]
    Userfaultfd,
    /// It has pages of hugetlbfs.
    #[error("uses huge pages of hugetlbfs")]
    HugePages,
    /// It has a shadow stack.
    #[error("uses a shadow stack")]
    ShadowStack,
    /// It has guard regions.
    #[error("uses guard regions (MADV_GUARD_INSTALL)")]
    GuardRegions,
    /// It has protection keys.
    #[error("uses protection keys")]
    ProtectionKeys,
    /// Addresses that moving needs are taken.
    #[error("maps memory at addresses that are kept for moving it")]
    ReservedAddresses,
    /// It maps a file that cannot be opened any more.
    #[error("maps a file that cannot be opened: {0}")]
    LostFile(String),
    /// The kernel does not tell all of its state.
    #[error("has state that the kernel does not tell: {0}")]
    Hidden(String),
    /// Its program is not 64-bit x86.
    #[error("not a 64-bit x86 program")]
    NotX86_64,
    /// Its program gains privileges when it is executed (set-user-id, file capabilities).
    #[error("gains privileges when executed")]
    Privileged,
    /// It had several threads before its program began.
    #[error("has threads before its entry point")]
    EarlyThreads,
    /// A resource limit leaves no room for what the deputy needs in it.
    #[error("its resource limits leave no room to move it")]
    Limits,
    /// It would dump core at home, where its core file belongs.
    #[error("dumps core at home")]
    CoreDump,
    /// Its processor's instructions are not all there on the node.
    #[error(
        "may use instructions that the node's processor lacks: {0} (mosrun --cpu baseline keeps it from that)"
    )]
    Cpu(String),
    /// Its wait would get another length.
    #[error("is in a timed wait whose rest the kernel keeps; try again later")]
    TimedWait,
    /// A thread is in the vDSO where that cannot be left.
    #[error("has a thread in a call of the vDSO; try again later")]
    InVdso,
    /// It moves already.
    #[error("is being moved at this moment")]
    Moving,
    /// No node takes it.
    #[error("no node takes it: {0}")]
    NoNode(String),
}

impl StayReason {
    /// One of each, in the order in which they are listed.
    pub fn all() -> Vec<StayReason> {
        use StayReason::*;
        vec![
            Asked,
            StartedHome,
            Call {
                nr: 101,
                note: "example".into(),
            },
            SharedMapping,
            SharedMemory,
            Stranger(1),
            OneMemory(1),
            WorksOn(1),
            WorkedOn(1),
            DeviceMapping,
            IoUring,
            Userfaultfd,
            HugePages,
            ShadowStack,
            GuardRegions,
            ProtectionKeys,
            ReservedAddresses,
            LostFile("example".into()),
            Hidden("example".into()),
            NotX86_64,
            Privileged,
            EarlyThreads,
            Limits,
            CoreDump,
            Cpu("avx2".into()),
            TimedWait,
            InVdso,
            Moving,
            NoNode("example".into()),
        ]
    }

    /// Its name in JSON and documents.
    pub fn name(&self) -> &'static str {
        use StayReason::*;
        match self {
            Asked => "asked",
            StartedHome => "started-home",
            Call { .. } => "call",
            SharedMapping => "shared-mapping",
            SharedMemory => "shared-memory",
            Stranger(_) => "stranger",
            OneMemory(_) => "one-memory",
            WorksOn(_) => "works-on",
            WorkedOn(_) => "worked-on",
            DeviceMapping => "device-mapping",
            IoUring => "io-uring",
            Userfaultfd => "userfaultfd",
            HugePages => "huge-pages",
            ShadowStack => "shadow-stack",
            GuardRegions => "guard-regions",
            ProtectionKeys => "protection-keys",
            ReservedAddresses => "reserved-addresses",
            LostFile(_) => "lost-file",
            Hidden(_) => "hidden",
            NotX86_64 => "not-x86-64",
            Privileged => "privileged",
            EarlyThreads => "early-threads",
            Limits => "limits",
            CoreDump => "core-dump",
            Cpu(_) => "cpu",
            TimedWait => "timed-wait",
            InVdso => "in-vdso",
            Moving => "moving",
            NoNode(_) => "no-node",
        }
    }

    /// What it means, and what can be done about it.
    pub fn meaning(&self) -> &'static str {
        use StayReason::*;
        match self {
            Asked => {
                "Somebody asked for it to be at home (`mosmigrate PID home`), or its job was brought home. It can be moved again."
            }
            StartedHome => {
                "It was started at home (`mosrun -h`, or from a process at home) and nobody asked to move it. It can be moved."
            }
            Call { .. } => {
                "It made a system call that can only be executed exactly at home (docs/SYSCALLS.md says which, and why), so it came \
                 home and goes on there. It can be moved again unless another reason forbids it; with `mosrun -e` such calls fail instead."
            }
            SharedMapping => {
                "It maps a file shared and writable that others at home may write or read at any moment, which cannot be the same memory \
                 on another machine. What processes map on a node where nobody else has the file open can stay there until somebody opens \
                 the file."
            }
            SharedMemory => {
                "It shares anonymous memory with other processes of its job. They move together; System V shared memory stays at home."
            }
            Stranger(_) => {
                "It shares memory with a process that no deputy of its job serves. `mosctl adopt` of the eldest takes both."
            }
            OneMemory(_) => {
                "Two processes have one address space without being threads of one process (clone(2) with CLONE_VM). They stay until \
                 one of them executes a program or ends."
            }
            WorksOn(_) => {
                "It has read or changed the memory of another process of its job (process_vm_readv(2), /proc/PID/mem), or opened its \
                 own so. It can do that again without being seen, so it stays until it executes another program or the other one ends."
            }
            WorkedOn(_) => {
                "Another process of its job has read or changed its memory and can do so again: it stays at home until that one ends or \
                 executes another program."
            }
            DeviceMapping => {
                "It maps memory of a device, or counters of the kernel (perf_event_open(2)): that device is at home."
            }
            IoUring => {
                "It has a ring of io_uring(7), whose requests the kernel of home carries out behind its back."
            }
            Userfaultfd => {
                "It serves its own page faults (userfaultfd(2)), which a move would have to do in its place."
            }
            HugePages => {
                "It has pages of hugetlbfs, which a node need not have. Transparent huge pages are no obstacle."
            }
            ShadowStack => {
                "It runs with a shadow stack (arch_prctl(2), ARCH_SHSTK_ENABLE), which cannot be written from outside."
            }
            GuardRegions => {
                "It has guard regions (madvise(2), MADV_GUARD_INSTALL), which nothing tells page by page."
            }
            ProtectionKeys => {
                "It uses protection keys (pkeys(7)), which belong to the processor and kernel that it runs on."
            }
            ReservedAddresses => {
                "It has put memory where a moved process needs some pages. No ordinary program does."
            }
            LostFile(_) => {
                "It maps a file that was removed or replaced, and the deputy may not open what is mapped (that takes \
                 CAP_CHECKPOINT_RESTORE), or may not read it."
            }
            Hidden(_) => {
                "The kernel of the place where it is does not tell all that is needed to continue it elsewhere (it lacks \
                 CONFIG_CHECKPOINT_RESTORE, or has no vDSO). `mosctl check` says what a node can do."
            }
            NotX86_64 => {
                "Its program is a 32-bit one, or runs 32-bit code. Only 64-bit x86 programs run away from home."
            }
            Privileged => {
                "Its program gains privileges when it is executed, which no other machine can grant."
            }
            EarlyThreads => {
                "A library started threads before the program began. It can be moved with `mosmigrate`."
            }
            Limits => "Its RLIMIT_AS, RLIMIT_NPROC or the like leave no room for what stands for it at home.",
            CoreDump => {
                "It was about to dump core. Its core file belongs to home's file system, so it came home to die."
            }
            Cpu(_) => {
                "It may have found out which instructions its processor has, and the node lacks some of them. Programs that were \
                 started with `mosrun --cpu baseline` use none but those that all x86-64 processors have."
            }
            TimedWait => {
                "One of its threads is in a wait whose remaining time only the kernel knows, again and again: in a call on a socket with \
                 SO_RCVTIMEO or SO_SNDTIMEO, or, where the kernel does not tell since when a thread waits (`mosctl check`, \
                 \"timed_waits\"), in any with a timeout. The move was tried for two seconds; it succeeds as soon as the wait ends."
            }
            InVdso => {
                "One of its threads is in a function of the vDSO at an address that the target has not. Ask again."
            }
            Moving => {
                "A move of it, or of a process with which it shares memory, is under way. Ask again when that has ended."
            }
            NoNode(_) => "The node cannot be reached, refuses it, or cannot build it; the text says why.",
        }
    }
}

/// All reasons as a Markdown document (`docs/STAY-REASONS.md`).
pub fn markdown() -> String {
    let mut text = String::from(
        "# Stay reasons\n\n\
         Why a process is at home, must go there, or does not move now, as `mosps` shows it and errors name it. Generated from\n\
         `linklayer/src/stay.rs` by `mosctl stay-reasons --markdown`.\n\n\
         | name | in words | what it means |\n|---|---|---|\n",
    );
    for reason in StayReason::all() {
        text.push_str(&format!(
            "| `{}` | {reason} | {} |\n",
            reason.name(),
            reason.meaning()
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_reason_is_listed_once() {
        let all = StayReason::all();
        let names: HashSet<&str> = all.iter().map(StayReason::name).collect();
        assert_eq!(names.len(), all.len());
        let kinds: HashSet<_> = all.iter().map(std::mem::discriminant).collect();
        assert_eq!(kinds.len(), StayReason::COUNT);
        let document = markdown();
        assert!(
            names
                .iter()
                .all(|name| document.contains(&format!("| `{name}` |")))
        );
        assert!(all.iter().all(|reason| !reason.to_string().contains('|')));
    }
}
