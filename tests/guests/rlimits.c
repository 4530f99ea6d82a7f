/* Resource limits, and what happens when they are reached. */
#include "guest.h"

static volatile int xfsz, xcpu;
static void on_limit(int sig) { sig == SIGXFSZ ? xfsz++ : xcpu++; }

static void limit(int what, rlim_t n) {
    struct rlimit l;
    CHECK(getrlimit(what, &l) == 0);
    l.rlim_cur = n;
    CHECK(setrlimit(what, &l) == 0);
}

int main(void) {
    struct rlimit l, old;
    pid_t pid = fork();
    if (pid == 0) {
        limit(RLIMIT_NOFILE, 20);
        int n = 0, fd;
        while ((fd = open("/dev/null", O_RDONLY)) >= 0)
            n = fd;
        EQ(errno, EMFILE);
        EQ(n, 19);
        int p[2];
        FAILS(pipe(p), EMFILE);
        FAILS(dup2(0, 20), EBADF);
        FAILS(socket(AF_UNIX, SOCK_STREAM, 0), EMFILE);
        close(10);
        EQ(dup(0), 10);
        _exit(0);
    }
    ends_with(pid, 0);
    say("descriptors\n");
    if ((pid = fork()) == 0) {
        limit(RLIMIT_FSIZE, 10000);
        handle(SIGXFSZ, on_limit, 0);
        int fd = open("sized", O_RDWR | O_CREAT | O_TRUNC, 0600);
        char buf[8000] = "";
        EQ(write(fd, buf, 8000), 8000);
        EQ(write(fd, buf, 8000), 2000);
        FAILS(write(fd, buf, 1), EFBIG);
        EQ(xfsz, 1);
        FAILS(ftruncate(fd, 20000), EFBIG);
        handle(SIGXFSZ, SIG_DFL, 0);
        limit(RLIMIT_CORE, 0);
        write(fd, buf, 1);
        _exit(0);
    }
    dies_of(pid, SIGXFSZ);
    say("file size\n");
    if ((pid = fork()) == 0) {
        limit(RLIMIT_AS, 200 << 20);
        void *p = mmap(NULL, 400 << 20, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        int e = errno;
        CHECK(p == MAP_FAILED);
        EQ(e, ENOMEM);
        CHECK(malloc(300 << 20) == NULL);
        CHECK(malloc(1 << 20) != NULL);
        limit(RLIMIT_DATA, 1 << 20);
        CHECK(sbrk(8 << 20) == (void *)-1);
        _exit(0);
    }
    ends_with(pid, 0);
    say("memory\n");
    if ((pid = fork()) == 0) {
        struct rlimit cpu = {1, 2};
        CHECK(setrlimit(RLIMIT_CPU, &cpu) == 0);
        limit(RLIMIT_CORE, 0);
        handle(SIGXCPU, on_limit, 0);
        for (;;)
            if (xcpu) {
                /* The limit goes by ticks, which may charge more than was used. Where it may be moved now, the clock may be another one. */
                CHECK(getenv("TRACED_AT_HOME") || clock() >= CLOCKS_PER_SEC / 2);
                _exit(66);
            }
    }
    ends_with(pid, 66);
    say("cpu time\n");
    CHECK(getrlimit(RLIMIT_NOFILE, &old) == 0);
    l = old;
    l.rlim_cur = 100;
    struct rlimit before;
    CHECK(prlimit(0, RLIMIT_NOFILE, &l, &before) == 0);
    EQ(before.rlim_cur, old.rlim_cur);
    int seen[2];
    CHECK(pipe(seen) == 0);
    if ((pid = fork()) == 0) {
        CHECK(getrlimit(RLIMIT_NOFILE, &l) == 0);
        EQ(l.rlim_cur, 100);
        EQ(write(seen[1], "", 1), 1);
        pause();
        _exit(0);
    }
    char byte;
    EQ(read(seen[0], &byte, 1), 1);
    close(seen[0]), close(seen[1]);
    l.rlim_cur = 50;
    CHECK(prlimit(pid, RLIMIT_NOFILE, &l, &before) == 0);
    EQ(before.rlim_cur, 100);
    CHECK(prlimit(pid, RLIMIT_NOFILE, NULL, &before) == 0);
    EQ(before.rlim_cur, 50);
    kill(pid, SIGKILL);
    dies_of(pid, SIGKILL);
    CHECK(setrlimit(RLIMIT_NOFILE, &old) == 0);
    l.rlim_cur = 10, l.rlim_max = 5;
    FAILS(setrlimit(RLIMIT_NOFILE, &l), EINVAL);
    FAILS(getrlimit(99, &l), EINVAL);
    FAILS(prlimit(0x3fffff, RLIMIT_NOFILE, NULL, &l), ESRCH);
    if ((pid = fork()) == 0) {
        limit(RLIMIT_SIGPENDING, 0);
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGRTMIN);
        sigprocmask(SIG_BLOCK, &set, NULL);
        FAILS(sigqueue(getpid(), SIGRTMIN, (union sigval){0}), EAGAIN);
        _exit(0);
    }
    ends_with(pid, 0);
    say("of others\n");
    return 0;
}
