//! Memory whose pages are put in when somebody touches them (userfaultfd(2), ioctl_userfaultfd(2)).
//!
//! Only a *full* userfaultfd will do: with one of user mode alone a system call that meets a missing page fails with EFAULT. The
//! kernel gives it to a process with CAP_SYS_PTRACE, to all where `vm.unprivileged_userfaultfd` is 1, and to whoever may open
//! `/dev/userfaultfd`, for whichever process makes it with that descriptor.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// linux/userfaultfd.h.
pub(crate) const UFFD_API: u64 = 0xaa;
const FEATURE_EVENT_FORK: u64 = 1 << 1;
const FEATURE_EVENT_REMAP: u64 = 1 << 2;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const FEATURE_EVENT_UNMAP: u64 = 1 << 6;
pub(crate) const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
pub(crate) const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const REGISTER_MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;
/// Length of struct uffd_msg.
const MESSAGE: usize = 32;
/// USERFAULTFD_IOC_NEW, a request of the device.
pub const IOC_NEW: libc::c_ulong = 0xaa00;
/// The device.
pub const DEVICE: &str = "/dev/userfaultfd";
const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// What has happened to memory that is watched.
#[derive(Debug)]
pub enum Happened {
    /// Somebody waits for the page with this address.
    Fault(u64),
    /// The process has made a child, whose memory is watched by this.
    Fork(Userfault),
    /// Memory was moved: from, to, length.
    Moved(u64, u64, u64),
    /// Pages were given up, and are fresh again.
    Removed(Range<u64>),
    /// Memory is no more.
    Unmapped(Range<u64>),
}

/// What became of pages that were to be put in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// They are there, or there is nothing any more where they were to be.
    Done,
    /// The layout changes at this moment: what has happened is to be read first.
    Changing,
    /// The process is gone.
    Gone,
}

/// The memory of a process, as far as it is watched. When the last descriptor of it is closed, who waits for a page gets zeros.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
}

/// How a process can be given a userfaultfd.
#[derive(Debug)]
pub enum Source {
    /// It makes one by the system call.
    Call,
    /// It makes one with a descriptor of the device.
    Device(File),
}

/// How a process without privileges can be given a full userfaultfd on this machine.
///
/// # Errors
/// What would have to be changed, for a person.
pub fn source() -> Result<Source, String> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE);
    let why = match device {
        Ok(device) => {
            let made = make(&device);
            match made {
                Ok(_) => return Ok(Source::Device(device)),
                Err(e) => e,
            }
        }
        Err(e) => e,
    };
    if std::fs::read_to_string(SYSCTL).is_ok_and(|text| text.trim() == "1") {
        return Ok(Source::Call);
    }
    Err(format!(
        "no userfaultfd for system calls is to be had: {DEVICE}: {why}, and vm.unprivileged_userfaultfd is not 1 (let the user open \
         {DEVICE}, or set that with sysctl)"
    ))
}

/// Whether the children of a process can be served too (UFFD_FEATURE_EVENT_FORK, which needs CAP_SYS_PTRACE).
///
/// # Errors
/// What is missing, for a person.
pub fn follows_forks() -> Result<(), String> {
    let made = match source()? {
        Source::Device(device) => make(&device),
        Source::Call => call(),
    };
    made.and_then(|fd| Userfault::begin(fd, true)).map(drop).map_err(|e| {
        format!("this user cannot follow the forks of a process whose memory is still coming (it needs CAP_SYS_PTRACE): {e}")
    })
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A userfaultfd of the calling process's own memory.
fn make(device: &File) -> io::Result<OwnedFd> {
    // SAFETY: the request takes flags and no pointer.
    owned(unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, FLAGS) }.into())
}

fn call() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) })
}

/// Flags of a new one.
pub const FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;

impl Userfault {
    /// Takes up a new userfaultfd, which tells also what the process does with its memory; with `forks`, of its children too.
    ///
    /// # Errors
    /// The kernel does not know that, or EPERM: `forks` without CAP_SYS_PTRACE.
    pub fn begin(fd: OwnedFd, forks: bool) -> io::Result<Userfault> {
        let mut features = FEATURE_EVENT_REMAP | FEATURE_EVENT_REMOVE | FEATURE_EVENT_UNMAP;
        if forks {
            features |= FEATURE_EVENT_FORK;
        }
        let mut api = [UFFD_API, features, 0];
        let made = Userfault { fd };
        made.request(UFFDIO_API, &mut api)?;
        Ok(made)
    }

    fn request<const N: usize>(&self, request: libc::c_ulong, words: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: `words` is as long as the structure of the request, which consists of words; see the callers.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), request, words.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Watches private anonymous memory.
    ///
    /// # Errors
    /// EINVAL: some of it is not that, or is not mapped; EBUSY: somebody else watches it.
    pub fn register(&self, range: &Range<u64>) -> io::Result<()> {
        let mut words = [range.start, range.end - range.start, REGISTER_MODE_MISSING, 0];
        self.request(UFFDIO_REGISTER, &mut words)
    }

    /// Puts whole pages where none are. What is there already stays.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn copy(&self, address: u64, data: &[u8]) -> io::Result<Put> {
        let from = data.as_ptr() as u64;
        self.put(address, data.len() as u64, &mut |at, len| {
            // struct uffdio_copy: destination, source, length, mode, what was copied.
            let mut words = [at, from + (at - address), len, 0, 0];
            let done = self.request(UFFDIO_COPY, &mut words);
            (done, words[4])
        })
    }

    /// The same with zeros.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn zero(&self, range: &Range<u64>) -> io::Result<Put> {
        self.put(range.start, range.end - range.start, &mut |at, len| {
            // struct uffdio_zeropage: range, mode, what was done.
            let mut words = [at, len, 0, 0];
            let done = self.request(UFFDIO_ZEROPAGE, &mut words);
            (done, words[3])
        })
    }

    fn put(
        &self,
        address: u64,
        len: u64,
        request: &mut dyn FnMut(u64, u64) -> (io::Result<()>, u64),
    ) -> io::Result<Put> {
        const PAGE: u64 = linklayer::image::PAGE;
        let end = address + len;
        let mut at = address;
        // All at once, unless that crosses the border of an area, which the kernel refuses as it does what is not there at all.
        let mut most = len;
        while at < end {
            let part = most.min(end - at);
            let (done, count) = request(at, part);
            let Err(error) = done else {
                at += part;
                continue;
            };
            if (1..part).contains(&count) {
                at += count;
                continue;
            }
            match error.raw_os_error() {
                Some(libc::EAGAIN) => return Ok(Put::Changing),
                Some(libc::ESRCH) => return Ok(Put::Gone),
                // A page is there: who waits for it may not have been told.
                Some(libc::EEXIST) => {
                    self.wake(&(at..at + PAGE))?;
                    at += PAGE;
                }
                Some(libc::ENOENT | libc::EINVAL) if part > PAGE => most = PAGE,
                // No such memory, or it is another's.
                Some(libc::ENOENT | libc::EINVAL | libc::EFAULT) => at += PAGE,
                _ => return Err(error),
            }
        }
        Ok(Put::Done)
    }

    /// Has those who wait for these pages look again.
    ///
    /// # Errors
    /// None that says something.
    pub fn wake(&self, range: &Range<u64>) -> io::Result<()> {
        let mut words = [range.start, range.end - range.start];
        self.request(UFFDIO_WAKE, &mut words)
    }

    /// What has happened, without waiting.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read(&self) -> io::Result<Vec<Happened>> {
        let mut out = Vec::new();
        let mut messages = [0u8; 32 * MESSAGE];
        // SAFETY: the kernel writes at most so many bytes into the array.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), messages.len()) };
        if got < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(out),
                _ => Err(error),
            };
        }
        for message in messages[..got as usize].chunks_exact(MESSAGE) {
            let word = |at: usize| {
                let bytes = message.get(at..at + 8).and_then(|b| b.try_into().ok());
                bytes.map_or(0, u64::from_ne_bytes)
            };
            out.push(match message.first() {
                // Flags, then the address.
                Some(&EVENT_PAGEFAULT) => Happened::Fault(word(16)),
                Some(&EVENT_FORK) => {
                    let fd = word(8) as u32;
                    // SAFETY: the kernel has just installed this descriptor for us.
                    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
                    Happened::Fork(Userfault { fd })
                }
                Some(&EVENT_REMAP) => Happened::Moved(word(8), word(16), word(24)),
                Some(&EVENT_REMOVE) => Happened::Removed(word(8)..word(16)),
                Some(&EVENT_UNMAP) => Happened::Unmapped(word(8)..word(16)),
                _ => continue,
            });
        }
        Ok(out)
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
