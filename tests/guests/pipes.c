/* Pipes and FIFOs: amounts, ends, SIGPIPE, splice. */
#include "guest.h"
#include <sys/ioctl.h>

static volatile int piped;
static void on_pipe(int sig) {
    (void)sig;
    piped++;
}

int main(void) {
    int p[2];
    char buf[65536];
    CHECK(pipe(p) == 0);
    EQ(write(p[1], "hello", 5), 5);
    int n = 0;
    CHECK(ioctl(p[0], FIONREAD, &n) == 0);
    EQ(n, 5);
    EQ(read(p[0], buf, 2), 2);
    EQ(read(p[0], buf, 100), 3);
    EQ(read(p[0], buf, 0), 0);
    FAILS(write(p[0], "x", 1), EBADF);
    FAILS(read(p[1], buf, 1), EBADF);
    FAILS(lseek(p[0], 0, SEEK_CUR), ESPIPE);
    FAILS(pread(p[0], buf, 1, 0), ESPIPE);
    EQ(fcntl(p[1], F_GETPIPE_SZ), 65536);
    EQ(fcntl(p[1], F_SETPIPE_SZ, 4096), 4096);
    close(p[1]);
    EQ(read(p[0], buf, 1), 0);
    close(p[0]);

    CHECK(pipe2(p, O_NONBLOCK | O_CLOEXEC) == 0);
    EQ(fcntl(p[0], F_GETFD), FD_CLOEXEC);
    FAILS(read(p[0], buf, 1), EAGAIN);
    long total = 0;
    ssize_t r;
    while ((r = write(p[1], buf, 5000)) > 0)
        total += r;
    EQ(errno, EAGAIN);
    say("full after %ld\n", total);
    /* no part of a write up to PIPE_BUF when it does not fit */
    FAILS(write(p[1], buf, PIPE_BUF), EAGAIN);
    close(p[0]);
    handle(SIGPIPE, on_pipe, 0);
    FAILS(write(p[1], "x", 1), EPIPE);
    EQ(piped, 1);
    handle(SIGPIPE, SIG_IGN, 0);
    FAILS(write(p[1], "x", 1), EPIPE);
    close(p[1]);
    handle(SIGPIPE, SIG_DFL, 0);
    pid_t pid = fork();
    if (pid == 0) {
        CHECK(pipe(p) == 0);
        close(p[0]);
        write(p[1], "x", 1);
        _exit(0);
    }
    dies_of(pid, SIGPIPE);
    say("ends\n");

    /* 16 MiB from child to parent, in odd pieces */
    CHECK(pipe(p) == 0);
    enum { TOTAL = 16 << 20 };
    if ((pid = fork()) == 0) {
        close(p[0]);
        unsigned state = 1, at = 0;
        while (at < TOTAL) {
            unsigned piece = (at / 7) % sizeof buf + 1;
            if (piece > TOTAL - at)
                piece = TOTAL - at;
            for (unsigned i = 0; i < piece; i++) {
                state = state * 1103515245 + 12345;
                buf[i] = state >> 16;
            }
            for (unsigned done = 0; done < piece;) {
                r = write(p[1], buf + done, piece - done);
                CHECK(r > 0);
                done += r;
            }
            at += piece;
        }
        _exit(0);
    }
    close(p[1]);
    unsigned state = 1, at = 0, bad = 0;
    while ((r = read(p[0], buf, 1000 + at % 60000)) > 0) {
        for (int i = 0; i < r; i++) {
            state = state * 1103515245 + 12345;
            bad += buf[i] != (char)(state >> 16);
        }
        at += r;
    }
    EQ(at, TOTAL);
    EQ(bad, 0);
    ends_with(pid, 0);
    close(p[0]);
    say("16 MiB\n");

    /* vectors */
    CHECK(pipe(p) == 0);
    struct iovec out[3] = {{"ab", 2}, {"", 0}, {"cdef", 4}};
    EQ(writev(p[1], out, 3), 6);
    char a[1], b[2], c[10];
    struct iovec in[3] = {{a, 1}, {b, 2}, {c, 10}};
    EQ(readv(p[0], in, 3), 6);
    CHECK(a[0] == 'a' && !memcmp(b, "bc", 2) && !memcmp(c, "def", 3));
    FAILS(writev(p[1], out, -1), EINVAL);
    FAILS(writev(p[1], out, 1025), EINVAL);

    /* splice, tee, vmsplice */
    int q[2], fd = open("spliced", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(pipe(q) == 0 && fd >= 0);
    EQ(write(p[1], "0123456789", 10), 10);
    EQ(tee(p[0], q[1], 4, 0), 4);
    EQ(splice(p[0], NULL, fd, NULL, 10, 0), 10);
    EQ(read(q[0], buf, 100), 4);
    CHECK(!memcmp(buf, "0123", 4));
    loff_t off = 3;
    EQ(splice(fd, &off, q[1], NULL, 5, 0), 5);
    EQ(off, 8);
    EQ(read(q[0], buf, 100), 5);
    CHECK(!memcmp(buf, "34567", 5));
    EQ(vmsplice(q[1], &(struct iovec){"vm", 2}, 1, 0), 2);
    EQ(read(q[0], buf, 100), 2);
    say("splices\n");

    /* FIFO: open waits for the other end */
    CHECK(mkfifo("fifo", 0600) == 0);
    FAILS(open("fifo", O_WRONLY | O_NONBLOCK), ENXIO);
    if ((pid = fork()) == 0) {
        int w = open("fifo", O_WRONLY);
        CHECK(w >= 0);
        EQ(write(w, "through the fifo", 16), 16);
        _exit(0);
    }
    int rd = open("fifo", O_RDONLY);
    CHECK(rd >= 0);
    EQ(read(rd, buf, 100), 16);
    EQ(read(rd, buf, 100), 0);
    ends_with(pid, 0);
    say("fifo\n");
    return 0;
}
