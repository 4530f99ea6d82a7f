//! The freestanding code that runs inside other processes: one page, position independent, without stack and without data.
//!
//! It lies at [`CODE`] in every process that we work on. Its first instruction is the `syscall` that injected calls use, so that
//! a guest's filter can let exactly that instruction pass (instruction pointer [`CODE`]` + 2`). The page after it, [`SCRATCH`], is
//! for arguments and results of injected calls.

use std::arch::global_asm;

use linklayer::image::RESERVED;

/// Address of the code page.
pub const CODE: u64 = RESERVED.start;
/// Address of the scratch page of injected calls (readable and writable while it is planted).
pub const SCRATCH: u64 = CODE + 0x1000;
/// Bytes of the scratch page.
pub const SCRATCH_LEN: u64 = 0x1000;
/// Address of slot 0 of the arena, which is the bell.
pub const ARENA: u64 = 0x1000_0000_0000;

// Slot layout: see `crate::arena`. The worker waits until its slot's state is 1 (posted), executes the call, stores the result,
// sets the state to 3 (done), wakes who waits for the slot, and rings the bell. r12 is its slot; a spin count in the slot lets it
// poll before it sleeps. Futexes are shared ones: the arena is a memfd that the deputy maps too.
global_asm!(
    ".pushsection .rodata.mosrun_code,\"a\",@progbits",
    ".balign 16",
    "mosrun_code_start:",
    "    syscall",
    "    int3",
    ".balign 16",
    "mosrun_code_worker:",
    "    mov ecx, dword ptr [r12 + 80]",
    "2:  mov edx, dword ptr [r12]",
    "    cmp edx, 1",
    "    je 4f",
    "    test ecx, ecx",
    "    jz 3f",
    "    dec ecx",
    "    pause",
    "    jmp 2b",
    "3:  mov rdi, r12",
    "    xor esi, esi",
    "    xor r10d, r10d",
    "    mov eax, 202",
    "    syscall",
    "    jmp mosrun_code_worker",
    "4:  mov dword ptr [r12], 2",
    "    mov rax, qword ptr [r12 + 8]",
    "    mov rdi, qword ptr [r12 + 16]",
    "    mov rsi, qword ptr [r12 + 24]",
    "    mov rdx, qword ptr [r12 + 32]",
    "    mov r10, qword ptr [r12 + 40]",
    "    mov r8, qword ptr [r12 + 48]",
    "    mov r9, qword ptr [r12 + 56]",
    "    syscall",
    "mosrun_code_called:",
    "    mov qword ptr [r12 + 64], rax",
    "    mov eax, 3",
    "    xchg dword ptr [r12], eax",
    "    cmp dword ptr [r12 + 4], 0",
    "    je 5f",
    "    mov rdi, r12",
    "    mov esi, 1",
    "    mov edx, 0x7fffffff",
    "    mov eax, 202",
    "    syscall",
    "5:  movabs rbx, 0x100000000000",
    "    mov rcx, r12",
    "    sub rcx, rbx",
    "    shr rcx, 18",
    "    lock bts qword ptr [rbx + 1024], rcx",
    "    lock inc dword ptr [rbx]",
    "    cmp dword ptr [rbx + 4], 0",
    "    je mosrun_code_worker",
    "    mov rdi, rbx",
    "    mov esi, 1",
    "    mov edx, 0x7fffffff",
    "    mov eax, 202",
    "    syscall",
    "    jmp mosrun_code_worker",
    ".balign 16",
    "mosrun_code_catcher:",
    "    mov eax, 34",
    "    syscall",
    "    jmp mosrun_code_catcher",
    ".balign 16",
    "mosrun_code_exit:",
    "    xor edi, edi",
    "    mov eax, 60",
    "    syscall",
    "    jmp mosrun_code_exit",
    "mosrun_code_end:",
    ".popsection",
);

unsafe extern "C" {
    static mosrun_code_start: u8;
    static mosrun_code_worker: u8;
    static mosrun_code_called: u8;
    static mosrun_code_catcher: u8;
    static mosrun_code_exit: u8;
    static mosrun_code_end: u8;
}

fn offset(symbol: *const u8) -> u64 {
    symbol as u64 - &raw const mosrun_code_start as u64
}

/// The bytes of the code page.
pub fn code() -> &'static [u8] {
    let len = offset(&raw const mosrun_code_end) as usize;
    // SAFETY: the symbols enclose initialised read-only data of this program that is never written.
    unsafe { std::slice::from_raw_parts(&raw const mosrun_code_start, len) }
}

/// Where a vessel thread waits for calls; r12 must hold the address of its slot.
pub fn worker() -> u64 {
    CODE + offset(&raw const mosrun_code_worker)
}

/// The instruction after the worker's call: the instruction pointer of a worker inside the call of its slot.
pub fn called() -> u64 {
    CODE + offset(&raw const mosrun_code_called)
}

/// Where the catcher waits for signals.
pub fn catcher() -> u64 {
    CODE + offset(&raw const mosrun_code_catcher)
}

/// Where a thread ends itself with status 0 (exit(2), not exit_group).
pub fn exit() -> u64 {
    CODE + offset(&raw const mosrun_code_exit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_its_page_and_begins_with_syscall() {
        assert!(code().len() < 1024);
        assert_eq!(&code()[..3], [0x0f, 0x05, 0xcc]);
        let called = (called() - CODE) as usize;
        assert_eq!(&code()[called - 2..called], [0x0f, 0x05]);
    }
}
