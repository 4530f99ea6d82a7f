//! The program of the cage's own processes: a freestanding ELF file of one page, so that neither they nor the blank guests
//! that are copied from them hold anything of the supervisor's memory.
//!
//! Run with one argument it is the cage's *init*: it waits until descriptor 0, a pidfd of the supervisor, becomes readable and
//! ends, whereupon the kernel kills all that is in the pid namespace. Run with two it is the *nursery*: it takes requests from
//! descriptor 0 (a SOCK_SEQPACKET socket), with descriptor 1 open on ns_last_pid, and ends when the socket does.
//!
//! A request is `u32 op; u32 pid; u32 fds; u32 0; text`, at most [`MAX_REQUEST`] bytes, and its answer an i32, zero or a negated
//! errno:
//! - [`OP_SPAWN`] comes with `fds` descriptors, first a socket of its own. The answer is sent there: by the blank guest, so that
//!   the receiver gets its pid as credentials, or by the nursery when there is none. The guest closes that socket as the last
//!   thing that it does: after the end of file it is ready, and has what remains of the descriptors from [`FIRST_FD`] on.
//! - [`OP_HOLD`] only brings `fds` descriptors for the request that follows. It has no answer.
//! - [`OP_LAST_PID`] writes `text` to ns_last_pid.
//! - [`OP_KILL`] kills `pid`.
//!
//! The addresses are inside the range that no image of a process may use (`linklayer::image::RESERVED`).

use std::arch::global_asm;

pub const OP_SPAWN: u32 = 1;
pub const OP_LAST_PID: u32 = 2;
pub const OP_KILL: u32 = 3;
pub const OP_HOLD: u32 = 4;
/// Bytes before a request's text.
pub const HEADER: usize = 16;
/// Most bytes of a request.
pub const MAX_REQUEST: usize = 64;
/// Most descriptors of a request: SCM_MAX_FD.
pub const MAX_FDS: usize = 253;
/// Number of the first passed descriptor in a blank guest.
pub const FIRST_FD: i32 = 3;
/// Where the page lies in each of these processes.
pub const BASE: u64 = 0x1000_0000_0000;
/// Where in it a `syscall; int3` lies.
pub const GATE: u64 = BASE + 0xb0;

global_asm!(
    ".pushsection .rodata.mosrun_cage, \"a\", @progbits",
    ".balign 16",
    ".globl mosrun_cage_start",
    ".hidden mosrun_cage_start",
    "mosrun_cage_start:",
    // ELF header: executable, x86-64, two program headers.
    ".byte 0x7f, 0x45, 0x4c, 0x46, 2, 1, 1, 0",
    ".quad 0",
    ".short 2, 62",
    ".long 1",
    ".quad {base} + mosrun_cage_entry - mosrun_cage_start",
    ".quad 64, 0",
    ".long 0",
    ".short 64, 56, 2, 64, 0, 0",
    // PT_LOAD, r-x: the whole file.
    ".long 1, 5",
    ".quad 0, {base}, {base}",
    ".quad mosrun_cage_end - mosrun_cage_start",
    ".quad mosrun_cage_end - mosrun_cage_start",
    ".quad 4096",
    // PT_GNU_STACK, rw-.
    ".long 0x6474e551, 6",
    ".quad 0, 0, 0, 0, 0, 16",
    // The gate, at 0xb0.
    "syscall",
    "int3",
    "mosrun_cage_init_name: .asciz \"mosrun-init\"",
    "mosrun_cage_nursery_name: .asciz \"mosrun-nursery\"",
    "mosrun_cage_blank_name: .asciz \"mosrun-blank\"",
    ".balign 8",
    // capset(2): _LINUX_CAPABILITY_VERSION_3, this process; no capability in any set.
    "mosrun_cage_cap_header: .long 0x20080522, 0",
    "mosrun_cage_no_caps: .quad 0, 0, 0",
    // Frame: iovec 0, msghdr 16, request 80, clone_args 144, set_tid 224, answer 228, control 240 (1040 bytes).
    "mosrun_cage_entry:",
    "mov rax, [rsp]",
    "sub rsp, 1280",
    "and rsp, -16",
    "mov rbx, rsp",
    "cmp rax, 1",
    "jne 20f",
    // --- init
    "lea rsi, [rip + mosrun_cage_init_name]",
    "call 90f",
    "mov dword ptr [rbx], 0", // pollfd: descriptor 0, POLLIN
    "10:",
    "mov dword ptr [rbx + 4], 1",
    "mov eax, 7", // poll
    "mov rdi, rbx",
    "mov esi, 1",
    "mov edx, -1",
    "syscall",
    "cmp rax, 1",
    "jne 10b",
    "11:",
    "mov eax, 231", // exit_group
    "xor edi, edi",
    "syscall",
    // --- nursery
    "20:",
    "lea rsi, [rip + mosrun_cage_nursery_name]",
    "call 90f",
    "21:",
    "mov eax, 436", // close_range: what the last request brought
    "mov edi, 2",
    "mov esi, -1",
    "xor edx, edx",
    "syscall",
    "22:",
    "lea rax, [rbx + 80]",
    "mov [rbx], rax",
    "mov qword ptr [rbx + 8], 64",
    "mov qword ptr [rbx + 16], 0",
    "mov qword ptr [rbx + 24], 0",
    "mov [rbx + 32], rbx",
    "mov qword ptr [rbx + 40], 1",
    "lea rax, [rbx + 240]",
    "mov [rbx + 48], rax",
    "mov qword ptr [rax], 0",
    "mov qword ptr [rbx + 56], 1040",
    "mov qword ptr [rbx + 64], 0",
    "mov eax, 47", // recvmsg
    "xor edi, edi",
    "lea rsi, [rbx + 16]",
    "xor edx, edx",
    "syscall",
    "cmp rax, -4", // EINTR
    "je 22b",
    "cmp rax, 16",
    "jl 11b",
    "mov r12, rax",
    "mov eax, [rbx + 80]",
    "cmp eax, 1",
    "je 40f",
    "cmp eax, 2",
    "je 30f",
    "cmp eax, 4",
    "je 22b",
    "mov eax, 62", // kill
    "mov edi, [rbx + 84]",
    "mov esi, 9",
    "syscall",
    "jmp 31f",
    "30:",
    "mov eax, 18", // pwrite64
    "mov edi, 1",
    "lea rsi, [rbx + 96]",
    "lea rdx, [r12 - 16]",
    "xor r10d, r10d",
    "syscall",
    "test rax, rax",
    "js 31f",
    "xor eax, eax",
    "31:",
    "xor edi, edi",
    "call 91f",
    "jmp 21b",
    // --- spawn
    "40:",
    "mov eax, [rbx + 88]",
    "lea rax, [rax * 4 + 16]",
    "cmp rax, [rbx + 240]", // did all descriptors fit into the table?
    "mov rax, -24",         // EMFILE
    "jne 41f",
    "lea rdi, [rbx + 144]",
    "mov ecx, 10",
    "xor eax, eax",
    "rep stosq",
    "mov qword ptr [rbx + 144], 0x8000", // CLONE_PARENT
    "mov eax, [rbx + 84]",
    "mov [rbx + 224], eax",
    "lea rax, [rbx + 224]",
    "mov [rbx + 208], rax",
    "mov qword ptr [rbx + 216], 1",
    "mov eax, 435", // clone3
    "lea rdi, [rbx + 144]",
    "mov esi, 80",
    "syscall",
    "test rax, rax",
    "jz 50f",
    "jns 21b",
    "41:",
    "mov edi, 2",
    "call 91f",
    "jmp 21b",
    // --- blank guest
    "50:",
    "lea rsi, [rip + mosrun_cage_blank_name]",
    "call 90f",
    "mov eax, 126", // capset
    "lea rdi, [rip + mosrun_cage_cap_header]",
    "lea rsi, [rip + mosrun_cage_no_caps]",
    "syscall",
    "mov r12, rax",
    "mov edi, 2",
    "call 91f",
    "test r12, r12",
    "jnz 11b",
    "mov eax, 436", // close_range: the nursery's two, and the request's socket as the last
    "xor edi, edi",
    "mov esi, 2",
    "xor edx, edx",
    "syscall",
    "51:",
    "mov eax, 34", // pause
    "syscall",
    "jmp 51b",
    // prctl(PR_SET_NAME, rsi)
    "90:",
    "mov eax, 157",
    "mov edi, 15",
    "syscall",
    "ret",
    // sendto(edi, the answer eax, MSG_NOSIGNAL)
    "91:",
    "mov [rbx + 228], eax",
    "mov eax, 44",
    "lea rsi, [rbx + 228]",
    "mov edx, 4",
    "mov r10d, 0x4000",
    "xor r8d, r8d",
    "xor r9d, r9d",
    "syscall",
    "ret",
    ".globl mosrun_cage_end",
    ".hidden mosrun_cage_end",
    "mosrun_cage_end:",
    ".popsection",
    base = const BASE,
);

unsafe extern "C" {
    static mosrun_cage_start: u8;
    static mosrun_cage_end: u8;
}

/// The file.
pub fn elf() -> &'static [u8] {
    let start = &raw const mosrun_cage_start;
    let end = &raw const mosrun_cage_end;
    // SAFETY: both symbols bound one initialised, read-only object of the section above, which lives for ever.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_what_its_header_says() {
        let elf = elf();
        assert_eq!(&elf[..4], b"\x7fELF");
        assert!(elf.len() < 4096, "{}", elf.len());
        let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
        assert!(
            (BASE + 0xb0..BASE + elf.len() as u64).contains(&word(24)),
            "entry {:#x}",
            word(24)
        );
        assert_eq!(word(64 + 32), elf.len() as u64);
        let gate = (GATE - BASE) as usize;
        assert_eq!(elf[gate..gate + 3], [0x0f, 0x05, 0xcc]);
        assert!(linklayer::image::RESERVED.contains(&BASE));
    }
}
