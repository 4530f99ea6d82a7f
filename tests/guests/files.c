/* Files, directories, links, times, attributes. */
#include "guest.h"
#include <dirent.h>
#include <linux/stat.h>
#include <sys/inotify.h>
#include <sys/statfs.h>
#include <sys/xattr.h>

static int by_name(const void *a, const void *b) { return strcmp(*(char **)a, *(char **)b); }

static void list(const char *dir) {
    DIR *d = opendir(dir);
    CHECK(d != NULL);
    char *names[2000];
    int n = 0;
    for (struct dirent *e; (e = readdir(d));)
        names[n++] = strdup(e->d_name);
    closedir(d);
    qsort(names, n, sizeof *names, by_name);
    say("%s: %d:", dir, n);
    for (int i = 0; i < n && i < 8; i++)
        say(" %s", names[i]);
    say("\n");
}

int main(void) {
    struct stat st, st2;
    char buf[PATH_MAX];
    umask(022);
    int fd = open("a", O_RDWR | O_CREAT | O_EXCL, 0666);
    CHECK(fd >= 0);
    FAILS(open("a", O_RDWR | O_CREAT | O_EXCL, 0666), EEXIST);
    FAILS(open("none", O_RDONLY), ENOENT);
    FAILS(open("a/b", O_RDONLY), ENOTDIR);
    FAILS(open(".", O_WRONLY), EISDIR);
    FAILS(open("", O_RDONLY), ENOENT);
    CHECK(fstat(fd, &st) == 0);
    EQ(st.st_mode, S_IFREG | 0644);
    EQ(st.st_uid, geteuid());
    EQ(write(fd, "0123456789", 10), 10);
    EQ(pwrite(fd, "XY", 2, 100), 2);
    EQ(lseek(fd, 0, SEEK_END), 102);
    EQ(pread(fd, buf, 10, 98), 4);
    CHECK(!memcmp(buf, "\0\0XY", 4));
    EQ(ftruncate(fd, 5), 0);
    EQ(lseek(fd, 0, SEEK_END), 5);
    EQ(truncate("a", 1 << 20), 0);
    EQ(lseek(fd, 0, SEEK_DATA), 0);
    CHECK(lseek(fd, 0, SEEK_HOLE) > 0);
    FAILS(lseek(fd, -1, SEEK_SET), EINVAL);
    EQ(fallocate(fd, 0, 0, 8192), 0);
    EQ(fsync(fd), 0);
    EQ(fdatasync(fd), 0);
    struct iovec v[2] = {{"ab", 2}, {"cd", 2}};
    EQ(pwritev(fd, v, 2, 0), 4);
    char x[2], y[2];
    struct iovec r[2] = {{x, 2}, {y, 2}};
    EQ(preadv(fd, r, 2, 1), 4);
    CHECK(x[0] == 'b' && y[0] == 'd');
    say("contents\n");

    CHECK(mkdir("dir", 0777) == 0);
    FAILS(mkdir("dir", 0777), EEXIST);
    CHECK(stat("dir", &st) == 0);
    EQ(st.st_mode, S_IFDIR | 0755);
    for (int i = 0; i < 1000; i++) {
        snprintf(buf, sizeof buf, "dir/entry-%04d", i);
        int f = open(buf, O_WRONLY | O_CREAT, 0600);
        CHECK(f >= 0);
        close(f);
    }
    list("dir");
    FAILS(rmdir("dir"), ENOTEMPTY);
    CHECK(chdir("dir") == 0);
    CHECK(getcwd(buf, sizeof buf));
    CHECK(!strcmp(strrchr(buf, '/'), "/dir"));
    FAILS(syscall(SYS_getcwd, buf, 3), ERANGE);
    for (int i = 0; i < 1000; i++) {
        snprintf(buf, sizeof buf, "entry-%04d", i);
        CHECK(unlink(buf) == 0);
    }
    int top = open("..", O_RDONLY | O_DIRECTORY);
    CHECK(fchdir(top) == 0);
    list("dir");
    CHECK(mkdirat(top, "dir/sub", 0700) == 0);
    CHECK(rename("dir/sub", "moved") == 0);
    FAILS(rename("none", "x"), ENOENT);
    FAILS(rename("moved", "moved/below"), EINVAL);
    CHECK(renameat2(top, "a", top, "b", RENAME_NOREPLACE) == 0);
    FAILS(renameat2(top, "b", top, "moved", RENAME_NOREPLACE), EEXIST);
    CHECK(renameat2(top, "b", top, "moved", RENAME_EXCHANGE) == 0);
    CHECK(stat("moved", &st) == 0 && S_ISREG(st.st_mode));
    CHECK(rmdir("b") == 0);
    CHECK(rmdir("dir") == 0);
    FAILS(rmdir("dir"), ENOENT);
    FAILS(unlink("."), EISDIR);
    say("directories\n");

    CHECK(link("moved", "hard") == 0);
    CHECK(stat("hard", &st) == 0);
    EQ(st.st_nlink, 2);
    CHECK(symlink("hard", "soft") == 0);
    EQ(readlink("soft", buf, sizeof buf), 4);
    EQ(readlink("soft", buf, 2), 2);
    FAILS(readlink("hard", buf, 10), EINVAL);
    CHECK(lstat("soft", &st) == 0 && S_ISLNK(st.st_mode));
    EQ(st.st_size, 4);
    CHECK(stat("soft", &st) == 0 && S_ISREG(st.st_mode));
    FAILS(open("soft", O_RDONLY | O_NOFOLLOW), ELOOP);
    CHECK(symlink("loop", "loop") == 0);
    FAILS(open("loop", O_RDONLY), ELOOP);
    CHECK(realpath("soft", buf) && !strcmp(strrchr(buf, '/'), "/hard"));
    CHECK(symlink("nowhere", "dangling") == 0);
    FAILS(access("dangling", F_OK), ENOENT);
    EQ(faccessat(AT_FDCWD, "dangling", F_OK, AT_SYMLINK_NOFOLLOW), 0);
    EQ(access("hard", R_OK | W_OK), 0);
    FAILS(access("hard", 99), EINVAL);
    say("links\n");

    CHECK(chmod("hard", 0751) == 0);
    CHECK(fchmodat(AT_FDCWD, "hard", 04710, 0) == 0);
    CHECK(stat("hard", &st) == 0);
    EQ(st.st_mode & 07777, 04710);
    CHECK(chown("hard", -1, -1) == 0);
    struct timespec times[2] = {{1000000000, 123456789}, {0, UTIME_OMIT}};
    CHECK(stat("hard", &st2) == 0);
    CHECK(utimensat(AT_FDCWD, "hard", times, 0) == 0);
    CHECK(stat("hard", &st) == 0);
    EQ(st.st_atim.tv_sec, 1000000000);
    EQ(st.st_mtim.tv_sec, st2.st_mtim.tv_sec);
    struct statx sx;
    CHECK(syscall(SYS_statx, AT_FDCWD, "hard", 0, STATX_ALL, &sx) == 0);
    EQ(sx.stx_ino, st.st_ino);
    EQ(sx.stx_size, st.st_size);
    EQ(sx.stx_atime.tv_sec, 1000000000);
    CHECK(syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_SIZE, &sx) == 0);
    EQ(umask(077), 022);
    int tight = open("tight", O_CREAT | O_WRONLY, 0666);
    CHECK(fstat(tight, &st) == 0);
    EQ(st.st_mode & 0777, 0600);
    struct statfs fs;
    CHECK(statfs(".", &fs) == 0 && fstatfs(fd, &fs) == 0 && fs.f_bsize > 0);
    say("modes and times\n");

    if (setxattr("hard", "user.note", "value", 5, 0) == 0) {
        EQ(getxattr("hard", "user.note", buf, sizeof buf), 5);
        EQ(getxattr("hard", "user.note", NULL, 0), 5);
        FAILS(getxattr("hard", "user.note", buf, 2), ERANGE);
        FAILS(getxattr("hard", "user.none", buf, 10), ENODATA);
        EQ(listxattr("hard", buf, sizeof buf), 10);
        EQ(removexattr("hard", "user.note"), 0);
    } else {
        EQ(errno, EOPNOTSUPP);
    }
    int tmp = open(".", O_TMPFILE | O_RDWR, 0600);
    if (tmp >= 0) {
        EQ(write(tmp, "anonymous", 9), 9);
        snprintf(buf, sizeof buf, "/proc/self/fd/%d", tmp);
        EQ(linkat(AT_FDCWD, buf, AT_FDCWD, "named", AT_SYMLINK_FOLLOW), 0);
        CHECK(stat("named", &st) == 0 && st.st_size == 9);
    }
    /* unlinked but open */
    int gone = open("gone", O_RDWR | O_CREAT, 0600);
    CHECK(unlink("gone") == 0);
    EQ(write(gone, "still", 5), 5);
    EQ(pread(gone, buf, 10, 0), 5);
    CHECK(fstat(gone, &st) == 0);
    EQ(st.st_nlink, 0);
    loff_t in = 0, out = 0;
    EQ(copy_file_range(fd, &in, gone, &out, 4, 0), 4);
    EQ(pread(gone, buf, 10, 0), 5);
    CHECK(!memcmp(buf, "abcdl", 5));
    EQ(posix_fadvise(fd, 0, 0, POSIX_FADV_WILLNEED), 0);
    EQ(mkfifo("fifo", 0600), 0);
    CHECK(lstat("fifo", &st) == 0 && S_ISFIFO(st.st_mode));

    int ino = inotify_init1(IN_NONBLOCK);
    int wd = inotify_add_watch(ino, ".", IN_CREATE | IN_DELETE);
    CHECK(wd > 0);
    close(open("watched", O_CREAT | O_WRONLY, 0600));
    CHECK(unlink("watched") == 0);
    char events[4096] __attribute__((aligned(8)));
    ssize_t n = read(ino, events, sizeof events);
    CHECK(n > 0);
    for (char *at = events; at < events + n;) {
        struct inotify_event *e = (void *)at;
        say("%x %s\n", e->mask, e->name);
        at += sizeof *e + e->len;
    }
    EQ(inotify_rm_watch(ino, wd), 0);
    list(".");
    return 0;
}
