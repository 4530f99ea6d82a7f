//! Whether to wait for a datagram on the CPU rather than asleep.
//!
//! To be woken takes tens of microseconds on a core that has gone to sleep, more than the rest of a call. Spinning for
//! about as long saves it, but only on a core that nobody else wants: on a shared one it takes the time of the very
//! process that is waited for. So it is done while the machine has cores to spare and as long as it pays, and whoever
//! spins lets others go first each time round.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

/// How long an answer of the kernel about free cores is believed.
const BELIEVED: Duration = Duration::from_millis(5);
/// What spinning can have earned at most, and what it has at first.
const CREDIT_MAX: u32 = 8;
/// What a spin in vain costs.
const VAIN: u32 = 2;
/// Without credit, every so many waits one spins nevertheless: times change.
const TRIAL: u32 = 64;

/// Decides before each wait of one link; see the module's documentation.
#[derive(Debug)]
pub(super) struct Spin {
    longest: Duration,
    cores: u32,
    load: Option<File>,
    asked: Option<Instant>,
    spare: bool,
    credit: u32,
    skipped: u32,
}

impl Spin {
    /// Spins for at most `longest`; zero: never.
    pub(super) fn new(longest: Duration) -> Self {
        let cores = available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX));
        let load = if longest.is_zero() || cores == 1 {
            None
        } else {
            File::open("/proc/loadavg").ok()
        };
        Self {
            longest,
            cores,
            load,
            asked: None,
            spare: false,
            credit: CREDIT_MAX,
            skipped: 0,
        }
    }

    /// How long the wait that begins now may spin; zero: not at all.
    pub(super) fn allowance(&mut self, now: Instant) -> Duration {
        let Some(load) = &self.load else {
            return Duration::ZERO;
        };
        if self.credit == 0 {
            self.skipped += 1;
            if self.skipped < TRIAL {
                return Duration::ZERO;
            }
            self.skipped = 0;
        }
        if self
            .asked
            .is_none_or(|asked| now.saturating_duration_since(asked) >= BELIEVED)
        {
            self.asked = Some(now);
            let mut text = [0; 64];
            let len = load.read_at(&mut text, 0).unwrap_or(0);
            self.spare = runnable(&text[..len]).is_some_and(|runnable| runnable <= self.cores);
        }
        if self.spare { self.longest } else { Duration::ZERO }
    }

    /// What became of a wait that was allowed to spin.
    pub(super) fn outcome(&mut self, came_in_time: bool) {
        self.credit = if came_in_time {
            (self.credit + 1).min(CREDIT_MAX)
        } else {
            self.credit.saturating_sub(VAIN)
        };
    }
}

/// Runnable threads of the machine out of the text of `/proc/loadavg` (proc(5)), the asking one included.
fn runnable(loadavg: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(loadavg).ok()?;
    text.split(' ').nth(3)?.split_once('/')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runnable_threads_are_found() {
        assert_eq!(runnable(b"0.53 0.65 0.40 2/345 1234\n"), Some(2));
        assert_eq!(runnable(b"0.53 0.65"), None);
        assert_eq!(runnable(&[0xff; 9]), None);
    }

    #[test]
    fn what_does_not_pay_is_seldom_tried() {
        let mut spin = Spin::new(Duration::from_micros(50));
        let now = Instant::now();
        spin.asked = Some(now);
        spin.spare = true;
        let mut tried = 0;
        for _ in 0..640 {
            if !spin.allowance(now).is_zero() {
                tried += 1;
                spin.outcome(false);
            }
        }
        assert!((4..=16).contains(&tried), "{tried}");
        assert!(Spin::new(Duration::ZERO).allowance(now).is_zero());
    }
}
