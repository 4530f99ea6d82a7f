/* Deep and wide trees of processes, and storms of short ones. */
#include "guest.h"

static int descend(int level) {
    if (level == 0)
        return 0;
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0)
        _exit(descend(level - 1));
    int status = status_of(pid);
    CHECK(WIFEXITED(status));
    return WEXITSTATUS(status) + 1;
}
static int binary(int level) {
    if (level == 0)
        return 1;
    pid_t kids[2];
    for (int i = 0; i < 2; i++)
        if ((kids[i] = fork()) == 0)
            _exit(binary(level - 1));
    int sum = 0;
    for (int i = 0; i < 2; i++) {
        int status = status_of(kids[i]);
        CHECK(WIFEXITED(status));
        sum += WEXITSTATUS(status);
    }
    return sum;
}
int main(void) {
    EQ(descend(25), 25);
    say("deep\n");
    EQ(binary(5), 32);
    say("bushy\n");
    for (int i = 0; i < 100; i++) {
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
            _exit(i);
        ends_with(pid, i);
    }
    int p[2];
    CHECK(pipe(p) == 0);
    for (int i = 0; i < 60; i++)
        if (fork() == 0) {
            give(p[1]);
            _exit(0);
        }
    for (int i = 0; i < 60; i++)
        take(p[0]);
    for (int i = 0; i < 60; i++)
        CHECK(wait(NULL) > 0);
    FAILS(wait(NULL), ECHILD);
    for (int i = 0; i < 15; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            execl("/bin/true", "true", (char *)NULL);
            _exit(98);
        }
        ends_with(pid, 0);
    }
    say("wide and quick\n");
    return 0;
}
