/* Threads in timed waits of all kinds, which go on for as long as they should while the process is moved about. The main
 * thread answers lines. */
#include "guest.h"
#include <linux/futex.h>

#define SECONDS 6

static int never[2];
static int results[8];

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

static int (*const waits[])(void) = {plain, with_rest, into_itself, by_clock, until, condition, for_ever};
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
