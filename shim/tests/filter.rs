//! Guests in a cage, under the filter, with a listener.

mod support;

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::Duration;

use linklayer::memory::GuestMemory;
use nix::sys::memfd::{MFdFlags, memfd_create};
use shim::cage::{Cage, CageOptions, GATE_PAGE};
use shim::filter::{self, Installed, TRACE_CLONE};
use shim::notify::{Notification, NotifyError, Received};
use shim::ptrace::{self, Stop};
use support::{INT_80, Script, Tracee, as_each_user, children, status_field, wait_until};

const PID: i32 = 20_011;

fn cage() -> Cage {
    Cage::new(CageOptions {
        hostname: "home".into(),
        uid: 1000,
        gid: 1000,
        ..CageOptions::default()
    })
    .unwrap()
}

fn install(guest: &mut Tracee) -> Installed {
    filter::install(guest.pid, true, |nr, args| {
        Ok::<_, std::io::Error>(guest.call(nr, args))
    })
    .unwrap()
}

fn next(installed: &Installed) -> Notification {
    match installed.listener.recv(None, 5000).unwrap() {
        Received::Call(call) => call,
        other => panic!("{other:?}"),
    }
}

fn trap(guest: &mut Tracee) {
    let stopped = ptrace::wait_stop(guest.pid).unwrap();
    assert_eq!(stopped.stop(), Stop::Signal(libc::SIGTRAP));
    guest.give(stopped);
}

/// A guest with a script in a new cage, under the filter.
fn guest(calls: &[(i64, [u64; 6])]) -> (Cage, Tracee, Script, Installed) {
    let cage = cage();
    let blank = cage.spawn_blank(PID, &[]).unwrap();
    let mut guest = Tracee::seize(blank.outer_pid);
    let script = Script::place(&mut guest, calls);
    let installed = install(&mut guest);
    (cage, guest, script, installed)
}

#[test]
fn local_calls_run_here_and_all_others_are_notified() {
    as_each_user(|| {
        let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let (cage, mut guest, script, installed) = guest(&[
            (libc::SYS_getpid, [0; 6]),
            (libc::SYS_write, [1, 2, 3, 4, 5, 6]),
            (libc::SYS_mmap, [0, 8192, 3, anonymous, u64::MAX, 0]),
            (libc::SYS_open, [0; 6]),
            (libc::SYS_getppid, [0; 6]),
            (libc::SYS_gettid, [0; 6]),
            (9999, [0; 6]),
            (INT_80, [0; 6]),
        ]);
        // The listener's descriptor is not in the guest, which has none at all.
        assert_eq!(
            fs::read_dir(format!("/proc/{}/fd", guest.pid)).unwrap().count(),
            0
        );
        assert_eq!(status_field(guest.pid, "NoNewPrivs"), "1");
        assert_eq!(status_field(guest.pid, "Seccomp"), "2");
        let maps = fs::read_to_string(format!("/proc/{}/maps", guest.pid)).unwrap();
        assert_eq!(maps.lines().filter(|l| !l.ends_with(']')).count(), 2, "{maps}");

        script.start(&mut guest);
        let call = next(&installed);
        assert_eq!(
            (i64::from(call.nr), call.args),
            (libc::SYS_write, [1, 2, 3, 4, 5, 6])
        );
        assert_eq!((call.tid, call.arch), (guest.pid, 0xc000_003e));
        assert!(installed.listener.id_valid(call.id));
        assert_eq!(
            guest.memory().read_u64(script.base + 4096 + 56).unwrap(),
            PID as u64
        );
        installed.listener.send_result(call.id, 0x1_2345_6789).unwrap();
        assert!(installed.listener.send_result(call.id, 0).is_err());

        let call = next(&installed);
        assert_eq!(i64::from(call.nr), libc::SYS_open);
        installed
            .listener
            .send_result(call.id, -i64::from(libc::ENOTDIR))
            .unwrap();
        let call = next(&installed);
        assert_eq!(i64::from(call.nr), libc::SYS_getppid);
        installed.listener.send_continue(call.id).unwrap();
        let call = next(&installed);
        assert_eq!(call.nr, 9999);
        installed
            .listener
            .send_result(call.id, -i64::from(libc::ENOSYS))
            .unwrap();
        let call = next(&installed);
        assert_eq!((call.nr, call.arch), (20, 0x4000_0003));
        installed.listener.send_result(call.id, 7).unwrap();
        trap(&mut guest);
        let results = script.results(guest.memory());
        assert!(results[2] > 0, "{results:x?}");
        assert_eq!(
            [
                results[0], results[1], results[3], results[4], results[5], results[6], results[7]
            ],
            [PID.into(), 0x1_2345_6789, -20, 0, PID.into(), -38, 7]
        );
        guest.kill();
        assert_eq!(installed.listener.recv(None, 5000).unwrap(), Received::Ended);
        assert!(cage.teardown(Duration::from_secs(2)));
        assert!(children().is_empty());
    });
}

#[test]
fn a_file_is_put_at_the_number_that_the_guest_named_and_mapped_there() {
    as_each_user(|| {
        let private = libc::MAP_PRIVATE as u64;
        let (_cage, mut guest, script, installed) = guest(&[
            (libc::SYS_mmap, [0, 4096, 1, private, 5, 0]),
            (libc::SYS_close, [5, 0, 0, 0, 0, 0]),
        ]);
        let memory = memfd_create("mosrun-42", MFdFlags::MFD_CLOEXEC).unwrap();
        let mut file = fs::File::from(memory);
        file.write_all(&[b'x'; 4096]).unwrap();
        script.start(&mut guest);
        let call = next(&installed);
        let listener = &installed.listener;
        assert_eq!(listener.add_fd(call.id, file.as_fd(), Some(5), true).unwrap(), 5);
        listener.send_continue(call.id).unwrap();
        let call = next(&installed);
        let mapped = script.results(guest.memory())[0] as u64;
        let mut byte = [0];
        guest.memory().read(mapped + 4095, &mut byte).unwrap();
        assert_eq!(byte, [b'x']);
        let maps = fs::read_to_string(format!("/proc/{}/maps", guest.pid)).unwrap();
        assert!(maps.contains("/memfd:mosrun-42"), "{maps}");
        listener.send_continue(call.id).unwrap();
        trap(&mut guest);
        assert_eq!(
            fs::read_dir(format!("/proc/{}/fd", guest.pid)).unwrap().count(),
            0
        );
        guest.kill();
    });
}

#[test]
fn injected_calls_need_the_pass() {
    as_each_user(|| {
        let (_cage, mut guest, _, installed) = guest(&[]);
        assert_eq!(guest.call(libc::SYS_getuid, installed.pass.args([])), 1000);
        // The gate's page goes last; from then on nothing of ours is in the guest.
        assert_eq!(
            guest.call(libc::SYS_munmap, installed.pass.args([GATE_PAGE, 4096])),
            0
        );
        guest.kill();
    });
}

#[test]
fn an_injected_call_without_the_pass_is_a_notification() {
    let (_cage, mut guest, script, installed) = guest(&[
        (libc::SYS_getuid, [0, 0, 0, 0, 0, 1]),
        (libc::SYS_getuid, [0, 0, 0, 0, 0, u64::MAX]),
    ]);
    script.start(&mut guest);
    for _ in 0..2 {
        let call = next(&installed);
        installed.listener.send_result(call.id, 4).unwrap();
    }
    trap(&mut guest);
    assert_eq!(script.results(guest.memory()), [4, 4]);
    guest.kill();
}

#[test]
fn the_clone_family_stops_for_the_tracer() {
    as_each_user(|| {
        let family = [libc::SYS_fork, libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3];
        let (_cage, mut guest, script, _installed) = guest(&family.map(|nr| (nr, [0; 6])));
        script.start(&mut guest);
        for nr in family {
            let mut stopped = ptrace::wait_stop(guest.pid).unwrap();
            assert_eq!(stopped.stop(), Stop::Seccomp(TRACE_CLONE));
            let mut regs = stopped.regs().unwrap();
            assert_eq!(regs.orig_rax, nr as u64);
            // Skip the call.
            regs.orig_rax = u64::MAX;
            regs.rax = -libc::EAGAIN as i64 as u64;
            stopped.set_regs(&regs).unwrap();
            stopped.cont(0).unwrap();
        }
        trap(&mut guest);
        assert_eq!(script.results(guest.memory()), [-11; 4]);
        guest.kill();
    });
}

#[test]
fn a_call_that_is_gone_says_so_and_receivers_can_be_woken() {
    as_each_user(|| {
        let (_cage, mut guest, script, installed) = guest(&[(libc::SYS_read, [0; 6])]);
        let listener = &installed.listener;
        assert_eq!(listener.recv(None, 1).unwrap(), Received::Woken);
        let (read, write) = std::io::pipe().unwrap();
        (&write).write_all(b"x").unwrap();
        assert_eq!(listener.recv(Some(read.as_fd()), -1).unwrap(), Received::Woken);
        script.start(&mut guest);
        let call = next(&installed);
        let file = fs::File::open("/dev/null").unwrap();
        guest.kill();
        assert!(!listener.id_valid(call.id));
        assert!(matches!(listener.send_result(call.id, 0), Err(NotifyError::Gone)));
        assert!(listener.send_continue(call.id).unwrap_err().is_gone());
        assert!(
            listener
                .add_fd(call.id, file.as_fd(), None, false)
                .unwrap_err()
                .is_gone()
        );
        assert_eq!(listener.recv(None, -1).unwrap(), Received::Ended);
    });
}

#[test]
fn a_receiver_that_waits_learns_of_the_end() {
    as_each_user(|| {
        let (_cage, mut guest, _script, installed) = guest(&[(libc::SYS_read, [0; 6])]);
        let (say, said) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                say.send(nix::unistd::gettid()).unwrap();
                installed.listener.recv(None, -1).unwrap()
            });
            let at = format!("/proc/self/task/{}/syscall", said.recv().unwrap());
            // The kernel names the call that a thread sleeps in.
            let waits = [libc::SYS_ioctl, libc::SYS_poll].map(|nr| format!("{nr} "));
            while !fs::read_to_string(&at).is_ok_and(|call| waits.iter().any(|w| call.starts_with(w))) {
                std::thread::yield_now();
            }
            guest.kill();
            assert_eq!(receiver.join().unwrap(), Received::Ended);
        });
    });
}

#[test]
fn a_call_that_was_received_is_not_cancelled_by_a_signal() {
    let (cage, mut guest, script, installed) = guest(&[(libc::SYS_read, [0; 6])]);
    script.start(&mut guest);
    let call = next(&installed);
    // SAFETY: signals our own child; it is seen at a signal-delivery-stop.
    unsafe { libc::kill(guest.pid, libc::SIGUSR1) };
    std::thread::sleep(Duration::from_millis(20));
    assert!(installed.listener.id_valid(call.id));
    installed.listener.send_result(call.id, 11).unwrap();
    let stopped = ptrace::wait_stop(guest.pid).unwrap();
    assert_eq!(stopped.stop(), Stop::Signal(libc::SIGUSR1));
    assert_eq!(stopped.regs().unwrap().rax, 11);
    stopped.cont(0).unwrap();
    trap(&mut guest);
    assert_eq!(script.results(guest.memory()), [11]);
    guest.kill();
    drop(cage);
}

#[test]
fn the_filter_holds_for_children_and_a_dying_supervisor_takes_all_with_it() {
    as_each_user(|| {
        let (mut read, write) = std::io::pipe().unwrap();
        // SAFETY: the child is a supervisor of its own, which ends without returning.
        let supervisor = unsafe { libc::fork() };
        if supervisor == 0 {
            let (_cage, mut guest, script, installed) = guest(&[(libc::SYS_read, [0; 6])]);
            script.start(&mut guest);
            next(&installed);
            (&write).write_all(&guest.pid.to_ne_bytes()).unwrap();
            loop {
                std::thread::park();
            }
        }
        drop(write);
        let mut pid = [0; 4];
        std::io::Read::read_exact(&mut read, &mut pid).unwrap();
        let pid = i32::from_ne_bytes(pid);
        assert_eq!(status_field(pid, "Name"), "mosrun-blank");
        // SAFETY: kills and reaps our own child.
        unsafe {
            libc::kill(supervisor, libc::SIGKILL);
            libc::waitpid(supervisor, std::ptr::null_mut(), 0);
        }
        wait_until(|| status_field(pid, "VmSize").is_empty());
    });
}
