/* Sessions, process groups, orphans, daemons. */
#include "guest.h"
#include <sys/prctl.h>

static volatile int hup, cont;
static void on_hup(int sig) { sig == SIGHUP ? hup++ : cont++; }

int main(void) {
    int p[2], q[2];
    pid_t top = getpid();
    CHECK(pipe(p) == 0 && pipe(q) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        FAILS(setpgid(1, 0), ESRCH);
        EQ(setsid(), getpid());
        FAILS(setsid(), EPERM);
        EQ(getsid(0), getpid());
        EQ(getpgrp(), getpid());
        FAILS(open("/dev/tty", O_RDWR), ENXIO);
        FAILS(setpgid(0, 0), EPERM);
        pid_t member = fork();
        if (member == 0) {
            EQ(getpgrp(), getppid());
            EQ(setpgid(0, 0), 0);
            EQ(getpgrp(), getpid());
            EQ(getsid(0), getppid());
            _exit(1);
        }
        ends_with(member, 1);
        _exit(2);
    }
    ends_with(pid, 2);
    say("sessions\n");

    /* a signal to a whole group */
    pid_t leader = 0, kids[3];
    for (int i = 0; i < 3; i++) {
        kids[i] = fork();
        if (kids[i] == 0) {
            setpgid(0, leader);
            give(p[1]);
            for (;;)
                pause();
        }
        if (i == 0)
            leader = kids[0];
        setpgid(kids[i], leader);
        take(p[0]);
    }
    EQ(getpgid(kids[2]), leader);
    EQ(kill(-leader, SIGUSR1), 0);
    for (int i = 0; i < 3; i++)
        dies_of(kids[i], SIGUSR1);
    FAILS(kill(-leader, 0), ESRCH);
    FAILS(killpg(0x3ffff0, SIGTERM), ESRCH);
    say("groups\n");

    /* a stopped group that becomes an orphan gets SIGHUP and SIGCONT */
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
    pid = fork();
    if (pid == 0) {
        EQ(setsid(), getpid());
        pid_t grand = fork();
        if (grand == 0) {
            setpgid(0, 0);
            handle(SIGHUP, on_hup, 0);
            handle(SIGCONT, on_hup, 0);
            give(p[1]);
            raise(SIGSTOP);
            char text[3] = {'0' + hup, '0' + cont, 0};
            write(q[1], text, 2);
            _exit(0);
        }
        take(p[0]);
        until_stopped(grand);
        _exit(0);
    }
    ends_with(pid, 0);
    char text[3] = "";
    EQ(read(q[0], text, 2), 2);
    say("%s\n", text);
    pid_t orphan = wait(NULL);
    CHECK(orphan > 0);
    say("orphaned group\n");

    /* a daemon: its parent ends, it lives on with the reaper as parent */
    pid = fork();
    if (pid == 0) {
        EQ(setsid(), getpid());
        pid_t daemon = fork();
        if (daemon)
            _exit(0);
        for (int i = 0; i < 3; i++)
            close(i);
        open("/dev/null", O_RDWR);
        CHECK(dup(0) == 1 && dup(0) == 2);
        CHECK(chdir("/") == 0);
        umask(0);
        char c;
        EQ(read(q[0], &c, 1), 1);
        int ok = getppid() == top && getsid(0) != getpid();
        dprintf(p[1], "%c", ok ? 'y' : 'n');
        _exit(44);
    }
    ends_with(pid, 0);
    give(q[1]);
    EQ(read(p[0], text, 1), 1);
    EQ(text[0], 'y');
    int status;
    CHECK(wait(&status) > 0);
    EQ(WEXITSTATUS(status), 44);
    CHECK(prctl(PR_SET_CHILD_SUBREAPER, 0) == 0);
    say("daemon\n");

    /* the parent's death tells the child, if it asked */
    pid = fork();
    if (pid == 0) {
        pid_t grand = fork();
        if (grand == 0) {
            handle(SIGUSR1, SIG_DFL, 0);
            sigset_t set;
            sigemptyset(&set);
            sigaddset(&set, SIGUSR1);
            sigprocmask(SIG_BLOCK, &set, NULL);
            CHECK(prctl(PR_SET_PDEATHSIG, SIGUSR1) == 0);
            give(p[1]);
            siginfo_t info;
            struct timespec t = {10, 0};
            EQ(sigtimedwait(&set, &info, &t), SIGUSR1);
            give(p[1]);
            _exit(0);
        }
        take(p[0]);
        _exit(0);
    }
    ends_with(pid, 0);
    take(p[0]);
    say("death of a parent\n");

    /* zombies keep their number until they are waited for */
    pid = fork();
    if (pid == 0)
        _exit(1);
    until_state(pid, 'Z');
    EQ(kill(pid, SIGKILL), 0);
    EQ(getpgid(pid), getpgrp());
    ends_with(pid, 1);
    FAILS(kill(pid, 0), ESRCH);
    say("zombie\n");
    return 0;
}
