//! What the tests of process surgery share: small C guests, started under trace.
#![allow(dead_code)] // no test uses all of it

use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use linklayer::image::ProcessImage;
use linklayer::stay::StayReason;
use shim::memory::ProcessMemory;
use shim::ptrace::{self, Options, Status, Stop, Stopped, Target, wait, wait_stop};

/// Compiles a C program; extra arguments go to gcc.
pub fn compile(dir: &Path, name: &str, source: &str, extra: &[&str]) -> PathBuf {
    let (file, program) = (dir.join(format!("{name}.c")), dir.join(name));
    std::fs::write(&file, source).unwrap();
    let status = Command::new("gcc")
        .args(["-O1", "-g0", "-w", "-pthread", "-o"])
        .args([&program, &file])
        .args(extra)
        .status()
        .expect("gcc is needed to build the guests");
    assert!(status.success());
    program
}

/// A guest that this test traces.
pub struct Guest {
    pub pid: i32,
    pub stdin: Option<ChildStdin>,
    pub stdout: ChildStdout,
    child: Child,
}

impl Guest {
    /// Starts a program and leaves it stopped in its exec stop.
    pub fn start(program: &Path, args: &[&str]) -> (Guest, Stopped) {
        // The shell waits for a line before it executes the program, so that it can be seized before.
        let mut child = Command::new("/bin/sh")
            .args(["-c", "read go; exec \"$0\" \"$@\"", program.to_str().unwrap()])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        ptrace::seize(pid, ptrace::usual_options() | Options::PTRACE_O_EXITKILL).unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut stdin, b"\n").unwrap();
        // The shell's own exec may be seen first.
        let is_program = || std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
        let stopped = next_stop(pid, |stop| matches!(stop, Stop::Exec { .. }) && is_program());
        let stdout = child.stdout.take().unwrap();
        (
            Guest {
                pid,
                stdin: Some(stdin),
                stdout,
                child,
            },
            stopped,
        )
    }

    /// Starts a program and leaves it in an event stop at its entry point.
    pub fn at_entry(program: &Path, args: &[&str]) -> (Guest, Stopped) {
        let (guest, mut stopped) = Guest::start(program, args);
        let auxv = std::fs::read(format!("/proc/{}/auxv", guest.pid)).unwrap();
        let word = |b: &[u8]| u64::from_ne_bytes(b.try_into().unwrap());
        let pair = auxv
            .chunks_exact(16)
            .find(|p| word(&p[..8]) == libc::AT_ENTRY)
            .unwrap();
        let entry = word(&pair[8..]);
        let memory = ProcessMemory::new(guest.pid);
        let mut original = [0];
        memory.read_forced(entry, &mut original).unwrap();
        memory.write_forced(entry, &[0xcc]).unwrap();
        stopped.cont(0).unwrap();
        stopped = next_stop(guest.pid, |stop| stop == Stop::Signal(libc::SIGTRAP));
        memory.write_forced(entry, &original).unwrap();
        let mut regs = stopped.regs().unwrap();
        assert_eq!(regs.rip, entry + 1);
        regs.rip = entry;
        stopped.set_regs(&regs).unwrap();
        stopped.settle().unwrap();
        (guest, stopped)
    }

    /// Everything that it writes until it closes its output.
    pub fn output(&mut self) -> String {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut self.stdout, &mut text).unwrap();
        text
    }

    /// One line that it writes.
    pub fn line(&mut self) -> String {
        let mut text = Vec::new();
        let mut byte = [0];
        while std::io::Read::read(&mut self.stdout, &mut byte).unwrap() == 1 && byte[0] != b'\n' {
            text.push(byte[0]);
        }
        String::from_utf8(text).unwrap()
    }
}

/// Passes over stops of a thread (delivering its signals) until one that is wanted.
pub fn next_stop(tid: i32, wanted: impl Fn(Stop) -> bool) -> Stopped {
    loop {
        let stopped = wait_stop(tid).unwrap();
        match stopped.stop() {
            stop if wanted(stop) => return stopped,
            Stop::Signal(sig) => stopped.cont(sig).unwrap(),
            _ => stopped.cont(0).unwrap(),
        }
    }
}

/// Runs a traced process to its end, delivering its signals.
pub fn run_to_end(pid: i32) -> Status {
    loop {
        match wait(Target::Mine, false).unwrap().expect("the process is there") {
            (_, Status::Stopped(stopped)) => match stopped.stop() {
                Stop::Signal(sig) => drop(stopped.cont(sig)),
                _ => drop(stopped.cont(0)),
            },
            (tid, status) if tid == pid => return status,
            _ => {}
        }
    }
}

/// Brings all threads of a running traced process to event stops; the leader is the first.
pub fn stop_all(pid: i32) -> Vec<Stopped> {
    let mut tids: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|e| e.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .filter(|tid| !shim::process::has_ended(*tid))
        .collect();
    tids.sort_by_key(|tid| (*tid != pid, *tid));
    tids.into_iter()
        .map(|tid| {
            loop {
                ptrace::interrupt(tid).unwrap();
                let stopped = wait_stop(tid).unwrap();
                match stopped.stop() {
                    Stop::Interrupt => break stopped,
                    Stop::Signal(sig) => stopped.cont(sig).unwrap(),
                    _ => stopped.cont(0).unwrap(),
                }
            }
        })
        .collect()
}

/// A process as it was captured.
pub struct Captured {
    pub image: ProcessImage,
    pub files: Vec<std::fs::File>,
    pub pages: Vec<(u64, Vec<u8>)>,
}

/// Captures a process; file n of the image is `files[n]`.
pub fn capture(pid: i32, threads: &mut [Stopped]) -> Captured {
    let mut files: Vec<std::fs::File> = Vec::new();
    let mut known: Vec<(u64, u64)> = Vec::new();
    let image = shim::capture::describe(pid, threads, 0, |file| {
        if let Some(at) = known.iter().position(|k| *k == (file.dev, file.ino)) {
            return Ok(at as u64);
        }
        known.push((file.dev, file.ino));
        let path = std::ffi::OsStr::from_bytes(file.path);
        let lost = |_| StayReason::LostFile(path.to_string_lossy().into_owned());
        files.push(std::fs::File::open(path).map_err(lost)?);
        Ok(files.len() as u64 - 1)
    })
    .unwrap();
    image.validate().unwrap();
    let pid = image.reached_by();
    let memory = ProcessMemory::new(pid);
    let mut pages = Vec::new();
    for area in image.areas.iter().filter(|a| !a.is_kernel()) {
        for run in shim::capture::page_runs(pid, area).unwrap() {
            let mut bytes = vec![0; (run.end - run.start) as usize];
            memory.read_forced(run.start, &mut bytes).unwrap();
            pages.push((run.start, bytes));
        }
    }
    Captured { image, files, pages }
}

/// A program with threads that compute, wait and sleep, check their own state, and end with 42 when SIGUSR1 comes.
pub const THREADS: &str = r#"
    #define _GNU_SOURCE
    #include <errno.h>
    #include <pthread.h>
    #include <signal.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/rseq.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>
    static volatile sig_atomic_t stop;
    static volatile int ready;
    static char alternate[65536];
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER, robust;
    static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    static long count;
    static __thread long mine;
    static void fail(int code) { syscall(SYS_exit_group, code); }
    static void on_signal(int signal, siginfo_t *info, void *context) {
        char here;
        if (&here < alternate || &here > alternate + sizeof alternate) fail(10);
        if (info->si_signo != SIGUSR1) fail(11);
        stop = 1;
    }
    static void check(long n, pid_t tid) {
        if (mine != n * 1000) fail(12);
        if (syscall(SYS_gettid) != tid) fail(13);
        struct rseq *rseq = (void *) ((char *) __builtin_thread_pointer() + __rseq_offset);
        if (__rseq_size && (int) rseq->cpu_id < 0) fail(14);
        char name[16];
        pthread_getname_np(pthread_self(), name, sizeof name);
        if (n && (name[0] != 'w' || name[1] != '0' + n)) fail(15);
    }
    static void *work(void *argument) {
        long n = (long) argument;
        pid_t tid = syscall(SYS_gettid);
        char name[] = {'w', '0' + n, 0};
        mine = n * 1000;
        pthread_setname_np(pthread_self(), name);
        __atomic_add_fetch(&ready, 1, __ATOMIC_SEQ_CST);
        double x = n, y;
        unsigned long rounds = 0;
        while (!stop) {
            check(n, tid);
            if (n == 1) {
                for (int i = 0; i < 100; i++) { y = x * 3.0; if (y / 3.0 != n) fail(16); }
                pthread_mutex_lock(&mutex); count++; pthread_mutex_unlock(&mutex);
            } else if (n == 2) {
                struct timespec nap = {0, 3000000};
                nanosleep(&nap, 0);
            } else {
                pthread_mutex_lock(&mutex);
                while (!stop) pthread_cond_wait(&cond, &mutex);
                pthread_mutex_unlock(&mutex);
            }
            rounds++;
        }
        if (n == 2) pthread_mutex_lock(&robust);
        return (void *) (n + 1);
    }
    int main(void) {
        stack_t stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
        sigaltstack(&stack, 0);
        struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_ONSTACK | SA_SIGINFO | SA_RESTART};
        sigaddset(&action.sa_mask, SIGUSR2);
        sigaction(SIGUSR1, &action, 0);
        signal(SIGPIPE, SIG_IGN);
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
        pthread_mutex_init(&robust, &attributes);
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR1);
        sigaddset(&set, SIGTERM);
        pthread_sigmask(SIG_BLOCK, &set, 0);
        pthread_t threads[4];
        for (long n = 1; n < 5; n++) pthread_create(&threads[n - 1], 0, work, (void *) n);
        sigdelset(&set, SIGTERM);
        pthread_sigmask(SIG_UNBLOCK, &set, 0);
        while (ready < 4) usleep(100);
        puts("ready");
        fflush(stdout);
        while (!stop) usleep(2000);
        pthread_mutex_lock(&mutex);
        pthread_cond_broadcast(&cond);
        pthread_mutex_unlock(&mutex);
        for (long n = 1; n < 5; n++) {
            void *result;
            if (pthread_join(threads[n - 1], &result) || (long) result != n + 1) fail(17);
        }
        if (pthread_mutex_lock(&robust) != EOWNERDEAD) fail(18);
        if (pthread_sigmask(SIG_BLOCK, 0, &set) || !sigismember(&set, SIGTERM) || sigismember(&set, SIGUSR1)) fail(19);
        struct sigaction now;
        sigaction(SIGPIPE, 0, &now);
        if (now.sa_handler != SIG_IGN) fail(20);
        sigaction(SIGUSR1, 0, &now);
        if (now.sa_sigaction != on_signal || !sigismember(&now.sa_mask, SIGUSR2)) fail(21);
        check(0, getpid());
        printf("done\n");
        return 42;
    }"#;
