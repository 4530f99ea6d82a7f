/* Timers that signal one thread (SIGEV_THREAD_ID): the signal is taken by that thread, whatever it does meanwhile. */
#include "guest.h"
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

#define SIGNAL (SIGRTMIN + 2)

static volatile int wrong_thread, wrong_code, hits[4];
static pid_t tids[4];

static void handler(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)context;
    int which = info->si_value.sival_int;
    if (gettid() != tids[which])
        wrong_thread++;
    if (info->si_code != SI_TIMER)
        wrong_code++;
    hits[which]++;
}

static void waits_for_it(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGNAL);
    for (int i = 0; i < 10; i++) {
        siginfo_t info;
        EQ(sigwaitinfo(&set, &info), SIGNAL);
        EQ(info.si_code, SI_TIMER);
        EQ(info.si_value.sival_int, 3);
        hits[3]++;
    }
}

static void *thread(void *arg) {
    int which = (int)(long)arg;
    tids[which] = gettid();
    struct sigevent event;
    memset(&event, 0, sizeof event);
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGNAL;
    event.sigev_value.sival_int = which;
    event.sigev_notify_thread_id = gettid();
    timer_t timer;
    EQ(timer_create(CLOCK_MONOTONIC, &event, &timer), 0);
    struct itimerspec often = {{0, 5000000}, {0, 5000000}};
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGNAL);
    if (which == 3)
        EQ(pthread_sigmask(SIG_BLOCK, &set, NULL), 0);
    EQ(timer_settime(timer, 0, &often, NULL), 0);
    switch (which) {
    case 0: /* computes */
        while (hits[0] < 10)
            ;
        break;
    case 1: /* sleeps */
        while (hits[1] < 10)
            usleep(1000);
        break;
    case 2: /* waits at home */
        while (hits[2] < 10)
            poll(NULL, 0, 1000);
        break;
    default:
        waits_for_it();
    }
    EQ(timer_delete(timer), 0);
    return NULL;
}

int main(void) {
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_sigaction = handler;
    a.sa_flags = SA_SIGINFO | SA_RESTART;
    EQ(sigaction(SIGNAL, &a, NULL), 0);
    pthread_t threads[4];
    for (long i = 0; i < 4; i++)
        EQ(pthread_create(&threads[i], NULL, thread, (void *)i), 0);
    for (int i = 0; i < 4; i++)
        EQ(pthread_join(threads[i], NULL), 0);
    EQ(wrong_thread, 0);
    EQ(wrong_code, 0);
    for (int i = 0; i < 4; i++)
        CHECK(hits[i] >= 10);
    say("each its own\n");
    return 0;
}
