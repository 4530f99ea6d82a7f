/* poll, select and epoll on many kinds of descriptors. */
#include "guest.h"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/select.h>

int main(void) {
    int p[2], q[2], s[2];
    CHECK(pipe(p) == 0 && pipe(q) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, s) == 0);
    int ev = eventfd(3, EFD_NONBLOCK), file = open("file", O_RDWR | O_CREAT, 0600);
    struct pollfd f[6] = {{p[0], POLLIN, -1},  {p[1], POLLOUT, -1}, {ev, POLLIN | POLLOUT, -1},
                          {file, POLLIN, -1},  {-5, POLLIN, -1},    {999, POLLIN, -1}};
    EQ(poll(f, 6, 0), 4);
    for (int i = 0; i < 6; i++)
        say("%x ", f[i].revents);
    say("\n");
    close(p[1]);
    EQ(poll(f, 1, 1000), 1);
    say("hangup %x\n", f[0].revents);
    EQ(poll(NULL, 0, 5), 0);
    close(q[0]);
    f[0] = (struct pollfd){q[1], POLLOUT, 0};
    EQ(poll(f, 1, 0), 1);
    say("error %x\n", f[0].revents);

    fd_set r, w, x;
    FD_ZERO(&r);
    FD_ZERO(&w);
    FD_ZERO(&x);
    FD_SET(s[0], &r), FD_SET(s[1], &w), FD_SET(ev, &r), FD_SET(s[0], &x);
    struct timeval t = {1, 500000};
    int n = select(FD_SETSIZE, &r, &w, &x, &t);
    EQ(n, 2);
    CHECK(!FD_ISSET(s[0], &r) && FD_ISSET(s[1], &w) && FD_ISSET(ev, &r) && !FD_ISSET(s[0], &x));
    CHECK(t.tv_sec == 1); /* Linux writes back what is left */
    FD_ZERO(&r);
    FD_SET(40, &r);
    FAILS(select(41, &r, NULL, NULL, &t), EBADF);
    FAILS(select(-1, NULL, NULL, NULL, &t), EINVAL);
    t = (struct timeval){0, 10000};
    EQ(select(0, NULL, NULL, NULL, &t), 0);
    EQ(t.tv_usec, 0);

    int ep = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event e = {.events = EPOLLIN, .data.u64 = 0x1122334455667788}, out[8];
    CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, s[0], &e) == 0);
    FAILS(epoll_ctl(ep, EPOLL_CTL_ADD, s[0], &e), EEXIST);
    FAILS(epoll_ctl(ep, EPOLL_CTL_DEL, ev, &e), ENOENT);
    FAILS(epoll_ctl(ep, EPOLL_CTL_ADD, file, &e), EPERM);
    FAILS(epoll_ctl(ep, EPOLL_CTL_ADD, 999, &e), EBADF);
    EQ(epoll_wait(ep, out, 8, 0), 0);
    EQ(write(s[1], "xy", 2), 2);
    EQ(epoll_wait(ep, out, 8, 1000), 1);
    CHECK(out[0].events == EPOLLIN && out[0].data.u64 == 0x1122334455667788);
    EQ(epoll_wait(ep, out, 8, 0), 1); /* level */
    e.events = EPOLLIN | EPOLLET;
    CHECK(epoll_ctl(ep, EPOLL_CTL_MOD, s[0], &e) == 0);
    EQ(epoll_wait(ep, out, 8, 0), 1);
    EQ(epoll_wait(ep, out, 8, 0), 0); /* edge */
    e.events = EPOLLIN | EPOLLOUT | EPOLLONESHOT;
    e.data.u32 = 2;
    CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, ev, &e) == 0);
    EQ(epoll_wait(ep, out, 8, 0), 1);
    EQ(out[0].events, EPOLLIN | EPOLLOUT);
    EQ(epoll_wait(ep, out, 8, 0), 0);
    FAILS(epoll_wait(ep, out, 0, 0), EINVAL);
    /* one in another, and a process that writes from afar */
    int outer = epoll_create1(0);
    e.events = EPOLLIN, e.data.u32 = 3;
    CHECK(epoll_ctl(outer, EPOLL_CTL_ADD, ep, &e) == 0);
    char buf[8];
    EQ(read(s[0], buf, 8), 2);
    pid_t pid = fork();
    if (pid == 0) {
        sleep_ms(20);
        give(s[1]);
        _exit(0);
    }
    EQ(epoll_wait(outer, out, 8, 5000), 1);
    EQ(out[0].data.u32, 3);
    ends_with(pid, 0);
    CHECK(epoll_ctl(ep, EPOLL_CTL_DEL, s[0], NULL) == 0);
    uint64_t v;
    EQ(read(ev, &v, 8), 8);
    EQ(v, 3);
    FAILS(read(ev, &v, 8), EAGAIN);
    FAILS(read(ev, &v, 4), EINVAL);
    struct timespec ts = {0, 5000000};
    EQ(syscall(SYS_epoll_pwait2, ep, out, 8, &ts, NULL, 8), 0);
    say("epoll\n");
    return 0;
}
