/* prctl, personality, scheduling, identity, limits of the process itself. */
#include "guest.h"
#include <sys/personality.h>
#include <sys/sysinfo.h>
#include <sys/times.h>
#include <sys/utsname.h>
#include <sys/random.h>

static void *named(void *arg) {
    CHECK(prctl(PR_SET_NAME, "a-long-name-for-a-thread") == 0);
    char name[16];
    CHECK(prctl(PR_GET_NAME, name) == 0);
    say("%s\n", name);
    return arg;
}

int main(void) {
    char name[16];
    CHECK(prctl(PR_SET_NAME, "guest") == 0);
    CHECK(prctl(PR_GET_NAME, name) == 0);
    pthread_t t;
    EQ(pthread_create(&t, NULL, named, NULL), 0);
    EQ(pthread_join(t, NULL), 0);
    say("%s\n", name);
    EQ(prctl(PR_GET_DUMPABLE), 1);
    EQ(prctl(PR_SET_DUMPABLE, 0), 0);
    EQ(prctl(PR_GET_DUMPABLE), 0);
    EQ(prctl(PR_SET_DUMPABLE, 1), 0);
    FAILS(prctl(PR_SET_DUMPABLE, 7), EINVAL);
    EQ(prctl(PR_SET_PDEATHSIG, SIGUSR1), 0);
    int sig = -1;
    EQ(prctl(PR_GET_PDEATHSIG, &sig), 0);
    EQ(sig, SIGUSR1);
    EQ(prctl(PR_SET_PDEATHSIG, 0), 0);
    EQ(prctl(PR_GET_KEEPCAPS), 0);
    EQ(prctl(PR_SET_TIMERSLACK, 12345), 0);
    EQ(prctl(PR_GET_TIMERSLACK), 12345);
    EQ(prctl(PR_GET_SECCOMP), 0);
    EQ(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 0);
    FAILS(prctl(4711), EINVAL);
    pid_t pid = fork();
    if (pid == 0) {
        EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        EQ(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 1);
        _exit(0);
    }
    ends_with(pid, 0);
    EQ(personality(0xffffffff) & 0xff, 0);
    say("prctl\n");

    struct utsname u;
    CHECK(uname(&u) == 0);
    say("%s %s\n", u.sysname, u.machine);
    struct sysinfo si;
    CHECK(sysinfo(&si) == 0 && si.totalram > 0);
    EQ(getuid(), geteuid());
    EQ(getgid(), getegid());
    uid_t r, e, s;
    CHECK(getresuid(&r, &e, &s) == 0);
    EQ(r, s);
    gid_t groups[100];
    CHECK(getgroups(100, groups) >= 0);
    EQ(syscall(SYS_gettid), getpid());
    EQ(getpgid(0), getpgrp());
    struct tms tms;
    CHECK(times(&tms) != -1);
    struct rusage ru;
    CHECK(getrusage(RUSAGE_SELF, &ru) == 0 && ru.ru_maxrss > 0);
    FAILS(getrusage(77, &ru), EINVAL);
    double burn = now();
    volatile unsigned long spin = 0;
    struct timespec cpu;
    do {
        spin++;
        CHECK(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu) == 0);
        CHECK(now() - burn < 20);
    } while (cpu.tv_sec == 0 && cpu.tv_nsec < 40000000);
    CHECK(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu) == 0 && cpu.tv_sec < 100);
    CHECK(getrusage(RUSAGE_SELF, &ru) == 0);
    CHECK(ru.ru_utime.tv_sec * 1e6 + ru.ru_utime.tv_usec + ru.ru_stime.tv_usec > 2e4);
    CHECK(clock() > 0);
    say("identity and times\n");

    unsigned cpu_number, node;
    CHECK(syscall(SYS_getcpu, &cpu_number, &node, NULL) == 0);
    cpu_set_t set;
    CHECK(sched_getaffinity(0, sizeof set, &set) == 0);
    CHECK(CPU_COUNT(&set) >= 1 && CPU_ISSET(cpu_number, &set));
    EQ(sched_getscheduler(0), SCHED_OTHER);
    struct sched_param sp;
    CHECK(sched_getparam(0, &sp) == 0);
    EQ(getpriority(PRIO_PROCESS, 0), 0);
    if ((pid = fork()) == 0) {
        errno = 0;
        EQ(nice(3), 3);
        EQ(getpriority(PRIO_PROCESS, 0), 3);
        _exit(0);
    }
    ends_with(pid, 0);
    EQ(sched_yield(), 0);
    char random[64];
    EQ(getrandom(random, sizeof random, 0), 64);
    CHECK(syscall(SYS_membarrier, 0, 0, 0) >= 0);
    long tid_address = syscall(SYS_set_tid_address, &sig);
    EQ(tid_address, getpid());
    say("scheduling\n");
    return 0;
}
