//! Processes at home become vessels, and their threads execute posted calls.
#![allow(clippy::zombie_processes)] // the tracer reaps them

mod common;

use std::io::Write;
use std::time::Duration;

use common::{Guest, compile, next_stop, run_to_end};
use shim::arena::{Arena, Slot};
use shim::ptrace::{self, Status, Stop, Stopped, Target, wait, wait_stop};
use shim::vessel::{self, Cancelled};

const HELLO: &str = r#"
    #include <stdio.h>
    int main(int argc, char **argv) { printf("hello %d %s\n", argc, argv[1]); return 42; }"#;

/// Makes a vessel of a single-threaded process at its entry; both its threads run.
fn vessel(arena: &Arena, stopped: Stopped) -> (Slot, i32) {
    let slot = arena.alloc().unwrap();
    let mut threads = [stopped];
    vessel::prepare(&mut threads[0], arena).unwrap();
    let catcher = vessel::enter(&mut threads, &[&slot]).unwrap();
    let catcher_tid = catcher.tid();
    catcher.cont(0).unwrap();
    for thread in threads {
        thread.cont(0).unwrap();
    }
    (slot, catcher_tid)
}

fn rss_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_process_at_its_entry_goes_on_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    for (name, flags) in [
        ("dynamic", &[][..]),
        ("static", &["-static"]),
        ("fixed", &["-no-pie"]),
    ] {
        let program = compile(dir.path(), name, HELLO, flags);
        let (mut guest, stopped) = Guest::at_entry(&program, &["there"]);
        assert_eq!(stopped.stop(), Stop::Interrupt);
        stopped.cont(0).unwrap();
        let status = run_to_end(guest.pid);
        assert!(matches!(status, Status::Exited(42)), "{status:?}");
        assert_eq!(guest.output(), "hello 2 there\n");
    }
}

#[test]
fn preparing_can_be_undone() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "hello", HELLO, &[]);
    let (mut guest, mut stopped) = Guest::at_entry(&program, &["again"]);
    let arena = Arena::create().unwrap();
    let before = std::fs::read(format!("/proc/{}/maps", guest.pid)).unwrap();
    vessel::prepare(&mut stopped, &arena).unwrap();
    assert_ne!(
        before,
        std::fs::read(format!("/proc/{}/maps", guest.pid)).unwrap()
    );
    vessel::unprepare(&mut stopped).unwrap();
    assert_eq!(
        before,
        std::fs::read(format!("/proc/{}/maps", guest.pid)).unwrap()
    );
    stopped.cont(0).unwrap();
    assert!(matches!(run_to_end(guest.pid), Status::Exited(42)));
    assert_eq!(guest.output(), "hello 2 again\n");
}

#[test]
fn a_vessel_executes_posted_calls_and_has_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "hello", HELLO, &[]);
    let (mut guest, stopped) = Guest::at_entry(&program, &["vessel"]);
    let pid = guest.pid;
    let arena = Arena::create().unwrap();
    let (slot, _) = vessel(&arena, stopped);
    assert_eq!(slot.call(libc::SYS_getpid, [0; 6]).unwrap(), i64::from(pid));
    assert!(
        arena
            .collect(Some(Duration::from_secs(1)))
            .contains(&slot.index())
    );
    let mm = vessel::kept_pages(&shim::capture::mm_fields(pid).unwrap());
    assert_eq!(vessel::drop_memory(&slot, pid, &mm).unwrap(), 0);
    assert!(rss_kib(pid) <= 32, "{} KiB", rss_kib(pid));
    let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(cmdline.ends_with(b"hello\0vessel\0"));
    // Data goes both ways.
    slot.write(0, b"from the vessel\n").unwrap();
    assert_eq!(
        slot.call(libc::SYS_write, [1, slot.data_address(), 16, 0, 0, 0])
            .unwrap(),
        16
    );
    assert_eq!(guest.line(), "from the vessel");
    guest.stdin.as_mut().unwrap().write_all(b"to it").unwrap();
    assert_eq!(
        slot.call(libc::SYS_read, [0, slot.data_address(), 100, 0, 0, 0])
            .unwrap(),
        5
    );
    let mut text = [0; 5];
    slot.read(0, &mut text).unwrap();
    assert_eq!(&text, b"to it");
    slot.set_spin(1000);
    for _ in 0..1000 {
        assert_eq!(slot.call(libc::SYS_getpid, [0; 6]).unwrap(), i64::from(pid));
    }
    slot.post(libc::SYS_exit_group, [7, 0, 0, 0, 0, 0]).unwrap();
    assert!(matches!(run_to_end(pid), Status::Exited(7)));
}

#[test]
fn a_blocked_call_survives_signals_and_can_be_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "hello", HELLO, &[]);
    let (mut guest, stopped) = Guest::at_entry(&program, &["x"]);
    let pid = guest.pid;
    let arena = Arena::create().unwrap();
    let (slot, catcher) = vessel(&arena, stopped);
    let read = [0, slot.data_address(), 10, 0, 0, 0];
    slot.post(libc::SYS_read, read).unwrap();
    assert_eq!(slot.wait(0, Some(Duration::from_millis(50))), None);
    // A signal stops the catcher, not the worker.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGUSR1).unwrap();
    match wait(Target::Mine, false).unwrap() {
        Some((tid, Status::Stopped(stopped))) => {
            assert_eq!((tid, stopped.stop()), (catcher, Stop::Signal(libc::SIGUSR1)));
            stopped.cont(0).unwrap();
        }
        other => panic!("{other:?}"),
    }
    // Interrupted and resumed without more, the call goes on.
    ptrace::interrupt(pid).unwrap();
    wait_stop(pid).unwrap().cont(0).unwrap();
    assert_eq!(slot.wait(0, Some(Duration::from_millis(50))), None);
    guest.stdin.as_mut().unwrap().write_all(b"ok").unwrap();
    assert_eq!(slot.wait(0, None), Some(2));
    // Cancelled, it ends with the raw code; another call can follow.
    for (nr, args, code) in [
        (libc::SYS_read, read, -512),
        (libc::SYS_pause, [0; 6], -514),
        (libc::SYS_poll, [0, 0, 100_000, 0, 0, 0], -516),
    ] {
        slot.post(nr, args).unwrap();
        assert_eq!(slot.wait(0, Some(Duration::from_millis(50))), None);
        ptrace::interrupt(pid).unwrap();
        let mut worker = wait_stop(pid).unwrap();
        assert_eq!(
            vessel::cancel(&mut worker, &slot).unwrap(),
            Cancelled::Interrupted(code)
        );
        worker.cont(0).unwrap();
        assert_eq!(slot.wait(0, None), Some(code));
    }
    // A call posted to a stopped worker has not begun.
    ptrace::interrupt(pid).unwrap();
    let mut worker = wait_stop(pid).unwrap();
    assert_eq!(vessel::cancel(&mut worker, &slot).unwrap(), Cancelled::Ended);
    slot.post(libc::SYS_exit_group, [1, 0, 0, 0, 0, 0]).unwrap();
    assert_eq!(vessel::cancel(&mut worker, &slot).unwrap(), Cancelled::NotBegun);
    worker.cont(0).unwrap();
    assert_eq!(slot.wait(0, None), Some(-513));
    slot.post(libc::SYS_exit_group, [0; 6]).unwrap();
    assert!(matches!(run_to_end(pid), Status::Exited(0)));
}

#[test]
fn vessels_make_threads_and_processes_and_execute_programs() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "hello", HELLO, &[]);
    let (mut guest, stopped) = Guest::at_entry(&program, &["x"]);
    let pid = guest.pid;
    let arena = Arena::create().unwrap();
    let (slot, _) = vessel(&arena, stopped);
    // A thread.
    let flags =
        libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
    slot.post(libc::SYS_clone, [flags as u64, 0, 0, 0, 0, 0]).unwrap();
    let parent = next_stop(pid, |stop| matches!(stop, Stop::Clone(_)));
    let Stop::Clone(thread) = parent.stop() else {
        unreachable!()
    };
    parent.cont(0).unwrap();
    assert_eq!(slot.wait(0, None), Some(i64::from(thread)));
    let mut child = wait_stop(thread).unwrap();
    let thread_slot = arena.alloc().unwrap();
    vessel::adopt_thread(&mut child, &thread_slot).unwrap();
    child.cont(0).unwrap();
    assert_eq!(
        thread_slot.call(libc::SYS_gettid, [0; 6]).unwrap(),
        i64::from(thread)
    );
    assert_eq!(
        thread_slot.call(libc::SYS_getpid, [0; 6]).unwrap(),
        i64::from(pid)
    );
    // A process, made by that thread.
    thread_slot.post(libc::SYS_fork, [0; 6]).unwrap();
    let parent = next_stop(thread, |stop| matches!(stop, Stop::Fork(_)));
    let Stop::Fork(process) = parent.stop() else {
        unreachable!()
    };
    parent.cont(0).unwrap();
    assert_eq!(thread_slot.wait(0, None), Some(i64::from(process)));
    let mut child = wait_stop(process).unwrap();
    let process_slot = arena.alloc().unwrap();
    vessel::adopt_process(&mut child, &process_slot)
        .unwrap()
        .cont(0)
        .unwrap();
    child.cont(0).unwrap();
    assert_eq!(
        process_slot.call(libc::SYS_getppid, [0; 6]).unwrap(),
        i64::from(pid)
    );
    // A failed and a successful exec of the child.
    let exec = |path: &str| {
        let base = process_slot.data_address();
        let mut data = Vec::new();
        for word in [base + 64, base + 128, 0, 0] {
            data.extend_from_slice(&u64::to_ne_bytes(word));
        }
        data.resize(64, 0);
        data.extend_from_slice(path.as_bytes());
        data.resize(128, 0);
        data.extend_from_slice(b"executed\0");
        process_slot.write(0, &data).unwrap();
        process_slot
            .post(libc::SYS_execve, [base + 64, base, base + 24, 0, 0, 0])
            .unwrap();
    };
    exec("/nowhere");
    assert_eq!(process_slot.wait(0, None), Some(-i64::from(libc::ENOENT)));
    exec(program.to_str().unwrap());
    next_stop(process, |stop| matches!(stop, Stop::Exec { .. }))
        .cont(0)
        .unwrap();
    assert!(matches!(run_to_end(process), Status::Exited(42)));
    assert_eq!(guest.line(), "hello 2 executed");
    // The parent sees its child's status.
    let wait4 = [process as u64, slot.data_address(), 0, 0, 0, 0];
    assert_eq!(slot.call(libc::SYS_wait4, wait4).unwrap(), i64::from(process));
    let mut status = [0; 4];
    slot.read(0, &mut status).unwrap();
    assert_eq!(i32::from_ne_bytes(status), 42 << 8);
    thread_slot.post(libc::SYS_exit, [0; 6]).unwrap();
    assert!(matches!(
        wait(Target::Thread(thread), false).unwrap(),
        Some((_, Status::Exited(0)))
    ));
    slot.post(libc::SYS_exit_group, [3, 0, 0, 0, 0, 0]).unwrap();
    assert!(matches!(run_to_end(pid), Status::Exited(3)));
}

#[test]
fn a_kill_in_the_middle_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "hello", HELLO, &[]);
    let (guest, mut stopped) = Guest::at_entry(&program, &["x"]);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(guest.pid),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let arena = Arena::create().unwrap();
    let error = vessel::prepare(&mut stopped, &arena).unwrap_err();
    let gone = error.is_gone() || matches!(error, vessel::VesselError::Inject(_));
    assert!(gone, "{error}");
    assert!(matches!(
        wait(Target::Thread(guest.pid), false).unwrap(),
        Some((
            _,
            Status::Signaled {
                sig: libc::SIGKILL,
                ..
            }
        ))
    ));
}

#[test]
fn slots_are_many_and_come_back() {
    let arena = Arena::create().unwrap();
    let slots: Vec<Slot> = (0..600).map(|_| arena.alloc().unwrap()).collect();
    assert_eq!(arena.segments(), 3);
    let mut indices: Vec<u32> = slots.iter().map(Slot::index).collect();
    indices.dedup();
    assert_eq!(indices.len(), 600);
    assert!(slots.iter().all(|s| s.index() != 0));
    drop(slots);
    assert_eq!(arena.alloc().unwrap().index(), 1);
    assert!(
        arena
            .alloc()
            .unwrap()
            .write(shim::arena::DATA_LEN - 1, b"xy")
            .is_err()
    );
}
