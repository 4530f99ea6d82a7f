use super::*;
use crate::syscall::kind::{Actual, Arg, Buf, Disposition, HomeReason, Kind, Scalar, Size};
use crate::syscall::sub::SubTable;
use crate::syscall::{LocalRule, local_rule, resolve};
use std::collections::{BTreeMap, BTreeSet};

#[test]
fn rows_have_the_kernels_names() {
    for (number, name) in KERNEL {
        assert_eq!(row(*number).expect("a row").name, *name, "number {number}");
    }
    assert_eq!(rows().count(), KERNEL.len());
    assert!(row(337).is_none() && row(423).is_none() && row(LATEST + 1).is_none() && row(u32::MAX).is_none());
}

/// A row's arguments, and for a family those of each command behind its own.
fn signatures() -> Vec<(String, Disposition, Vec<Arg>)> {
    let mut all = Vec::new();
    for row in rows() {
        let own: Vec<Arg> = row
            .args
            .iter()
            .copied()
            .filter(|a| !matches!(a.kind, Kind::Sub(_)))
            .collect();
        all.push((row.name.to_string(), row.disposition, own.clone()));
        for table in row.args.iter().filter_map(|a| {
            if let Kind::Sub(table) = a.kind {
                Some(table)
            } else {
                None
            }
        }) {
            for sub in table.rows() {
                let args = own.iter().chain(sub.args).copied().collect();
                all.push((format!("{} {}", row.name, sub.name), sub.disposition, args));
            }
        }
    }
    all
}

#[test]
fn arguments_refer_to_arguments() {
    for (name, _, args) in signatures() {
        assert!(args.len() <= 6, "{name}");
        let number = |index: u8| {
            let kind = args.get(usize::from(index)).map(|arg| arg.kind);
            assert!(
                matches!(kind, Some(Kind::Val(s)) if s != Scalar::Addr),
                "{name}: argument {index} is a number"
            );
        };
        let block = |index: u8| {
            let kind = args.get(usize::from(index)).map(|arg| arg.kind);
            assert!(
                matches!(kind, Some(Kind::Buf(_))),
                "{name}: argument {index} is a block"
            );
        };
        for arg in &args {
            match arg.kind {
                Kind::Buf(Buf { size, actual, .. }) => {
                    match size {
                        Size::Arg(i) | Size::Stream(i) | Size::Clamp(i, _) | Size::Limit(i, _) => number(i),
                        Size::Plus(i, _) | Size::Count(i, _) | Size::ClampCount(i, _) | Size::FdSet(i) => {
                            number(i)
                        }
                        Size::Word(i, _) | Size::CapData(i) => block(i),
                        Size::Fixed(_) | Size::Head { .. } => (),
                    }
                    if let Actual::Ret { scale, .. } = actual {
                        assert!((1..=u32::from(u16::MAX)).contains(&scale), "{name}");
                    }
                    assert_eq!(actual == Actual::Word, matches!(size, Size::Word(..)), "{name}");
                }
                Kind::Iovec { count, .. } => number(count),
                Kind::Mmsg { count, .. } => {
                    number(count);
                    number(count + 1);
                }
                Kind::TempMask { size } => number(size),
                _ => (),
            }
        }
    }
}

#[test]
fn forwarded_calls_have_no_address_that_home_could_follow() {
    for (name, disposition, args) in signatures() {
        if disposition == Disposition::Forward {
            let address = args.iter().any(|arg| matches!(arg.kind, Kind::Val(Scalar::Addr)));
            assert!(!address, "{name}");
        }
    }
    for row in rows() {
        if row.rules.iter().any(|rule| rule.then == Disposition::Forward) {
            assert!(
                !row.args
                    .iter()
                    .any(|arg| matches!(arg.kind, Kind::Val(Scalar::Addr))),
                "{}",
                row.name
            );
        }
    }
}

#[test]
fn commands_are_there_once() {
    for table in SubTable::ALL {
        let mut codes = BTreeSet::new();
        for row in table.rows() {
            assert!(codes.insert(row.code), "{} {}", table.name(), row.name);
            let mut args = [0; 6];
            for cmp in table.cmps(row) {
                args[usize::from(cmp.arg)] = cmp.value;
            }
            assert_eq!(table.find(&args).map(|found| found.code), Some(row.code));
        }
    }
}

#[test]
fn a_filter_allows_what_is_local_and_no_more() {
    let interesting: [u64; 12] = [
        0,
        1,
        2,
        4,
        8,
        0x22,
        0x32,
        0x4_0022,
        0x2022,
        0x1002,
        0x5356_4d41,
        u64::MAX,
    ];
    for row in rows() {
        let rule = local_rule(row);
        for first in interesting {
            for second in [0, 1, 3, u64::MAX] {
                for fourth in interesting {
                    let args = [first, second, 0, fourth, 0, 0];
                    let allowed = match &rule {
                        LocalRule::Always => true,
                        LocalRule::Never => false,
                        LocalRule::When(lists) => {
                            lists.iter().any(|list| list.iter().all(|cmp| cmp.holds(&args)))
                        }
                    };
                    let local = resolve(row.nr, &args).disposition == Disposition::Local;
                    assert_eq!(allowed, local, "{} {args:x?}", row.name);
                }
            }
        }
    }
}

#[test]
fn what_must_not_be_local_is_not() {
    let local = |nr, args: [u64; 6]| resolve(nr, &args).disposition == Disposition::Local;
    // Anonymous private memory, and everything else that mmap can make.
    assert!(local(9, [0, 4096, 3, 0x22, u64::MAX, 0]) && local(9, [0, 4096, 3, 0x4032, 0, 0]));
    assert!(
        !local(9, [0, 4096, 3, 0x21, 0, 0])
            && !local(9, [0, 4096, 3, 0x02, 3, 0])
            && !local(9, [0, 4096, 3, 0x28, 0, 0])
    );
    // CLOCK_PROCESS_CPUTIME_ID, and the CPU clock of another process.
    assert!(
        local(228, [1, 0, 0, 0, 0, 0])
            && !local(228, [2, 0, 0, 0, 0, 0])
            && !local(228, [0xffff_fffa, 0, 0, 0, 0, 0])
    );
    for name in [
        "ptrace",
        "mount",
        "unshare",
        "bpf",
        "io_uring_setup",
        "seccomp",
        "kill",
        "clone",
        "execve",
        "socket",
    ] {
        let row = rows().find(|row| row.name == name).unwrap();
        assert_eq!(local_rule(row), LocalRule::Never, "{name}");
    }
}

/// The size of the fixed block behind an argument.
fn fixed(nr: u32, index: usize) -> usize {
    match row(nr).unwrap().args[index].kind {
        Kind::Buf(Buf {
            size: Size::Fixed(len),
            ..
        }) => len as usize,
        other => panic!("argument {index} of {nr} is {other:?}"),
    }
}

fn fixed_of(table: SubTable, name: &str) -> usize {
    match table.rows().iter().find(|row| row.name == name).unwrap().args[0].kind {
        Kind::Buf(Buf {
            size: Size::Fixed(len),
            ..
        }) => len as usize,
        other => panic!("{name} is {other:?}"),
    }
}

#[test]
fn sizes_are_those_of_the_c_library() {
    for (nr, index, size) in [
        (4, 1, size_of::<libc::stat>()),
        (137, 1, size_of::<libc::statfs>()),
        (332, 4, size_of::<libc::statx>()),
        (63, 0, size_of::<libc::utsname>()),
        (99, 0, size_of::<libc::sysinfo>()),
        (98, 1, size_of::<libc::rusage>()),
        (100, 0, size_of::<libc::tms>()),
        (159, 0, size_of::<libc::timex>()),
        (97, 1, size_of::<libc::rlimit>()),
        (38, 1, size_of::<libc::itimerval>()),
        (223, 2, size_of::<libc::itimerspec>()),
        (222, 1, size_of::<libc::sigevent>()),
        (129, 2, size_of::<libc::siginfo_t>()),
        (233, 3, size_of::<libc::epoll_event>()),
        (245, 2, size_of::<libc::mq_attr>()),
        (132, 1, size_of::<libc::utimbuf>()),
        (235, 1, 2 * size_of::<libc::timeval>()),
        (280, 2, 2 * size_of::<libc::timespec>()),
    ] {
        assert_eq!(
            fixed(nr, index),
            size,
            "argument {index} of {}",
            row(nr).unwrap().name
        );
    }
    for (table, name, size) in [
        (SubTable::Fcntl, "F_GETLK", size_of::<libc::flock>()),
        (SubTable::Ioctl, "TIOCGWINSZ", size_of::<libc::winsize>()),
        (SubTable::Ioctl, "TCGETS2", size_of::<libc::termios2>()),
        (SubTable::Ioctl, "SIOCGIFFLAGS", size_of::<libc::ifreq>()),
        (SubTable::Semctl, "IPC_STAT", size_of::<libc::semid_ds>()),
        (SubTable::Semctl, "IPC_INFO", size_of::<libc::seminfo>()),
        (SubTable::Msgctl, "IPC_STAT", size_of::<libc::msqid_ds>()),
        (SubTable::Msgctl, "IPC_INFO", size_of::<libc::msginfo>()),
        (SubTable::Shmctl, "IPC_STAT", size_of::<libc::shmid_ds>()),
    ] {
        assert_eq!(fixed_of(table, name), size, "{name}");
    }
}

#[test]
fn codes_are_those_of_the_c_library() {
    let code = |table: SubTable, name: &str| table.rows().iter().find(|row| row.name == name).unwrap().code;
    for (name, value) in [
        ("TCGETS", libc::TCGETS),
        ("TCSETSF", libc::TCSETSF),
        ("TIOCGPTN", libc::TIOCGPTN),
        ("TIOCSPTLCK", libc::TIOCSPTLCK),
        ("TIOCGPTPEER", libc::TIOCGPTPEER),
        ("TIOCGWINSZ", libc::TIOCGWINSZ),
        ("TIOCSCTTY", libc::TIOCSCTTY),
        ("FIONREAD", libc::FIONREAD),
        ("FIOCLEX", libc::FIOCLEX),
        ("FIONBIO", libc::FIONBIO),
        ("FS_IOC_GETFLAGS", libc::FS_IOC_GETFLAGS),
        ("FICLONE", libc::FICLONE),
        ("FICLONERANGE", libc::FICLONERANGE),
        ("BLKSSZGET", libc::BLKSSZGET),
        ("SIOCGIFCONF", libc::SIOCGIFCONF),
        ("SIOCGIFINDEX", libc::SIOCGIFINDEX),
        ("TUNSETIFF", libc::TUNSETIFF),
        ("TUNGETIFF", libc::TUNGETIFF),
    ] {
        assert_eq!(code(SubTable::Ioctl, name), value, "{name}");
    }
    for (name, value) in [
        ("F_SETLKW", libc::F_SETLKW),
        ("F_OFD_SETLKW", libc::F_OFD_SETLKW),
        ("F_DUPFD_CLOEXEC", libc::F_DUPFD_CLOEXEC),
        ("F_SETPIPE_SZ", libc::F_SETPIPE_SZ),
        ("F_ADD_SEALS", libc::F_ADD_SEALS),
        ("F_SETLEASE", libc::F_SETLEASE),
    ] {
        assert_eq!(code(SubTable::Fcntl, name), value as u64, "{name}");
    }
    for (name, value) in [
        ("PR_SET_NAME", libc::PR_SET_NAME),
        ("PR_SET_VMA", libc::PR_SET_VMA),
        ("PR_SET_PTRACER", libc::PR_SET_PTRACER),
        ("PR_SET_MDWE", libc::PR_SET_MDWE),
        ("PR_SET_CHILD_SUBREAPER", libc::PR_SET_CHILD_SUBREAPER),
        ("PR_CAP_AMBIENT", libc::PR_CAP_AMBIENT),
    ] {
        assert_eq!(code(SubTable::Prctl, name), value as u64, "{name}");
    }
    for (name, level, option) in [
        ("SO_PEERGROUPS", libc::SOL_SOCKET, libc::SO_PEERGROUPS),
        ("SO_COOKIE", libc::SOL_SOCKET, libc::SO_COOKIE),
        ("TCP_FASTOPEN_CONNECT", libc::SOL_TCP, libc::TCP_FASTOPEN_CONNECT),
        (
            "IP_BIND_ADDRESS_NO_PORT",
            libc::SOL_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
        ),
        ("IPV6_RECVTCLASS", libc::SOL_IPV6, libc::IPV6_RECVTCLASS),
        ("UDP_SEGMENT", libc::SOL_UDP, libc::UDP_SEGMENT),
        ("NETLINK_EXT_ACK", libc::SOL_NETLINK, libc::NETLINK_EXT_ACK),
    ] {
        let code = code(SubTable::GetSockopt, name);
        assert_eq!((code >> 32, code as u32), (level as u64, option as u32), "{name}");
    }
}

#[test]
fn every_reason_has_a_number_and_words() {
    let mut seen = BTreeMap::new();
    for reason in HomeReason::ALL {
        assert_eq!(HomeReason::from_number(reason as u8), Some(reason));
        assert!(seen.insert(reason.text(), reason).is_none());
    }
    assert_eq!(HomeReason::from_number(0), None);
    assert_eq!(HomeReason::from_number(HomeReason::ALL.len() as u8 + 1), None);
}
