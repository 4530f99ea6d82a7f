/* Counts queued signals while its threads compute with memory that they check; asked by a line on its input, it says how many it
 * has got and what their values add up to. Called as "rain PID NUMBER", it sends them instead, with the values 1 to NUMBER. */
#include "guest.h"
#include <stdatomic.h>

#define THREADS 3
#define WORDS (1 << 17)

static atomic_long got, sum;
static atomic_long turns[THREADS];

static void on_drop(int sig, siginfo_t *info, void *context) {
    (void)sig;
    (void)context;
    got++;
    sum += info->si_value.sival_int;
}

static void *compute(void *arg) {
    long number = (long)arg;
    uint64_t *words = malloc(WORDS * sizeof *words);
    CHECK(words != NULL);
    for (uint64_t turn = 1;; turn++) {
        for (uint64_t i = 0; i < WORDS; i++)
            words[i] = i * turn ^ (uint64_t)number;
        for (uint64_t i = 0; i < WORDS; i++)
            CHECK(words[i] == (i * turn ^ (uint64_t)number));
        turns[number]++;
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc == 3) {
        rain_on(atoi(argv[1]), (int[]){SIGRTMIN}, 1, atol(argv[2]), 500 * 1000);
        return 0;
    }
    struct sigaction action = {.sa_sigaction = on_drop, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGRTMIN, &action, NULL) == 0);
    pthread_t threads[THREADS];
    for (long i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, compute, (void *)i) == 0);
    say("%d\n", getpid());
    char c;
    long before[THREADS] = {0};
    while (read(0, &c, 1) == 1) {
        if (c != '\n')
            continue;
        for (int i = 0; i < THREADS; i++) {
            while (turns[i] == before[i])
                sched_yield();
            before[i] = turns[i];
        }
        say("%ld %ld\n", (long)got, (long)sum);
    }
    return 0;
}
