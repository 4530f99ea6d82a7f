/* Clocks go on, whatever happens to the process. */
#include "guest.h"

static double on(clockid_t c) {
    struct timespec t;
    CHECK(clock_gettime(c, &t) == 0);
    return t.tv_sec + t.tv_nsec / 1e9;
}
static double raw(clockid_t c) {
    struct timespec t;
    CHECK(syscall(SYS_clock_gettime, c, &t) == 0);
    return t.tv_sec + t.tv_nsec / 1e9;
}
static void *watch(void *arg) {
    double last = on(CLOCK_MONOTONIC), until = last + 0.1;
    while (last < until) {
        double t = on(CLOCK_MONOTONIC);
        CHECK(t >= last);
        last = t;
    }
    return arg;
}

int main(int argc, char **argv) {
    clockid_t ids[] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC_RAW, CLOCK_MONOTONIC_COARSE, CLOCK_REALTIME};
    if (argc > 5) {
        /* after exec: later, but not by much */
        for (int i = 0; i < 5; i++) {
            double before = atof(argv[i + 1]);
            double t = on(ids[i]);
            CHECK(t >= before - 0.011); /* coarse clocks lag by a tick */
            CHECK(t < before + 20);
        }
        say("across exec\n");
        return 0;
    }
    /* the vDSO and the kernel agree */
    for (int i = 0; i < 5; i++) {
        double a = on(ids[i]), b = raw(ids[i]), c = on(ids[i]);
        CHECK(b >= a - 0.011 && c >= b - 0.011 && c - a < 5);
    }
    /* as do the kernel and its /proc */
    double up = atof(slurp("/proc/uptime"));
    CHECK(up <= on(CLOCK_BOOTTIME) + 0.02 && up > on(CLOCK_BOOTTIME) - 20);
    CHECK(time(NULL) - (time_t)on(CLOCK_REALTIME) <= 1);
    struct timespec res;
    CHECK(clock_getres(CLOCK_MONOTONIC, &res) == 0);
    EQ(res.tv_sec, 0);
    EQ(res.tv_nsec, 1);
    FAILS(clock_gettime(4711, &res), EINVAL);
    struct timeval tv;
    CHECK(gettimeofday(&tv, NULL) == 0);
    pthread_t t[4];
    for (int i = 0; i < 4; i++)
        EQ(pthread_create(&t[i], NULL, watch, NULL), 0);
    for (int i = 0; i < 4; i++)
        EQ(pthread_join(t[i], NULL), 0);
    say("forward\n");
    /* a file's time is a time of the same clock */
    double before = on(CLOCK_REALTIME_COARSE);
    int fd = open("stamped", O_RDWR | O_CREAT | O_TRUNC, 0600);
    struct stat st;
    CHECK(fd >= 0 && fstat(fd, &st) == 0);
    double stamp = st.st_mtim.tv_sec + st.st_mtim.tv_nsec / 1e9;
    CHECK(stamp > before - 1 && stamp < before + 20);
    /* a child's clock is the parent's */
    int p[2];
    CHECK(pipe(p) == 0);
    double mine = on(CLOCK_MONOTONIC);
    pid_t pid = fork();
    if (pid == 0) {
        double t = on(CLOCK_MONOTONIC);
        CHECK(write(p[1], &t, sizeof t) == sizeof t);
        _exit(0);
    }
    double its;
    CHECK(read(p[0], &its, sizeof its) == sizeof its);
    CHECK(its >= mine && its <= on(CLOCK_MONOTONIC));
    ends_with(pid, 0);
    say("with children\n");
    char text[5][32];
    for (int i = 0; i < 5; i++)
        snprintf(text[i], sizeof text[i], "%.9f", on(ids[i]));
    execl("/proc/self/exe", "clocks", text[0], text[1], text[2], text[3], text[4], (char *)NULL);
    return 98;
}
