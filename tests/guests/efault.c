/* Bad pointers in every kind of argument: what each call says, and that nothing else happens. The calls are made in a
 * fresh child each, so that one that kills it is seen as such. */
#include "guest.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/timerfd.h>

#define P 0x5005005005005005 /* stands for the bad pointer */
#define OK_PATH 0x5005005005005006
#define OK_BUF 0x5005005005005007

struct row {
    const char *name;
    long nr, a[6];
};
static int file, pipe_r, pipe_w, sock, dgram, ep, tfd, evfd, dir, tty, ino;
static char path[] = "efault-file", room[8192];

static struct row rows[] = {
#define R(n, ...) {#n, SYS_##n, {__VA_ARGS__}}
    R(read, 1000, P, 8), R(write, 1000, P, 8), R(pread64, 1000, P, 8, 0), R(pwrite64, 1000, P, 8, 0),
    R(readv, 1000, P, 2), R(writev, 1000, P, 2), R(preadv, 1000, P, 1, 0), R(pwritev, 1000, P, 1, 0),
    {"read pipe", SYS_read, {1001, P, 8}}, {"write pipe", SYS_write, {1002, P, 8}},
    R(open, P, O_RDONLY), R(openat, AT_FDCWD, P, 0), R(creat, P, 0600), R(openat2, AT_FDCWD, OK_PATH, P, 24),
    R(stat, P, OK_BUF), {"stat out", SYS_stat, {OK_PATH, P}}, {"lstat out", SYS_lstat, {OK_PATH, P}}, R(fstat, 1000, P),
    R(newfstatat, AT_FDCWD, OK_PATH, P, 0), {"statx path", SYS_statx, {AT_FDCWD, P, 0, 0x7ff, OK_BUF}},
    {"statx out", SYS_statx, {AT_FDCWD, OK_PATH, 0, 0x7ff, P}}, R(statfs, OK_PATH, P), R(fstatfs, 1000, P),
    R(access, P, 0), R(faccessat, AT_FDCWD, P, 0), R(chdir, P), R(mkdir, P, 0700), R(rmdir, P), R(unlink, P),
    R(rename, P, OK_PATH), {"rename to", SYS_rename, {OK_PATH, P}}, R(link, P, OK_PATH), {"link to", SYS_link, {OK_PATH, P}},
    R(symlink, P, OK_PATH), {"symlink to", SYS_symlink, {OK_PATH, P}}, R(readlink, P, OK_BUF, 10), R(chmod, P, 0600),
    R(chown, P, -1, -1), R(truncate, P, 1), R(utimensat, AT_FDCWD, P, 0, 0),
    {"utimensat times", SYS_utimensat, {AT_FDCWD, OK_PATH, P, 0}}, R(mknod, P, S_IFIFO, 0), R(getcwd, P, 4096),
    R(getdents64, 1008, P, 4096), R(pipe, P), R(pipe2, P, 0), R(poll, P, 1, 0), R(ppoll, P, 1, OK_BUF, 0, 8),
    {"ppoll time", SYS_ppoll, {OK_BUF, 0, P, 0, 8}}, {"ppoll mask", SYS_ppoll, {OK_BUF, 0, OK_BUF, P, 8}},
    R(select, 5, P, 0, 0, OK_BUF), {"select time", SYS_select, {0, 0, 0, 0, P}}, {"pselect mask", SYS_pselect6, {0, 0, 0, 0, OK_BUF, P}},
    R(epoll_ctl, 1005, EPOLL_CTL_ADD, 1001, P), R(epoll_wait, 1005, P, 4, 0), {"epoll_pwait mask", SYS_epoll_pwait, {1005, OK_BUF, 4, 0, P, 8}},
    R(socketpair, AF_UNIX, SOCK_STREAM, 0, P), R(bind, 1004, P, 110), R(connect, 1004, P, 110), R(getsockname, 1003, P, OK_BUF),
    {"getsockname len", SYS_getsockname, {1003, OK_BUF, P}}, R(getsockopt, 1003, SOL_SOCKET, SO_TYPE, P, OK_BUF),
    {"getsockopt len", SYS_getsockopt, {1003, SOL_SOCKET, SO_TYPE, OK_BUF, P}}, R(setsockopt, 1003, SOL_SOCKET, SO_RCVBUF, P, 4),
    R(sendto, 1003, P, 8, MSG_DONTWAIT, 0, 0), R(recvfrom, 1003, P, 8, MSG_DONTWAIT, 0, 0),
    {"sendto address", SYS_sendto, {1004, OK_BUF, 8, MSG_DONTWAIT, P, 110}}, R(sendmsg, 1003, P, MSG_DONTWAIT), R(recvmsg, 1003, P, MSG_DONTWAIT),
    R(sendmmsg, 1003, P, 1, MSG_DONTWAIT), R(recvmmsg, 1003, P, 1, MSG_DONTWAIT, 0), R(accept, 1003, P, OK_BUF),
    {"fcntl F_SETLK", SYS_fcntl, {1000, F_SETLK, P}}, {"fcntl F_GETLK", SYS_fcntl, {1000, F_GETLK, P}}, {"ioctl FIONREAD", SYS_ioctl, {1001, FIONREAD, P}},
    {"ioctl FIONBIO", SYS_ioctl, {1001, FIONBIO, P}}, {"ioctl TCGETS", SYS_ioctl, {1009, 0x5401, P}}, {"ioctl TCSETS", SYS_ioctl, {1009, 0x5402, P}},
    {"ioctl TIOCGWINSZ", SYS_ioctl, {1009, TIOCGWINSZ, P}}, R(uname, P), R(gettimeofday, P, 0), R(clock_gettime, 0, P), R(clock_getres, 0, P),
    R(times, P), R(sysinfo, P), R(getrusage, 0, P), R(getrlimit, RLIMIT_CORE, P), R(setrlimit, RLIMIT_CORE, P), R(prlimit64, 0, RLIMIT_CORE, 0, P),
    R(nanosleep, P, 0), R(clock_nanosleep, 0, 0, P, 0), R(wait4, -1, P, 0, 0), {"wait4 usage", SYS_wait4, {-1, 0, 0, P}}, R(waitid, P_ALL, 0, P, WEXITED, 0),
    R(rt_sigaction, SIGUSR1, P, 0, 8), {"rt_sigaction old", SYS_rt_sigaction, {SIGUSR1, 0, P, 8}}, R(rt_sigprocmask, SIG_BLOCK, P, 0, 8),
    {"rt_sigprocmask old", SYS_rt_sigprocmask, {SIG_BLOCK, 0, P, 8}}, R(rt_sigpending, P, 8), R(rt_sigtimedwait, P, 0, OK_BUF, 8),
    R(rt_sigsuspend, P, 8), R(rt_sigqueueinfo, 0, SIGUSR1, P), R(sigaltstack, P, 0), {"sigaltstack old", SYS_sigaltstack, {0, P}},
    R(signalfd4, -1, P, 8, 0), R(timerfd_settime, 1006, 0, P, 0), R(timerfd_gettime, 1006, P), R(timer_create, CLOCK_MONOTONIC, P, OK_BUF),
    {"timer_create id", SYS_timer_create, {CLOCK_MONOTONIC, 0, P}}, R(setitimer, 0, P, 0), R(getitimer, 0, P), R(futex, P, 0, 0, OK_BUF),
    {"futex wake", SYS_futex, {P, 1, 1}}, {"futex time", SYS_futex, {OK_BUF, 0, 0, P}}, R(getgroups, 64, P), R(getresuid, P, OK_BUF, OK_BUF),
    R(sched_getaffinity, 0, 128, P), R(sched_setaffinity, 0, 8, P), R(sched_getparam, 0, P), R(sched_setscheduler, 0, 0, P),
    {"prctl PR_SET_NAME", SYS_prctl, {PR_SET_NAME, P}}, {"prctl PR_GET_NAME", SYS_prctl, {PR_GET_NAME, P}},
    {"prctl PR_GET_PDEATHSIG", SYS_prctl, {PR_GET_PDEATHSIG, P}}, {"arch_prctl ARCH_GET_FS", SYS_arch_prctl, {0x1003, P}}, R(getrandom, P, 16, 0),
    R(memfd_create, P, 0), R(inotify_add_watch, 1010, P, 1), R(getxattr, OK_PATH, P, OK_BUF, 10), R(setxattr, OK_PATH, P, OK_BUF, 4, 0),
    R(listxattr, P, OK_BUF, 10), R(copy_file_range, 1000, P, 1000, 0, 4, 0), R(splice, 1000, P, 1002, 0, 4, 0), R(sendfile, 1003, 1000, P, 4),
    R(execve, P, OK_BUF, 0), R(mincore, P, 4096, OK_BUF), R(get_robust_list, 0, P, OK_BUF), R(getcpu, P, 0, 0), R(process_vm_readv, 0, P, 1, OK_BUF, 1, 0),
    R(semctl, 0x3fffff, 0, 2, P), R(shmctl, 0x3fffff, IPC_STAT, P), R(msgsnd, 0x3fffff, P, 4, 0), R(name_to_handle_at, AT_FDCWD, OK_PATH, P, OK_BUF, 0),
    R(time, P), R(umask, 022), R(pidfd_send_signal, 1000, SIGUSR1, P, 0), R(sched_rr_get_interval, 0, P), R(capget, P, 0),
    R(mq_open, P, 0), R(eventfd2, 0, 0), R(vmsplice, 1002, P, 1, 0), R(close_range, 5000, 5001, 0), R(brk, 0x10),
};
#undef R

/* What a pointer can be wrong with. Each takes up its own line of the output. */
static long bad[6];
static const char *kinds[6] = {"null page", "kernel", "no access", "read only", "straddles", "not canonical"};

int main(void) {
    long page = sysconf(_SC_PAGESIZE);
    char *m = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(m, 0, 4 * page);
    CHECK(mprotect(m + page, page, PROT_NONE) == 0);
    CHECK(mprotect(m + 2 * page, page, PROT_READ) == 0);
    bad[0] = 0x10;
    bad[1] = (long)0xffffffff80000000;
    bad[2] = (long)m + page;
    bad[3] = (long)m + 2 * page;
    bad[4] = (long)m + page - 3;
    bad[5] = 0x0800000000000000;
    file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(file >= 0 && write(file, "some content", 12) == 12 && lseek(file, 0, SEEK_SET) == 0);
    int p[2], s[2];
    CHECK(pipe2(p, O_NONBLOCK) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, s) == 0);
    CHECK(write(p[1], "0123456789", 10) == 10);
    CHECK(write(s[1], "0123456789", 10) == 10);
    pipe_r = p[0], pipe_w = p[1], sock = s[0];
    dgram = socket(AF_UNIX, SOCK_DGRAM, 0);
    ep = epoll_create1(0);
    tfd = timerfd_create(CLOCK_MONOTONIC, 0);
    evfd = eventfd(0, EFD_NONBLOCK);
    dir = open(".", O_RDONLY | O_DIRECTORY);
    tty = posix_openpt(O_RDWR | O_NOCTTY);
    ino = inotify_init();
    int map[] = {file, pipe_r, pipe_w, sock, dgram, ep, tfd, evfd, dir, tty, ino};

    int died = 0;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int out[2];
        CHECK(pipe(out) == 0);
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            struct rlimit none = {0, 0};
            setrlimit(RLIMIT_CORE, &none);
            for (int k = 0; k < 6; k++) {
                memset(room, 0, sizeof room);
                long a[6];
                for (int j = 0; j < 6; j++) {
                    long v = rows[i].a[j];
                    a[j] = v == P ? bad[k] : v == OK_PATH ? (long)path : v == OK_BUF ? (long)room : v;
                    if (v >= 1000 && v <= 1010 && j <= 2)
                        a[j] = map[v - 1000];
                }
                if (rows[i].nr == SYS_rt_sigqueueinfo || rows[i].nr == SYS_process_vm_readv)
                    a[0] = getpid();
                setitimer(ITIMER_REAL, &(struct itimerval){{0, 0}, {1, 0}}, NULL);
                errno = 0;
                long r = syscall(rows[i].nr, a[0], a[1], a[2], a[3], a[4], a[5]);
                dprintf(out[1], " %s", r == -1 ? strerrorname_np(errno) : "ok");
            }
            _exit(0);
        }
        close(out[1]);
        char text[200] = "";
        size_t have = 0;
        ssize_t n;
        while ((n = read(out[0], text + have, sizeof text - 1 - have)) > 0)
            have += n;
        close(out[0]);
        int status = status_of(pid);
        say("%s:%s", rows[i].name, text);
        if (status)
            say(" (ends with %#x)", status), died++;
        say("\n");
    }
    EQ(lseek(file, 0, SEEK_CUR) >= 0, 1);
    say("%s ... %s; died %d\n", kinds[0], kinds[5], died);
    return 0;
}
