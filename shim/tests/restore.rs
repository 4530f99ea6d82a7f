//! Captured processes are built anew in a cage, and go on there.
#![allow(clippy::zombie_processes)] // the tracer reaps them

mod surgery;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim::cage::{Cage, CageOptions};
use shim::ptrace::{self, Options, Status, Stopped, Target, wait, wait_stop};
use shim::restore::{Rebuilt, rebuild};
use surgery::{Captured, Guest, THREADS, capture, compile, run_to_end, stop_all};

fn cage() -> Cage {
    let clock = |id| {
        let time = nix::time::clock_gettime(id).unwrap();
        time.tv_sec() * 1_000_000_000 + time.tv_nsec()
    };
    Cage::new(CageOptions {
        monotonic_ns: clock(nix::time::ClockId::CLOCK_MONOTONIC),
        boottime_ns: clock(nix::time::ClockId::CLOCK_BOOTTIME),
        ..CageOptions::default()
    })
    .unwrap()
}

/// Ends a traced process and reaps all of it.
fn end(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    while !matches!(
        wait(Target::Mine, false).unwrap(),
        Some((tid, Status::Signaled { .. } | Status::Exited(_))) if tid == pid
    ) {}
}

/// Builds the process in the cage, with the ids that it had.
fn build(cage: &Cage, captured: &Captured) -> Rebuilt {
    let fds: Vec<_> = captured.files.iter().map(|f| f.as_fd()).collect();
    let blank = cage.spawn_blank(captured.image.pid, &fds).unwrap();
    ptrace::seize(
        blank.outer_pid,
        ptrace::usual_options() | Options::PTRACE_O_EXITKILL,
    )
    .unwrap();
    ptrace::interrupt(blank.outer_pid).unwrap();
    let stopped = wait_stop(blank.outer_pid).unwrap();
    let inside = blank.fds_inside;
    rebuild(
        stopped,
        &captured.image,
        &|id| inside.get(id as usize).copied(),
        &captured.pages,
    )
    .unwrap()
}

fn go(threads: Vec<Stopped>) {
    for thread in threads {
        thread.cont(0).unwrap();
    }
}

const COMPUTE: &str = r#"
    #include <stdlib.h>
    #include <string.h>
    #include <time.h>
    #include <unistd.h>
    static int table[100000];
    static __thread int local = 7;
    int main(int argc, char **argv, char **environment) {
        if (argc != 3 || strcmp(argv[2], "argument") || !getenv("PATH")) return 1;
        for (int round = 0; round < 20; round++) {
            int *heap = malloc(1 << 20);
            for (int i = 0; i < 100000; i++) { table[i] += i * local; heap[i] = table[i]; }
            char big[200000];
            memset(big, round, sizeof big);
            if (heap[99999] != table[99999] || big[1000] != round) return 2;
            if (round % 2) free(heap);
        }
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (llabs(now.tv_sec - atoll(argv[1])) > 60) return 3;
        return table[10] == 10 * 7 * 20 ? 42 : 4;
    }"#;

#[test]
fn programs_at_their_entry_are_built_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let cage = cage();
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    for (name, flags) in [
        ("dynamic", &[][..]),
        ("static", &["-static"]),
        ("fixed", &["-no-pie"]),
    ] {
        let program = compile(dir.path(), name, COMPUTE, flags);
        let (guest, stopped) = Guest::at_entry(&program, &[&now.tv_sec().to_string(), "argument"]);
        let captured = capture(guest.pid, &mut [stopped]);
        end(guest.pid);
        let begun = Instant::now();
        let built = build(&cage, &captured);
        let outer = built.pid();
        let stopped = built.finish().unwrap();
        println!("{name}: built in {:?}", begun.elapsed());
        let cmdline = std::fs::read(format!("/proc/{outer}/cmdline")).unwrap();
        assert!(cmdline.ends_with(b"argument\0"));
        go(vec![stopped]);
        let status = run_to_end(outer);
        assert!(matches!(status, Status::Exited(42)), "{name}: {status:?}");
    }
    assert!(cage.teardown(Duration::from_secs(2)));
}

#[test]
fn a_process_with_threads_goes_on_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "threads", THREADS, &[]);
    let (mut guest, stopped) = Guest::start(&program, &[]);
    stopped.cont(0).unwrap();
    let until = Instant::now() + Duration::from_millis(100);
    while Instant::now() < until {
        if let Some((_, Status::Stopped(stopped))) = wait(Target::Mine, true).unwrap() {
            stopped.cont(0).unwrap();
        }
    }
    assert_eq!(guest.line(), "ready");
    let mut threads = stop_all(guest.pid);
    assert_eq!(threads.len(), 5);
    // One pending for the process and one for a thread that blocks it.
    let mut captured = capture(guest.pid, &mut threads);
    drop(threads);
    end(guest.pid);
    let info = |signo| linklayer::image::SigInfo::user(signo, 0, 77, 88);
    captured.image.pending = vec![info(libc::SIGUSR1)];
    captured.image.threads[2].pending = vec![info(libc::SIGTERM)];
    let cage = cage();
    let mut built = build(&cage, &captured);
    let tids = built
        .start_threads(&mut |tid| cage.set_last_pid(tid - 1).map_err(std::io::Error::other))
        .unwrap();
    assert_eq!(tids.len(), 4);
    let outer = built.pid();
    let threads = built.finish_all().unwrap();
    let pending = threads[2].pending(ptrace::PendingQueue::Thread).unwrap();
    assert_eq!((pending[0].signo(), pending[0].pid()), (libc::SIGTERM, 77));
    for (thread, image) in threads.iter().zip(&captured.image.threads) {
        assert_eq!(thread.regs().unwrap(), image.regs);
        assert_eq!(thread.rseq().unwrap(), image.rseq);
    }
    go(threads);
    let status = run_to_end(outer);
    assert!(matches!(status, Status::Exited(42)), "{status:?}");
    assert!(cage.teardown(Duration::from_secs(2)));
}
