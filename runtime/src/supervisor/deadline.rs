//! Waits with a relative timeout keep their deadline when the process moves.
//!
//! A wait that is interrupted for a capture is made again elsewhere with its arguments; what has passed of a relative
//! timeout is taken off them. Waits with an absolute deadline need nothing.

use std::time::Duration;

use linklayer::image::ThreadImage;
use linklayer::memory::GuestMemory;

use super::guest::Thread;

/// Room below the stack pointer that a function without frame may use (System V ABI, red zone), bytes.
const RED_ZONE: u64 = 128;

/// Shortens the timeout of the call that `image` will make again, if it is one that began at a known time.
pub(super) fn keep(thread: &Thread, image: &mut ThreadImage) {
    let Some(rewound) = image.rewound else { return };
    let Some((nr, started)) = *thread.sleep.lock() else {
        return;
    };
    if nr != rewound.nr {
        return;
    }
    let elapsed = started.elapsed();
    match i64::from(nr) {
        libc::SYS_poll => image.regs.rdx = left_ms(image.regs.rdx, elapsed),
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => image.regs.r10 = left_ms(image.regs.r10, elapsed),
        libc::SYS_nanosleep => {
            if let Some(at) = shortened(thread, image, image.regs.rdi, elapsed) {
                image.regs.rdi = at;
            }
        }
        libc::SYS_rt_sigtimedwait if image.regs.rdx != 0 => {
            if let Some(at) = shortened(thread, image, image.regs.rdx, elapsed) {
                image.regs.rdx = at;
            }
        }
        libc::SYS_clock_nanosleep if image.regs.rsi & libc::TIMER_ABSTIME as u64 == 0 => {
            if let Some(at) = shortened(thread, image, image.regs.rdx, elapsed) {
                image.regs.rdx = at;
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
fn shortened(thread: &Thread, image: &ThreadImage, request: u64, elapsed: Duration) -> Option<u64> {
    let memory = &thread.guest.memory;
    let (seconds, nanoseconds) = (memory.read_u64(request).ok()?, memory.read_u64(request + 8).ok()?);
    let left = Duration::new(seconds, u32::try_from(nanoseconds).ok()?).saturating_sub(elapsed);
    let at = (image.regs.rsp - RED_ZONE - 64) & !15;
    let mut bytes = left.as_secs().to_ne_bytes().to_vec();
    bytes.extend(u64::from(left.subsec_nanos()).to_ne_bytes());
    memory.write(at, &bytes).ok()?;
    Some(at)
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
