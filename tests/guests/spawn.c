/* posix_spawn with actions and attributes, system, popen. */
#include "guest.h"
#include <spawn.h>

extern char **environ;

static pid_t spawn_sh(const char *script, posix_spawn_file_actions_t *fa, posix_spawnattr_t *at) {
    pid_t pid = -1;
    char *argv[] = {"sh", "-c", (char *)script, NULL};
    EQ(posix_spawn(&pid, "/bin/sh", fa, at, argv, environ), 0);
    CHECK(pid > 0);
    return pid;
}

int main(void) {
    ends_with(spawn_sh("exit 9", NULL, NULL), 9);

    posix_spawn_file_actions_t fa;
    EQ(posix_spawn_file_actions_init(&fa), 0);
    EQ(posix_spawn_file_actions_addopen(&fa, 1, "out", O_WRONLY | O_CREAT | O_TRUNC, 0644), 0);
    EQ(posix_spawn_file_actions_adddup2(&fa, 1, 2), 0);
    EQ(posix_spawn_file_actions_addclose(&fa, 0), 0);
    ends_with(spawn_sh("echo hello; echo err >&2; [ ! -e /proc/self/fd/0 ] || exit 1", &fa, NULL), 0);
    say("%s", slurp("out"));

    posix_spawnattr_t at;
    EQ(posix_spawnattr_init(&at), 0);
    sigset_t mask, def;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    sigemptyset(&def);
    sigaddset(&def, SIGUSR2);
    handle(SIGUSR2, SIG_IGN, 0);
    EQ(posix_spawnattr_setsigmask(&at, &mask), 0);
    EQ(posix_spawnattr_setsigdefault(&at, &def), 0);
    EQ(posix_spawnattr_setpgroup(&at, 0), 0);
    EQ(posix_spawnattr_setflags(&at, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP), 0);
    pid_t pid = spawn_sh("kill -USR1 $$; kill -USR2 $$; exit 1", NULL, &at);
    dies_of(pid, SIGUSR2);
    pid = spawn_sh("[ $(cut -d' ' -f5 /proc/$$/stat) = $$ ] && exit 33", NULL, &at);
    ends_with(pid, 33);

    char *argv[] = {"x", NULL};
    EQ(posix_spawn(&pid, "/no/such/file", NULL, NULL, argv, environ), ENOENT);
    EQ(posix_spawnp(&pid, "no-such-program", NULL, NULL, argv, environ), ENOENT);

    int status = system("exit 17");
    EQ(WEXITSTATUS(status), 17);
    status = system("kill -9 $$");
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == 9);
    FILE *p = popen("read a; echo \"got $a\" > popened; exit 3", "w");
    CHECK(p != NULL);
    fprintf(p, "line\n");
    EQ(WEXITSTATUS(pclose(p)), 3);
    say("%s", slurp("popened"));
    p = popen("seq 1 5 | tr '\\n' ' '", "r");
    char line[100];
    CHECK(fgets(line, sizeof line, p));
    EQ(pclose(p), 0);
    say("%s\n", line);
    return 0;
}
