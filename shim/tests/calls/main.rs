//! Forwarded calls against the real kernel: the same call is made natively, and once more by way of the table, with this
//! process as guest and as vessel. Results, errors and memory must be equal.

mod equal;
mod faults;

use std::cell::Cell;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd;

use linklayer::memory::{HOLE, HOLE_LEN};
use linklayer::syscall::{
    Area, CallRequest, CallView, GatherError, Reply, SLOT_DATA_LEN, Step, collect, gather, place,
};
use shim::memory::ProcessMemory;

/// Makes a call with registers as they are; an error is its errno, negated, as the kernel gives it.
fn native(nr: u32, args: [u64; 6]) -> i64 {
    // SAFETY: the tests call only what leaves the process's own memory alone, except for the buffers they name.
    let ret = unsafe {
        libc::syscall(
            i64::from(nr),
            args[0],
            args[1],
            args[2],
            args[3],
            args[4],
            args[5],
        )
    };
    if ret == -1 {
        -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap())
    } else {
        ret
    }
}

/// What became of a call.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    Result(i64),
    Home,
}

/// A slot's data area: page-aligned, as in the arena.
struct Slot {
    start: *mut u8,
}

impl Area for Slot {
    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= SLOT_DATA_LEN);
        // SAFETY: the mapping is this long and lives to the end of the process; one slot is used by one test.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), bytes.len()) };
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= SLOT_DATA_LEN);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(self.start.add(at), bytes.as_mut_ptr(), bytes.len()) };
    }
}

impl Slot {
    fn new() -> Slot {
        Slot {
            start: map(SLOT_DATA_LEN, libc::PROT_READ | libc::PROT_WRITE) as *mut u8,
        }
    }

    fn answer(&self, request: &CallRequest) -> Vec<u8> {
        let mut wire = Vec::new();
        request.encode(&mut wire);
        let view = CallView::parse(&wire).unwrap();
        let args = place(&view, self, self.start as u64);
        let ret = native(view.nr, args);
        let mut reply = Vec::new();
        collect(&view, self, ret, &mut reply);
        reply
    }

    fn forwarded(&self, nr: u32, args: [u64; 6]) -> Way {
        let memory = ProcessMemory::new(std::process::id() as i32);
        match gather(nr, &args, &memory) {
            Ok(gathered) => {
                let reply = self.answer(&gathered.request);
                Way::Result(gathered.scatter(Reply::parse(&reply).unwrap(), &memory).unwrap())
            }
            Err(GatherError::GoHome(_)) => Way::Home,
            Err(GatherError::TooBig(mut transfer)) => loop {
                match transfer.next(&memory) {
                    Step::Done(ret) => return Way::Result(ret),
                    Step::GoHome(_) => return Way::Home,
                    Step::Call(request) => {
                        let reply = self.answer(&request.clone());
                        transfer.reply(Reply::parse(&reply).unwrap(), &memory).unwrap();
                    }
                }
            },
        }
    }
}

fn map(len: usize, prot: i32) -> u64 {
    // SAFETY: a new mapping where the kernel likes.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            prot,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    at as u64
}

/// Memory of the guest that a call may use.
struct Region {
    start: u64,
    len: usize,
    next: Cell<u64>,
}

impl Region {
    fn new(len: usize) -> Region {
        let start = map(len, libc::PROT_READ | libc::PROT_WRITE);
        Region {
            start,
            len,
            next: Cell::new(start),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: the mapping is this long and stays, and no reference into it exists.
        unsafe { std::slice::from_raw_parts(self.start as *const u8, self.len) }.to_vec()
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        // SAFETY: as above; the range has just been checked.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (self.start as *mut u8).add(offset), bytes.len())
        };
    }

    fn clear(&self) {
        self.write(0, &vec![0; self.len]);
        self.next.set(self.start);
    }

    /// Room for `len` bytes.
    fn room(&self, len: u64) -> u64 {
        let at = self.next.get();
        self.next.set((at + len).next_multiple_of(16));
        assert!(self.next.get() <= self.start + self.len as u64);
        at
    }

    fn put(&self, bytes: &[u8]) -> u64 {
        let at = self.room(bytes.len() as u64);
        self.write((at - self.start) as usize, bytes);
        at
    }

    fn words(&self, words: &[u64]) -> u64 {
        self.put(&words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>())
    }
}

fn temp_file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn fd(file: &impl AsRawFd) -> u64 {
    file.as_raw_fd() as u64
}

#[test]
fn the_hole_is_a_hole() {
    let memory = ProcessMemory::new(std::process::id() as i32);
    assert!(
        memory
            .area_at(HOLE)
            .is_none_or(|area| area.start >= HOLE + HOLE_LEN)
    );
}
