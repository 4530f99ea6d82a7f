//! Memory of another process through /proc/PID/mem, which reaches read-only and PROT_NONE private pages too.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

/// An open /proc/PID/mem. The opener must be allowed to trace the process (proc_pid_mem(5)). It stays bound to the address space
/// that the process had when it was opened: after an exec it reads and writes nothing.
#[derive(Debug)]
pub struct Memory(File);

impl Memory {
    /// Opens the memory of the process (or thread) `pid`.
    pub fn open(pid: i32) -> io::Result<Self> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map(Memory)
    }

    /// Reads exactly `buf.len()` bytes at `address`. EIO: something is not mapped (or a guard region).
    pub fn read(&self, address: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buf, address)
    }

    /// Writes all of `data` at `address`, whatever the protection of private pages there. EIO: something is not mapped.
    pub fn write(&self, address: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, address)
    }

    /// Reads one 64-bit word.
    pub fn word(&self, address: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}
