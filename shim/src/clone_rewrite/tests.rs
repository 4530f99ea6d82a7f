use linklayer::memory::LocalMemory;

use super::*;

fn regs(nr: i64, args: [u64; 5]) -> Regs {
    let mut regs = Regs {
        orig_rax: nr as u64,
        ..Regs::default()
    };
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8] = args;
    regs
}

/// clone3 with these words at 0x1000.
fn clone3(words: &[u64], size: u64) -> Result<CloneRequest, CloneRefusal> {
    let memory = LocalMemory::new();
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    bytes.resize(4096, 0);
    memory.map(0x1000, bytes, true);
    CloneRequest::parse(&regs(libc::SYS_clone3, [0x1000, size, 0, 0, 0]), &memory)
}

#[test]
fn all_forms_of_a_fork_say_the_same() {
    let memory = LocalMemory::new();
    let parse = |nr, args| CloneRequest::parse(&regs(nr, args), &memory).unwrap();
    let fork = parse(libc::SYS_fork, [9; 5]);
    assert_eq!(
        fork,
        CloneRequest {
            exit_signal: libc::SIGCHLD,
            ..CloneRequest::default()
        }
    );
    assert_eq!(fork, parse(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0]));
    assert_eq!(fork, clone3(&[0, 0, 0, 0, libc::SIGCHLD as u64], 88).unwrap());
    let vfork = parse(libc::SYS_vfork, [0; 5]);
    assert!(vfork.is_vfork() && vfork.shares_memory() && !vfork.is_thread());
    assert_eq!(vfork.flags_here(), VM | PARENT);
    assert_eq!(
        vfork,
        parse(libc::SYS_clone, [VM | VFORK | libc::SIGCHLD as u64, 0, 0, 0, 0])
    );
}

#[test]
fn a_thread_of_the_c_library_keeps_its_flags() {
    let flags = 0x3d_0f00;
    let legacy = CloneRequest::parse(
        &regs(libc::SYS_clone, [flags, 0x7000, 0x10, 0x20, 0x30]),
        &LocalMemory::new(),
    )
    .unwrap();
    let modern = clone3(&[flags, 0, 0x20, 0x10, 0, 0x6000, 0x1000, 0x30], 88).unwrap();
    assert_eq!(CloneRequest { pidfd: 0, ..legacy }, modern);
    assert!(modern.is_thread());
    assert_eq!(modern.flags_here(), flags);
    assert_eq!(
        (modern.stack, modern.parent_tid, modern.child_tid, modern.tls),
        (0x7000, 0x10, 0x20, 0x30)
    );
}

#[test]
fn bad_arguments_give_the_errno_of_the_kernel() {
    use libc::{E2BIG, EFAULT, EINVAL, EPERM};
    let chld = libc::SIGCHLD as u64;
    let errno = |words: &[u64], size| match clone3(words, size) {
        Err(Errno(errno)) => errno,
        other => panic!("{other:?}"),
    };
    assert_eq!(errno(&[], 63), EINVAL);
    assert_eq!(errno(&[], 4097), E2BIG);
    assert_eq!(errno(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], 96), E2BIG);
    assert!(clone3(&[0; 12], 96).is_ok() && clone3(&[0; 8], 64).is_ok());
    assert_eq!(errno(&[0, 0, 0, 0, 65], 88), EINVAL);
    assert_eq!(
        errno(&[chld, 0, 0, 0, 0], 88),
        EINVAL,
        "an exit signal among the flags"
    );
    assert_eq!(errno(&[1 << 40], 88), EINVAL);
    assert_eq!(errno(&[CLONE_CLEAR_SIGHAND | SIGHAND | VM], 88), EINVAL);
    assert_eq!(errno(&[THREAD | SIGHAND | VM, 0, 0, 0, chld], 88), EINVAL);
    assert_eq!(errno(&[PARENT, 0, 0, 0, chld], 88), EINVAL);
    assert_eq!(errno(&[THREAD], 88), EINVAL);
    assert_eq!(errno(&[SIGHAND], 88), EINVAL);
    assert_eq!(errno(&[DETACHED], 88), EINVAL);
    assert_eq!(
        errno(&[0, 0, 0, 0, chld, 0x1000], 88),
        EINVAL,
        "a stack without a size"
    );
    assert_eq!(
        errno(&[0, 0, 0, 0, chld, 0, 0x1000], 88),
        EINVAL,
        "a size without a stack"
    );
    assert_eq!(errno(&[0, 0, 0, 0, chld, u64::MAX, 2], 88), EINVAL);
    assert_eq!(errno(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0], 88), EINVAL);
    assert_eq!(errno(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 33], 88), EINVAL);
    assert_eq!(errno(&[SETTLS, 0, 0, 0, 0, 0, 0, TASK_SIZE], 88), EPERM);
    assert_eq!(errno(&[PIDFD, 0x9000], 88), EFAULT);
    assert!(clone3(&[PIDFD, 0x1800], 88).is_ok());
    assert_eq!(errno(&[PIDFD | PARENT_SETTID, 0x1800, 0, 0x1800], 88), EINVAL);
    assert!(clone3(&[PIDFD | PARENT_SETTID, 0x1800, 0, 0x1808], 88).is_ok());
    let memory = LocalMemory::new();
    let parse = |nr, args| CloneRequest::parse(&regs(nr, args), &memory);
    assert_eq!(parse(libc::SYS_clone3, [0x1000, 88, 0, 0, 0]), Err(Errno(EFAULT)));
    assert_eq!(
        parse(libc::SYS_clone, [PIDFD | PARENT_SETTID, 0, 0x1800, 0, 0]),
        Err(Errno(EINVAL))
    );
    // Legacy clone takes any signal number and ignores the upper half of its flags.
    assert_eq!(
        parse(libc::SYS_clone, [1 << 40 | 200, 0, 0, 0, 0])
            .unwrap()
            .exit_signal,
        200
    );
}

#[test]
fn what_only_home_can_do_goes_home() {
    let goes = |result: Result<CloneRequest, CloneRefusal>| matches!(result, Err(GoHome(_)));
    assert!(goes(clone3(&[CLONE_INTO_CGROUP], 88)));
    assert!(goes(clone3(&[CLONE_NEWTIME], 88)));
    assert!(goes(clone3(&[0, 0, 0, 0, 0, 0, 0, 0, 0x1800, 1], 88)));
    for flags in [
        libc::CLONE_NEWNS,
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWPID,
        libc::CLONE_PTRACE,
        libc::CLONE_UNTRACED,
    ] {
        assert!(goes(clone3(&[flag(flags)], 88)), "{flags:#x}");
    }
}
