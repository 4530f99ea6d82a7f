//! Cages and blank guests, as the user who runs the tests and, if that is root, as a plain user without capabilities.

mod support;

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::time::{ClockId, clock_gettime};
use shim::cage::{Blank, Cage, CageError, CageOptions, GATE_PAGE};
use support::{Tracee, as_each_user, children, status_field, wait_until};

fn options() -> CageOptions {
    CageOptions {
        hostname: "home-node".into(),
        uid: 1234,
        gid: 5678,
        ..CageOptions::default()
    }
}

fn kill_and_reap(blank: &Blank) {
    // SAFETY: kills and reaps our own child.
    unsafe {
        libc::kill(blank.outer_pid, libc::SIGKILL);
        assert_eq!(
            libc::waitpid(blank.outer_pid, std::ptr::null_mut(), libc::__WALL),
            blank.outer_pid
        );
    }
}

#[test]
fn a_blank_guest_is_nothing_but_a_number_and_the_passed_descriptors() {
    as_each_user(|| {
        let cage = Cage::new(options()).unwrap();
        let file = memfd_create("mosrun-7", MFdFlags::MFD_CLOEXEC).unwrap();
        let blank = cage
            .spawn_blank(31_234, &[file.as_fd(), std::io::stderr().as_fd()])
            .unwrap();
        let proc = format!("/proc/{}", blank.outer_pid);

        assert_eq!(
            children(),
            vec_sorted(&[&cage.own_pids()[..], &[blank.outer_pid]].concat())
        );
        assert_eq!(
            status_field(blank.outer_pid, "NSpid").split_whitespace().last(),
            Some("31234")
        );
        assert_eq!(
            status_field(blank.outer_pid, "PPid"),
            std::process::id().to_string()
        );
        for set in [
            "CapInh", "CapPrm", "CapEff", "CapAmb", "SigBlk", "SigIgn", "SigCgt",
        ] {
            assert_eq!(status_field(blank.outer_pid, set), "0000000000000000", "{set}");
        }
        let mut fds: Vec<i32> = fs::read_dir(format!("{proc}/fd"))
            .unwrap()
            .map(|e| e.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        fds.sort_unstable();
        assert_eq!(fds, blank.fds_inside);
        let target = fs::read_link(format!("{proc}/fd/{}", blank.fds_inside[0])).unwrap();
        assert!(
            target.to_str().unwrap().starts_with("/memfd:mosrun-7"),
            "{target:?}"
        );

        let maps = fs::read_to_string(format!("{proc}/maps")).unwrap();
        assert_eq!(maps.lines().filter(|l| !l.ends_with(']')).count(), 1, "{maps}");
        assert!(maps.starts_with(&format!("{GATE_PAGE:x}-")), "{maps}");
        // Nothing is mounted but an empty root, and nothing is in it.
        let mounts = fs::read_to_string(format!("{proc}/mountinfo")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        assert!(mounts.contains("/ / ro,nosuid,nodev"), "{mounts}");
        assert_eq!(fs::read_dir(format!("{proc}/root/")).unwrap().count(), 0);
        let net = fs::read_to_string(format!("{proc}/net/dev")).unwrap();
        assert_eq!(net.lines().count(), 3, "{net}");
        for space in ["user", "pid", "mnt", "net", "ipc", "uts", "time", "cgroup"] {
            let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{space}")).unwrap();
            assert_ne!(link("self"), link(&blank.outer_pid.to_string()), "{space}");
        }
        assert_eq!(
            fs::read_to_string(format!("{proc}/uid_map"))
                .unwrap()
                .split_whitespace()
                .next(),
            Some("1234")
        );
        assert_eq!(
            fs::read_to_string(format!("{proc}/gid_map"))
                .unwrap()
                .split_whitespace()
                .next(),
            Some("5678")
        );

        // Inside it sees what home is.
        let mut guest = Tracee::seize(blank.outer_pid);
        assert_eq!(guest.call(libc::SYS_getpid, []), 31_234);
        assert_eq!(guest.call(libc::SYS_getuid, []), 1234);
        assert_eq!(guest.call(libc::SYS_getgid, []), 5678);
        let buffer = guest.map(4096);
        assert_eq!(guest.call(libc::SYS_uname, [buffer]), 0);
        assert_eq!(guest.text(buffer + 65), "home-node");
        assert_eq!(
            guest.call(libc::SYS_chdir, [guest.put(buffer, b"/proc\0")]),
            -i64::from(libc::ENOENT)
        );
        assert_eq!(
            guest.call(libc::SYS_mkdir, [guest.put(buffer, b"/x\0"), 0o700]),
            -i64::from(libc::EROFS)
        );
        assert_eq!(guest.call(libc::SYS_kill, [1, 9]), -i64::from(libc::EPERM).min(0));
        guest.kill();
        assert!(cage.teardown(Duration::from_secs(2)));
        assert!(children().is_empty());
    });
}

fn vec_sorted(pids: &[i32]) -> Vec<i32> {
    let mut pids = pids.to_vec();
    pids.sort_unstable();
    pids
}

#[test]
fn a_pid_is_refused_while_it_is_in_use_and_given_again_after_the_reaping() {
    as_each_user(|| {
        let cage = Cage::new(options()).unwrap();
        let first = cage.spawn_blank(4000, &[]).unwrap();
        assert!(matches!(
            cage.spawn_blank(4000, &[]),
            Err(CageError::PidTaken(4000))
        ));
        // SAFETY: kills our own child.
        unsafe { libc::kill(first.outer_pid, libc::SIGKILL) };
        wait_until(|| status_field(first.outer_pid, "State").starts_with('Z'));
        assert!(matches!(
            cage.spawn_blank(4000, &[]),
            Err(CageError::PidTaken(4000))
        ));
        kill_and_reap(&first);
        for _ in 0..20 {
            let again = cage.spawn_blank(4000, &[]).unwrap();
            kill_and_reap(&again);
        }
        assert!(matches!(cage.spawn_blank(1, &[]), Err(CageError::PidTaken(1))));
        assert!(matches!(cage.spawn_blank(0, &[]), Err(CageError::PidRange(0))));
        assert!(matches!(
            cage.spawn_blank(i32::MAX, &[]),
            Err(CageError::PidRange(_))
        ));
        let blank = cage.spawn_blank(4001, &[]).unwrap();
        cage.kill_blank(4001).unwrap();
        kill_and_reap(&blank);
        cage.kill_blank(4001).unwrap();
        cage.kill_blank(1).unwrap();
        assert!(cage.teardown(Duration::from_secs(2)));
    });
}

#[test]
fn the_next_clone_inside_gets_the_chosen_number() {
    as_each_user(|| {
        let cage = Cage::new(options()).unwrap();
        let blank = cage.spawn_blank(700, &[]).unwrap();
        let mut guest = Tracee::seize(blank.outer_pid);
        for wanted in [5000, 123_456, 300, 4_000_000] {
            cage.set_last_pid(wanted - 1).unwrap();
            // Spawning in between does not disturb it.
            let other = cage.spawn_blank(9000, &[]).unwrap();
            let child = guest.call(libc::SYS_clone, [libc::CLONE_PARENT as u64]);
            assert_eq!(child, i64::from(wanted));
            cage.kill_blank(wanted).unwrap();
            kill_and_reap(&other);
            // SAFETY: the child that the guest made has us as its parent.
            assert!(unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WALL) } > 0);
        }
        assert!(matches!(cage.set_last_pid(i32::MAX), Err(CageError::PidRange(_))));
        guest.kill();
        assert!(cage.teardown(Duration::from_secs(2)));
    });
}

#[test]
fn more_descriptors_than_one_message_takes() {
    let cage = Cage::new(options()).unwrap();
    let file = memfd_create("many", MFdFlags::MFD_CLOEXEC).unwrap();
    let fds = vec![file.as_fd(); 600];
    let blank = cage.spawn_blank(77, &fds).unwrap();
    assert_eq!(blank.fds_inside, (3..603).collect::<Vec<i32>>());
    assert_eq!(
        fs::read_dir(format!("/proc/{}/fd", blank.outer_pid))
            .unwrap()
            .count(),
        600
    );
    let plain = cage.spawn_blank(78, &[]).unwrap();
    assert_eq!(
        fs::read_dir(format!("/proc/{}/fd", plain.outer_pid))
            .unwrap()
            .count(),
        0
    );
    kill_and_reap(&blank);
    kill_and_reap(&plain);
}

fn now_ns(clock: ClockId) -> i64 {
    let now = clock_gettime(clock).unwrap();
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

#[test]
fn clocks_continue_at_the_values_of_home() {
    as_each_user(|| {
        let ahead = |clock, home_s: i64| home_s * 1_000_000_000 - now_ns(clock);
        let cage = Cage::new(CageOptions {
            monotonic_ahead_ns: ahead(ClockId::CLOCK_MONOTONIC, 1_000_000),
            boottime_ahead_ns: ahead(ClockId::CLOCK_BOOTTIME, 2_000_000),
            ..options()
        })
        .unwrap();
        let blank = cage.spawn_blank(50, &[]).unwrap();
        let mut guest = Tracee::seize(blank.outer_pid);
        let buffer = guest.map(4096);
        for (clock, home_s) in [
            (libc::CLOCK_MONOTONIC, 1_000_000),
            (libc::CLOCK_BOOTTIME, 2_000_000),
        ] {
            assert_eq!(guest.call(libc::SYS_clock_gettime, [clock as u64, buffer]), 0);
            let now_s = guest.word(buffer);
            assert!((home_s..home_s + 5).contains(&now_s), "{now_s}");
        }
        guest.kill();
    });
    let negative = Cage::new(CageOptions {
        monotonic_ahead_ns: -2 * now_ns(ClockId::CLOCK_MONOTONIC),
        ..options()
    });
    assert!(matches!(negative, Err(CageError::Option(_))));
}

#[test]
fn nothing_is_left_when_the_supervisor_is_killed() {
    as_each_user(|| {
        let (mut read, write) = std::io::pipe().unwrap();
        // SAFETY: the child is a supervisor of its own, which ends without returning.
        let supervisor = unsafe { libc::fork() };
        if supervisor == 0 {
            let cage = Cage::new(options()).unwrap();
            let mut pids = cage.own_pids().to_vec();
            for pid in 100..105 {
                pids.push(cage.spawn_blank(pid, &[]).unwrap().outer_pid);
            }
            use std::io::Write;
            (&write).write_all(format!("{pids:?}").as_bytes()).unwrap();
            drop(write);
            loop {
                std::thread::park();
            }
        }
        drop(write);
        let mut text = String::new();
        use std::io::Read;
        read.read_to_string(&mut text).unwrap();
        let pids: Vec<i32> = text
            .trim_matches(['[', ']'])
            .split(", ")
            .map(|pid| pid.parse().unwrap())
            .collect();
        assert_eq!(pids.len(), 7);
        // SAFETY: kills and reaps our own child.
        unsafe {
            libc::kill(supervisor, libc::SIGKILL);
            libc::waitpid(supervisor, std::ptr::null_mut(), 0);
        }
        // A dying init waits until whoever inherited the others has reaped them; it has no memory left by then.
        let dead = |pid: &i32| status_field(*pid, "VmSize").is_empty();
        wait_until(|| pids.iter().all(dead));
    });
}

#[test]
fn a_cage_is_made_in_a_process_with_many_busy_threads() {
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut kept = Vec::new();
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    kept.push(vec![1u8; kept.len() % 5000]);
                    if kept.len() > 500 {
                        kept.clear();
                    }
                    std::thread::sleep(Duration::from_micros(50));
                }
            });
        }
        for pid in 10..16 {
            let cage = Cage::new(options()).unwrap();
            let blank = cage.spawn_blank(pid, &[]).unwrap();
            kill_and_reap(&blank);
            assert!(cage.teardown(Duration::from_secs(2)));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn guests_get_limits_and_niceness_and_dump_no_core() {
    as_each_user(|| {
        let cage = Cage::new(CageOptions {
            limits: vec![shim::cage::Limit {
                resource: libc::RLIMIT_NOFILE,
                soft: 40,
                hard: 50,
            }],
            nice: 7,
            ..options()
        })
        .unwrap();
        let file = memfd_create("many", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(cage.spawn_blank(20, &[file.as_fd(); 33]).is_err());
        let blank = cage.spawn_blank(20, &[file.as_fd(); 32]).unwrap();
        let limits = fs::read_to_string(format!("/proc/{}/limits", blank.outer_pid)).unwrap();
        let line = |name: &str| {
            let line = limits.lines().find(|l| l.starts_with(name)).unwrap();
            line[25..]
                .split_whitespace()
                .take(2)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(line("Max open files"), ["40", "50"]);
        assert_eq!(line("Max core file size"), ["1", "1"]);
        let stat = fs::read_to_string(format!("/proc/{}/stat", blank.outer_pid)).unwrap();
        assert_eq!(
            stat.rsplit(')').next().unwrap().split_whitespace().nth(16),
            Some("7")
        );
        // Where the kernel has autogroups. A plain user may be refused.
        let session = fs::read_to_string(format!("/proc/{}/autogroup", blank.outer_pid));
        if nix::unistd::geteuid().is_root()
            && let Some(session) = session.ok().filter(|session| !session.is_empty())
        {
            assert!(session.ends_with(" nice 7\n"), "{session}");
        }
        kill_and_reap(&blank);
    });
}

#[test]
fn a_dead_cage_says_so() {
    let cage = Cage::new(options()).unwrap();
    cage.kill();
    wait_until(|| status_field(cage.own_pids()[1], "State").starts_with('Z'));
    assert!(matches!(cage.spawn_blank(30, &[]), Err(CageError::Dead)));
    assert!(matches!(cage.set_last_pid(30), Err(CageError::Dead)));
    assert!(cage.teardown(Duration::from_secs(2)));
}

#[test]
fn spawning_is_fast() {
    let cage = Cage::new(options()).unwrap();
    let mut times = Vec::new();
    for pid in 1000..1100 {
        let start = Instant::now();
        let blank = cage.spawn_blank(pid, &[]).unwrap();
        times.push(start.elapsed());
        kill_and_reap(&blank);
    }
    times.sort_unstable();
    println!("spawn_blank: median {:?}, best {:?}", times[50], times[0]);
    assert!(times[50] < Duration::from_millis(5), "{:?}", times[50]);
}
