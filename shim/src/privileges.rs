//! Programs that gain privileges when they are executed: set-user-id, set-group-id, file capabilities.
//!
//! execve(2) does not give them to a process whose tracer lacks CAP_SYS_PTRACE (security/commoncap.c,
//! cap_bprm_creds_from_file). Such a process is let go, and executes its program once more ([`execute_again`]).

use std::ffi::CString;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use linklayer::image::Regs;

use crate::memory::ProcessMemory;
use crate::ptrace::Stopped;

/// `linux/limits.h`, PATH_MAX.
const PATH_MAX: u64 = 4096;
/// What a fresh stack has below its stack pointer at least (fs/exec.c, setup_arg_pages: 128 KiB, or the limit of the stack).
const SCRATCH_BELOW_STACK: u64 = 2 * PATH_MAX;

/// Whether the program in this file, executed by somebody with these effective ids, gains privileges by that.
pub fn grants(path: &Path, meta: &Metadata, uid: u32, gid: u32) -> bool {
    // The set-group-id bit without the group's execute bit means something else (inode(7)).
    let (set_user, set_group) = (meta.mode() & 0o4000 != 0, meta.mode() & 0o2010 == 0o2010);
    (set_user && meta.uid() != uid || set_group && meta.gid() != gid || uid != 0 && has_capabilities(path))
        && !without_privileges(path)
}

/// Whether a file has capabilities (capabilities(7)); symbolic links are followed.
fn has_capabilities(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: both strings end with a NUL; with a size of 0 nothing is written.
    let len = unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"security.capability".as_ptr(),
            std::ptr::null_mut(),
            0,
        )
    };
    len > 0
}

/// Whether the file is on a file system that grants nothing (mount(2), MS_NOSUID).
fn without_privileges(path: &Path) -> bool {
    nix::sys::statvfs::statvfs(path)
        .is_ok_and(|fs| fs.flags().contains(nix::sys::statvfs::FsFlags::ST_NOSUID))
}

/// Whether a process that has just executed a program lacks the privileges which that program grants. When nothing can be
/// found out, it does not.
pub fn lacks(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let words = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("");
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    // Real, effective, saved, file system (proc_pid_status(5)).
    let effective = |name: &str| words(name).get(1).and_then(|w| w.parse().ok());
    let (Some(uid), Some(gid)) = (effective("Uid:"), effective("Gid:")) else {
        return false;
    };
    let none = |name: &str| words(name).first().is_none_or(|w| w.bytes().all(|b| b == b'0'));
    let exe = PathBuf::from(format!("/proc/{pid}/exe"));
    none("NoNewPrivs:") && none("CapPrm:") && exe.metadata().is_ok_and(|meta| grants(&exe, &meta, uid, gid))
}

/// Lets go of a process that stands at PTRACE_EVENT_EXEC: without a tracer it executes the same program with the same
/// arguments again, which then has its privileges. Nothing of the image that is thrown away has run.
///
/// # Errors
/// The process cannot be read or written (a program that its user may not read): it is stopped as it was.
pub fn execute_again(mut stopped: Stopped) -> Result<(), (Stopped, io::Error)> {
    match prepare(&mut stopped) {
        Ok(()) => {
            // Fails only when it was killed.
            let _ = stopped.detach(0);
            Ok(())
        }
        Err(e) => Err((stopped, e)),
    }
}

/// Makes the next thing that the process does an execve(2) of its own program.
fn prepare(stopped: &mut Stopped) -> io::Result<()> {
    let pid = stopped.tid();
    let memory = ProcessMemory::new(pid);
    let mut regs = stopped.regs().map_err(io::Error::other)?;
    // The stack begins with the number of arguments, the arguments, 0, and the environment (System V ABI, AMD64, 3.4.1).
    let mut word = [0; 8];
    memory.read_forced(regs.rsp, &mut word)?;
    let arguments = regs.rsp + 8;
    let environment = u64::from_le_bytes(word)
        .checked_add(1)
        .and_then(|count| count.checked_mul(8))
        .and_then(|len| arguments.checked_add(len))
        .ok_or_else(|| io::Error::other("no arguments on the stack"))?;
    let path = match as_executed(pid, &memory) {
        Some(address) => address,
        None => {
            let mut name = std::fs::read_link(format!("/proc/{pid}/exe"))?
                .into_os_string()
                .into_encoded_bytes();
            name.push(0);
            let address = regs.rsp - SCRATCH_BELOW_STACK;
            memory.write_forced(address, &name)?;
            address
        }
    };
    memory.write_forced(regs.rip, &CODE)?;
    regs = Regs {
        rdi: path,
        rsi: arguments,
        rdx: environment,
        ..regs
    };
    stopped.set_regs(&regs).map_err(io::Error::other)
}

/// mov eax, __NR_execve; syscall; mov edi, 127; mov eax, __NR_exit_group; syscall; ud2. The register with the number is set
/// here because the call that is ending would overwrite it.
const CODE: [u8; 21] = [
    0xb8, 0x3b, 0, 0, 0, 0x0f, 0x05, 0xbf, 0x7f, 0, 0, 0, 0xb8, 0xe7, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x0b,
];

/// The address of the path by which the program was executed, when it names the very file that runs: it does not for a
/// script, and for a descriptor that is closed by now (fexecve(3)).
fn as_executed(pid: i32, memory: &ProcessMemory) -> Option<u64> {
    /// AT_EXECFN of getauxval(3).
    const AT_EXECFN: u64 = 31;
    let address = crate::process::auxiliary(pid, AT_EXECFN).ok()??;
    // It is the last thing on the stack, so there may be less than a longest path behind it.
    let mut path = Vec::new();
    while !path.contains(&0) {
        let mut byte = [0];
        memory.read_forced(address + path.len() as u64, &mut byte).ok()?;
        path.push(byte[0]);
        if path.len() as u64 > PATH_MAX {
            return None;
        }
    }
    path.pop();
    let top = if path.first() == Some(&b'/') {
        "root"
    } else {
        "cwd"
    };
    let mut seen = format!("/proc/{pid}/{top}/").into_bytes();
    seen.extend_from_slice(&path);
    let named = std::fs::metadata(std::ffi::OsStr::from_bytes(&seen)).ok()?;
    let running = std::fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    ((named.dev(), named.ino()) == (running.dev(), running.ino())).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_ids_count_only_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("program");
        std::fs::write(&file, "").unwrap();
        let (own, group) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        let with = |mode: u32| {
            std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
            std::fs::metadata(&file).unwrap()
        };
        let granting = !without_privileges(&file);
        assert!(!grants(&file, &with(0o755), 7, 7));
        assert_eq!(grants(&file, &with(0o4755), own + 1, group), granting);
        assert!(!grants(&file, &with(0o4755), own, group));
        assert_eq!(grants(&file, &with(0o2755), own, group + 1), granting);
        // Mandatory locking, and not a program with a group's privileges.
        assert!(!grants(&file, &with(0o2745), own, group + 1));
        assert!(!lacks(std::process::id() as i32));
    }
}
