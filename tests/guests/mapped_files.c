/* Files that are mapped shared and writable: what is written to them in memory is in the file for everybody who opens it, reads it by a
 * descriptor that was open before, or comes when the process has ended. */
#include "guest.h"
#include <semaphore.h>

#define SIZE (1 << 20)

static char path[64];

static char *map(int fd, size_t len) {
    char *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

/* A file with a pattern, which nobody else has open. */
static int created(const char *name, size_t size) {
    snprintf(path, sizeof path, "%s", name);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    char *text = malloc(size);
    CHECK(text);
    for (size_t i = 0; i < size; i++)
        text[i] = (char)(i / 100);
    EQ(write(fd, text, size), size);
    free(text);
    return fd;
}

/* What a program finds in the file that only knows its name. */
static void found(size_t at, const char *wanted) {
    char command[200], text[64] = "";
    snprintf(command, sizeof command, "dd if=%s bs=1 skip=%zu count=%zu 2>/dev/null", path, at, strlen(wanted));
    FILE *p = popen(command, "r");
    CHECK(p);
    CHECK(fread(text, 1, sizeof text - 1, p) == strlen(wanted));
    CHECK(pclose(p) == 0);
    CHECK(strcmp(text, wanted) == 0);
}

/* The first one is written in memory and found by name while it is mapped, and written by name and found in memory. */
static void by_name(const char *name) {
    int fd = created(name, SIZE);
    char *at = map(fd, SIZE);
    EQ(close(fd), 0);
    EQ(at[SIZE - 1], (char)((SIZE - 1) / 100));
    strcpy(at + 5000, "in memory");
    strcpy(at + SIZE - 16, "at the end");
    EQ(msync(at, SIZE, MS_SYNC), 0);
    found(5000, "in memory");
    found(SIZE - 16, "at the end");
    strcpy(at + 5000, "and again");
    found(5000, "and again");
    char command[200];
    snprintf(command, sizeof command, "printf outside | dd of=%s bs=1 seek=9000 conv=notrunc 2>/dev/null", path);
    EQ(system(command), 0);
    CHECK(memcmp(at + 9000, "outside", 7) == 0);
    EQ(munmap(at, SIZE), 0);
    EQ(unlink(path), 0);
    say("by name\n");
}

/* It is seen through a descriptor that is open all the time, which sees what is written to memory and writes what is seen there. */
static void by_descriptor(void) {
    int fd = created("descriptor", 10000);
    char *at = map(fd, 10000), text[16] = "";
    strcpy(at + 9990, "memory");
    EQ(pread(fd, text, 7, 9990), 7);
    CHECK(strcmp(text, "memory") == 0);
    EQ(pwrite(fd, "written", 8, 4095), 8);
    CHECK(strcmp(at + 4095, "written") == 0);
    at[9999] = 'x';
    EQ(ftruncate(fd, 8192), 0);
    EQ(ftruncate(fd, 10000), 0);
    EQ(at[9999], 0);
    EQ(munmap(at, 10000), 0);
    EQ(close(fd), 0);
    EQ(unlink(path), 0);
    say("by descriptor\n");
}

/* It is there when the one who has written it has ended, in whatever way. */
static void by_the_dead(void) {
    for (int way = 0; way < 4; way++) {
        int fd = created("dead", 3 * 4096 + 100);
        EQ(close(fd), 0);
        int ready[2];
        CHECK(pipe(ready) == 0);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            int own = open(path, O_RDWR);
            CHECK(own >= 0);
            char *at = map(own, 3 * 4096 + 100);
            strcpy(at + 3 * 4096 + 50, "last words");
            if (way == 0)
                exit(0);
            if (way == 1)
                execl("/bin/true", "true", NULL);
            if (way == 2)
                EQ(munmap(at, 4 * 4096), 0);
            CHECK(write(ready[1], "", 1) == 1);
            for (;;)
                pause();
        }
        EQ(close(ready[1]), 0);
        if (way >= 2) {
            char byte;
            CHECK(read(ready[0], &byte, 1) == 1);
            EQ(kill(child, SIGKILL), 0);
        }
        EQ(status_of(child), way >= 2 ? SIGKILL : 0);
        EQ(close(ready[0]), 0);
        found(3 * 4096 + 50, "last words");
        int own = open(path, O_RDONLY);
        char text[16] = "";
        EQ(pread(own, text, 11, 3 * 4096 + 50), 11);
        CHECK(strcmp(text, "last words") == 0);
        EQ(close(own), 0);
        EQ(unlink(path), 0);
    }
    say("by the dead\n");
}

/* Two views of one file, and a part of one moved elsewhere, are one memory; a child has it, too. */
static void views(void) {
    int fd = created("views", 4 * 4096);
    char *one = map(fd, 4 * 4096), *two = map(fd, 4 * 4096);
    strcpy(one + 4096, "one");
    CHECK(strcmp(two + 4096, "one") == 0);
    char *moved = mremap(two + 4096, 4096, 4096, MREMAP_MAYMOVE);
    CHECK(moved != MAP_FAILED);
    char *place = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    moved = mremap(moved, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, place);
    CHECK(moved == place);
    EQ(mprotect(one + 8192, 4096, PROT_READ), 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        CHECK(strcmp(moved, "one") == 0);
        strcpy(moved, "child");
        _exit(0);
    }
    EQ(status_of(child), 0);
    CHECK(strcmp(one + 4096, "child") == 0);
    /* By the descriptor, and so at home. */
    char text[8] = "";
    EQ(pread(fd, text, 6, 4096), 6);
    CHECK(strcmp(text, "child") == 0);
    strcpy(moved, "later");
    CHECK(strcmp(one + 4096, "later") == 0);
    EQ(pread(fd, text, 6, 4096), 6);
    CHECK(strcmp(text, "later") == 0);
    EQ(one[8192], (char)(8192 / 100));
    EQ(mprotect(one + 8192, 4096, PROT_READ | PROT_WRITE), 0);
    one[8192] = 'w';
    EQ(pread(fd, text, 1, 8192), 1);
    EQ(text[0], 'w');
    EQ(close(fd), 0);
    EQ(unlink(path), 0);
    say("views\n");
}

/* Semaphores with names are files in /dev/shm. */
static void semaphores(void) {
    char name[32];
    snprintf(name, sizeof name, "/guest-%d", getpid());
    sem_t *go = sem_open(name, O_CREAT | O_EXCL, 0600, 0);
    CHECK(go != SEM_FAILED);
    EQ(sem_unlink(name), 0);
    sem_t *done = sem_open(name, O_CREAT | O_EXCL, 0600, 0);
    CHECK(done != SEM_FAILED);
    EQ(sem_unlink(name), 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        for (int i = 0; i < 100; i++) {
            EQ(sem_wait(go), 0);
            EQ(sem_post(done), 0);
        }
        _exit(0);
    }
    for (int i = 0; i < 100; i++) {
        EQ(sem_post(go), 0);
        EQ(sem_wait(done), 0);
    }
    EQ(status_of(child), 0);
    /* One that somebody else opens by its name. */
    sem_t *named = sem_open(name, O_CREAT | O_EXCL, 0600, 3);
    CHECK(named != SEM_FAILED);
    sem_t *same = sem_open(name, 0);
    CHECK(same == named);
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        sem_t *other = sem_open(name, 0);
        EQ(sem_trywait(other), 0);
        _exit(0);
    }
    EQ(status_of(child), 0);
    int value = 0;
    EQ(sem_getvalue(named, &value), 0);
    EQ(value, 2);
    EQ(sem_unlink(name), 0);
    say("semaphores\n");
}

/* What is mapped in the usual ways as well is one file all the same. */
static void other_ways(void) {
    int fd = created("ways", 8192);
    char *shared = map(fd, 8192);
    strcpy(shared, "shared");
    char *own = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    CHECK(own != MAP_FAILED);
    CHECK(strcmp(own, "shared") == 0);
    strcpy(own, "own");
    CHECK(strcmp(shared, "shared") == 0);
    int memory = memfd_create("memory", MFD_CLOEXEC);
    EQ(ftruncate(memory, 5000), 0);
    char *at = map(memory, 5000);
    strcpy(at + 4990, "memfd");
    char text[8] = "";
    EQ(pread(memory, text, 6, 4990), 6);
    CHECK(strcmp(text, "memfd") == 0);
    EQ(unlink(path), 0);
    say("other ways\n");
}

static void named(void) { by_name("named"); }

static void in_memory(void) {
    char name[64];
    snprintf(name, sizeof name, "/dev/shm/mapped-%d", getpid());
    by_name(name);
}

/* Each part begins anew, and so at the node where the program was started: most of them end at home. */
int main(int count, char **arguments) {
    void (*const parts[])(void) = {named, in_memory, by_descriptor, by_the_dead, views, semaphores, other_ways};
    if (count > 1) {
        parts[atoi(arguments[1])]();
        return 0;
    }
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        char number[8];
        snprintf(number, sizeof number, "%zu", i);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            execl("/proc/self/exe", arguments[0], number, NULL);
            _exit(98);
        }
        EQ(status_of(child), 0);
    }
    return 0;
}
