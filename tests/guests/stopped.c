/* A child that job control stops, and that is moved about while it stands. Its parent hears of one stop and one continuation, and
 * nothing else; a sleep goes on meanwhile, calls wait, and memory is as it was. */
#include "guest.h"
#include <sched.h>

#define SECONDS 2

static int results[4];
static int ends[2], wakes[2];
static volatile long counted;
static volatile sig_atomic_t continued;

static void on_cont(int sig) {
    (void)sig;
    continued++;
}

static void *sleeps(void *argument) {
    (void)argument;
    struct timespec t = {SECONDS, 0};
    double begun = now();
    results[0] = nanosleep(&t, NULL) == 0 ? 0 : 1;
    if (results[0] == 0 && now() - begun < SECONDS - 0.001)
        results[0] = 2;
    return NULL;
}

static void *reads(void *argument) {
    (void)argument;
    char c;
    results[1] = read(wakes[0], &c, 1) == 1 ? 0 : 1;
    return NULL;
}

static void *counts(void *argument) {
    (void)argument;
    while (continued == 0)
        counted++;
    return NULL;
}

static int child(void) {
    struct sigaction action = {.sa_handler = on_cont, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGCONT, &action, NULL) == 0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCONT);
    CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
    pthread_t threads[3];
    CHECK(pthread_create(&threads[0], NULL, sleeps, NULL) == 0);
    CHECK(pthread_create(&threads[1], NULL, reads, NULL) == 0);
    CHECK(pthread_create(&threads[2], NULL, counts, NULL) == 0);
    CHECK(pthread_sigmask(SIG_UNBLOCK, &set, NULL) == 0);
    long *memory = malloc(1 << 20);
    for (int i = 0; i < 1 << 17; i++)
        memory[i] = i * 4711L;
    while (counted == 0)
        sched_yield();
    double before = now();
    CHECK(kill(getpid(), SIGSTOP) == 0);
    while (continued == 0)
        pause();
    results[2] = now() > before && continued == 1 ? 0 : 1;
    for (int i = 0; i < 1 << 17; i++)
        if (memory[i] != i * 4711L)
            results[3] = 1;
    for (int i = 0; i < 3; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    for (int i = 0; i < 4; i++)
        EQ(results[i], 0);
    return counted > 0 ? 3 : 4;
}

int main(void) {
    CHECK(pipe(ends) == 0 && pipe(wakes) == 0);
    pid_t pid = fork();
    if (pid == 0)
        exit(child());
    int status;
    EQ(waitpid(pid, &status, WUNTRACED | WCONTINUED), pid);
    CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP);
    say("%d\n", (int)pid);
    char line[64];
    ssize_t n;
    while ((n = read(0, line, sizeof line)) > 0) {
        /* Nothing has happened to it since. */
        EQ(waitpid(pid, &status, WUNTRACED | WCONTINUED | WNOHANG), 0);
        EQ(write(1, line, n), n);
    }
    CHECK(kill(pid, SIGCONT) == 0);
    EQ(waitpid(pid, &status, WUNTRACED | WCONTINUED), pid);
    CHECK(WIFCONTINUED(status));
    give(wakes[1]);
    EQ(waitpid(pid, &status, WUNTRACED | WCONTINUED), pid);
    say("continued, and ended with %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
    return 0;
}
