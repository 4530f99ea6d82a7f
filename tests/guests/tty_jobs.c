/* What a process in the background may do with its terminal depends on what the calling thread blocks, handles or
 * ignores of SIGTTIN and SIGTTOU (tty_jobctrl.c, __tty_check_change). */
#include "guest.h"
#include <sys/ioctl.h>
#include <termios.h>

static int got_in, got_out;
static void on_signal(int sig) { sig == SIGTTIN ? got_in++ : got_out++; }

static void block(int sig, int how) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, sig);
    EQ(sigprocmask(how, &set, NULL), 0);
}

/* A child in a group of its own, in the background, with a mate that counts the signals of the group. */
struct group {
    pid_t pid, mate;
    int count; /* the mate writes a byte here for each signal that it gets */
};
static volatile int mate_fd;
static void tell(int sig) { write(mate_fd, sig == SIGTTIN ? "i" : sig == SIGTTOU ? "o" : ".", 1); }

static struct group background(void (*body)(void)) {
    struct group g;
    int ready[2], counts[2], go[2];
    CHECK(pipe(ready) == 0 && pipe(counts) == 0 && pipe(go) == 0);
    fflush(stdout);
    if ((g.pid = fork()) == 0) {
        setpgid(0, 0);
        take(go[0]);
        body();
        _exit(0);
    }
    setpgid(g.pid, g.pid);
    if ((g.mate = fork()) == 0) {
        setpgid(0, g.pid);
        mate_fd = counts[1];
        /* The last of them must not come before another has been told, whose handler it would interrupt. */
        struct sigaction a = {.sa_handler = tell, .sa_flags = SA_RESTART};
        sigaddset(&a.sa_mask, SIGUSR1);
        CHECK(sigaction(SIGTTIN, &a, NULL) == 0 && sigaction(SIGTTOU, &a, NULL) == 0);
        handle(SIGUSR1, tell, SA_RESTART);
        give(ready[1]);
        for (;;)
            pause();
    }
    take(ready[0]);
    give(go[1]);
    g.count = counts[0];
    close(counts[1]);
    close(ready[0]), close(ready[1]), close(go[0]), close(go[1]);
    return g;
}

/* The child has ended well; the group got these signals (their letters). */
static void done(struct group g, const char *signals) {
    char seen[16] = "";
    ends_with(g.pid, 0);
    /* What came before has been told before. */
    kill(g.mate, SIGUSR1);
    for (size_t n = 0; n < sizeof seen - 1; n++) {
        EQ(read(g.count, seen + n, 1), 1);
        if (seen[n] == '.') {
            seen[n] = 0;
            break;
        }
    }
    kill(g.mate, SIGKILL);
    dies_of(g.mate, SIGKILL);
    if (strcmp(seen, signals)) {
        dprintf(2, "the group got '%s', not '%s'\n", seen, signals);
        _exit(99);
    }
    close(g.count);
}

static char c;

static void blocked(void) {
    block(SIGTTIN, SIG_BLOCK);
    block(SIGTTOU, SIG_BLOCK);
    FAILS(read(0, &c, 1), EIO);
    struct iovec v = {&c, 1};
    FAILS(readv(0, &v, 1), EIO);
    /* Into the foreground and back: nothing is sent to the group. */
    pid_t before = tcgetpgrp(0);
    EQ(tcsetpgrp(0, getpgrp()), 0);
    EQ(tcgetpgrp(0), getpgrp());
    EQ(tcsetpgrp(0, before), 0);
    struct termios t;
    EQ(tcgetattr(0, &t), 0);
    EQ(tcsetattr(0, TCSADRAIN, &t), 0);
    EQ(tcflush(0, TCIFLUSH), 0);
    EQ(write(0, "", 0), 0);
    EQ(write(0, ".", 1), 1);
}
static void ignored(void) {
    handle(SIGTTIN, SIG_IGN, 0);
    handle(SIGTTOU, SIG_IGN, 0);
    FAILS(read(0, &c, 1), EIO);
    pid_t before = tcgetpgrp(0);
    EQ(tcsetpgrp(0, getpgrp()), 0);
    EQ(tcsetpgrp(0, before), 0);
    EQ(write(0, ".", 1), 1);
}
static void handled_read(void) {
    handle(SIGTTIN, on_signal, 0);
    FAILS(read(0, &c, 1), EINTR);
    EQ(got_in, 1);
    EQ(got_out, 0);
}
static void handled_change(void) {
    handle(SIGTTOU, on_signal, 0);
    FAILS(tcsetpgrp(0, getpgrp()), EINTR);
    EQ(got_out, 1);
}
static void handled_write(void) {
    handle(SIGTTOU, on_signal, 0);
    FAILS(write(0, ".", 1), EINTR);
    EQ(got_out, 1);
}
/* Blocked in one thread only: what counts is the thread that calls. */
static void *in_thread(void *unused) {
    block(SIGTTIN, SIG_BLOCK);
    block(SIGTTOU, SIG_BLOCK);
    FAILS(read(0, &c, 1), EIO);
    pid_t before = tcgetpgrp(0);
    EQ(tcsetpgrp(0, getpgrp()), 0);
    EQ(tcsetpgrp(0, before), 0);
    return unused;
}
static void threads(void) {
    pthread_t t;
    EQ(pthread_create(&t, NULL, in_thread, NULL), 0);
    EQ(pthread_join(t, NULL), 0);
    handle(SIGTTIN, on_signal, 0);
    FAILS(read(0, &c, 1), EINTR);
    EQ(got_in, 1);
}
static void by_default(void) {
    EQ(read(0, &c, 1), 1);
    EQ(c, 'k');
}
/* The kernel does not stop a group that nobody could continue. */
static void orphan(void) {
    FAILS(read(0, &c, 1), EIO);
    struct termios t;
    EQ(tcgetattr(0, &t), 0);
    FAILS(tcsetattr(0, TCSANOW, &t), EIO);
    FAILS(tcsetpgrp(0, getpgrp()), ENOTTY);
}

static void set_tostop(int on) {
    struct termios t;
    EQ(tcgetattr(0, &t), 0);
    t.c_lflag = on ? t.c_lflag | TOSTOP : t.c_lflag & ~TOSTOP;
    EQ(tcsetattr(0, TCSANOW, &t), 0);
}

static int master;

static void session(void) {
    struct group g;
    done(background(blocked), "");
    say("blocked\n");
    done(background(ignored), "");
    say("ignored\n");
    done(background(handled_read), "i");
    done(background(handled_change), "o");
    say("handled\n");
    done(background(threads), "i");
    say("threads\n");
    set_tostop(1);
    done(background(blocked), "");
    done(background(ignored), "");
    done(background(handled_write), "o");
    set_tostop(0);
    say("writing\n");
    g = background(by_default);
    int status;
    EQ(waitpid(g.pid, &status, WUNTRACED), g.pid);
    CHECK(WIFSTOPPED(status));
    EQ(WSTOPSIG(status), SIGTTIN);
    block(SIGTTOU, SIG_BLOCK);
    EQ(tcsetpgrp(0, g.pid), 0);
    EQ(kill(g.pid, SIGCONT), 0);
    EQ(write(master, "k\n", 2), 2);
    done(g, "i");
    EQ(tcsetpgrp(0, getpgrp()), 0);
    block(SIGTTOU, SIG_UNBLOCK);
    say("stopped and continued\n");
    int p[2];
    CHECK(pipe(p) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        /* The parent of the group ends before it. */
        if (fork() == 0) {
            setpgid(0, 0);
            while (getppid() != 1 && getppid() != getsid(0))
                sleep_ms(1);
            prctl(PR_SET_PDEATHSIG, 0);
            orphan();
            give(p[1]);
            _exit(0);
        }
        _exit(0);
    }
    ends_with(pid, 0);
    close(p[1]);
    take(p[0]);
    say("orphaned\n");
    _exit(0);
}

int main(void) {
    char slave[64];
    master = posix_openpt(O_RDWR | O_NOCTTY);
    CHECK(master >= 0);
    CHECK(grantpt(master) == 0 && unlockpt(master) == 0);
    CHECK(ptsname_r(master, slave, sizeof slave) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        EQ(setsid(), getpid());
        int fd = open(slave, O_RDWR);
        CHECK(fd >= 0);
        CHECK(ioctl(fd, TIOCSCTTY, 0) == 0);
        dup2(fd, 0);
        close(fd);
        session();
    }
    ends_with(pid, 0);
    return 0;
}
