/* Transfers far above what fits into one message: files, pipes, vectors. */
#include "guest.h"

enum { SIZE = 64 << 20 };

static uint64_t sum(const unsigned char *p, size_t n) {
    uint64_t h = 1469598103934665603ull;
    for (size_t i = 0; i + 8 <= n; i += 8) {
        uint64_t w;
        memcpy(&w, p + i, 8);
        h = (h ^ w) * 1099511628211ull;
    }
    return h;
}

int main(void) {
    unsigned char *a = malloc(SIZE), *b = malloc(SIZE);
    CHECK(a && b);
    uint64_t state = 88172645463325252ull;
    for (size_t i = 0; i < SIZE; i += 8) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        memcpy(a + i, &state, 8);
    }
    int fd = open("big", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0);
    EQ(write(fd, a, SIZE), SIZE);
    EQ(lseek(fd, 0, SEEK_CUR), SIZE);
    EQ(pread(fd, b, SIZE, 0), SIZE);
    EQ(memcmp(a, b, SIZE), 0);
    say("%016llx\n", (unsigned long long)sum(b, SIZE));
    memset(b, 0, SIZE);
    CHECK(lseek(fd, 0, SEEK_SET) == 0);
    /* a read that ends with the file, into an odd place */
    EQ(lseek(fd, 12345, SEEK_SET), 12345);
    EQ(read(fd, b + 1, SIZE - 1), SIZE - 12345);
    EQ(memcmp(a + 12345, b + 1, SIZE - 12345), 0);
    struct iovec v[1000];
    size_t at = 0;
    for (int i = 0; i < 1000; i++) {
        v[i] = (struct iovec){a + at, (i * 37) % 20000};
        at += v[i].iov_len;
    }
    CHECK(lseek(fd, 0, SEEK_SET) == 0);
    EQ(writev(fd, v, 1000), at);
    memset(b, 0, at);
    for (size_t i = 0, done = 0; i < 1000; i++) {
        v[i].iov_base = b + done;
        done += v[i].iov_len;
    }
    EQ(preadv(fd, v, 1000, 0), at);
    EQ(memcmp(a, b, at), 0);
    say("vectors of %zu\n", at);

    int p[2];
    CHECK(pipe(p) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        close(p[0]);
        EQ(write(p[1], a, SIZE), SIZE); /* blocks until all of it has been taken */
        _exit(0);
    }
    close(p[1]);
    size_t got = 0;
    ssize_t n;
    while ((n = read(p[0], b + got, SIZE - got)) > 0)
        got += n;
    EQ(got, SIZE);
    EQ(memcmp(a, b, SIZE), 0);
    ends_with(pid, 0);
    int s[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, s) == 0);
    if ((pid = fork()) == 0) {
        close(s[0]);
        EQ(send(s[1], a, 8 << 20, 0), 8 << 20);
        _exit(0);
    }
    close(s[1]);
    memset(b, 0, 8 << 20);
    EQ(recv(s[0], b, 8 << 20, MSG_WAITALL), 8 << 20);
    EQ(memcmp(a, b, 8 << 20), 0);
    ends_with(pid, 0);
    CHECK(unlink("big") == 0);
    say("streams\n");
    return 0;
}
