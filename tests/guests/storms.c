/* Many signals against many calls and many threads: nothing is lost, doubled or interrupted that should not be. */
#include "guest.h"

static volatile sig_atomic_t got;
static void count(int sig) {
    (void)sig;
    got++;
}
static volatile int stop;
static void *caller(void *arg) {
    long n = 0;
    int p[2];
    CHECK(pipe(p) == 0);
    while (!stop) {
        char c = n;
        EQ(write(p[1], &c, 1), 1);
        EQ(read(p[0], &c, 1), 1);
        EQ(c, (char)n);
        EQ(getppid() > 0 || getppid() == 0, 1);
        n++;
    }
    close(p[0]);
    close(p[1]);
    *(long *)arg = n;
    return NULL;
}
static void *quick(void *arg) { return arg; }

int main(void) {
    handle(SIGUSR1, count, SA_RESTART);
    handle(SIGRTMIN, count, SA_RESTART);
    enum { SIGNALS = 1000, THREADS = 4 };
    pid_t me = getpid();
    /* queued signals, each counted, while the receiver makes calls */
    pid_t pid = fork();
    if (pid == 0) {
        for (int i = 0; i < SIGNALS; i++)
            while (sigqueue(me, SIGRTMIN, (union sigval){.sival_int = i}) < 0)
                sleep_ms(1);
        _exit(0);
    }
    int p[2];
    CHECK(pipe(p) == 0);
    for (int i = 0; got < SIGNALS; i++) {
        char c = i;
        EQ(write(p[1], &c, 1), 1);
        EQ(read(p[0], &c, 1), 1);
        EQ(c, (char)i);
    }
    ends_with(pid, 0);
    EQ(got, SIGNALS);
    say("queued\n");
    long n[THREADS];
    pthread_t t[THREADS];
    for (int i = 0; i < THREADS; i++)
        EQ(pthread_create(&t[i], NULL, caller, &n[i]), 0);
    for (int i = 0; i < 300; i++) {
        pthread_kill(t[i % THREADS], SIGUSR1);
        kill(me, SIGUSR1);
        if (i % 10 == 0)
            sleep_ms(1);
    }
    stop = 1;
    for (int i = 0; i < THREADS; i++)
        EQ(pthread_join(t[i], NULL), 0);
    say("threads\n");
    for (int i = 0; i < 300; i++) {
        pthread_t q;
        EQ(pthread_create(&q, NULL, quick, NULL), 0);
        EQ(pthread_join(q, NULL), 0);
    }
    struct itimerval every = {{0, 1000}, {0, 1000}};
    handle(SIGALRM, count, SA_RESTART);
    CHECK(setitimer(ITIMER_REAL, &every, NULL) == 0);
    for (int i = 0; i < 50; i++) {
        pid = fork();
        CHECK(pid >= 0);
        if (pid == 0)
            _exit(i);
        ends_with(pid, i);
    }
    CHECK(setitimer(ITIMER_REAL, &(struct itimerval){{0, 0}, {0, 0}}, NULL) == 0);
    say("forks\n");
    return 0;
}
