//! Resource limits of another process (prlimit(2)).

use std::io;

use linklayer::image::Limit;
use nix::errno::Errno;

/// Resources 0..16 exist on Linux (RLIMIT_CPU ... RLIMIT_RTTIME).
const RESOURCES: u32 = 16;

/// Reads one limit of a process.
pub fn get(pid: i32, resource: u32) -> io::Result<Limit> {
    let mut old = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel writes one rlimit64 to `old`.
    let ret = unsafe { libc::prlimit64(pid, resource, std::ptr::null(), &mut old) };
    Errno::result(ret)?;
    Ok(Limit {
        resource,
        soft: old.rlim_cur,
        hard: old.rlim_max,
    })
}

/// Sets one limit of a process. EPERM: the hard limit cannot be raised.
pub fn set(pid: i32, limit: &Limit) -> io::Result<()> {
    let new = libc::rlimit64 {
        rlim_cur: limit.soft,
        rlim_max: limit.hard,
    };
    // SAFETY: the kernel reads one rlimit64 from `new`.
    let ret = unsafe { libc::prlimit64(pid, limit.resource, &new, std::ptr::null_mut()) };
    Errno::result(ret)?;
    Ok(())
}

/// Reads all limits of a process.
pub fn all(pid: i32) -> io::Result<Vec<Limit>> {
    (0..RESOURCES).map(|resource| get(pid, resource)).collect()
}

/// Soft limits of a process that are raised to the hard ones while this lives; dropping it sets them back.
#[derive(Debug)]
pub(crate) struct Raised {
    pid: i32,
    before: Vec<Limit>,
}

impl Raised {
    pub(crate) fn new(pid: i32, resources: &[u32]) -> Self {
        let mut raised = Raised {
            pid,
            before: Vec::new(),
        };
        for resource in resources {
            if let Ok(limit) = get(pid, *resource)
                && limit.soft != limit.hard
                && set(
                    pid,
                    &Limit {
                        soft: limit.hard,
                        ..limit
                    },
                )
                .is_ok()
            {
                raised.before.push(limit);
            }
        }
        raised
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        for limit in &self.before {
            // It can only fail when the process is dead.
            let _ = set(self.pid, limit);
        }
    }
}
