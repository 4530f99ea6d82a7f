//! The arena: memory that a deputy shares with its vessels, cut into slots, one for each vessel thread.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use linklayer::memory::HOLE;
use linklayer::syscall::{Area, SLOT_DATA_LEN};
use parking_lot::Mutex;

use crate::clone_rewrite::CLONE_CLEAR_SIGHAND;

/// Where the arena is in every vessel.
pub const ARENA_ADDRESS: u64 = 0x1000_0000_0000;
/// A slot: a page of registers, then the data area. Bytes.
const SLOT_LEN: usize = 256 << 10;
const DATA_AT: usize = 4096;
/// Slots of an arena; the memory behind unused ones does not exist.
const SLOTS: usize = 4096;
/// Size of the arena, bytes.
pub const ARENA_LEN: usize = SLOT_LEN * SLOTS;

/// Where vessels map held files, each as long as it is and without access: what the file is mapped from at homecoming, when nobody can open
/// it.
pub const KEEPERS: std::ops::Range<u64> = 0x1000_8000_0000..0x1000_c000_0000;

const _: () = assert!(ARENA_ADDRESS + ARENA_LEN as u64 <= KEEPERS.start && KEEPERS.end <= HOLE);
const _: () = assert!(DATA_AT + SLOT_DATA_LEN <= SLOT_LEN);
const _: () = assert!(
    ARENA_ADDRESS + ARENA_LEN as u64 <= HOLE,
    "bad pointers of guests stay bad"
);

const IDLE: u32 = 0;
pub(super) const POSTED: u32 = 1;
pub(super) const DONE: u32 = 2;
const ABANDONED: u32 = 3;
/// Beside [`POSTED`]: somebody sleeps until the call ends. A vessel thread that runs as soon as it is woken, in front of the
/// one who woke it, has often ended its call before that one could wait for it, and need not wake anybody.
pub(super) const WAITED: u32 = 1 << 30;

struct Mapping {
    base: NonNull<u8>,
    fd: OwnedFd,
    free: Mutex<Vec<usize>>,
}

// SAFETY: the mapping is plain shared memory that lives as long as this value; every access goes through atomics or through
// copies of single slots, whose `Slot` has one owner.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `Arena::new` and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), ARENA_LEN) };
    }
}

/// A deputy's arena.
#[derive(Clone)]
pub struct Arena(Arc<Mapping>);

impl Arena {
    /// A new arena, a memfd.
    ///
    /// # Errors
    /// Out of descriptors or address space.
    pub fn new() -> io::Result<Arena> {
        let fd = nix::sys::memfd::memfd_create("mosrun-arena", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&fd, ARENA_LEN as i64)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                ARENA_LEN,
                prot,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapping at zero"))?;
        let free = Mutex::new((0..SLOTS).rev().collect());
        Ok(Arena(Arc::new(Mapping { base, fd, free })))
    }

    /// A path by which a vessel can open it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.fd.as_raw_fd())
    }

    /// Takes a free slot.
    ///
    /// # Errors
    /// All are taken: a job has at most that many threads away.
    pub fn allocate(&self) -> io::Result<Slot> {
        let index = self
            .0
            .free
            .lock()
            .pop()
            .ok_or_else(|| io::Error::other(format!("more than {SLOTS} threads of one job are away")))?;
        let slot = Slot {
            mapping: self.0.clone(),
            index,
        };
        slot.state().store(IDLE, Ordering::Release);
        slot.word(CHILD).store(0, Ordering::Relaxed);
        Ok(slot)
    }
}

const NR: usize = 8;
const ARGS: usize = 16;
const RET: usize = 64;
const CHILD: usize = 72;
/// A descriptor with [`GUARDED`], or 0. What the stub learns of it begins at 128; at 120 is an empty path.
const GUARD: usize = 80;
const GUARDED: u64 = 1 << 32;

/// One vessel thread's slot. May be used from any thread; one call at a time. Given back when dropped: the vessel
/// thread must not use it any more then.
pub struct Slot {
    mapping: Arc<Mapping>,
    index: usize,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.mapping.free.lock().push(self.index);
    }
}

impl Slot {
    fn base(&self) -> *mut u8 {
        // SAFETY: the index is below SLOTS, so the result is inside the mapping.
        unsafe { self.mapping.base.as_ptr().add(self.index * SLOT_LEN) }
    }

    fn state(&self) -> &AtomicU32 {
        // SAFETY: the slot is aligned to a page, inside the mapping, and the word is only accessed atomically.
        unsafe { &*self.base().cast::<AtomicU32>() }
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at.is_multiple_of(8) && at < DATA_AT);
        // SAFETY: aligned, inside the slot's first page, and only accessed atomically.
        unsafe { &*self.base().add(at).cast::<AtomicU64>() }
    }

    /// Address of the slot in the vessel.
    pub fn address(&self) -> u64 {
        ARENA_ADDRESS + (self.index * SLOT_LEN) as u64
    }

    /// Address of its data area in the vessel.
    pub fn data_address(&self) -> u64 {
        self.address() + DATA_AT as u64
    }

    /// Copies bytes into the data area. What is beyond its end is not written.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let len = bytes.len().min((SLOT_LEN - DATA_AT).saturating_sub(at));
        // SAFETY: `at + len` is inside the slot's data area; the vessel may write there at the same time, which can only
        // spoil what its own call reads.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base().add(DATA_AT + at), len) };
    }

    /// Copies bytes out of the data area. What is beyond its end is left as it is.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        let len = bytes.len().min((SLOT_LEN - DATA_AT).saturating_sub(at));
        // SAFETY: as for `write`; the bytes are whatever they are at this moment.
        unsafe { std::ptr::copy_nonoverlapping(self.base().add(DATA_AT + at), bytes.as_mut_ptr(), len) };
    }

    /// Has the vessel thread make a call. It must be idle.
    pub fn post(&self, nr: u64, args: [u64; 6]) {
        self.word(CHILD).store(0, Ordering::Relaxed);
        self.start(nr, args, 0);
    }

    /// As [`Slot::post`]. If the descriptor is a terminal with TOSTOP, the call is not made and its result is
    /// [`linklayer::wire::MASK_WANTED`].
    pub fn post_guarded(&self, nr: u64, args: [u64; 6], written: i32) {
        self.word(CHILD).store(0, Ordering::Relaxed);
        self.start(nr, args, GUARDED | u64::from(written as u32));
    }

    fn start(&self, nr: u64, args: [u64; 6], guard: u64) {
        self.word(GUARD).store(guard, Ordering::Relaxed);
        self.word(NR).store(nr, Ordering::Relaxed);
        for (i, arg) in args.into_iter().enumerate() {
            self.word(ARGS + 8 * i).store(arg, Ordering::Relaxed);
        }
        self.state().store(POSTED, Ordering::Release);
        self.wake();
    }

    /// Has the vessel thread clone itself; the child waits in its own slot. Stack, thread pointer and tid addresses are
    /// the guest's affair; CLONE_VFORK too, which would stop this thread.
    pub fn post_clone(&self, flags: u64, exit_signal: i32, child: &Slot) {
        const GUESTS: u64 = (libc::CLONE_VFORK
            | libc::CLONE_SETTLS
            | libc::CLONE_PARENT_SETTID
            | libc::CLONE_CHILD_SETTID
            | libc::CLONE_CHILD_CLEARTID) as u64;
        self.word(CHILD).store(child.address(), Ordering::Relaxed);
        self.write(0, &(-1i32).to_ne_bytes());
        if flags & CLONE_CLEAR_SIGHAND != 0 {
            // Only clone3 has it. Its structure lies behind the descriptor's place.
            const STRUCTURE: usize = 64;
            let flags = flags & !GUESTS;
            let args = [flags, self.data_address(), 0, 0, exit_signal as u64, 0, 0, 0];
            for (i, word) in args.into_iter().enumerate() {
                self.write(STRUCTURE + 8 * i, &word.to_ne_bytes());
            }
            let address = self.data_address() + STRUCTURE as u64;
            self.start(libc::SYS_clone3 as u64, [address, 64, 0, 0, 0, 0], 0);
            return;
        }
        let flags = flags & !GUESTS & 0xffff_ff00 | exit_signal as u64 & 0xff;
        // With CLONE_PIDFD the third argument is where the descriptor is put.
        self.start(
            libc::SYS_clone as u64,
            [flags, 0, self.data_address(), 0, 0, 0],
            0,
        );
    }

    /// The descriptor that a clone with CLONE_PIDFD made.
    pub fn clone_pidfd(&self) -> i32 {
        let mut bytes = [0; 4];
        self.read(0, &mut bytes);
        i32::from_ne_bytes(bytes)
    }

    /// The result of the last call, if it has ended.
    pub fn try_result(&self) -> Option<i64> {
        (self.state().load(Ordering::Acquire) == DONE).then(|| self.result())
    }

    fn result(&self) -> i64 {
        self.word(RET).load(Ordering::Relaxed) as i64
    }

    /// Whether a call is posted that has not ended.
    pub fn posted(&self) -> bool {
        self.state().load(Ordering::Acquire) & !WAITED == POSTED
    }

    /// Waits for the call's end; `None` when the time is up (`None` as time: never), or the slot was abandoned.
    pub fn wait(&self, patience: Option<Duration>) -> Option<i64> {
        let deadline = patience.map(|p| Instant::now() + p);
        loop {
            let mut seen = self.state().load(Ordering::Acquire);
            match seen {
                DONE => return Some(self.result()),
                ABANDONED => return None,
                _ => {}
            }
            let left = match deadline {
                Some(d) => match d.checked_duration_since(Instant::now()) {
                    Some(left) if !left.is_zero() => Some(left),
                    _ => return None,
                },
                None => None,
            };
            if seen == POSTED {
                let waited = POSTED | WAITED;
                match self
                    .state()
                    .compare_exchange(POSTED, waited, Ordering::AcqRel, Ordering::Acquire)
                {
                    Ok(_) => seen = waited,
                    Err(_) => continue,
                }
            }
            let time = left.map(|l| libc::timespec {
                tv_sec: l.as_secs() as i64,
                tv_nsec: i64::from(l.subsec_nanos()),
            });
            let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            // SAFETY: the word outlives the call, and `time` is null or points to a timespec that does.
            unsafe { libc::syscall(libc::SYS_futex, self.base(), libc::FUTEX_WAIT, seen, time) };
        }
    }

    /// Ends the call in place of the vessel thread, which is stopped and will not do it.
    pub fn finish(&self, ret: i64) {
        self.word(RET).store(ret as u64, Ordering::Relaxed);
        self.state().store(DONE, Ordering::Release);
        self.wake();
    }

    /// Gives up: its thread is gone. Whoever waits is woken.
    pub fn abandon(&self) {
        self.state().store(ABANDONED, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // SAFETY: wakes waiters of a word that lives.
        unsafe { libc::syscall(libc::SYS_futex, self.base(), libc::FUTEX_WAKE, i32::MAX) };
    }
}

impl Area for Slot {
    fn write(&self, at: usize, bytes: &[u8]) {
        Slot::write(self, at, bytes);
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        Slot::read(self, at, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_apart_and_bounded() {
        let Ok(arena) = Arena::new() else {
            panic!("no arena")
        };
        let (Ok(a), Ok(b)) = (arena.allocate(), arena.allocate()) else {
            panic!("no slots")
        };
        a.write(0, &[1; 300_000]);
        let mut seen = [9; 16];
        b.read(0, &mut seen);
        assert_eq!(seen, [0; 16]);
        assert_eq!(b.address() - a.address(), SLOT_LEN as u64);
        assert_eq!(a.wait(Some(Duration::from_millis(1))), None);
    }
}
