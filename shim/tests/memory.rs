//! Memory of a process under its own protections. The process is the test itself: the kernel treats it as any other.

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use linklayer::memory::{Fault, GuestMemory};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};
use shim::memory::ProcessMemory;

const PAGE: usize = 4096;

fn memory() -> ProcessMemory {
    ProcessMemory::new(std::process::id() as i32)
}

/// `pages` writable pages with an unmapped page behind them.
fn pages(pages: usize, flags: MapFlags) -> NonNull<u8> {
    let len = NonZeroUsize::new((pages + 1) * PAGE).unwrap();
    // SAFETY: a new mapping at an address of the kernel's choice; its last page is given back.
    unsafe {
        let start = mmap_anonymous(
            None,
            len,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE | flags,
        )
        .unwrap();
        munmap(start.byte_add(pages * PAGE), PAGE).unwrap();
        start.cast()
    }
}

fn addr(p: NonNull<u8>, offset: usize) -> u64 {
    p.addr().get() as u64 + offset as u64
}

fn protect(p: NonNull<u8>, page: usize, prot: ProtFlags) {
    // SAFETY: the pages belong to this test and nothing of Rust's lies in them.
    unsafe { mprotect(p.byte_add(page * PAGE).cast(), PAGE, prot).unwrap() };
}

#[test]
fn protections_hold_for_reading_and_writing() {
    let memory = memory();
    let p = pages(4, MapFlags::empty());
    protect(p, 2, ProtFlags::PROT_READ);
    protect(p, 3, ProtFlags::PROT_NONE);

    memory.write(addr(p, PAGE - 4), b"12345678").unwrap();
    let mut buf = [0; 8];
    memory.read(addr(p, PAGE - 4), &mut buf).unwrap();
    assert_eq!(&buf, b"12345678");

    assert!(memory.writable(addr(p, 0), 2 * PAGE as u64));
    assert!(!memory.writable(addr(p, 0), 2 * PAGE as u64 + 1));
    assert!(memory.readable(addr(p, 0), 3 * PAGE as u64));
    assert!(!memory.readable(addr(p, 0), 3 * PAGE as u64 + 1));
    assert!(!memory.readable(addr(p, 4 * PAGE), 1));
    assert!(memory.readable(addr(p, 4 * PAGE), 0));
    assert!(!memory.readable(u64::MAX - 1, 8));

    let at = addr(p, 2 * PAGE);
    assert_eq!(memory.write(at, b"x"), Err(Fault { addr: at }));
    let at = addr(p, 3 * PAGE);
    assert_eq!(memory.read(at, &mut buf), Err(Fault { addr: at }));
    assert_eq!(
        memory.read(addr(p, 4 * PAGE - 4), &mut buf).unwrap_err().addr,
        addr(p, 4 * PAGE - 4)
    );

    // A debugger's access is not bound by them.
    memory.read_forced(at, &mut buf).unwrap();
    memory.write_forced(addr(p, 2 * PAGE), b"forced").unwrap();
    assert!(memory.read_forced(addr(p, 4 * PAGE), &mut buf).is_err());
}

#[test]
fn strings_end_where_memory_ends() {
    let memory = memory();
    let p = pages(1, MapFlags::empty());
    memory.write(addr(p, PAGE - 6), b"hello\0").unwrap();
    assert_eq!(memory.read_string(addr(p, PAGE - 6), 4096).unwrap(), b"hello\0");
    memory.write(addr(p, PAGE - 1), b"!").unwrap();
    assert!(memory.read_string(addr(p, PAGE - 6), 4096).is_err());
}

#[test]
fn a_stack_grows_as_for_the_process_itself() {
    let memory = memory();
    // A mapping that grows down, with room below it. (MAP_GROWSDOWN wants the 256 pages of stack_guard_gap free.)
    let room = pages(1024, MapFlags::empty());
    // SAFETY: the mapping is this test's own and unused.
    let stack = unsafe {
        munmap(room.cast(), 1024 * PAGE).unwrap();
        mmap_anonymous(
            NonZeroUsize::new(room.addr().get() + 1022 * PAGE),
            NonZeroUsize::new(2 * PAGE).unwrap(),
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE | MapFlags::MAP_GROWSDOWN,
        )
        .unwrap()
        .cast::<u8>()
    };
    let top = addr(stack, 0);
    let mut byte = [1];
    assert!(memory.writable(top - 20 * PAGE as u64, 20 * PAGE as u64));
    memory.write(top - 100 * PAGE as u64, &[7; 3 * PAGE]).unwrap();
    memory.read(top - 200 * PAGE as u64, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    assert_eq!(
        memory.area_at(top - 200 * PAGE as u64).unwrap().start,
        top - 200 * PAGE as u64
    );
}

#[test]
fn what_lies_beyond_the_end_of_a_file_faults() {
    let memory = memory();
    let file = memfd_create("three-pages-mapped", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&file, PAGE as i64 + 1).unwrap();
    // SAFETY: a new mapping that nothing else refers to.
    let p = unsafe {
        mmap(
            None,
            NonZeroUsize::new(3 * PAGE).unwrap(),
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_SHARED,
            file.as_fd(),
            0,
        )
        .unwrap()
        .cast::<u8>()
    };
    assert!(memory.writable(addr(p, 0), 2 * PAGE as u64));
    assert!(!memory.writable(addr(p, 0), 2 * PAGE as u64 + 1));
    assert!(memory.write(addr(p, 2 * PAGE), b"x").is_err());
}

#[test]
fn a_process_that_is_not_there_has_no_memory() {
    let memory = ProcessMemory::new(i32::MAX - 1);
    assert!(memory.read(0x1000, &mut [0]).is_err());
    assert!(!memory.readable(0x1000, 1) && !memory.writable(0x1000, 1));
    assert_eq!(memory.area_at(0), None);
}
