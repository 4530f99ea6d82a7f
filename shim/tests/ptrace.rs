//! Requests of shim::ptrace on live processes.

#![allow(clippy::zombie_processes)] // the tracer reaps them

use std::process::{Command, Stdio};

use shim::ptrace::{self, PendingQueue, Status, Stop, Target, wait_stop};

fn sleeper() -> std::process::Child {
    Command::new("sleep")
        .arg("100")
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_seized_process_stops_shows_itself_and_dies() {
    let child = sleeper();
    let pid = child.id() as i32;
    std::thread::sleep(std::time::Duration::from_millis(30));
    ptrace::seize(pid, ptrace::usual_options() | ptrace::Options::PTRACE_O_EXITKILL).unwrap();
    ptrace::interrupt(pid).unwrap();
    let mut stopped = wait_stop(pid).unwrap();
    assert_eq!(stopped.stop(), Stop::Interrupt);
    let regs = stopped.regs().unwrap();
    // clock_nanosleep, interrupted with ERESTART_RESTARTBLOCK.
    assert_eq!(
        (regs.orig_rax, regs.rax as i64),
        (libc::SYS_clock_nanosleep as u64, -516)
    );
    stopped.set_regs(&regs).unwrap();
    let xstate = stopped.xstate().unwrap();
    assert!(xstate.len() >= 576);
    stopped.set_xstate(&xstate).unwrap();
    stopped.set_sigmask(1 << (libc::SIGUSR1 - 1)).unwrap();
    assert_eq!(stopped.sigmask().unwrap(), 1 << (libc::SIGUSR1 - 1));
    assert!(stopped.rseq().unwrap().is_some());
    let signals = nix::sys::signal::Signal::SIGUSR1;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signals).unwrap();
    let pending = stopped.pending(PendingQueue::Process).unwrap();
    assert_eq!(pending.len(), 1);
    assert_eq!(
        (pending[0].signo(), pending[0].pid()),
        (libc::SIGUSR1, std::process::id() as i32)
    );
    assert!(stopped.pending(PendingQueue::Thread).unwrap().is_empty());
    stopped.set_sigmask(0).unwrap();
    stopped.cont(0).unwrap();
    let stopped = wait_stop(pid).unwrap();
    assert_eq!(stopped.stop(), Stop::Signal(libc::SIGUSR1));
    assert_eq!(stopped.siginfo().unwrap().signo(), libc::SIGUSR1);
    stopped.cont(libc::SIGUSR1).unwrap();
    match ptrace::wait(Target::Thread(pid), false).unwrap() {
        Some((_, Status::Signaled { sig, .. })) => assert_eq!(sig, libc::SIGUSR1),
        other => panic!("{other:?}"),
    }
}

#[test]
fn job_control_is_seen_as_group_stops() {
    let child = sleeper();
    let pid = child.id() as i32;
    ptrace::seize(pid, ptrace::usual_options() | ptrace::Options::PTRACE_O_EXITKILL).unwrap();
    let kill = |sig| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), sig).unwrap();
    let mut stopped = None;
    kill(nix::sys::signal::Signal::SIGSTOP);
    while stopped.is_none() {
        let seen = wait_stop(pid).unwrap();
        match seen.stop() {
            Stop::Group(sig) => {
                assert_eq!(sig, libc::SIGSTOP);
                stopped = Some(seen);
            }
            Stop::Signal(sig) => seen.cont(sig).unwrap(),
            _ => seen.cont(0).unwrap(),
        }
    }
    stopped.unwrap().listen().unwrap();
    assert!(ptrace::wait(Target::Thread(pid), true).unwrap().is_none());
    kill(nix::sys::signal::Signal::SIGCONT);
    let seen = wait_stop(pid).unwrap();
    assert_eq!(seen.stop(), Stop::Interrupt);
    seen.cont(0).unwrap();
    kill(nix::sys::signal::Signal::SIGKILL);
    // Whatever stops are in between, the death stays to be reported.
    loop {
        match wait_stop(pid) {
            Ok(seen) => drop(seen.cont(0)),
            Err(error) => break assert!(error.is_gone()),
        }
    }
    assert!(matches!(
        ptrace::wait(Target::Thread(pid), false).unwrap(),
        Some((
            _,
            Status::Signaled {
                sig: libc::SIGKILL,
                ..
            }
        ))
    ));
}
