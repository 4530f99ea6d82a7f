/* Signals with their siginfo, masks, queues, stacks and nesting; faults of the processor. */
#include "guest.h"
#include <setjmp.h>
#include <ucontext.h>

static volatile siginfo_t last;
static volatile int count, depth, max_depth, order[16], taken;
static sigjmp_buf out;
static char altstack[65536];
static volatile int on_altstack;

static void record(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)context;
    last = *info;
    count++;
}
static void in_order(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)context;
    order[taken++] = info->si_value.sival_int;
}
static void jump(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)context;
    last = *info;
    siglongjmp(out, 1);
}
static void nested(int sig) {
    depth++;
    if (depth > max_depth)
        max_depth = depth;
    if (depth < 4)
        raise(sig);
    depth--;
}
static void where(int sig) {
    char c;
    (void)sig;
    on_altstack = &c >= altstack && &c < altstack + sizeof altstack;
}
static void skip_instruction(int sig, siginfo_t *info, void *context) {
    (void)sig;
    last = *info;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2; /* ud2 */
}
static void change_registers(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)info;
    ucontext_t *c = context;
    c->uc_mcontext.gregs[REG_RBX] = 0x1234567;
    sigaddset(&c->uc_sigmask, SIGUSR2);
}

static void action(int sig, void (*f)(int, siginfo_t *, void *), int flags) {
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_sigaction = f;
    a.sa_flags = SA_SIGINFO | flags;
    CHECK(sigaction(sig, &a, NULL) == 0);
}

#define FAULT(what, sig, code_, address, stmt)                                                                         \
    do {                                                                                                               \
        action(sig, jump, SA_NODEFER);                                                                                 \
        if (!sigsetjmp(out, 1)) {                                                                                      \
            stmt;                                                                                                      \
            dprintf(2, "%s: no fault\n", what);                                                                        \
            _exit(99);                                                                                                 \
        }                                                                                                              \
        EQ(last.si_signo, sig);                                                                                        \
        EQ(last.si_code, code_);                                                                                       \
        if (address)                                                                                                   \
            EQ((long)last.si_addr, (long)(address));                                                                   \
        say("%s\n", what);                                                                                             \
    } while (0)

int main(void) {
    sigset_t set, old;
    action(SIGUSR1, record, 0);
    kill(getpid(), SIGUSR1);
    EQ(count, 1);
    EQ(last.si_code, SI_USER);
    EQ(last.si_pid, getpid());
    EQ(last.si_uid, getuid());
    raise(SIGUSR1);
    EQ(count, 2);
    EQ(last.si_code, SI_TKILL);
    EQ(last.si_pid, getpid());
    sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 4711});
    EQ(count, 3);
    EQ(last.si_code, SI_QUEUE);
    EQ(last.si_value.sival_int, 4711);
    say("siginfo of one's own\n");

    /* from another process */
    pid_t me = getpid(), pid;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    CHECK(sigprocmask(SIG_BLOCK, &set, &old) == 0);
    if ((pid = fork()) == 0) {
        sigqueue(me, SIGUSR1, (union sigval){.sival_int = 99});
        _exit(0);
    }
    ends_with(pid, 0);
    EQ(count, 3);
    CHECK(sigpending(&set) == 0);
    EQ(sigismember(&set, SIGUSR1), 1);
    CHECK(sigprocmask(SIG_SETMASK, &old, NULL) == 0);
    EQ(count, 4);
    EQ(last.si_pid, pid);
    EQ(last.si_value.sival_int, 99);
    say("siginfo of another's\n");

    /* standard signals merge, real-time ones queue, in order */
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGRTMIN + 1);
    sigaddset(&set, SIGRTMIN + 2);
    CHECK(sigprocmask(SIG_BLOCK, &set, &old) == 0);
    action(SIGRTMIN + 1, in_order, 0);
    action(SIGRTMIN + 2, in_order, 0);
    for (int i = 0; i < 5; i++)
        kill(me, SIGUSR1);
    for (int i = 0; i < 4; i++) {
        sigqueue(me, SIGRTMIN + 2, (union sigval){.sival_int = 20 + i});
        sigqueue(me, SIGRTMIN + 1, (union sigval){.sival_int = 10 + i});
    }
    count = 0;
    CHECK(sigprocmask(SIG_SETMASK, &old, NULL) == 0);
    EQ(count, 1);
    EQ(taken, 8);
    for (int i = 0; i < taken; i++)
        say("%d ", order[i]);
    say("\n");

    /* nesting, once, altstack */
    handle(SIGUSR1, nested, SA_NODEFER);
    raise(SIGUSR1);
    EQ(max_depth, 4);
    handle(SIGUSR1, where, SA_RESETHAND);
    raise(SIGUSR1);
    struct sigaction a;
    CHECK(sigaction(SIGUSR1, NULL, &a) == 0);
    CHECK(a.sa_handler == SIG_DFL);
    EQ(on_altstack, 0);
    stack_t stack = {.ss_sp = altstack, .ss_size = sizeof altstack}, got;
    CHECK(sigaltstack(&stack, NULL) == 0);
    handle(SIGUSR1, where, SA_ONSTACK);
    kill(me, SIGUSR1);
    EQ(on_altstack, 1);
    CHECK(sigaltstack(NULL, &got) == 0);
    CHECK(got.ss_sp == altstack && got.ss_flags == 0);
    say("nesting and stacks\n");

    /* the context can be changed */
    action(SIGUSR1, change_registers, 0);
    register long rbx asm("rbx") = 0;
    long result;
    asm volatile("xor %%ebx, %%ebx\n mov %1, %%edi\n mov $10, %%esi\n mov $62, %%eax\n syscall\n mov %%rbx, %0\n"
                 : "=r"(result)
                 : "r"((int)me)
                 : "rbx", "rdi", "rsi", "rax", "rcx", "r11", "memory");
    (void)rbx;
    EQ(result, 0x1234567);
    CHECK(sigprocmask(SIG_SETMASK, NULL, &set) == 0);
    EQ(sigismember(&set, SIGUSR2), 1);
    sigemptyset(&set);
    CHECK(sigprocmask(SIG_SETMASK, &set, NULL) == 0);
    say("context\n");

    /* faults */
    long page = sysconf(_SC_PAGESIZE);
    char *ro = mmap(NULL, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    FAULT("unmapped", SIGSEGV, SEGV_MAPERR, 0x40, *(volatile char *)0x40 = 1);
    FAULT("read only", SIGSEGV, SEGV_ACCERR, ro, *(volatile char *)ro = 1);
    int fd = open("short", O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && write(fd, "abc", 3) == 3);
    char *map = mmap(NULL, 2 * page, PROT_READ, MAP_PRIVATE, fd, 0);
    CHECK(map != MAP_FAILED && map[0] == 'a' && map[3] == 0);
    FAULT("beyond the file", SIGBUS, BUS_ADRERR, map + page, (void)*(volatile char *)(map + page));
    FAULT("division", SIGFPE, FPE_INTDIV, 0, asm volatile("xor %%edx, %%edx\n mov $1, %%eax\n xor %%ecx, %%ecx\n idiv %%ecx" ::: "eax", "ecx", "edx"));
    FAULT("privileged", SIGSEGV, SI_KERNEL, 0, asm volatile("hlt"));
    action(SIGILL, skip_instruction, 0);
    asm volatile("ud2");
    EQ(last.si_code, ILL_ILLOPN);
    action(SIGTRAP, record, 0);
    count = 0;
    asm volatile("int3");
    EQ(count, 1);
    EQ(last.si_code, SI_KERNEL);
    say("illegal and trap\n");

    /* what cannot be */
    handle(SIGUSR1, SIG_IGN, 0);
    FAILS(sigaction(SIGKILL, &(struct sigaction){.sa_handler = SIG_IGN}, NULL), EINVAL);
    FAILS(kill(me, 65), EINVAL);
    FAILS(kill(me, -1), EINVAL);
    FAILS(kill(0x3fffff, 0), ESRCH);
    EQ(kill(me, 0), 0);
    FAILS(sigqueue(me, 65, (union sigval){0}), EINVAL);
    siginfo_t fake;
    memset(&fake, 0, sizeof fake);
    fake.si_code = SI_USER;
    if ((pid = fork()) == 0) {
        FAILS(syscall(SYS_rt_sigqueueinfo, me, SIGUSR1, &fake), EPERM);
        _exit(0);
    }
    ends_with(pid, 0);

    /* faults without a handler */
    struct rlimit none = {0, 0};
    CHECK(setrlimit(RLIMIT_CORE, &none) == 0);
    handle(SIGSEGV, SIG_DFL, 0);
    if ((pid = fork()) == 0) {
        *(volatile char *)8 = 1;
        _exit(0);
    }
    dies_of(pid, SIGSEGV);
    handle(SIGSEGV, SIG_IGN, 0);
    if ((pid = fork()) == 0) {
        *(volatile char *)8 = 1;
        _exit(0);
    }
    dies_of(pid, SIGSEGV);
    /* a blocked fault is deadly */
    action(SIGSEGV, record, 0);
    sigemptyset(&set);
    sigaddset(&set, SIGSEGV);
    if ((pid = fork()) == 0) {
        sigprocmask(SIG_BLOCK, &set, NULL);
        *(volatile char *)8 = 1;
        _exit(0);
    }
    dies_of(pid, SIGSEGV);
    say("deaths\n");
    return 0;
}
