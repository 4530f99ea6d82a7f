/* How a process with threads ends, and with which status. */
#include "guest.h"

static void *exits(void *arg) {
    exit((int)(long)arg);
}
static void *returns_late(void *arg) {
    sleep_ms(50);
    say("the other thread goes on\n");
    return arg;
}
static void *forever(void *arg) {
    for (;;)
        pause();
    return arg;
}
static void *raises(void *arg) {
    raise((int)(long)arg);
    return NULL;
}
static void *raw_exit(void *arg) {
    sleep_ms(20);
    syscall(SYS_exit, (int)(long)arg);
    return NULL;
}
static void *forks(void *arg) {
    (void)arg;
    pid_t pid = fork();
    if (pid == 0)
        _exit(getpid() == syscall(SYS_gettid) ? 8 : 9);
    ends_with(pid, 8);
    return NULL;
}

int main(void) {
    struct rlimit none = {0, 0};
    CHECK(setrlimit(RLIMIT_CORE, &none) == 0);
    pthread_t t;
    pid_t pid;
    if ((pid = fork()) == 0) {
        pthread_create(&t, NULL, exits, (void *)31);
        for (;;)
            pause();
    }
    ends_with(pid, 31);
    say("exit from another thread\n");
    if ((pid = fork()) == 0) {
        pthread_create(&t, NULL, returns_late, NULL);
        pthread_exit(NULL);
    }
    ends_with(pid, 0);
    if ((pid = fork()) == 0) {
        pthread_create(&t, NULL, forever, NULL);
        _exit(32);
    }
    ends_with(pid, 32);
    say("exit_group with threads\n");
    if ((pid = fork()) == 0) {
        pthread_create(&t, NULL, forever, NULL);
        sleep_ms(10);
        syscall(SYS_exit, 33);
    }
    until_state(pid, 'Z');
    EQ(waitpid(pid, NULL, WNOHANG), 0);
    CHECK(kill(pid, SIGTERM) == 0);
    dies_of(pid, SIGTERM);
    say("leader gone, then killed\n");
    if ((pid = fork()) == 0) {
        pthread_create(&t, NULL, raw_exit, (void *)34);
        syscall(SYS_exit, 35);
    }
    /* which of the two counts has changed between kernels: the native run tells */
    say("status %#x\n", status_of(pid));
    if ((pid = fork()) == 0) {
        pthread_create(&t, NULL, raises, (void *)SIGABRT);
        for (;;)
            pause();
    }
    dies_of(pid, SIGABRT);
    if ((pid = fork()) == 0) {
        for (int i = 0; i < 8; i++)
            pthread_create(&t, NULL, forever, NULL);
        sleep_ms(10);
        kill(getpid(), SIGKILL);
    }
    dies_of(pid, SIGKILL);
    if ((pid = fork()) == 0)
        abort();
    dies_of(pid, SIGABRT);
    EQ(pthread_create(&t, NULL, forks, NULL), 0);
    EQ(pthread_join(t, NULL), 0);
    say("fork from a thread\n");
    return 0;
}
