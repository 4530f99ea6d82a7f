/* Descriptors: numbers, duplicates, flags, shared offsets. */
#include "guest.h"

int main(void) {
    int a = open("file", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(a >= 0);
    int b = dup(a);
    EQ(b, a + 1);
    EQ(dup2(a, 50), 50);
    EQ(dup2(a, a), a);
    FAILS(dup2(49, 51), EBADF);
    FAILS(dup2(49, 49), EBADF);
    FAILS(dup3(a, a, 0), EINVAL);
    EQ(dup3(a, 52, O_CLOEXEC), 52);
    EQ(fcntl(52, F_GETFD), FD_CLOEXEC);
    EQ(fcntl(a, F_DUPFD, 60), 60);
    EQ(fcntl(a, F_DUPFD_CLOEXEC, 60), 61);
    FAILS(fcntl(a, F_DUPFD, 1 << 30), EINVAL);
    close(b);
    EQ(open("/dev/null", O_RDONLY), b); /* the lowest */
    EQ(write(a, "0123456789", 10), 10);
    EQ(lseek(50, 0, SEEK_CUR), 10);
    EQ(lseek(50, 3, SEEK_SET), 3);
    char buf[16];
    EQ(read(a, buf, 2), 2);
    CHECK(buf[0] == '3');
    int c = open("file", O_RDWR | O_APPEND);
    EQ(lseek(c, 0, SEEK_CUR), 0);
    EQ(write(c, "end", 3), 3);
    EQ(lseek(c, 0, SEEK_CUR), 13);
    EQ(fcntl(c, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK), O_RDWR | O_APPEND);
    CHECK(fcntl(c, F_SETFL, O_NONBLOCK) == 0);
    EQ(fcntl(c, F_GETFL) & (O_APPEND | O_NONBLOCK), O_NONBLOCK);
    pid_t pid = fork();
    if (pid == 0) {
        EQ(lseek(a, 8, SEEK_SET), 8);
        close(50);
        _exit(0);
    }
    ends_with(pid, 0);
    EQ(lseek(a, 0, SEEK_CUR), 8);
    EQ(fcntl(50, F_GETFD), 0);
    EQ(syscall(SYS_close_range, 60, 70, 4 /* CLOSE_RANGE_CLOEXEC */), 0);
    EQ(fcntl(60, F_GETFD), FD_CLOEXEC);
    EQ(syscall(SYS_close_range, 50, 70, 0), 0);
    FAILS(fcntl(60, F_GETFD), EBADF);
    FAILS(close(60), EBADF);
    FAILS(close(-1), EBADF);
    FAILS(read(77, buf, 1), EBADF);
    FAILS(fcntl(a, 4711, 0), EINVAL);
    EQ(dup2(a, 1023), 1023);
    EQ(close(1023), 0);
    /* a closed standard output is reused */
    int keep = dup(1);
    close(1);
    EQ(open("replaced", O_WRONLY | O_CREAT | O_TRUNC, 0644), 1);
    say("into the file\n");
    CHECK(dup2(keep, 1) == 1);
    say("%s", slurp("replaced"));
    EQ(fcntl(a, F_SETOWN, getpid()), 0);
    EQ(fcntl(a, F_GETOWN), getpid());
    EQ(syscall(SYS_kcmp, getpid(), getpid(), 0, a, keep) != 0, 1);
    int m = memfd_create("m", MFD_ALLOW_SEALING);
    CHECK(m >= 0);
    EQ(fcntl(m, F_ADD_SEALS, F_SEAL_WRITE), 0);
    EQ(fcntl(m, F_GET_SEALS), F_SEAL_WRITE);
    FAILS(write(m, "x", 1), EPERM);
    say("descriptors\n");
    return 0;
}
