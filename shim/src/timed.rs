//! Waits with a relative timeout that threads of other processes are in: when they are to end.
//!
//! A thread that is stopped is out of its wait, and how long it had waited only its kernel knows: in a restart block that nobody can read
//! (restart_syscall(2)), or not at all (epoll_wait(2) and others end with EINTR, signal(7)). But while it waits, /proc tells the
//! call and its arguments (proc_pid_syscall(5)), and when the thread last left a processor (`se.exec_start` in /proc/TID/sched,
//! kernel/sched/debug.c). That is when the wait began, or later, when the thread was woken in between without reason; so a wait that is
//! made again with what is left by this may end later than natively, and never earlier.
//!
//! So a thread is looked at before it is interrupted ([`Looker::look`]), and when it has stopped its registers tell whether that is what it was
//! in ([`Timed::of`]).

use std::collections::HashMap;
use std::io;
use std::sync::OnceLock;

use linklayer::image::{Place, Regs, Sleep};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::capture::clocks;
use crate::ptrace::{self, Stopped};

/// Below the stack pointer, behind what a function without frame may use (System V ABI, red zone), bytes.
const BELOW_STACK: u64 = 128 + 64;
/// Bytes of the instruction that makes a system call.
const SYSCALL_LEN: u64 = 2;
/// FUTEX_WAIT, and what of a futex's operation is no flag (futex(2)).
const FUTEX_WAIT: u64 = 0;
const FUTEX_COMMAND: u64 = 0x7f;

/// Where a wait has its relative timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Timeout {
    /// This argument, in milliseconds.
    Milliseconds(u8),
    /// A `struct timespec` that this argument points to.
    Timespec(u8),
}

/// The timeout of a call that waits for at most a time from now, as the program made it. Not of those for which the kernel writes down what is
/// left when they are interrupted (select(2), ppoll(2), nanosleep(2)).
fn timeout_of(nr: u64, args: &[u64; 6]) -> Option<Timeout> {
    let milliseconds = |at: u8| (args[usize::from(at)] as i32 > 0).then_some(Timeout::Milliseconds(at));
    let timespec = |at: u8| (args[usize::from(at)] != 0).then_some(Timeout::Timespec(at));
    match i64::try_from(nr).ok()? {
        libc::SYS_poll => milliseconds(2),
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => milliseconds(3),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => timespec(3),
        libc::SYS_rt_sigtimedwait => timespec(2),
        libc::SYS_futex if args[1] & FUTEX_COMMAND == FUTEX_WAIT => timespec(3),
        _ => None,
    }
}

/// Whether a call with these arguments waits for at most a time from now, as [`limit_ns`] tells.
pub fn has_limit(nr: u64, args: &[u64; 6]) -> bool {
    timeout_of(nr, args).is_some()
}

/// How long a call with these arguments waits at most, nanoseconds; `read` reads the program's memory. `None`: for ever, or it is none of the
/// calls that this is about.
pub fn limit_ns(nr: u64, args: &[u64; 6], read: impl Fn(u64, &mut [u8]) -> io::Result<()>) -> Option<i64> {
    match timeout_of(nr, args)? {
        Timeout::Milliseconds(at) => Some(i64::from(args[usize::from(at)] as i32) * 1_000_000),
        Timeout::Timespec(at) => {
            let mut bytes = [0; 16];
            read(args[usize::from(at)], &mut bytes).ok()?;
            let (seconds, nanoseconds) = bytes.split_at(8);
            let word = |bytes: &[u8]| bytes.try_into().map_or(0, i64::from_ne_bytes);
            let (seconds, nanoseconds) = (word(seconds), word(nanoseconds));
            // What the kernel refuses is for the kernel to refuse.
            let valid = seconds >= 0 && (0..1_000_000_000).contains(&nanoseconds);
            valid.then(|| seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds))
        }
    }
}

/// Has a call that a thread is to make again end at a time of this node's CLOCK_MONOTONIC. What is left of it is put into its registers, or
/// below its stack, where nothing else lies (`write` writes its memory), and has to be put there anew when the thread goes on.
///
/// # Errors
/// The memory below the stack cannot be written.
pub fn end_at(
    regs: &mut Regs,
    nr: u64,
    until_ns: i64,
    write: impl Fn(u64, &[u8]) -> io::Result<()>,
) -> io::Result<Option<Sleep>> {
    let mut args = regs.call_args();
    let place = match timeout_of(nr, &args) {
        None => return Ok(None),
        Some(Timeout::Milliseconds(at)) => Place::Milliseconds(at),
        Some(Timeout::Timespec(at)) => {
            let timespec = (regs.rsp.wrapping_sub(BELOW_STACK)) & !15;
            args[usize::from(at)] = timespec;
            regs.set_call(regs.rax, args);
            Place::Timespec(timespec)
        }
    };
    let sleep = Sleep { place, until_ns };
    let now_ns = clocks().monotonic_ns;
    match place {
        Place::Timespec(at) => write(at, &sleep.left(now_ns))?,
        Place::Milliseconds(_) => {
            let mut call = Regs {
                orig_rax: u64::MAX,
                ..*regs
            };
            sleep.put_left(&mut call, now_ns);
            regs.set_call(regs.rax, call.call_args());
        }
    }
    Ok(Some(sleep))
}

/// What /proc tells of a thread's times on processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ran {
    /// When it was last seen on one, nanoseconds of that processor's clock.
    last_ns: i64,
    /// How often it has left one to wait for something.
    waits: u64,
}

impl Ran {
    fn read(path: &str) -> Option<Ran> {
        Ran::parse(&std::fs::read_to_string(path).ok()?)
    }

    fn of(tid: i32) -> Option<Ran> {
        Ran::read(&format!("/proc/{tid}/sched"))
    }

    fn parse(text: &str) -> Option<Ran> {
        let value = |key: &str| {
            let line = text
                .lines()
                .find(|line| line.split_whitespace().next() == Some(key))?;
            Some(line.rsplit_once(':')?.1.trim())
        };
        // Milliseconds, with six digits behind the point.
        let (ms, fraction) = value("se.exec_start")?.split_once('.')?;
        if fraction.len() != 6 {
            return None;
        }
        let fraction: i64 = fraction.parse().ok()?;
        Some(Ran {
            last_ns: ms
                .parse::<i64>()
                .ok()?
                .checked_mul(1_000_000)?
                .checked_add(fraction)?,
            waits: value("nr_voluntary_switches")?.parse().ok()?,
        })
    }
}

/// What a thread waits in, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Waits {
    nr: u64,
    /// Those of [`Regs::marks`], with the address behind the call.
    marks: [u64; 8],
    ran: Ran,
    since_ns: i64,
}

/// How a thread looked just before it was interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look(Option<Waits>);

/// Whether this kernel tells since when a thread waits.
pub fn is_told() -> bool {
    static TOLD: OnceLock<bool> = OnceLock::new();
    *TOLD.get_or_init(|| Ran::read("/proc/thread-self/sched").is_some())
}

/// Looks at threads that are about to be interrupted, one after the other.
#[derive(Debug, Default)]
pub struct Looker {
    /// How far CLOCK_MONOTONIC is ahead of the clock of each processor, nanoseconds.
    ahead: HashMap<usize, i64>,
}

impl Looker {
    /// Looks at a thread. `None`: the kernel does not tell (it is built without CONFIG_SCHED_DEBUG).
    pub fn look(&mut self, tid: i32) -> Option<Look> {
        // Once more when it did something meanwhile, or the clock of its processor was not known.
        for _ in 0..4 {
            let before = Ran::of(tid)?;
            let Some((nr, marks)) = waits_in(tid) else {
                return Some(Look(None));
            };
            let args = args_of(&marks);
            if nr != libc::SYS_restart_syscall as u64 && timeout_of(nr, &args).is_none() {
                return Some(Look(None));
            }
            let cpu = last_processor(tid)?;
            let ahead = match self.ahead.get(&cpu) {
                Some(ahead) => *ahead,
                None => {
                    self.ahead.insert(cpu, clock_ahead(cpu)?);
                    continue;
                }
            };
            let ran = Ran::of(tid)?;
            if ran == before {
                return Some(Look(Some(Waits {
                    nr,
                    marks,
                    ran,
                    since_ns: ran.last_ns + ahead,
                })));
            }
        }
        // It is woken all the time: it does not wait for its timeout.
        Some(Look(None))
    }
}

/// A wait with a relative timeout that a stopped thread was in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timed {
    /// The call.
    pub nr: u64,
    /// What tells it from others ([`Regs::marks`]).
    pub marks: [u64; 8],
    /// When it is to end, nanoseconds of this node's CLOCK_MONOTONIC.
    pub until_ns: i64,
    /// How often the thread had waited when it was stopped.
    waits: u64,
}

impl Timed {
    /// The wait that a thread was taken out of, which looked like this before; `known` is what was found when it was stopped before.
    /// `None`: it was in none, or it is not known when that began.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn of(stopped: &Stopped, look: Option<Look>, known: Option<Timed>) -> ptrace::Result<Option<Timed>> {
        let regs = stopped.regs()?;
        let interrupted = [-i64::from(libc::EINTR), -512, -513, -514, -516];
        if regs.orig_rax > i32::MAX as u64 || !interrupted.contains(&(regs.rax as i64)) {
            return Ok(None);
        }
        let Some(Look(look)) = look else {
            return Ok(None);
        };
        let (nr, tid) = (regs.orig_rax, stopped.tid());
        let call = Regs {
            rip: regs.rip.wrapping_sub(SYSCALL_LEN),
            ..regs
        };
        let marks = call.marks();
        // That it was stopped is one time more.
        let Some(now) = Ran::of(tid) else {
            return Ok(None);
        };
        let seen = look
            .filter(|look| look.nr == nr && look.marks == regs.marks() && look.ran.waits + 1 == now.waits);
        if nr == libc::SYS_restart_syscall as u64 {
            let same = |known: &Timed| {
                known.marks == marks && seen.is_some_and(|seen| known.waits + 1 == seen.ran.waits)
            };
            return Ok(known.filter(same).map(|known| Timed {
                waits: now.waits,
                ..known
            }));
        }
        let memory = crate::memory::ProcessMemory::new(tid);
        let Some(limit_ns) = limit_ns(nr, &regs.call_args(), |at, bytes| memory.read_forced(at, bytes))
        else {
            return Ok(None);
        };
        // One that it was not seen in began since.
        let since_ns = seen.map_or_else(|| clocks().monotonic_ns, |seen| seen.since_ns);
        Ok(Some(Timed {
            nr,
            marks,
            until_ns: since_ns.saturating_add(limit_ns),
            waits: now.waits,
        }))
    }
}

/// The call that a thread waits in, and its arguments.
pub fn call_of(tid: i32) -> Option<(u64, [u64; 6])> {
    waits_in(tid).map(|(nr, marks)| (nr, args_of(&marks)))
}

/// The arguments in the marks of a call.
fn args_of(marks: &[u64; 8]) -> [u64; 6] {
    let [_, _, args @ ..] = *marks;
    args
}

/// The call that a thread waits in and its marks, with the address behind it.
fn waits_in(tid: i32) -> Option<(u64, [u64; 8])> {
    parse_call(&std::fs::read_to_string(format!("/proc/{tid}/syscall")).ok()?)
}

/// "running", or number, six arguments, stack pointer and the address behind the call; the number is -1 where it waits for something else.
fn parse_call(text: &str) -> Option<(u64, [u64; 8])> {
    let mut words = text.split_whitespace();
    let nr = words.next()?.parse().ok()?;
    let mut number = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let [a, b, c, d, e, f] = [number()?, number()?, number()?, number()?, number()?, number()?];
    let (sp, ip) = (number()?, number()?);
    Some((nr, [ip, sp, a, b, c, d, e, f]))
}

/// The processor that a thread was last on (proc_pid_stat(5), field 39).
fn last_processor(tid: i32) -> Option<usize> {
    let text = std::fs::read_to_string(format!("/proc/{tid}/stat")).ok()?;
    // The name in front may contain anything.
    text.rsplit_once(')')?.1.split_whitespace().nth(36)?.parse().ok()
}

/// How far CLOCK_MONOTONIC is ahead of the clock of a processor, nanoseconds: at most, by some microseconds. The calling thread goes
/// there for a moment.
fn clock_ahead(cpu: usize) -> Option<i64> {
    let this = Pid::from_raw(0);
    let usual = sched_getaffinity(this).ok()?;
    let mut there = CpuSet::new();
    there.set(cpu).ok()?;
    sched_setaffinity(this, &there).ok()?;
    // The least that is seen: between its leaving the processor and our look at the clock there may be others.
    let ahead = (0..3).filter_map(|_| {
        std::thread::yield_now();
        let now_ns = clocks().monotonic_ns;
        Some(now_ns - Ran::read("/proc/thread-self/sched")?.last_ns)
    });
    let ahead = ahead.min();
    if let Err(e) = sched_setaffinity(this, &usual) {
        tracing::debug!(error = %e, "processors of this thread");
    }
    ahead
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A thread of this process that has begun a wait, and when that was at the earliest and the latest.
    fn waiting(wait: impl FnOnce() + Send + 'static) -> (i32, std::thread::JoinHandle<()>, i64, i64) {
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            tell.send((nix::unistd::gettid().as_raw(), clocks().monotonic_ns))
                .unwrap();
            wait();
        });
        let (tid, earliest) = told.recv().unwrap();
        while !call_of(tid).is_some_and(|(nr, args)| has_limit(nr, &args)) {
            assert!(!thread.is_finished());
            std::thread::yield_now();
        }
        (tid, thread, earliest, clocks().monotonic_ns)
    }

    #[test]
    fn since_when_a_thread_waits_is_known() {
        let (mut end, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let (tid, thread, earliest, latest) = waiting(move || {
            let poll = nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&other), nix::poll::PollFlags::POLLIN);
            nix::poll::poll(&mut [poll], 60_000u16).unwrap();
        });
        // Time passes, without which there is nothing to know.
        std::thread::sleep(Duration::from_millis(400));
        let look = Looker::default().look(tid).unwrap();
        let Look(Some(waits)) = look else {
            panic!("{look:?}")
        };
        assert_eq!(waits.nr, libc::SYS_poll as u64);
        // It is later by what the processor did since for interrupts, and for other machines on the same hardware.
        let (since, much) = (waits.since_ns, 300_000_000);
        assert!(
            since >= earliest && since < latest + much,
            "{earliest} {since} {latest}"
        );
        std::io::Write::write_all(&mut end, b"x").unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn one_that_does_not_wait_for_a_time() {
        assert_eq!(
            Looker::default().look(nix::unistd::gettid().as_raw()),
            Some(Look(None))
        );
        let forever = [1, 1, u64::from(u32::MAX), 0, 0, 0];
        assert_eq!(timeout_of(libc::SYS_poll as u64, &forever), None);
        // FUTEX_WAIT_BITSET has a deadline.
        assert_eq!(timeout_of(libc::SYS_futex as u64, &[1, 0x89, 0, 1, 0, 0]), None);
    }

    #[test]
    fn what_proc_says() {
        let text = "cat (31337, #threads: 1)\n---\nse.exec_start    :   78548564.089259\nnr_switches : 9\nnr_voluntary_switches    :   4\n";
        let ran = Ran {
            last_ns: 78_548_564_089_259,
            waits: 4,
        };
        assert_eq!(Ran::parse(text), Some(ran));
        assert_eq!(Ran::parse("cat (1, #threads: 1)\n"), None);
        assert_eq!(
            parse_call("7 0x1 0x2 0x3 0x4 0x5 0x6 0x7ffe 0x7f00\n"),
            Some((7, [0x7f00, 0x7ffe, 1, 2, 3, 4, 5, 6]))
        );
        assert_eq!(parse_call("running\n"), None);
        assert_eq!(parse_call("-1 0x7ffe 0x7f00\n"), None);
    }

    #[test]
    fn what_is_left_is_put_where_the_call_looks_for_it() {
        let stack = std::cell::RefCell::new(Vec::new());
        let write = |at: u64, bytes: &[u8]| {
            stack.borrow_mut().push((at, bytes.to_vec()));
            Ok(())
        };
        let mut regs = Regs {
            rsp: 0x7000,
            ..Regs::default()
        };
        let until_ns = clocks().monotonic_ns + 90_000_000_000;
        regs.set_call(libc::SYS_poll as u64, [1, 2, 100_000, 0, 0, 0]);
        let sleep = end_at(&mut regs, libc::SYS_poll as u64, until_ns, write)
            .unwrap()
            .unwrap();
        assert_eq!((sleep.place, sleep.until_ns), (Place::Milliseconds(2), until_ns));
        assert!((80_000..=90_000).contains(&regs.rdx), "{}", regs.rdx);
        let futex = libc::SYS_futex as u64;
        regs.set_call(futex, [1, 0x80, 0, 0x6000, 0, 0]);
        let sleep = end_at(&mut regs, futex, until_ns, write).unwrap().unwrap();
        assert_eq!(sleep.place, Place::Timespec(regs.r10));
        assert_eq!(stack.borrow()[0].0, regs.r10);
        assert!(regs.r10 < 0x7000 - 128 && regs.rax == futex);
        // A time that has passed ends at once, and does not wait for ever.
        assert_eq!(sleep.left(until_ns + 5), [0; 16]);
        let past = Sleep {
            place: Place::Milliseconds(2),
            until_ns: 5,
        };
        // One that is in its call is left alone.
        regs.rdx = 7;
        past.put_left(&mut regs, 9);
        assert_eq!(regs.rdx, 7);
        regs.orig_rax = u64::MAX;
        past.put_left(&mut regs, 9);
        assert_eq!(regs.rdx, 0);
    }
}
