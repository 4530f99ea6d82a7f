//! Waits with a relative timeout keep their deadline when the process moves.
//!
//! A wait that is interrupted for a capture is made again elsewhere with its arguments; what has passed of a relative
//! timeout is taken off them. Waits with an absolute deadline need nothing. When a wait began is known of those that come by here; of a
//! FUTEX_WAIT, which does not, it is looked up before its thread is stopped (`shim::timed`).

use std::io;
use std::sync::atomic::Ordering;

use linklayer::image::{Place, Regs, Sleep, ThreadImage};
use linklayer::memory::GuestMemory;
use linklayer::stay::StayReason;
use shim::memory::ProcessMemory;
use shim::timed;

use super::guest::{Thread, Wait};
use super::tracer::Traced;

/// Room below the stack pointer that a function without frame may use (System V ABI, red zone), bytes.
const RED_ZONE: u64 = 128;

/// Shortens the timeout of the call that `image` will make again, if it is one that began at a known time. `own` is what is known of
/// its thread: the wait that this kernel restarts with restart_syscall(2), with its marks, and the one with a relative timeout that it was taken
/// out of. `ahead_ns` is how far home's CLOCK_MONOTONIC is ahead of this node's.
///
/// # Errors
/// Which wait is restarted is not known: this kernel has interrupted it without anybody seeing it, for a signal that another thread
/// took. It cannot be made again elsewhere.
pub(super) fn keep(own: &Traced, image: &mut ThreadImage, ahead_ns: i64) -> Result<(), StayReason> {
    let Some(rewound) = image.rewound else {
        return Ok(());
    };
    let thread = &own.thread;
    let memory = &thread.guest.memory;
    let by_kernel = i64::from(rewound.nr) == libc::SYS_restart_syscall;
    if by_kernel && thread.sleeps_at_home.load(Ordering::Acquire) {
        // Home's kernel knows how to go on.
        return Ok(());
    }
    if let Some(wait) = own.timed.filter(|wait| wait.marks == image.regs.marks()) {
        image.regs.rax = wait.nr;
        let sleep = timed::end_at(&mut image.regs, wait.nr, wait.until_ns, |at, bytes| {
            write(memory, at, bytes)
        })
        .unwrap_or_default();
        image.sleep = sleep.map(|sleep| at_home(sleep, ahead_ns));
        return Ok(());
    }
    let mut made_again = rewound.nr;
    if by_kernel {
        made_again =
            restarted(&image.regs, own.waiting, *thread.sleep.lock()).ok_or(StayReason::TimedWait)?;
        image.regs.rax = u64::from(made_again);
    }
    shorten(thread, made_again, image, ahead_ns);
    Ok(())
}

/// A wait whose end is known by this node's clock.
fn at_home(sleep: Sleep, ahead_ns: i64) -> Sleep {
    Sleep {
        until_ns: sleep.until_ns.saturating_add(ahead_ns),
        ..sleep
    }
}

/// Number of the wait that a thread with these registers restarts: the one that it was seen in, or the one that it began last.
fn restarted(regs: &Regs, waiting: Option<(u32, [u64; 8])>, last: Option<Wait>) -> Option<u32> {
    let seen = waiting
        .filter(|(_, marks)| *marks == regs.marks())
        .map(|(nr, _)| nr);
    seen.or_else(|| {
        last.filter(|wait| wait.args == regs.call_args())
            .map(|wait| wait.nr)
    })
}

fn shorten(thread: &Thread, made_again: u32, image: &mut ThreadImage, ahead_ns: i64) {
    let Some(wait) = thread.sleep.lock().filter(|w| w.nr == made_again) else {
        return;
    };
    let memory = &thread.guest.memory;
    let elapsed = wait.started.elapsed();
    let until = |limit_ns: i64| {
        let elapsed_ns = i64::try_from(elapsed.as_nanos()).unwrap_or(i64::MAX);
        let left_ns = limit_ns.saturating_sub(elapsed_ns).max(0);
        shim::capture::clocks().monotonic_ns.saturating_add(left_ns)
    };
    let regs = &mut image.regs;
    let below_stack = (regs.rsp - RED_ZONE - 64) & !15;
    let relative = regs.rsi & libc::TIMER_ABSTIME as u64 == 0;
    let timespec = match i64::from(wait.nr) {
        libc::SYS_nanosleep => &mut regs.rdi,
        libc::SYS_clock_nanosleep if relative => &mut regs.rdx,
        libc::SYS_clock_nanosleep => return,
        _ => {
            let (nr, args) = (u64::from(wait.nr), regs.call_args());
            let until_ns = timed::limit_ns(nr, &args, |at, bytes| read(memory, at, bytes)).map(until);
            let sleep = until_ns.and_then(|until_ns| {
                timed::end_at(regs, nr, until_ns, |at, bytes| write(memory, at, bytes)).unwrap_or_default()
            });
            image.sleep = sleep.map(|sleep| at_home(sleep, ahead_ns));
            return;
        }
    };
    let Some(limit) = wait.timeout else {
        return;
    };
    let sleep = Sleep {
        place: Place::Timespec(below_stack),
        until_ns: until(i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX)),
    };
    let left = sleep.left(shim::capture::clocks().monotonic_ns);
    if write(memory, below_stack, &left).is_ok() {
        *timespec = below_stack;
        image.sleep = Some(at_home(sleep, ahead_ns));
    }
}

fn read(memory: &ProcessMemory, at: u64, bytes: &mut [u8]) -> io::Result<()> {
    GuestMemory::read(memory, at, bytes).map_err(|_| io::ErrorKind::AddrNotAvailable.into())
}

fn write(memory: &ProcessMemory, at: u64, bytes: &[u8]) -> io::Result<()> {
    GuestMemory::write(memory, at, bytes).map_err(|_| io::ErrorKind::AddrNotAvailable.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_that_is_restarted_is_known_by_its_arguments() {
        let sleep = Wait {
            nr: libc::SYS_clock_nanosleep as u32,
            args: [0, 0, 0x7000, 0, 5, 6],
            started: std::time::Instant::now(),
            timeout: None,
        };
        let mut regs = Regs::default();
        regs.set_call(libc::SYS_restart_syscall as u64, sleep.args);
        let futex = libc::SYS_futex as u32;
        assert_eq!(
            restarted(&regs, Some((futex, regs.marks())), Some(sleep)),
            Some(futex)
        );
        // A wait from before, at another place or with other arguments.
        let elsewhere = Regs { rsp: 8, ..regs }.marks();
        assert_eq!(
            restarted(&regs, Some((futex, elsewhere)), Some(sleep)),
            Some(sleep.nr)
        );
        regs.rdx += 16;
        assert_eq!(restarted(&regs, Some((futex, elsewhere)), Some(sleep)), None);
    }
}
