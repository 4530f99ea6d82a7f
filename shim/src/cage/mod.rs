//! Where guests live on a node that is not their home: namespaces of their own, an empty read-only root, no network, and
//! processes that begin as nothing with the number that they have at home.
//!
//! ```text
//! supervisor ─┬─ init      pid 1 inside; ends when the supervisor does, and with it everything inside
//!             ├─ nursery   makes the blank guests
//!             └─ guest...  children of the supervisor, which reaps and traces them
//! ```
//!
//! It works for root and for a plain user without any capability alike: the cage has a user namespace of its own, into which
//! exactly one user and one group are mapped (user_namespaces(7), pid_namespaces(7), time_namespaces(7)).
//!
//! Each of these processes sends SIGCHLD when it ends, and so do the children that guests make with CLONE_PARENT.

mod helper;
mod image;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixCredentials,
    recvmsg, sendmsg, setsockopt, socketpair, sockopt,
};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::pipe2;
use parking_lot::Mutex;
use thiserror::Error;

pub use helper::Stage;
use helper::{Plan, REPORT_LEN, Report};

/// Address, in every blank guest, of a `syscall` instruction followed by `int3`, in a page (r-x) that holds no secret. It lies in
/// the range that no image may use, so it can stay until the guest is complete.
pub const GATE: u64 = image::GATE;
/// The page that [`GATE`] lies in; the only one of a blank guest but its stack, the vDSO and vvar.
pub const GATE_PAGE: u64 = image::BASE;

/// A resource limit for everything in the cage (setrlimit(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// RLIMIT_*
    pub resource: u32,
    /// soft limit
    pub soft: u64,
    /// hard limit, not above the supervisor's own
    pub hard: u64,
}

/// What a cage is to look like.
#[derive(Debug, Clone, Default)]
pub struct CageOptions {
    /// How far home's CLOCK_MONOTONIC is ahead of this process's, nanoseconds.
    pub monotonic_ahead_ns: i64,
    /// How far home's CLOCK_BOOTTIME is ahead of this process's, nanoseconds.
    pub boottime_ahead_ns: i64,
    /// The host name inside, at most 64 bytes.
    pub hostname: String,
    /// The user id inside; outside it is the supervisor's own.
    pub uid: u32,
    /// The group id inside.
    pub gid: u32,
    /// Resource limits inside. RLIMIT_CORE is always 1 byte, which refuses core dumps.
    pub limits: Vec<Limit>,
    /// Niceness inside, 0 to 19.
    pub nice: i32,
}

/// Why something did not work.
#[derive(Debug, Error)]
pub enum CageError {
    /// The cage could not be made. Nothing is left of it.
    #[error("cannot make a cage: {}: {errno}{}", what(*.stage), hint(*.stage, *.errno))]
    Build {
        /// at what it failed
        stage: Stage,
        /// the kernel's error
        errno: Errno,
    },
    /// An option is outside its range. Nothing was done.
    #[error("cannot make a cage: {0}")]
    Option(&'static str),
    /// A call of the supervisor's own failed. Nothing is left of what was tried.
    #[error("{op}: {source}")]
    Os {
        /// the call
        op: &'static str,
        /// the kernel's error
        source: io::Error,
    },
    /// Another process or thread in the cage has this number, or it was not reaped yet. Nothing was done.
    #[error("pid {0} is in use in the cage")]
    PidTaken(i32),
    /// This kernel cannot give a process this number. Nothing was done.
    #[error("pid {0} is beyond this node's kernel.pid_max")]
    PidRange(i32),
    /// The nursery could not do it. Nothing was done.
    #[error("{op} in the cage: {errno}")]
    Refused {
        /// what was asked for
        op: &'static str,
        /// the kernel's error
        errno: Errno,
    },
    /// The cage's own processes are dead, and with them all guests.
    #[error("the cage is dead")]
    Dead,
}

fn what(stage: Stage) -> &'static str {
    match stage {
        Stage::Done | Stage::Prepare => "prepare its helper process",
        Stage::Namespaces => "new namespaces",
        Stage::Ids => "map user and group",
        Stage::Clocks => "set the clocks",
        Stage::Hostname => "set the host name",
        Stage::Root => "empty the file system",
        Stage::Program => "place the nursery's program",
        Stage::Init => "start its init",
        Stage::Nursery => "start its nursery",
        Stage::Limits => "set resource limits",
        Stage::Capabilities => "restrict the nursery's capabilities",
        Stage::Exec => "run the nursery's program",
    }
}

fn hint(stage: Stage, errno: Errno) -> &'static str {
    match (stage, errno) {
        (Stage::Namespaces, Errno::EPERM) => {
            " (are unprivileged user namespaces allowed? see user.max_user_namespaces, kernel.unprivileged_userns_clone and \
             kernel.apparmor_restrict_unprivileged_userns; a chroot forbids them too)"
        }
        (Stage::Namespaces, Errno::ENOSPC) => " (user.max_*_namespaces is exhausted)",
        (Stage::Namespaces, Errno::EINVAL) => " (the kernel lacks a kind of namespace)",
        (Stage::Clocks, Errno::ERANGE) => " (home's clock would be negative or too far away here)",
        _ => "",
    }
}

fn os(op: &'static str) -> impl FnOnce(Errno) -> CageError {
    move |errno| CageError::Os {
        op,
        source: errno.into(),
    }
}

/// A process in the cage that is nothing yet: no descriptors but those that were passed, one page of code ([`GATE_PAGE`]) and a
/// small stack, default signal dispositions, nothing blocked, no capabilities, waiting in pause(2). It is a child of the thread
/// that made the cage, and not traced yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blank {
    /// Its pid as the supervisor sees it.
    pub outer_pid: i32,
    /// The numbers of the passed descriptors in it, in their order.
    pub fds_inside: Vec<i32>,
}

/// A cage. Dropping it kills everything inside.
///
/// Its processes are children of the *thread* that called [`Cage::new`]: the tracer should be that thread, if it waits with
/// `__WNOTHREAD`, and the thread should live as long as the cage.
#[derive(Debug)]
pub struct Cage {
    control: Mutex<OwnedFd>,
    init_pid: i32,
    nursery_pid: i32,
    nursery_inside: i32,
    init: OwnedFd,
    most_fds: usize,
    has_last_pid: bool,
}

impl Cage {
    /// Makes an empty cage. Takes some milliseconds, most of it for the network namespace.
    ///
    /// May be called in a process with many threads.
    ///
    /// # Errors
    /// [`CageError::Build`] says what this node does not allow.
    pub fn new(options: CageOptions) -> Result<Cage, CageError> {
        if options.hostname.len() > 64 {
            return Err(CageError::Option("the host name is longer than 64 bytes"));
        }
        let clocks = clock_text(&options)?;
        let (control, nursery_end) = pair()?;
        let (report, report_end) = pipe2(OFlag::O_CLOEXEC).map_err(os("pipe2"))?;
        let lifeline = pidfd(std::process::id() as i32)?;
        let plan = Plan::new(
            &options,
            clocks,
            lifeline.as_raw_fd(),
            nursery_end.as_raw_fd(),
            report_end.as_raw_fd(),
        );
        let helper = fork_helper(&plan)?;
        drop((nursery_end, report_end));
        let mut bytes = Vec::new();
        let read = File::from(report).read_to_end(&mut bytes);
        reap(helper, true);
        let mut done = None;
        let mut failed = None;
        for record in bytes.chunks_exact(REPORT_LEN) {
            let report = Report::decode(record);
            match Stage::from_number(report.stage) {
                Some(Stage::Done) => done = Some(report),
                stage => {
                    failed = failed.or(Some((
                        stage.unwrap_or(Stage::Prepare),
                        Errno::from_raw(report.errno),
                    )));
                }
            }
        }
        let Some(report) = done else {
            let (stage, errno) = failed.unwrap_or((Stage::Prepare, Errno::ECHILD));
            return Err(CageError::Build { stage, errno });
        };
        let nofile = options
            .limits
            .iter()
            .find(|l| l.resource == libc::RLIMIT_NOFILE)
            .map(|l| l.soft);
        let own =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).map_or(256, |l| l.0);
        let init = match pidfd(report.init) {
            Ok(init) => init,
            Err(e) => {
                // SAFETY: our own child, which was not waited for.
                unsafe { libc::kill(report.init, libc::SIGKILL) };
                reap(report.nursery, true);
                reap(report.init, true);
                return Err(e);
            }
        };
        let cage = Cage {
            control: Mutex::new(control),
            init_pid: report.init,
            nursery_pid: report.nursery,
            nursery_inside: report.nursery_inside,
            init,
            most_fds: nofile.unwrap_or(own).saturating_sub(8) as usize,
            has_last_pid: report.last_pid != 0,
        };
        if let Err(source) = read {
            return Err(CageError::Os {
                op: "read the helper's report",
                source,
            });
        }
        match failed {
            None => Ok(cage),
            // Dropping the cage kills the half of it that lives.
            Some((stage, errno)) => Err(CageError::Build { stage, errno }),
        }
    }

    /// Makes a blank guest with this pid inside, and with duplicates of these descriptors.
    ///
    /// # Errors
    /// [`CageError::PidTaken`] (also before a dead guest of that pid is reaped), [`CageError::PidRange`], EMFILE, EAGAIN.
    pub fn spawn_blank(&self, pid: i32, fds: &[BorrowedFd<'_>]) -> Result<Blank, CageError> {
        const OP: &str = "spawn a process";
        if pid == 1 || pid == self.nursery_inside {
            return Err(CageError::PidTaken(pid));
        }
        if pid < 1 {
            return Err(CageError::PidRange(pid));
        }
        let refused = |errno| CageError::Refused { op: OP, errno };
        if fds.len() > self.most_fds {
            return Err(refused(Errno::EMFILE));
        }
        let (answers, theirs) = pair()?;
        setsockopt(&answers, sockopt::PassCred, &true).map_err(os("SO_PASSCRED"))?;
        let mut numbers: Vec<i32> = vec![theirs.as_raw_fd()];
        numbers.extend(fds.iter().map(|fd| fd.as_raw_fd()));
        let batches: Vec<&[i32]> = numbers.chunks(image::MAX_FDS).collect();
        {
            let control = self.control.lock();
            for (index, batch) in batches.iter().enumerate() {
                let last = index + 1 == batches.len();
                let op = if last { image::OP_SPAWN } else { image::OP_HOLD };
                send(control.as_fd(), op, pid, b"", batch)?;
            }
        }
        drop(theirs);
        let mut outer = None;
        loop {
            match receive(answers.as_fd())? {
                Some((0, from)) => outer = from,
                Some((negated, from)) => {
                    // From a process that could not finish becoming a guest, or from the nursery.
                    if let Some(child) = from.filter(|from| *from != self.nursery_pid) {
                        reap(child, true);
                    }
                    return Err(match Errno::from_raw(negated.saturating_neg()) {
                        Errno::EEXIST => CageError::PidTaken(pid),
                        Errno::EINVAL => CageError::PidRange(pid),
                        errno => refused(errno),
                    });
                }
                None => break,
            }
        }
        let outer_pid = outer.ok_or(CageError::Dead)?;
        Ok(Blank {
            outer_pid,
            fds_inside: (0..fds.len() as i32)
                .map(|index| image::FIRST_FD + index)
                .collect(),
        })
    }

    /// Lets the next process or thread that is made inside have the number `last + 1`, if that is free, by writing `last` to the
    /// cage's ns_last_pid (proc_sys_kernel(5)). [`Cage::spawn_blank`] does not disturb this; any other clone inside does.
    ///
    /// # Errors
    /// [`CageError::PidRange`]; ENOSYS where /proc/sys cannot be written.
    pub fn set_last_pid(&self, last: i32) -> Result<(), CageError> {
        let op = "set ns_last_pid";
        if !self.has_last_pid {
            return Err(CageError::Refused {
                op,
                errno: Errno::ENOSYS,
            });
        }
        self.request(op, image::OP_LAST_PID, 0, last.to_string().as_bytes())
            .map_err(|e| match e {
                CageError::Refused {
                    errno: Errno::EINVAL, ..
                } => CageError::PidRange(last),
                other => other,
            })
    }

    /// Kills the process that has this pid inside, if there is one. It is reaped by whoever waits for the guests.
    ///
    /// # Errors
    /// [`CageError::Dead`].
    pub fn kill_blank(&self, pid: i32) -> Result<(), CageError> {
        if pid <= 1 || pid == self.nursery_inside {
            return Ok(());
        }
        match self.request("kill", image::OP_KILL, pid, b"") {
            Err(CageError::Refused {
                errno: Errno::ESRCH, ..
            }) => Ok(()),
            other => other,
        }
    }

    fn request(&self, op: &'static str, code: u32, pid: i32, text: &[u8]) -> Result<(), CageError> {
        let control = self.control.lock();
        send(control.as_fd(), code, pid, text, &[])?;
        match receive(control.as_fd())? {
            Some((0, _)) => Ok(()),
            Some((negated, _)) => Err(CageError::Refused {
                op,
                errno: Errno::from_raw(negated.saturating_neg()),
            }),
            None => Err(CageError::Dead),
        }
    }

    /// The pids of init and nursery, as the supervisor sees them. A loop that waits for all children learns of their deaths too.
    pub fn own_pids(&self) -> [i32; 2] {
        [self.init_pid, self.nursery_pid]
    }

    /// Becomes readable when everything inside is dead and reaped (a pidfd of the init).
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.init.as_fd()
    }

    /// Kills everything inside. The guests have to be reaped by their owner, as any child; before that the
    /// kernel does not let the init end.
    pub fn kill(&self) {
        // SAFETY: no pointers but a null one.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.init.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }

    /// Kills everything inside and waits until the cage's own processes are gone. False: not within `timeout`, because guests
    /// were not reaped.
    pub fn teardown(self, timeout: Duration) -> bool {
        self.end(timeout)
    }

    fn end(&self, timeout: Duration) -> bool {
        self.kill();
        let until = Instant::now() + timeout;
        let mut left = vec![self.nursery_pid, self.init_pid];
        loop {
            left.retain(|pid| !reap(*pid, false));
            if left.is_empty() {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        self.end(Duration::from_millis(100));
    }
}

/// The text for timens_offsets: this process's own offsets and what is missing to home's clocks. The kernel counts from the
/// initial time namespace.
fn clock_text(options: &CageOptions) -> Result<Option<CString>, CageError> {
    if options.monotonic_ahead_ns == 0 && options.boottime_ahead_ns == 0 {
        return Ok(None);
    }
    let own = std::fs::read_to_string("/proc/self/timens_offsets").map_err(|source| CageError::Os {
        op: "read /proc/self/timens_offsets",
        source,
    })?;
    let mut text = String::new();
    for (name, clock, ahead_ns) in [
        ("monotonic", ClockId::CLOCK_MONOTONIC, options.monotonic_ahead_ns),
        ("boottime", ClockId::CLOCK_BOOTTIME, options.boottime_ahead_ns),
    ] {
        let now = clock_gettime(clock).map_err(os("clock_gettime"))?;
        let now_ns = i128::from(now.tv_sec()) * 1_000_000_000 + i128::from(now.tv_nsec());
        if now_ns + i128::from(ahead_ns) < 0 {
            return Err(CageError::Option("a clock of home is negative"));
        }
        let total = offset_in(&own, name) + i128::from(ahead_ns);
        let (secs, nanos) = (total.div_euclid(1_000_000_000), total.rem_euclid(1_000_000_000));
        text.push_str(&format!("{name} {secs} {nanos}\n"));
    }
    Ok(CString::new(text).ok())
}

/// The offset of a clock in the text of timens_offsets, nanoseconds.
fn offset_in(text: &str, name: &str) -> i128 {
    text.lines()
        .find_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            if fields.next()? != name {
                return None;
            }
            let secs: i128 = fields.next()?.parse().ok()?;
            let nanos: i128 = fields.next()?.parse().ok()?;
            Some(secs * 1_000_000_000 + nanos)
        })
        .unwrap_or(0)
}

fn pair() -> Result<(OwnedFd, OwnedFd), CageError> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(os("socketpair"))
}

fn pidfd(pid: i32) -> Result<OwnedFd, CageError> {
    crate::lab::pidfd_open(pid).map_err(|source| CageError::Os {
        op: "pidfd_open",
        source,
    })
}

/// Forks the helper with all signals blocked, so that no handler of the supervisor's runs in the copy.
fn fork_helper(plan: &Plan) -> Result<i32, CageError> {
    let all = nix::sys::signal::SigSet::all();
    let before = all
        .thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_SETMASK)
        .map_err(os("sigprocmask"))?;
    // SAFETY: a fork with exit signal 0. The child runs only `helper::run`, which neither allocates nor takes locks, and does
    // not return.
    let pid = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
    if pid == 0 {
        helper::run(plan);
    }
    let errno = Errno::last();
    let _ = before.thread_set_mask();
    if pid < 0 {
        return Err(os("clone")(errno));
    }
    Ok(pid as i32)
}

/// Reaps a child; true when it is gone.
fn reap(pid: i32, block: bool) -> bool {
    let flags = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: a null status is allowed.
        let got = unsafe { libc::waitpid(pid, std::ptr::null_mut(), flags) };
        match Errno::result(got) {
            Err(Errno::EINTR) => continue,
            // Somebody else reaped it.
            Err(_) => return true,
            Ok(got) => return got != 0,
        }
    }
}

fn send(socket: BorrowedFd<'_>, op: u32, pid: i32, text: &[u8], fds: &[i32]) -> Result<(), CageError> {
    let mut message = Vec::with_capacity(image::MAX_REQUEST);
    for word in [op, pid as u32, fds.len() as u32, 0] {
        message.extend_from_slice(&word.to_ne_bytes());
    }
    debug_assert_eq!(message.len(), image::HEADER);
    message.extend_from_slice(text);
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage] = if fds.is_empty() { &[] } else { &rights };
    loop {
        let sent = sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&message)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => continue,
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(CageError::Dead),
            Err(errno) => return Err(os("sendmsg")(errno)),
        }
    }
}

/// An answer and, if the socket asks for credentials, who sent it; `None` at the end.
fn receive(socket: BorrowedFd<'_>) -> Result<Option<(i32, Option<i32>)>, CageError> {
    let mut word = [0u8; 4];
    let mut space = nix::cmsg_space!(UnixCredentials);
    loop {
        let mut parts = [IoSliceMut::new(&mut word)];
        let message = match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Ok(message) => message,
            Err(Errno::EINTR) => continue,
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(errno) => return Err(os("recvmsg")(errno)),
        };
        let from = message
            .cmsgs()
            .map_err(os("recvmsg"))?
            .find_map(|control| match control {
                ControlMessageOwned::ScmCredentials(from) => Some(from.pid()),
                _ => None,
            });
        return match message.bytes {
            4 => Ok(Some((i32::from_ne_bytes(word), from))),
            _ => Ok(None),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_found_by_name() {
        let text = "monotonic           0         0\nboottime     -5  250000000\n";
        assert_eq!(offset_in(text, "monotonic"), 0);
        assert_eq!(offset_in(text, "boottime"), -4_750_000_000);
        assert_eq!(offset_in("", "boottime"), 0);
    }
}
