/* AF_UNIX: pairs, names, datagrams, descriptors and credentials in control messages. */
#include "guest.h"
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/un.h>

static ssize_t send_fds(int s, const char *text, const int *fds, int n, int cred) {
    char control[512];
    memset(control, 0, sizeof control);
    struct iovec v = {(char *)text, strlen(text)};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = control};
    struct cmsghdr *c = (struct cmsghdr *)control;
    size_t used = 0;
    if (n) {
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(n * sizeof(int));
        memcpy(CMSG_DATA(c), fds, n * sizeof(int));
        used += CMSG_SPACE(n * sizeof(int));
    }
    if (cred) {
        c = (struct cmsghdr *)(control + used);
        struct ucred u = {getpid(), getuid(), getgid()};
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_CREDENTIALS;
        c->cmsg_len = CMSG_LEN(sizeof u);
        memcpy(CMSG_DATA(c), &u, sizeof u);
        used += CMSG_SPACE(sizeof u);
    }
    m.msg_controllen = used;
    return sendmsg(s, &m, 0);
}

int main(void) {
    int s[2];
    char buf[4096];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s) == 0);
    EQ(send(s[0], "abc", 3, 0), 3);
    EQ(recv(s[1], buf, 2, MSG_PEEK), 2);
    EQ(recv(s[1], buf, 100, 0), 3);
    FAILS(recv(s[1], buf, 1, MSG_DONTWAIT), EAGAIN);

    /* pass a pipe, a file and a socket to a child that did not inherit them */
    int t[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, t) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        char control[512];
        struct iovec v = {buf, sizeof buf};
        struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        EQ(recvmsg(t[1], &m, MSG_CMSG_CLOEXEC), 5);
        CHECK(!memcmp(buf, "three", 5));
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        CHECK(c && c->cmsg_type == SCM_RIGHTS);
        EQ(c->cmsg_len, CMSG_LEN(3 * sizeof(int)));
        int got[3];
        memcpy(got, CMSG_DATA(c), sizeof got);
        for (int i = 0; i < 3; i++)
            EQ(fcntl(got[i], F_GETFD), FD_CLOEXEC);
        EQ(write(got[0], "via pipe", 8), 8);
        EQ(pread(got[1], buf, 100, 2), 2);
        CHECK(!memcmp(buf, "le", 2));
        EQ(lseek(got[1], 1, SEEK_SET), 1);
        EQ(send(got[2], "via socket", 10, 0), 10);
        _exit(0);
    }
    int p[2], u[2], fd = open("passed", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(pipe(p) == 0 && fd >= 0 && socketpair(AF_UNIX, SOCK_DGRAM, 0, u) == 0);
    EQ(write(fd, "file", 4), 4);
    int fds[3] = {p[1], fd, u[1]};
    EQ(send_fds(t[0], "three", fds, 3, 0), 5);
    EQ(read(p[0], buf, 100), 8);
    EQ(recv(u[0], buf, 100, 0), 10);
    ends_with(pid, 0);
    EQ(lseek(fd, 0, SEEK_CUR), 1); /* the offset is shared */
    say("descriptors\n");

    int on = 1;
    CHECK(setsockopt(t[1], SOL_SOCKET, SO_PASSCRED, &on, sizeof on) == 0);
    EQ(send_fds(t[0], "cred", NULL, 0, 1), 4);
    char control[512];
    struct iovec v = {buf, sizeof buf};
    struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    EQ(recvmsg(t[1], &m, 0), 4);
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    CHECK(c && c->cmsg_type == SCM_CREDENTIALS);
    struct ucred cred;
    memcpy(&cred, CMSG_DATA(c), sizeof cred);
    EQ(cred.pid, getpid());
    EQ(cred.uid, getuid());
    socklen_t len = sizeof cred;
    CHECK(getsockopt(t[0], SOL_SOCKET, SO_PEERCRED, &cred, &len) == 0);
    EQ(cred.pid, getpid());
    /* control data cut short */
    EQ(send_fds(t[0], "cut", fds, 3, 0), 3);
    m.msg_controllen = CMSG_LEN(sizeof(int));
    m.msg_flags = 0;
    CHECK(setsockopt(t[1], SOL_SOCKET, SO_PASSCRED, &(int){0}, sizeof on) == 0);
    EQ(recvmsg(t[1], &m, 0), 3);
    CHECK(m.msg_flags & MSG_CTRUNC);
    FAILS(send_fds(t[0], "bad", &(int){999}, 1, 0), EBADF);
    say("credentials\n");

    /* names: path, abstract, autobind */
    int l = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un a = {.sun_family = AF_UNIX, .sun_path = "sock"}, got;
    CHECK(bind(l, (struct sockaddr *)&a, sizeof a) == 0);
    CHECK(listen(l, 3) == 0);
    struct stat st;
    CHECK(stat("sock", &st) == 0 && S_ISSOCK(st.st_mode));
    int again = socket(AF_UNIX, SOCK_STREAM, 0);
    FAILS(bind(again, (struct sockaddr *)&a, sizeof a), EADDRINUSE);
    if ((pid = fork()) == 0) {
        int s = socket(AF_UNIX, SOCK_STREAM, 0);
        CHECK(connect(s, (struct sockaddr *)&a, sizeof a) == 0);
        len = sizeof got;
        CHECK(getpeername(s, (struct sockaddr *)&got, &len) == 0);
        CHECK(!strcmp(got.sun_path, "sock"));
        EQ(len, offsetof(struct sockaddr_un, sun_path) + 5);
        CHECK(getsockopt(s, SOL_SOCKET, SO_PEERCRED, &cred, &(socklen_t){sizeof cred}) == 0);
        EQ(cred.pid, getppid());
        give(s);
        take(s);
        _exit(0);
    }
    len = sizeof got;
    int conn = accept(l, (struct sockaddr *)&got, &len);
    CHECK(conn >= 0);
    EQ(len, 2);
    take(conn);
    give(conn);
    CHECK(shutdown(conn, SHUT_WR) == 0);
    EQ(recv(conn, buf, 1, 0), 0);
    ends_with(pid, 0);
    struct sockaddr_un abstract = {.sun_family = AF_UNIX};
    snprintf(abstract.sun_path + 1, 40, "guest-%d", getpid());
    socklen_t alen = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(abstract.sun_path + 1);
    int d = socket(AF_UNIX, SOCK_DGRAM, 0);
    CHECK(bind(d, (struct sockaddr *)&abstract, alen) == 0);
    int e = socket(AF_UNIX, SOCK_DGRAM, 0);
    CHECK(bind(e, (struct sockaddr *)&(struct sockaddr_un){.sun_family = AF_UNIX}, 2) == 0);
    EQ(sendto(e, "datagram", 8, 0, (struct sockaddr *)&abstract, alen), 8);
    len = sizeof got;
    EQ(recvfrom(d, buf, 4, MSG_TRUNC, (struct sockaddr *)&got, &len), 8);
    EQ(len, 8); /* autobind: a NUL and five digits */
    EQ(sendto(d, "back", 4, 0, (struct sockaddr *)&got, len), 4);
    EQ(recv(e, buf, 100, 0), 4);
    FAILS(connect(again, (struct sockaddr *)&(struct sockaddr_un){.sun_family = AF_UNIX, .sun_path = "none"}, sizeof a), ENOENT);
    int q[2];
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, q) == 0);
    EQ(send(q[0], "one", 3, 0), 3);
    EQ(send(q[0], "three", 5, 0), 5);
    EQ(recv(q[1], buf, 100, 0), 3);
    memset(&m, 0, sizeof m);
    v.iov_len = 2;
    m.msg_iov = &v, m.msg_iovlen = 1;
    EQ(recvmsg(q[1], &m, 0), 2);
    CHECK(m.msg_flags & MSG_TRUNC);
    /* many at once */
    struct mmsghdr mm[3];
    struct iovec vs[3];
    char bufs[3][16];
    memset(mm, 0, sizeof mm);
    for (int i = 0; i < 3; i++) {
        vs[i] = (struct iovec){"abcdef", i + 1};
        mm[i].msg_hdr.msg_iov = &vs[i], mm[i].msg_hdr.msg_iovlen = 1;
    }
    EQ(sendmmsg(q[0], mm, 3, 0), 3);
    for (int i = 0; i < 3; i++)
        vs[i] = (struct iovec){bufs[i], 16};
    EQ(recvmmsg(q[1], mm, 3, 0, NULL), 3);
    for (int i = 0; i < 3; i++)
        EQ(mm[i].msg_len, i + 1);
    CHECK(!memcmp(bufs[2], "abc", 3));
    say("names and kinds\n");
    int type;
    len = sizeof type;
    CHECK(getsockopt(q[0], SOL_SOCKET, SO_TYPE, &type, &len) == 0);
    EQ(type, SOCK_SEQPACKET);
    int n;
    EQ(send(s[0], "12345", 5, 0), 5);
    CHECK(ioctl(s[1], FIONREAD, &n) == 0);
    EQ(n, 5);
    handle(SIGPIPE, SIG_IGN, 0);
    close(s[1]);
    FAILS(send(s[0], "x", 1, MSG_NOSIGNAL), EPIPE);
    say("ends\n");
    return 0;
}
