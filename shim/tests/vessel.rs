//! Processes at home become vessels, their threads execute posted calls, and they become processes again.
#![allow(clippy::zombie_processes)] // the tracer reaps them

mod surgery;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use linklayer::image::{Area, AreaFlags, AreaKind, PAGE, Prot};
use linklayer::pages::{CHUNK_BYTES, Kept, Landed, Piece, Place};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim::memory::ProcessMemory;
use shim::ptrace::{self, Status, Stop, Stopped, Target, wait, wait_stop};
use shim::vessel::{Arena, Parts, Slot, Vessel};
use surgery::{Guest, THREADS, capture, compile, next_stop, run_to_end, stop_all};

const HELLO: &str = r#"
    #include <stdio.h>
    int main(int argc, char **argv) { printf("hello %d %s\n", argc, argv[1]); return 42; }"#;

fn hello(dir: &tempfile::TempDir) -> PathBuf {
    compile(dir.path(), "hello", HELLO, &[])
}

fn convert(stopped: Stopped, arena: &Arena) -> (Vessel, Slot, i32) {
    let (vessel, mut parts) = Vessel::convert(stopped, arena).unwrap();
    let (tid, slot) = parts.workers.pop().unwrap();
    assert_eq!(tid, vessel.pid());
    (vessel, slot, parts.catcher)
}

fn call(slot: &Slot, nr: i64, args: [u64; 6]) -> i64 {
    slot.post(nr as u64, args);
    slot.wait(Some(Duration::from_secs(10)))
        .expect("the vessel answers")
}

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

fn rss_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn maps(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap()
}

#[test]
fn a_vessel_executes_posted_calls_and_has_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, stopped) = Guest::at_entry(&hello(&dir), &["vessel"]);
    let pid = guest.pid;
    let arena = Arena::new().unwrap();
    let (_vessel, slot, _) = convert(stopped, &arena);
    assert_eq!(call(&slot, libc::SYS_getpid, [0; 6]), i64::from(pid));
    assert!(rss_kib(pid) <= 32, "{} KiB", rss_kib(pid));
    let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(cmdline.ends_with(b"hello\0vessel\0"));
    // Data goes both ways.
    slot.write(0, b"from the vessel\n");
    assert_eq!(
        call(&slot, libc::SYS_write, [1, slot.data_address(), 16, 0, 0, 0]),
        16
    );
    assert_eq!(guest.line(), "from the vessel");
    guest.stdin.as_mut().unwrap().write_all(b"to it").unwrap();
    assert_eq!(
        call(&slot, libc::SYS_read, [0, slot.data_address(), 100, 0, 0, 0]),
        5
    );
    let mut text = [0; 5];
    slot.read(0, &mut text);
    assert_eq!(&text, b"to it");
    for _ in 0..1000 {
        assert_eq!(call(&slot, libc::SYS_getpid, [0; 6]), i64::from(pid));
    }
    slot.post(libc::SYS_exit_group as u64, [7, 0, 0, 0, 0, 0]);
    assert!(matches!(run_to_end(pid), Status::Exited(7)));
}

#[test]
fn a_blocked_call_survives_signals_and_can_be_aborted() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, stopped) = Guest::at_entry(&hello(&dir), &["x"]);
    let pid = guest.pid;
    let arena = Arena::new().unwrap();
    let (_vessel, slot, catcher) = convert(stopped, &arena);
    let read = [0, slot.data_address(), 10, 0, 0, 0];
    slot.post(libc::SYS_read as u64, read);
    assert_eq!(slot.wait(Some(Duration::from_millis(50))), None);
    // A signal stops the catcher, not the worker.
    send(pid, Signal::SIGUSR1);
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
    assert_eq!(slot.wait(Some(Duration::from_millis(50))), None);
    guest.stdin.as_mut().unwrap().write_all(b"ok").unwrap();
    assert_eq!(slot.wait(None), Some(2));
    // Aborted, it ends with the raw code; another call can follow.
    for (nr, args, code) in [
        (libc::SYS_read, read, -512),
        (libc::SYS_pause, [0; 6], -514),
        (libc::SYS_poll, [0, 0, 100_000, 0, 0, 0], -516),
    ] {
        slot.post(nr as u64, args);
        assert_eq!(slot.wait(Some(Duration::from_millis(50))), None);
        ptrace::interrupt(pid).unwrap();
        let mut worker = wait_stop(pid).unwrap();
        Vessel::abort_call(&mut worker, &slot).unwrap();
        worker.cont(0).unwrap();
        assert_eq!(slot.wait(None), Some(code));
    }
    // A call posted to a stopped worker has not begun.
    ptrace::interrupt(pid).unwrap();
    let mut worker = wait_stop(pid).unwrap();
    Vessel::abort_call(&mut worker, &slot).unwrap();
    slot.post(libc::SYS_exit_group as u64, [1, 0, 0, 0, 0, 0]);
    Vessel::abort_call(&mut worker, &slot).unwrap();
    worker.cont(0).unwrap();
    assert_eq!(slot.wait(None), Some(-513));
    slot.post(libc::SYS_exit_group as u64, [0; 6]);
    assert!(matches!(run_to_end(pid), Status::Exited(0)));
}

#[test]
fn vessels_make_threads_and_processes_and_execute_programs() {
    let dir = tempfile::tempdir().unwrap();
    let program = hello(&dir);
    let (mut guest, stopped) = Guest::at_entry(&program, &["x"]);
    let pid = guest.pid;
    let arena = Arena::new().unwrap();
    let (_vessel, slot, _) = convert(stopped, &arena);
    // A thread.
    let flags =
        libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
    let thread_slot = arena.allocate().unwrap();
    slot.post_clone(flags as u64, 0, &thread_slot);
    let parent = next_stop(pid, |stop| matches!(stop, Stop::Clone(_)));
    let Stop::Clone(thread) = parent.stop() else {
        unreachable!()
    };
    parent.cont(0).unwrap();
    assert_eq!(slot.wait(None), Some(i64::from(thread)));
    wait_stop(thread).unwrap().cont(0).unwrap();
    assert_eq!(call(&thread_slot, libc::SYS_gettid, [0; 6]), i64::from(thread));
    assert_eq!(call(&thread_slot, libc::SYS_getpid, [0; 6]), i64::from(pid));
    // A process, made by that thread.
    let process_slot = arena.allocate().unwrap();
    thread_slot.post_clone(0, libc::SIGCHLD, &process_slot);
    let parent = next_stop(thread, |stop| matches!(stop, Stop::Fork(_)));
    let Stop::Fork(process) = parent.stop() else {
        unreachable!()
    };
    parent.cont(0).unwrap();
    assert_eq!(thread_slot.wait(None), Some(i64::from(process)));
    let (_child, stopped, _) = Vessel::adopt_child(wait_stop(process).unwrap(), false).unwrap();
    stopped.cont(0).unwrap();
    assert_eq!(call(&process_slot, libc::SYS_getppid, [0; 6]), i64::from(pid));
    // A failed and a successful exec of the child.
    let exec = |path: &str| {
        let base = process_slot.data_address();
        let words = [base + 64, base + 128, 0, 0];
        let mut data: Vec<u8> = words.iter().flat_map(|w: &u64| w.to_ne_bytes()).collect();
        data.resize(64, 0);
        data.extend_from_slice(path.as_bytes());
        data.resize(128, 0);
        data.extend_from_slice(b"executed\0");
        process_slot.write(0, &data);
        process_slot.post(libc::SYS_execve as u64, [base + 64, base, base + 24, 0, 0, 0]);
    };
    exec("/nowhere");
    assert_eq!(process_slot.wait(None), Some(-i64::from(libc::ENOENT)));
    exec(program.to_str().unwrap());
    next_stop(process, |stop| matches!(stop, Stop::Exec { .. }))
        .cont(0)
        .unwrap();
    assert!(matches!(run_to_end(process), Status::Exited(42)));
    assert_eq!(guest.line(), "hello 2 executed");
    // The parent sees its child's status.
    let wait4 = [process as u64, slot.data_address(), 0, 0, 0, 0];
    assert_eq!(call(&slot, libc::SYS_wait4, wait4), i64::from(process));
    let mut status = [0; 4];
    slot.read(0, &mut status);
    assert_eq!(i32::from_ne_bytes(status), 42 << 8);
    thread_slot.post(libc::SYS_exit as u64, [0; 6]);
    assert!(matches!(
        wait(Target::Thread(thread), false).unwrap(),
        Some((_, Status::Exited(0)))
    ));
    slot.post(libc::SYS_exit_group as u64, [3, 0, 0, 0, 0, 0]);
    assert!(matches!(run_to_end(pid), Status::Exited(3)));
}

#[test]
fn a_failed_conversion_leaves_the_process_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, stopped) = Guest::at_entry(&hello(&dir), &["whole"]);
    // No descriptor is free, and none can be had.
    shim::process::set_limit(guest.pid, libc::RLIMIT_NOFILE, 0, 0).unwrap();
    let before = maps(guest.pid);
    let arena = Arena::new().unwrap();
    let (stopped, error) = Vessel::convert(stopped, &arena).unwrap_err();
    assert!(error.to_string().contains("open of the arena"), "{error}");
    assert_eq!(before, maps(guest.pid));
    stopped.unwrap().cont(0).unwrap();
    assert!(matches!(run_to_end(guest.pid), Status::Exited(42)));
    assert_eq!(guest.output(), "hello 2 whole\n");
}

#[test]
fn soft_limits_do_not_hinder_a_conversion_and_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, stopped) = Guest::at_entry(&hello(&dir), &["x"]);
    shim::process::set_limit(guest.pid, libc::RLIMIT_NOFILE, 3, 100).unwrap();
    shim::process::set_limit(guest.pid, libc::RLIMIT_AS, 64 << 20, u64::MAX).unwrap();
    let arena = Arena::new().unwrap();
    let (_vessel, slot, _) = convert(stopped, &arena);
    assert_eq!(
        shim::process::limit(guest.pid, libc::RLIMIT_NOFILE).unwrap(),
        (3, 100)
    );
    assert_eq!(
        shim::process::limit(guest.pid, libc::RLIMIT_AS).unwrap(),
        (64 << 20, u64::MAX)
    );
    slot.post(libc::SYS_exit_group as u64, [0; 6]);
    assert!(matches!(run_to_end(guest.pid), Status::Exited(0)));
}

#[test]
fn a_kill_in_the_middle_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, stopped) = Guest::at_entry(&hello(&dir), &["x"]);
    send(guest.pid, Signal::SIGKILL);
    let arena = Arena::new().unwrap();
    Vessel::convert(stopped, &arena).unwrap_err();
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

/// Starts the program with threads and stops it in the middle.
fn threaded() -> (tempfile::TempDir, Guest, Vec<Stopped>) {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "threads", THREADS, &[]);
    let (mut guest, stopped) = Guest::start(&program, &[]);
    stopped.cont(0).unwrap();
    // Its stops are events of new threads until it is ready.
    while std::fs::read_dir(format!("/proc/{}/task", guest.pid))
        .unwrap()
        .count()
        < 5
    {
        if let Some((_, Status::Stopped(stopped))) = wait(Target::Mine, true).unwrap() {
            stopped.cont(0).unwrap();
        }
    }
    std::thread::sleep(Duration::from_millis(50));
    while let Some((_, Status::Stopped(stopped))) = wait(Target::Mine, true).unwrap() {
        stopped.cont(0).unwrap();
    }
    assert_eq!(guest.line(), "ready");
    let threads = stop_all(guest.pid);
    assert_eq!(threads.len(), 5);
    (dir, guest, threads)
}

/// The program with threads goes on to its end, as if nothing had happened.
fn goes_on(guest: &mut Guest, threads: Vec<Stopped>) {
    for thread in threads {
        thread.cont(0).unwrap();
    }
    send(guest.pid, Signal::SIGUSR1);
    let status = run_to_end(guest.pid);
    assert!(matches!(status, Status::Exited(42)), "{status:?}");
    assert_eq!(guest.output(), "done\n");
}

#[test]
fn a_capture_changes_nothing() {
    let (_dir, mut guest, mut threads) = threaded();
    let before = maps(guest.pid);
    let captured = capture(guest.pid, &mut threads);
    let again = capture(guest.pid, &mut threads);
    assert_eq!(captured.image.areas, again.image.areas);
    assert_eq!(captured.image.actions, again.image.actions);
    for (one, two) in captured.image.threads.iter().zip(&again.image.threads) {
        assert_eq!(
            (one.regs, one.sigmask, one.rseq),
            (two.regs, two.sigmask, two.rseq)
        );
        assert!(one.robust_list.0 != 0 && one.rseq.is_some() && one.clear_child_tid != 0);
    }
    assert_eq!(captured.image.threads[0].altstack.size, 65536);
    let action = captured.image.actions[libc::SIGUSR1 as usize - 1];
    assert!(action.handler > 1 && action.mask == 1 << (libc::SIGUSR2 - 1));
    assert_eq!(captured.image.actions[libc::SIGPIPE as usize - 1].handler, 1);
    assert_eq!(before, maps(guest.pid));
    goes_on(&mut guest, threads);
}

#[test]
fn what_was_prepared_can_be_undone() {
    let (_dir, mut guest, threads) = threaded();
    let pid = guest.pid;
    let before = maps(pid);
    let arena = Arena::new().unwrap();
    let prepared = Vessel::prepare(threads, &arena).unwrap();
    assert_ne!(before, maps(pid));
    let threads = prepared.undo();
    assert_eq!(threads.len(), 5);
    assert_eq!(before, maps(pid));
    goes_on(&mut guest, threads);
}

#[test]
fn a_thread_is_made_in_a_process_that_is_continued_meanwhile() {
    let (_dir, mut guest, mut threads) = threaded();
    let pid = guest.pid;
    let arena = Arena::new().unwrap();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                send(pid, Signal::SIGCONT);
            }
        });
        for _ in 0..100 {
            let prepared = Vessel::prepare(std::mem::take(&mut threads), &arena);
            threads = match prepared {
                Ok(prepared) => prepared.undo(),
                Err((whole, e)) => {
                    over.store(true, std::sync::atomic::Ordering::Relaxed);
                    panic!("{} threads: {e}", whole.len())
                }
            };
            assert_eq!(threads.len(), 5);
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    goes_on(&mut guest, threads);
}

#[test]
fn a_process_with_threads_comes_home() {
    for round in 0..3 {
        let (_dir, mut guest, mut threads) = threaded();
        let pid = guest.pid;
        let captured = capture(pid, &mut threads);
        let before = maps(pid);
        let arena = Arena::new().unwrap();
        let (vessel, parts) = Vessel::convert_all(threads, &arena).unwrap();
        assert!(rss_kib(pid) <= 32, "{} KiB", rss_kib(pid));
        let Parts { workers, actions, .. } = parts;
        assert_eq!(workers.len(), 5);
        assert_eq!(actions, captured.image.actions);
        for (tid, slot) in &workers {
            assert_eq!(call(slot, libc::SYS_gettid, [0; 6]), i64::from(*tid));
        }
        let mut image = captured.image.clone();
        if round == 1 {
            // While it was away it mapped something, unmapped nothing, and got more heap.
            let start = 0x6000_0000_0000;
            image.areas.push(Area {
                start,
                end: start + 0x4000,
                prot: Prot(Prot::READ),
                flags: AreaFlags(0),
                kind: AreaKind::Anon,
            });
            image.areas.sort_by_key(|a| a.start);
        }
        let files: Vec<_> = captured.files.into_iter().map(Arc::new).collect();
        Vessel::adapt_layout(
            &image,
            &workers[0].1,
            &|id| files.get(id as usize).cloned(),
            &|_| None,
            &|_| None,
            &Landed::default(),
        )
        .unwrap();
        let memory = ProcessMemory::new(pid);
        for (address, bytes) in &captured.pages {
            memory.write_forced(*address, bytes).unwrap();
        }
        if round == 2 {
            // It arrives while nobody looks: the process gets it when it is one again.
            send(pid, Signal::SIGUSR1);
            std::thread::sleep(Duration::from_millis(20));
        }
        let threads = vessel.resume(&image).unwrap();
        if round != 1 {
            assert_eq!(before, maps(pid));
        }
        for thread in threads {
            thread.cont(0).unwrap();
        }
        drop(workers);
        if round != 2 {
            std::thread::sleep(Duration::from_millis(30));
            send(pid, Signal::SIGUSR1);
        }
        let status = run_to_end(pid);
        assert!(matches!(status, Status::Exited(42)), "round {round}: {status:?}");
        assert_eq!(guest.output(), "done\n");
    }
}

const QUEUED: &str = r#"
    #include <errno.h>
    #include <signal.h>
    #include <stdio.h>
    #include <time.h>
    int main(void) {
        sigset_t set;
        siginfo_t info;
        struct timespec none = {0, 0};
        sigemptyset(&set);
        sigaddset(&set, SIGRTMIN);
        sigaddset(&set, SIGUSR1);
        sigprocmask(SIG_BLOCK, &set, 0);
        puts("ready");
        fflush(stdout);
        sigdelset(&set, SIGRTMIN);
        while (sigwaitinfo(&set, &info) != SIGUSR1) if (errno != EINTR) return 1;
        sigemptyset(&set);
        sigaddset(&set, SIGRTMIN);
        while (sigtimedwait(&set, &info, &none) > 0) printf("%d ", info.si_value.sival_int);
        puts("and no more");
        return 42;
    }"#;

/// What was pending when the process left has gone with it: what its vessel has not taken of that is not given to it once more.
#[test]
fn what_is_pending_comes_home_once() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "queued", QUEUED, &[]);
    let (mut guest, stopped) = Guest::start(&program, &[]);
    stopped.cont(0).unwrap();
    assert_eq!(guest.line(), "ready");
    let pid = guest.pid;
    let queue = |value: u64| {
        let info = shim::signal::queued_info(libc::SIGRTMIN(), value);
        shim::signal::queue_process(pid, libc::SIGRTMIN(), &info).unwrap();
    };
    (1..=3).for_each(queue);
    let mut threads = stop_all(pid);
    let captured = capture(pid, &mut threads);
    let image = captured.image;
    assert_eq!(image.pending.len(), 3);
    let arena = Arena::new().unwrap();
    let (vessel, parts) = Vessel::convert_all(threads, &arena).unwrap();
    let files: Vec<_> = captured.files.into_iter().map(Arc::new).collect();
    let file = |id| files.get(id as usize).cloned();
    let slot = &parts.workers[0].1;
    Vessel::adapt_layout(&image, slot, &file, &|_| None, &|_| None, &Landed::default()).unwrap();
    let memory = ProcessMemory::new(pid);
    for (address, bytes) in &captured.pages {
        memory.write_forced(*address, bytes).unwrap();
    }
    // One that comes for it meanwhile, and that its catcher has just left to others.
    shim::ptrace::interrupt(vessel.catcher()).unwrap();
    let mut catcher = shim::ptrace::wait_stop(vessel.catcher()).unwrap();
    catcher.set_sigmask(1 << (libc::SIGRTMIN() - 1)).unwrap();
    queue(4);
    catcher.cont(0).unwrap();
    let homebound = vessel.gather(&image, &mut image.pending.clone()).unwrap();
    for thread in homebound.finish(true).unwrap() {
        thread.cont(0).unwrap();
    }
    send(pid, Signal::SIGUSR1);
    let status = run_to_end(pid);
    assert!(matches!(status, Status::Exited(42)), "{status:?}");
    assert_eq!(guest.output(), "1 2 3 4 and no more\n");
}

fn anon(start: u64, pages: u64, prot: u8) -> Area {
    Area {
        start,
        end: start + pages * PAGE,
        prot: Prot(prot),
        flags: AreaFlags(0),
        kind: AreaKind::Anon,
    }
}

#[test]
fn pages_that_come_early_are_where_they_belong_at_home() {
    const GREW: u64 = 0x6000_0000_0000;
    const SHRANK: u64 = 0x6100_0000_0000;
    const JOINED: u64 = 0x6200_0000_0000;
    const GONE: u64 = 0x6300_0000_0000;
    const LIMIT: usize = 64 << 20;
    let (_dir, mut guest, mut threads) = threaded();
    let pid = guest.pid;
    let captured = capture(pid, &mut threads);
    let arena = Arena::new().unwrap();
    let (vessel, parts) = Vessel::convert_all(threads, &arena).unwrap();
    let Parts { workers, .. } = parts;
    // What it has, and what it has got while it was away.
    let areas = captured.image.areas.iter();
    let mut early: Vec<Area> = areas.filter(|a| a.kind == AreaKind::Anon).cloned().collect();
    early.extend([
        anon(GREW, 20, 3),
        anon(SHRANK, 20, 3),
        anon(JOINED, 5, 3),
        anon(JOINED + 8 * PAGE, 5, 1),
        anon(GONE, 5, 3),
    ]);
    early.sort_by_key(|a| a.start);
    ptrace::interrupt(vessel.catcher()).unwrap();
    let stopped = wait_stop(vessel.catcher()).unwrap();
    let (stopped, room) = vessel.make_room(stopped, &early).unwrap();
    stopped.cont(0).unwrap();
    let mut kept = Kept::default();
    kept.put_into(Box::new(room));
    let put = |kept: &mut Kept, address: u64, data: &[u8]| {
        for (at, chunk) in (address..).step_by(CHUNK_BYTES).zip(data.chunks(CHUNK_BYTES)) {
            let data = chunk.into();
            kept.put(&Piece { address: at, data }, LIMIT).unwrap();
        }
    };
    for area in &early {
        put(
            &mut kept,
            area.start,
            &vec![0xee; area.len().min(20 * PAGE) as usize],
        );
    }
    // Then it stands still.
    let mut image = captured.image.clone();
    image.areas.extend([
        anon(GREW, 40, 3),
        anon(SHRANK + 4 * PAGE, 3, 1),
        anon(JOINED, 13, 3),
    ]);
    image.areas.sort_by_key(|a| a.start);
    let mut pages = captured.pages.clone();
    let page = |value: u8, count: usize| vec![value; count * PAGE as usize];
    pages.extend([
        (GREW + 2 * PAGE, page(1, 30)),
        (SHRANK + 5 * PAGE, page(2, 1)),
        (JOINED, page(3, 5)),
        (JOINED + 9 * PAGE, page(4, 2)),
    ]);
    // Those in what is made anew were there before, the others come now.
    put(&mut kept, JOINED, &page(3, 5));
    put(&mut kept, JOINED + 9 * PAGE, &page(4, 2));
    let files: Vec<_> = captured.files.into_iter().map(Arc::new).collect();
    let file = |id| files.get(id as usize).cloned();
    Vessel::adapt_layout(&image, &workers[0].1, &file, &|_| None, &|_| None, kept.landed()).unwrap();
    for (at, data) in pages.iter().filter(|(at, _)| !(JOINED..GONE).contains(at)) {
        put(&mut kept, *at, data);
    }
    let mut present: Vec<_> = pages
        .iter()
        .map(|(at, data)| (*at, at + data.len() as u64))
        .collect();
    present.sort_unstable();
    kept.retain(&present);
    Vessel::drop_runs(&workers[0].1, kept.landed().stale()).unwrap();
    let memory = ProcessMemory::new(pid);
    for (at, data) in kept.runs() {
        memory.write_forced(at, data).unwrap();
    }
    for (at, data) in &pages {
        let mut there = vec![0; data.len()];
        memory.read_forced(*at, &mut there).unwrap();
        assert!(there == *data, "pages at {at:#x}");
    }
    for at in [
        GREW,
        GREW + 32 * PAGE,
        SHRANK + 4 * PAGE,
        JOINED + 5 * PAGE,
        JOINED + 12 * PAGE,
    ] {
        let mut there = [1];
        memory.read_forced(at, &mut there).unwrap();
        assert_eq!(there, [0], "nothing was at {at:#x}");
    }
    for at in [SHRANK, SHRANK + 7 * PAGE, GONE] {
        assert!(memory.read_forced(at, &mut [0]).is_err());
    }
    // An mremap(2) would fail where the kernel has two.
    let lines = shim::capture::map_lines(pid, false).unwrap();
    for area in [anon(GREW, 40, 3), anon(JOINED, 13, 3)] {
        let one = lines
            .iter()
            .any(|l| l.range == area.range() && l.prot == area.prot);
        assert!(one, "{area:?} in {lines:?}");
    }
    let threads = vessel.resume(&image).unwrap();
    for thread in threads {
        thread.cont(0).unwrap();
    }
    drop(workers);
    send(pid, Signal::SIGUSR1);
    let status = run_to_end(pid);
    assert!(matches!(status, Status::Exited(42)), "{status:?}");
    assert_eq!(guest.output(), "done\n");
}

#[test]
fn a_vessel_that_is_not_empty_is_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, stopped) = Guest::at_entry(&hello(&dir), &["early"]);
    let arena = Arena::new().unwrap();
    let (vessel, slot, catcher) = convert(stopped, &arena);
    let area = anon(0x6000_0000_0000, 1000, 3);
    let fill = || {
        ptrace::interrupt(catcher).unwrap();
        let stopped = wait_stop(catcher).unwrap();
        let (stopped, room) = vessel.make_room(stopped, std::slice::from_ref(&area)).unwrap();
        room.put(area.start, &vec![7; area.len() as usize]).unwrap();
        assert!(rss_kib(guest.pid) > 4000);
        stopped
    };
    fill().cont(0).unwrap();
    Vessel::drop_by_worker(guest.pid, &slot).unwrap();
    assert!(rss_kib(guest.pid) < 100, "{} KiB", rss_kib(guest.pid));
    let stopped = fill();
    let stopped = vessel.drop_pages(stopped).unwrap();
    assert!(rss_kib(guest.pid) < 100, "{} KiB", rss_kib(guest.pid));
    fill_and_fork(&vessel, stopped, &arena, &slot);
    send(guest.pid, Signal::SIGKILL);
    run_to_end(guest.pid);
}

/// The child of a vessel that is not empty is.
fn fill_and_fork(vessel: &Vessel, stopped: Stopped, arena: &Arena, slot: &Slot) {
    let area = anon(0x6000_0000_0000, 1000, 3);
    let (stopped, room) = vessel.make_room(stopped, std::slice::from_ref(&area)).unwrap();
    room.put(area.start, &vec![7; area.len() as usize]).unwrap();
    stopped.cont(0).unwrap();
    let child_slot = arena.allocate().unwrap();
    slot.post_clone(0, libc::SIGCHLD, &child_slot);
    let parent = next_stop(vessel.pid(), |stop| matches!(stop, Stop::Fork(_)));
    let Stop::Fork(child) = parent.stop() else {
        unreachable!()
    };
    parent.cont(0).unwrap();
    assert_eq!(slot.wait(None), Some(i64::from(child)));
    let (_vessel, stopped, _) = Vessel::adopt_child(wait_stop(child).unwrap(), true).unwrap();
    assert!(rss_kib(child) < 100, "{} KiB", rss_kib(child));
    assert!(rss_kib(vessel.pid()) > 4000);
    stopped.cont(0).unwrap();
    assert_eq!(
        call(&child_slot, libc::SYS_getppid, [0; 6]),
        i64::from(vessel.pid())
    );
    send(child, Signal::SIGKILL);
    run_to_end(child);
}
