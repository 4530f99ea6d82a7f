/* alarm, interval timers, POSIX timers, timerfd, sleeps. */
#include "guest.h"
#include <sys/timerfd.h>

static volatile int count;
static volatile int last_code, last_value;
static void handler(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)context;
    last_code = info->si_code;
    last_value = info->si_value.sival_int;
    count++;
}
static void action(int sig, int flags) {
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_sigaction = handler;
    a.sa_flags = SA_SIGINFO | flags;
    CHECK(sigaction(sig, &a, NULL) == 0);
    count = 0;
}
static volatile int thread_fired;
static void on_thread(union sigval v) { thread_fired = v.sival_int; }

int main(void) {
    double start;
    action(SIGALRM, 0);
    EQ(alarm(1), 0);
    start = now();
    FAILS(pause(), EINTR);
    CHECK(now() - start > 0.9 && now() - start < 20);
    EQ(count, 1);
    EQ(last_code, SI_KERNEL);
    EQ(alarm(100), 0);
    pid_t pid = fork();
    if (pid == 0)
        _exit(alarm(0)); /* a child has none */
    ends_with(pid, 0);
    unsigned left = alarm(0);
    CHECK(left >= 99 && left <= 100);
    if ((pid = fork()) == 0) {
        handle(SIGALRM, SIG_DFL, 0);
        struct itimerval soon = {{0, 0}, {0, 20000}};
        setitimer(ITIMER_REAL, &soon, NULL);
        for (;;)
            pause();
    }
    dies_of(pid, SIGALRM);
    say("alarm\n");

    action(SIGALRM, SA_RESTART);
    struct itimerval every = {{0, 10000}, {0, 10000}}, old;
    CHECK(setitimer(ITIMER_REAL, &every, NULL) == 0);
    while (count < 5)
        pause();
    CHECK(getitimer(ITIMER_REAL, &old) == 0);
    EQ(old.it_interval.tv_usec, 10000);
    CHECK(setitimer(ITIMER_REAL, &(struct itimerval){{0, 0}, {0, 0}}, NULL) == 0);
    action(SIGVTALRM, 0);
    CHECK(setitimer(ITIMER_VIRTUAL, &every, NULL) == 0);
    for (volatile unsigned long i = 0; count < 2; i++)
        if (i > 40000000000ul)
            CHECK(!"no SIGVTALRM");
    setitimer(ITIMER_VIRTUAL, &(struct itimerval){{0, 0}, {0, 0}}, NULL);
    action(SIGPROF, 0);
    CHECK(setitimer(ITIMER_PROF, &every, NULL) == 0);
    for (volatile unsigned long i = 0; count < 2; i++)
        if (i > 40000000000ul)
            CHECK(!"no SIGPROF");
    setitimer(ITIMER_PROF, &(struct itimerval){{0, 0}, {0, 0}}, NULL);
    say("interval timers\n");

    timer_t timer;
    struct sigevent se;
    memset(&se, 0, sizeof se);
    se.sigev_notify = SIGEV_SIGNAL;
    se.sigev_signo = SIGRTMIN;
    se.sigev_value.sival_int = 77;
    action(SIGRTMIN, 0);
    CHECK(timer_create(CLOCK_MONOTONIC, &se, &timer) == 0);
    struct itimerspec spec = {{0, 0}, {0, 20000000}}, cur;
    CHECK(timer_settime(timer, 0, &spec, NULL) == 0);
    while (count < 1)
        pause();
    EQ(last_code, SI_TIMER);
    EQ(last_value, 77);
    CHECK(timer_gettime(timer, &cur) == 0);
    EQ(cur.it_value.tv_nsec, 0);
    /* overruns are counted while the signal waits */
    sigset_t set, old_mask;
    sigemptyset(&set);
    sigaddset(&set, SIGRTMIN);
    sigprocmask(SIG_BLOCK, &set, &old_mask);
    /* (the next expiry must not come between the handler and the question) */
    spec.it_interval.tv_nsec = 20000000;
    spec.it_value.tv_nsec = 1000000;
    CHECK(timer_settime(timer, 0, &spec, NULL) == 0);
    sleep_ms(250);
    sigprocmask(SIG_SETMASK, &old_mask, NULL);
    CHECK(timer_getoverrun(timer) > 5);
    CHECK(timer_delete(timer) == 0);
    FAILS(timer_delete((timer_t)4711), EINVAL);
    memset(&se, 0, sizeof se);
    se.sigev_notify = SIGEV_THREAD;
    se.sigev_notify_function = on_thread;
    se.sigev_value.sival_int = 5;
    CHECK(timer_create(CLOCK_REALTIME, &se, &timer) == 0);
    spec = (struct itimerspec){{0, 0}, {0, 10000000}};
    CHECK(timer_settime(timer, 0, &spec, NULL) == 0);
    for (int i = 0; i < 10000 && !thread_fired; i++)
        sleep_ms(1);
    EQ(thread_fired, 5);
    CHECK(timer_delete(timer) == 0);
    say("POSIX timers\n");

    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    CHECK(fd >= 0);
    uint64_t ticks;
    FAILS(read(fd, &ticks, 8), EAGAIN);
    spec = (struct itimerspec){{0, 5000000}, {0, 5000000}};
    CHECK(timerfd_settime(fd, 0, &spec, NULL) == 0);
    struct pollfd p = {fd, POLLIN, 0};
    EQ(poll(&p, 1, 5000), 1);
    EQ(read(fd, &ticks, 8), 8);
    CHECK(ticks >= 1);
    struct timespec t;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &t) == 0);
    t.tv_sec -= 1;
    spec = (struct itimerspec){{0, 0}, t};
    CHECK(timerfd_settime(fd, TFD_TIMER_ABSTIME, &spec, NULL) == 0);
    EQ(poll(&p, 1, 5000), 1);
    EQ(read(fd, &ticks, 8), 8);
    EQ(ticks, 1);
    say("timerfd\n");

    start = now();
    sleep_ms(30);
    CHECK(now() - start >= 0.0299);
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_nsec += 30000000;
    if (t.tv_nsec >= 1000000000)
        t.tv_sec++, t.tv_nsec -= 1000000000;
    start = now();
    EQ(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL), 0);
    CHECK(now() - start >= 0.02);
    clock_gettime(CLOCK_REALTIME, &t);
    EQ(clock_nanosleep(CLOCK_REALTIME, TIMER_ABSTIME, &t, NULL), 0);
    FAILS(nanosleep(&(struct timespec){0, 1000000000}, NULL), EINVAL);
    FAILS(nanosleep(&(struct timespec){-1, 0}, NULL), EINVAL);
    EQ(usleep(1000), 0);
    say("sleeps\n");

    /* a sleep goes on after a stop, and after an ignored signal */
    handle(SIGUSR1, SIG_IGN, 0);
    if ((pid = fork()) == 0) {
        start = now();
        struct timespec half = {0, 300000000};
        EQ(nanosleep(&half, NULL), 0);
        CHECK(now() - start >= 0.299);
        _exit(0);
    }
    until_state(pid, 'S');
    kill(pid, SIGUSR1);
    kill(pid, SIGSTOP);
    until_stopped(pid);
    kill(pid, SIGCONT);
    ends_with(pid, 0);
    say("undisturbed sleep\n");
    return 0;
}
