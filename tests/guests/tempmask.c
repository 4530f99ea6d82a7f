/* Temporary masks: ppoll, pselect, epoll_pwait, sigsuspend; signalfd and sigwaitinfo. */
#include "guest.h"
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <ucontext.h>

static volatile int count, mask_inside, mask_after;

static void handler(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)info;
    sigset_t now_blocked;
    sigprocmask(SIG_SETMASK, NULL, &now_blocked);
    mask_inside = sigismember(&now_blocked, SIGUSR1) | sigismember(&now_blocked, SIGUSR2) << 1;
    sigset_t *saved = &((ucontext_t *)context)->uc_sigmask;
    mask_after = sigismember(saved, SIGUSR1) | sigismember(saved, SIGUSR2) << 1;
    count++;
}

static pid_t parent;
static pid_t kicker(void) {
    pid_t pid = fork();
    if (pid == 0) {
        until_state(parent, 'S');
        sleep_ms(10);
        kill(parent, SIGUSR1);
        _exit(0);
    }
    return pid;
}

int main(void) {
    parent = getpid();
    sigset_t block, none, old;
    sigemptyset(&none);
    sigemptyset(&block);
    sigaddset(&block, SIGUSR1);
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_sigaction = handler;
    a.sa_flags = SA_SIGINFO | SA_RESTART;
    CHECK(sigaction(SIGUSR1, &a, NULL) == 0);
    CHECK(sigprocmask(SIG_BLOCK, &block, NULL) == 0);
    sigset_t temp;
    sigemptyset(&temp);
    sigaddset(&temp, SIGUSR2);

    int fds[2];
    CHECK(pipe(fds) == 0);
    struct pollfd p = {fds[0], POLLIN, 0};
    int ep = epoll_create1(0);
    struct epoll_event ev = {.events = EPOLLIN};
    CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, fds[0], &ev) == 0);
    struct timespec ten = {10, 0};
    for (int which = 0; which < 4; which++)
        for (int early = 0; early < 2; early++) {
            count = 0, mask_inside = mask_after = -1;
            pid_t pid = 0;
            if (early)
                raise(SIGUSR1);
            else
                pid = kicker();
            EQ(count, 0);
            fd_set set;
            FD_ZERO(&set);
            FD_SET(fds[0], &set);
            long r = 0;
            errno = 0;
            switch (which) {
            case 0: r = ppoll(&p, 1, &ten, &temp); break;
            case 1: r = pselect(fds[0] + 1, &set, NULL, NULL, &ten, &temp); break;
            case 2: r = epoll_pwait(ep, &ev, 1, 10000, &temp); break;
            case 3: r = sigsuspend(&temp); break;
            }
            int e = errno;
            CHECK(sigprocmask(SIG_SETMASK, NULL, &old) == 0);
            say("%d %s: %ld %s, handled %d, inside %d, after %d, now %d\n", which, early ? "pending" : "later", r,
                strerrorname_np(e), count, mask_inside, mask_after, sigismember(&old, SIGUSR1));
            if (pid)
                ends_with(pid, 0);
        }

    /* a ready descriptor wins, and the signal stays pending */
    give(fds[1]);
    raise(SIGUSR1);
    count = 0;
    int r = ppoll(&p, 1, &ten, &temp);
    say("ready: %d, handled %d\n", r, count);
    CHECK(sigprocmask(SIG_SETMASK, &none, NULL) == 0);
    EQ(count, 1);
    CHECK(sigprocmask(SIG_BLOCK, &block, NULL) == 0);
    /* a timeout */
    take(fds[0]);
    struct timespec t = {0, 30000000};
    double start = now();
    EQ(ppoll(&p, 1, &t, &none), 0);
    CHECK(now() - start >= 0.029);

    /* signals as data */
    int sfd = signalfd(-1, &block, SFD_CLOEXEC);
    CHECK(sfd >= 0);
    pid_t pid = kicker();
    struct signalfd_siginfo si;
    EQ(read(sfd, &si, sizeof si), sizeof si);
    EQ(si.ssi_signo, SIGUSR1);
    EQ(si.ssi_pid, pid);
    ends_with(pid, 0);
    pid = kicker();
    siginfo_t info;
    EQ(sigwaitinfo(&block, &info), SIGUSR1);
    EQ(info.si_pid, pid);
    EQ(info.si_code, SI_USER);
    ends_with(pid, 0);
    t.tv_sec = 0;
    FAILS(sigtimedwait(&block, &info, &t), EAGAIN);
    EQ(sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 5}), 0);
    int sig;
    EQ(sigwait(&block, &sig), 0);
    EQ(sig, SIGUSR1);
    say("signals as data\n");
    return 0;
}
