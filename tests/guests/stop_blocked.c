/* Stop signals that are blocked wait, and stop the process when they are not blocked any more; SIGCONT ends them. */
#include "guest.h"

static int to[2], from[2];

static void set_blocked(int how) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTSTP);
    EQ(sigprocmask(how, &set, NULL), 0);
}
static int pends(void) {
    sigset_t set;
    EQ(sigpending(&set), 0);
    return sigismember(&set, SIGTSTP);
}

static pid_t start(void) {
    pid_t pid = fork();
    if (pid == 0) {
        setpgid(0, 0);
        set_blocked(SIG_BLOCK);
        give(from[1]);
        take(to[0]);
        /* the signal is on its way when the question has come */
        for (int i = 0; i < 2000 && !pends(); i++)
            sleep_ms(1);
        EQ(pends(), 1);
        give(from[1]);
        take(to[0]);
        for (int i = 0; i < 100 && pends(); i++)
            sleep_ms(1);
        int still = pends();
        set_blocked(SIG_UNBLOCK);
        take(to[0]);
        _exit(still ? 1 : 2);
    }
    take(from[0]);
    EQ(kill(pid, SIGTSTP), 0);
    give(to[1]);
    take(from[0]);
    int status;
    EQ(waitpid(pid, &status, WUNTRACED | WNOHANG), 0);
    return pid;
}

int main(void) {
    CHECK(pipe(to) == 0 && pipe(from) == 0);
    int status;
    pid_t pid = start();
    give(to[1]);
    EQ(waitpid(pid, &status, WUNTRACED), pid);
    CHECK(WIFSTOPPED(status));
    EQ(WSTOPSIG(status), SIGTSTP);
    until_state(pid, 'T');
    EQ(kill(pid, SIGCONT), 0);
    give(to[1]);
    ends_with(pid, 1);
    say("waits\n");
    pid = start();
    EQ(kill(pid, SIGCONT), 0);
    give(to[1]);
    give(to[1]);
    ends_with(pid, 2);
    say("ended by SIGCONT\n");
    return 0;
}
