/* A thread's own timer (SIGEV_THREAD_ID) goes on wherever the process is. The main thread answers a line when it has gone off some more. */
#include "guest.h"
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define SIGNAL (SIGRTMIN + 2)

static volatile long hits, wrong;
static volatile pid_t owner;

static void handler(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)context;
    wrong += gettid() != owner || info->si_code != SI_TIMER || info->si_value.sival_int != 77;
    hits++;
}

static void *has_timer(void *unused) {
    owner = gettid();
    struct sigevent event;
    memset(&event, 0, sizeof event);
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGNAL;
    event.sigev_value.sival_int = 77;
    event.sigev_notify_thread_id = owner;
    timer_t timer;
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0);
    CHECK(timer_settime(timer, 0, &(struct itimerspec){{0, 10000000}, {0, 10000000}}, NULL) == 0);
    for (;;)
        pause();
    return unused;
}

int main(void) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART};
    CHECK(sigaction(SIGNAL, &action, NULL) == 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, has_timer, NULL) == 0);
    while (hits == 0)
        sleep_ms(1);
    say("%d\n", (int)getpid());
    char line[64];
    ssize_t n;
    while ((n = read(0, line, sizeof line)) > 0) {
        long before = hits;
        while (hits < before + 5)
            sleep_ms(1);
        EQ(write(1, line, n), n);
    }
    EQ(n, 0);
    EQ(wrong, 0);
    return 0;
}
