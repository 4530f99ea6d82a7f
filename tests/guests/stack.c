/* The stack grows, ends, and says so on another one. */
#include "guest.h"
#include <setjmp.h>

static int sum(int depth) {
    volatile char room[4000];
    room[0] = depth;
    room[3999] = 1;
    if (depth == 0)
        return 0;
    return sum(depth - 1) + room[3999];
}
__attribute__((noinline)) static int endless(int depth) {
    if (depth < 0)
        return 0;
    volatile char room[4000];
    room[depth % 4000] = depth;
    return endless(depth + 1) + room[0];
}
static sigjmp_buf out;
static char alt[1 << 16];
static void overflow(int sig) { siglongjmp(out, sig); }
static void *in_thread(void *arg) {
    (void)arg;
    return (void *)(long)sum(100);
}
int main(void) {
    struct rlimit l;
    CHECK(getrlimit(RLIMIT_STACK, &l) == 0);
    int deep = l.rlim_cur == RLIM_INFINITY ? 1500 : (int)(l.rlim_cur / 5000);
    if (deep > 1500)
        deep = 1500;
    EQ(sum(deep), deep);
    say("deep\n");
    pthread_t t;
    void *r;
    EQ(pthread_create(&t, NULL, in_thread, NULL), 0);
    EQ(pthread_join(t, &r), 0);
    EQ((long)r, 100);
    stack_t s = {.ss_sp = alt, .ss_size = sizeof alt};
    CHECK(sigaltstack(&s, NULL) == 0);
    handle(SIGSEGV, overflow, SA_ONSTACK);
    int sig = sigsetjmp(out, 1);
    if (sig == 0)
        endless(0);
    EQ(sig, SIGSEGV);
    say("overflow\n");
    pid_t pid = fork();
    if (pid == 0) {
        EQ(sum(deep), deep);
        struct rlimit none = {0, 0};
        setrlimit(RLIMIT_CORE, &none);
        handle(SIGSEGV, SIG_DFL, 0);
        endless(0);
    }
    dies_of(pid, SIGSEGV);
    /* raising the limit lets the main stack grow further, in a process that is started under it */
    l.rlim_cur = 32 << 20;
    if (setrlimit(RLIMIT_STACK, &l) == 0) {
        EQ(sum(5000), 5000);
        say("deeper\n");
    }
    return 0;
}
