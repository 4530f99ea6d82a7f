//! Children and threads of guests, made by rewritten calls in a cage.

mod support;

use std::time::Duration;

use linklayer::image::Regs;
use linklayer::memory::GuestMemory;
use shim::cage::{Cage, CageOptions};
use shim::clone_rewrite::{CLONE_CLEAR_SIGHAND, CloneError, CloneRequest, CloneRewrite, CloneStep, inner_id};
use shim::filter::{self, Installed};
use shim::memory::ProcessMemory;
use shim::ptrace::{self, Status, Stop, Stopped, Target};
use support::{Script, Tracee, as_each_user, children};

const PARENT: i32 = 700;
const CHLD: u64 = libc::SIGCHLD as u64;
const VM: u64 = libc::CLONE_VM as u64;
const VFORK: u64 = libc::CLONE_VFORK as u64;

struct Rig {
    cage: Cage,
    guest: Tracee,
    script: Script,
    installed: Installed,
}

/// A child as it stands when everything is done but its resuming.
struct Made {
    request: CloneRequest,
    parent: Stopped,
    child: Stopped,
    before: Regs,
}

impl Rig {
    fn new() -> Rig {
        let cage = Cage::new(CageOptions {
            hostname: "home".into(),
            uid: 1000,
            gid: 1000,
            ..CageOptions::default()
        })
        .unwrap();
        let blank = cage.spawn_blank(PARENT, &[]).unwrap();
        let mut guest = Tracee::seize_with(blank.outer_pid, ptrace::usual_options());
        let script = Script::place(&mut guest, &[]);
        let installed = filter::install(guest.pid, false, |nr, args| {
            Ok::<_, std::io::Error>(guest.call(nr, args))
        })
        .unwrap();
        Rig {
            cage,
            guest,
            script,
            installed,
        }
    }

    /// Starts the guest on one call and on getpid and gettid after it, up to the seccomp stop.
    fn begin(&mut self, nr: i64, args: [u64; 6]) -> (Stopped, CloneRewrite) {
        let calls = [(nr, args), (libc::SYS_getpid, [0; 6]), (libc::SYS_gettid, [0; 6])];
        self.script.write(&self.guest, &calls);
        self.script.start(&mut self.guest);
        self.seccomp_stop()
    }

    fn seccomp_stop(&mut self) -> (Stopped, CloneRewrite) {
        let stopped = ptrace::wait_stop(self.guest.pid).unwrap();
        assert_eq!(stopped.stop(), Stop::Seccomp(filter::TRACE_CLONE));
        let regs = stopped.regs().unwrap();
        let request = CloneRequest::parse(&regs, self.guest.memory()).unwrap();
        (stopped, CloneRewrite::new(request, &regs))
    }

    /// Makes the child with the id `wanted`.
    fn make(&mut self, stopped: Stopped, mut rewrite: CloneRewrite, wanted: i32) -> Made {
        self.cage.set_last_pid(wanted - 1).unwrap();
        rewrite.start(stopped, self.guest.memory()).unwrap();
        let (mut parent, mut child, mut born) = (None, None, None);
        while parent.is_none() || child.is_none() {
            let (tid, status) = ptrace::wait(Target::Mine, false).unwrap().unwrap();
            let Status::Stopped(mut stopped) = status else {
                panic!("{tid}: {status:?}")
            };
            if tid != self.guest.pid {
                rewrite.child_stop(&mut stopped, wanted).unwrap();
                child = Some(stopped);
                continue;
            }
            match rewrite.parent_stop(stopped, self.guest.memory()).unwrap() {
                CloneStep::Running => {}
                CloneStep::Born(outer) => born = Some(outer),
                CloneStep::Returned(stopped, ret) => {
                    assert_eq!(ret, i64::from(wanted));
                    parent = Some(stopped);
                }
                CloneStep::Again(_) => panic!("no signal was sent"),
            }
        }
        let child = child.unwrap();
        assert_eq!(Some(child.tid()), born);
        assert_eq!(inner_id(child.tid()), Some(wanted));
        Made {
            request: *rewrite.request(),
            parent: parent.unwrap(),
            child,
            before: *rewrite.original(),
        }
    }

    /// Both have the registers that they had before the call, but for its result.
    fn check_registers(made: &Made, wanted: i32) {
        let parent = made.parent.regs().unwrap();
        let expected = Regs {
            rax: wanted as u64,
            orig_rax: u64::MAX,
            ..made.before
        };
        assert_eq!(parent, expected);
        let child = made.child.regs().unwrap();
        let stack = if made.request.stack == 0 {
            made.before.rsp
        } else {
            made.request.stack
        };
        let fs_base = if made.request.tls == 0 {
            made.before.fs_base
        } else {
            made.request.tls
        };
        assert_eq!(
            child,
            Regs {
                rax: 0,
                rsp: stack,
                fs_base,
                ..expected
            }
        );
    }

    /// Lets the child run to the end of the script; its results.
    fn run_child(&self, made: &mut Option<Stopped>) -> Vec<i64> {
        let child = made.take().unwrap();
        let pid = child.tid();
        child.cont(0).unwrap();
        let stopped = ptrace::wait_stop(pid).unwrap();
        assert_eq!(stopped.stop(), Stop::Signal(libc::SIGTRAP));
        let results = self.script.results(&ProcessMemory::new(pid));
        *made = Some(stopped);
        results
    }

    fn run_parent(&mut self, parent: Stopped) -> Vec<i64> {
        parent.cont(0).unwrap();
        let stopped = ptrace::wait_stop(self.guest.pid).unwrap();
        assert_eq!(stopped.stop(), Stop::Signal(libc::SIGTRAP));
        self.guest.give(stopped);
        self.script.results(self.guest.memory())
    }

    fn end(mut self) {
        self.guest.kill();
        drop(self.installed);
        assert!(self.cage.teardown(Duration::from_secs(2)));
        assert!(children().is_empty());
    }

    fn put_words(&self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        self.guest.put(self.script.data(), &bytes)
    }
}

fn kill_and_reap(child: Stopped) {
    let pid = child.tid();
    // SAFETY: kills our own child.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    while let Some((_, Status::Stopped(stopped))) = ptrace::wait(Target::Thread(pid), false).unwrap() {
        let _ = stopped.cont(0);
    }
}

#[test]
fn every_way_to_make_a_process_gives_the_chosen_id_and_leaves_no_trace() {
    as_each_user(|| {
        let mut rig = Rig::new();
        let stack = rig.script.data() + 8192;
        let data = rig.script.data();
        let mut wanted = 3000;
        for (nr, args, words) in [
            (libc::SYS_fork, [7; 6], vec![]),
            (libc::SYS_vfork, [7; 6], vec![]),
            (libc::SYS_clone, [CHLD, 0, 0, 0, 0, 7], vec![]),
            (libc::SYS_clone, [VM | VFORK | CHLD, stack, 0, 0, 0, 7], vec![]),
            (libc::SYS_clone3, [data, 88, 7, 7, 7, 7], vec![0, 0, 0, 0, CHLD]),
            (
                libc::SYS_clone3,
                [data, 88, 7, 7, 7, 7],
                vec![libc::CLONE_PIDFD as u64, data + 1000, 0, 0, CHLD],
            ),
            (
                libc::SYS_clone3,
                [data, 88, 7, 7, 7, 7],
                vec![CLONE_CLEAR_SIGHAND, 0, 0, 0, CHLD],
            ),
            (
                libc::SYS_clone3,
                [data, 88, 7, 7, 7, 7],
                vec![
                    CLONE_CLEAR_SIGHAND | VM | VFORK,
                    0,
                    0,
                    0,
                    CHLD,
                    stack - 4096,
                    4096,
                ],
            ),
        ] {
            wanted += 7;
            rig.put_words(&words);
            let (stopped, rewrite) = rig.begin(nr, args);
            let made = rig.make(stopped, rewrite, wanted);
            Rig::check_registers(&made, wanted);
            assert_eq!(
                support::status_field(made.child.tid(), "PPid"),
                std::process::id().to_string()
            );
            let shares = made.request.shares_memory();
            let mut child = Some(made.child);
            assert_eq!(
                rig.run_child(&mut child),
                [0, wanted.into(), wanted.into()],
                "{nr} {words:x?}"
            );
            if shares {
                // The parent was held back as by vfork.
                kill_and_reap(child.take().unwrap());
            }
            assert_eq!(
                rig.run_parent(made.parent),
                [wanted.into(), PARENT.into(), PARENT.into()]
            );
            if let Some(child) = child {
                kill_and_reap(child);
            }
        }
        // Nobody but the supervisor can wait for them.
        let nobody = rig.guest.call(
            libc::SYS_wait4,
            rig.installed.pass.args([u64::MAX, 0, libc::__WALL as u64, 0]),
        );
        assert_eq!(nobody, -i64::from(libc::ECHILD));
        rig.end();
    });
}

#[test]
fn a_thread_gets_the_chosen_id_its_stack_and_its_thread_pointer() {
    as_each_user(|| {
        let mut rig = Rig::new();
        let data = rig.script.data();
        let flags = 0x3d_0f00;
        for (nr, wanted) in [(libc::SYS_clone, 9000), (libc::SYS_clone3, 8000)] {
            let (tls, stack, tids) = (data + 512, data + 8192, data + 256);
            rig.put_words(&[flags, 0, tids + 8, tids, 0, data + 4096, 4096, tls]);
            let args = match nr {
                libc::SYS_clone => [flags, stack, tids, tids + 8, tls, 7],
                _ => [data, 88, 7, 7, 7, 7],
            };
            let (stopped, rewrite) = rig.begin(nr, args);
            let made = rig.make(stopped, rewrite, wanted);
            Rig::check_registers(&made, wanted);
            assert!(made.request.is_thread());
            assert_eq!(
                support::status_field(made.child.tid(), "Tgid"),
                rig.guest.pid.to_string()
            );
            // PARENT_SETTID, at once.
            assert_eq!(rig.guest.word(tids) as i32, wanted);
            let mut child = Some(made.child);
            assert_eq!(rig.run_child(&mut child), [0, PARENT.into(), wanted.into()]);
            // The thread ends by itself, and clears its id.
            let mut child = child.unwrap();
            let regs = child.regs().unwrap();
            let end = Regs {
                rip: shim::cage::GATE,
                rax: libc::SYS_exit as u64,
                orig_rax: u64::MAX,
                rdi: 0,
                r9: rig.installed.pass.key(),
                ..regs
            };
            child.set_regs(&end).unwrap();
            let tid = child.tid();
            child.cont(0).unwrap();
            assert!(matches!(
                ptrace::wait(Target::Thread(tid), false).unwrap(),
                Some((_, Status::Exited(0)))
            ));
            assert_eq!(rig.guest.word(tids + 8) as i32, 0);
            assert_eq!(
                rig.run_parent(made.parent),
                [wanted.into(), PARENT.into(), PARENT.into()]
            );
        }
        rig.end();
    });
}

#[test]
fn an_interrupt_comes_first_and_the_call_comes_again() {
    let mut rig = Rig::new();
    let data = rig.script.data();
    for words in [vec![0, 0, 0, 0, CHLD], vec![CLONE_CLEAR_SIGHAND, 0, 0, 0, CHLD]] {
        rig.put_words(&words);
        let (stopped, mut rewrite) = rig.begin(libc::SYS_clone3, [data, 88, 3, 4, 5, 6]);
        let mask = stopped.sigmask().unwrap();
        // SAFETY: signals our own child. The signal waits until the call is over.
        unsafe { libc::kill(rig.guest.pid, libc::SIGUSR1) };
        ptrace::interrupt(rig.guest.pid).unwrap();
        rig.cage.set_last_pid(4999).unwrap();
        let place = rewrite.original().rsp - 4096;
        let mut below = vec![0; 4096];
        rig.guest.memory().read(place, &mut below).unwrap();
        rewrite.start(stopped, rig.guest.memory()).unwrap();
        let stopped = ptrace::wait_stop(rig.guest.pid).unwrap();
        let CloneStep::Again(stopped) = rewrite.parent_stop(stopped, rig.guest.memory()).unwrap() else {
            panic!("the call was made");
        };
        let mut now = vec![0; 4096];
        rig.guest.memory().read(place, &mut now).unwrap();
        assert_eq!(now, below);
        // The stop that told of this was the one that the interrupt asked for.
        stopped.cont(0).unwrap();
        let (stopped, again) = rig.seccomp_stop();
        assert_eq!(again.original(), rewrite.original());
        let made = rig.make(stopped, rewrite, 5000);
        Rig::check_registers(&made, 5000);
        assert_eq!(made.parent.sigmask().unwrap(), mask);
        assert_eq!(made.child.sigmask().unwrap(), mask);
        kill_and_reap(made.child);
        made.parent.cont(0).unwrap();
        let stopped = ptrace::wait_stop(rig.guest.pid).unwrap();
        assert_eq!(stopped.stop(), Stop::Signal(libc::SIGUSR1));
        assert_eq!(rig.run_parent(stopped)[0], 5000);
    }
    rig.end();
}

#[test]
fn cleared_handlers_and_the_memory_below_the_stack() {
    as_each_user(|| {
        let mut rig = Rig::new();
        let data = rig.script.data();
        let pass = rig.installed.pass;
        for (signal, handler) in [(libc::SIGUSR1, 0x1234u64), (libc::SIGUSR2, 1)] {
            // handler, SA_RESTORER, restorer, mask
            rig.put_words(&[handler, 0x0400_0000, 0x1234, 0]);
            assert_eq!(
                rig.guest
                    .call(libc::SYS_rt_sigaction, pass.args([signal as u64, data, 0, 8])),
                0
            );
        }
        for (flags, stack) in [(0, 0), (VM | VFORK, data + 4096)] {
            let size = if stack == 0 { 0 } else { 4096 };
            rig.put_words(&[CLONE_CLEAR_SIGHAND | flags, 0, 0, 0, CHLD, stack, size]);
            let (stopped, rewrite) = rig.begin(libc::SYS_clone3, [data, 88, 0, 0, 0, 0]);
            let place = rewrite.original().rsp - 4096;
            let pattern: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
            rig.guest.put(place, &pattern);
            let made = rig.make(stopped, rewrite, 6000);
            for pid in [rig.guest.pid, made.child.tid()] {
                let mut now = vec![0; 4096];
                ProcessMemory::new(pid).read(place, &mut now).unwrap();
                assert_eq!(now, pattern);
            }
            let bit = |signal: i32| format!("{:016x}", 1u64 << (signal - 1));
            assert_eq!(
                support::status_field(made.child.tid(), "SigCgt"),
                format!("{:016x}", 0)
            );
            assert_eq!(
                support::status_field(made.child.tid(), "SigIgn"),
                bit(libc::SIGUSR2)
            );
            assert_eq!(support::status_field(rig.guest.pid, "SigCgt"), bit(libc::SIGUSR1));
            kill_and_reap(made.child);
            rig.run_parent(made.parent);
        }
        rig.end();
    });
}

#[test]
fn a_child_with_another_id_is_noticed_and_the_call_made_again() {
    as_each_user(|| {
        let mut rig = Rig::new();
        let data = rig.script.data();
        for (nr, args) in [
            (libc::SYS_fork, [0; 6]),
            (
                libc::SYS_clone,
                [0x3d_0f00, data + 8192, data, data + 8, data + 512, 0],
            ),
        ] {
            // The number after the occupied one is taken silently.
            let occupant = rig.cage.spawn_blank(7000, &[]).unwrap();
            let (stopped, mut rewrite) = rig.begin(nr, args);
            rig.cage.set_last_pid(6999).unwrap();
            rewrite.start(stopped, rig.guest.memory()).unwrap();
            let mut wrong = None;
            let mut returned = None;
            while wrong.is_none() || returned.is_none() {
                let (tid, status) = ptrace::wait(Target::Mine, false).unwrap().unwrap();
                let Status::Stopped(mut stopped) = status else {
                    panic!("{tid}: {status:?}")
                };
                if tid != rig.guest.pid {
                    let error = rewrite.child_stop(&mut stopped, 7000).unwrap_err();
                    assert!(
                        matches!(
                            error,
                            CloneError::WrongId {
                                got: 7001,
                                wanted: 7000,
                                ..
                            }
                        ),
                        "{error}"
                    );
                    wrong = Some(stopped);
                } else if let CloneStep::Returned(stopped, ret) =
                    rewrite.parent_stop(stopped, rig.guest.memory()).unwrap()
                {
                    assert_eq!(ret, 7001);
                    returned = Some(stopped);
                }
            }
            let child = wrong.unwrap();
            let outer = child.tid();
            rewrite.dismiss(child, rig.installed.pass.key()).unwrap();
            assert!(matches!(
                ptrace::wait(Target::Thread(outer), false).unwrap(),
                Some((_, Status::Exited(0)))
            ));
            // SAFETY: kills and reaps our own child.
            unsafe {
                libc::kill(occupant.outer_pid, libc::SIGKILL);
                libc::waitpid(occupant.outer_pid, std::ptr::null_mut(), 0);
            }
            let mut stopped = returned.unwrap();
            rewrite.repeat(&mut stopped).unwrap();
            stopped.cont(0).unwrap();
            let (stopped, _) = rig.seccomp_stop();
            let made = rig.make(stopped, rewrite, 7000);
            Rig::check_registers(&made, 7000);
            assert_eq!(made.parent.sigmask().unwrap(), 0);
            assert_eq!(rig.run_parent(made.parent)[0], 7000);
            // For a thread this is the end of its process too.
            kill_and_reap(made.child);
        }
        rig.end();
    });
}

#[test]
fn a_call_that_fails_here_returns_its_errno() {
    as_each_user(|| {
        // SAFETY: touches no memory.
        if unsafe { libc::geteuid() } == 0 {
            return; // The limit does not hold for root.
        }
        let mut rig = Rig::new();
        let (stopped, mut rewrite) = rig.begin(libc::SYS_clone, [CHLD, 0, 0, 0, 0, 0]);
        shim::process::set_limit(rig.guest.pid, libc::RLIMIT_NPROC, 0, 0).unwrap();
        rewrite.start(stopped, rig.guest.memory()).unwrap();
        loop {
            let stopped = ptrace::wait_stop(rig.guest.pid).unwrap();
            if let CloneStep::Returned(stopped, ret) =
                rewrite.parent_stop(stopped, rig.guest.memory()).unwrap()
            {
                assert_eq!(ret, -i64::from(libc::EAGAIN));
                assert_eq!(rig.run_parent(stopped)[0], ret);
                break;
            }
        }
        rig.end();
    });
}
