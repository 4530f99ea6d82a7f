//! Captured processes are built anew in a cage, and go on there.
#![allow(clippy::zombie_processes)] // the tracer reaps them

mod surgery;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use linklayer::image::XstateComponent;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim::cage::{Cage, CageOptions};
use shim::capture::SharedObjects;
use shim::ptrace::{self, Options, Status, Stopped, Target, wait, wait_stop};
use shim::restore::{Backing, Rebuilt, rebuild};
use surgery::{Captured, Guest, THREADS, capture, compile, run_to_end, stop_all};

fn cage() -> Cage {
    // Clocks of its own, if only by a microsecond.
    Cage::new(CageOptions {
        monotonic_ahead_ns: 1000,
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
    build_sharing(cage, captured, None)
}

/// The same for one that shares memory.
fn build_sharing(cage: &Cage, captured: &Captured, shared: Option<&File>) -> Rebuilt {
    let files = captured.files.iter().chain(shared);
    let fds: Vec<_> = files.map(|f| f.as_fd()).collect();
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
        &|backing| match backing {
            Backing::File(id) => inside.get(id as usize).copied(),
            Backing::Shared(_) => inside.get(captured.files.len()).copied(),
        },
        captured.pages.iter().map(|(at, data)| (*at, data.as_slice())),
        None,
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
    // As if home's CPU laid out its registers otherwise.
    let here = captured.image.xstate_layout.clone();
    let there: Vec<_> = here
        .iter()
        .map(|c| XstateComponent {
            offset: c.offset + 64,
            ..*c
        })
        .collect();
    for thread in &mut captured.image.threads {
        let mut sample = thread.xstate.clone();
        sample.extend([0; 64]);
        thread.xstate = shim::xstate::convert(&thread.xstate, &here, &there, &sample).unwrap();
    }
    captured.image.xstate_layout = there;
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
        assert_eq!(thread.regs().unwrap(), image.resumed());
        assert_eq!(thread.rseq().unwrap(), image.rseq);
    }
    go(threads);
    let status = run_to_end(outer);
    assert!(matches!(status, Status::Exited(42)), "{status:?}");
    assert!(cage.teardown(Duration::from_secs(2)));
}

const WAITS: &str = r#"
    #define _GNU_SOURCE
    #include <errno.h>
    #include <poll.h>
    #include <signal.h>
    #include <stdio.h>
    #include <string.h>
    #include <time.h>
    #include <unistd.h>
    static volatile int handled;
    static void on_signal(int signal) { handled++; }
    int main(int argc, char **argv) {
        int pipes[2];
        char byte;
        pipe(pipes);
        struct sigaction action = {.sa_handler = on_signal};
        sigaction(SIGUSR1, &action, 0);
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR2);
        sigprocmask(SIG_BLOCK, &set, 0);
        puts("ready");
        fflush(stdout);
        long result = -2;
        if (!strcmp(argv[1], "sigwaitinfo")) result = sigwaitinfo(&set, 0);
        if (!strcmp(argv[1], "nanosleep")) result = nanosleep(&(struct timespec) {1000, 0}, 0);
        if (!strcmp(argv[1], "poll")) result = poll(0, 0, -1);
        if (!strcmp(argv[1], "read")) result = read(pipes[0], &byte, 1);
        return result == -1 && errno == EINTR && handled == 1 ? 42 : 10 + handled;
    }"#;

/// A signal that came while a thread stood still does to its call what it does natively.
#[test]
fn a_signal_ends_the_call_of_a_thread_that_is_built() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "waits", WAITS, &[]);
    let cage = cage();
    for call in ["sigwaitinfo", "nanosleep", "poll", "read"] {
        let (mut guest, stopped) = Guest::start(&program, &[call]);
        stopped.cont(0).unwrap();
        assert_eq!(guest.line(), "ready");
        let mut captured = loop {
            let mut threads = stop_all(guest.pid);
            let mut captured = capture(guest.pid, &mut threads);
            if captured.image.threads[0].rewound.is_some() {
                break captured;
            }
            // As a tracer has it that knows such calls.
            let regs = threads[0].regs().unwrap();
            if (regs.orig_rax as i64, regs.rax as i64) == (libc::SYS_rt_sigtimedwait, -4) {
                let thread = &mut captured.image.threads[0];
                thread.regs.rip -= 2;
                thread.regs.rax = regs.orig_rax;
                thread.rewound = Some(linklayer::image::Rewound { nr: 128, code: -514 });
                break captured;
            }
            // Not in its call yet.
            go(threads);
        };
        end(guest.pid);
        captured.image.pending = vec![linklayer::image::SigInfo::user(libc::SIGUSR1, 0, 77, 88)];
        let built = build(&cage, &captured);
        let outer = built.pid();
        go(vec![built.finish().unwrap()]);
        let status = run_to_end(outer);
        assert!(matches!(status, Status::Exited(42)), "{call}: {status:?}");
    }
    assert!(cage.teardown(Duration::from_secs(2)));
}

const CLOCKS: &str = r#"
    #define _GNU_SOURCE
    #include <sched.h>
    #include <signal.h>
    #include <stdlib.h>
    #include <sys/random.h>
    #include <sys/syscall.h>
    #include <sys/time.h>
    #include <time.h>
    #include <unistd.h>
    static volatile sig_atomic_t stop;
    static void on_signal(int signal) { stop = 1; }
    static long long ns(struct timespec *t) { return t->tv_sec * 1000000000LL + t->tv_nsec; }
    int main(void) {
        struct timespec before, now, real, resolution;
        struct timeval day;
        unsigned cpu, node;
        signal(SIGUSR1, on_signal);
        clock_gettime(CLOCK_MONOTONIC, &before);
        while (!stop) {
            if (clock_gettime(CLOCK_MONOTONIC, &now) || ns(&now) < ns(&before)) return 1;
            if (syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &before) || ns(&before) < ns(&now)) return 2;
            if (ns(&before) - ns(&now) > 2000000000LL) return 3;
            clock_gettime(CLOCK_REALTIME, &real);
            gettimeofday(&day, 0);
            if (labs(day.tv_sec - real.tv_sec) > 2 || labs(time(0) - real.tv_sec) > 2) return 4;
            if (clock_getres(CLOCK_MONOTONIC, &resolution) || resolution.tv_nsec != 1) return 5;
            if (getcpu(&cpu, &node) || cpu > 4096) return 6;
            char random[16] = {0};
            if (getrandom(random, sizeof random, 0) != sizeof random) return 7;
        }
        return 42;
    }"#;

#[test]
fn another_kernels_vdso_leads_to_this_ones() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "clocks", CLOCKS, &[]);
    let (guest, stopped) = Guest::at_entry(&program, &[]);
    let mut captured = capture(guest.pid, &mut [stopped]);
    end(guest.pid);
    // As if home's kernel were another: a byte that means nothing differs.
    captured.image.vdso[15] ^= 1;
    let cage = cage();
    let built = build(&cage, &captured);
    let outer = built.pid();
    go(vec![built.finish().unwrap()]);
    let maps = std::fs::read_to_string(format!("/proc/{outer}/maps")).unwrap();
    assert!(
        maps.contains("/memfd:mosrun-vdso") && maps.contains("[vdso]"),
        "{maps}"
    );
    let mut steps = 0;
    for _ in 0..200 {
        std::thread::sleep(Duration::from_micros(500));
        ptrace::interrupt(outer).unwrap();
        let stopped = wait_stop(outer).unwrap();
        let inside = |rip| linklayer::image::RESERVED.contains(&rip);
        steps += u32::from(inside(stopped.regs().unwrap().rip));
        let mut threads = [stopped];
        let image = shim::capture::describe(outer, &mut threads, 1, |_| Ok(0)).unwrap();
        assert!(!inside(image.threads[0].regs.rip));
        let vdso = |i: &linklayer::image::ProcessImage| {
            i.areas
                .iter()
                .find(|a| a.kind == linklayer::image::AreaKind::Vdso)
                .cloned()
        };
        assert_eq!(vdso(&image), vdso(&captured.image));
        assert!(image.areas.iter().all(|a| !inside(a.start)));
        let [stopped] = threads;
        stopped.cont(0).unwrap();
    }
    assert!(steps > 0, "never stopped in the vDSO");
    kill(Pid::from_raw(outer), Signal::SIGUSR1).unwrap();
    let status = run_to_end(outer);
    assert!(matches!(status, Status::Exited(42)), "{status:?}");
    assert!(cage.teardown(Duration::from_secs(2)));
}

const SHARERS: &str = r#"
    #define _GNU_SOURCE
    #include <stdio.h>
    #include <sys/mman.h>
    #include <unistd.h>
    int main(void) {
        volatile long *shared = mmap(0, 3 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (shared == MAP_FAILED) return 1;
        shared[1024] = 77;
        if (fork() == 0) {
            /* it has a part only, and what is written to the rest comes by the other */
            munmap((void *) shared, 4096);
            volatile long *mine = shared + 512;
            while (!mine[1]) mine[0]++;
            mine[2] = mine[512] == 77 ? 42 : 3;
            _exit(0);
        }
        while (!shared[512]) usleep(100);
        puts("ready");
        fflush(stdout);
        while (!shared[0]) usleep(1000);
        long before = shared[512];
        while (shared[512] == before) usleep(1000);
        shared[513] = 1;
        while (!shared[514]) usleep(1000);
        return shared[514];
    }"#;

#[test]
fn memory_is_shared_elsewhere_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "sharers", SHARERS, &[]);
    let (mut guest, stopped) = Guest::start(&program, &[]);
    stopped.cont(0).unwrap();
    let parent = guest.pid;
    let child = loop {
        let Some((tid, Status::Stopped(stopped))) = wait(Target::Mine, false).unwrap() else {
            panic!("it ended")
        };
        stopped.cont(0).unwrap();
        if tid != parent {
            break tid;
        }
    };
    while let Some((_, Status::Stopped(stopped))) = wait(Target::Mine, true).unwrap() {
        stopped.cont(0).unwrap();
    }
    assert_eq!(guest.line(), "ready");
    let captured: Vec<Captured> = [parent, child]
        .into_iter()
        .map(|pid| capture(pid, &mut stop_all(pid)))
        .collect();
    let objects = SharedObjects::of(captured.iter().map(|c| (c.image.pid, &c.image)));
    let named = objects.named_by(&captured[0].image);
    assert_eq!(named, objects.named_by(&captured[1].image));
    assert_eq!((named.len(), named[0].size), (1, 3 * 4096));
    let memory = shim::shared_memory::memfd(named[0].size).unwrap();
    objects
        .read(&mut |_, offset, data| memory.write_all_at(data, offset))
        .unwrap();
    // What the leader waits for.
    memory.write_all_at(&1u64.to_ne_bytes(), 0).unwrap();
    end(child);
    end(parent);
    let cage = cage();
    let built: Vec<Rebuilt> = captured
        .iter()
        .map(|captured| build_sharing(&cage, captured, Some(&memory)))
        .collect();
    drop(memory);
    let outer = built[0].pid();
    for one in built {
        go(vec![one.finish().unwrap()]);
    }
    let status = run_to_end(outer);
    assert!(matches!(status, Status::Exited(42)), "{status:?}");
    assert!(cage.teardown(Duration::from_secs(2)));
}
