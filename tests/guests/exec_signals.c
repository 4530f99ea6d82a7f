/* Signals across an exec: what is pending reaches the new program with its siginfo, and what arrives while a program is
 * being exchanged is not lost. */
#include "guest.h"

static const char *self;

static pid_t start(const char *what, void (*before)(void)) {
    pid_t pid = fork();
    if (pid == 0) {
        if (before)
            before();
        execl(self, self, what, (char *)NULL);
        _exit(98);
    }
    return pid;
}

static sigset_t two(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGRTMIN);
    return set;
}
static int ready[2], go[2];
static void blocks(void) {
    sigset_t set = two();
    EQ(sigprocmask(SIG_BLOCK, &set, NULL), 0);
    give(ready[1]);
    take(go[0]);
}
static void never(int sig) { (void)sig, _exit(97); }
static void handles(void) {
    handle(SIGUSR2, SIG_IGN, 0);
    handle(SIGTERM, never, 0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    EQ(sigprocmask(SIG_BLOCK, &set, NULL), 0);
    EQ(raise(SIGTERM), 0);
}

/* The new program. */
static int after(const char *what) {
    sigset_t set = two();
    siginfo_t info;
    struct timespec no = {0, 0};
    if (!strcmp(what, "sleep")) {
        for (;;)
            pause();
    }
    if (!strcmp(what, "pending")) {
        EQ(sigtimedwait(&set, &info, &no), SIGUSR1);
        EQ(info.si_code, SI_USER);
        EQ(info.si_pid, getppid());
        EQ(sigtimedwait(&set, &info, &no), SIGRTMIN);
        EQ(info.si_code, SI_QUEUE);
        EQ(info.si_value.sival_int, 42);
        EQ(info.si_pid, getppid());
        FAILS(sigtimedwait(&set, &info, &no), EAGAIN);
        return 5;
    }
    /* "handled": its handler is gone, what was ignored still is */
    struct sigaction now;
    EQ(sigaction(SIGTERM, NULL, &now), 0);
    CHECK(now.sa_handler == SIG_DFL);
    EQ(sigaction(SIGUSR2, NULL, &now), 0);
    CHECK(now.sa_handler == SIG_IGN);
    sigset_t pending;
    EQ(sigpending(&pending), 0);
    EQ(sigismember(&pending, SIGTERM), 1);
    sigemptyset(&set);
    EQ(sigprocmask(SIG_SETMASK, &set, NULL), 0);
    return 96;
}

int main(int count, char **arguments) {
    if (count > 1)
        return after(arguments[1]);
    self = arguments[0];
    CHECK(pipe(ready) == 0 && pipe(go) == 0);
    pid_t pid = start("pending", blocks);
    take(ready[0]);
    EQ(kill(pid, SIGUSR1), 0);
    EQ(sigqueue(pid, SIGRTMIN, (union sigval){.sival_int = 42}), 0);
    give(go[1]);
    ends_with(pid, 5);
    say("pending\n");
    pid = start("handled", handles);
    dies_of(pid, SIGTERM);
    say("handlers\n");
    /* at any moment */
    for (int i = 0; i < 60; i++) {
        pid = start("sleep", NULL);
        struct timespec t = {0, i * 700000};
        nanosleep(&t, NULL);
        EQ(kill(pid, SIGTERM), 0);
        dies_of(pid, SIGTERM);
    }
    say("killed\n");
    return 0;
}
