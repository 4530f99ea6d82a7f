/* Signals that are waited for: sigwaitinfo, sigtimedwait, sigwait, with the siginfo that says where they come from. */
#include "guest.h"

/* The C library makes SI_USER of SI_TKILL. */
static int raw_wait(const sigset_t *set, siginfo_t *info) {
    return syscall(SYS_rt_sigtimedwait, set, info, NULL, 8);
}

static sigset_t set;
static volatile int handled;
static void on_signal(int sig) { (void)sig, handled++; }

/* A child that runs the body and ends with 3. */
static pid_t child(void (*body)(void)) {
    pid_t pid = fork();
    if (pid == 0) {
        body();
        _exit(3);
    }
    return pid;
}
static void kills(void) { EQ(kill(getppid(), SIGUSR1), 0); }
static void queues(void) {
    for (int i = 1; i <= 3; i++)
        EQ(sigqueue(getppid(), SIGRTMIN, (union sigval){.sival_int = 40 + i}), 0);
}
static void late(void) {
    sleep_ms(60);
    EQ(kill(getppid(), SIGUSR1), 0);
}
static void late_handled(void) {
    sleep_ms(60);
    EQ(kill(getppid(), SIGUSR2), 0);
}

static pid_t main_tid;
static void *sends(void *unused) {
    EQ(syscall(SYS_tgkill, getpid(), main_tid, SIGUSR1), 0);
    return unused;
}
static void *waits(void *unused) {
    siginfo_t info;
    sigset_t usr1;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    EQ(sigwaitinfo(&usr1, &info), SIGUSR1);
    EQ(info.si_code, SI_USER);
    return unused;
}

int main(void) {
    siginfo_t info;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGALRM);
    sigaddset(&set, SIGRTMIN);
    EQ(sigprocmask(SIG_BLOCK, &set, NULL), 0);
    struct timespec none = {0, 0}, some = {0, 20000000}, many = {20, 0};
    FAILS(sigtimedwait(&set, &info, &none), EAGAIN);
    double start = now();
    FAILS(sigtimedwait(&set, &info, &some), EAGAIN);
    CHECK(now() - start >= 0.0199);
    FAILS(sigtimedwait(&set, &info, &(struct timespec){0, -1}), EINVAL);
    say("nothing\n");

    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, SIGUSR1);
    memset(&info, -1, sizeof info);
    pid_t pid = child(kills);
    EQ(sigwaitinfo(&one, &info), SIGUSR1);
    EQ(info.si_signo, SIGUSR1);
    EQ(info.si_code, SI_USER);
    EQ(info.si_pid, pid);
    EQ(info.si_uid, getuid());
    sigemptyset(&one);
    sigaddset(&one, SIGCHLD);
    EQ(sigtimedwait(&one, &info, &many), SIGCHLD);
    EQ(info.si_code, CLD_EXITED);
    EQ(info.si_pid, pid);
    EQ(info.si_status, 3);
    ends_with(pid, 3);
    say("kill and child\n");

    /* pending before it is waited for, and in their order */
    pid = child(queues);
    ends_with(pid, 3);
    sigemptyset(&one);
    sigaddset(&one, SIGRTMIN);
    for (int i = 1; i <= 3; i++) {
        EQ(sigwaitinfo(&one, &info), SIGRTMIN);
        EQ(info.si_code, SI_QUEUE);
        EQ(info.si_pid, pid);
        EQ(info.si_value.sival_int, 40 + i);
    }
    FAILS(sigtimedwait(&one, &info, &none), EAGAIN);
    EQ(sigtimedwait(&set, NULL, &many), SIGCHLD);
    say("queue\n");

    pid = child(late);
    sigemptyset(&one);
    sigaddset(&one, SIGUSR1);
    int sig;
    EQ(sigwait(&one, &sig), 0);
    EQ(sig, SIGUSR1);
    ends_with(pid, 3);
    pid = child(late);
    EQ(sigwaitinfo(&one, NULL), SIGUSR1);
    ends_with(pid, 3);
    pid = child(late);
    EQ(sigwaitinfo(&one, &info), SIGUSR1);
    EQ(info.si_pid, pid);
    ends_with(pid, 3);
    say("waited for\n");

    handle(SIGUSR2, on_signal, SA_RESTART);
    pid = child(late_handled);
    FAILS(sigwaitinfo(&one, &info), EINTR);
    EQ(handled, 1);
    ends_with(pid, 3);
    say("interrupted\n");

    main_tid = gettid();
    pthread_t t;
    EQ(pthread_create(&t, NULL, sends, NULL), 0);
    EQ(raw_wait(&one, &info), SIGUSR1);
    EQ(info.si_code, SI_TKILL);
    EQ(info.si_pid, getpid());
    EQ(pthread_join(t, NULL), 0);
    EQ(pthread_create(&t, NULL, waits, NULL), 0);
    sleep_ms(20);
    pid = child(kills);
    EQ(pthread_join(t, NULL), 0);
    ends_with(pid, 3);
    EQ(raise(SIGUSR1), 0);
    EQ(raw_wait(&one, &info), SIGUSR1);
    EQ(info.si_code, SI_TKILL);
    EQ(info.si_pid, getpid());
    say("threads\n");

    alarm(1);
    sigemptyset(&one);
    sigaddset(&one, SIGALRM);
    EQ(sigwaitinfo(&one, &info), SIGALRM);
    EQ(info.si_code, SI_KERNEL);
    timer_t timer;
    struct sigevent event;
    memset(&event, 0, sizeof event);
    event.sigev_notify = SIGEV_SIGNAL;
    event.sigev_signo = SIGRTMIN;
    event.sigev_value.sival_int = 9;
    EQ(timer_create(CLOCK_MONOTONIC, &event, &timer), 0);
    struct itimerspec soon = {{0, 0}, {0, 10000000}};
    EQ(timer_settime(timer, 0, &soon, NULL), 0);
    sigemptyset(&one);
    sigaddset(&one, SIGRTMIN);
    EQ(sigwaitinfo(&one, &info), SIGRTMIN);
    EQ(info.si_code, SI_TIMER);
    EQ(info.si_value.sival_int, 9);
    EQ(timer_delete(timer), 0);
    say("timers\n");
    return 0;
}
