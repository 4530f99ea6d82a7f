/* Ten thousand open descriptors. */
#include "guest.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>

enum { MANY = 10000 };
static int fds[MANY];
static struct pollfd polled[MANY];

int main(void) {
    struct rlimit l;
    CHECK(getrlimit(RLIMIT_NOFILE, &l) == 0);
    if (l.rlim_cur < MANY + 100) {
        l.rlim_cur = MANY + 100;
        if (l.rlim_max < l.rlim_cur)
            l.rlim_max = l.rlim_cur;
        CHECK(setrlimit(RLIMIT_NOFILE, &l) == 0);
    }
    int ep = epoll_create1(0);
    for (int i = 0; i < MANY; i++) {
        fds[i] = eventfd(i % 1000 == 7, EFD_NONBLOCK);
        CHECK(fds[i] >= 0);
        polled[i] = (struct pollfd){fds[i], POLLIN, 0};
        struct epoll_event e = {.events = EPOLLIN, .data.u32 = i};
        CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, fds[i], &e) == 0);
    }
    EQ(poll(polled, MANY, 0), 10);
    for (int i = 0; i < MANY; i++)
        EQ(polled[i].revents, i % 1000 == 7 ? POLLIN : 0);
    struct epoll_event out[64];
    EQ(epoll_wait(ep, out, 64, 0), 10);
    pid_t pid = fork();
    if (pid == 0) {
        uint64_t v = 1;
        EQ(write(fds[9999], &v, 8), 8);
        _exit(0);
    }
    ends_with(pid, 0);
    EQ(poll(polled, MANY, 0), 11);
    if ((pid = fork()) == 0) {
        execl("/bin/sh", "sh", "-c", "ls /proc/self/fd | wc -l", (char *)NULL);
        _exit(98);
    }
    ends_with(pid, 0);
    for (int i = 0; i < MANY; i += 2)
        close(fds[i]);
    EQ(dup(0), fds[0]);
    say("many\n");
    return 0;
}
