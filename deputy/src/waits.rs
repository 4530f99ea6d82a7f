//! Timed waits of threads that leave home.
//!
//! A wait that is interrupted leaves what is left of it with the kernel, in its thread's restart block (restart_syscall(2)),
//! where nobody can read it, or is not restarted at all (`restarts`). What becomes of it elsewhere depends on the call:
//!
//! - Deadlines in the arguments (futex(2) with FUTEX_WAIT_BITSET and its kind, which is what C libraries use) and waits for ever
//!   (poll(2) with a negative timeout) are made again as they are.
//! - A relative sleep for which the kernel has written down the rest, where the program wanted it, is made again with that.
//! - Any other relative sleep goes on at home: the thread calls restart_syscall(2) where it is, which is forwarded, and its vessel's
//!   thread, which has the restart block, sleeps on.
//! - poll(2), FUTEX_WAIT, epoll_wait(2) and others with a relative timeout are made again with what is left of it, as far as the thread was
//!   looked at before it was interrupted (`shim::timed`). If not, the process leaves when they are over.

use linklayer::image::{Place, ProcessImage, Rewound, Sleep, ThreadImage};
use shim::memory::ProcessMemory;
use shim::ptrace::Stopped;
use shim::timed;

use crate::home::Home;
use crate::restarts;

/// The kernel's code for a wait whose rest it keeps to itself (ERESTART_RESTARTBLOCK).
const RESTART_BLOCK: i32 = -516;
/// Below the stack pointer, behind what a function without frame may use (System V ABI, red zone), bytes.
const BELOW_STACK: u64 = 128 + 64;

impl Home {
    /// Takes note of the threads of a process that came home whose sleeps have gone on here all the time.
    pub(crate) fn remember_waits(&mut self, image: &ProcessImage) {
        let restart = libc::SYS_restart_syscall as u32;
        let sleeping = |t: &&ThreadImage| t.rewound.is_some() && t.regs.rax == u64::from(restart);
        for thread in image.threads.iter().filter(sleeping) {
            if let Some(task) = self.tasks.get_mut(&thread.tid) {
                task.waiting = Some((restart, thread.regs.marks()));
            }
        }
    }

    /// A thread of a process at home goes on. A wait of its that the kernel does not restart as it was begins anew, for what is left
    /// of it.
    pub(crate) fn begin_sleep(&mut self, pid: i32, stopped: &mut Stopped) -> anyhow::Result<()> {
        let tid = stopped.tid();
        let memory = ProcessMemory::new(tid);
        let brought = self.processes.get_mut(&pid).and_then(|process| {
            let at = process.sleeps.iter().position(|(of, _)| *of == tid)?;
            Some(process.sleeps.swap_remove(at).1)
        });
        if let Some(sleep) = brought {
            let now_ns = shim::capture::clocks().monotonic_ns;
            match sleep.place {
                Place::Timespec(at) => {
                    if let Err(e) = memory.write_forced(at, &sleep.left(now_ns)) {
                        tracing::debug!(pid, error = %e, "rest of a sleep");
                    }
                }
                Place::Milliseconds(_) => {
                    let mut regs = stopped.regs()?;
                    sleep.put_left(&mut regs, now_ns);
                    stopped.set_regs(&regs)?;
                }
            }
            return Ok(());
        }
        let Some(wait) = self.tasks.get(&tid).and_then(|task| task.timed) else {
            return Ok(());
        };
        let mut regs = stopped.regs()?;
        if regs.orig_rax == wait.nr && restarts::is_made_to(&regs) {
            let end = timed::end_at(&mut regs, wait.nr, wait.until_ns, |at, bytes| {
                memory.write_forced(at, bytes)
            });
            match end {
                Ok(_) => stopped.set_regs(&regs)?,
                Err(e) => tracing::debug!(pid, error = %e, "rest of a wait"),
            }
        }
        Ok(())
    }

    /// Sees to it that the waits of a process that leaves end when they should. Not if one is of those that have to be over.
    pub(crate) fn settle_waits(&mut self, image: &mut ProcessImage) -> bool {
        let memory = ProcessMemory::new(image.reached_by());
        let mut known = true;
        for thread in &mut image.threads {
            let marks = thread.regs.marks();
            let (Some(rewound), Some(task)) = (thread.rewound, self.tasks.get_mut(&thread.tid)) else {
                continue;
            };
            if let Some(wait) = task.timed.filter(|wait| wait.marks == marks) {
                thread.regs.rax = wait.nr;
                let sleep = timed::end_at(&mut thread.regs, wait.nr, wait.until_ns, |at, bytes| {
                    memory.write_forced(at, bytes)
                });
                known &= sleep.is_ok();
                thread.sleep = sleep.unwrap_or_default();
                continue;
            }
            // The kernel may have made it ready to be made again.
            let by_kernel = |r: &Rewound| r.code == RESTART_BLOCK || r.nr == libc::SYS_restart_syscall as u32;
            if !by_kernel(&rewound) {
                known &= thread.sleep.is_some() || !restarts::would_begin_anew(&thread.regs, &memory);
                continue;
            }
            let nr = if rewound.nr == libc::SYS_restart_syscall as u32 {
                // It was interrupted before, by us or by a signal that it did not see.
                task.waiting.filter(|(_, seen)| *seen == marks).map(|(nr, _)| nr)
            } else {
                task.waiting = Some((rewound.nr, marks));
                Some(rewound.nr)
            };
            known &= nr.is_some_and(|nr| settle(thread, nr, &memory));
        }
        known
    }
}

/// Makes a thread's wait one that can be made elsewhere.
fn settle(thread: &mut ThreadImage, nr: u32, memory: &ProcessMemory) -> bool {
    /// FUTEX_WAIT_BITSET, FUTEX_LOCK_PI, FUTEX_WAIT_REQUEUE_PI, FUTEX_LOCK_PI2: with a deadline (futex(2)).
    const ABSOLUTE: [u64; 4] = [9, 6, 11, 13];
    /// Clocks that tell the same everywhere: REALTIME, MONOTONIC, BOOTTIME, TAI.
    const CLOCKS: [u64; 4] = [0, 1, 7, 11];
    let regs = &mut thread.regs;
    let (request, rest) = match i64::from(nr) {
        libc::SYS_futex if ABSOLUTE.contains(&(regs.rsi & 0x7f)) => {
            regs.rax = u64::from(nr);
            return true;
        }
        libc::SYS_poll if (regs.rdx as i32) < 0 => {
            regs.rax = u64::from(nr);
            return true;
        }
        // It went on at home before.
        libc::SYS_restart_syscall => return true,
        libc::SYS_nanosleep => (&mut regs.rdi, regs.rsi),
        libc::SYS_clock_nanosleep if CLOCKS.contains(&regs.rdi) => (&mut regs.rdx, regs.r10),
        _ => return false,
    };
    let mut left = [0; 16];
    if rest == 0 || memory.read_forced(rest, &mut left).is_err() {
        regs.rax = libc::SYS_restart_syscall as u64;
        return true;
    }
    let timespec = (regs.rsp - BELOW_STACK) & !15;
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, i64::from_ne_bytes);
    let left_ns = word(&left[..8])
        .saturating_mul(1_000_000_000)
        .saturating_add(word(&left[8..]));
    if memory.write_forced(timespec, &left).is_err() {
        return false;
    }
    *request = timespec;
    regs.rax = u64::from(nr);
    thread.sleep = Some(Sleep {
        place: Place::Timespec(timespec),
        until_ns: shim::capture::clocks().monotonic_ns.saturating_add(left_ns),
    });
    true
}

#[cfg(test)]
mod tests {
    use linklayer::image::Regs;

    use super::*;

    fn thread(args: [u64; 6], rsp: u64) -> ThreadImage {
        let mut regs = Regs {
            rsp,
            ..Regs::default()
        };
        regs.set_call(libc::SYS_restart_syscall as u64, args);
        ThreadImage {
            regs,
            ..ThreadImage::default()
        }
    }

    #[test]
    fn waits_are_made_again_where_they_can_be() {
        let memory = ProcessMemory::new(std::process::id() as i32);
        let mut stack = vec![0u64; 100];
        let top = stack.as_mut_ptr_range().end as u64;
        let rest = [2i64, 500_000_000];
        let rest_at = rest.as_ptr() as u64;
        let again = |nr: i64, args| {
            let mut thread = thread(args, top);
            settle(&mut thread, nr as u32, &memory).then_some((thread.regs, thread.sleep))
        };
        // FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG has its deadline in its arguments, FUTEX_WAIT has not.
        let deadline = again(libc::SYS_futex, [1, 0x89, 0, 1, 0, 0]);
        assert_eq!(
            deadline.map(|(r, s)| (r.rax as i64, s)),
            Some((libc::SYS_futex, None))
        );
        assert!(again(libc::SYS_futex, [1, 0x80, 0, 1, 0, 0]).is_none());
        assert!(again(libc::SYS_poll, [1, 1, u64::from(u32::MAX), 0, 0, 0]).is_some());
        assert!(again(libc::SYS_poll, [1, 1, 1000, 0, 0, 0]).is_none());
        let at_home = again(libc::SYS_nanosleep, [1, 0, 0, 0, 0, 0]);
        let restarted = Some((libc::SYS_restart_syscall, None));
        assert_eq!(at_home.map(|(r, s)| (r.rax as i64, s)), restarted);
        // The CPU clock of the process is not the same elsewhere.
        assert!(again(libc::SYS_clock_nanosleep, [2, 0, 1, 0, 0, 0]).is_none());
        let known = again(libc::SYS_clock_nanosleep, [1, 0, 1, rest_at, 0, 0]);
        let Some((regs, Some(sleep))) = known else {
            panic!("{known:?}")
        };
        let Place::Timespec(timespec) = sleep.place else {
            panic!("{sleep:?}")
        };
        assert_eq!((regs.rax as i64, regs.rdx), (libc::SYS_clock_nanosleep, timespec));
        assert!(timespec < top - 128 && timespec % 16 == 0);
        let mut written = [0; 16];
        assert!(memory.read_forced(timespec, &mut written).is_ok());
        assert_eq!(written, sleep.left(sleep.until_ns - 2_500_000_000));
    }
}
