/* vfork: the child borrows the parent's memory and thread until it execs or ends. */
#include "guest.h"

static volatile int shared;

int main(void) {
    pid_t pid = vfork();
    CHECK(pid >= 0);
    if (pid == 0) {
        shared = 42;
        _exit(3);
    }
    EQ(shared, 42);
    ends_with(pid, 3);

    double start = now();
    pid = vfork();
    if (pid == 0) {
        execl("/bin/sh", "sh", "-c", "exit 4", (char *)NULL);
        _exit(98);
    }
    CHECK(pid > 0);
    ends_with(pid, 4);
    CHECK(now() - start < 30);

    volatile int failed = 0;
    pid = vfork();
    if (pid == 0) {
        execl("/no/such/program", "x", (char *)NULL);
        failed = errno;
        _exit(127);
    }
    ends_with(pid, 127);
    EQ(failed, ENOENT);

    for (volatile int i = 0; i < 20; i++) {
        pid = vfork();
        if (pid == 0)
            _exit(i);
        ends_with(pid, i);
    }
    pid = vfork();
    if (pid == 0) {
        kill(getpid(), SIGKILL);
        _exit(98);
    }
    dies_of(pid, SIGKILL);
    say("vfork\n");
    return 0;
}
