/* One call that moves a GiB: `huge write` to its output, `huge read FILE` from a file; `huge sum` is who reads at home. It tells
 * its pid and the sum of what was moved on its standard error, and waits for a line before it ends. */
#include "guest.h"

static const size_t SIZE = 1ul << 30;

static uint64_t add(uint64_t h, const unsigned char *p, size_t n) {
    for (size_t i = 0; i + 8 <= n; i += 8) {
        uint64_t w;
        memcpy(&w, p + i, 8);
        h = (h ^ w) * 1099511628211ull;
    }
    return h;
}

int main(int argc, char **argv) {
    CHECK(argc >= 2);
    unsigned char *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(p != MAP_FAILED);
    if (argv[1][0] == 's') {
        size_t got = 0;
        for (ssize_t n; (n = read(0, p + got, SIZE - got)) > 0;)
            got += n;
        EQ(read(0, p, 1), 0);
        say("%zu %016llx\n", got, (unsigned long long)add(0, p, got));
        return 0;
    }
    if (argv[1][0] == 'w') {
        for (size_t i = 0; i < SIZE; i += 4096) {
            uint64_t w = i * 0x9e3779b97f4a7c15ull;
            memcpy(p + i + i / 4096 % 512 * 8, &w, 8);
        }
        EQ(write(1, p, SIZE), SIZE);
    } else {
        int fd = open(argv[2], O_RDONLY);
        CHECK(fd >= 0);
        EQ(read(fd, p, SIZE), SIZE);
    }
    dprintf(2, "%d\n%zu %016llx\n", getpid(), SIZE, (unsigned long long)add(0, p, SIZE));
    char c;
    EQ(read(0, &c, 1), 1);
    return 0;
}
