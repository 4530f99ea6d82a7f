//! Calls with pointers that cannot be followed: the error is compared.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use linklayer::syscall::{Blocking, Dir, Disposition, Kind, Row, Scalar, SplitKind, resolve, rows};

use super::*;

/// Descriptors for the calls of the fault test, which must neither block nor do harm.
fn candidates() -> (Vec<u64>, Vec<OwnedFd>) {
    let file = temp_file(&[5; 8192]);
    let (left, right) = UnixStream::pair().unwrap();
    left.set_nonblocking(true).unwrap();
    (&right).write_all(b"something to read").unwrap();
    let dir = File::open("/proc/self/fd").unwrap();
    let owned: Vec<OwnedFd> = vec![file.into(), left.into(), right.into(), dir.into()];
    (vec![u64::MAX, fd(&owned[0]), fd(&owned[1]), fd(&owned[3])], owned)
}

/// Pointers that a guest may give.
fn pointers(region: &Region) -> Vec<(&'static str, u64)> {
    // Far from where the kernel places mappings by itself.
    let gone = 0x2000_0000_0000;
    assert!(
        ProcessMemory::new(std::process::id() as i32)
            .area_at(gone)
            .is_none_or(|area| area.start > gone + (1 << 30))
    );
    let last = map(8192, libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: the second page of the mapping just made.
    let closed = unsafe { libc::mprotect((last + 4096) as *mut libc::c_void, 4096, libc::PROT_NONE) };
    assert_eq!(closed, 0);
    vec![
        ("good", region.start),
        ("null", 0),
        ("one", 1),
        ("unmapped", gone),
        ("no access", map(8192, libc::PROT_NONE)),
        ("read-only", map(1 << 20, libc::PROT_READ)),
        ("kernel's", 0xffff_8000_0000_0000),
        ("last", u64::MAX),
        ("above", 0x7fff_ffff_f000),
        ("end of a page", last + 4096 - 3),
    ]
}

/// Whether the test makes this call at all. The test may run as root: nothing here may change the machine.
fn harmless(row: &Row) -> bool {
    // A pointer that is bad to write to may be a good one to read from, so that an input would take effect: these would
    // change the machine, or the test's own process.
    let by_name = [
        "adjtimex",
        "capset",
        "chroot",
        "clock_adjtime",
        "clock_settime",
        "mknod",
        "mknodat",
        "mq_getsetattr",
        "mq_notify",
        "mq_open",
        "mq_unlink",
        "sched_setattr",
        "sched_setparam",
        "sched_setscheduler",
        "setdomainname",
        "setgroups",
        "sethostname",
        "setitimer",
        "settimeofday",
        "syslog",
        "timer_create",
        "timer_settime",
        "timerfd_settime",
    ];
    let by_kind = match row.disposition {
        Disposition::Forward => true,
        Disposition::Split(kind) => {
            matches!(
                kind,
                SplitKind::Open | SplitKind::Readlink | SplitKind::TempMask | SplitKind::Times
            )
        }
        Disposition::Local | Disposition::GoHome(_) => false,
    };
    by_kind && !by_name.contains(&row.name)
}

/// Every call, every command, with every combination of good and bad pointers: the error is the native one.
#[test]
fn bad_pointers_give_the_native_error() {
    let region = Region::new(1 << 17);
    let slot = Slot::new();
    let pointers = pointers(&region);
    let (_, last) = pointers[pointers.len() - 1];
    let clear = || {
        region.clear();
        // SAFETY: the last bytes of a page that `pointers` has mapped for this.
        unsafe { std::ptr::write_bytes(last as *mut u8, 0, 3) };
    };
    let mut made = 0;
    let mut wrong = Vec::new();
    let mut try_one = |nr: u32, args: [u64; 6], what: &str| {
        let (fds, owned) = candidates();
        let _ = fds;
        clear();
        let expected = native(nr, args);
        close_new(nr, expected);
        drop(owned);
        // The same state again.
        let (_, owned) = candidates();
        clear();
        let way = slot.forwarded(nr, args);
        if let Way::Result(ret) = way {
            close_new(nr, ret);
        }
        drop(owned);
        made += 1;
        let equal = match way {
            Way::Home => true,
            Way::Result(ret) => ret == expected,
        };
        // New descriptors are numbered from the lowest free one, which is the same in both.
        if !equal {
            wrong.push(format!("{what}: native {expected}, forwarded {way:?}"));
        }
    };
    let fds = {
        let (fds, owned) = candidates();
        drop(owned);
        fds
    };
    for row in rows().filter(|row| harmless(row)) {
        for_each_signature(row, |base, name| {
            let call = resolve(row.nr, &base);
            let trims = call.sub.is_some_and(|sub| sub.name == "FITRIM");
            if !harmless_call(call.disposition) || trims {
                return;
            }
            let is_block = |i: &usize| call.kind(*i).is_some_and(|k| !matches!(k, Kind::Val(_)));
            let blocks: Vec<usize> = (0..6).filter(is_block).collect();
            let fd_args: Vec<usize> = (0..6)
                .filter(|i| matches!(call.kind(*i), Some(Kind::Val(Scalar::Fd))))
                .collect();
            for victim in &blocks {
                for (label, bad) in &pointers[1..] {
                    // What cannot be written to can still be read: not bad at all, so that the call would take effect.
                    if *label == "read-only" && only_read(call.kind(*victim)) {
                        continue;
                    }
                    // Without a timeout the call would wait.
                    if *bad == 0 && row.blocking == Blocking::Long {
                        continue;
                    }
                    for good in [region.start, 0] {
                        if good == 0 && row.blocking == Blocking::Long {
                            continue;
                        }
                        for descriptor in &fds[..if fd_args.is_empty() { 1 } else { fds.len() }] {
                            let mut args = base;
                            for block in &blocks {
                                args[*block] = good;
                            }
                            for arg in &fd_args {
                                args[*arg] = *descriptor;
                            }
                            args[*victim] = *bad;
                            let others = if good == 0 { "null" } else { "good" };
                            let what = format!(
                                "{name} argument {victim} {label}, others {others}, fd {}",
                                *descriptor as i64
                            );
                            try_one(row.nr, args, &what);
                        }
                    }
                }
            }
        });
    }
    assert!(made > 5000, "only {made} calls were made");
    assert!(
        wrong.is_empty(),
        "{} of {made}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// Closes a descriptor that a call has made, so that the next one gets the same.
fn close_new(nr: u32, ret: i64) {
    const MEMFD_CREATE: u32 = 319;
    if nr == MEMFD_CREATE && ret >= 0 {
        native(3, [ret as u64, 0, 0, 0, 0, 0]);
    }
}

/// Whether the kernel does nothing but read the block.
fn only_read(kind: Option<Kind>) -> bool {
    match kind {
        Some(Kind::Buf(buf)) => buf.dir == Dir::In,
        Some(Kind::Iovec { dir, .. } | Kind::Msg(dir) | Kind::Mmsg { dir, .. }) => dir == Dir::In,
        Some(Kind::Str(_) | Kind::StrArray | Kind::TempMask { .. } | Kind::TempMaskPair) => true,
        _ => false,
    }
}

fn harmless_call(disposition: Disposition) -> bool {
    !matches!(
        disposition,
        Disposition::Local | Disposition::GoHome(_) | Disposition::Split(SplitKind::Prctl)
    )
}

/// The row with plausible numbers, and for a family each of its commands.
fn for_each_signature(row: &Row, mut visit: impl FnMut([u64; 6], &str)) {
    let mut base = [0u64; 6];
    let mut table = None;
    for (i, arg) in row.args.iter().enumerate() {
        base[i] = match arg.kind {
            _ if arg.name == "timeout" || arg.name.contains("flags") => 0,
            Kind::Val(Scalar::Size) if arg.name == "sigsetsize" => 8,
            Kind::Val(Scalar::Size | Scalar::Int | Scalar::Uint) if is_length(arg.name) => 16,
            // No object of anybody else's.
            Kind::Val(Scalar::Pid) => 0,
            Kind::Val(Scalar::Int) if arg.name.ends_with("id") => 0x7fff_fff1,
            Kind::Val(_) => 1,
            Kind::Sub(sub) => {
                table = Some(sub);
                0
            }
            _ => 0,
        };
    }
    let Some(table) = table else {
        return visit(base, row.name);
    };
    for sub in table.rows() {
        let mut args = base;
        for cmp in table.cmps(sub) {
            args[usize::from(cmp.arg)] = cmp.value;
        }
        let first = row.args.len() - 1;
        for (i, arg) in sub.args.iter().enumerate() {
            args[first + i] = if is_length(arg.name) { 16 } else { 0 };
        }
        visit(args, &format!("{} {}", row.name, sub.name));
    }
}

fn is_length(name: &str) -> bool {
    ["count", "size", "len", "bufsiz", "addrlen", "optlen", "msgsz"].contains(&name)
}
