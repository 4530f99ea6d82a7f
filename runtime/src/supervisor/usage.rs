//! What the guests use of this node, told home once a second for `mosps`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use linklayer::wire::{self, GuestUsage, Kind};

use super::shared::Shared;

const PERIOD: Duration = Duration::from_secs(1);
/// Clock ticks of /proc are 10 ms on every Linux (USER_HZ).
const TICK_MS: u64 = 10;
const PAGE_BYTES: u64 = 4096;

/// Starts reporting; it goes on until this process ends.
///
/// # Errors
/// The system gives no thread.
pub fn start(shared: Arc<Shared>) -> std::io::Result<()> {
    std::thread::Builder::new().name("usage".into()).spawn(move || {
        let mut last = wire::Usage::default();
        loop {
            std::thread::sleep(PERIOD);
            let now = measure(&shared);
            if now != last {
                shared.tell(0, Kind::Usage, &wire::encode(&now));
                last = now;
            }
        }
    })?;
    Ok(())
}

fn measure(shared: &Shared) -> wire::Usage {
    let mut guests: Vec<GuestUsage> = shared
        .guests
        .read()
        .values()
        // One that has left may still be here until all of its memory is there.
        .filter(|g| !g.leaving.load(Ordering::Acquire))
        .filter_map(|g| {
            parse(
                g.pid,
                &std::fs::read_to_string(format!("/proc/{}/stat", g.outer)).ok()?,
            )
        })
        .collect();
    guests.sort_by_key(|g| g.pid);
    wire::Usage {
        guests,
        cache_hits: shared.cache_hits.load(Ordering::Relaxed),
        cache_misses: shared.cache_misses.load(Ordering::Relaxed),
        cache_invalidations: shared.cache_invalidations.load(Ordering::Relaxed),
    }
}

/// Fields 14, 15 and 24 of proc_pid_stat(5).
fn parse(pid: i32, stat: &str) -> Option<GuestUsage> {
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    let field = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    Some(GuestUsage {
        pid,
        rss_bytes: field(24)? * PAGE_BYTES,
        utime_ms: field(14)? * TICK_MS,
        stime_ms: field(15)? * TICK_MS,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_with_a_strange_name_is_read() {
        let numbers = (4..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        let usage = parse(7, &format!("99 (a) b) S {numbers}"));
        assert_eq!(
            usage,
            Some(GuestUsage {
                pid: 7,
                rss_bytes: 24 * 4096,
                utime_ms: 140,
                stime_ms: 150
            })
        );
        assert!(parse(7, "gone").is_none());
    }
}
