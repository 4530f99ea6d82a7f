/* Threads made here: ids, joins, mutexes, conditions, barriers, thread-local storage, cancellation. */
#include "guest.h"
#include <dirent.h>
#include <semaphore.h>

enum { THREADS = 24, ROUNDS = 2000 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn_changed = PTHREAD_COND_INITIALIZER;
static pthread_barrier_t barrier;
static pthread_rwlock_t rw = PTHREAD_RWLOCK_INITIALIZER;
static sem_t sem;
static long counter;
static int turn;
static __thread long mine;
static pid_t tids[THREADS];

static void *work(void *arg) {
    long i = (long)arg;
    mine = i * 1000;
    tids[i] = syscall(SYS_gettid);
    EQ(getpid() == tids[i], 0);
    pthread_barrier_wait(&barrier);
    for (int r = 0; r < ROUNDS; r++) {
        pthread_mutex_lock(&lock);
        counter++;
        pthread_mutex_unlock(&lock);
        mine++;
        if (r % 500 == 0)
            sched_yield();
    }
    /* a system call of each, all at once */
    char name[64], got[64] = "";
    snprintf(name, sizeof name, "thread-%ld", i);
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0);
    EQ(write(fd, name, strlen(name)), strlen(name));
    EQ(pread(fd, got, sizeof got, 0), strlen(name));
    CHECK(!strcmp(name, got));
    close(fd);
    CHECK(unlink(name) == 0);
    /* in turn */
    pthread_mutex_lock(&lock);
    while (turn != i)
        pthread_cond_wait(&turn_changed, &lock);
    turn++;
    pthread_cond_broadcast(&turn_changed);
    pthread_mutex_unlock(&lock);
    pthread_rwlock_rdlock(&rw);
    pthread_rwlock_unlock(&rw);
    sem_post(&sem);
    pthread_barrier_wait(&barrier);
    return (void *)mine;
}

static void *sleeper(void *arg) {
    (void)arg;
    for (;;)
        pause();
    return NULL;
}

static void *blocked_reader(void *arg) {
    char c;
    read((int)(long)arg, &c, 1);
    return NULL;
}

static int count_tasks(void) {
    DIR *d = opendir("/proc/self/task");
    CHECK(d != NULL);
    int n = 0;
    for (struct dirent *e; (e = readdir(d));)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static void *detached(void *arg) {
    sem_post((sem_t *)arg);
    return NULL;
}

int main(void) {
    pthread_t t[THREADS];
    CHECK(pthread_barrier_init(&barrier, NULL, THREADS + 1) == 0);
    CHECK(sem_init(&sem, 0, 0) == 0);
    for (long i = 0; i < THREADS; i++)
        EQ(pthread_create(&t[i], NULL, work, (void *)i), 0);
    pthread_barrier_wait(&barrier);
    EQ(count_tasks(), THREADS + 1);
    for (int i = 0; i < THREADS; i++)
        sem_wait(&sem);
    pthread_barrier_wait(&barrier);
    for (long i = 0; i < THREADS; i++) {
        void *result;
        EQ(pthread_join(t[i], &result), 0);
        EQ((long)result, i * 1000 + ROUNDS);
        for (long j = 0; j < i; j++)
            CHECK(tids[i] != tids[j]);
    }
    EQ(counter, (long)THREADS * ROUNDS);
    EQ(turn, THREADS);
    say("%d threads\n", THREADS);

    pthread_t p;
    EQ(pthread_create(&p, NULL, sleeper, NULL), 0);
    sleep_ms(20);
    EQ(pthread_cancel(p), 0);
    void *result;
    EQ(pthread_join(p, &result), 0);
    CHECK(result == PTHREAD_CANCELED);
    int fds[2];
    CHECK(pipe(fds) == 0);
    EQ(pthread_create(&p, NULL, blocked_reader, (void *)(long)fds[0]), 0);
    sleep_ms(20);
    EQ(pthread_cancel(p), 0);
    EQ(pthread_join(p, &result), 0);
    CHECK(result == PTHREAD_CANCELED);
    say("cancelled\n");

    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    for (int i = 0; i < 200; i++) {
        EQ(pthread_create(&p, &attr, detached, &sem), 0);
        sem_wait(&sem);
    }
    for (int i = 0; i < 5000 && count_tasks() > 1; i++)
        sleep_ms(1);
    EQ(count_tasks(), 1);
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_nsec += 20000000;
    if (deadline.tv_nsec >= 1000000000)
        deadline.tv_sec++, deadline.tv_nsec -= 1000000000;
    FAILS(sem_timedwait(&sem, &deadline), ETIMEDOUT);
    pthread_mutex_lock(&lock);
    EQ(pthread_cond_timedwait(&turn_changed, &lock, &deadline), ETIMEDOUT);
    say("detached and timed\n");
    return 0;
}
