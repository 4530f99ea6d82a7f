/* Mappings: of files, shared with children, moved, protected; the heap; what /proc says of them. */
#include "guest.h"
#include <setjmp.h>

static sigjmp_buf out;
static void on_fault(int sig) { siglongjmp(out, sig); }
#define FAULTS(expr, sig)                                                                                              \
    do {                                                                                                               \
        int s_ = sigsetjmp(out, 1);                                                                                    \
        if (s_ == 0) {                                                                                                 \
            (void)(expr);                                                                                              \
            dprintf(2, "%s:%d: no fault: %s\n", __FILE__, __LINE__, #expr);                                            \
            _exit(99);                                                                                                 \
        }                                                                                                              \
        EQ(s_, sig);                                                                                                   \
    } while (0)

int main(void) {
    long page = sysconf(_SC_PAGESIZE);
    handle(SIGSEGV, on_fault, SA_NODEFER);
    handle(SIGBUS, on_fault, SA_NODEFER);
    int fd = open("mapped", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0);
    char *text = malloc(5 * page);
    for (long i = 0; i < 5 * page; i++)
        text[i] = 'a' + i % 26;
    EQ(write(fd, text, 5 * page - 100), 5 * page - 100);

    volatile char *p = mmap(NULL, 5 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    CHECK(p != MAP_FAILED);
    CHECK(!memcmp((char *)p, text, 5 * page - 100));
    EQ(p[5 * page - 1], 0);
    p[0] = 'Z';
    char c;
    EQ(pread(fd, &c, 1, 0), 1);
    EQ(c, 'a');
    /* what is written to the file shows in pages that were not written to */
    EQ(pwrite(fd, "Q", 1, 3 * page), 1);
    volatile char *q = mmap(NULL, page, PROT_READ, MAP_PRIVATE, fd, 3 * page);
    EQ(q[0], 'Q');
    close(fd);
    EQ(p[page], text[page]);
    CHECK(munmap((void *)(p + page), page) == 0);
    FAULTS(p[page], SIGSEGV);
    EQ(p[2 * page], text[2 * page]);
    FAILS(mmap(NULL, 0, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), EINVAL);
    FAILS(mmap(NULL, page, PROT_READ, MAP_PRIVATE, 999, 0), EBADF);
    fd = open("mapped", O_RDONLY);
    FAILS(mmap(NULL, page, PROT_WRITE, MAP_SHARED, fd, 0), EACCES);
    FAILS(mmap(NULL, page, PROT_READ, MAP_PRIVATE, fd, 5), EINVAL);
    int dir = open(".", O_RDONLY);
    FAILS(mmap(NULL, page, PROT_READ, MAP_PRIVATE, dir, 0), ENODEV);
    say("private\n");

    volatile char *ro = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(ro != MAP_FAILED);
    EQ(ro[1], 'b');
    FAULTS(ro[0] = 1, SIGSEGV);
    int rw = open("shared", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(ftruncate(rw, 2 * page) == 0);
    volatile char *s = mmap(NULL, 3 * page, PROT_READ | PROT_WRITE, MAP_SHARED, rw, 0);
    CHECK(s != MAP_FAILED);
    s[10] = 'S';
    CHECK(msync((void *)s, 3 * page, MS_SYNC) == 0);
    EQ(pread(rw, &c, 1, 10), 1);
    EQ(c, 'S');
    EQ(pwrite(rw, "W", 1, page), 1);
    EQ(s[page], 'W');
    FAULTS(s[2 * page + 1], SIGBUS);
    pid_t pid = fork();
    if (pid == 0) {
        s[11] = 'C';
        _exit(s[10]);
    }
    ends_with(pid, 'S');
    EQ(s[11], 'C');
    CHECK(munmap((void *)s, 3 * page) == 0);
    EQ(pread(rw, &c, 1, 11), 1);
    EQ(c, 'C');
    say("shared\n");

    volatile int *anon = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    volatile int *private = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EQ(anon[0], 0);
    if ((pid = fork()) == 0) {
        anon[0] = 5;
        private[0] = 6;
        _exit(0);
    }
    ends_with(pid, 0);
    EQ(anon[0], 5);
    EQ(private[0], 0);
    say("with children\n");

    char *m = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 4; i++)
        m[i * page] = i + 1;
    char *moved = mremap(m, 4 * page, 64 * page, MREMAP_MAYMOVE);
    CHECK(moved != MAP_FAILED);
    for (int i = 0; i < 4; i++)
        EQ(moved[i * page], i + 1);
    EQ(moved[63 * page], 0);
    CHECK(mremap(moved, 64 * page, 2 * page, 0) == moved);
    FAULTS(((volatile char *)moved)[2 * page], SIGSEGV);
    char *hole = mmap(NULL, 8 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    FAULTS(*(volatile char *)hole, SIGSEGV);
    CHECK(mremap(moved, 2 * page, 2 * page, MREMAP_MAYMOVE | MREMAP_FIXED, hole + 4 * page) == hole + 4 * page);
    EQ(hole[5 * page], 2);
    FAILS(mmap(hole, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0), EEXIST);
    CHECK(mprotect(hole, page, PROT_READ | PROT_WRITE) == 0);
    hole[0] = 9;
    CHECK(mprotect(hole, page, PROT_READ) == 0);
    FAULTS(hole[0] = 1, SIGSEGV);
    EQ(hole[0], 9);
    FAILS(mprotect(hole + 1, page, PROT_READ), EINVAL);
    CHECK(munmap(hole + 6 * page, 2 * page) == 0);
    FAILS(mprotect(hole + 5 * page, 3 * page, PROT_READ), ENOMEM);
    hole[4 * page] = 1;
    CHECK(madvise(hole + 4 * page, page, MADV_DONTNEED) == 0);
    EQ(hole[4 * page], 0);
    FAILS(madvise(hole, page, 4711), EINVAL);
    unsigned char in_core[2];
    CHECK(mincore(hole + 4 * page, 2 * page, in_core) == 0);
    EQ(in_core[0] & 1, 1);
    EQ(mlock(hole, page), 0);
    EQ(munlock(hole, page), 0);
    say("moved and protected\n");

    char *brk0 = sbrk(0);
    CHECK(sbrk(10 * page) == brk0);
    memset(brk0, 7, 10 * page);
    CHECK(sbrk(-5 * page) != (void *)-1);
    EQ(((char *)sbrk(0) - brk0), 5 * page);
    FAULTS(*(volatile char *)(((long)brk0 + 6 * page) & -page), SIGSEGV);
    char *many[300];
    for (int i = 0; i < 300; i++) {
        many[i] = malloc(1000 * (i + 1));
        memset(many[i], i, 1000 * (i + 1));
    }
    for (int i = 0; i < 300; i++) {
        EQ((unsigned char)many[i][999], (unsigned char)i);
        free(many[i]);
    }
    say("heap\n");

    /* code made here */
    unsigned char code[] = {0xb8, 0x2a, 0, 0, 0, 0xc3};
    void *x = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(x, code, sizeof code);
    CHECK(mprotect(x, page, PROT_READ | PROT_EXEC) == 0);
    EQ(((int (*)(void))x)(), 42);
    /* memory by name */
    int shm = shm_open("/guest-shm", O_RDWR | O_CREAT | O_EXCL, 0600);
    if (shm < 0) {
        shm_unlink("/guest-shm");
        shm = shm_open("/guest-shm", O_RDWR | O_CREAT | O_EXCL, 0600);
    }
    CHECK(shm >= 0 && ftruncate(shm, page) == 0);
    volatile char *by_name = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, shm, 0);
    if ((pid = fork()) == 0) {
        int again = shm_open("/guest-shm", O_RDWR, 0);
        volatile char *mine = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, again, 0);
        mine[0] = 'n';
        _exit(0);
    }
    ends_with(pid, 0);
    EQ(by_name[0], 'n');
    CHECK(shm_unlink("/guest-shm") == 0);
    int mfd = memfd_create("guest", 0);
    CHECK(mfd >= 0 && ftruncate(mfd, page) == 0);
    volatile char *mem = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, mfd, 0);
    EQ(pwrite(mfd, "m", 1, 0), 1);
    EQ(mem[0], 'm');
    /* a file mapping that outlives its file */
    int g = open("gone", O_RDWR | O_CREAT | O_TRUNC, 0600);
    EQ(write(g, "here", 4), 4);
    volatile char *gone = mmap(NULL, page, PROT_READ, MAP_PRIVATE, g, 0);
    CHECK(unlink("gone") == 0 && close(g) == 0);
    EQ(gone[3], 'e');
    say("named\n");
    return 0;
}
