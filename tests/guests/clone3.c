/* clone3: what only it has, and what its structure can be wrong about. */
#include "guest.h"
#include <linux/sched.h>

#ifndef CLONE_CLEAR_SIGHAND
#define CLONE_CLEAR_SIGHAND 0x100000000ULL
#endif

static void handler(int s) {
    (void)s;
}

static long clone3(struct clone_args *args, size_t size) {
    return syscall(SYS_clone3, args, size);
}

/* 0: default, 1: ignored, 2: caught */
static int disposition(int s) {
    struct sigaction now;
    CHECK(sigaction(s, NULL, &now) == 0);
    return now.sa_handler == SIG_DFL ? 0 : now.sa_handler == SIG_IGN ? 1 : 2;
}

int main(void) {
    CHECK(signal(SIGUSR1, handler) != SIG_ERR);
    CHECK(signal(SIGUSR2, SIG_IGN) != SIG_ERR);
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGHUP);
    CHECK(sigprocmask(SIG_BLOCK, &blocked, NULL) == 0);

    for (int i = 0; i < 20; i++) {
        struct clone_args args = {.exit_signal = SIGCHLD, .flags = i % 2 ? CLONE_CLEAR_SIGHAND : 0};
        pid_t pid = clone3(&args, sizeof(args));
        CHECK(pid >= 0);
        if (pid == 0) {
            sigset_t now;
            CHECK(sigprocmask(SIG_BLOCK, NULL, &now) == 0);
            CHECK(sigismember(&now, SIGHUP) && !sigismember(&now, SIGTERM));
            EQ(disposition(SIGUSR2), 1);
            EQ(disposition(SIGUSR1), i % 2 ? 0 : 2);
            if (i % 2)
                raise(SIGUSR1);
            _exit(i);
        }
        if (i % 2)
            dies_of(pid, SIGUSR1);
        else
            ends_with(pid, i);
    }
    EQ(disposition(SIGUSR1), 2);
    say("dispositions\n");

    /* As posix_spawn of newer C libraries does it. */
    for (int i = 0; i < 5; i++) {
        struct clone_args args = {
            .flags = CLONE_CLEAR_SIGHAND | CLONE_VFORK, .exit_signal = SIGCHLD};
        pid_t pid = clone3(&args, sizeof(args));
        CHECK(pid >= 0);
        if (pid == 0) {
            execl("/bin/sh", "sh", "-c", "kill -USR1 $$; exit 9", (char *)NULL);
            _exit(98);
        }
        dies_of(pid, SIGUSR1);
    }
    say("programs\n");

    int pidfd = -1, tid = -1;
    struct clone_args args = {.flags = CLONE_PIDFD | CLONE_PARENT_SETTID,
                              .pidfd = (uintptr_t)&pidfd,
                              .parent_tid = (uintptr_t)&tid,
                              .exit_signal = SIGCHLD};
    pid_t pid = clone3(&args, sizeof(args));
    CHECK(pid >= 0);
    if (pid == 0)
        _exit(5);
    EQ(tid, pid);
    CHECK(pidfd >= 0 && fcntl(pidfd, F_GETFD) == FD_CLOEXEC);
    struct pollfd p = {.fd = pidfd, .events = POLLIN};
    EQ(poll(&p, 1, 10000), 1);
    siginfo_t info;
    CHECK(waitid(P_PIDFD, pidfd, &info, WEXITED) == 0);
    CHECK(info.si_pid == pid && info.si_status == 5);
    close(pidfd);
    say("descriptor\n");

    struct clone_args none = {.exit_signal = 0};
    pid = clone3(&none, sizeof(none));
    CHECK(pid >= 0);
    if (pid == 0)
        _exit(6);
    FAILS(waitpid(pid, NULL, WNOHANG), ECHILD);
    int status;
    EQ(waitpid(pid, &status, __WALL), pid);
    EQ(WEXITSTATUS(status), 6);
    say("no signal at the end\n");

    struct clone_args bad = {.exit_signal = SIGCHLD};
    FAILS(clone3(&bad, 8), EINVAL);
    FAILS(clone3(&bad, 5000), E2BIG);
    FAILS(clone3((struct clone_args *)8, sizeof(bad)), EFAULT);
    bad.exit_signal = 65;
    FAILS(clone3(&bad, sizeof(bad)), EINVAL);
    bad.exit_signal = SIGCHLD;
    bad.stack_size = 4096;
    FAILS(clone3(&bad, sizeof(bad)), EINVAL);
    bad.stack_size = 0;
    bad.flags = CLONE_THREAD;
    FAILS(clone3(&bad, sizeof(bad)), EINVAL);
    bad.exit_signal = 0;
    FAILS(clone3(&bad, sizeof(bad)), EINVAL);
    bad.flags = CLONE_CLEAR_SIGHAND | CLONE_SIGHAND | CLONE_VM;
    FAILS(clone3(&bad, sizeof(bad)), EINVAL);
    bad.flags = CLONE_PIDFD;
    bad.pidfd = 8;
    FAILS(clone3(&bad, sizeof(bad)), EFAULT);
    bad.flags = 1ULL << 50;
    FAILS(clone3(&bad, sizeof(bad)), EINVAL);
    FAILS(syscall(SYS_clone, SIGCHLD | CLONE_PIDFD | CLONE_PARENT_SETTID, 0, &pidfd, 0, 0), EINVAL);
    FAILS(syscall(SYS_clone, CLONE_THREAD, 0, 0, 0, 0), EINVAL);
    FAILS(wait(NULL), ECHILD);
    say("wrong structures\n");
    return 0;
}
