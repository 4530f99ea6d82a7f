/* Threads that use all that a process has for itself, and check it: memory of all kinds with patterns, futexes, a pipe, waits with
 * deadlines, signals that are handled and signals that are waited for. Asked by a line on its input, it says how many signals it
 * has got of both kinds and what their values add up to, after each thread has done something more. Called as
 * "soak PID NUMBER", it sends them instead, with the values 1 to NUMBER. */
#include "guest.h"
#include <linux/futex.h>
#include <malloc.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/sem.h>

#define HANDLED (SIGRTMIN)
#define AWAITED (SIGRTMIN + 1)

enum { BLOCKS, MAPPINGS, BREAK, PING, PONG, WRITER, READER, SLEEPER, WAITER, THREADS };
static atomic_long turns[THREADS];
static atomic_long handled, handled_sum, awaited, awaited_sum;

static void on_signal(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)context;
    int e = errno;
    handled++;
    handled_sum += info->si_value.sival_int;
    errno = e;
}

static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void fill(uint64_t *words, size_t n, uint64_t seed) {
    for (size_t i = 0; i < n; i++)
        words[i] = seed ^ i * 0x9e3779b97f4a7c15u;
}

static void verify(const uint64_t *words, size_t n, uint64_t seed) {
    for (size_t i = 0; i < n; i++)
        EQ(words[i], seed ^ i * 0x9e3779b97f4a7c15u);
}

/* malloc and free, from some bytes to what becomes a mapping of its own. */
static void *blocks(void *unused) {
    enum { N = 32 };
    uint64_t *block[N] = {0}, seed[N], state = 88172645463325252u;
    size_t words[N];
    for (;; turns[BLOCKS]++) {
        int i = next(&state) % N;
        if (block[i]) {
            verify(block[i], words[i], seed[i]);
            free(block[i]);
            block[i] = NULL;
            continue;
        }
        words[i] = 1 + next(&state) % (next(&state) % 8 ? 512 : 32768);
        seed[i] = next(&state);
        CHECK((block[i] = malloc(words[i] * 8)) != NULL);
        fill(block[i], words[i], seed[i]);
    }
    return unused;
}

/* mmap, mprotect, mremap, madvise and munmap. */
static void *mappings(void *unused) {
    enum { N = 12, PAGE = 4096 };
    struct {
        uint64_t *at;
        size_t pages;
        uint64_t seed;
    } m[N] = {0};
    uint64_t state = 2463534242u;
    for (;; turns[MAPPINGS]++) {
        int i = next(&state) % N;
        size_t words = m[i].pages * (PAGE / 8);
        if (!m[i].at) {
            m[i].pages = 1 + next(&state) % 24;
            m[i].seed = next(&state);
            m[i].at = mmap(NULL, m[i].pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            CHECK(m[i].at != MAP_FAILED);
            fill(m[i].at, m[i].pages * (PAGE / 8), m[i].seed);
            continue;
        }
        verify(m[i].at, words, m[i].seed);
        switch (next(&state) % 5) {
        case 0:
            CHECK(munmap(m[i].at, m[i].pages * PAGE) == 0);
            m[i].at = NULL;
            break;
        case 1:
            CHECK(mprotect(m[i].at, m[i].pages * PAGE, PROT_READ) == 0);
            verify(m[i].at, words, m[i].seed);
            CHECK(mprotect(m[i].at, m[i].pages * PAGE, PROT_READ | PROT_WRITE) == 0);
            break;
        case 2: {
            size_t pages = 1 + next(&state) % 24;
            void *at = mremap(m[i].at, m[i].pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
            EQ(at == MAP_FAILED ? errno : 0, 0);
            m[i].at = at;
            verify(m[i].at, (pages < m[i].pages ? pages : m[i].pages) * (PAGE / 8), m[i].seed);
            m[i].pages = pages;
            fill(m[i].at, pages * (PAGE / 8), m[i].seed);
            break;
        }
        case 3:
            CHECK(madvise(m[i].at, m[i].pages * PAGE, MADV_DONTNEED) == 0);
            for (size_t w = 0; w < words; w++)
                EQ(m[i].at[w], 0);
            fill(m[i].at, words, m[i].seed);
            break;
        default:
            m[i].seed = next(&state);
            fill(m[i].at, words, m[i].seed);
        }
    }
    return unused;
}

/* The break, which no other thread touches. */
static void *the_break(void *unused) {
    uint64_t state = 123456789;
    size_t words = 0;
    uint64_t *base = sbrk(0);
    for (;; turns[BREAK]++) {
        size_t wanted = next(&state) % 40 * 512;
        CHECK(brk(base + wanted) == 0);
        verify(base, words < wanted ? words : wanted, 77);
        fill(base, wanted, 77);
        words = wanted;
        sched_yield();
    }
    return unused;
}

static _Atomic uint32_t ball;

/* Two threads hand a number to and fro, waiting in futexes with and without deadlines. */
static void play(uint32_t side, int which) {
    for (;; turns[which]++) {
        uint32_t seen;
        while ((seen = ball) % 2 != side) {
            struct timespec t;
            clock_gettime(CLOCK_MONOTONIC, &t);
            t.tv_sec += 20;
            long r = syscall(SYS_futex, &ball, FUTEX_WAIT_BITSET_PRIVATE, seen, turns[which] % 2 ? &t : NULL, NULL, 1);
            int e = errno;
            CHECK(r == 0 || e == EAGAIN || e == EINTR);
        }
        ball = seen + 1;
        CHECK(syscall(SYS_futex, &ball, FUTEX_WAKE_PRIVATE, 1) >= 0);
        if (turns[which] % 64 == 0)
            sleep_ms(1);
    }
}
static void *ping(void *unused) { return play(0, PING), unused; }
static void *pong(void *unused) { return play(1, PONG), unused; }

static int pipe_fds[2];

/* No more than what a pipe takes as one whole (pipe(7), PIPE_BUF). */
static void *writer(void *unused) {
    uint64_t state = 42, words[512];
    for (uint64_t n = 0;; n++, turns[WRITER]++) {
        size_t count = 2 + next(&state) % 510;
        fill(words, count, n);
        EQ(write(pipe_fds[1], words, count * 8), count * 8);
    }
    return unused;
}

static void *reader(void *unused) {
    uint64_t state = 42, words[512];
    for (uint64_t n = 0;; n++, turns[READER]++) {
        size_t count = 2 + next(&state) % 510, have = 0;
        while (have < count * 8) {
            ssize_t got = read(pipe_fds[0], (char *)words + have, count * 8 - have);
            CHECK(got > 0);
            have += got;
        }
        verify(words, count, n);
    }
    return unused;
}

/* The clock of the kernel's ticks. A socket's own timeout is counted in those, and natively ends early where they are behind, on a machine
 * that was not given its processors for a while. */
static double ticks(void) {
    struct timespec t;
    CHECK(clock_gettime(CLOCK_MONOTONIC_COARSE, &t) == 0);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Every wait takes as long as it should, and ends with EINTR in no case: this thread blocks all signals. */
static void *sleeper(void *unused) {
    sigset_t all, one;
    sigfillset(&all);
    CHECK(pthread_sigmask(SIG_SETMASK, &all, NULL) == 0);
    sigemptyset(&one);
    sigaddset(&one, SIGRTMIN + 5);
    int ep = epoll_create1(0), sock[2], sem = semget(IPC_PRIVATE, 1, 0600);
    struct timeval limit = {0, 15000};
    CHECK(ep >= 0 && sem >= 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, sock) == 0);
    CHECK(semctl(sem, 0, SETVAL, 1) == 0);
    CHECK(setsockopt(sock[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) == 0);
    double before = now();
    for (;; turns[SLEEPER]++) {
        struct timespec t = {0, 15000000}, at;
        struct epoll_event event;
        char byte;
        double begun = now(), tick = ticks();
        CHECK(begun >= before);
        switch (turns[SLEEPER] % 8) {
        case 0:
            EQ(nanosleep(&t, NULL), 0);
            break;
        case 1:
            clock_gettime(CLOCK_MONOTONIC, &at);
            at.tv_nsec += 15000000;
            if (at.tv_nsec >= 1000000000)
                at.tv_sec++, at.tv_nsec -= 1000000000;
            EQ(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL), 0);
            break;
        case 2:
            EQ(poll(NULL, 0, 15), 0);
            break;
        case 3:
            EQ(epoll_wait(ep, &event, 1, 15), 0);
            break;
        case 4:
            FAILS(sigtimedwait(&one, NULL, &t), EAGAIN);
            break;
        case 5:
            FAILS(recv(sock[0], &byte, 1, 0), EAGAIN);
            break;
        case 6:
            FAILS(semtimedop(sem, &(struct sembuf){0, -2, 0}, 1, &t), EAGAIN);
            break;
        default:
            EQ(select(0, NULL, NULL, NULL, &(struct timeval){0, 15000}), 0);
        }
        before = now();
        /* milliseconds are rounded, and clocks of nodes differ by less than a round trip */
        double took = turns[SLEEPER] % 8 == 5 ? ticks() - tick : before - begun;
        if (took < 0.0125 || took >= 30)
            fprintf(stderr, "wait %ld of the sleeper took %f s\n", turns[SLEEPER] % 8, took);
        CHECK(took >= 0.0125 && took < 30);
    }
    return unused;
}

static void *waiter(void *unused) {
    sigset_t set;
    siginfo_t info;
    sigemptyset(&set);
    sigaddset(&set, AWAITED);
    for (;;) {
        int sig;
        /* HANDLED is blocked here: nothing but AWAITED ends it */
        EQ(sig = sigwaitinfo(&set, &info), AWAITED);
        EQ(info.si_code, SI_QUEUE);
        awaited++;
        awaited_sum += info.si_value.sival_int;
        turns[WAITER]++;
    }
    return unused;
}

int main(int argc, char **argv) {
    if (argc == 3) {
        /* with 25 for each move it rains about as long as it is moved */
        rain_on(atoi(argv[1]), (int[]){HANDLED, AWAITED}, 2, atol(argv[2]), 4 * 1000 * 1000);
        return 0;
    }
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(HANDLED, &action, NULL) == 0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, AWAITED);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
    CHECK(pipe(pipe_fds) == 0);
    /* This thread's heap has all that it will need, so that nobody but its thread moves the break; others have heaps of their own. */
    CHECK(mallopt(M_TRIM_THRESHOLD, 1 << 30) == 1 && mallopt(M_MMAP_THRESHOLD, 8 << 20) == 1);
    free(malloc(4 << 20));
    CHECK(mallopt(M_MMAP_THRESHOLD, 128 << 10) == 1);
    void *(*work[THREADS])(void *) = {blocks, mappings, the_break, ping, pong, writer, reader, sleeper, waiter};
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        sigset_t own = set;
        if (i == WAITER)
            sigaddset(&own, HANDLED);
        CHECK(pthread_sigmask(SIG_SETMASK, &own, NULL) == 0);
        CHECK(pthread_create(&threads[i], NULL, work[i], NULL) == 0);
    }
    CHECK(pthread_sigmask(SIG_SETMASK, &set, NULL) == 0);
    say("%d\n", getpid());
    char c;
    ssize_t n;
    long before[THREADS] = {0};
    while ((n = read(0, &c, 1)) == 1) {
        if (c != '\n')
            continue;
        for (int i = 0; i < WAITER; i++) {
            while (turns[i] == before[i])
                sleep_ms(1);
            before[i] = turns[i];
        }
        say("%ld %ld %ld %ld\n", (long)handled, (long)handled_sum, (long)awaited, (long)awaited_sum);
    }
    /* With SA_RESTART it is the end of the input, and nothing else. */
    EQ(n, 0);
    return 0;
}
