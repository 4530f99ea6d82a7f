//! What the daemons give up for good (seccomp(2)): system calls that they never make, by group, so that a fault in one of their
//! network-facing threads is worth less.
//!
//! A filter holds for a thread and for all threads *and processes* that it makes, and its refusals come before the notifications of
//! a guest's filter. So neither guests nor what they descend from may have one: the supervisor's tracer thread (which makes the cage)
//! and the daemon's thread that spawns supervisors stay as they are, and all others are confined.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use thiserror::Error;

/// Why a thread was not confined. It runs on as before.
#[derive(Debug, Error)]
pub enum ConfineError {
    /// The filter could not be made.
    #[error("making a seccomp filter: {0}")]
    Build(#[from] seccompiler::BackendError),
    /// The kernel did not take it.
    #[error("installing a seccomp filter: {0}")]
    Install(#[from] seccompiler::Error),
}

/// Who is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A thread of mosd, but for the one that spawns supervisors.
    Daemon,
    /// A thread of a supervisor, but for its tracer.
    Supervisor,
}

/// A group of calls with one purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Kernel modules and kernels to boot.
    Kernel,
    /// The whole machine: reboot, swap, accounting, quotas, its log.
    Machine,
    /// Setting clocks.
    Clocks,
    /// Ports, and what only emulators use.
    Hardware,
    /// Looking into the kernel: BPF, performance counters.
    Inspection,
    /// Mounts and namespaces.
    Namespaces,
    /// Tracing other processes.
    Tracing,
    /// Reading and writing other processes' memory.
    Memory,
    /// Starting programs.
    Programs,
    /// Changing user, group, capabilities or root directory.
    Credentials,
    /// Key rings.
    Keys,
    /// io_uring, which passes by seccomp filters.
    Rings,
    /// File handles, which pass by directories' permissions.
    Handles,
    /// Sockets of other families than IPv4, IPv6 and Unix; typing into a terminal.
    Sockets,
}

impl Group {
    /// All groups.
    pub const ALL: [Group; 14] = [
        Group::Kernel,
        Group::Machine,
        Group::Clocks,
        Group::Hardware,
        Group::Inspection,
        Group::Namespaces,
        Group::Tracing,
        Group::Memory,
        Group::Programs,
        Group::Credentials,
        Group::Keys,
        Group::Rings,
        Group::Handles,
        Group::Sockets,
    ];

    /// The calls that are refused whatever their arguments are.
    pub fn calls(self) -> &'static [i64] {
        match self {
            Group::Kernel => &[
                libc::SYS_init_module,
                libc::SYS_finit_module,
                libc::SYS_delete_module,
                libc::SYS_kexec_load,
                libc::SYS_kexec_file_load,
            ],
            Group::Machine => &[
                libc::SYS_reboot,
                libc::SYS_swapon,
                libc::SYS_swapoff,
                libc::SYS_acct,
                libc::SYS_quotactl,
                libc::SYS_quotactl_fd,
                libc::SYS_syslog,
                libc::SYS_vhangup,
                libc::SYS_sethostname,
                libc::SYS_setdomainname,
            ],
            Group::Clocks => &[
                libc::SYS_settimeofday,
                libc::SYS_clock_settime,
                libc::SYS_adjtimex,
                libc::SYS_clock_adjtime,
            ],
            Group::Hardware => &[libc::SYS_iopl, libc::SYS_ioperm, libc::SYS_modify_ldt],
            Group::Inspection => &[
                libc::SYS_bpf,
                libc::SYS_perf_event_open,
                libc::SYS_kcmp,
                libc::SYS_userfaultfd,
                libc::SYS_fanotify_init,
            ],
            Group::Namespaces => &[
                libc::SYS_mount,
                libc::SYS_umount2,
                libc::SYS_pivot_root,
                libc::SYS_unshare,
                libc::SYS_setns,
                libc::SYS_open_tree,
                libc::SYS_move_mount,
                libc::SYS_fsopen,
                libc::SYS_fsconfig,
                libc::SYS_fsmount,
                libc::SYS_fspick,
                libc::SYS_mount_setattr,
            ],
            Group::Tracing => &[libc::SYS_ptrace],
            Group::Memory => &[
                libc::SYS_process_vm_readv,
                libc::SYS_process_vm_writev,
                libc::SYS_process_madvise,
                libc::SYS_pidfd_getfd,
            ],
            Group::Programs => &[libc::SYS_execve, libc::SYS_execveat, libc::SYS_personality],
            Group::Credentials => &[
                libc::SYS_setuid,
                libc::SYS_setgid,
                libc::SYS_setreuid,
                libc::SYS_setregid,
                libc::SYS_setresuid,
                libc::SYS_setresgid,
                libc::SYS_setgroups,
                libc::SYS_setfsuid,
                libc::SYS_setfsgid,
                libc::SYS_capset,
                libc::SYS_chroot,
            ],
            Group::Keys => &[libc::SYS_add_key, libc::SYS_request_key, libc::SYS_keyctl],
            Group::Rings => &[
                libc::SYS_io_uring_setup,
                libc::SYS_io_uring_enter,
                libc::SYS_io_uring_register,
                libc::SYS_io_setup,
            ],
            Group::Handles => &[libc::SYS_open_by_handle_at],
            Group::Sockets => &[],
        }
    }
}

impl Role {
    /// What it gives up.
    pub fn groups(self) -> Vec<Group> {
        Group::ALL
            .into_iter()
            .filter(|group| match self {
                Role::Daemon => true,
                // The threads that serve guests read and write their memory.
                Role::Supervisor => *group != Group::Memory,
            })
            .collect()
    }
}

/// The filter of a role: EPERM for what it gives up.
fn program(role: Role) -> Result<BpfProgram, ConfineError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for group in role.groups() {
        for call in group.calls() {
            rules.insert(*call, Vec::new());
        }
        if group == Group::Sockets {
            let family = |family: i32| {
                SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family as u64)
            };
            let other = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6]
                .into_iter()
                .map(family)
                .collect::<Result<Vec<_>, _>>()?;
            rules.insert(libc::SYS_socket, vec![SeccompRule::new(other)?]);
            let typing = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, libc::TIOCSTI)?;
            rules.insert(libc::SYS_ioctl, vec![SeccompRule::new(vec![typing])?]);
        }
    }
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?.try_into()?)
}

/// Confines the calling thread, and all threads and processes that it makes from now on. Sets no_new_privs.
///
/// # Errors
/// See [`ConfineError`].
pub fn this_thread(role: Role) -> Result<(), ConfineError> {
    Ok(seccompiler::apply_filter(&program(role)?)?)
}

/// Confines all threads of this process. For processes that have no thread which must stay free.
///
/// # Errors
/// See [`ConfineError`]; also when a thread has a filter that this one has not.
pub fn all_threads(role: Role) -> Result<(), ConfineError> {
    Ok(seccompiler::apply_filter_all_threads(&program(role)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_is_in_one_group_and_every_group_is_refused_to_somebody() {
        let mut all: Vec<i64> = Group::ALL.iter().flat_map(|g| g.calls()).copied().collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert_eq!(Role::Daemon.groups().len(), Group::ALL.len());
    }

    fn errno_of(nr: i64, args: [u64; 3]) -> i32 {
        // SAFETY: called with arguments that make every one of these calls fail: null pointers and bad descriptors.
        let ret = unsafe { libc::syscall(nr, args[0], args[1], args[2], 0, 0, 0) };
        if ret < 0 { nix::errno::Errno::last_raw() } else { 0 }
    }

    #[test]
    fn a_confined_thread_is_refused_what_it_gave_up_and_nothing_else() {
        for role in [Role::Daemon, Role::Supervisor] {
            std::thread::spawn(move || {
                this_thread(role).unwrap();
                for group in role.groups() {
                    for nr in group.calls() {
                        assert_eq!(errno_of(*nr, [u64::MAX; 3]), libc::EPERM, "{group:?} {nr}");
                    }
                }
                assert_eq!(
                    errno_of(libc::SYS_socket, [libc::AF_NETLINK as u64, 3, 0]),
                    libc::EPERM
                );
                assert_eq!(
                    errno_of(libc::SYS_ioctl, [u64::MAX, libc::TIOCSTI, 0]),
                    libc::EPERM
                );
                assert_eq!(
                    errno_of(libc::SYS_ioctl, [u64::MAX, libc::TIOCGWINSZ, 0]),
                    libc::EBADF
                );
                let memory = errno_of(libc::SYS_process_vm_readv, [std::process::id().into(), 0, 0]);
                assert_eq!(memory, if role == Role::Daemon { libc::EPERM } else { 0 });
                // What daemons live by.
                std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                std::os::unix::net::UnixDatagram::unbound().unwrap();
                std::fs::read("/proc/self/status").unwrap();
                let inside = std::thread::spawn(|| errno_of(libc::SYS_ptrace, [u64::MAX; 3]))
                    .join()
                    .unwrap();
                assert_eq!(inside, libc::EPERM);
            })
            .join()
            .unwrap();
        }
        // Other threads are as they were.
        assert_ne!(errno_of(libc::SYS_ptrace, [u64::MAX; 3]), libc::EPERM);
    }
}
