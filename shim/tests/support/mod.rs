//! What the tests of this crate share: running a test as several users, and a minimal tracer.
#![allow(dead_code)]

use std::time::{Duration, Instant};

use linklayer::image::Regs;
use linklayer::memory::GuestMemory;
use shim::cage::GATE;
use shim::memory::ProcessMemory;
use shim::ptrace::{self, Status, Stop, Stopped, Target};

/// Runs `test` in a forked process as the user of this one and, if that is root, in another as uid and gid 65534 without any
/// capability. A panic there is a failure here.
pub fn as_each_user(test: impl Fn()) {
    // SAFETY: touches no memory.
    let root = unsafe { libc::geteuid() } == 0;
    in_child("as the test's user", &test);
    if root {
        in_child("as uid 65534", || {
            // SAFETY: this child has one thread and no further use for its privileges; the group list is empty.
            unsafe {
                assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
                assert_eq!(libc::setresgid(65_534, 65_534, 65_534), 0);
                assert_eq!(libc::setresuid(65_534, 65_534, 65_534), 0);
                // As after an exec, which a supervisor begins with.
                assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 1), 0);
            }
            test();
        });
    }
}

fn in_child(how: &str, test: impl FnOnce()) {
    // SAFETY: the child runs the test in its only thread and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test)).is_ok();
        // SAFETY: ends the copy without running the harness's exit handlers.
        unsafe { libc::_exit(i32::from(!passed)) };
    }
    let mut status = 0;
    // SAFETY: `status` is a valid place.
    unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(status, 0, "failed {how}");
}

/// Waits up to five seconds for something.
pub fn wait_until(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(5), "waited in vain");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A field of /proc/PID/status; empty if there is none.
pub fn status_field(pid: i32, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// Children of this process, sorted.
pub fn children() -> Vec<i32> {
    let mut all = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let text = std::fs::read_to_string(task.unwrap().path().join("children")).unwrap();
        all.extend(text.split_whitespace().map(|pid| pid.parse::<i32>().unwrap()));
    }
    all.sort_unstable();
    all
}

/// A stopped process in which system calls can be made through the gate of blank guests.
pub struct Tracee {
    pub pid: i32,
    stopped: Option<Stopped>,
    memory: ProcessMemory,
}

impl Tracee {
    /// Seizes and stops a process.
    pub fn seize(pid: i32) -> Tracee {
        Self::seize_with(
            pid,
            ptrace::usual_options() & !ptrace::Options::PTRACE_O_TRACECLONE,
        )
    }

    /// The same with options of the caller's choice.
    pub fn seize_with(pid: i32, options: ptrace::Options) -> Tracee {
        ptrace::seize(pid, options | ptrace::Options::PTRACE_O_TRACESECCOMP).unwrap();
        ptrace::interrupt(pid).unwrap();
        let stopped = ptrace::wait_stop(pid).unwrap();
        Tracee {
            pid,
            stopped: Some(stopped),
            memory: ProcessMemory::new(pid),
        }
    }

    pub fn memory(&self) -> &ProcessMemory {
        &self.memory
    }

    /// Makes a system call in the tracee, whose registers are left as they were.
    pub fn call<const N: usize>(&mut self, nr: i64, args: [u64; N]) -> i64 {
        self.call_at(GATE, nr, args)
    }

    /// The same with the `syscall; int3` at `gate`.
    pub fn call_at<const N: usize>(&mut self, gate: u64, nr: i64, args: [u64; N]) -> i64 {
        let mut all = [0; 6];
        all[..N].copy_from_slice(&args);
        let mut stopped = self.stopped.take().unwrap();
        let before = stopped.regs().unwrap();
        let regs = Regs {
            rip: gate,
            rax: nr as u64,
            orig_rax: u64::MAX,
            rdi: all[0],
            rsi: all[1],
            rdx: all[2],
            r10: all[3],
            r8: all[4],
            r9: all[5],
            ..before
        };
        stopped.set_regs(&regs).unwrap();
        // Entry, then exit.
        let mut left = 2;
        while left > 0 {
            stopped.syscall(0).unwrap();
            stopped = ptrace::wait_stop(self.pid).unwrap();
            match stopped.stop() {
                Stop::Syscall => left -= 1,
                Stop::Interrupt | Stop::Seccomp(_) => {}
                other => panic!("{other:?}"),
            }
        }
        let ret = stopped.regs().unwrap().rax as i64;
        stopped.set_regs(&before).unwrap();
        self.stopped = Some(stopped);
        ret
    }

    /// Maps readable, writable and executable memory.
    pub fn map(&mut self, len: u64) -> u64 {
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let got = self.call(libc::SYS_mmap, [0, len, prot as u64, flags as u64, u64::MAX, 0]);
        assert!(got > 0, "mmap: {got}");
        got as u64
    }

    /// Writes to its memory; returns the address.
    pub fn put(&self, addr: u64, bytes: &[u8]) -> u64 {
        self.memory.write(addr, bytes).unwrap();
        addr
    }

    pub fn word(&self, addr: u64) -> u64 {
        self.memory.read_u64(addr).unwrap()
    }

    /// A NUL-terminated string.
    pub fn text(&self, addr: u64) -> String {
        let mut bytes = self.memory.read_string(addr, 4096).unwrap();
        bytes.pop();
        String::from_utf8(bytes).unwrap()
    }

    /// The token, to go on with it by hand.
    pub fn take(&mut self) -> Stopped {
        self.stopped.take().unwrap()
    }

    /// Gives a token back.
    pub fn give(&mut self, stopped: Stopped) {
        self.stopped = Some(stopped);
    }

    /// Starts it at `rip`, with `rdi` set.
    pub fn run(&mut self, rip: u64, rdi: u64) {
        let mut stopped = self.stopped.take().unwrap();
        let regs = stopped.regs().unwrap();
        let regs = Regs {
            rip,
            rdi,
            orig_rax: u64::MAX,
            ..regs
        };
        stopped.set_regs(&regs).unwrap();
        stopped.cont(0).unwrap();
    }

    /// Kills and reaps it.
    pub fn kill(&mut self) {
        // SAFETY: kills our own child.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        loop {
            match ptrace::wait(Target::Thread(self.pid), false).unwrap() {
                Some((_, Status::Stopped(stopped))) => drop(stopped.cont(0)),
                _ => return,
            }
        }
    }
}

std::arch::global_asm!(
    ".pushsection .rodata.test_script, \"a\", @progbits",
    "test_script_start:",
    "mov rbx, rdi",
    "1:",
    "mov rax, [rbx]",
    "cmp rax, -1",
    "je 3f",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "cmp rax, -2",
    "je 2f",
    "syscall",
    "mov [rbx + 56], rax",
    "add rbx, 64",
    "jmp 1b",
    "2:", // getpid of the 32-bit kind
    "mov eax, 20",
    "int 0x80",
    "mov [rbx + 56], rax",
    "add rbx, 64",
    "jmp 1b",
    "3:",
    "int3",
    "test_script_end:",
    ".popsection",
);

unsafe extern "C" {
    static test_script_start: u8;
    static test_script_end: u8;
}

/// Number in a script for getpid by `int 0x80`.
pub const INT_80: i64 = -2;

/// A guest that makes a list of system calls and stops with SIGTRAP at the end.
pub struct Script {
    /// where its memory begins: code, then the list from the second page on, then two pages of data
    pub base: u64,
    len: usize,
}

impl Script {
    /// Places a script in a stopped blank guest.
    pub fn place(guest: &mut Tracee, calls: &[(i64, [u64; 6])]) -> Script {
        let base = guest.map(4 * 4096);
        let mut script = Script { base, len: 0 };
        script.write(guest, calls);
        script
    }

    /// Address of the data.
    pub fn data(&self) -> u64 {
        self.base + 2 * 4096
    }

    /// Writes another list.
    pub fn write(&mut self, guest: &Tracee, calls: &[(i64, [u64; 6])]) {
        assert!(calls.len() < 64);
        let (start, end) = (&raw const test_script_start, &raw const test_script_end);
        // SAFETY: the symbols bound the code above.
        let code = unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) };
        guest.put(self.base, code);
        let mut words = Vec::new();
        for (nr, args) in calls {
            words.push(*nr as u64);
            words.extend(args);
            words.push(0xdead);
        }
        words.push(u64::MAX);
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        guest.put(self.base + 4096, &bytes);
        self.len = calls.len();
    }

    /// Starts it.
    pub fn start(&self, guest: &mut Tracee) {
        guest.run(self.base, self.base + 4096);
    }

    /// Results of the calls as `memory` has them.
    pub fn results(&self, memory: &ProcessMemory) -> Vec<i64> {
        (0..self.len as u64)
            .map(|i| memory.read_u64(self.base + 4096 + i * 64 + 56).unwrap() as i64)
            .collect()
    }
}
