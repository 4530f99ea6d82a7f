//! Waits with a relative timeout keep their deadline when the process moves.
//!
//! A wait that is interrupted for a capture is made again elsewhere with its arguments; what has passed of a relative
//! timeout is taken off them. Waits with an absolute deadline need nothing.

use std::sync::atomic::Ordering;
use std::time::Duration;

use linklayer::image::{Regs, Sleep, ThreadImage};
use linklayer::memory::GuestMemory;
use linklayer::stay::StayReason;

use super::guest::{Thread, Wait};

/// Room below the stack pointer that a function without frame may use (System V ABI, red zone), bytes.
const RED_ZONE: u64 = 128;

/// Shortens the timeout of the call that `image` will make again, if it is one that began at a known time. `waiting` is the wait
/// that this kernel restarts with restart_syscall(2), with its marks, `ahead_ns` how far home's CLOCK_MONOTONIC is ahead of this
/// node's.
///
/// # Errors
/// Which wait is restarted is not known: this kernel has interrupted it without anybody seeing it, for a signal that another thread
/// took. It cannot be made again elsewhere.
pub(super) fn keep(
    thread: &Thread,
    waiting: Option<(u32, [u64; 8])>,
    image: &mut ThreadImage,
    ahead_ns: i64,
) -> Result<(), StayReason> {
    let Some(rewound) = image.rewound else {
        return Ok(());
    };
    let mut made_again = rewound.nr;
    if i64::from(rewound.nr) == libc::SYS_restart_syscall {
        if thread.sleeps_at_home.load(Ordering::Acquire) {
            // Home's kernel knows how to go on.
            return Ok(());
        }
        made_again = restarted(&image.regs, waiting, *thread.sleep.lock()).ok_or(StayReason::TimedWait)?;
        image.regs.rax = u64::from(made_again);
    }
    shorten(thread, made_again, image, ahead_ns);
    Ok(())
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
    let elapsed = wait.started.elapsed();
    let left = wait.timeout.map(|timeout| timeout.saturating_sub(elapsed));
    match i64::from(wait.nr) {
        libc::SYS_poll => image.regs.rdx = left_ms(image.regs.rdx, elapsed),
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => image.regs.r10 = left_ms(image.regs.r10, elapsed),
        libc::SYS_nanosleep => {
            if let Some(sleep) = shortened(thread, image, left, ahead_ns) {
                image.regs.rdi = sleep.timespec;
                image.sleep = Some(sleep);
            }
        }
        libc::SYS_rt_sigtimedwait if image.regs.rdx != 0 => {
            if let Some(sleep) = shortened(thread, image, left, ahead_ns) {
                image.regs.rdx = sleep.timespec;
                image.sleep = Some(sleep);
            }
        }
        libc::SYS_clock_nanosleep if image.regs.rsi & libc::TIMER_ABSTIME as u64 == 0 => {
            if let Some(sleep) = shortened(thread, image, left, ahead_ns) {
                image.regs.rdx = sleep.timespec;
                image.sleep = Some(sleep);
            }
        }
        _ => {}
    }
}

/// What is left of a timeout in milliseconds; negative ones are for ever.
fn left_ms(timeout: u64, elapsed: Duration) -> u64 {
    let timeout = timeout as i32;
    if timeout < 0 {
        return timeout as u64;
    }
    u64::from((timeout as u32).saturating_sub(elapsed.as_millis().min(u128::from(u32::MAX)) as u32))
}

/// Writes what is left of the sleep below the thread's stack, where nothing else lies, and gives the place.
fn shortened(thread: &Thread, image: &ThreadImage, left: Option<Duration>, ahead_ns: i64) -> Option<Sleep> {
    let left = left?;
    let now_ns = shim::capture::clocks().monotonic_ns.saturating_add(ahead_ns);
    let sleep = Sleep {
        timespec: (image.regs.rsp - RED_ZONE - 64) & !15,
        until_ns: now_ns.saturating_add(i64::try_from(left.as_nanos()).unwrap_or(i64::MAX)),
    };
    thread
        .guest
        .memory
        .write(sleep.timespec, &sleep.left(now_ns))
        .ok()?;
    Some(sleep)
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

    #[test]
    fn timeouts_shrink_and_for_ever_stays() {
        assert_eq!(left_ms(1000, Duration::from_millis(400)), 600);
        assert_eq!(left_ms(1000, Duration::from_secs(9)), 0);
        assert_eq!(left_ms(u64::from(u32::MAX), Duration::from_secs(9)) as i32, -1);
    }
}
