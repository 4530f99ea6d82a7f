//! Captured processes are built anew in a cage, and go on there.
#![allow(clippy::zombie_processes)] // the tracer reaps them

mod surgery;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use linklayer::image::{Area, AreaFlags, AreaKind, PAGE, ProcessImage, Prot, XstateComponent};
use linklayer::pages::{CHUNK_BYTES, Kept, Piece};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim::cage::{Cage, CageOptions};
use shim::capture::SharedObjects;
use shim::memory::ProcessMemory;
use shim::ptrace::{self, Options, Status, Stopped, Target, wait, wait_stop};
use shim::restore::{Backing, Rebuilt, Shell, rebuild};
use shim::track::Tracker;
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

/// A shell in the cage, and the other end of the socket by which it gets descriptors.
fn shell(cage: &Cage, pid: i32) -> (Shell, UnixDatagram, i32) {
    let (here, there) = UnixDatagram::pair().unwrap();
    let blank = cage.spawn_blank(pid, &[there.as_fd()]).unwrap();
    ptrace::seize(
        blank.outer_pid,
        ptrace::usual_options() | Options::PTRACE_O_EXITKILL,
    )
    .unwrap();
    ptrace::interrupt(blank.outer_pid).unwrap();
    let stopped = wait_stop(blank.outer_pid).unwrap();
    (Shell::new(stopped).unwrap(), here, blank.fds_inside[0])
}

/// Areas, protections and names, as they can be seen.
fn layout(pid: i32) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    text.lines()
        .filter(|line| !line.contains("[vsyscall]"))
        .map(|line| {
            let mut fields = line.split_ascii_whitespace();
            format!("{} {}", fields.next().unwrap(), fields.next().unwrap())
        })
        .collect()
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

const GROWS: &str = r#"
    #define _GNU_SOURCE
    #include <signal.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <unistd.h>
    #define PAGE 4096L
    static volatile sig_atomic_t stop;
    static void on_signal(int signal) { stop = 1; }
    static char *const base = (char *)0x200000000000;
    static char *at(long page) { return base + page * PAGE; }
    static void map(long first, long count, int prot) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
        if (mmap(at(first), count * PAGE, prot, flags, -1, 0) != at(first)) _exit(2);
    }
    static int is(long page, char value) { return *at(page) == value && at(page)[PAGE - 1] == value; }
    int main(void) {
        // Read-only in the end; one that grew from two; one that lies elsewhere; a hole in one; one that was given up in part.
        map(0, 200, PROT_READ | PROT_WRITE);
        memset(at(0), 1, 200 * PAGE);
        mprotect(at(0), 200 * PAGE, PROT_READ);
        map(300, 300, PROT_READ | PROT_WRITE);
        memset(at(300), 2, 90 * PAGE);
        memset(at(500), 3, 100 * PAGE);
        map(700, 20, PROT_READ | PROT_WRITE);
        memset(at(700), 4, 20 * PAGE);
        map(800, 10, PROT_READ | PROT_WRITE);
        map(820, 10, PROT_READ | PROT_WRITE);
        memset(at(800), 5, 10 * PAGE);
        memset(at(820), 6, 10 * PAGE);
        map(900, 10, PROT_READ | PROT_WRITE);
        memset(at(905), 7, PAGE);
        signal(SIGUSR1, on_signal);
        volatile char stack[300000];
        memset((char *)stack, 9, sizeof stack);
        write(1, "ready\n", 6);
        while (!stop) ;
        if (!is(0, 1) || !is(199, 1) || !is(300, 2) || !is(500, 3) || !is(700, 4) || !is(719, 4)) return 3;
        if (!is(800, 5) || !is(829, 6) || !is(905, 7) || !is(904, 0) || !is(906, 0) || !is(450, 0)) return 4;
        // Only of one area the kernel moves all.
        char *moved = mremap(at(300), 300 * PAGE, 300 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at(2000));
        if (moved != at(2000) || !is(2000, 2) || !is(2200, 3)) return 5;
        for (unsigned long i = 0; i < sizeof stack; i++) if (stack[i] != 9) return 6;
        *at(300 + 1700) = 1;
        return 42;
    }"#;

/// What the process had when its building began: its areas in the end, but for those of which the program's text says that they changed.
fn before(image: &ProcessImage) -> Vec<Area> {
    const BASE: u64 = 0x2000_0000_0000;
    let anon = |first: u64, end: u64, prot: u8| Area {
        start: BASE + first * PAGE,
        end: BASE + end * PAGE,
        prot: Prot(prot),
        flags: AreaFlags(0),
        kind: AreaKind::Anon,
    };
    let mut areas: Vec<Area> = image
        .areas
        .iter()
        .filter(|a| a.kind == AreaKind::Anon && !(BASE..BASE + 1000 * PAGE).contains(&a.start))
        .cloned()
        .collect();
    for area in &mut areas {
        if area.flags.has(AreaFlags::GROWSDOWN) {
            // It has grown since.
            area.start = area.end - 3 * PAGE;
        }
    }
    areas.extend([
        anon(0, 200, 3),
        anon(300, 400, 3),
        anon(450, 600, 3),
        // What is at 700 was elsewhere.
        anon(740, 760, 3),
        anon(800, 830, 3),
        anon(890, 920, 1),
    ]);
    areas.sort_by_key(|a| a.start);
    areas
}

#[test]
fn pages_that_were_put_early_are_where_they_belong_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "grows", GROWS, &["-static"]);
    let (mut guest, stopped) = Guest::start(&program, &[]);
    stopped.cont(0).unwrap();
    assert_eq!(guest.line(), "ready");
    let captured = capture(guest.pid, &mut stop_all(guest.pid));
    end(guest.pid);
    let cage = cage();
    // As it is built without any of this.
    let plain = build(&cage, &captured);
    let expected = layout(plain.pid());
    let outer = plain.pid();
    drop(plain.finish().unwrap());
    end(outer);
    let (mut shell, socket, inside) = shell(&cage, captured.image.pid);
    let outer = shell.pid();
    shell.make(&before(&captured.image)).unwrap();
    let mut kept = Kept::default();
    kept.put_into(Box::new(shell.room().unwrap()));
    const LIMIT: usize = 64 << 20;
    let mut put = |address, data: &[u8]| {
        for (at, chunk) in (address..).step_by(CHUNK_BYTES).zip(data.chunks(CHUNK_BYTES)) {
            let data = chunk.into();
            kept.put(&Piece { address: at, data }, LIMIT).unwrap();
        }
    };
    // What does not exist any more, and what was otherwise.
    for area in before(&captured.image) {
        put(area.start, &vec![0xee; area.len().min(40 * PAGE) as usize]);
    }
    for (address, data) in &captured.pages {
        put(*address, data);
    }
    let pages = captured.pages.iter();
    let present: Vec<_> = pages.map(|(at, data)| (*at, at + data.len() as u64)).collect();
    kept.retain(&present);
    assert!(kept.landed().bytes() > 350 * PAGE as usize && kept.bytes() > 0);
    let fds: Vec<_> = captured.files.iter().map(|f| f.as_fd()).collect();
    let fds = shell.give(socket.as_fd(), inside, &fds).unwrap();
    let file = |backing| match backing {
        Backing::File(id) => fds.get(id as usize).copied(),
        Backing::Shared(_) => None,
    };
    let built = shell
        .rebuild(&captured.image, &file, kept.runs(), kept.landed(), None)
        .unwrap();
    assert_eq!(layout(outer), expected);
    let stopped = built.finish().unwrap();
    let memory = ProcessMemory::new(outer);
    // What the kernel writes whenever a thread goes on: where it runs (rseq(2)).
    let rseq = captured.image.threads[0]
        .rseq
        .map(|r| r.pointer..r.pointer + u64::from(r.size));
    let in_rseq = |at: u64| rseq.as_ref().is_some_and(|range| range.contains(&at));
    for (at, data) in &captured.pages {
        let mut there = vec![0; data.len()];
        memory.read_forced(*at, &mut there).unwrap();
        let differs = (*at..)
            .zip(data.iter().zip(&there))
            .find(|(at, (a, b))| a != b && !in_rseq(*at));
        assert_eq!(differs, None, "pages at {at:#x}");
    }
    let all = shim::capture::all_runs(outer, &captured.image.areas).unwrap();
    let all: Vec<_> = all.into_iter().map(|r| (r.start, r.end)).collect();
    let pages = |runs: &[(u64, u64)]| runs.iter().map(|(start, end)| (end - start) / PAGE).sum::<u64>();
    assert_eq!(pages(&all), pages(&present), "{all:x?} {present:x?}");
    go(vec![stopped]);
    kill(Pid::from_raw(outer), Signal::SIGUSR1).unwrap();
    let status = run_to_end(outer);
    assert!(matches!(status, Status::Exited(42)), "{status:?}");
    assert!(cage.teardown(Duration::from_secs(2)));
}

/// A thread that was let go on is stopped again before its kernel has made its sleep again.
#[test]
fn a_restart_that_has_not_come_about_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "waits", WAITS, &[]);
    let (mut guest, stopped) = Guest::start(&program, &["nanosleep"]);
    stopped.cont(0).unwrap();
    assert_eq!(guest.line(), "ready");
    let mut threads = loop {
        let threads = stop_all(guest.pid);
        if threads[0].regs().unwrap().rax as i64 == -516 {
            break threads;
        }
        go(threads);
    };
    let mut regs = threads[0].regs().unwrap();
    let nr = regs.orig_rax as u32;
    let restart = libc::SYS_restart_syscall as u32;
    let described = |threads: &mut [Stopped]| capture(guest.pid, threads).image.threads.remove(0);
    let again = |nr, code| Some(linklayer::image::Rewound { nr, code });
    assert_eq!(described(&mut threads).rewound, again(nr, -516));
    // In the kernel, and in its own code.
    regs.rip -= 2;
    regs.rax = u64::from(restart);
    for orig_rax in [u64::from(nr), u64::MAX] {
        threads[0]
            .set_regs(&linklayer::image::Regs { orig_rax, ..regs })
            .unwrap();
        let image = described(&mut threads);
        assert_eq!(image.rewound, again(restart, -513));
        assert_eq!((image.regs.rip, image.regs.rax), (regs.rip, regs.rax));
    }
    // A call that it was going to make anyway.
    regs.rax = u64::from(nr);
    let orig_rax = u64::MAX;
    threads[0]
        .set_regs(&linklayer::image::Regs { orig_rax, ..regs })
        .unwrap();
    assert_eq!(described(&mut threads).rewound, None);
    end(guest.pid);
}

#[test]
fn who_was_killed_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "waits", WAITS, &[]);
    let (guest, stopped) = Guest::start(&program, &["poll"]);
    kill(Pid::from_raw(guest.pid), Signal::SIGKILL).unwrap();
    let described = shim::capture::describe(guest.pid, &mut [stopped], 0, |_| Ok(0));
    let why = described.unwrap_err();
    assert!(
        why.is_gone() && why.to_string() == "the process has ended",
        "{why:?}"
    );
}

const REMAPS: &str = r#"
    #include <stdio.h>
    #include <string.h>
    #include <sys/mman.h>
    #define BASE ((char *) 0x200000000000)
    static int map(long first, long count) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
        return mmap(BASE + first * 4096, count * 4096, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED;
    }
    int main(void) {
        if (!map(0, 30)) return 1;
        memset(BASE, 1, 30 * 4096);
        puts("ready");
        fflush(stdout);
        getchar();
        memset(BASE, 2, 5 * 4096);
        if (!map(10, 10)) return 2;
        memset(BASE + 12 * 4096, 3, 4096);
        puts("done");
        fflush(stdout);
        getchar();
        return 42;
    }"#;

/// Begins to watch the memory of a guest that runs.
fn watch(pid: i32) -> Tracker {
    let mut threads = stop_all(pid);
    let tracker = Tracker::begin(&mut threads[0], 0).unwrap();
    go(threads);
    tracker
}

/// Has a guest go on to where it says that it is done.
fn next(guest: &mut Guest) {
    std::io::Write::write_all(guest.stdin.as_mut().unwrap(), b"\n").unwrap();
    assert_eq!(guest.line(), "done");
}

/// Memory that is watched is not forgotten when something else is mapped into it while it is looked at.
#[test]
fn what_has_changed_is_told_though_the_areas_are_others_by_now() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "remaps", REMAPS, &[]);
    let (mut guest, stopped) = Guest::start(&program, &[]);
    stopped.cont(0).unwrap();
    assert_eq!(guest.line(), "ready");
    let tracker = watch(guest.pid);
    let base = 0x2000_0000_0000;
    let told =
        |runs: &[std::ops::Range<u64>], page: u64| runs.iter().any(|r| r.contains(&(base + page * 4096)));
    let first = tracker.round().unwrap();
    assert!((0..30).all(|page| told(&first, page)));
    let lines = shim::capture::map_lines(guest.pid, false).unwrap();
    let still = tracker.round_of(&lines).unwrap();
    assert!(!(0..30).any(|page| told(&still, page)), "{still:x?}");
    next(&mut guest);
    let changed = tracker.round_of(&lines).unwrap();
    assert!((0..5).all(|page| told(&changed, page)), "{changed:x?}");
    assert!(told(&changed, 12) && !told(&changed, 11), "{changed:x?}");
    drop(tracker);
    end(guest.pid);
}

const JOINS: &str = r#"
    #define _GNU_SOURCE
    #include <stdio.h>
    #include <string.h>
    #include <sys/mman.h>
    #define BASE ((char *) 0x200000000000)
    static void done(void) {
        puts("done");
        fflush(stdout);
        getchar();
    }
    static int move(long from, long to) {
        int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        return mremap(BASE + from * 4096, 4 * 4096, 4 * 4096, flags, BASE + to * 4096) != MAP_FAILED;
    }
    int main(void) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
        if (mmap(BASE, 8 * 4096, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) return 1;
        memset(BASE, 1, 8 * 4096);
        if (!move(4, 20)) return 2;
        done();
        if (!move(20, 4)) return 3;
        memset(BASE, 2, 2 * 4096);
        done();
        for (int value = 3;; value++) {
            memset(BASE, value, 4096);
            memset(BASE + 2 * 4096, value, 4096);
            done();
        }
    }"#;

/// The pages of the program's area that it tells of.
fn pages_told(tracker: &Tracker) -> Vec<u64> {
    let runs = tracker.round().unwrap();
    let page = |number: &u64| {
        runs.iter()
            .any(|r| r.contains(&(0x2000_0000_0000 + number * PAGE)))
    };
    (0..30).filter(page).collect()
}

/// An area into which another one is moved is watched no more, and what its pages are marked with says nothing.
#[test]
fn what_has_changed_is_told_though_areas_were_joined() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "joins", JOINS, &[]);
    let (mut guest, stopped) = Guest::start(&program, &[]);
    stopped.cont(0).unwrap();
    assert_eq!(guest.line(), "done");
    let tracker = watch(guest.pid);
    let told = || pages_told(&tracker);
    let all: Vec<u64> = (0..8).collect();
    assert_eq!(told(), [0, 1, 2, 3, 20, 21, 22, 23]);
    assert_eq!(told(), []);
    next(&mut guest);
    assert_eq!(told(), all);
    assert_eq!(told(), all);
    drop(tracker);
    // What is marked from then means nothing to the next one.
    let tracker = watch(guest.pid);
    let told = || pages_told(&tracker);
    assert_eq!(told(), all);
    assert_eq!(told(), []);
    next(&mut guest);
    assert_eq!(told(), [0, 2]);
    assert_eq!(told(), []);
    drop(tracker);
    end(guest.pid);
}

const LEADERLESS: &str = r#"
    #define _GNU_SOURCE
    #include <errno.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdio.h>
    #include <unistd.h>
    static pthread_t first;
    static void *rest(void *unused) {
        sigset_t set;
        siginfo_t info;
        pthread_join(first, 0);
        puts("ready");
        fflush(stdout);
        sigemptyset(&set);
        sigaddset(&set, SIGUSR2);
        int got;
        /* That its capture is none of its business is for a tracer to see to. */
        while ((got = sigwaitinfo(&set, &info)) == -1 && errno == EINTR) ;
        if (got != SIGUSR2) _exit(1);
        _exit(info.si_code == SI_USER && info.si_pid == 77 ? 42 : 2);
    }
    int main(void) {
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR2);
        sigprocmask(SIG_BLOCK, &set, 0);
        pthread_t thread;
        first = pthread_self();
        pthread_create(&thread, 0, rest, 0);
        pthread_exit(0);
    }"#;

/// Only the very thread that has the number may queue a code of the kernel's for it.
#[test]
fn what_is_pending_survives_the_first_thread() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "leaderless", LEADERLESS, &[]);
    let (mut guest, stopped) = Guest::start(&program, &[]);
    let pid = guest.pid;
    stopped.cont(0).unwrap();
    loop {
        match wait(Target::Mine, false).unwrap() {
            Some((tid, Status::Stopped(stopped))) => {
                stopped.cont(0).unwrap();
                if tid != pid {
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    while !shim::process::has_ended(pid) {
        if let Some((_, Status::Stopped(stopped))) = wait(Target::Mine, true).unwrap() {
            stopped.cont(0).unwrap();
        }
    }
    assert_eq!(guest.line(), "ready");
    let mut captured = capture(pid, &mut stop_all(pid));
    assert!(captured.image.leader_ended());
    end(pid);
    captured.image.pending = vec![linklayer::image::SigInfo::user(libc::SIGUSR2, 0, 77, 88)];
    let cage = cage();
    let mut built = build(&cage, &captured);
    let outer = built.pid();
    built
        .start_threads(&mut |tid| cage.set_last_pid(tid - 1).map_err(std::io::Error::other))
        .unwrap();
    go(built.finish_all().unwrap());
    let status = run_to_end(outer);
    assert!(matches!(status, Status::Exited(42)), "{status:?}");
    assert!(cage.teardown(Duration::from_secs(2)));
}

#[test]
fn a_shell_takes_many_descriptors() {
    let cage = cage();
    let (mut shell, socket, inside) = shell(&cage, 4000);
    let files: Vec<File> = (0..300).map(|_| File::open("/dev/null").unwrap()).collect();
    let fds: Vec<_> = files.iter().map(|f| f.as_fd()).collect();
    let numbers = shell.give(socket.as_fd(), inside, &fds).unwrap();
    assert_eq!(numbers.len(), 300);
    for number in numbers {
        let there = std::fs::read_link(format!("/proc/{}/fd/{number}", shell.pid())).unwrap();
        assert_eq!(there.to_str(), Some("/dev/null"));
    }
    end(shell.pid());
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
