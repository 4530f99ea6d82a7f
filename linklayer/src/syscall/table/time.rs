use super::define_rows;
use super::words::*;

const CPU_TIME: Disposition = Split(SplitKind::Times);
const SLEEP: Disposition = Split(SplitKind::Sleep);
const CPU_TIMER: Disposition = Split(SplitKind::CpuTimer);
/// `struct itimerval` or `struct itimerspec`.
const TIMER_IN: Kind = inp(Fixed(32));
const TIMER_OUT: Kind = out(Fixed(32));
/// `struct timex`.
const TIMEX: Kind = inout(Fixed(208));
/// Clocks that tell the same at every node: REALTIME, MONOTONIC, MONOTONIC_RAW, the coarse ones, BOOTTIME, TAI.
const LOCAL_CLOCKS: &[Rule] = &[
    Rule {
        when: &[is(0, 0)],
        then: Local,
    },
    Rule {
        when: &[is(0, 1)],
        then: Local,
    },
    Rule {
        when: &[is(0, 4)],
        then: Local,
    },
    Rule {
        when: &[is(0, 5)],
        then: Local,
    },
    Rule {
        when: &[is(0, 6)],
        then: Local,
    },
    Rule {
        when: &[is(0, 7)],
        then: Local,
    },
    Rule {
        when: &[is(0, 11)],
        then: Local,
    },
];
/// Clocks that no process's CPU time is behind, for timers at home.
const HOME_TIMERS: &[Rule] = &[
    Rule {
        when: &[is(0, 0)],
        then: Forward,
    },
    Rule {
        when: &[is(0, 1)],
        then: Forward,
    },
    Rule {
        when: &[is(0, 7)],
        then: Forward,
    },
    Rule {
        when: &[is(0, 8)],
        then: Forward,
    },
    Rule {
        when: &[is(0, 9)],
        then: Forward,
    },
    Rule {
        when: &[is(0, 11)],
        then: Forward,
    },
];
/// ITIMER_REAL, whose signal comes from home.
const REAL_TIMER: &[Rule] = &[Rule {
    when: &[is(0, 0)],
    then: Forward,
}];
/// A sleep until a point in time can simply be begun again.
const UNTIL: &[Rule] = &[
    Rule {
        when: &[is(0, 0), has(1, 1)],
        then: Local,
    },
    Rule {
        when: &[is(0, 1), has(1, 1)],
        then: Local,
    },
    Rule {
        when: &[is(0, 7), has(1, 1)],
        then: Local,
    },
];
const CPU_TIMER_NOTE: &str = "CPU time timers run where the guest runs.";
const CLOCK_NOTE: &str = "The real-time clock is the node's own; monotonic and boot time continue home's. CPU clocks: the sum of all nodes.";

define_rows! {
    35 nanosleep(duration: ADDR, rem: ADDR) SLEEP;
    36 getitimer(which: INT, value: TIMER_OUT) CPU_TIMER, rules: REAL_TIMER, note: CPU_TIMER_NOTE;
    37 alarm(seconds: UINT) Forward;
    38 setitimer(which: INT, new: TIMER_IN, old: TIMER_OUT) CPU_TIMER, rules: REAL_TIMER, note: CPU_TIMER_NOTE;
    96 gettimeofday(tv: ADDR, tz: ADDR) Local;
    98 getrusage(who: INT, usage: out(Fixed(RUSAGE_LEN))) CPU_TIME;
    100 times(buf: out(Fixed(32))) CPU_TIME;
    159 adjtimex(buf: TIMEX) Forward;
    164 settimeofday(tv: TIME_IN, tz: inp(Fixed(8))) Forward;
    201 time(tloc: ADDR) Local;
    222 timer_create(clockid: CLOCK, sevp: inp(Fixed(64)), timerid: out(Fixed(4)).early()) CPU_TIMER, rules: HOME_TIMERS, note: CPU_TIMER_NOTE;
    223 timer_settime(timerid: INT, flags: INT, new: TIMER_IN, old: TIMER_OUT) Forward;
    224 timer_gettime(timerid: INT, value: TIMER_OUT) Forward;
    225 timer_getoverrun(timerid: INT) Forward;
    226 timer_delete(timerid: INT) Forward;
    227 clock_settime(clockid: CLOCK, tp: TIME_IN) Forward;
    228 clock_gettime(clockid: CLOCK, tp: out(Fixed(16))) CPU_TIME, rules: LOCAL_CLOCKS, note: CLOCK_NOTE;
    229 clock_getres(clockid: CLOCK, res: out(Fixed(16))) CPU_TIME, rules: LOCAL_CLOCKS;
    230 clock_nanosleep(clockid: CLOCK, flags: INT, request: ADDR, remain: ADDR) SLEEP, rules: UNTIL;
    283 timerfd_create(clockid: CLOCK, flags: INT) Forward;
    286 timerfd_settime(fd: FD, flags: INT, new: TIMER_IN, old: TIMER_OUT) Forward;
    287 timerfd_gettime(fd: FD, value: TIMER_OUT) Forward;
    305 clock_adjtime(clockid: CLOCK, buf: TIMEX) Forward;
}
