//! The trials behind the probes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Outcome;
use crate::cage::{Blank, Cage, CageError, CageOptions};
use crate::memory::ProcessMemory;
use crate::notify::{Listener, NotifyError};
use crate::userfault::UFFDIO_API;

/// Turns a failure into text.
fn outcome<T, E: std::fmt::Display>(result: Result<T, E>) -> Outcome {
    match result {
        Ok(_) => Outcome::Works,
        Err(e) => Outcome::Missing(e.to_string()),
    }
}

fn last<T>(ret: i64, value: T) -> io::Result<T> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

fn new_cage(monotonic_ahead_ns: i64) -> Result<Cage, CageError> {
    Cage::new(CageOptions {
        monotonic_ahead_ns,
        hostname: "probe".into(),
        uid: 1000,
        gid: 1000,
        ..CageOptions::default()
    })
}

fn kill_and_reap(blank: &Blank) {
    // SAFETY: our own child, which nobody else waits for; a null status is allowed.
    unsafe {
        libc::kill(blank.outer_pid, libc::SIGKILL);
        libc::waitpid(blank.outer_pid, std::ptr::null_mut(), libc::__WALL);
    }
}

/// Runs `trial` in a cage.
fn caged(monotonic_ahead_ns: i64, trial: impl FnOnce(&Cage) -> Result<Outcome, CageError>) -> Outcome {
    let cage = match new_cage(monotonic_ahead_ns) {
        Ok(cage) => cage,
        Err(e) => return Outcome::Missing(e.to_string()),
    };
    let result = trial(&cage).unwrap_or_else(|e| Outcome::Missing(e.to_string()));
    cage.teardown(Duration::from_secs(1));
    result
}

pub fn cage() -> Outcome {
    caged(0, |_| Ok(Outcome::Works))
}

pub fn clocks() -> Outcome {
    const DAY_NS: i64 = 86_400 * 1_000_000_000;
    caged(100 * DAY_NS, |_| Ok(Outcome::Works))
}

pub fn chosen_pids() -> Outcome {
    caged(0, |cage| {
        kill_and_reap(&cage.spawn_blank(12_345, &[])?);
        match cage.spawn_blank(4_194_000, &[]) {
            Ok(blank) => {
                kill_and_reap(&blank);
                Ok(Outcome::Works)
            }
            Err(CageError::PidRange(_)) => {
                let most = std::fs::read_to_string("/proc/sys/kernel/pid_max").unwrap_or_default();
                Ok(Outcome::Limited(format!("pids below {} only", most.trim())))
            }
            Err(e) => Err(e),
        }
    })
}

pub fn last_pid() -> Outcome {
    caged(0, |cage| cage.set_last_pid(10_000).map(|()| Outcome::Works))
}

pub fn notifications() -> Outcome {
    // With a null program valid flags give EFAULT, unknown ones EINVAL.
    const FLAGS: u64 = 1 | 8 | 16 | 32;
    // SAFETY: a null program is read from and nothing else.
    let ret = unsafe { libc::syscall(libc::SYS_seccomp, 1, FLAGS, 0) };
    match (ret, Errno::last()) {
        (-1, Errno::EFAULT) => Outcome::Works,
        (_, errno) => Outcome::Missing(format!("seccomp: {errno}")),
    }
}

/// A listener for the calls of nobody: made by a forked process that ends at once, and taken over a shared table of descriptors.
fn a_listener() -> io::Result<Listener> {
    let allow_all: [u64; 1] = [u64::from_ne_bytes([0x06, 0, 0, 0, 0, 0, 0xff, 0x7f])];
    let program = libc::sock_fprog {
        len: 1,
        filter: allow_all.as_ptr().cast_mut().cast(),
    };
    let (read, write) = io::pipe()?;
    // SAFETY: the child shares the table of descriptors but has its own memory. It makes three system calls with pointers into
    // its copy of this frame, and ends.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES | libc::SIGCHLD, 0, 0, 0, 0) };
    if pid == 0 {
        // SAFETY: as above.
        unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            let fd = libc::syscall(libc::SYS_seccomp, 1, 8, &raw const program) as i32;
            libc::write(write.as_raw_fd(), (&raw const fd).cast(), 4);
            libc::_exit(0);
        }
    }
    last(pid, ())?;
    let mut bytes = [0u8; 4];
    let got = io::Read::read_exact(&mut &read, &mut bytes);
    // SAFETY: our own child; a null status is allowed.
    unsafe { libc::waitpid(pid as i32, std::ptr::null_mut(), 0) };
    got?;
    match i32::from_ne_bytes(bytes) {
        fd if fd < 0 => Err(io::Error::other("no listener")),
        // SAFETY: the child put it into the table that it shared, and nobody else knows it.
        fd => Ok(Listener::new(unsafe { OwnedFd::from_raw_fd(fd) })),
    }
}

pub fn same_cpu_wakeup() -> Outcome {
    outcome(
        a_listener().and_then(|listener| match listener.prefer_same_cpu() {
            true => Ok(()),
            false => Err(io::Error::last_os_error()),
        }),
    )
}

pub fn mapped_files() -> Outcome {
    let result = a_listener().and_then(|listener| {
        let null = File::open("/dev/null")?;
        match listener.add_fd(0, null.as_fd(), None, true) {
            // There is no call of this number, which only a kernel that knows the request can tell.
            Err(NotifyError::Gone) | Ok(_) => Ok(()),
            Err(e) => Err(io::Error::other(e)),
        }
    });
    outcome(result)
}

/// Runs `trial` on a child that waits.
fn with_child(trial: impl FnOnce(i32) -> io::Result<()>) -> Outcome {
    // SAFETY: the child only waits, and dies with this process or by our signal.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: no pointers.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                libc::pause();
            }
        }
    }
    let result = last(pid.into(), ()).and_then(|()| {
        let result = trial(pid);
        // SAFETY: our own child; a null status is allowed.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL);
        }
        result
    });
    outcome(result)
}

pub fn tracing() -> Outcome {
    let other = io::Error::other::<crate::ptrace::PtraceError>;
    with_child(|pid| {
        crate::ptrace::seize(pid, crate::ptrace::usual_options()).map_err(other)?;
        crate::ptrace::interrupt(pid).map_err(other)?;
        let stopped = crate::ptrace::wait_stop(pid).map_err(other)?;
        stopped.regs().map_err(other)?;
        stopped.rseq().map_err(other)?;
        stopped.sigmask().map_err(other)?;
        stopped
            .pending(crate::ptrace::PendingQueue::Process)
            .map_err(other)?;
        Ok(())
    })
}

pub fn timed_waits() -> Outcome {
    if crate::timed::is_told() {
        Outcome::Works
    } else {
        Outcome::Missing("there is no se.exec_start in it".into())
    }
}

pub fn memory_access() -> Outcome {
    let mut there = [1u8; 8];
    with_child(|pid| {
        let mut here = [0u8; 8];
        let mine = libc::iovec {
            iov_base: here.as_mut_ptr().cast(),
            iov_len: 8,
        };
        let theirs = libc::iovec {
            iov_base: there.as_mut_ptr().cast(),
            iov_len: 8,
        };
        // SAFETY: `mine` names a live buffer; `theirs` is an address in the child.
        last(
            unsafe { libc::process_vm_readv(pid, &mine, 1, &theirs, 1, 0) } as i64,
            (),
        )
    })
}

pub fn map_queries() -> Outcome {
    if ProcessMemory::new(std::process::id() as i32).can_query() {
        Outcome::Works
    } else {
        Outcome::Missing("PROCMAP_QUERY is not known".into())
    }
}

pub fn descriptors() -> Outcome {
    with_child(|pid| {
        crate::fd::get_from(pid, 2)
            .or_else(|_| crate::fd::get_from(pid, 0))
            .map(drop)
    })
}

pub fn memfd() -> Outcome {
    outcome(memfd_create("mosrun-probe", MFdFlags::MFD_CLOEXEC))
}

/// Maps one anonymous page for the length of a trial.
fn with_page(trial: impl FnOnce(*mut libc::c_void) -> io::Result<()>) -> io::Result<()> {
    // SAFETY: a new mapping at a place of the kernel's choice.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let result = trial(page);
    // SAFETY: the mapping that was just made.
    unsafe { libc::munmap(page, 4096) };
    result
}

pub fn drop_locked() -> Outcome {
    const MADV_DONTNEED_LOCKED: i32 = 24;
    outcome(with_page(|page| {
        // SAFETY: the page is the trial's own and holds nothing.
        let ret = unsafe { libc::madvise(page, 4096, MADV_DONTNEED_LOCKED) };
        last(ret.into(), ())
    }))
}

pub fn restore() -> Outcome {
    const PR_SET_MM_MAP_SIZE: i32 = 15;
    let mut size = 0u32;
    // SAFETY: the kernel writes one u32.
    let ret = unsafe { libc::prctl(libc::PR_SET_MM, PR_SET_MM_MAP_SIZE, &raw mut size, 0, 0) };
    outcome(last(ret.into(), ()))
}

pub fn page_scan() -> Outcome {
    /// struct pm_scan_arg (linux/fs.h).
    #[repr(C)]
    #[derive(Default)]
    struct ScanArg {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        vec: u64,
        vec_len: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_anyof_mask: u64,
        return_mask: u64,
    }
    const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
    const PAGE_IS_PRESENT: u64 = 8;
    let result = File::open("/proc/self/pagemap").and_then(|file| {
        with_page(|page| {
            let mut regions = [0u64; 3];
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start: page.addr() as u64,
                end: page.addr() as u64 + 4096,
                vec: (&raw mut regions).addr() as u64,
                vec_len: 1,
                category_mask: PAGE_IS_PRESENT,
                return_mask: PAGE_IS_PRESENT,
                ..ScanArg::default()
            };
            // SAFETY: `arg` is the structure of the announced size, and names room for one region of three words.
            last(
                unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) }.into(),
                (),
            )
        })
    });
    outcome(result)
}

/// Opens a userfaultfd for user-mode faults with these features.
fn userfault(features: u64) -> io::Result<()> {
    const UFFD_USER_MODE_ONLY: i32 = 1;
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
    last(fd, ())?;
    // SAFETY: the kernel just gave us this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = [0xaau64, features, 0];
    // SAFETY: `api` has the three words of struct uffdio_api.
    last(
        unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) }.into(),
        (),
    )
}

pub fn dirty_tracking() -> Outcome {
    const WP_UNPOPULATED: u64 = 1 << 13;
    const WP_ASYNC: u64 = 1 << 15;
    outcome(userfault(WP_ASYNC | WP_UNPOPULATED))
}

pub fn late_pages() -> Outcome {
    match crate::userfault::source() {
        Ok(_) => Outcome::Works,
        Err(why) => Outcome::Missing(why),
    }
}

pub fn leases() -> Outcome {
    let path = std::env::temp_dir().join(format!("mosrun-probe-{}", std::process::id()));
    let result = File::create_new(&path).and_then(|writer| {
        drop(writer);
        let file = File::open(&path);
        let result = file.and_then(|file| crate::fd::try_read_lease(&file));
        std::fs::remove_file(&path)?;
        result
    });
    outcome(result)
}
