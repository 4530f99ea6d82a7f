use super::define_rows;
use super::words::*;

const SEND: Disposition = Split(SplitKind::SignalSend);
/// `siginfo_t`.
const INFO: Kind = inp(Fixed(128));
const FD_HOME: Disposition = GoHome(HomeReason::SignalFd);

define_rows! {
    13 rt_sigaction(sig: SIG, act: ADDR, oldact: ADDR, sigsetsize: SIZE) Split(SplitKind::SigAction),
        note: "Takes effect at the guest; home is told what is ignored and what is handled.";
    14 rt_sigprocmask(how: INT, set: ADDR, oldset: ADDR, sigsetsize: SIZE) Local;
    15 rt_sigreturn() Local;
    34 pause() Local;
    62 kill(pid: PID, sig: SIG) SEND;
    127 rt_sigpending(set: ADDR, sigsetsize: SIZE) Local;
    128 rt_sigtimedwait(set: ADDR, info: ADDR, timeout: ADDR, sigsetsize: SIZE) Split(SplitKind::SignalWait),
        note: "Waits at the guest; the siginfo is home's.";
    129 rt_sigqueueinfo(pid: PID, sig: SIG, info: INFO) SEND;
    130 rt_sigsuspend(mask: ADDR, sigsetsize: SIZE) Local;
    131 sigaltstack(ss: ADDR, old_ss: ADDR) Local;
    200 tkill(tid: PID, sig: SIG) SEND;
    219 restart_syscall() Split(SplitKind::Restart), blocking: Long,
        note: "A sleep that began at home goes on there, by the thread that began it.";
    234 tgkill(tgid: PID, tid: PID, sig: SIG) SEND;
    282 signalfd(fd: FD, mask: ADDR, size: SIZE) FD_HOME;
    289 signalfd4(fd: FD, mask: ADDR, size: SIZE, flags: INT) FD_HOME;
    297 rt_tgsigqueueinfo(tgid: PID, tid: PID, sig: SIG, info: INFO) SEND;
    424 pidfd_send_signal(pidfd: FD, sig: SIG, info: INFO, flags: UINT) SEND;
}
