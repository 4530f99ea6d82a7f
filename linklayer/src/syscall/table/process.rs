use super::define_rows;
use super::words::*;

const CLONE: Disposition = Split(SplitKind::Clone);
const EXEC: Disposition = Split(SplitKind::Exec);
const SCHED_NOTE: &str =
    "Seen at home, where it has effect on forwarded calls; the guest runs with the node's own priority.";
const AFFINITY_NOTE: &str = "CPUs are those of the node where the guest is.";
/// The file may be set-user-id.
const EXECUTED: &[CacheClass] = &[CacheClass::Creds];
const HOME_ONLY: Disposition = GoHome(HomeReason::OtherProcess);
const SELF_LOCAL: &[Rule] = &[Rule {
    when: &[is(0, 0)],
    then: Local,
}];

define_rows! {
    24 sched_yield() Local;
    39 getpid() Local, note: "Process and thread ids are the same at home and away.";
    56 clone(flags: FLAGS, stack: ADDR, parent_tid: ADDR, child_tid: ADDR, tls: ADDR) CLONE;
    57 fork() CLONE;
    58 vfork() CLONE;
    59 execve(path: PATH, argv: StrArray, envp: StrArray) EXEC, blocking: May, clears: EXECUTED,
        note: "More arguments than a message carries: goes home and runs there.";
    60 exit(status: INT) Split(SplitKind::ExitThread);
    61 wait4(pid: PID, wstatus: out(Fixed(4)).positive(), options: INT, rusage: out(Fixed(RUSAGE_LEN)).positive()) Forward,
        blocking: Long, quick: &[has(2, 1)];
    101 ptrace(request: LONG, pid: PID, addr: ADDR, data: ADDR) HOME_ONLY;
    109 setpgid(pid: PID, pgid: PID) Forward;
    110 getppid() Forward;
    111 getpgrp() Forward, note: "Others may move a process into another group: asked every time.";
    112 setsid() Forward, clears: &[CacheClass::Session];
    121 getpgid(pid: PID) Forward;
    124 getsid(pid: PID) Forward, cache: Some(CacheClass::Session);
    140 getpriority(which: INT, who: INT) Forward, note: SCHED_NOTE;
    141 setpriority(which: INT, who: INT, niceval: INT) Forward, note: SCHED_NOTE;
    142 sched_setparam(pid: PID, param: inp(Fixed(4))) Forward, note: SCHED_NOTE;
    143 sched_getparam(pid: PID, param: out(Fixed(4))) Forward;
    144 sched_setscheduler(pid: PID, policy: INT, param: inp(Fixed(4))) Forward, note: SCHED_NOTE;
    145 sched_getscheduler(pid: PID) Forward;
    146 sched_get_priority_max(policy: INT) Local;
    147 sched_get_priority_min(policy: INT) Local;
    148 sched_rr_get_interval(pid: PID, interval: out(Fixed(16))) Forward;
    157 prctl(option: INT, arg2: Sub(SubTable::Prctl)) Forward, note: "By option: see below.";
    158 arch_prctl(option: INT, addr: Sub(SubTable::ArchPrctl)) Local, note: "By option: see below.";
    186 gettid() Local;
    202 futex(uaddr: ADDR, op: INT, val: UINT, timeout: ADDR, uaddr2: ADDR, val3: UINT) Local,
        note: "Processes that share memory are on one node.";
    203 sched_setaffinity(pid: PID, len: UINT, mask: inp(Limit(1, 8192))) Split(SplitKind::Affinity), rules: SELF_LOCAL, note: AFFINITY_NOTE;
    204 sched_getaffinity(pid: PID, len: UINT, mask: out(Limit(1, 8192)).ret(1)) Split(SplitKind::Affinity), rules: SELF_LOCAL, note: AFFINITY_NOTE;
    218 set_tid_address(tidptr: ADDR) Local;
    231 exit_group(status: INT) Split(SplitKind::ExitGroup);
    247 waitid(idtype: INT, id: PID, infop: inout(Fixed(28)).always(), options: INT, rusage: inout(Fixed(RUSAGE_LEN)).changed()) Forward,
        blocking: Long, quick: &[has(3, 1)];
    251 ioprio_set(which: INT, who: INT, ioprio: INT) Forward;
    252 ioprio_get(which: INT, who: INT) Forward;
    273 set_robust_list(head: ADDR, len: SIZE) Local;
    274 get_robust_list(pid: PID, head: ADDR, len: ADDR) HOME_ONLY, rules: SELF_LOCAL;
    309 getcpu(cpu: ADDR, node: ADDR, cache: ADDR) Local;
    312 kcmp(pid1: PID, pid2: PID, kind: INT, idx1: SIZE, idx2: SIZE) HOME_ONLY;
    314 sched_setattr(pid: PID, attr: inout(Head { plus: 0, min: 48, max: 4096 }).changed(), flags: UINT) Forward, note: SCHED_NOTE;
    315 sched_getattr(pid: PID, attr: inout(Limit(2, 4096)), size: UINT, flags: UINT) Forward;
    322 execveat(dirfd: FD, path: PATH, argv: StrArray, envp: StrArray, flags: INT) EXEC, blocking: May, clears: EXECUTED, note: "As execve.";
    324 membarrier(cmd: INT, flags: UINT, cpu_id: INT) Local, note: "Registrations are read when the process moves, and made again.";
    334 rseq(rseq: ADDR, len: UINT, flags: INT, sig: UINT) Local;
    434 pidfd_open(pid: PID, flags: UINT) Forward;
    435 clone3(cl_args: ADDR, size: SIZE) CLONE;
    438 pidfd_getfd(pidfd: FD, targetfd: FD, flags: UINT) Forward;
    449 futex_waitv(waiters: ADDR, nr_futexes: UINT, flags: UINT, timeout: ADDR, clockid: CLOCK) Local;
    454 futex_wake(uaddr: ADDR, mask: SIZE, nr: INT, flags: UINT) Local;
    455 futex_wait(uaddr: ADDR, val: SIZE, mask: SIZE, flags: UINT, timeout: ADDR, clockid: CLOCK) Local;
    456 futex_requeue(waiters: ADDR, flags: UINT, nr_wake: INT, nr_requeue: INT) Local;
}
