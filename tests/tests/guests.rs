//! The guests: small programs that check themselves. Each is right natively, and the same by mosrun at home and away.

use tests::build::{Link, guest};
use tests::compare::{Case, End, How, Place, observe, same, same_moved};
use tests::lab::Lab;
use tests::or_skip;

fn run(name: &str, link: Link, ways: &[How]) {
    let lab = or_skip!(Lab::shared());
    let program = or_skip!(guest(name, link));
    let native = same(&lab, &Case::new([program]), ways);
    assert_eq!(native.end, End::Code(0), "natively: {native:?}");
}

fn run_moved(name: &str) {
    let lab = or_skip!(Lab::shared());
    let program = or_skip!(guest(name, Link::Dynamic));
    let (native, _) = same_moved(&lab, &Case::new([program]));
    assert_eq!(native.end, End::Code(0), "natively: {native:?}");
}

macro_rules! guests {
    ($($name:ident),* $(,)?) => {
        mod native {
            $(#[test] fn $name() { super::run(stringify!($name), super::Link::Dynamic, &[]); })*
        }
        mod home {
            $(#[test] fn $name() { super::run(stringify!($name), super::Link::Dynamic, &[super::How::Home]); })*
        }
        mod away {
            $(#[test] fn $name() { super::run(stringify!($name), super::Link::Dynamic, &[super::How::Away(2)]); })*
        }
    };
}

guests! {
    big_transfers, borrowed_memory, clocks, clone3, efault, exec_forms, exec_signals, fds, files, fork_wait, ipc, locks, long_paths, many_fds, mapped_files, memory, other_memory, pipes,
    pollers, prctls, proc_self, pty, restart, rlimits, robust, sessions, shared_memory, sigchld, signals, sigwait, spawn, stack, stop_blocked, storms, tcp,
    tempmask, thread_ends, threads, timer_threads, timers, tree, tty_jobs, unix_sockets, vfork,
}

macro_rules! moved {
    ($($name:ident),* $(,)?) => {
        mod moved {
            $(#[test] fn $name() { super::run_moved(stringify!($name)); })*
        }
    };
}

// Not those that see that a call in progress is interrupted by a move and made again (README, limits): `big_transfers` (how much a
// pipe has taken), `locks` (who has waited first), `timers` (how often one has expired that waits); not `other_memory`, which may be
// brought home before it is seen to work on the memory of another process that is away (README, limits); and not `restart`, which takes
// a minute.
moved! {
    borrowed_memory, clocks, clone3, efault, exec_forms, exec_signals, fds, files, fork_wait, ipc, long_paths, many_fds, mapped_files, memory, pipes,
    pollers, prctls, proc_self, pty, rlimits, robust, sessions, shared_memory, sigchld, signals, sigwait, spawn, stack, stop_blocked,
    storms, tcp, tempmask, thread_ends, threads, timer_threads, tree, tty_jobs, unix_sockets, vfork,
}

/// The other ways to link, where the start of a program differs.
#[test]
fn linked_in_all_ways() {
    for link in [Link::NoPie, Link::Static, Link::StaticPie] {
        for name in ["fork_wait", "threads", "signals", "memory"] {
            run(name, link, &[How::Away(2)]);
        }
    }
}

/// Another node, and the one where the program is anyway.
#[test]
fn on_every_node() {
    run("fds", Link::Dynamic, &[How::Away(3), How::Away(1), How::Away(0)]);
}

/// The checks of the guests can fail: a guest that finds something wrong is seen.
#[test]
fn a_wrong_guest_is_seen() {
    let lab = or_skip!(Lab::shared());
    let program = or_skip!(guest("fds", Link::Dynamic));
    // It expects to be able to open more than three descriptors.
    let case = Case::new(
        ["sh", "-c", "ulimit -n 5; exec \"$0\""]
            .map(Into::into)
            .into_iter()
            .chain([program.into_os_string()]),
    );
    let outcome = observe(&lab, &Place::new(), &case, How::Native);
    assert_eq!(outcome.end, End::Code(99));
    assert!(!outcome.stderr.is_empty());
}
