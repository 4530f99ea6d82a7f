/* Record locks, open file description locks, flock, lockf, leases. */
#include "guest.h"
#include <sys/file.h>

static int lock(int fd, int cmd, int type, off_t from, off_t len) {
    struct flock l = {.l_type = type, .l_whence = SEEK_SET, .l_start = from, .l_len = len};
    return fcntl(fd, cmd, &l);
}

int main(void) {
    int fd = open("locked", O_RDWR | O_CREAT | O_TRUNC, 0600), to[2], from[2];
    CHECK(fd >= 0 && pipe(to) == 0 && pipe(from) == 0);
    CHECK(lock(fd, F_SETLK, F_WRLCK, 0, 10) == 0);
    CHECK(lock(fd, F_SETLK, F_RDLCK, 5, 5) == 0);
    pid_t parent = getpid(), pid = fork();
    if (pid == 0) {
        struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 0};
        CHECK(fcntl(fd, F_GETLK, &l) == 0);
        EQ(l.l_type, F_WRLCK);
        EQ(l.l_pid, parent);
        EQ(l.l_len, 5);
        FAILS(lock(fd, F_SETLK, F_WRLCK, 7, 1), EAGAIN);
        EQ(lock(fd, F_SETLK, F_RDLCK, 7, 1), 0);
        EQ(lock(fd, F_SETLK, F_WRLCK, 20, 5), 0);
        give(to[1]);
        CHECK(lock(fd, F_SETLKW, F_WRLCK, 0, 10) == 0); /* waits for the parent */
        give(to[1]);
        take(from[0]);
        _exit(0);
    }
    take(to[0]);
    struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 20, .l_len = 1};
    CHECK(fcntl(fd, F_GETLK, &l) == 0);
    EQ(l.l_pid, pid);
    until_state(pid, 'S');
    /* each waits for the other: the second is told */
    FAILS(lock(fd, F_SETLKW, F_WRLCK, 20, 1), EDEADLK);
    CHECK(lock(fd, F_SETLK, F_UNLCK, 0, 0) == 0);
    take(to[0]);
    FAILS(lock(fd, F_SETLK, F_RDLCK, 3, 1), EAGAIN);
    give(from[1]);
    ends_with(pid, 0);
    CHECK(lock(fd, F_SETLK, F_WRLCK, 0, 0) == 0); /* locks die with their owner */
    /* closing any descriptor of the file drops them */
    close(open("locked", O_RDONLY));
    if ((pid = fork()) == 0) {
        EQ(lock(fd, F_SETLK, F_WRLCK, 0, 0), 0);
        _exit(0);
    }
    ends_with(pid, 0);
    say("record locks\n");

    int a = open("locked", O_RDWR), b = open("locked", O_RDWR);
    EQ(lock(a, F_OFD_SETLK, F_WRLCK, 0, 1), 0);
    FAILS(lock(b, F_OFD_SETLK, F_WRLCK, 0, 1), EAGAIN);
    int c = dup(a);
    EQ(lock(c, F_OFD_SETLK, F_WRLCK, 0, 1), 0);
    close(a);
    FAILS(lock(b, F_OFD_SETLK, F_WRLCK, 0, 1), EAGAIN);
    close(c);
    EQ(lock(b, F_OFD_SETLK, F_WRLCK, 0, 1), 0);
    say("description locks\n");

    EQ(flock(fd, LOCK_EX), 0);
    FAILS(flock(b, LOCK_SH | LOCK_NB), EAGAIN);
    if ((pid = fork()) == 0) {
        EQ(flock(fd, LOCK_UN), 0); /* the description is shared with the child */
        _exit(0);
    }
    ends_with(pid, 0);
    EQ(flock(b, LOCK_SH | LOCK_NB), 0);
    EQ(flock(fd, LOCK_SH | LOCK_NB), 0);
    if ((pid = fork()) == 0) {
        int mine = open("locked", O_RDWR);
        EQ(flock(mine, LOCK_EX), 0); /* waits */
        _exit(0);
    }
    until_state(pid, 'S');
    CHECK(flock(b, LOCK_UN) == 0 && flock(fd, LOCK_UN) == 0);
    ends_with(pid, 0);
    FAILS(flock(fd, 77), EINVAL);
    EQ(lock(b, F_OFD_SETLK, F_UNLCK, 0, 1), 0);
    EQ(lockf(fd, F_TLOCK, 0), 0);
    EQ(lockf(fd, F_ULOCK, 0), 0);
    say("flock\n");
    return 0;
}
