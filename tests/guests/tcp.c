/* TCP and UDP over the loopback interface. */
#include "guest.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>

static struct sockaddr_in local(int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    return a;
}

int main(void) {
    char buf[70000];
    int l = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(l >= 0);
    int on = 1;
    CHECK(setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0);
    struct sockaddr_in a = local(0);
    socklen_t len = sizeof a;
    CHECK(bind(l, (struct sockaddr *)&a, len) == 0);
    CHECK(listen(l, 10) == 0);
    CHECK(getsockname(l, (struct sockaddr *)&a, &len) == 0);
    EQ(len, sizeof a);
    CHECK(ntohs(a.sin_port) > 0);

    pid_t pid = fork();
    if (pid == 0) {
        int s = socket(AF_INET, SOCK_STREAM, 0);
        CHECK(connect(s, (struct sockaddr *)&a, sizeof a) == 0);
        CHECK(setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0);
        EQ(send(s, "hello", 5, 0), 5);
        EQ(recv(s, buf, 10, MSG_WAITALL), 10);
        CHECK(!memcmp(buf, "0123456789", 10));
        int fd = open("sent", O_RDWR | O_CREAT | O_TRUNC, 0600);
        CHECK(ftruncate(fd, 3 << 20) == 0);
        off_t off = 0;
        while (off < 3 << 20)
            CHECK(sendfile(s, fd, &off, (3 << 20) - off) > 0);
        CHECK(shutdown(s, SHUT_WR) == 0);
        EQ(recv(s, buf, 10, 0), 0);
        _exit(0);
    }
    struct sockaddr_in peer;
    len = sizeof peer;
    int c = accept4(l, (struct sockaddr *)&peer, &len, SOCK_CLOEXEC);
    CHECK(c >= 0);
    EQ(peer.sin_addr.s_addr, htonl(INADDR_LOOPBACK));
    EQ(recv(c, buf, 100, 0), 5);
    EQ(send(c, "01234", 5, MSG_MORE), 5);
    sleep_ms(5);
    EQ(send(c, "56789", 5, 0), 5);
    long total = 0;
    ssize_t n;
    while ((n = recv(c, buf, sizeof buf, 0)) > 0)
        total += n;
    EQ(total, 3 << 20);
    close(c);
    ends_with(pid, 0);
    say("stream\n");

    /* a connection without waiting */
    int s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    int r = connect(s, (struct sockaddr *)&a, sizeof a), e_connect = errno;
    CHECK(r == 0 || e_connect == EINPROGRESS);
    struct pollfd p = {s, POLLOUT, 0};
    EQ(poll(&p, 1, 5000), 1);
    int error = -1;
    len = sizeof error;
    CHECK(getsockopt(s, SOL_SOCKET, SO_ERROR, &error, &len) == 0);
    EQ(error, 0);
    c = accept(l, NULL, NULL);
    /* reset */
    struct linger linger = {1, 0};
    CHECK(setsockopt(c, SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0);
    close(c);
    p.events = POLLIN;
    EQ(poll(&p, 1, 5000), 1);
    FAILS(recv(s, buf, 1, 0), ECONNRESET);
    close(s);
    /* a closed port */
    struct sockaddr_in closed = a;
    close(l);
    s = socket(AF_INET, SOCK_STREAM, 0);
    FAILS(connect(s, (struct sockaddr *)&closed, sizeof closed), ECONNREFUSED);
    FAILS(send(s, "x", 1, MSG_NOSIGNAL), EPIPE);
    close(s);
    s = socket(AF_INET, SOCK_STREAM, 0);
    FAILS(getpeername(s, (struct sockaddr *)&peer, &(socklen_t){sizeof peer}), ENOTCONN);
    FAILS(setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, 1), EINVAL);
    FAILS(getsockopt(s, 4711, 1, &error, &len), EOPNOTSUPP);
    struct timeval t = {0, 30000};
    int d = socket(AF_INET, SOCK_DGRAM, 0), e = socket(AF_INET, SOCK_DGRAM, 0);
    struct sockaddr_in da = local(0);
    len = sizeof da;
    CHECK(bind(d, (struct sockaddr *)&da, len) == 0);
    CHECK(getsockname(d, (struct sockaddr *)&da, &len) == 0);
    CHECK(setsockopt(d, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t) == 0);
    double start = now();
    FAILS(recv(d, buf, 1, 0), EAGAIN);
    /* It is counted in whole ticks, of which the first has begun already. */
    CHECK(now() - start >= 0.02);
    EQ(sendto(e, buf, 60000, 0, (struct sockaddr *)&da, len), 60000);
    EQ(recvfrom(d, buf, sizeof buf, 0, (struct sockaddr *)&peer, &len), 60000);
    EQ(sendto(d, "", 0, 0, (struct sockaddr *)&peer, len), 0);
    EQ(recv(e, buf, 10, 0), 0);
    FAILS(sendto(e, buf, 66000, 0, (struct sockaddr *)&da, len), EMSGSIZE);
    CHECK(connect(e, (struct sockaddr *)&da, len) == 0);
    EQ(write(e, "connected", 9), 9);
    int pending;
    CHECK(ioctl(d, FIONREAD, &pending) == 0);
    EQ(pending, 9);
    EQ(read(d, buf, 100), 9);
    FAILS(socket(AF_INET, 77, 0), EINVAL);
    FAILS(socket(12345, SOCK_STREAM, 0), EAFNOSUPPORT);
    say("datagrams\n");
    int v6 = socket(AF_INET6, SOCK_STREAM, 0);
    if (v6 >= 0) {
        struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
        len = sizeof six;
        if (bind(v6, (struct sockaddr *)&six, len) == 0)
            CHECK(getsockname(v6, (struct sockaddr *)&six, &len) == 0 && len == sizeof six);
    }
    return 0;
}
