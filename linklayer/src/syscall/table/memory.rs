use super::define_rows;
use super::words::*;

/// `MAP_TYPE | MAP_ANONYMOUS | MAP_LOCKED | MAP_HUGETLB` must be `MAP_PRIVATE | MAP_ANONYMOUS`.
const ANON_PRIVATE: crate::syscall::kind::Cmp = crate::syscall::kind::Cmp {
    arg: 3,
    mask: 0x4_200f | 0x20,
    value: 0x22,
};
const LOCK_NOTE: &str = "Counts against the node's limit as set for the guest.";
const NUMA_NOTE: &str = "Concerns the node where the guest is; not carried along.";

define_rows! {
    9 mmap(addr: ADDR, length: SIZE, prot: FLAGS, flags: FLAGS, fd: FD, offset: LONG) Split(SplitKind::Mmap),
        rules: &[Rule { when: &[ANON_PRIVATE], then: Local }],
        note: "Private anonymous memory: local. Files: private and read-only mappings are filled from home; shared mappings that can be written are made where nobody else has the file open, and go home otherwise; huge pages: goes home.";
    10 mprotect(addr: ADDR, length: SIZE, prot: FLAGS) Local;
    11 munmap(addr: ADDR, length: SIZE) Local;
    12 brk(addr: ADDR) Local;
    25 mremap(old: ADDR, old_size: SIZE, new_size: SIZE, flags: FLAGS, new: ADDR) Split(SplitKind::Mremap);
    26 msync(addr: ADDR, length: SIZE, flags: INT) Split(SplitKind::Msync), blocking: May, note: "What has changed of files that are mapped shared and writable is written at home first.";
    27 mincore(addr: ADDR, length: SIZE, vec: ADDR) Local, note: "Tells what is resident at the node where the guest is.";
    28 madvise(addr: ADDR, length: SIZE, advice: INT) Local;
    149 mlock(addr: ADDR, length: SIZE) Local, note: LOCK_NOTE;
    150 munlock(addr: ADDR, length: SIZE) Local;
    151 mlockall(flags: INT) GoHome(HomeReason::LockedMemory);
    152 munlockall() GoHome(HomeReason::LockedMemory);
    216 remap_file_pages(addr: ADDR, size: SIZE, prot: FLAGS, pgoff: SIZE, flags: FLAGS) GoHome(HomeReason::Obsolete);
    237 mbind(addr: ADDR, length: SIZE, mode: SIZE, nodemask: ADDR, maxnode: SIZE, flags: UINT) Local, note: NUMA_NOTE;
    238 set_mempolicy(mode: INT, nodemask: ADDR, maxnode: SIZE) Local, note: NUMA_NOTE;
    239 get_mempolicy(mode: ADDR, nodemask: ADDR, maxnode: SIZE, addr: ADDR, flags: SIZE) Local, note: NUMA_NOTE;
    256 migrate_pages(pid: PID, maxnode: SIZE, old: ADDR, new: ADDR) GoHome(HomeReason::OtherMemory),
        rules: &[Rule { when: &[is(0, 0)], then: Local }], note: NUMA_NOTE;
    279 move_pages(pid: PID, count: SIZE, pages: ADDR, nodes: ADDR, status: ADDR, flags: INT) GoHome(HomeReason::OtherMemory),
        rules: &[Rule { when: &[is(0, 0)], then: Local }], note: NUMA_NOTE;
    310 process_vm_readv(pid: PID, local_iov: ADDR, liovcnt: SIZE, remote_iov: ADDR, riovcnt: SIZE, flags: SIZE) GoHome(HomeReason::OtherMemory);
    311 process_vm_writev(pid: PID, local_iov: ADDR, liovcnt: SIZE, remote_iov: ADDR, riovcnt: SIZE, flags: SIZE) GoHome(HomeReason::OtherMemory);
    323 userfaultfd(flags: INT) GoHome(HomeReason::UserFault);
    325 mlock2(addr: ADDR, length: SIZE, flags: INT) Local, note: LOCK_NOTE;
    329 pkey_mprotect(addr: ADDR, length: SIZE, prot: FLAGS, pkey: INT) Local, note: "Away there is no key but that of everybody.";
    330 pkey_alloc(flags: UINT, access_rights: UINT) GoHome(HomeReason::Hardware), note: "A process that has protection keys stays at home.";
    331 pkey_free(pkey: INT) Local;
    440 process_madvise(pidfd: FD, vec: ADDR, vlen: SIZE, advice: INT, flags: UINT) GoHome(HomeReason::OtherMemory);
    447 memfd_secret(flags: UINT) GoHome(HomeReason::LockedMemory);
    448 process_mrelease(pidfd: FD, flags: UINT) GoHome(HomeReason::OtherMemory);
    450 set_mempolicy_home_node(start: ADDR, length: SIZE, home_node: SIZE, flags: SIZE) Local, note: NUMA_NOTE;
    453 map_shadow_stack(addr: ADDR, size: SIZE, flags: UINT) GoHome(HomeReason::Hardware);
    462 mseal(start: ADDR, length: SIZE, flags: SIZE) Local;
}
