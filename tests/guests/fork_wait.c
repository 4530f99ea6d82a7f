/* fork, and wait in all its forms. */
#include "guest.h"

int main(void) {
    for (int code = 0; code < 256; code += 51) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
            _exit(code);
        ends_with(pid, code);
    }
    FAILS(wait(NULL), ECHILD);
    FAILS(waitpid(1, NULL, 0), ECHILD);
    FAILS(waitpid(-1, NULL, 0x12345678), EINVAL);

    int signals[] = {SIGKILL, SIGTERM, SIGUSR1, SIGSEGV, SIGABRT, SIGQUIT, SIGPIPE, SIGRTMIN + 3};
    struct rlimit none = {0, 0};
    CHECK(setrlimit(RLIMIT_CORE, &none) == 0);
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            kill(getpid(), signals[i]);
            _exit(98);
        }
        int status = status_of(pid);
        CHECK(WIFSIGNALED(status));
        EQ(WTERMSIG(status), signals[i]);
        EQ(WCOREDUMP(status), 0);
    }
    say("codes and signals\n");

    /* WNOHANG, and then the end */
    int gate[2];
    CHECK(pipe(gate) == 0);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        close(gate[1]);
        char c;
        EQ(read(gate[0], &c, 1), 0);
        _exit(5);
    }
    int status = 4711;
    EQ(waitpid(pid, &status, WNOHANG), 0);
    EQ(status, 4711);
    close(gate[1]);
    siginfo_t info;
    memset(&info, 0, sizeof info);
    EQ(waitid(P_PID, pid, &info, WEXITED | WNOWAIT), 0);
    EQ(info.si_pid, pid);
    EQ(info.si_code, CLD_EXITED);
    EQ(info.si_status, 5);
    EQ(info.si_signo, SIGCHLD);
    EQ(info.si_uid, getuid());
    EQ(state_of(pid), 'Z');
    EQ(kill(pid, 0), 0);
    struct rusage usage;
    memset(&usage, 0xff, sizeof usage);
    EQ(wait4(pid, &status, 0, &usage), pid);
    EQ(WEXITSTATUS(status), 5);
    CHECK(usage.ru_maxrss >= 0 && usage.ru_utime.tv_sec >= 0 && usage.ru_utime.tv_sec < 100);
    FAILS(waitid(P_PID, pid, &info, WEXITED), ECHILD);
    close(gate[0]);
    say("nohang, nowait, rusage\n");

    /* stop and continue */
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        raise(SIGSTOP);
        _exit(6);
    }
    EQ(waitpid(pid, &status, WUNTRACED), pid);
    CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
    EQ(state_of(pid), 'T');
    EQ(waitpid(pid, &status, WUNTRACED | WNOHANG), 0);
    CHECK(kill(pid, SIGCONT) == 0);
    EQ(waitpid(pid, &status, WCONTINUED), pid);
    if (!WIFCONTINUED(status)) {
        CHECK(WIFEXITED(status));
    } else {
        ends_with(pid, 6);
    }
    say("stop and continue\n");

    /* by process group */
    pid_t a = fork();
    CHECK(a >= 0);
    if (a == 0) {
        pause();
        _exit(0);
    }
    CHECK(setpgid(a, a) == 0);
    pid_t b = fork();
    CHECK(b >= 0);
    if (b == 0)
        _exit(7);
    EQ(waitpid(0, &status, 0), b);
    EQ(waitpid(-a, &status, WNOHANG), 0);
    CHECK(kill(-a, SIGTERM) == 0);
    memset(&info, 0, sizeof info);
    EQ(waitid(P_PGID, a, &info, WEXITED), 0);
    EQ(info.si_pid, a);
    EQ(info.si_code, CLD_KILLED);
    EQ(info.si_status, SIGTERM);
    say("process groups\n");

    /* many children, any order */
    enum { MANY = 40 };
    pid_t kids[MANY];
    int seen[MANY] = {0};
    for (int i = 0; i < MANY; i++) {
        kids[i] = fork();
        CHECK(kids[i] >= 0);
        if (kids[i] == 0)
            _exit(i);
    }
    for (int i = 0; i < MANY; i++) {
        pid_t got = wait(&status);
        CHECK(got > 0 && WIFEXITED(status));
        int n = WEXITSTATUS(status);
        EQ(got, kids[n]);
        seen[n]++;
    }
    for (int i = 0; i < MANY; i++)
        EQ(seen[i], 1);
    FAILS(wait(NULL), ECHILD);

    /* a child is a copy: its memory is its own, its parent is me */
    int value = 1;
    pid_t me = getpid();
    pid = fork();
    if (pid == 0) {
        value = 2;
        EQ(getppid(), me);
        CHECK(getpid() != me);
        EQ(syscall(SYS_gettid), getpid());
        _exit(value);
    }
    ends_with(pid, 2);
    EQ(value, 1);
    struct rusage children;
    CHECK(getrusage(RUSAGE_CHILDREN, &children) == 0);
    say("copies\n");
    return 0;
}
