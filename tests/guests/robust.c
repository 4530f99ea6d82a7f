/* Mutexes shared between processes; robust ones whose owner dies. */
#include "guest.h"

struct shared {
    pthread_mutex_t plain, robust;
    pthread_cond_t cond;
    int value, turn;
} *s;

static void *dies_holding(void *arg) {
    (void)arg;
    pthread_mutex_lock(&s->robust);
    return NULL;
}

int main(void) {
    s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t ma;
    pthread_condattr_t ca;
    pthread_mutexattr_init(&ma);
    pthread_mutexattr_setpshared(&ma, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(&s->plain, &ma);
    pthread_mutexattr_setrobust(&ma, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&s->robust, &ma);
    pthread_condattr_init(&ca);
    pthread_condattr_setpshared(&ca, PTHREAD_PROCESS_SHARED);
    pthread_cond_init(&s->cond, &ca);

    pthread_t t;
    EQ(pthread_create(&t, NULL, dies_holding, NULL), 0);
    EQ(pthread_join(t, NULL), 0);
    EQ(pthread_mutex_lock(&s->robust), EOWNERDEAD);
    EQ(pthread_mutex_consistent(&s->robust), 0);
    EQ(pthread_mutex_unlock(&s->robust), 0);
    say("thread\n");
    pid_t pid = fork();
    if (pid == 0) {
        pthread_mutex_lock(&s->robust);
        kill(getpid(), SIGKILL);
    }
    dies_of(pid, SIGKILL);
    EQ(pthread_mutex_lock(&s->robust), EOWNERDEAD);
    EQ(pthread_mutex_consistent(&s->robust), 0);
    EQ(pthread_mutex_unlock(&s->robust), 0);
    say("process\n");
    pid_t kids[4];
    for (int k = 0; k < 4; k++)
        if ((kids[k] = fork()) == 0) {
            for (int i = 0; i < 500; i++) {
                pthread_mutex_lock(&s->plain);
                s->value++;
                pthread_mutex_unlock(&s->plain);
            }
            pthread_mutex_lock(&s->plain);
            while (s->turn != k)
                pthread_cond_wait(&s->cond, &s->plain);
            s->turn++;
            pthread_cond_broadcast(&s->cond);
            pthread_mutex_unlock(&s->plain);
            _exit(0);
        }
    for (int k = 0; k < 4; k++)
        ends_with(kids[k], 0);
    EQ(s->value, 2000);
    EQ(s->turn, 4);
    say("shared\n");
    return 0;
}
