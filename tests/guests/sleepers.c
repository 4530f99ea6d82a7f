/* Threads in timed waits of all kinds, which go on for as long as they should while the process is moved about. The main
 * thread answers lines. */
#include "guest.h"
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/sem.h>

#define SECONDS 6

static int never[2];
static int results[32];

static struct timespec in(double seconds) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += (time_t)seconds;
    return t;
}

static int plain(void) {
    struct timespec t = {SECONDS, 0};
    return nanosleep(&t, NULL);
}

static int with_rest(void) {
    struct timespec t = {SECONDS, 0}, rest;
    return nanosleep(&t, &rest);
}

/* The rest in the place of the whole, as Rust's standard library has it. */
static int into_itself(void) {
    struct timespec t = {SECONDS, 0};
    return nanosleep(&t, &t);
}

static int by_clock(void) {
    struct timespec t = {SECONDS, 0};
    return clock_nanosleep(CLOCK_BOOTTIME, 0, &t, NULL);
}

static int until(void) {
    struct timespec t = in(SECONDS);
    return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static int condition(void) {
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&cond, &attributes);
    struct timespec t = in(SECONDS);
    pthread_mutex_lock(&mutex);
    int result = pthread_cond_timedwait(&cond, &mutex, &t);
    pthread_mutex_unlock(&mutex);
    return result == ETIMEDOUT ? 0 : 1;
}

/* Waits for ever, until main writes. */
static int for_ever(void) {
    struct pollfd p = {never[0], POLLIN, 0};
    return poll(&p, 1, -1) == 1 && p.revents == POLLIN ? 0 : 1;
}

/* Those for which the kernel keeps to itself what is left, or that end with EINTR when their thread is stopped: signal(7). */
static int by_poll(void) {
    struct pollfd p = {never[0], POLLIN, 0};
    return poll(&p, 1, SECONDS * 1000);
}

static int by_futex(void) {
    int word = 5;
    struct timespec t = {SECONDS, 0};
    return syscall(SYS_futex, &word, FUTEX_WAIT, 5, &t, NULL, 0) == -1 && errno == ETIMEDOUT ? 0 : 1;
}

static int by_epoll(void) {
    struct epoll_event event = {.events = EPOLLIN};
    int fd = epoll_create1(EPOLL_CLOEXEC);
    if (fd < 0 || epoll_ctl(fd, EPOLL_CTL_ADD, never[0], &event) < 0)
        return 2;
    return epoll_wait(fd, &event, 1, SECONDS * 1000);
}

static int by_epoll_in_ns(void) {
    struct epoll_event event;
    struct timespec t = {SECONDS, 0};
    int fd = epoll_create1(EPOLL_CLOEXEC);
    return (int)syscall(SYS_epoll_pwait2, fd, &event, 1, &t, NULL, 8);
}

static int by_signal(void) {
    sigset_t set;
    struct timespec t = {SECONDS, 0};
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    return sigtimedwait(&set, NULL, &t) == -1 && errno == EAGAIN ? 0 : 1;
}

static int by_semaphore(void) {
    int id = semget(IPC_PRIVATE, 1, 0600);
    struct sembuf down = {0, -1, 0};
    struct timespec t = {SECONDS, 0};
    int result = semtimedop(id, &down, 1, &t) == -1 && errno == EAGAIN ? 0 : 1;
    semctl(id, 0, IPC_RMID);
    return result;
}

static int by_select(void) {
    struct timeval t = {SECONDS, 0};
    fd_set set;
    FD_ZERO(&set);
    FD_SET(never[0], &set);
    return select(never[0] + 1, &set, NULL, NULL, &t);
}

static int by_ppoll(void) {
    struct pollfd p = {never[0], POLLIN, 0};
    struct timespec t = {SECONDS, 0};
    return ppoll(&p, 1, &t, NULL);
}

static int (*const waits[])(void) = {plain,    with_rest, into_itself,    by_clock,  until,        condition, by_poll,
                                     by_futex, by_epoll,  by_epoll_in_ns, by_signal, by_semaphore, by_select, by_ppoll,
                                     for_ever};
#define WAITS (int)(sizeof waits / sizeof *waits)
static double took[WAITS];

static void *waiter(void *argument) {
    int i = (int)(long)argument;
    double begun = now();
    results[i] = waits[i]();
    took[i] = now() - begun;
    return NULL;
}

int main(void) {
    CHECK(pipe(never) == 0);
    pthread_t threads[WAITS];
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR2);
    CHECK(pthread_sigmask(SIG_BLOCK, &blocked, NULL) == 0);
    for (long i = 0; i < WAITS; i++)
        CHECK(pthread_create(&threads[i], NULL, waiter, (void *)i) == 0);
    say("%d\n", (int)getpid());
    char line[64];
    ssize_t n;
    while ((n = read(0, line, sizeof line)) > 0)
        EQ(write(1, line, n), n);
    for (int i = 0; i < WAITS; i++) {
        if (waits[i] == for_ever)
            give(never[1]);
        CHECK(pthread_join(threads[i], NULL) == 0);
        EQ(results[i], 0);
        if (waits[i] == for_ever)
            continue;
        if (took[i] < SECONDS || took[i] > SECONDS + 1.5) {
            say("wait %d took %.3f s\n", i, took[i]);
            return 99;
        }
    }
    say("slept\n");
    return 0;
}
