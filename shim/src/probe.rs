//! What this node's kernel can do for guests and homes, found out by trying it.
//!
//! Every probe undoes what it did. They fork, so they are for a program that has nothing else to do (`mosctl check`).

mod trials;

use serde::{Deserialize, Serialize};

/// What came of a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It works.
    Works,
    /// It works, less well than it could; the text says how.
    Limited(String),
    /// It does not work; the text says what the kernel answered.
    Missing(String),
}

/// Whether something works without a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Need {
    /// No guest can run on this node without it.
    Guests,
    /// No process of this node can run away without it.
    Home,
    /// Something is slower, or a part is missing, without it.
    Better,
}

/// A feature, and whether this node has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Short, unchanging name.
    pub name: String,
    /// What it is used for.
    pub purpose: String,
    /// Who needs it.
    pub need: Need,
    /// What was found.
    pub outcome: Outcome,
    /// What is not possible, or slower, without it.
    pub consequence: String,
    /// How to get it.
    pub remedy: String,
}

impl Probe {
    /// Whether it works, limited or not.
    pub fn works(&self) -> bool {
        !matches!(self.outcome, Outcome::Missing(_))
    }
}

struct Feature {
    name: &'static str,
    purpose: &'static str,
    need: Need,
    trial: fn() -> Outcome,
    consequence: &'static str,
    remedy: &'static str,
}

const FEATURES: &[Feature] = &[
    Feature {
        name: "cage",
        purpose: "namespaces of their own and an empty root for guests",
        need: Need::Guests,
        trial: trials::cage,
        consequence: "no guest can run on this node",
        remedy: "allow user namespaces: user.max_user_namespaces, kernel.unprivileged_userns_clone=1, \
                 kernel.apparmor_restrict_unprivileged_userns=0, or run mosd outside of a restricted container",
    },
    Feature {
        name: "clocks",
        purpose: "monotonic clocks that go on at home's values (time namespace, Linux 5.6)",
        need: Need::Guests,
        trial: trials::clocks,
        consequence: "no guest can run on this node",
        remedy: "a kernel with CONFIG_TIME_NS",
    },
    Feature {
        name: "chosen_pids",
        purpose: "processes with the pid that they have at home (clone3 with set_tid, Linux 5.9)",
        need: Need::Guests,
        trial: trials::chosen_pids,
        consequence: "no guest can run on this node, or none whose pid at home is larger than kernel.pid_max here",
        remedy: "Linux 5.9 or later; sysctl kernel.pid_max=4194304 before Linux 6.14",
    },
    Feature {
        name: "last_pid",
        purpose: "threads and children with the id that they have at home (/proc/sys/kernel/ns_last_pid)",
        need: Need::Guests,
        trial: trials::last_pid,
        consequence: "guests cannot make threads or children here; they go home to do it",
        remedy: "a kernel with CONFIG_CHECKPOINT_RESTORE, and /proc/sys mounted writable (in a container)",
    },
    Feature {
        name: "notifications",
        purpose: "system calls of guests handed to the supervisor (seccomp user notification, killable wait: Linux 5.19)",
        need: Need::Guests,
        trial: trials::notifications,
        consequence: "no guest can run on this node",
        remedy: "Linux 5.19 or later with CONFIG_SECCOMP_FILTER",
    },
    Feature {
        name: "mapped_files",
        purpose: "contents of files that guests map (SECCOMP_IOCTL_NOTIF_ADDFD, Linux 5.9)",
        need: Need::Guests,
        trial: trials::mapped_files,
        consequence: "no guest can map a file on this node: it fails with EIO",
        remedy: "Linux 5.9 or later with CONFIG_SECCOMP_FILTER",
    },
    Feature {
        name: "same_cpu_wakeup",
        purpose: "handing over between guest and supervisor on one processor (Linux 6.6)",
        need: Need::Better,
        trial: trials::same_cpu_wakeup,
        consequence: "forwarded calls may take some microseconds longer",
        remedy: "Linux 6.6 or later",
    },
    Feature {
        name: "tracing",
        purpose: "seizing processes, at home and away, with their masks, pending signals and rseq (ptrace, Linux 5.13)",
        need: Need::Home,
        trial: trials::tracing,
        consequence: "no program can be moved from or to this node",
        remedy: "sysctl kernel.yama.ptrace_scope=1 or 0; in a container, allow ptrace; Linux 5.13 or later with \
                 CONFIG_CHECKPOINT_RESTORE",
    },
    Feature {
        name: "memory_access",
        purpose: "reading and writing guests' memory (process_vm_readv, Linux 3.2)",
        need: Need::Better,
        trial: trials::memory_access,
        consequence: "/proc/PID/mem is used instead, with a look at the memory map before each access",
        remedy: "a kernel with CONFIG_CROSS_MEMORY_ATTACH",
    },
    Feature {
        name: "map_queries",
        purpose: "asking for one memory area (PROCMAP_QUERY, Linux 6.11)",
        need: Need::Better,
        trial: trials::map_queries,
        consequence: "calls that fill a buffer read the whole memory map first: slower for programs with many areas",
        remedy: "Linux 6.11 or later",
    },
    Feature {
        name: "descriptors",
        purpose: "taking descriptors out of other processes (pidfd_getfd, Linux 5.6)",
        need: Need::Home,
        trial: trials::descriptors,
        consequence: "no program can be moved from or to this node",
        remedy: "Linux 5.6 or later",
    },
    Feature {
        name: "memfd",
        purpose: "contents of files for guests, and the vessels' arena (memfd_create)",
        need: Need::Home,
        trial: trials::memfd,
        consequence: "no program can be moved from or to this node",
        remedy: "a kernel with CONFIG_MEMFD_CREATE",
    },
    Feature {
        name: "drop_locked",
        purpose: "emptying the home process of locked memory too (MADV_DONTNEED_LOCKED, Linux 5.18)",
        need: Need::Better,
        trial: trials::drop_locked,
        consequence: "locked memory of a program that is away stays allocated at home as well",
        remedy: "Linux 5.18 or later",
    },
    Feature {
        name: "restore",
        purpose: "setting a process's brk, stack and argument addresses (PR_SET_MM_MAP, Linux 3.18)",
        need: Need::Guests,
        trial: trials::restore,
        consequence: "no guest can be built on this node",
        remedy: "a kernel with CONFIG_CHECKPOINT_RESTORE",
    },
    Feature {
        name: "page_scan",
        purpose: "finding the pages that a process has and that changed (PAGEMAP_SCAN, Linux 6.7)",
        need: Need::Better,
        trial: trials::page_scan,
        consequence: "the page map is read entry by entry: slower moves of large processes",
        remedy: "Linux 6.7 or later",
    },
    Feature {
        name: "dirty_tracking",
        purpose: "copying memory while the process runs (userfaultfd with asynchronous write protection, Linux 6.7)",
        need: Need::Better,
        trial: trials::dirty_tracking,
        consequence: "processes stand still while all of their memory is copied",
        remedy: "Linux 6.7 or later with CONFIG_PTE_MARKER_UFFD_WP",
    },
    Feature {
        name: "late_pages",
        purpose: "running before all memory has arrived (userfaultfd also for faults in system calls)",
        need: Need::Better,
        trial: trials::late_pages,
        consequence: "mosmigrate --mode postcopy and hybrid are refused here: processes wait for all of their memory",
        remedy: "let the user open /dev/userfaultfd (Linux 6.1), or sysctl vm.unprivileged_userfaultfd=1",
    },
    Feature {
        name: "timed_waits",
        purpose: "knowing since when a thread waits (/proc/TID/sched)",
        need: Need::Better,
        trial: trials::timed_waits,
        consequence: "a process with a thread in poll, epoll_wait or another such wait with a timeout moves when that has ended",
        remedy: "a kernel with CONFIG_SCHED_DEBUG",
    },
    Feature {
        name: "leases",
        purpose: "promises that a file did not change (fcntl F_SETLEASE)",
        need: Need::Better,
        trial: trials::leases,
        consequence: "guests of this home ask for file contents more often",
        remedy: "a local file system for temporary files, and sysctl fs.leases-enable=1",
    },
];

/// Tries everything. Takes some tens of milliseconds.
pub fn run() -> Vec<Probe> {
    FEATURES
        .iter()
        .map(|feature| Probe {
            name: feature.name.into(),
            purpose: feature.purpose.into(),
            need: feature.need,
            outcome: (feature.trial)(),
            consequence: feature.consequence.into(),
            remedy: feature.remedy.into(),
        })
        .collect()
}

/// The kernel's release, as uname(2) has it.
pub fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_probe_has_a_result_and_leaves_nothing_behind() {
        let fds = || std::fs::read_dir("/proc/self/fd").map(|d| d.count()).unwrap_or(0);
        let before = fds();
        let probes = run();
        assert_eq!(fds(), before);
        assert_eq!(probes.len(), FEATURES.len());
        for probe in &probes {
            println!("{:16} {:?}", probe.name, probe.outcome);
        }
        let mut names: Vec<_> = probes.iter().map(|p| p.name.clone()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), probes.len());
        // The tests of this crate need these as well.
        for probe in probes.iter().filter(|p| p.need != Need::Better) {
            assert!(probe.works(), "{probe:?}");
        }
    }
}
