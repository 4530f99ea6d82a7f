//! The code that a vessel's threads run: it waits for a call in the thread's slot, makes it, and says so.
//!
//! It uses no stack and lies at a fixed address; r12 is the thread's slot. A clone's child goes on in the slot that the
//! call named (r13), so that nothing has to be done to it before it may run.
//!
//! Its symbols are global, though hidden: the optimiser puts what names them into other object files than the code itself.

use std::arch::global_asm;

use super::arena::{DONE, POSTED, WAITED};
use crate::restore::TRAMPOLINE;

global_asm!(
    ".pushsection .rodata.vessel_stub, \"a\"",
    ".balign 16",
    ".globl vessel_stub_start",
    ".hidden vessel_stub_start",
    "vessel_stub_start:",
    // A place where ptrace makes a thread execute calls.
    "syscall",
    "int3",
    ".balign 16",
    ".globl vessel_stub_loop",
    ".hidden vessel_stub_loop",
    "vessel_stub_loop:",
    "mov eax, dword ptr [r12]",
    "mov edx, eax",
    "and eax, {state}",
    "cmp eax, {posted}",
    "je 2f",
    "mov rdi, r12",
    "xor esi, esi",
    "xor r10d, r10d",
    "mov eax, 202",
    "syscall",
    "jmp vessel_stub_loop",
    "2:",
    // A write to a descriptor that the slot names is not made when that is a terminal that stops writers: first
    // statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE), then, for a character device, ioctl(fd, TCGETS).
    "mov rdi, qword ptr [r12 + 80]",
    "test rdi, rdi",
    "jz 4f",
    "mov edi, edi",
    "lea rsi, [r12 + 120]",
    "mov edx, 0x5000",
    "mov r10d, 1",
    "lea r8, [r12 + 128]",
    "mov eax, 332",
    "syscall",
    "test rax, rax",
    "jnz 4f",
    "movzx eax, word ptr [r12 + 128 + 28]",
    "and eax, 0xf000",
    "cmp eax, 0x2000",
    "jne 4f",
    "mov rdi, qword ptr [r12 + 80]",
    "mov edi, edi",
    "mov esi, 0x5401",
    "lea rdx, [r12 + 128]",
    "mov eax, 16",
    "syscall",
    "test rax, rax",
    "jnz 4f",
    // c_lflag, TOSTOP.
    "test dword ptr [r12 + 128 + 12], 0x100",
    "jz 4f",
    "movabs rax, {wanted}",
    "jmp 3f",
    "4:",
    "mov rdi, qword ptr [r12 + 16]",
    "mov rsi, qword ptr [r12 + 24]",
    "mov rdx, qword ptr [r12 + 32]",
    "mov r10, qword ptr [r12 + 40]",
    "mov r8, qword ptr [r12 + 48]",
    "mov r9, qword ptr [r12 + 56]",
    "mov rax, qword ptr [r12 + 8]",
    "mov r13, qword ptr [r12 + 72]",
    "syscall",
    ".globl vessel_stub_after",
    ".hidden vessel_stub_after",
    "vessel_stub_after:",
    "test r13, r13",
    "jz 3f",
    "test rax, rax",
    "jnz 3f",
    "mov r12, r13",
    "jmp vessel_stub_loop",
    "3:",
    "mov qword ptr [r12 + 64], rax",
    "mov eax, {done}",
    "xchg dword ptr [r12], eax",
    ".globl vessel_stub_said",
    ".hidden vessel_stub_said",
    "vessel_stub_said:",
    "test eax, {waited}",
    "jz vessel_stub_loop",
    "mov rdi, r12",
    "mov esi, 1",
    "mov edx, 0x7fffffff",
    "xor r10d, r10d",
    "mov eax, 202",
    "syscall",
    "jmp vessel_stub_loop",
    ".balign 16",
    ".globl vessel_stub_catcher",
    ".hidden vessel_stub_catcher",
    "vessel_stub_catcher:",
    "mov eax, 34",
    "syscall",
    "jmp vessel_stub_catcher",
    // Executes r13 > 0 calls that are described from rbx on: number, six arguments, room for the result.
    ".balign 16",
    ".globl vessel_stub_batch",
    ".hidden vessel_stub_batch",
    "vessel_stub_batch:",
    "mov rax, qword ptr [rbx]",
    "mov rdi, qword ptr [rbx + 8]",
    "mov rsi, qword ptr [rbx + 16]",
    "mov rdx, qword ptr [rbx + 24]",
    "mov r10, qword ptr [rbx + 32]",
    "mov r8, qword ptr [rbx + 40]",
    "mov r9, qword ptr [rbx + 48]",
    "syscall",
    "mov qword ptr [rbx + 56], rax",
    "add rbx, 64",
    "dec r13",
    "jnz vessel_stub_batch",
    "int3",
    ".globl vessel_stub_batch_end",
    ".hidden vessel_stub_batch_end",
    "vessel_stub_batch_end:",
    ".globl vessel_stub_end",
    ".hidden vessel_stub_end",
    "vessel_stub_end:",
    ".popsection",
    wanted = const linklayer::wire::MASK_WANTED,
    posted = const POSTED,
    done = const DONE,
    waited = const WAITED,
    state = const !WAITED,
);

unsafe extern "C" {
    static vessel_stub_start: u8;
    static vessel_stub_loop: u8;
    static vessel_stub_after: u8;
    static vessel_stub_said: u8;
    static vessel_stub_catcher: u8;
    static vessel_stub_batch: u8;
    static vessel_stub_batch_end: u8;
    static vessel_stub_end: u8;
}

/// The stub's code.
pub fn code() -> &'static [u8] {
    let start = &raw const vessel_stub_start;
    // SAFETY: both symbols are defined above in one read-only section, the end behind the start; the bytes between are
    // initialised and never written.
    unsafe { std::slice::from_raw_parts(start, (&raw const vessel_stub_end).offset_from(start) as usize) }
}

fn at(symbol: *const u8) -> u64 {
    TRAMPOLINE + (symbol as u64 - &raw const vessel_stub_start as u64)
}

/// Where a worker waits for calls.
pub fn loop_address() -> u64 {
    at(&raw const vessel_stub_loop)
}

/// The address behind the call's `syscall` instruction.
pub fn after_address() -> u64 {
    at(&raw const vessel_stub_after)
}

/// The address behind the instruction that says that a call has ended: with an instruction pointer up to that of the
/// instruction itself the result is not yet seen.
pub fn said_address() -> u64 {
    at(&raw const vessel_stub_said)
}

/// Where the catcher waits.
pub fn catcher_address() -> u64 {
    at(&raw const vessel_stub_catcher)
}

/// Where a batch of calls begins.
pub fn batch_address() -> u64 {
    at(&raw const vessel_stub_batch)
}

/// The address behind the breakpoint that ends a batch.
pub fn batch_end_address() -> u64 {
    at(&raw const vessel_stub_batch_end)
}
