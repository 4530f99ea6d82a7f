/* /proc/self, and /proc of relatives, as a native process sees them. */
#include "guest.h"
#include <dirent.h>
#include <elf.h>
#include <sys/auxv.h>

static long field(const char *text, const char *name) {
    const char *at = strstr(text, name);
    CHECK(at != NULL);
    return strtol(at + strlen(name), NULL, 0);
}
static int entries(const char *dir) {
    DIR *d = opendir(dir);
    CHECK(d != NULL);
    int n = 0;
    for (struct dirent *e; (e = readdir(d));)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}
static void *idle(void *arg) {
    pthread_setname_np(pthread_self(), "guest-idle");
    give(((int *)arg)[1]);
    for (;;)
        pause();
    return NULL;
}

int main(int argc, char **argv) {
    char buf[PATH_MAX], path[PATH_MAX], *text;
    ssize_t n = readlink("/proc/self/exe", buf, sizeof buf - 1);
    CHECK(n > 0);
    buf[n] = 0;
    say("exe %s\n", strrchr(buf, '/'));
    n = readlink("/proc/self", path, sizeof path - 1);
    path[n] = 0;
    EQ(atoi(path), getpid());
    text = slurp("/proc/self/cmdline");
    CHECK(!strcmp(text, argv[0]));
    CHECK(getcwd(path, sizeof path));
    n = readlink("/proc/self/cwd", buf, sizeof buf - 1);
    buf[n] = 0;
    CHECK(!strcmp(buf, path));
    setenv("LATER", "1", 1);
    text = slurp("/proc/self/environ");
    CHECK(!strstr(text, "LATER"));
    text = slurp("/proc/self/comm");
    say("comm %s", text);
    CHECK(prctl(PR_SET_NAME, "renamed") == 0);
    text = slurp("/proc/self/comm");
    say("comm %s", text);

    text = slurp("/proc/self/stat");
    int pid, ppid, pgrp, session;
    char comm[32], state;
    EQ(sscanf(text, "%d (%31[^)]) %c %d %d %d", &pid, comm, &state, &ppid, &pgrp, &session), 6);
    EQ(pid, getpid());
    EQ(ppid, getppid());
    EQ(pgrp, getpgrp());
    EQ(session, getsid(0));
    say("stat %s\n", comm);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
    handle(SIGUSR2, SIG_IGN, 0);
    raise(SIGUSR1);
    text = slurp("/proc/self/status");
    EQ(field(text, "\nPid:\t"), getpid());
    EQ(field(text, "\nPPid:\t"), getppid());
    EQ(field(text, "\nUid:\t"), getuid());
    EQ(field(text, "\nThreads:\t"), 1);
    if (!getenv("TRACED_AT_HOME"))
        EQ(field(text, "\nTracerPid:\t"), 0);
    EQ(field(text, "\nSeccomp:\t"), 0);
    EQ(field(text, "\nNoNewPrivs:\t"), 0);
    CHECK(strstr(text, "\nSigBlk:\t0000000000000200"));
    CHECK(strtoull(strstr(text, "\nSigIgn:\t") + 9, NULL, 16) & 0x800);
    CHECK(strstr(text, "\nState:\tR"));
    CHECK(field(text, "\nVmRSS:\t") > 0);
    say("status\n");

    text = slurp("/proc/self/maps");
    CHECK(strstr(text, "[stack]"));
    CHECK(strstr(text, "[vdso]"));
    CHECK(strstr(text, strrchr(argv[0], '/') ? strrchr(argv[0], '/') : argv[0]));
    CHECK(!strstr(text, "memfd:mosrun"));
    unsigned long here = (unsigned long)&n;
    int found = 0;
    for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        unsigned long from, to;
        if (sscanf(line, "%lx-%lx", &from, &to) == 2 && here >= from && here < to)
            found = 1;
    }
    EQ(found, 1);
    int before = entries("/proc/self/fd");
    int fd = open("/dev/null", O_RDONLY);
    EQ(entries("/proc/self/fd"), before + 1);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    n = readlink(path, buf, sizeof buf - 1);
    buf[n] = 0;
    say("fd %s\n", buf);
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    CHECK(field(slurp(path), "pos:\t") == 0);
    int again = open("/proc/self/exe", O_RDONLY);
    CHECK(again >= 0);
    EQ(read(again, buf, 4), 4);
    CHECK(!memcmp(buf, "\177ELF", 4));
    EQ(fcntl(3, F_GETFD) >= 0, 1);
    say("maps and fds\n");

    /* the auxiliary vector in the file is the one in memory */
    int aux = open("/proc/self/auxv", O_RDONLY);
    Elf64_auxv_t entry;
    int same = 0;
    while (read(aux, &entry, sizeof entry) == sizeof entry && entry.a_type != AT_NULL)
        if (entry.a_type == AT_ENTRY || entry.a_type == AT_RANDOM || entry.a_type == AT_PHDR ||
            entry.a_type == AT_SYSINFO_EHDR)
            same += getauxval(entry.a_type) == entry.a_un.a_val;
    EQ(same, 4);
    CHECK(!strcmp((char *)getauxval(AT_EXECFN), argv[0]));
    EQ(getauxval(AT_UID), getuid());
    EQ(getauxval(AT_PAGESZ), sysconf(_SC_PAGESIZE));

    int p[2];
    CHECK(pipe(p) == 0);
    pthread_t t;
    EQ(pthread_create(&t, NULL, idle, p), 0);
    take(p[0]);
    EQ(entries("/proc/self/task"), 2);
    text = slurp("/proc/self/status");
    EQ(field(text, "\nThreads:\t"), 2);
    DIR *d = opendir("/proc/self/task");
    for (struct dirent *e; (e = readdir(d));)
        if (e->d_name[0] != '.' && atoi(e->d_name) != getpid()) {
            snprintf(path, sizeof path, "/proc/self/task/%d/comm", atoi(e->d_name));
            say("thread %s", slurp(path));
        }
    closedir(d);
    snprintf(path, sizeof path, "/proc/thread-self");
    n = readlink(path, buf, sizeof buf - 1);
    buf[n] = 0;
    snprintf(path, sizeof path, "%d/task/%d", getpid(), getpid());
    CHECK(!strcmp(buf, path));

    /* relatives */
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_NAME, "child");
        give(p[1]);
        pause();
        _exit(0);
    }
    take(p[0]);
    snprintf(path, sizeof path, "/proc/%d/comm", child);
    say("child %s", slurp(path));
    snprintf(path, sizeof path, "/proc/%d/status", child);
    text = slurp(path);
    EQ(field(text, "\nPPid:\t"), getpid());
    snprintf(path, sizeof path, "/proc/%d/exe", child);
    n = readlink(path, buf, sizeof buf - 1);
    buf[n] = 0;
    say("child exe %s\n", strrchr(buf, '/'));
    kill(child, SIGKILL);
    dies_of(child, SIGKILL);
    snprintf(path, sizeof path, "/proc/%d", child);
    FAILS(access(path, F_OK), ENOENT);
    CHECK(field(slurp("/proc/self/limits"), "Max open files") > 0);
    (void)argc;
    return 0;
}
