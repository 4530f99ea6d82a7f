//! How the memory of a process is moved when nobody says so: by its size, by how fast it changes, and by what the link carries.
//!
//! A small process stands still while all of its memory is sent. Of a larger one memory is sent while it runs, round by round, until
//! little is left ([`Mode::wants_precopy`], [`goes_on`]). Of one that changes its memory faster than the link carries it, too much
//! would be left; where that is possible the rest comes when it runs at its new place ([`comes_later`]), for which it needs both nodes for a
//! while longer. That is not done to save less than [`LONG_STOP`].

use std::time::Duration;

use crate::wire::Mode;

/// Most rounds.
const MOST_ROUNDS: usize = 10;
/// No further round after one with so few pages.
const FEW_PAGES: u64 = 256;
/// How long a process would have to stand still before it is moved without all of its memory.
pub const LONG_STOP: Duration = Duration::from_secs(2);

/// A round ends when no more than so much of what was sent has still to arrive: it would lengthen the stop.
pub const QUEUED_BYTES: usize = 1 << 20;

/// A round in which memory was sent while its process ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// The pages that had changed since the round before, all of them in the first.
    pub pages: u64,
    /// How long it took until they had arrived ([`QUEUED_BYTES`]).
    pub took: Duration,
}

/// Whether another round makes less of what will be left.
pub fn goes_on(rounds: &[Round]) -> bool {
    match rounds {
        [] => true,
        [.., last] if last.pages <= FEW_PAGES || rounds.len() >= MOST_ROUNDS => false,
        // It does not get less.
        [.., before, last] => last.pages <= before.pages / 4 * 3,
        [_] => true,
    }
}

/// How long the process would stand still if all that is left were sent then.
pub fn expected_stop(rounds: &[Round]) -> Duration {
    let [first @ .., last] = rounds else {
        return Duration::ZERO;
    };
    let took: f64 = rounds.iter().map(|r| r.took.as_secs_f64()).sum();
    let pages: u64 = rounds.iter().map(|r| r.pages).sum();
    if pages == 0 || took <= 0.0 {
        return Duration::ZERO;
    }
    let pages_per_second = pages as f64 / took;
    // The pages of a round are those that changed during the one before; what changes during the last is left.
    let changing = match first.last() {
        Some(before) if before.took > Duration::ZERO => last.pages as f64 / before.took.as_secs_f64(),
        _ => 0.0,
    };
    let left = (changing * last.took.as_secs_f64()).min(pages as f64);
    Duration::from_secs_f64((left / pages_per_second).min(1e6))
}

/// Whether what is left after the rounds comes when the process runs at its new place already. `possible`: it can run there so.
pub fn comes_later(mode: Mode, rounds: &[Round], possible: bool) -> bool {
    match mode {
        Mode::Hybrid | Mode::Postcopy => true,
        Mode::Auto => possible && expected_stop(rounds) > LONG_STOP,
        Mode::Freeze | Mode::Precopy => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(pages: u64, ms: u64) -> Round {
        Round {
            pages,
            took: Duration::from_millis(ms),
        }
    }

    #[test]
    fn rounds_end_when_little_is_left_or_it_does_not_get_less() {
        assert!(goes_on(&[]));
        assert!(goes_on(&[round(100_000, 4000)]));
        assert!(!goes_on(&[round(100, 4)]), "little");
        assert!(goes_on(&[round(100_000, 4000), round(20_000, 800)]));
        assert!(!goes_on(&[round(100_000, 4000), round(90_000, 3600)]), "not less");
        assert!(!goes_on(&[
            round(100_000, 4000),
            round(20_000, 800),
            round(200, 8)
        ]));
        let mut many: Vec<Round> = (0..9).map(|i| round(1 << (20 - i), 100)).collect();
        assert!(goes_on(&many));
        many.push(round(1 << 11, 100));
        assert!(!goes_on(&many), "often enough");
    }

    #[test]
    fn small_ones_freeze_and_large_ones_run() {
        assert!(!Mode::Auto.wants_precopy(1 << 20));
        assert!(Mode::Auto.wants_precopy(1 << 30));
    }

    #[test]
    fn what_converges_is_not_moved_without_its_memory() {
        // 25000 pages a second; 2500 of them change in one.
        let calm = [
            round(100_000, 4000),
            round(10_000, 400),
            round(1000, 40),
            round(100, 4),
        ];
        assert!(expected_stop(&calm) < Duration::from_millis(10));
        assert!(!comes_later(Mode::Auto, &calm, true));
        assert!(
            !comes_later(Mode::Auto, &[round(100_000, 4000)], true),
            "nothing is known"
        );
        assert!(!comes_later(Mode::Auto, &[], true));
    }

    #[test]
    fn what_changes_faster_than_the_link_comes_later_where_it_can() {
        let busy = [round(100_000, 4000), round(90_000, 3600)];
        let stop = expected_stop(&busy);
        assert!((3.0..3.5).contains(&stop.as_secs_f64()), "{stop:?}");
        assert!(comes_later(Mode::Auto, &busy, true));
        assert!(!comes_later(Mode::Auto, &busy, false), "not possible");
        assert!(!comes_later(Mode::Precopy, &busy, true), "somebody said so");
        assert!(comes_later(Mode::Hybrid, &busy, true));
        // The same on a link that is ten times as fast.
        let fast = [round(100_000, 400), round(90_000, 360)];
        assert!(!comes_later(Mode::Auto, &fast, true), "a short stop");
    }
}
