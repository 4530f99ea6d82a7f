//! The process that makes a cage: forked from the supervisor, it enters new namespaces, empties them, starts the cage's init and
//! nursery as children of the supervisor, and ends.
//!
//! It is a copy of a process with many threads of which only one goes on, so nothing here allocates, locks or panics: the
//! supervisor prepares a [`Plan`] before, and the outcome is a [`Report`] in a pipe.

use std::ffi::{CStr, CString};
use std::os::fd::RawFd;
use std::ptr::null;

use super::{CageOptions, Limit};

/// Everything that the helper needs, made beforehand.
pub struct Plan {
    pub uid_map: CString,
    pub gid_map: CString,
    /// Text for timens_offsets; `None`: this node's clocks.
    pub clocks: Option<CString>,
    pub hostname: Vec<u8>,
    pub limits: Vec<Limit>,
    pub nice: i32,
    /// the same as text
    pub nice_text: String,
    pub elf: &'static [u8],
    /// pid of the supervisor
    pub parent: i32,
    /// pidfd of the supervisor
    pub lifeline: RawFd,
    /// the nursery's end of its socket
    pub control: RawFd,
    /// the pipe for the report
    pub report: RawFd,
}

impl Plan {
    pub fn new(
        options: &CageOptions,
        clocks: Option<CString>,
        lifeline: RawFd,
        control: RawFd,
        report: RawFd,
    ) -> Plan {
        let map =
            |inside: u32, outside: u32| CString::new(format!("{inside} {outside} 1")).unwrap_or_default();
        // SAFETY: these calls cannot fail and touch no memory.
        let (uid, gid, parent) = unsafe { (libc::geteuid(), libc::getegid(), libc::getpid()) };
        Plan {
            uid_map: map(options.uid, uid),
            gid_map: map(options.gid, gid),
            clocks,
            hostname: options.hostname.as_bytes().to_vec(),
            limits: options.limits.clone(),
            nice: options.nice,
            nice_text: options.nice.to_string(),
            elf: super::image::elf(),
            parent,
            lifeline,
            control,
            report,
        }
    }
}

/// What the helper was doing. The numbers go through the pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Stage {
    /// nothing failed
    Done = 0,
    /// prctl(2)
    Prepare = 1,
    /// unshare(2)
    Namespaces = 2,
    /// /proc/self/uid_map, gid_map, setgroups
    Ids = 3,
    /// /proc/self/timens_offsets
    Clocks = 4,
    /// sethostname(2)
    Hostname = 5,
    /// mount(2), pivot_root(2)
    Root = 6,
    /// the file of the init and the nursery
    Program = 7,
    /// clone3(2) of the init
    Init = 8,
    /// clone3(2) of the nursery
    Nursery = 9,
    /// setrlimit(2), setpriority(2)
    Limits = 10,
    /// capset(2), prctl(2)
    Capabilities = 11,
    /// execveat(2)
    Exec = 12,
}

impl Stage {
    /// The stage with this number.
    pub fn from_number(number: i32) -> Option<Stage> {
        use Stage::*;
        [
            Done,
            Prepare,
            Namespaces,
            Ids,
            Clocks,
            Hostname,
            Root,
            Program,
            Init,
            Nursery,
            Limits,
            Capabilities,
            Exec,
        ]
        .into_iter()
        .find(|stage| *stage as i32 == number)
    }
}

/// One record in the pipe, written in one piece.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Report {
    pub stage: i32,
    pub errno: i32,
    pub init: i32,
    pub nursery: i32,
    /// the nursery's number inside
    pub nursery_inside: i32,
    /// whether ns_last_pid could be opened
    pub last_pid: i32,
}

impl Report {
    /// The record in `bytes`, which has [`REPORT_LEN`] of them; missing ones are zero.
    pub fn decode(bytes: &[u8]) -> Report {
        let word = |index: usize| {
            let bytes = bytes
                .get(index * 4..index * 4 + 4)
                .and_then(|b| b.try_into().ok());
            bytes.map_or(0, i32::from_ne_bytes)
        };
        Report {
            stage: word(0),
            errno: word(1),
            init: word(2),
            nursery: word(3),
            nursery_inside: word(4),
            last_pid: word(5),
        }
    }
}

pub const REPORT_LEN: usize = size_of::<Report>();

type Step<T> = Result<T, (Stage, i32)>;

fn errno() -> i32 {
    // SAFETY: errno's place is this thread's own.
    unsafe { *libc::__errno_location() }
}

fn check(stage: Stage, ret: i64) -> Step<i64> {
    if ret < 0 { Err((stage, errno())) } else { Ok(ret) }
}

/// The descriptors, at numbers that [`arrange`] does not overwrite.
#[derive(Clone, Copy)]
struct Fds {
    lifeline: RawFd,
    control: RawFd,
    report: RawFd,
    last_pid: RawFd,
    program: RawFd,
}

/// A close-on-exec duplicate above the standard descriptors.
fn high(fd: RawFd) -> Step<RawFd> {
    // SAFETY: numbers only.
    check(
        Stage::Prepare,
        unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10) }.into(),
    )
    .map(|fd| fd as RawFd)
}

/// The helper's whole life.
pub fn run(plan: &Plan) -> ! {
    let report = match build(plan) {
        Ok(report) => report,
        Err(failed) => failure(failed),
    };
    send(plan.report, &report);
    exit()
}

fn failure((stage, errno): (Stage, i32)) -> Report {
    Report {
        stage: stage as i32,
        errno,
        ..Report::default()
    }
}

fn send(pipe: RawFd, report: &Report) {
    // SAFETY: writes the bytes of a plain structure.
    unsafe { libc::write(pipe, (&raw const *report).cast(), REPORT_LEN) };
}

fn exit() -> ! {
    // SAFETY: ends the process without running anything of the parent's.
    unsafe { libc::_exit(0) }
}

fn build(plan: &Plan) -> Step<Report> {
    reset_signals();
    // SAFETY: plain numbers only.
    unsafe {
        // Until the init watches over the supervisor. (This is tied to the forking thread, which waits for us.)
        check(
            Stage::Prepare,
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL).into(),
        )?;
        if libc::getppid() != plan.parent {
            exit();
        }
        // A supervisor that changed its user without an exec could not open its own files in /proc.
        check(Stage::Prepare, libc::prctl(libc::PR_SET_DUMPABLE, 1).into())?;
        // No terminal's signals for the guests.
        libc::setsid();
    }
    if plan.nice > 0 {
        // Where the kernel shares processors among sessions, a nice value counts within one only. Without a privilege it cannot be set
        // more than ten times a second by all processes together: then it stays as it is.
        let _ = write_file(Stage::Prepare, c"/proc/self/autogroup", plan.nice_text.as_bytes());
    }
    let mut fds = Fds {
        lifeline: high(plan.lifeline)?,
        control: high(plan.control)?,
        report: high(plan.report)?,
        last_pid: -1,
        program: -1,
    };
    // The handler of this file looks at the writer's pid namespace, not at who opened it.
    // SAFETY: the path is a NUL-terminated literal.
    let last_pid = unsafe {
        libc::open(
            c"/proc/sys/kernel/ns_last_pid".as_ptr(),
            libc::O_WRONLY | libc::O_CLOEXEC,
        )
    };
    if last_pid >= 0 {
        fds.last_pid = high(last_pid)?;
    }
    // SAFETY: plain numbers only.
    check(Stage::Namespaces, unsafe { libc::unshare(NAMESPACES) }.into())?;
    // A process without privilege may map its own ids once it has given up setgroups(2).
    write_file(Stage::Ids, c"/proc/self/setgroups", b"deny")?;
    write_file(Stage::Ids, c"/proc/self/gid_map", plan.gid_map.as_bytes())?;
    write_file(Stage::Ids, c"/proc/self/uid_map", plan.uid_map.as_bytes())?;
    if let Some(text) = &plan.clocks {
        write_file(Stage::Clocks, c"/proc/self/timens_offsets", text.as_bytes())?;
    }
    // SAFETY: the pointer and length are a live slice's.
    unsafe {
        let name = &plan.hostname;
        check(
            Stage::Hostname,
            libc::sethostname(name.as_ptr().cast(), name.len()).into(),
        )?;
    }
    fds.program = high(empty_root(plan)?)?;
    let init = clone(Stage::Init, None)?;
    if init == 0 {
        become_init(&fds);
    }
    let (nursery, nursery_inside) = clone_nursery(plan, &fds)?;
    Ok(Report {
        stage: Stage::Done as i32,
        errno: 0,
        init,
        nursery,
        nursery_inside,
        last_pid: i32::from(last_pid >= 0),
    })
}

const CLONE_NEWTIME: i32 = 0x80;
/// All eight in one call, so that the user namespace owns the others.
const NAMESPACES: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP
    | CLONE_NEWTIME;

/// Default dispositions for all signals; the mask stays as it is (all blocked) until the exec.
fn reset_signals() {
    // struct sigaction of the kernel: handler, flags, restorer, mask.
    let default = [0u64; 4];
    for signal in 1..=64 {
        // SAFETY: the kernel reads 32 bytes and writes nothing. SIGKILL and SIGSTOP fail harmlessly.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), null::<u64>(), 8) };
    }
}

fn unblock_signals() {
    let none = 0u64;
    // SAFETY: the kernel reads 8 bytes.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            null::<u64>(),
            8,
        )
    };
}

fn write_file(stage: Stage, path: &CStr, text: &[u8]) -> Step<()> {
    // SAFETY: a NUL-terminated path, and a live slice with its length.
    unsafe {
        let fd = check(
            stage,
            libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC).into(),
        )? as RawFd;
        let written = libc::write(fd, text.as_ptr().cast(), text.len());
        let result = check(stage, written as i64);
        libc::close(fd);
        result.map(drop)
    }
}

/// An empty, read-only root. What is left of the file system is the unlinked file of the cage's own program, whose descriptor is
/// returned.
fn empty_root(plan: &Plan) -> Step<RawFd> {
    let flags = libc::MS_NOSUID | libc::MS_NODEV;
    // SAFETY: all paths are NUL-terminated literals, and the buffer is a live slice with its length.
    unsafe {
        let none = null::<libc::c_char>();
        let private = libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, null());
        check(Stage::Root, private.into())?;
        // Any directory that certainly exists; /proc has done its service.
        let options = c"mode=0555,size=64k,nr_inodes=8";
        let tmpfs = c"tmpfs".as_ptr();
        check(
            Stage::Root,
            libc::mount(tmpfs, c"/proc".as_ptr(), tmpfs, flags, options.as_ptr().cast()).into(),
        )?;
        check(Stage::Root, libc::chdir(c"/proc".as_ptr()).into())?;
        // With both at the same place the old root lies on top of the new one, and is taken off.
        let dot = c".".as_ptr();
        if libc::syscall(libc::SYS_pivot_root, dot, dot) < 0 {
            let e = errno();
            // The initial ram file system cannot be put anywhere: the new root is moved over it.
            if e != libc::EINVAL {
                return Err((Stage::Root, e));
            }
            check(
                Stage::Root,
                libc::mount(dot, c"/".as_ptr(), none, libc::MS_MOVE, null()).into(),
            )?;
            check(Stage::Root, libc::chroot(dot).into())?;
        } else {
            check(Stage::Root, libc::umount2(dot, libc::MNT_DETACH).into())?;
        }
        check(Stage::Root, libc::chdir(c"/".as_ptr()).into())?;

        let name = c"cage".as_ptr();
        let create = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
        let writer = check(Stage::Program, libc::open(name, create, 0o500).into())? as RawFd;
        let written = libc::write(writer, plan.elf.as_ptr().cast(), plan.elf.len());
        check(Stage::Program, written as i64)?;
        libc::close(writer);
        let reader = check(
            Stage::Program,
            libc::open(name, libc::O_RDONLY | libc::O_CLOEXEC).into(),
        )? as RawFd;
        check(Stage::Program, libc::unlink(name).into())?;
        let read_only = flags | libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
        check(
            Stage::Root,
            libc::mount(none, c"/".as_ptr(), none, read_only, null()).into(),
        )?;
        Ok(reader)
    }
}

/// Forks a child of the supervisor, with a chosen number if one is given. (Its exit signal is this process's, 0, until its exec
/// makes that SIGCHLD.)
fn clone(stage: Stage, tid: Option<i32>) -> Step<i32> {
    let set_tid = tid.unwrap_or(0);
    let mut args = [0u64; 10];
    args[0] = libc::CLONE_PARENT as u64;
    if tid.is_some() {
        args[8] = (&raw const set_tid).addr() as u64;
        args[9] = 1;
    }
    // SAFETY: `args` is a struct clone_args of the announced size; without CLONE_VM the child goes on with a copy of this stack.
    let child = unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) };
    check(stage, child).map(|pid| pid as i32)
}

/// Descriptor 0 is `first`, 1 is `second`, and all others are closed by the exec.
fn arrange(first: RawFd, second: RawFd) {
    // SAFETY: numbers only; this process is single-threaded and uses no other descriptor but by number.
    unsafe {
        libc::dup2(first, 0);
        libc::dup2(second, 1);
        libc::syscall(libc::SYS_close_range, 2, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
}

fn die(fds: &Fds, failed: (Stage, i32)) -> ! {
    send(fds.report, &failure(failed));
    exit()
}

fn exec(fds: &Fds, role: &[*const libc::c_char]) -> ! {
    let environment = [null::<libc::c_char>()];
    unblock_signals();
    // SAFETY: `role` and `environment` are null-terminated arrays of NUL-terminated strings.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            fds.program,
            c"".as_ptr(),
            role.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    die(fds, (Stage::Exec, errno()))
}

fn become_init(fds: &Fds) -> ! {
    arrange(fds.lifeline, fds.lifeline);
    exec(fds, &[c"mosrun-cage".as_ptr(), null()])
}

/// The nursery's number outside and inside.
fn clone_nursery(plan: &Plan, fds: &Fds) -> Step<(i32, i32)> {
    // A number that hardly any process at home has: the last one, where the kernel's limits allow it.
    let mut result = Err((Stage::Nursery, libc::EINVAL));
    for wanted in [4_194_303, 32_767] {
        result = clone(Stage::Nursery, Some(wanted)).map(|pid| (pid, wanted));
        if !matches!(result, Err((_, libc::EINVAL))) {
            break;
        }
    }
    if let Ok((0, _)) = result {
        become_nursery(plan, fds);
    }
    result
}

fn become_nursery(plan: &Plan, fds: &Fds) -> ! {
    arrange(
        fds.control,
        if fds.last_pid >= 0 {
            fds.last_pid
        } else {
            fds.control
        },
    );
    for limit in &plan.limits {
        if set_limit(limit.resource, limit.soft, limit.hard) < 0 {
            die(fds, (Stage::Limits, errno()));
        }
    }
    // A core dump would start the node's own handler, which could look at the guest. One byte is the limit that refuses files
    // and handlers alike (core(5): with a handler 0 would be no limit). It fails only where the limit is lower already.
    set_limit(libc::RLIMIT_CORE, 1, 1);
    if plan.nice > 0 {
        // SAFETY: plain numbers.
        unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, plan.nice) };
    }
    if let Err(failed) = keep_restore_capability() {
        die(fds, failed);
    }
    exec(fds, &[c"mosrun-cage".as_ptr(), c"nursery".as_ptr(), null()])
}

fn set_limit(resource: u32, soft: u64, hard: u64) -> i64 {
    let new = [soft, hard];
    // SAFETY: the kernel reads a struct rlimit64, two words.
    unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, new.as_ptr(), null::<u64>()) }
}

/// CAP_CHECKPOINT_RESTORE, in the cage's user namespace only, is all that the nursery needs for choosing pids. It has to be an
/// ambient one to get through the exec when the mapped user is not root. Blank guests give it up.
fn keep_restore_capability() -> Step<()> {
    const CHECKPOINT_RESTORE: u32 = 40;
    let header = [0x2008_0522u32, 0];
    let bit = 1u32 << (CHECKPOINT_RESTORE - 32);
    // effective, permitted, inheritable: low words, then high words
    let sets = [0, 0, 0, bit, bit, bit];
    // SAFETY: the kernel reads the two structures, of the sizes that this version has; the rest are numbers.
    unsafe {
        // A mapped root would get all capabilities back from the exec.
        const NOROOT_LOCKED: libc::c_ulong = 0b11;
        libc::prctl(libc::PR_SET_SECUREBITS, NOROOT_LOCKED);
        check(
            Stage::Capabilities,
            libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()),
        )?;
        let raise = libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_RAISE,
            CHECKPOINT_RESTORE,
            0,
            0,
        );
        check(Stage::Capabilities, raise.into())?;
    }
    Ok(())
}
