/* The memory of other processes, read and changed by calls and by way of /proc; and a process's own by that way. */
#include "guest.h"
#include <fcntl.h>
#include <sys/uio.h>

static int in_data = 1;

static ssize_t peek(pid_t pid, volatile int *at, int *to) {
    struct iovec here = {to, sizeof *to}, there = {(void *)at, sizeof *at};
    return process_vm_readv(pid, &here, 1, &there, 1, 0);
}

static int memory_of(const char *whose, int flags) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/mem", whose);
    return open(path, flags);
}

int main(void) {
    volatile int on_stack = 1234;
    volatile int *on_heap = malloc(sizeof *on_heap);
    int to_child[2], to_parent[2], copy = 0;
    CHECK(pipe(to_child) == 0 && pipe(to_parent) == 0);
    *on_heap = 5;
    pid_t pid = fork();
    if (pid == 0) {
        on_stack = 5678, *on_heap = 6, in_data = 7;
        give(to_parent[1]);
        take(to_child[0]);
        EQ(on_stack, 91);
        EQ(*on_heap, 92);
        /* of the parent */
        EQ(peek(getppid(), &on_stack, &copy), sizeof copy);
        EQ(copy, 1234);
        _exit(7);
    }
    take(to_parent[0]);
    EQ(peek(pid, &on_stack, &copy), sizeof copy);
    say("on the stack %d\n", copy);
    EQ(peek(pid, on_heap, &copy), sizeof copy);
    say("on the heap %d\n", copy);
    EQ(peek(pid, &in_data, &copy), sizeof copy);
    say("in its data %d\n", copy);
    copy = 91;
    struct iovec here = {&copy, sizeof copy}, there = {(void *)&on_stack, sizeof on_stack};
    EQ(process_vm_writev(pid, &here, 1, &there, 1, 0), sizeof copy);
    char number[16];
    snprintf(number, sizeof number, "%d", pid);
    int mem = memory_of(number, O_RDWR);
    CHECK(mem >= 0);
    copy = 92;
    EQ(pwrite(mem, &copy, sizeof copy, (off_t)on_heap), sizeof copy);
    EQ(pread(mem, &copy, sizeof copy, (off_t)&in_data), sizeof copy);
    EQ(copy, 7);
    give(to_child[1]);
    ends_with(pid, 7);
    FAILS(peek(pid, &on_stack, &copy), ESRCH);
    EQ(peek(getpid(), &on_stack, &copy), sizeof copy);
    EQ(copy, 1234);

    int own = memory_of("self", O_RDONLY);
    CHECK(own >= 0);
    EQ(pread(own, &copy, sizeof copy, (off_t)&on_stack), sizeof copy);
    EQ(copy, 1234);
    say("done\n");
    return 0;
}
