//! Installing a filter in a stopped process.

use std::os::fd::OwnedFd;

use linklayer::memory::GuestMemory;
use nix::errno::Errno;
use thiserror::Error;

use super::{FilterError, Pass, Template};
use crate::memory::ProcessMemory;
use crate::notify::Listener;

// linux/seccomp.h
const SET_MODE_FILTER: u64 = 1;
const FLAG_TSYNC: u64 = 1;
const FLAG_SPEC_ALLOW: u64 = 4;
const FLAG_NEW_LISTENER: u64 = 8;
const FLAG_TSYNC_ESRCH: u64 = 16;
const FLAG_WAIT_KILLABLE_RECV: u64 = 32;

/// Why a filter was not installed, or its listener not obtained. The process is in between then, and of no use any more.
#[derive(Debug, Error)]
pub enum InstallError<E: std::error::Error + 'static> {
    /// The filter could not be made.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A call could not be made in the process.
    #[error("injecting {call}: {source}")]
    Inject {
        /// the call
        call: &'static str,
        /// the injector's error
        source: E,
    },
    /// A call was made in the process and failed.
    #[error("{call} in the process: {errno}")]
    Refused {
        /// the call
        call: &'static str,
        /// the kernel's error
        errno: Errno,
    },
    /// The process's memory could not be written.
    #[error("writing the filter to the process's memory: {0}")]
    Memory(#[from] linklayer::memory::Fault),
    /// The listener could not be taken out of the process.
    #[error("taking the listener: {0}")]
    Listener(std::io::Error),
}

/// A filter that is in force.
#[derive(Debug)]
pub struct Installed {
    /// Where the calls arrive.
    pub listener: Listener,
    /// Lets injected calls pass.
    pub pass: Pass,
}

/// Installs the filter of the system call table in process `pid`, which is stopped with all of its threads. `call` makes a system
/// call in one of them and returns its raw result. With `all_threads` the filter is put on all threads of the process, which must
/// have the same filters before (none); otherwise on the calling one, and those that it makes afterwards.
///
/// In the process it needs 16 KiB of address space for a moment and a free descriptor (RLIMIT_AS, RLIMIT_NOFILE: set these
/// afterwards), and leaves nothing but the filter and no_new_privs behind. Calls that change what the kernel mitigates are not
/// among its flags: speculation stays as it is natively.
///
/// # Errors
/// See [`InstallError`]; EINVAL from seccomp: the kernel is older than 5.19.
pub fn install<E: std::error::Error + 'static>(
    pid: i32,
    all_threads: bool,
    mut call: impl FnMut(i64, [u64; 6]) -> Result<i64, E>,
) -> Result<Installed, InstallError<E>> {
    let pass = Pass::random(None)?;
    let program = Template::of_table()?.program(Some(&pass))?;
    let mut demand = |name: &'static str, nr: i64, args: [u64; 6]| match call(nr, args) {
        Err(source) => Err(InstallError::Inject { call: name, source }),
        Ok(ret) if (-4095..0).contains(&ret) => Err(InstallError::Refused {
            call: name,
            errno: Errno::from_raw(-ret as i32),
        }),
        Ok(ret) => Ok(ret as u64),
    };

    let code = program.to_bytes();
    // struct sock_fprog: a length, and the address of the instructions, which follow.
    const HEADER: u64 = 16;
    let len = (HEADER + code.len() as u64).next_multiple_of(4096);
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let scratch = demand("mmap", libc::SYS_mmap, [0, len, prot, flags, u64::MAX, 0])?;
    let mut block = Vec::with_capacity(len as usize);
    block.extend_from_slice(&(program.instructions().len() as u64).to_ne_bytes());
    block.extend_from_slice(&(scratch + HEADER).to_ne_bytes());
    block.extend_from_slice(&code);
    ProcessMemory::new(pid).write(scratch, &block)?;

    let no_new_privs = [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0, 0];
    demand("prctl", libc::SYS_prctl, no_new_privs)?;
    let mut flags = FLAG_NEW_LISTENER | FLAG_WAIT_KILLABLE_RECV | FLAG_SPEC_ALLOW;
    if all_threads {
        // Without the second a failure would be a thread id that cannot be told from a descriptor.
        flags |= FLAG_TSYNC | FLAG_TSYNC_ESRCH;
    }
    let number = demand(
        "seccomp",
        libc::SYS_seccomp,
        [SET_MODE_FILTER, flags, scratch, 0, 0, 0],
    )?;
    // From here on the calls need the pass.
    let listener: OwnedFd = crate::fd::get_from(pid, number as i32).map_err(InstallError::Listener)?;
    demand("close", libc::SYS_close, pass.args([number]))?;
    demand("munmap", libc::SYS_munmap, pass.args([scratch, len]))?;
    Ok(Installed {
        listener: Listener::new(listener),
        pass,
    })
}
