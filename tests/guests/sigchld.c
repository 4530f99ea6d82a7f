/* SIGCHLD: what it tells, and how children end that nobody waits for. */
#include "guest.h"

static volatile siginfo_t last;
static volatile int count;

static void record(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)context;
    last = *info;
    count++;
}

static void until(int n) {
    sigset_t none, block, old;
    sigemptyset(&none);
    sigemptyset(&block);
    sigaddset(&block, SIGCHLD);
    sigprocmask(SIG_BLOCK, &block, &old);
    while (count < n)
        sigsuspend(&none);
    sigprocmask(SIG_SETMASK, &old, NULL);
}

static void install(int flags) {
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_sigaction = record;
    a.sa_flags = SA_SIGINFO | flags;
    CHECK(sigaction(SIGCHLD, &a, NULL) == 0);
    count = 0;
}

int main(void) {
    pid_t pid;
    install(0);
    if ((pid = fork()) == 0)
        _exit(7);
    until(1);
    EQ(last.si_code, CLD_EXITED);
    EQ(last.si_status, 7);
    EQ(last.si_pid, pid);
    EQ(last.si_uid, getuid());
    ends_with(pid, 7);
    say("exited\n");

    if ((pid = fork()) == 0) {
        pause();
        _exit(0);
    }
    CHECK(kill(pid, SIGSTOP) == 0);
    until(2);
    EQ(last.si_code, CLD_STOPPED);
    EQ(last.si_status, SIGSTOP);
    CHECK(kill(pid, SIGCONT) == 0);
    until(3);
    EQ(last.si_code, CLD_CONTINUED);
    EQ(last.si_status, SIGCONT);
    CHECK(kill(pid, SIGKILL) == 0);
    until(4);
    EQ(last.si_code, CLD_KILLED);
    EQ(last.si_status, SIGKILL);
    dies_of(pid, SIGKILL);
    say("stopped, continued, killed\n");

    install(SA_NOCLDSTOP);
    if ((pid = fork()) == 0) {
        pause();
        _exit(0);
    }
    int status;
    CHECK(kill(pid, SIGSTOP) == 0);
    EQ(waitpid(pid, &status, WUNTRACED), pid);
    EQ(count, 0);
    CHECK(kill(pid, SIGKILL) == 0);
    until(1);
    dies_of(pid, SIGKILL);
    EQ(count, 1);
    say("no stops\n");

    /* children that leave nothing */
    install(SA_NOCLDWAIT);
    if ((pid = fork()) == 0)
        _exit(3);
    until(1);
    FAILS(waitpid(pid, &status, 0), ECHILD);
    handle(SIGCHLD, SIG_IGN, 0);
    for (int i = 0; i < 10; i++)
        if (fork() == 0)
            _exit(i);
    FAILS(wait(&status), ECHILD);
    say("reaped by themselves\n");

    /* no handler: nothing is interrupted */
    handle(SIGCHLD, SIG_DFL, 0);
    int fds[2];
    CHECK(pipe(fds) == 0);
    pid_t quick = fork();
    if (quick == 0)
        _exit(0);
    if ((pid = fork()) == 0) {
        sleep_ms(100);
        give(fds[1]);
        _exit(0);
    }
    char c;
    EQ(read(fds[0], &c, 1), 1);
    ends_with(quick, 0);
    ends_with(pid, 0);
    say("undisturbed\n");
    return 0;
}
