/* A process whose first thread has ended. */
#include "guest.h"

static __thread int mine = 7;

static void *rest(void *argument) {
    pid_t leader = getpid();
    until_state(leader, 'Z');
    say("%d\n", (int)leader);
    char line[64];
    ssize_t n;
    long *memory = argument;
    while ((n = read(0, line, sizeof line)) > 0) {
        EQ(memory[1000], 4711);
        EQ(mine, 7);
        CHECK(getpid() == leader && syscall(SYS_gettid) != leader);
        EQ(write(1, line, n), n);
        /* something of a file is mapped by this thread */
        int fd = open("/etc/passwd", O_RDONLY);
        CHECK(fd >= 0);
        char *file = mmap(NULL, 1, PROT_READ, MAP_PRIVATE, fd, 0);
        CHECK(file != MAP_FAILED && file[0] == 'r');
        CHECK(munmap(file, 1) == 0 && close(fd) == 0);
    }
    exit(7);
}

int main(void) {
    long *memory = calloc(4096, sizeof *memory);
    memory[1000] = 4711;
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, rest, memory) == 0);
    pthread_exit(NULL);
}
