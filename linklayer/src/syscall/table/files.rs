use super::define_rows;
use super::words::*;

const OPEN: Disposition = Split(SplitKind::Open);
const MASKED: Disposition = Split(SplitKind::TempMask);
/// Bodies that are transferred.
const READ_BODY: Kind = out(Stream(2)).ret(1).early();
const WRITE_BODY: Kind = inp(Stream(2));
const IOV_IN: Kind = Iovec {
    count: 2,
    dir: Dir::In,
};
const IOV_OUT: Kind = Iovec {
    count: 2,
    dir: Dir::Out,
};
/// Directory entries: fewer may be given than fit.
const DIRENTS: Kind = out(Clamp(2, 64 * 1024)).ret(1).early();
const SET: Kind = inout(FdSet(0));
const EVENTS: Kind = out(ClampCount(2, 12)).ret(12).early();
const POLLFDS: Kind = inout(Count(1, 8)).or_changed();
const POLL_NOTE: &str = "More than 28,672 descriptors at once: goes home.";

define_rows! {
    0 read(fd: FD, buf: READ_BODY, count: SIZE) Forward, blocking: May;
    1 write(fd: FD, buf: WRITE_BODY, count: SIZE) Forward, blocking: May;
    2 open(path: PATH, flags: FLAGS, mode: MODE) OPEN, blocking: May,
        note: "Files that describe this node or the guest's memory (/proc/self/maps, /sys/devices/system/cpu) are answered by the supervisor.";
    3 close(fd: FD) Forward, blocking: May;
    7 poll(fds: POLLFDS, nfds: UINT, timeout: INT) Forward, blocking: Long, quick: &[is(2, 0)], note: POLL_NOTE;
    8 lseek(fd: FD, offset: LONG, whence: UINT) Forward;
    16 ioctl(fd: FD, cmd: UINT, arg: Sub(SubTable::Ioctl)) Forward, blocking: May, note: "By command: see below. Unknown commands: goes home.";
    17 pread64(fd: FD, buf: READ_BODY, count: SIZE, pos: LONG) Forward, blocking: May;
    18 pwrite64(fd: FD, buf: WRITE_BODY, count: SIZE, pos: LONG) Forward, blocking: May;
    19 readv(fd: FD, iov: IOV_OUT, iovcnt: SIZE) Forward, blocking: May;
    20 writev(fd: FD, iov: IOV_IN, iovcnt: SIZE) Forward, blocking: May;
    22 pipe(fds: FD_PAIR) Forward;
    23 select(n: INT, readfds: SET, writefds: SET, exceptfds: SET, timeout: TIME_LEFT) Forward, blocking: Long;
    32 dup(fd: UINT) Forward;
    33 dup2(oldfd: UINT, newfd: UINT) Forward, blocking: May;
    40 sendfile(out_fd: FD, in_fd: FD, offset: inout(Fixed(8)).always(), count: SIZE) Forward, blocking: May;
    72 fcntl(fd: FD, cmd: UINT, arg: Sub(SubTable::Fcntl)) Forward, blocking: May, note: "By command: see below.";
    73 flock(fd: FD, operation: UINT) Forward, blocking: Long, quick: &[has(1, 4), is(1, 8)];
    74 fsync(fd: FD) Forward, blocking: May;
    75 fdatasync(fd: FD) Forward, blocking: May;
    77 ftruncate(fd: FD, length: LONG) Forward, blocking: May;
    78 getdents(fd: FD, dirent: DIRENTS, count: UINT) Forward, blocking: May;
    81 fchdir(fd: FD) Forward;
    85 creat(path: PATH, mode: MODE) OPEN, blocking: May;
    162 sync() Forward, blocking: Long;
    187 readahead(fd: FD, offset: LONG, count: SIZE) Forward, blocking: May;
    206 io_setup(nr_events: UINT, ctx: ADDR) GoHome(HomeReason::Aio);
    207 io_destroy(ctx: ADDR) GoHome(HomeReason::Aio);
    208 io_getevents(ctx: ADDR, min_nr: LONG, nr: LONG, events: ADDR, timeout: ADDR) GoHome(HomeReason::Aio);
    209 io_submit(ctx: ADDR, nr: LONG, iocbs: ADDR) GoHome(HomeReason::Aio);
    210 io_cancel(ctx: ADDR, iocb: ADDR, result: ADDR) GoHome(HomeReason::Aio);
    213 epoll_create(size: INT) Forward;
    214 epoll_ctl_old() GoHome(HomeReason::Obsolete);
    215 epoll_wait_old() GoHome(HomeReason::Obsolete);
    217 getdents64(fd: FD, dirent: DIRENTS, count: UINT) Forward, blocking: May;
    221 fadvise64(fd: FD, offset: LONG, len: SIZE, advice: INT) Forward;
    232 epoll_wait(epfd: FD, events: EVENTS, maxevents: INT, timeout: INT) Forward, blocking: Long, quick: &[is(3, 0)];
    233 epoll_ctl(epfd: FD, op: INT, fd: FD, event: inp(Fixed(12))) Forward;
    253 inotify_init() Forward;
    254 inotify_add_watch(fd: FD, path: PATH, mask: UINT) Forward, blocking: May;
    255 inotify_rm_watch(fd: FD, wd: INT) Forward;
    257 openat(dirfd: FD, path: PATH, flags: FLAGS, mode: MODE) OPEN, blocking: May, note: "As open.";
    270 pselect6(n: INT, readfds: SET, writefds: SET, exceptfds: SET, timeout: TIME_LEFT, sigmask: Kind::TempMaskPair) MASKED, blocking: Long;
    271 ppoll(fds: POLLFDS, nfds: UINT, timeout: TIME_LEFT, sigmask: TempMask { size: 4 }, sigsetsize: SIZE) MASKED, blocking: Long, note: POLL_NOTE;
    275 splice(fd_in: FD, off_in: inout(Fixed(8)), fd_out: FD, off_out: inout(Fixed(8)), len: SIZE, flags: FLAGS) Forward, blocking: May;
    276 tee(fd_in: FD, fd_out: FD, len: SIZE, flags: FLAGS) Forward, blocking: May;
    277 sync_file_range(fd: FD, offset: LONG, nbytes: LONG, flags: FLAGS) Forward, blocking: May;
    278 vmsplice(fd: FD, iov: ADDR, nr_segs: SIZE, flags: FLAGS) GoHome(HomeReason::ZeroCopy);
    281 epoll_pwait(epfd: FD, events: EVENTS, maxevents: INT, timeout: INT, sigmask: TempMask { size: 5 }, sigsetsize: SIZE) MASKED, blocking: Long, quick: &[is(3, 0)];
    284 eventfd(count: UINT) Forward;
    285 fallocate(fd: FD, mode: INT, offset: LONG, len: LONG) Forward, blocking: May;
    290 eventfd2(count: UINT, flags: INT) Forward;
    291 epoll_create1(flags: INT) Forward;
    292 dup3(oldfd: UINT, newfd: UINT, flags: INT) Forward, blocking: May;
    293 pipe2(fds: FD_PAIR, flags: INT) Forward;
    294 inotify_init1(flags: INT) Forward;
    295 preadv(fd: FD, iov: IOV_OUT, iovcnt: SIZE, pos_l: SIZE, pos_h: SIZE) Forward, blocking: May;
    296 pwritev(fd: FD, iov: IOV_IN, iovcnt: SIZE, pos_l: SIZE, pos_h: SIZE) Forward, blocking: May;
    300 fanotify_init(flags: UINT, event_f_flags: UINT) Forward;
    301 fanotify_mark(fd: FD, flags: UINT, mask: FLAGS, dirfd: FD, path: PATH) Forward, blocking: May;
    306 syncfs(fd: FD) Forward, blocking: Long;
    319 memfd_create(name: Str(256), flags: UINT) Forward, note: "The file is at home; mapping it is a matter of mmap.";
    326 copy_file_range(fd_in: FD, off_in: inout(Fixed(8)).positive(), fd_out: FD, off_out: inout(Fixed(8)).positive(), len: SIZE, flags: UINT) Forward, blocking: May;
    327 preadv2(fd: FD, iov: IOV_OUT, iovcnt: SIZE, pos_l: SIZE, pos_h: SIZE, flags: FLAGS) Forward, blocking: May;
    328 pwritev2(fd: FD, iov: IOV_IN, iovcnt: SIZE, pos_l: SIZE, pos_h: SIZE, flags: FLAGS) Forward, blocking: May;
    333 io_pgetevents(ctx: ADDR, min_nr: LONG, nr: LONG, events: ADDR, timeout: ADDR, sig: ADDR) GoHome(HomeReason::Aio);
    425 io_uring_setup(entries: UINT, params: ADDR) GoHome(HomeReason::IoUring);
    426 io_uring_enter(fd: FD, to_submit: UINT, min_complete: UINT, flags: UINT, arg: ADDR, argsz: SIZE) GoHome(HomeReason::IoUring);
    427 io_uring_register(fd: FD, opcode: UINT, arg: ADDR, nr_args: UINT) GoHome(HomeReason::IoUring);
    436 close_range(first: UINT, last: UINT, flags: UINT) Forward, blocking: May;
    437 openat2(dirfd: FD, path: PATH, how: inp(Limit(3, 4096)), size: SIZE) OPEN, blocking: May, note: "As open.";
    441 epoll_pwait2(epfd: FD, events: EVENTS, maxevents: INT, timeout: TIME_IN.timeout(), sigmask: TempMask { size: 5 }, sigsetsize: SIZE) MASKED, blocking: Long;
    451 cachestat(fd: FD, range: inp(Fixed(16)), cstat: out(Fixed(40)), flags: UINT) Forward;
}
