//! How loaded this node is.
//!
//! The load average is of no use here: it counts tasks in uninterruptible sleep, and a guest that waits for home is one.
//! Tasks that are runnable now are counted instead, several times a second, and smoothed. The kernel's own count
//! (`procs_running` in /proc/stat, proc_stat(5)) is of the whole machine; inside a pid namespace the tasks that are
//! visible in /proc are counted one by one, so that nodes that share a machine are told apart.

use std::path::Path;
use std::time::{Duration, Instant};

use super::state::LoadVector;

/// Shortest time between two samples of the number of runnable tasks.
const SAMPLE_PERIOD: Duration = Duration::from_millis(100);
/// Sampling may use this share of a core, as a divisor: where counting is slow it is done less often.
const SAMPLE_COST_DIVISOR: u32 = 200;
/// Time constant of the smoothing.
const SMOOTHING: Duration = Duration::from_secs(2);
/// Inode of the first pid namespace (`PROC_PID_INIT_INO`, include/linux/proc_ns.h).
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";
/// What the calibration loop does per millisecond on the reference core, in thousands of steps.
const REFERENCE_KSTEPS_PER_MS: f64 = 450.0;

/// Measures this node's load.
#[derive(Debug)]
pub struct Sampler {
    whole_machine: bool,
    smoothed: f64,
    sampled: Instant,
    cores: u32,
    speed: u32,
}

impl Sampler {
    /// Begins. `speed` is taken as given, or measured, which takes some milliseconds of CPU time.
    pub fn new(speed: Option<u32>) -> Self {
        let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let whole_machine = namespace == Path::new(FIRST_PID_NAMESPACE);
        let speed = speed.unwrap_or_else(measure_speed);
        Sampler {
            whole_machine,
            smoothed: runnable(whole_machine).unwrap_or(0.0),
            sampled: Instant::now(),
            cores: cores(),
            speed,
        }
    }

    /// Takes a sample, and says how long to wait before the next one.
    pub fn sample(&mut self) -> Duration {
        let start = Instant::now();
        if let Some(now) = runnable(self.whole_machine) {
            let passed = start.duration_since(self.sampled).as_secs_f64();
            let weight = 1.0 - (-passed / SMOOTHING.as_secs_f64()).exp();
            self.smoothed += (now - self.smoothed) * weight;
        }
        self.sampled = start;
        SAMPLE_PERIOD
            .max(start.elapsed() * SAMPLE_COST_DIVISOR)
            .min(SMOOTHING)
    }

    /// The load now. `guests` and `admits` are what the daemon knows.
    pub fn load(&mut self, guests: u32, admits: bool) -> LoadVector {
        self.cores = cores();
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        LoadVector {
            cores: self.cores,
            runnable_milli: (self.smoothed.max(0.0) * 1000.0) as u32,
            speed: self.speed,
            memory_total_bytes: meminfo(&memory, "MemTotal:"),
            memory_free_bytes: meminfo(&memory, "MemAvailable:"),
            guests,
            admits,
        }
    }
}

/// Cores that this process, and so the guests it starts, may use: affinity and CPU quota counted in.
fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

/// Runnable tasks, the one that asks not counted.
fn runnable(whole_machine: bool) -> Option<f64> {
    let count = if whole_machine {
        procs_running(&std::fs::read_to_string("/proc/stat").ok()?)?
    } else {
        visible_runnable(Path::new("/proc"))
    };
    Some((count as f64 - 1.0).max(0.0))
}

fn procs_running(stat: &str) -> Option<u64> {
    stat.lines()
        .find_map(|line| line.strip_prefix("procs_running "))?
        .trim()
        .parse()
        .ok()
}

fn visible_runnable(proc: &Path) -> u64 {
    let numbered = |path: &Path| {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries
            .filter(|e| {
                e.file_name()
                    .as_encoded_bytes()
                    .first()
                    .is_some_and(u8::is_ascii_digit)
            })
            .map(|e| e.path())
    };
    let mut count = 0;
    for process in numbered(proc) {
        for task in numbered(&process.join("task")) {
            let stat = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
            count += u64::from(is_runnable(&stat));
        }
    }
    count
}

/// The state is the first field after the name, which is in parentheses and may hold anything (proc_pid_stat(5)).
fn is_runnable(stat: &str) -> bool {
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('R'))
}

/// A value of /proc/meminfo, in bytes.
fn meminfo(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|v| v.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Speed of a core, 1000 being the reference: the best of several short runs of a loop of dependent integer
/// operations and look-ups, since interruptions only ever make one slower.
fn measure_speed() -> u32 {
    const KSTEPS: u32 = 500;
    let mut table = [0u64; 512];
    let mut best = f64::INFINITY;
    for round in 0..8u64 {
        let start = Instant::now();
        let mut x = 0x9e37_79b9_7f4a_7c15u64 ^ round;
        for _ in 0..KSTEPS * 1000 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let slot = &mut table[(x & 511) as usize];
            *slot = slot.wrapping_add(x);
            x = x.wrapping_add(*slot >> 3);
        }
        std::hint::black_box((x, &table));
        best = best.min(start.elapsed().as_secs_f64() * 1000.0);
    }
    let ratio = f64::from(KSTEPS) / best.max(1e-6) / REFERENCE_KSTEPS_PER_MS;
    (ratio * 1000.0).clamp(10.0, 100_000.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_texts_are_read() {
        assert_eq!(
            procs_running("cpu 1 2\nctxt 5\nprocs_running 7\nprocs_blocked 9\n"),
            Some(7)
        );
        assert_eq!(procs_running(""), None);
        assert!(is_runnable("12 (a) b) R 1 2"));
        assert!(!is_runnable("12 (R) S 1 2"));
        assert!(!is_runnable(""));
        assert_eq!(
            meminfo("MemTotal:       16 kB\nMemAvailable:   4 kB\n", "MemAvailable:"),
            4096
        );
        assert_eq!(meminfo("", "MemTotal:"), 0);
    }

    #[test]
    fn this_machine_has_a_load() {
        let mut sampler = Sampler::new(None);
        assert!(sampler.sample() <= SMOOTHING);
        let load = sampler.load(3, true);
        println!("{load:?}");
        assert!(load.cores >= 1 && load.speed >= 10 && load.guests == 3);
        assert!(load.memory_total_bytes >= load.memory_free_bytes && load.memory_free_bytes > 0);
        // the test itself runs: the count by hand sees at least it
        assert!(visible_runnable(Path::new("/proc")) >= 1);
    }
}
