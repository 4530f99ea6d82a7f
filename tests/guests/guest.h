/* What every guest uses. A guest prints the same text whenever it works, and ends with 0; what it checks and finds wrong
 * it tells on stderr, and ends with 99. */
#ifndef GUEST_H
#define GUEST_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define say(...) dprintf(1, __VA_ARGS__)

#define CHECK(c)                                                                                                       \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        if (!(c)) {                                                                                                    \
            int e_ = errno;                                                                                            \
            dprintf(2, "%s:%d: not so: %s (errno %d, %s)\n", __FILE__, __LINE__, #c, e_, strerror(e_));                \
            _exit(99);                                                                                                 \
        }                                                                                                              \
    } while (0)

#define EQ(a, b)                                                                                                       \
    do {                                                                                                               \
        long long a_ = (long long)(a);                                                                                 \
        int e_ = errno;                                                                                                \
        long long b_ = (long long)(b);                                                                                 \
        if (a_ != b_) {                                                                                                \
            dprintf(2, "%s:%d: %s is %lld (errno %d, %s), not %s = %lld\n", __FILE__, __LINE__, #a, a_, e_,            \
                    strerror(e_), #b, b_);                                                                             \
            _exit(99);                                                                                                 \
        }                                                                                                              \
    } while (0)

/* The call fails with that errno. */
#define FAILS(call, e)                                                                                                 \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        long long r_ = (long long)(call);                                                                              \
        int e_ = errno;                                                                                                \
        if (r_ != -1 || e_ != (e)) {                                                                                   \
            dprintf(2, "%s:%d: %s gave %lld (errno %d, %s), not %s\n", __FILE__, __LINE__, #call, r_, e_,              \
                    strerror(e_), #e);                                                                                 \
            _exit(99);                                                                                                 \
        }                                                                                                              \
    } while (0)

/* Waits for exactly this child; gives its wait status. */
__attribute__((unused)) static int status_of(pid_t pid) {
    int status = -1;
    pid_t got;
    do
        got = waitpid(pid, &status, 0);
    while (got < 0 && errno == EINTR);
    EQ(got, pid);
    return status;
}

/* The child must have ended with exit(code). */
__attribute__((unused)) static void ends_with(pid_t pid, int code) {
    int status = status_of(pid);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != code) {
        dprintf(2, "a child ended with status %#x, not exit(%d)\n", status, code);
        _exit(99);
    }
}

/* The child must have died of the signal. */
__attribute__((unused)) static void dies_of(pid_t pid, int sig) {
    int status = status_of(pid);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != sig) {
        dprintf(2, "a child ended with status %#x, not signal %d\n", status, sig);
        _exit(99);
    }
}

__attribute__((unused)) static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

__attribute__((unused)) static void sleep_ms(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&t, &t) < 0 && errno == EINTR)
        ;
}

/* Installs a handler with flags and nothing blocked. */
/* Queues each of these signals so often for a process, with the values 1, 2 and so on, and pauses after each round. */
__attribute__((unused)) static void rain_on(pid_t pid, const int *signals, int count, long rounds, long pause_ns) {
    struct timespec pause = {.tv_nsec = pause_ns};
    for (long i = 1; i <= rounds; i++) {
        for (int s = 0; s < count; s++)
            while (sigqueue(pid, signals[s], (union sigval){.sival_int = (int)i}) < 0) {
                EQ(errno, EAGAIN);
                nanosleep(&pause, NULL);
            }
        nanosleep(&pause, NULL);
    }
}

__attribute__((unused)) static void handle(int sig, void (*handler)(int), int flags) {
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_handler = handler;
    a.sa_flags = flags;
    CHECK(sigaction(sig, &a, NULL) == 0);
}

/* One byte from the pipe or socket: how guests wait for each other. */
__attribute__((unused)) static void take(int fd) {
    char c;
    ssize_t n;
    do
        n = read(fd, &c, 1);
    while (n < 0 && errno == EINTR);
    EQ(n, 1);
}

__attribute__((unused)) static void give(int fd) { EQ(write(fd, "x", 1), 1); }

/* The state letter of a process from /proc/PID/stat, or '-' when it is gone. */
__attribute__((unused)) static char state_of(pid_t pid) {
    char name[64], text[512];
    snprintf(name, sizeof name, "/proc/%d/stat", (int)pid);
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return '-';
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return '-';
    text[n] = 0;
    char *close_paren = strrchr(text, ')');
    /* A stopped process that is traced shows 't'; a job's processes always are (README, limits). */
    char state = close_paren ? close_paren[2] : '-';
    return state == 't' ? 'T' : state;
}

/* Waits until the process is in that state (a sleep that cannot be observed otherwise). */
__attribute__((unused)) static void until_state(pid_t pid, char state) {
    for (int i = 0; i < 10000; i++) {
        if (state_of(pid) == state)
            return;
        sleep_ms(1);
    }
    dprintf(2, "process is %c, not %c, after 10 s\n", state_of(pid), state);
    _exit(99);
}

/* Waits until a child is stopped. Its state may say so before all of its threads have stopped. */
__attribute__((unused)) static void until_stopped(pid_t pid) {
    int status = 0;
    EQ(waitpid(pid, &status, WUNTRACED), pid);
    CHECK(WIFSTOPPED(status));
}

/* The whole of a small file as a string. */
__attribute__((unused)) static char *slurp(const char *path) {
    static char text[1 << 16];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    size_t have = 0;
    ssize_t n;
    while (have < sizeof text - 1 && (n = read(fd, text + have, sizeof text - 1 - have)) > 0)
        have += n;
    close(fd);
    text[have] = 0;
    return text;
}
#endif
