/* System V IPC, POSIX queues, pidfds, eventfds. */
#include "guest.h"
#include <mqueue.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

int main(void) {
    struct {
        long type;
        char text[64];
    } m = {3, "three"};
    int q = msgget(IPC_PRIVATE, 0600);
    CHECK(q >= 0);
    CHECK(msgsnd(q, &m, 6, 0) == 0);
    m.type = 5, strcpy(m.text, "five");
    CHECK(msgsnd(q, &m, 5, 0) == 0);
    EQ(msgrcv(q, &m, sizeof m.text, 5, 0), 5);
    CHECK(!strcmp(m.text, "five"));
    EQ(msgrcv(q, &m, sizeof m.text, 0, 0), 6);
    FAILS(msgrcv(q, &m, sizeof m.text, 0, IPC_NOWAIT), ENOMSG);
    struct msqid_ds ds;
    CHECK(msgctl(q, IPC_STAT, &ds) == 0);
    EQ(ds.msg_qnum, 0);
    EQ(ds.msg_lrpid, getpid());
    CHECK(msgctl(q, IPC_RMID, NULL) == 0);
    int s = semget(IPC_PRIVATE, 2, 0600);
    CHECK(s >= 0);
    CHECK(semctl(s, 0, SETVAL, 1) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct sembuf down = {0, -2, SEM_UNDO};
        CHECK(semop(s, &down, 1) == 0);
        _exit(0);
    }
    until_state(pid, 'S');
    struct sembuf up = {0, 1, 0};
    CHECK(semop(s, &up, 1) == 0);
    ends_with(pid, 0);
    EQ(semctl(s, 0, GETVAL), 2); /* undone at its end */
    unsigned short both[2] = {4, 5};
    CHECK(semctl(s, 0, SETALL, both) == 0);
    memset(both, 0, sizeof both);
    CHECK(semctl(s, 0, GETALL, both) == 0);
    EQ(both[1], 5);
    CHECK(semctl(s, 0, IPC_RMID) == 0);
    say("queues and semaphores\n");
    int shm = shmget(IPC_PRIVATE, 8192, 0600);
    CHECK(shm >= 0);
    volatile int *mem = shmat(shm, NULL, 0);
    CHECK(mem != (void *)-1);
    if ((pid = fork()) == 0) {
        mem[5] = 55;
        _exit(0);
    }
    ends_with(pid, 0);
    EQ(mem[5], 55);
    CHECK(shmdt((void *)mem) == 0);
    CHECK(shmctl(shm, IPC_RMID, NULL) == 0);
    say("shared memory\n");

    char name[64], buf[64];
    snprintf(name, sizeof name, "/guest-%d", getpid());
    struct mq_attr attr = {.mq_maxmsg = 4, .mq_msgsize = 64};
    mqd_t mq = mq_open(name, O_RDWR | O_CREAT | O_EXCL, 0600, &attr);
    if (mq != (mqd_t)-1) {
        EQ(mq_send(mq, "low", 3, 1), 0);
        EQ(mq_send(mq, "high", 4, 9), 0);
        unsigned priority;
        EQ(mq_receive(mq, buf, sizeof buf, &priority), 4);
        EQ(priority, 9);
        CHECK(mq_getattr(mq, &attr) == 0);
        EQ(attr.mq_curmsgs, 1);
        FAILS(mq_receive(mq, buf, 3, NULL), EMSGSIZE);
        EQ(mq_unlink(name), 0);
    }
    pid = fork();
    if (pid == 0) {
        pause();
        _exit(0);
    }
    int pfd = syscall(SYS_pidfd_open, pid, 0);
    CHECK(pfd >= 0);
    struct pollfd p = {pfd, POLLIN, 0};
    EQ(poll(&p, 1, 0), 0);
    EQ(syscall(SYS_pidfd_send_signal, pfd, SIGTERM, NULL, 0), 0);
    EQ(poll(&p, 1, 5000), 1);
    siginfo_t info;
    EQ(waitid(3 /* P_PIDFD */, pfd, &info, WEXITED), 0);
    EQ(info.si_status, SIGTERM);
    FAILS(syscall(SYS_pidfd_send_signal, pfd, SIGTERM, NULL, 0), ESRCH);
    FAILS(syscall(SYS_pidfd_open, 0x3fffff, 0), ESRCH);
    say("pidfd\n");

    int ev = eventfd(0, EFD_SEMAPHORE);
    uint64_t v = 3;
    EQ(write(ev, &v, 8), 8);
    EQ(read(ev, &v, 8), 8);
    EQ(v, 1);
    return 0;
}
