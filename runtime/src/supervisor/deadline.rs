//! Waits with a relative timeout keep their deadline when the process moves.
//!
//! A wait that is interrupted for a capture is made again elsewhere with its arguments; what has passed of a relative
//! timeout is taken off them. Waits with an absolute deadline need nothing.

use std::sync::atomic::Ordering;
use std::time::Duration;

use linklayer::image::{Sleep, ThreadImage};
use linklayer::memory::GuestMemory;

use super::guest::Thread;

/// Room below the stack pointer that a function without frame may use (System V ABI, red zone), bytes.
const RED_ZONE: u64 = 128;

/// Shortens the timeout of the call that `image` will make again, if it is one that began at a known time. `waiting` is the wait
/// that this kernel restarts with restart_syscall(2), `ahead_ns` how far home's CLOCK_MONOTONIC is ahead of this node's.
pub(super) fn keep(thread: &Thread, waiting: Option<u32>, image: &mut ThreadImage, ahead_ns: i64) {
    let Some(rewound) = image.rewound else { return };
    let mut made_again = rewound.nr;
    if i64::from(rewound.nr) == libc::SYS_restart_syscall {
        if thread.sleeps_at_home.load(Ordering::Acquire) {
            // Home's kernel knows how to go on.
            return;
        }
        let Some(waiting) = waiting else { return };
        made_again = waiting;
        image.regs.rax = u64::from(waiting);
    }
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
    fn timeouts_shrink_and_for_ever_stays() {
        assert_eq!(left_ms(1000, Duration::from_millis(400)), 600);
        assert_eq!(left_ms(1000, Duration::from_secs(9)), 0);
        assert_eq!(left_ms(u64::from(u32::MAX), Duration::from_secs(9)) as i32, -1);
    }
}
