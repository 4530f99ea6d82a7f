use super::define_rows;
use super::words::*;

const UTIME: Kind = inp(Fixed(16));
const TIMES: Kind = inp(Fixed(32));
const READLINK: Disposition = Split(SplitKind::Readlink);
/// The kernel clips the size to `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`.
const XATTR_MAX: u32 = 65536;
const GET: Kind = out(Limit(3, XATTR_MAX)).ret(1);
const SET: Kind = inp(Limit(3, XATTR_MAX));
const LIST: Kind = out(Limit(2, XATTR_MAX)).ret(1);
/// `struct file_handle` with at most `MAX_HANDLE_SZ` bytes behind its head of 8.
const HANDLE: Kind = inout(Head {
    plus: 8,
    min: 8,
    max: 136,
})
.or_changed();

define_rows! {
    4 stat(path: PATH, statbuf: STAT) Forward, blocking: May;
    5 fstat(fd: FD, statbuf: STAT) Forward;
    6 lstat(path: PATH, statbuf: STAT) Forward, blocking: May;
    21 access(path: PATH, mode: INT) Forward, blocking: May;
    76 truncate(path: PATH, length: LONG) Forward, blocking: May;
    79 getcwd(buf: out(Clamp(1, 4096)).ret(1), size: SIZE) Forward;
    80 chdir(path: PATH) Forward, blocking: May;
    82 rename(oldpath: PATH, newpath: PATH) Forward, blocking: May;
    83 mkdir(path: PATH, mode: MODE) Forward, blocking: May;
    84 rmdir(path: PATH) Forward, blocking: May;
    86 link(oldpath: PATH, newpath: PATH) Forward, blocking: May;
    87 unlink(path: PATH) Forward, blocking: May;
    88 symlink(target: PATH, linkpath: PATH) Forward, blocking: May;
    89 readlink(path: PATH, buf: out(Clamp(2, 4096)).ret(1), bufsiz: INT) READLINK, blocking: May;
    90 chmod(path: PATH, mode: MODE) Forward, blocking: May;
    91 fchmod(fd: FD, mode: MODE) Forward, blocking: May;
    92 chown(path: PATH, owner: ID, group: ID) Forward, blocking: May;
    93 fchown(fd: FD, owner: ID, group: ID) Forward, blocking: May;
    94 lchown(path: PATH, owner: ID, group: ID) Forward, blocking: May;
    95 umask(mask: MODE) Forward;
    132 utime(path: PATH, times: UTIME) Forward, blocking: May;
    133 mknod(path: PATH, mode: MODE, dev: UINT) Forward, blocking: May;
    136 ustat(dev: UINT, ubuf: out(Fixed(32))) Forward, blocking: May;
    137 statfs(path: PATH, buf: STATFS) Forward, blocking: May;
    138 fstatfs(fd: FD, buf: STATFS) Forward, blocking: May;
    161 chroot(path: PATH) Forward, blocking: May;
    188 setxattr(path: PATH, name: XATTR, value: SET, size: SIZE, flags: INT) Forward, blocking: May;
    189 lsetxattr(path: PATH, name: XATTR, value: SET, size: SIZE, flags: INT) Forward, blocking: May;
    190 fsetxattr(fd: FD, name: XATTR, value: SET, size: SIZE, flags: INT) Forward, blocking: May;
    191 getxattr(path: PATH, name: XATTR, value: GET, size: SIZE) Forward, blocking: May;
    192 lgetxattr(path: PATH, name: XATTR, value: GET, size: SIZE) Forward, blocking: May;
    193 fgetxattr(fd: FD, name: XATTR, value: GET, size: SIZE) Forward, blocking: May;
    194 listxattr(path: PATH, list: LIST, size: SIZE) Forward, blocking: May;
    195 llistxattr(path: PATH, list: LIST, size: SIZE) Forward, blocking: May;
    196 flistxattr(fd: FD, list: LIST, size: SIZE) Forward, blocking: May;
    197 removexattr(path: PATH, name: XATTR) Forward, blocking: May;
    198 lremovexattr(path: PATH, name: XATTR) Forward, blocking: May;
    199 fremovexattr(fd: FD, name: XATTR) Forward, blocking: May;
    212 lookup_dcookie(cookie: LONG, buf: ADDR, len: SIZE) GoHome(HomeReason::Obsolete);
    235 utimes(path: PATH, times: TIMES) Forward, blocking: May;
    258 mkdirat(dirfd: FD, path: PATH, mode: MODE) Forward, blocking: May;
    259 mknodat(dirfd: FD, path: PATH, mode: MODE, dev: UINT) Forward, blocking: May;
    260 fchownat(dirfd: FD, path: PATH, owner: ID, group: ID, flags: INT) Forward, blocking: May;
    261 futimesat(dirfd: FD, path: PATH, times: TIMES) Forward, blocking: May;
    262 newfstatat(dirfd: FD, path: PATH, statbuf: STAT, flags: INT) Forward, blocking: May;
    263 unlinkat(dirfd: FD, path: PATH, flags: INT) Forward, blocking: May;
    264 renameat(olddirfd: FD, oldpath: PATH, newdirfd: FD, newpath: PATH) Forward, blocking: May;
    265 linkat(olddirfd: FD, oldpath: PATH, newdirfd: FD, newpath: PATH, flags: INT) Forward, blocking: May;
    266 symlinkat(target: PATH, newdirfd: FD, linkpath: PATH) Forward, blocking: May;
    267 readlinkat(dirfd: FD, path: PATH, buf: out(Clamp(3, 4096)).ret(1), bufsiz: INT) READLINK, blocking: May;
    268 fchmodat(dirfd: FD, path: PATH, mode: MODE) Forward, blocking: May;
    269 faccessat(dirfd: FD, path: PATH, mode: INT) Forward, blocking: May;
    280 utimensat(dirfd: FD, path: PATH, times: TIMES, flags: INT) Forward, blocking: May;
    303 name_to_handle_at(dirfd: FD, path: PATH, handle: HANDLE, mount_id: inout(Fixed(4)).or_changed(), flags: INT) Forward, blocking: May,
        rules: &[Rule { when: &[has(4, 1)], then: GoHome(HomeReason::Opaque) }],
        note: "With AT_HANDLE_MNT_ID_UNIQUE: goes home.";
    304 open_by_handle_at(mount_fd: FD, handle: inp(Head { plus: 8, min: 8, max: 136 }), flags: FLAGS) Forward, blocking: May;
    316 renameat2(olddirfd: FD, oldpath: PATH, newdirfd: FD, newpath: PATH, flags: UINT) Forward, blocking: May;
    332 statx(dirfd: FD, path: PATH, flags: INT, mask: UINT, statxbuf: out(Fixed(256))) Forward, blocking: May;
    439 faccessat2(dirfd: FD, path: PATH, mode: INT, flags: INT) Forward, blocking: May;
    452 fchmodat2(dirfd: FD, path: PATH, mode: MODE, flags: UINT) Forward, blocking: May;
    463 setxattrat(dirfd: FD, path: PATH, at_flags: UINT, name: XATTR, args: ADDR, size: SIZE) GoHome(HomeReason::Opaque);
    464 getxattrat(dirfd: FD, path: PATH, at_flags: UINT, name: XATTR, args: ADDR, size: SIZE) GoHome(HomeReason::Opaque);
    465 listxattrat(dirfd: FD, path: PATH, at_flags: UINT, list: out(Limit(4, XATTR_MAX)).ret(1), size: SIZE) Forward, blocking: May;
    466 removexattrat(dirfd: FD, path: PATH, at_flags: UINT, name: XATTR) Forward, blocking: May;
    468 file_getattr(dirfd: FD, path: PATH, attr: inout(Limit(3, 4096)), size: SIZE, at_flags: UINT) Forward, blocking: May;
    469 file_setattr(dirfd: FD, path: PATH, attr: inp(Limit(3, 4096)), size: SIZE, at_flags: UINT) Forward, blocking: May;
}
