/* Which calls a handled signal interrupts, and which go on. Each call is made by a child that waits in it when the signal
 * comes: once with SA_RESTART and once without. */
#include "guest.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <linux/futex.h>

static int pipefd[2], sock[2], epfd, evfd, tfd, listener, lockfd, flockfd, msgq, semid, ino;
static int futex_word;


static char buffer[64];
static struct timespec second_5 = {5, 0};
static struct pollfd pfd;
static struct epoll_event event;
static siginfo_t info;

static long call_read_pipe(void) { return read(pipefd[0], buffer, 1); }
static long call_readv_pipe(void) { return readv(pipefd[0], &(struct iovec){buffer, 1}, 1); }
static long call_recv(void) { return recv(sock[0], buffer, 1, 0); }
static long call_recvmsg(void) {
    struct iovec v = {buffer, 1};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1};
    return recvmsg(sock[0], &m, 0);
}
static long call_recv_timeout(void) {
    struct timeval t = {5, 0};
    setsockopt(sock[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    return recv(sock[0], buffer, 1, 0);
}
static long call_accept(void) { return accept(listener, NULL, NULL); }
static long call_poll(void) {
    pfd.fd = pipefd[0], pfd.events = POLLIN;
    return poll(&pfd, 1, 5000);
}
static long call_ppoll(void) {
    pfd.fd = pipefd[0], pfd.events = POLLIN;
    return ppoll(&pfd, 1, &second_5, NULL);
}
static long call_select(void) {
    fd_set s;
    FD_ZERO(&s);
    FD_SET(pipefd[0], &s);
    struct timeval t = {5, 0};
    return select(pipefd[0] + 1, &s, NULL, NULL, &t);
}
static long call_pselect(void) {
    fd_set s;
    FD_ZERO(&s);
    FD_SET(pipefd[0], &s);
    return pselect(pipefd[0] + 1, &s, NULL, NULL, &second_5, NULL);
}
static long call_epoll_wait(void) { return epoll_wait(epfd, &event, 1, 5000); }
static long call_epoll_pwait(void) { return epoll_pwait(epfd, &event, 1, 5000, NULL); }
static long call_eventfd(void) { return read(evfd, buffer, 8); }
static long call_timerfd(void) { return read(tfd, buffer, 8); }
static long call_inotify(void) { return read(ino, buffer, sizeof buffer); }
static long call_nanosleep(void) {
    struct timespec rem = {9, 9}, t = {3, 0};
    long r = nanosleep(&t, &rem);
    if (r < 0 && errno == EINTR && !(rem.tv_sec < 3 && (rem.tv_sec || rem.tv_nsec)))
        errno = EBADMSG;
    return r;
}
static long call_clock_abs(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += 3;
    int e = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
    errno = e;
    return e ? -1 : 0;
}
static long call_pause(void) { return pause(); }
static long call_sigsuspend(void) {
    sigset_t none;
    sigemptyset(&none);
    return sigsuspend(&none);
}
static long call_sigtimedwait(void) {
    sigset_t other;
    sigemptyset(&other);
    sigaddset(&other, SIGUSR2);
    return sigtimedwait(&other, &info, &second_5);
}
static long call_wait(void) { return wait(NULL); }
static long call_waitid(void) { return waitid(P_ALL, 0, &info, WEXITED); }
static long call_flock(void) { return flock(flockfd, LOCK_EX); }
static long call_setlkw(void) {
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    return fcntl(lockfd, F_SETLKW, &l);
}
static long call_msgrcv(void) { return msgrcv(msgq, buffer, 8, 0, 0); }
static long call_semop(void) { return semop(semid, &(struct sembuf){0, -1, 0}, 1); }
static long call_futex(void) { return syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, NULL, NULL, 0); }
static long call_futex_timed(void) { return syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, &second_5, NULL, 0); }
static long call_open_fifo(void) { return open("fifo", O_RDONLY); }
static long call_write_pipe(void) {
    static char big[1 << 20];
    return write(pipefd[1], big, sizeof big) > 0 ? 1 : -1;
}

struct call {
    const char *name;
    long (*f)(void);
} calls[] = {
#define C(n) {#n, call_##n}
    C(read_pipe), C(readv_pipe), C(recv),      C(recvmsg),     C(recv_timeout), C(accept),
    C(poll),      C(ppoll),      C(select),    C(pselect),     C(epoll_wait),   C(epoll_pwait),
    C(eventfd),   C(timerfd),    C(inotify),   C(nanosleep),   C(clock_abs),    C(pause),
    C(sigsuspend), C(sigtimedwait), C(wait),   C(waitid),      C(flock),        C(setlkw),
    C(msgrcv),    C(semop),      C(futex),     C(futex_timed), C(open_fifo),    C(write_pipe),
};

static volatile int handled;
static void handler(int sig) {
    (void)sig;
    handled++;
}

/* Whether the child is asleep in a call (and not on its way there). */
static void until_asleep(pid_t pid) {
    int seen = 0;
    for (int i = 0; i < 20000 && seen < 5; i++) {
        char s = state_of(pid);
        seen = s == 'S' || s == 'D' ? seen + 1 : 0;
        sleep_ms(2);
    }
}

int main(void) {
    CHECK(mkfifo("fifo", 0600) == 0);
    flockfd = open("locked", O_RDWR | O_CREAT, 0600);
    int holder = open("locked", O_RDWR);
    CHECK(flock(holder, LOCK_EX) == 0);
    lockfd = open("locked2", O_RDWR | O_CREAT, 0600);
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    CHECK(fcntl(lockfd, F_SETLK, &l) == 0);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        for (int restart = 0; restart < 2; restart++) {
            CHECK(pipe(pipefd) == 0);
            CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sock) == 0);
            CHECK((epfd = epoll_create1(0)) >= 0);
            event.events = EPOLLIN;
            CHECK(epoll_ctl(epfd, EPOLL_CTL_ADD, pipefd[0], &event) == 0);
            CHECK((evfd = eventfd(0, 0)) >= 0);
            CHECK((tfd = timerfd_create(CLOCK_MONOTONIC, 0)) >= 0);
            CHECK((ino = inotify_init1(0)) >= 0);
            CHECK((listener = socket(AF_UNIX, SOCK_STREAM, 0)) >= 0);
            struct sockaddr_un auto_bind = {.sun_family = AF_UNIX};
            CHECK(bind(listener, (struct sockaddr *)&auto_bind, sizeof auto_bind.sun_family) == 0);
            CHECK(listen(listener, 5) == 0);
            CHECK((msgq = msgget(IPC_PRIVATE, 0600)) >= 0);
            CHECK((semid = semget(IPC_PRIVATE, 1, 0600)) >= 0);
            int answer[2];
            CHECK(pipe(answer) == 0);
            pid_t pid = fork();
            CHECK(pid >= 0);
            if (pid == 0) {
                pid_t grandchild = 0;
                if (!strncmp(calls[i].name, "wait", 4) && (grandchild = fork()) == 0) {
                    prctl(PR_SET_PDEATHSIG, SIGKILL);
                    for (;;)
                        pause();
                }
                handle(SIGUSR1, handler, restart ? SA_RESTART : 0);
                give(answer[1]);
                errno = 0;
                long r = calls[i].f();
                int e = errno;
                dprintf(answer[1], "%ld %s", r, r == -1 ? strerrorname_np(e) : "-");
                if (grandchild)
                    kill(grandchild, SIGKILL);
                _exit(handled);
            }
            close(answer[1]);
            take(answer[0]);
            until_asleep(pid);
            CHECK(kill(pid, SIGUSR1) == 0);
            struct pollfd p = {answer[0], POLLIN, 0};
            char text[64] = "goes on";
            if (poll(&p, 1, 300) == 1) {
                ssize_t n = read(answer[0], text, sizeof text - 1);
                CHECK(n >= 0);
                text[n] = 0;
                ends_with(pid, 1);
            } else {
                kill(pid, SIGKILL);
                dies_of(pid, SIGKILL);
            }
            say("%s %s: %s\n", calls[i].name, restart ? "with SA_RESTART" : "without", text);
            close(answer[0]);
            close(pipefd[0]), close(pipefd[1]), close(sock[0]), close(sock[1]), close(epfd), close(evfd), close(tfd);
            close(listener), close(ino);
            msgctl(msgq, IPC_RMID, NULL);
            semctl(semid, 0, IPC_RMID);
        }
    return 0;
}
