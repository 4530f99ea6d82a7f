/* Children that have their parent's memory (vfork, CLONE_VM) and make a call that runs only at home. */
#include "guest.h"
#include <stdatomic.h>

static volatile int word;
static atomic_int stop;
static atomic_long ticks;
static char stack[65536] __attribute__((aligned(16)));

static void go_home(void) { CHECK(munlockall() == 0); }

static void *tick(void *argument) {
    (void)argument;
    while (!stop)
        ticks++;
    return NULL;
}

static int companion(void *argument) {
    (void)argument;
    word = 1;
    go_home();
    word++;
    while (word != 3)
        sched_yield();
    word = 4;
    return 6;
}

static const char *self;

/* The child ends. */
static void vfork_and_end(void) {
    pthread_t ticker;
    CHECK(pthread_create(&ticker, NULL, tick, NULL) == 0);
    volatile double returned = 0;
    pid_t pid = vfork();
    CHECK(pid >= 0);
    if (pid == 0) {
        word = 42;
        go_home();
        long before = ticks;
        /* the parent's other threads go on meanwhile, its own waits */
        while (ticks == before)
            sched_yield();
        CHECK(returned == 0);
        word++;
        _exit(3);
    }
    returned = now();
    EQ(word, 43);
    ends_with(pid, 3);
    stop = 1;
    CHECK(pthread_join(ticker, NULL) == 0);
    say("vfork\n");
}

/* It executes something. */
static void vfork_and_exec(void) {
    volatile int returned = 0;
    pid_t pid = vfork();
    if (pid == 0) {
        word = 7;
        go_home();
        CHECK(returned == 0);
        word++;
        execl(self, self, "executed", (char *)NULL);
        _exit(98);
    }
    returned = 1;
    EQ(word, 8);
    ends_with(pid, 5);
}

/* It dies of a signal that comes while the parent waits. */
static void vfork_and_die(void) {
    pid_t pid = vfork();
    if (pid == 0) {
        word = 9;
        go_home();
        raise(SIGKILL);
    }
    EQ(word, 9);
    dies_of(pid, SIGKILL);
}

/* Another thread of the parent goes home while the child has its memory. */
static void *leaver(void *argument) {
    while (word != 1)
        sched_yield();
    go_home();
    word = 2;
    return argument;
}

static void parent_leaves(void) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, leaver, NULL) == 0);
    pid_t pid = vfork();
    if (pid == 0) {
        word = 1;
        while (word != 2)
            sched_yield();
        _exit(4);
    }
    ends_with(pid, 4);
    CHECK(pthread_join(thread, NULL) == 0);
    say("leaver\n");
}

/* A child that lives beside its parent. */
static void beside(void) {
    pid_t pid = clone(companion, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL);
    CHECK(pid > 0);
    while (word != 2)
        sched_yield();
    word = 3;
    ends_with(pid, 6);
    EQ(word, 4);
    say("companion\n");
}

/* Both go home at once. */
static void both(void) {
    pid_t pid = clone(companion, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL);
    CHECK(pid > 0);
    go_home();
    while (word != 2)
        sched_yield();
    word = 3;
    ends_with(pid, 6);
    say("both\n");
}

int main(int argc, char **argv) {
    if (argc > 1) {
        say("%s\n", argv[1]);
        return 5;
    }
    self = argv[0];
    /* each in a process of its own, so that each begins where this one is */
    void (*all[])(void) = {vfork_and_end, vfork_and_exec, vfork_and_die, parent_leaves, beside, both};
    for (int i = 0; i < (int)(sizeof all / sizeof *all); i++) {
        pid_t pid = fork();
        if (pid == 0) {
            all[i]();
            _exit(0);
        }
        ends_with(pid, 0);
    }
    return 0;
}
