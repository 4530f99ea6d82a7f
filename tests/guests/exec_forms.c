/* execve and its relatives: what survives, what does not, and what fails how. */
#include "guest.h"

extern char **environ;

static void handler(int sig) { (void)sig; }

/* The other side: started with a first argument that names the check. */
static int after(int argc, char **argv) {
    const char *what = argv[1];
    if (!strcmp(what, "args")) {
        for (int i = 0; i < argc; i++)
            say("argv[%d]=%s\n", i, i == 0 ? "?" : argv[i]);
        for (char **e = environ; *e; e++)
            if (!strncmp(*e, "GUEST_", 6))
                say("%s\n", *e);
        return 11;
    }
    if (!strcmp(what, "argv0")) {
        say("argv0=%s\n", argv[0]);
        return 12;
    }
    if (!strcmp(what, "state")) {
        struct sigaction a;
        CHECK(sigaction(SIGUSR1, NULL, &a) == 0);
        say("handled became %s\n", a.sa_handler == SIG_DFL ? "default" : "other");
        CHECK(sigaction(SIGUSR2, NULL, &a) == 0);
        say("ignored stays %s\n", a.sa_handler == SIG_IGN ? "ignored" : "other");
        sigset_t mask, pending;
        CHECK(sigprocmask(SIG_BLOCK, NULL, &mask) == 0);
        CHECK(sigpending(&pending) == 0);
        say("blocked %d pending %d\n", sigismember(&mask, SIGHUP), sigismember(&pending, SIGHUP));
        int kept = atoi(argv[2]), closed = atoi(argv[3]);
        say("kept %d\n", fcntl(kept, F_GETFD));
        FAILS(fcntl(closed, F_GETFD), EBADF);
        EQ(getpid(), atoi(argv[4]));
        char cwd[PATH_MAX];
        CHECK(getcwd(cwd, sizeof cwd));
        CHECK(!strcmp(cwd, argv[5]));
        EQ(umask(0), 027);
        struct rlimit lim;
        CHECK(getrlimit(RLIMIT_NOFILE, &lim) == 0);
        EQ(lim.rlim_cur, 333);
        return 13;
    }
    if (!strcmp(what, "alarm")) {
        unsigned left = alarm(0);
        CHECK(left > 0 && left <= 100);
        return 14;
    }
    if (!strcmp(what, "chain")) {
        int n = atoi(argv[2]);
        if (n == 0)
            return 15;
        char next[16];
        snprintf(next, sizeof next, "%d", n - 1);
        execl("/proc/self/exe", "exec_forms", "chain", next, (char *)NULL);
        return 97;
    }
    return 96;
}

static void *exec_from_here(void *self) {
    execl((char *)self, "exec_forms", "args", "thread", (char *)NULL);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc > 1)
        return after(argc, argv);
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    CHECK(n > 0);
    self[n] = 0;
    pid_t pid;

    char *args[] = {"exec_forms", "args", "", "two words", "\303\244", NULL};
    char *env[] = {"GUEST_A=1", "GUEST_B=", "PATH=/nowhere", NULL};
    if ((pid = fork()) == 0) {
        execve(self, args, env);
        _exit(98);
    }
    ends_with(pid, 11);
    if ((pid = fork()) == 0) {
        setenv("GUEST_C", "kept", 1);
        execv(self, args);
        _exit(98);
    }
    ends_with(pid, 11);
    if ((pid = fork()) == 0) {
        execl(self, "another name", "argv0", (char *)NULL);
        _exit(98);
    }
    ends_with(pid, 12);
    if ((pid = fork()) == 0) {
        int fd = open(self, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0);
        char *a[] = {"by descriptor", "argv0", NULL};
        fexecve(fd, a, environ);
        _exit(98);
    }
    ends_with(pid, 12);
    if ((pid = fork()) == 0) {
        int dir = open("/", O_PATH | O_DIRECTORY);
        CHECK(dir >= 0);
        char *a[] = {"at", "argv0", NULL};
        syscall(SYS_execveat, dir, self + 1, a, environ, 0);
        _exit(98);
    }
    ends_with(pid, 12);
    if ((pid = fork()) == 0) {
        int fd = open(self, O_PATH);
        char *a[] = {"at empty", "argv0", NULL};
        syscall(SYS_execveat, fd, "", a, environ, AT_EMPTY_PATH);
        _exit(98);
    }
    ends_with(pid, 12);

    /* what survives */
    if ((pid = fork()) == 0) {
        handle(SIGUSR1, handler, 0);
        handle(SIGUSR2, SIG_IGN, 0);
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGHUP);
        CHECK(sigprocmask(SIG_BLOCK, &set, NULL) == 0);
        CHECK(raise(SIGHUP) == 0);
        int kept = open("/dev/null", O_RDONLY), closed = open("/dev/null", O_RDONLY | O_CLOEXEC);
        char a[16], b[16], c[16], cwd[PATH_MAX];
        snprintf(a, sizeof a, "%d", kept);
        snprintf(b, sizeof b, "%d", closed);
        snprintf(c, sizeof c, "%d", getpid());
        CHECK(getcwd(cwd, sizeof cwd));
        umask(027);
        struct rlimit lim;
        CHECK(getrlimit(RLIMIT_NOFILE, &lim) == 0);
        lim.rlim_cur = 333;
        CHECK(setrlimit(RLIMIT_NOFILE, &lim) == 0);
        execl(self, "exec_forms", "state", a, b, c, cwd, (char *)NULL);
        _exit(98);
    }
    ends_with(pid, 13);
    if ((pid = fork()) == 0) {
        alarm(100);
        execl(self, "exec_forms", "alarm", (char *)NULL);
        _exit(98);
    }
    ends_with(pid, 14);
    if ((pid = fork()) == 0) {
        execl(self, "exec_forms", "chain", "10", (char *)NULL);
        _exit(98);
    }
    ends_with(pid, 15);

    /* from another thread */
    if ((pid = fork()) == 0) {
        pthread_t t;
        CHECK(pthread_create(&t, NULL, exec_from_here, self) == 0);
        pthread_join(t, NULL);
        _exit(98);
    }
    ends_with(pid, 11);

    /* scripts */
    int fd = open("script", O_WRONLY | O_CREAT | O_TRUNC, 0755);
    CHECK(fd >= 0);
    dprintf(fd, "#!/bin/sh -e\necho \"script $# $1\"\nexit 21\n");
    close(fd);
    if ((pid = fork()) == 0) {
        execl("./script", "ignored", "one", (char *)NULL);
        _exit(98);
    }
    ends_with(pid, 21);
    fd = open("script2", O_WRONLY | O_CREAT | O_TRUNC, 0755);
    dprintf(fd, "#! ./script second\n");
    close(fd);
    if ((pid = fork()) == 0) {
        execl("./script2", "ignored", (char *)NULL);
        _exit(98);
    }
    ends_with(pid, 21);

    /* failures leave the process as it was */
    char *none[] = {"x", NULL};
    FAILS(execv("./nothing", none), ENOENT);
    FAILS(execv("script/x", none), ENOTDIR);
    FAILS(execv("/", none), EACCES);
    fd = open("plain", O_WRONLY | O_CREAT | O_TRUNC, 0644);
    dprintf(fd, "data\n");
    close(fd);
    FAILS(execv("plain", none), EACCES);
    CHECK(chmod("plain", 0755) == 0);
    FAILS(execv("plain", none), ENOEXEC);
    fd = open("badint", O_WRONLY | O_CREAT | O_TRUNC, 0755);
    dprintf(fd, "#!/no/such/interpreter\n");
    close(fd);
    FAILS(execv("badint", none), ENOENT);
    FAILS(syscall(SYS_execve, (char *)8, none, environ), EFAULT);
    FAILS(syscall(SYS_execve, self, (char **)8, environ), EFAULT);
    CHECK(symlink("loop", "loop") == 0);
    FAILS(execv("loop", none), ELOOP);
    char *big = malloc(3 << 20);
    memset(big, 'x', (3 << 20) - 1);
    big[(3 << 20) - 1] = 0;
    char *huge[] = {"exec_forms", big, NULL};
    FAILS(execv(self, huge), E2BIG);
    say("failures\n");
    return 0;
}
