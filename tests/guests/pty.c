/* Terminals: a session on a pseudo-terminal, with the signals of its keys and job control. */
#include "guest.h"
#include <sys/ioctl.h>
#include <termios.h>

static int master;
static char slave[64];
static int gate[2], keep;

/* Starts a session with the terminal as its own, and runs `body` in it. */
static pid_t session(void (*body)(void)) {
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        EQ(setsid(), getpid());
        int fd = open(slave, O_RDWR);
        CHECK(fd >= 0);
        CHECK(ioctl(fd, TIOCSCTTY, 0) == 0);
        EQ(tcgetpgrp(fd), getpgrp());
        EQ(tcgetsid(fd), getpid());
        dup2(fd, 0);
        close(master);
        close(keep);
        body();
        _exit(0);
    }
    return pid;
}
static volatile int winch, cont;
static void on_winch(int sig) { sig == SIGWINCH ? winch++ : cont++; }

static void waits(void) {
    give(gate[1]);
    for (;;)
        pause();
}
static void resized(void) {
    handle(SIGWINCH, on_winch, 0);
    sigset_t block, none;
    sigemptyset(&none);
    sigemptyset(&block);
    sigaddset(&block, SIGWINCH);
    sigprocmask(SIG_BLOCK, &block, NULL);
    give(gate[1]);
    while (!winch)
        sigsuspend(&none);
    struct winsize w;
    CHECK(ioctl(0, TIOCGWINSZ, &w) == 0);
    EQ(w.ws_row, 33);
    EQ(w.ws_col, 77);
    _exit(7);
}
static void lines(void) {
    char buf[100];
    EQ(read(0, buf, sizeof buf), 6);
    CHECK(!memcmp(buf, "line1\n", 6));
    struct termios t;
    CHECK(tcgetattr(0, &t) == 0);
    cfmakeraw(&t);
    CHECK(tcsetattr(0, TCSANOW, &t) == 0);
    give(gate[1]);
    EQ(read(0, buf, 1), 1);
    EQ(buf[0], 3); /* Ctrl-C is a byte now */
    _exit(8);
}
static void background(void) {
    pid_t pid = fork();
    if (pid == 0) {
        setpgid(0, 0);
        char c;
        handle(SIGCONT, on_winch, 0);
        FAILS(read(0, &c, 1), EINTR); /* stopped by SIGTTIN, and then continued with a handler */
        EQ(cont, 1);
        EQ(read(0, &c, 1), 1);
        _exit(c);
    }
    setpgid(pid, pid);
    int status;
    EQ(waitpid(pid, &status, WUNTRACED), pid);
    CHECK(WIFSTOPPED(status));
    EQ(WSTOPSIG(status), SIGTTIN);
    handle(SIGTTOU, SIG_IGN, 0);
    EQ(tcsetpgrp(0, pid), 0);
    EQ(tcgetpgrp(0), pid);
    kill(-pid, SIGCONT);
    give(gate[1]);
    EQ(waitpid(pid, &status, WUNTRACED), pid);
    CHECK(WIFEXITED(status));
    EQ(WEXITSTATUS(status), 'q');
    EQ(tcsetpgrp(0, getpgrp()), 0);
    /* writing in the background, when the terminal says so */
    struct termios t;
    CHECK(tcgetattr(0, &t) == 0);
    t.c_lflag |= TOSTOP;
    CHECK(tcsetattr(0, TCSANOW, &t) == 0);
    if ((pid = fork()) == 0) {
        setpgid(0, 0);
        handle(SIGTTOU, SIG_DFL, 0);
        write(0, "x", 1);
        _exit(1);
    }
    EQ(waitpid(pid, &status, WUNTRACED), pid);
    CHECK(WIFSTOPPED(status));
    EQ(WSTOPSIG(status), SIGTTOU);
    kill(pid, SIGKILL);
    dies_of(pid, SIGKILL);
    _exit(9);
}

int main(void) {
    CHECK(pipe(gate) == 0);
    master = posix_openpt(O_RDWR | O_NOCTTY);
    CHECK(master >= 0);
    CHECK(grantpt(master) == 0 && unlockpt(master) == 0);
    CHECK(ptsname_r(master, slave, sizeof slave) == 0);
    keep = open(slave, O_RDWR | O_NOCTTY);
    CHECK(keep >= 0);
    EQ(isatty(keep), 1);
    CHECK(!strcmp(ttyname(keep), slave));
    int status;

    pid_t pid = session(waits);
    take(gate[0]);
    EQ(write(master, "\003", 1), 1);
    dies_of(pid, SIGINT);
    pid = session(waits);
    take(gate[0]);
    struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    EQ(write(master, "\034", 1), 1);
    dies_of(pid, SIGQUIT);
    say("interrupt and quit\n");
    pid = session(resized);
    take(gate[0]);
    struct winsize w = {33, 77, 0, 0};
    CHECK(ioctl(master, TIOCSWINSZ, &w) == 0);
    ends_with(pid, 7);
    say("resize\n");
    pid = session(lines);
    EQ(write(master, "linxx\177\177e1\n", 10), 10);
    take(gate[0]);
    EQ(write(master, "\003", 1), 1);
    ends_with(pid, 8);
    say("lines and raw\n");
    struct termios t;
    CHECK(tcgetattr(keep, &t) == 0);
    t.c_lflag |= ICANON | ISIG | ECHO;
    t.c_iflag |= ICRNL;
    CHECK(tcsetattr(keep, TCSANOW, &t) == 0);
    pid = session(background);
    take(gate[0]);
    EQ(write(master, "q\n", 2), 2);
    ends_with(pid, 9);
    say("background\n");
    /* stopped by its key, seen by the parent; hung up by the end of the terminal */
    pid = session(waits);
    take(gate[0]);
    CHECK(tcgetattr(keep, &t) == 0);
    EQ(write(master, "\032", 1), 1);
    /* an orphaned group is not stopped by the key */
    sleep_ms(50);
    int r = waitpid(pid, &status, WUNTRACED | WNOHANG);
    say("stop key: %d\n", r != 0);
    close(keep);
    close(master);
    dies_of(pid, SIGHUP);
    say("hangup\n");
    return 0;
}
