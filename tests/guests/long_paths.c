/* Paths and names of every length up to and past the limits. */
#include "guest.h"

int main(void) {
    char name[300], path[5000];
    memset(name, 'n', sizeof name);
    name[255] = 0;
    int fd = open(name, O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0);
    close(fd);
    CHECK(unlink(name) == 0);
    name[255] = 'n', name[256] = 0;
    FAILS(open(name, O_RDWR | O_CREAT, 0600), ENAMETOOLONG);

    /* ./././...file of exactly PATH_MAX - 1 bytes */
    CHECK((fd = open("file", O_RDWR | O_CREAT, 0600)) >= 0);
    EQ(write(fd, "content", 7), 7);
    size_t len = PATH_MAX - 1;
    for (size_t i = 0; i + 1 < len - 4; i += 2)
        memcpy(path + i, "./", 2);
    size_t at = (len - 4) / 2 * 2;
    if (at < len - 4)
        path[at++] = '/';
    strcpy(path + at, "file");
    EQ(strlen(path), 4095);
    struct stat st;
    CHECK(stat(path, &st) == 0);
    EQ(st.st_size, 7);
    int again = open(path, O_RDONLY);
    CHECK(again >= 0);
    EQ(access(path, R_OK), 0);
    EQ(truncate(path, 3), 0);
    char longer[5000];
    longer[0] = '/';
    memset(longer, '/', 1);
    snprintf(longer, sizeof longer, "./%s", path);
    FAILS(stat(longer, &st), ENAMETOOLONG);
    FAILS(open(longer, O_RDONLY), ENAMETOOLONG);
    FAILS(unlink(longer), ENAMETOOLONG);
    FAILS(rename("file", longer), ENAMETOOLONG);
    FAILS(symlink(longer, "s"), ENAMETOOLONG);
    CHECK(symlink(path, "s") == 0);
    EQ(readlink("s", longer, sizeof longer), 4095);
    EQ(memcmp(longer, path, 4095), 0);
    CHECK(stat("s", &st) == 0);
    EQ(st.st_size, 3);
    say("lengths\n");

    /* a path that ends exactly where memory ends */
    long page = sysconf(_SC_PAGESIZE);
    char *m = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(munmap(m + page, page) == 0);
    strcpy(m + page - 5, "file");
    CHECK(stat(m + page - 5, &st) == 0);
    memcpy(m + page - 4, "file", 4);
    FAILS(stat(m + page - 4, &st), EFAULT);
    say("edges\n");

    /* deeper than any path can say */
    memset(name, 'd', 200);
    name[200] = 0;
    int top = open(".", O_RDONLY);
    for (int i = 0; i < 25; i++) {
        CHECK(mkdir(name, 0700) == 0);
        CHECK(chdir(name) == 0);
    }
    char *cwd = getcwd(longer, sizeof longer);
    CHECK(cwd == NULL || strlen(cwd) > 4095);
    FAILS(syscall(SYS_getcwd, path, sizeof path), ENAMETOOLONG);
    CHECK((fd = open("deep", O_CREAT | O_RDWR, 0600)) >= 0);
    for (int i = 0; i < 25; i++) {
        unlink("deep");
        CHECK(chdir("..") == 0);
        CHECK(rmdir(name) == 0);
    }
    EQ(fchdir(top), 0);
    say("depth\n");
    return 0;
}
