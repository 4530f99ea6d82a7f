/* Processes that share anonymous memory, one of which makes a call that runs only at home: all see one memory before,
 * during and after. */
#include "guest.h"
#include <stdatomic.h>

#define PAGES 5
#define CHILDREN 3

static long page;

struct board {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    atomic_long turns;
    atomic_long ticks[CHILDREN];
    atomic_int stop;
    long guarded;
};

/* It is done at home. */
static void go_home(void) { CHECK(munlockall() == 0); }

/* How the kernel calls the memory at this address. */
static void named(const void *at, const char *name) {
    char *text = slurp("/proc/self/maps");
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx", &start, &end) == 2 && (unsigned long)at >= start && (unsigned long)at < end) {
            CHECK(strstr(line, name));
            return;
        }
    }
    CHECK(!"mapped");
}

static void *tick(void *argument) {
    struct board *b = argument;
    while (!b->stop)
        b->ticks[0]++;
    return NULL;
}

/* The turn goes round between parent and children, each of which waits for it. */
static void take_turns(struct board *b, int own, int rounds) {
    for (int i = 0; i < rounds; i++) {
        CHECK(pthread_mutex_lock(&b->mutex) == 0);
        while (b->turns % (CHILDREN + 1) != own)
            CHECK(pthread_cond_wait(&b->changed, &b->mutex) == 0);
        b->turns++;
        b->guarded += own;
        CHECK(pthread_cond_broadcast(&b->changed) == 0);
        CHECK(pthread_mutex_unlock(&b->mutex) == 0);
    }
}

static void board(void) {
    struct board *b = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(b != MAP_FAILED);
    pthread_mutexattr_t ma;
    pthread_condattr_t ca;
    CHECK(pthread_mutexattr_init(&ma) == 0 && pthread_mutexattr_setpshared(&ma, PTHREAD_PROCESS_SHARED) == 0);
    CHECK(pthread_condattr_init(&ca) == 0 && pthread_condattr_setpshared(&ca, PTHREAD_PROCESS_SHARED) == 0);
    CHECK(pthread_mutex_init(&b->mutex, &ma) == 0 && pthread_cond_init(&b->changed, &ca) == 0);
    pid_t children[CHILDREN];
    for (int n = 0; n < CHILDREN; n++) {
        if ((children[n] = fork()) == 0) {
            take_turns(b, n + 1, 10);
            if (n == 1)
                go_home();
            take_turns(b, n + 1, 10);
            _exit(n);
        }
    }
    pthread_t ticker;
    CHECK(pthread_create(&ticker, NULL, tick, b) == 0);
    take_turns(b, 0, 20);
    for (int n = 0; n < CHILDREN; n++)
        ends_with(children[n], n);
    while (b->ticks[0] == 0)
        sched_yield();
    b->stop = 1;
    CHECK(pthread_join(ticker, NULL) == 0);
    EQ(b->turns, 20 * (CHILDREN + 1));
    EQ(b->guarded, 20 * (1 + 2 + 3));
    /* without root, what comes home is called otherwise (README, limits) */
    if (geteuid() == 0)
        named(b, "/dev/zero (deleted)");
    say("turns\n");
}

/* One object mapped in several ways, and mapped farther than it reaches. */
static void views(void) {
    char *m = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(m != MAP_FAILED);
    for (int i = 0; i < PAGES; i++)
        m[i * page] = i + 1;
    /* a second view of its pages 1 and 2; the first page is read-only from now on */
    char *again = mremap(m + page, 0, 2 * page, MREMAP_MAYMOVE);
    CHECK(again != MAP_FAILED && again[page] == 3);
    CHECK(mprotect(m, page, PROT_READ) == 0);
    CHECK(munmap(m + 3 * page, page) == 0);
    char *last = mremap(m + 4 * page, page, 2 * page, MREMAP_MAYMOVE);
    CHECK(last != MAP_FAILED && last[0] == 5);
    int ready[2], go[2];
    CHECK(pipe(ready) == 0 && pipe(go) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        /* nothing of it is mapped here but the second view */
        CHECK(munmap(m, 3 * page) == 0 && munmap(last, 2 * page) == 0);
        again[7] = 'c';
        give(ready[1]);
        take(go[0]);
        EQ(again[page + 7], 'p');
        again[8] = 'C';
        _exit(0);
    }
    take(ready[0]);
    EQ(m[page + 7], 'c');
    go_home();
    EQ(m[page + 7], 'c');
    m[2 * page + 7] = 'p';
    EQ(again[page + 7], 'p');
    give(go[1]);
    ends_with(pid, 0);
    EQ(m[page + 8], 'C');
    EQ(m[0], 1);
    EQ(last[0], 5);
    say("views\n");
}

/* Memory that nobody else has, and memory that is gone for all but a grandchild. */
static void alone(void) {
    volatile int *own = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    volatile int *theirs = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(own != MAP_FAILED && theirs != MAP_FAILED);
    own[0] = 17;
    pid_t pid = fork();
    if (pid == 0) {
        own = NULL;
        pid_t grandchild = fork();
        if (grandchild == 0) {
            theirs[0] = 1;
            go_home();
            theirs[0]++;
            _exit(theirs[0]);
        }
        ends_with(grandchild, 2);
        EQ(theirs[0], 2);
        _exit(0);
    }
    CHECK(munmap((void *)theirs, page) == 0);
    ends_with(pid, 0);
    go_home();
    EQ(own[0], 17);
    say("alone\n");
}

int main(void) {
    page = sysconf(_SC_PAGESIZE);
    /* each in a process of its own, so that each begins where this one is */
    void (*all[])(void) = {board, views, alone};
    for (int i = 0; i < 3; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            all[i]();
            _exit(0);
        }
        ends_with(pid, 0);
    }
    return 0;
}
