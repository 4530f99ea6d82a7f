//! Running a fresh program image to its ELF entry point, where it is moved.
//!
//! At home the loader works on files that are there, and what it leaves behind is a few dirty pages; away each of its
//! calls would be a round trip.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use linklayer::image::Regs;

/// The int3 instruction.
const INT3: u8 = 0xcc;
/// AT_ENTRY of getauxval(3).
const AT_ENTRY: u64 = 9;

/// A breakpoint at a process's entry point.
#[derive(Clone, Debug)]
pub struct Breakpoint {
    address: u64,
    original: u8,
}

impl Breakpoint {
    /// Sets it in a stopped process that has just executed a program (PTRACE_EVENT_EXEC).
    ///
    /// # Errors
    /// When its auxiliary vector names no entry point, or its memory cannot be written.
    pub fn set(pid: i32) -> anyhow::Result<Breakpoint> {
        let address = shim::process::auxiliary(pid, AT_ENTRY)
            .context("auxiliary vector")?
            .context("no entry point in the auxiliary vector")?;
        let memory = memory(pid)?;
        let mut original = [0];
        memory
            .read_exact_at(&mut original, address)
            .context("entry point")?;
        memory.write_all_at(&[INT3], address).context("entry point")?;
        Ok(Breakpoint {
            address,
            original: original[0],
        })
    }

    /// Whether these registers are those just after the breakpoint was hit.
    pub fn hit(&self, regs: &Regs) -> bool {
        regs.rip == self.address + 1
    }

    /// Where the program begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Puts the original instruction back.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn remove(&self, pid: i32) -> anyhow::Result<()> {
        memory(pid)?
            .write_all_at(&[self.original], self.address)
            .context("entry point")
    }
}

fn memory(pid: i32) -> anyhow::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .context("memory of the process")
}
