use super::words::*;
use super::{CREDS, define_rows};

const IDENTITY: Option<CacheClass> = Some(CacheClass::Creds);
const ADMIN: Disposition = GoHome(HomeReason::Administration);
const MOUNT: Disposition = GoHome(HomeReason::Mount);
const GONE: Disposition = GoHome(HomeReason::Obsolete);
const NAMESPACE: Disposition = GoHome(HomeReason::Namespace);
const CONFINE: Disposition = GoHome(HomeReason::Confinement);
const KEYS: Disposition = GoHome(HomeReason::Keys);
const NEVER_THERE: &str = "Not implemented by any Linux: home says ENOSYS.";
/// READ_IMPLIES_EXEC and the two address limits change what local calls do. The rest takes effect at the next exec or
/// in calls that are forwarded, both of which are at home.
const PERSONALITY: &[Rule] = &[
    Rule {
        when: &[is(0, 0xffff_ffff)],
        then: Forward,
    },
    Rule {
        when: &[crate::syscall::kind::Cmp {
            arg: 0,
            mask: 0x08c0_0000,
            value: 0,
        }],
        then: Forward,
    },
];

define_rows! {
    63 uname(buf: out(Fixed(390))) Forward, cache: Some(CacheClass::Machine);
    97 getrlimit(resource: UINT, rlim: out(Fixed(16))) Split(SplitKind::Rlimit);
    99 sysinfo(info: out(Fixed(112))) Forward, note: "Tells of home, as /proc/meminfo does.";
    102 getuid() Forward, cache: IDENTITY;
    103 syslog(type: INT, buf: inout(Arg(2)).changed(), len: INT) Forward, blocking: May;
    104 getgid() Forward, cache: IDENTITY;
    105 setuid(uid: ID) Forward, clears: CREDS;
    106 setgid(gid: ID) Forward, clears: CREDS;
    107 geteuid() Forward, cache: IDENTITY;
    108 getegid() Forward, cache: IDENTITY;
    113 setreuid(ruid: ID, euid: ID) Forward, clears: CREDS;
    114 setregid(rgid: ID, egid: ID) Forward, clears: CREDS;
    115 getgroups(size: INT, list: out(Count(0, 4)).ret(4)) Forward, cache: IDENTITY;
    116 setgroups(size: INT, list: inp(Count(0, 4))) Forward, clears: CREDS;
    117 setresuid(ruid: ID, euid: ID, suid: ID) Forward, clears: CREDS;
    118 getresuid(ruid: out(Fixed(4)), euid: out(Fixed(4)), suid: out(Fixed(4))) Forward, cache: IDENTITY;
    119 setresgid(rgid: ID, egid: ID, sgid: ID) Forward, clears: CREDS;
    120 getresgid(rgid: out(Fixed(4)), egid: out(Fixed(4)), sgid: out(Fixed(4))) Forward, cache: IDENTITY;
    122 setfsuid(uid: ID) Forward;
    123 setfsgid(gid: ID) Forward;
    125 capget(header: inout(Fixed(8)).changed(), data: out(CapData(0))) Forward;
    126 capset(header: inout(Fixed(8)).changed(), data: inp(CapData(0))) Forward, clears: CREDS;
    134 uselib(library: ADDR) GONE;
    135 personality(persona: UINT) GoHome(HomeReason::Personality), rules: PERSONALITY, clears: &[CacheClass::Machine],
        note: "Asking, and flags that take effect at exec: home. Flags that change how memory is mapped: goes home.";
    139 sysfs(option: INT, arg1: ADDR, arg2: ADDR) GONE;
    153 vhangup() Forward;
    154 modify_ldt(func: INT, ptr: ADDR, count: SIZE) GoHome(HomeReason::Hardware);
    155 pivot_root(new_root: ADDR, put_old: ADDR) MOUNT;
    156 _sysctl(args: ADDR) GONE;
    160 setrlimit(resource: UINT, rlim: inp(Fixed(16))) Split(SplitKind::Rlimit);
    163 acct(path: ADDR) ADMIN;
    165 mount(source: ADDR, target: ADDR, fstype: ADDR, flags: FLAGS, data: ADDR) MOUNT;
    166 umount2(target: ADDR, flags: FLAGS) MOUNT;
    167 swapon(path: ADDR, flags: FLAGS) ADMIN;
    168 swapoff(path: ADDR) ADMIN;
    169 reboot(magic1: INT, magic2: INT, cmd: UINT, arg: ADDR) ADMIN;
    170 sethostname(name: inp(Limit(1, 65)), len: INT) Forward, clears: &[CacheClass::Machine];
    171 setdomainname(name: inp(Limit(1, 65)), len: INT) Forward, clears: &[CacheClass::Machine];
    172 iopl(level: UINT) GoHome(HomeReason::Hardware);
    173 ioperm(from: SIZE, num: SIZE, turn_on: INT) GoHome(HomeReason::Hardware);
    174 create_module() Forward, note: NEVER_THERE;
    175 init_module(image: ADDR, len: SIZE, params: ADDR) ADMIN;
    176 delete_module(name: ADDR, flags: UINT) ADMIN;
    177 get_kernel_syms() Forward, note: NEVER_THERE;
    178 query_module() Forward, note: NEVER_THERE;
    179 quotactl(cmd: UINT, special: ADDR, id: ID, addr: ADDR) ADMIN;
    180 nfsservctl() Forward, note: NEVER_THERE;
    181 getpmsg() Forward, note: NEVER_THERE;
    182 putpmsg() Forward, note: NEVER_THERE;
    183 afs_syscall() Forward, note: NEVER_THERE;
    184 tuxcall() Forward, note: NEVER_THERE;
    185 security() Forward, note: NEVER_THERE;
    205 set_thread_area() Forward, note: NEVER_THERE;
    211 get_thread_area() Forward, note: NEVER_THERE;
    236 vserver() Forward, note: NEVER_THERE;
    246 kexec_load(entry: SIZE, nr_segments: SIZE, segments: ADDR, flags: SIZE) ADMIN;
    248 add_key(type: ADDR, description: ADDR, payload: ADDR, plen: SIZE, keyring: INT) KEYS;
    249 request_key(type: ADDR, description: ADDR, callout: ADDR, keyring: INT) KEYS;
    250 keyctl(cmd: INT, arg2: SIZE, arg3: SIZE, arg4: SIZE, arg5: SIZE) KEYS;
    272 unshare(flags: FLAGS) NAMESPACE;
    298 perf_event_open(attr: ADDR, pid: PID, cpu: INT, group_fd: FD, flags: SIZE) GoHome(HomeReason::Perf);
    302 prlimit64(pid: PID, resource: UINT, new: inp(Fixed(16)), old: out(Fixed(16))) Split(SplitKind::Rlimit);
    308 setns(fd: FD, nstype: INT) NAMESPACE;
    313 finit_module(fd: FD, params: ADDR, flags: INT) ADMIN;
    317 seccomp(op: UINT, flags: UINT, args: ADDR) CONFINE;
    318 getrandom(buf: ADDR, len: SIZE, flags: UINT) Local;
    320 kexec_file_load(kernel_fd: FD, initrd_fd: FD, len: SIZE, cmdline: ADDR, flags: SIZE) ADMIN;
    321 bpf(cmd: INT, attr: ADDR, size: UINT) GoHome(HomeReason::Bpf);
    335 uretprobe() GoHome(HomeReason::OtherProcess), note: "Made by the kernel's own trampolines.";
    336 uprobe() GoHome(HomeReason::OtherProcess), note: "Made by the kernel's own trampolines.";
    428 open_tree(dirfd: FD, path: ADDR, flags: UINT) MOUNT;
    429 move_mount(from_dirfd: FD, from_path: ADDR, to_dirfd: FD, to_path: ADDR, flags: UINT) MOUNT;
    430 fsopen(fsname: ADDR, flags: UINT) MOUNT;
    431 fsconfig(fd: FD, cmd: UINT, key: ADDR, value: ADDR, aux: INT) MOUNT;
    432 fsmount(fsfd: FD, flags: UINT, attr_flags: UINT) MOUNT;
    433 fspick(dirfd: FD, path: ADDR, flags: UINT) MOUNT;
    442 mount_setattr(dirfd: FD, path: ADDR, flags: UINT, attr: ADDR, size: SIZE) MOUNT;
    443 quotactl_fd(fd: FD, cmd: UINT, id: ID, addr: ADDR) ADMIN;
    444 landlock_create_ruleset(attr: ADDR, size: SIZE, flags: UINT) CONFINE;
    445 landlock_add_rule(ruleset_fd: FD, type: INT, attr: ADDR, flags: UINT) CONFINE;
    446 landlock_restrict_self(ruleset_fd: FD, flags: UINT) CONFINE;
    457 statmount(req: inp(Head { plus: 0, min: 24, max: 4096 }), buf: ADDR, size: SIZE, flags: UINT) MOUNT;
    458 listmount(req: inp(Head { plus: 0, min: 24, max: 4096 }), ids: ADDR, count: SIZE, flags: UINT) MOUNT;
    459 lsm_get_self_attr(attr: UINT, ctx: ADDR, size: ADDR, flags: UINT) CONFINE;
    460 lsm_set_self_attr(attr: UINT, ctx: ADDR, size: UINT, flags: UINT) CONFINE;
    461 lsm_list_modules(ids: ADDR, size: ADDR, flags: UINT) CONFINE;
    467 open_tree_attr(dirfd: FD, path: ADDR, flags: UINT, attr: ADDR, size: SIZE) MOUNT;
}
