/* Has much memory whose content it knows, and does to it what it is told on its input, a line for each thing: "bulk MIB". It answers
 * "ok" to each when all of the memory that it looked at was right. Pages are numbered. */
#include "guest.h"
#include <alloca.h>

#define PAGE 4096L
#define WORDS (PAGE / 8)

static long pages;
static char **at;
static char *zeroed;

static uint64_t word(uint64_t page, uint64_t index) {
    uint64_t x = (page * WORDS + index + 1) * 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

static void fill(long page) {
    uint64_t *words = (uint64_t *)at[page];
    for (long i = 0; i < WORDS; i++)
        words[i] = word(page, i);
    zeroed[page] = 0;
}

static void check(long page) {
    uint64_t *words = (uint64_t *)at[page];
    for (long i = 0; i < WORDS; i++) {
        uint64_t wanted = zeroed[page] ? 0 : word(page, i);
        if (words[i] == wanted)
            continue;
        dprintf(2, "page %ld, word %ld: %#lx in place of %#lx\n", page, i, words[i], wanted);
        _exit(99);
    }
}

static void check_all(long from, long to) {
    for (long page = from; page < to; page++)
        check(page);
}

struct part {
    long from, to, step;
    pthread_t thread;
};

static void *check_part(void *arg) {
    struct part *part = arg;
    for (long page = part->from; page < part->to; page += part->step)
        check(page);
    return NULL;
}

/* Writes to its pages for ever, and looks at what it wrote before. */
static void *dirty(void *arg) {
    struct part *part = arg;
    for (uint64_t turn = 0;; turn++) {
        for (long page = part->from; page < part->to; page++) {
            uint64_t *words = (uint64_t *)at[page];
            for (long i = 0; i < WORDS; i += 8) {
                CHECK(words[i] == (word(page, i) ^ turn));
                words[i] = word(page, i) ^ (turn + 1);
            }
        }
    }
    return NULL;
}

static void recurse(int depth) {
    volatile char *some = alloca(64 << 10);
    for (long i = 0; i < 64 << 10; i += PAGE)
        some[i] = (char)(depth + i / PAGE);
    if (depth > 0)
        recurse(depth - 1);
    for (long i = 0; i < 64 << 10; i += PAGE)
        CHECK(some[i] == (char)(depth + i / PAGE));
}

static void grow_heap(void) {
    const long len = 8 << 20;
    char *start = sbrk(len);
    CHECK(start != (char *)-1);
    for (long i = 0; i < len; i += PAGE) {
        CHECK(start[i] == 0);
        start[i] = 7;
    }
    for (long i = 0; i < len; i += PAGE)
        CHECK(start[i] == 7);
    CHECK(sbrk(-len) == start + len);
}

static void through_a_file(long from, long to, int inward) {
    int fd = memfd_create("bulk", 0);
    CHECK(fd >= 0);
    long len = (to - from) * PAGE;
    uint64_t *copy = malloc(len);
    CHECK(copy != NULL);
    if (inward) {
        for (long i = 0; i < len / 8; i++)
            copy[i] = ~word(from + i / WORDS, i % WORDS);
        EQ(write(fd, copy, len), len);
        EQ(lseek(fd, 0, SEEK_SET), 0);
        EQ(read(fd, at[from], len), len);
        CHECK(memcmp(at[from], copy, len) == 0);
        for (long page = from; page < to; page++)
            fill(page);
    } else {
        EQ(write(fd, at[from], len), len);
        EQ(pread(fd, copy, len, 0), len);
        for (long i = 0; i < len / 8; i++)
            CHECK(copy[i] == word(from + i / WORDS, i % WORDS));
    }
    free(copy);
    close(fd);
}

static void forks(void) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        check_all(0, pages);
        _exit(17);
    }
    int status;
    EQ(waitpid(child, &status, 0), child);
    EQ(status, 17 << 8);
}

int main(int argc, char **argv) {
    CHECK(argc >= 2);
    pages = atol(argv[1]) << 20 >> 12;
    at = malloc(pages * sizeof *at);
    zeroed = calloc(pages, 1);
    char *base = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != NULL && zeroed != NULL && base != MAP_FAILED);
    for (long page = 0; page < pages; page++) {
        at[page] = base + page * PAGE;
        fill(page);
    }
    say("%d\n", getpid());
    FILE *in = stdin;
    char what[32];
    long from, count;
    while (fscanf(in, "%31s %ld %ld", what, &from, &count) == 3) {
        long to = from + count, len = count * PAGE;
        CHECK(from >= 0 && to <= pages);
        char *start = at[from];
        if (!strcmp(what, "check")) {
            check_all(from, to);
        } else if (!strcmp(what, "move")) {
            char *place = mmap(NULL, len + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            CHECK(place != MAP_FAILED);
            CHECK(mremap(start, len, len + PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
            for (long page = from; page < to; page++)
                at[page] = place + (page - from) * PAGE;
            check(from);
            check(to - 1);
            CHECK(place[len] == 0);
        } else if (!strcmp(what, "unmap")) {
            CHECK(munmap(start, len) == 0);
            CHECK(mmap(start, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == start);
            memset(zeroed + from, 1, count);
            check_all(from, to);
        } else if (!strcmp(what, "drop")) {
            CHECK(madvise(start, len, MADV_DONTNEED) == 0);
            memset(zeroed + from, 1, count);
            check_all(from, to);
        } else if (!strcmp(what, "protect")) {
            CHECK(mprotect(start, len, PROT_NONE) == 0);
            CHECK(mprotect(start, len, PROT_READ) == 0);
            check_all(from, from + count / 2);
            CHECK(mprotect(start, len, PROT_READ | PROT_WRITE) == 0);
            fill(to - 1);
        } else if (!strcmp(what, "heap")) {
            grow_heap();
        } else if (!strcmp(what, "stack")) {
            recurse(64);
        } else if (!strcmp(what, "write")) {
            through_a_file(from, to, 0);
        } else if (!strcmp(what, "read")) {
            through_a_file(from, to, 1);
        } else if (!strcmp(what, "threads")) {
            struct part parts[8];
            for (long i = 0; i < 8; i++) {
                parts[i] = (struct part){.from = from + i, .to = to, .step = 8};
                CHECK(pthread_create(&parts[i].thread, NULL, check_part, &parts[i]) == 0);
            }
            for (int i = 0; i < 8; i++)
                CHECK(pthread_join(parts[i].thread, NULL) == 0);
        } else if (!strcmp(what, "fork")) {
            forks();
        } else if (!strcmp(what, "vfork")) {
            pid_t child = vfork();
            if (child == 0)
                _exit(3);
            int status;
            EQ(waitpid(child, &status, 0), child);
            EQ(status, 3 << 8);
        } else if (!strcmp(what, "exec")) {
            execl("/proc/self/exe", argv[0], argv[1], NULL);
            CHECK(!"executed");
        } else if (!strcmp(what, "dirty")) {
            static struct part part;
            part = (struct part){.from = from, .to = to};
            CHECK(pthread_create(&part.thread, NULL, dirty, &part) == 0);
        } else {
            CHECK(!"known");
        }
        say("ok %s\n", what);
    }
    return 0;
}
