//! Children and threads of guests, with the ids that home chose and the supervisor as their parent.
//!
//! At the seccomp stop of clone, clone3, fork or vfork, [`CloneRequest::parse`] says what the guest asks for, with the errors that
//! the kernel itself would find in the arguments. After home has made the real child and the id is set
//! ([`crate::cage::Cage::set_last_pid`]), a [`CloneRewrite`] lets the guest's thread make its own: the call is exchanged for one
//! whose child belongs to the tracer's process, does not suspend its parent, and sends no signal. Both see their own registers
//! and memory again afterwards.
//!
//! | asked for | made |
//! |---|---|
//! | any | legacy clone(2), its arguments in registers only |
//! | with CLONE_CLEAR_SIGHAND | clone3(2), its structure below the stack's red zone, where the old bytes are put back |

use linklayer::image::Regs;
use linklayer::memory::GuestMemory;
use thiserror::Error;

use crate::memory::ProcessMemory;
use crate::ptrace::{PtraceError, Stop, Stopped};

/// clone3(2): children start with default dispositions.
pub const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
const CLONE_INTO_CGROUP: u64 = 1 << 33;
/// What both calls know: all bits but those of the exit signal.
const LEGACY_FLAGS: u64 = 0xffff_ffff;
const CSIGNAL: u64 = 0xff;
const CLONE_NEWTIME: u64 = 0x80;
/// clone3's structure: its first version and the newest known one, bytes.
const ARGS_MIN: u64 = 64;
const ARGS_MAX: usize = 88;
/// First address that is no user memory.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;
const RED_ZONE: u64 = 128;
const SYSCALL_LEN: u64 = 2;
/// ERESTARTNOINTR: what was not begun is made again, unseen (include/linux/errno.h).
pub(crate) const RESTARTNOINTR: i64 = -513;

const fn flag(flag: i32) -> u64 {
    flag as u32 as u64
}

const THREAD: u64 = flag(libc::CLONE_THREAD);
const VM: u64 = flag(libc::CLONE_VM);
const PIDFD: u64 = flag(libc::CLONE_PIDFD);
const SIGHAND: u64 = flag(libc::CLONE_SIGHAND);
const PARENT: u64 = flag(libc::CLONE_PARENT);
const DETACHED: u64 = flag(libc::CLONE_DETACHED);
const PARENT_SETTID: u64 = flag(libc::CLONE_PARENT_SETTID);
const SETTLS: u64 = flag(libc::CLONE_SETTLS);
const VFORK: u64 = flag(libc::CLONE_VFORK);

/// What a call of the clone family asks for, in one form for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CloneRequest {
    /// CLONE_* without the exit signal.
    pub flags: u64,
    /// Signal to the parent at the child's end, 0 for none.
    pub exit_signal: i32,
    /// Stack pointer of the child, 0: the parent's.
    pub stack: u64,
    /// Where CLONE_PARENT_SETTID puts the id.
    pub parent_tid: u64,
    /// Where CLONE_CHILD_SETTID and CLONE_CHILD_CLEARTID put it.
    pub child_tid: u64,
    /// Where CLONE_PIDFD puts the descriptor.
    pub pidfd: u64,
    /// Thread pointer for CLONE_SETTLS.
    pub tls: u64,
}

/// Why a call is not to be rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CloneRefusal {
    /// The kernel would refuse these arguments with this errno.
    #[error("the call fails with errno {0}")]
    Errno(i32),
    /// What it asks for can only be had at home.
    #[error("{0}")]
    GoHome(&'static str),
}

use CloneRefusal::{Errno, GoHome};

impl CloneRequest {
    /// Reads the request of a thread that is about to make a call of the clone family: `regs` at its seccomp stop, and its memory.
    ///
    /// # Errors
    /// See [`CloneRefusal`]. The order of the checks is the kernel's (kernel/fork.c), so the errno is too.
    pub fn parse(regs: &Regs, memory: &dyn GuestMemory) -> Result<CloneRequest, CloneRefusal> {
        let legacy = |flags: u64| CloneRequest {
            flags: flags & LEGACY_FLAGS & !CSIGNAL,
            exit_signal: (flags & CSIGNAL) as i32,
            ..CloneRequest::default()
        };
        let request = match regs.orig_rax as i64 {
            libc::SYS_fork => legacy(libc::SIGCHLD as u64),
            libc::SYS_vfork => legacy(VM | VFORK | libc::SIGCHLD as u64),
            libc::SYS_clone => CloneRequest {
                stack: regs.rsi,
                parent_tid: regs.rdx,
                child_tid: regs.r10,
                pidfd: regs.rdx,
                tls: regs.r8,
                ..legacy(regs.rdi)
            },
            libc::SYS_clone3 => Self::parse_clone3(regs.rdi, regs.rsi, memory)?,
            _ => return Err(GoHome("not a call of the clone family")),
        };
        request.check(memory)?;
        Ok(request)
    }

    fn parse_clone3(address: u64, size: u64, memory: &dyn GuestMemory) -> Result<CloneRequest, CloneRefusal> {
        if size > 4096 {
            return Err(Errno(libc::E2BIG));
        }
        if size < ARGS_MIN {
            return Err(Errno(libc::EINVAL));
        }
        let mut bytes = vec![0; (size as usize).max(ARGS_MAX)];
        if memory.read(address, &mut bytes[..size as usize]).is_err() {
            return Err(Errno(libc::EFAULT));
        }
        if bytes[ARGS_MAX..].iter().any(|b| *b != 0) {
            return Err(Errno(libc::E2BIG));
        }
        let mut words = [0u64; ARGS_MAX / 8];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = bytes.try_into().map_or(0, u64::from_ne_bytes);
        }
        let [
            flags,
            pidfd,
            child_tid,
            parent_tid,
            exit_signal,
            stack,
            stack_size,
            tls,
            set_tid,
            set_tid_size,
            _,
        ] = words;
        if (set_tid == 0) != (set_tid_size == 0) || set_tid_size > 32 || exit_signal > 64 {
            return Err(Errno(libc::EINVAL));
        }
        if set_tid != 0 {
            return Err(GoHome("clone3 with a chosen id"));
        }
        if flags & CLONE_INTO_CGROUP != 0 {
            return Err(GoHome("clone3 into a cgroup"));
        }
        let known = LEGACY_FLAGS | CLONE_CLEAR_SIGHAND;
        let nonsense = DETACHED | (CSIGNAL & !CLONE_NEWTIME);
        let both = SIGHAND | CLONE_CLEAR_SIGHAND;
        if flags & !known != 0
            || flags & nonsense != 0
            || flags & both == both
            || flags & (THREAD | PARENT) != 0 && exit_signal != 0
            || (stack == 0) != (stack_size == 0)
            || stack.checked_add(stack_size).is_none_or(|top| top > TASK_SIZE)
        {
            return Err(Errno(libc::EINVAL));
        }
        Ok(CloneRequest {
            flags,
            exit_signal: exit_signal as i32,
            stack: stack + stack_size,
            parent_tid,
            child_tid,
            pidfd,
            tls,
        })
    }

    /// What kernel_clone() and copy_process() check, as far as it is the same at home and here.
    fn check(&self, memory: &dyn GuestMemory) -> Result<(), CloneRefusal> {
        let has = |flags: u64| self.flags & flags == flags;
        let namespaces = flag(
            libc::CLONE_NEWNS
                | libc::CLONE_NEWCGROUP
                | libc::CLONE_NEWUTS
                | libc::CLONE_NEWIPC
                | libc::CLONE_NEWUSER
                | libc::CLONE_NEWPID
                | libc::CLONE_NEWNET,
        ) | CLONE_NEWTIME;
        if has(PIDFD | PARENT_SETTID) && self.pidfd == self.parent_tid
            || has(PIDFD | DETACHED)
            || has(THREAD) && !has(SIGHAND)
            || has(SIGHAND) && !has(VM)
        {
            return Err(Errno(libc::EINVAL));
        }
        if self.flags & namespaces != 0 {
            return Err(GoHome("a child in new namespaces"));
        }
        if self.flags & flag(libc::CLONE_UNTRACED | libc::CLONE_PTRACE) != 0 {
            return Err(GoHome("a child with tracing flags"));
        }
        if has(SETTLS) && self.tls >= TASK_SIZE {
            return Err(Errno(libc::EPERM));
        }
        if has(PIDFD) && !memory.writable(self.pidfd, 4) {
            return Err(Errno(libc::EFAULT));
        }
        Ok(())
    }

    /// Whether the child is a thread of the same process.
    pub fn is_thread(&self) -> bool {
        self.flags & THREAD != 0
    }

    /// Whether the child has the same memory.
    pub fn shares_memory(&self) -> bool {
        self.flags & VM != 0
    }

    /// Whether the parent waits until the child executes a program or ends.
    pub fn is_vfork(&self) -> bool {
        self.flags & VFORK != 0
    }

    /// Whether the child's caught signals get default dispositions.
    pub fn clears_handlers(&self) -> bool {
        self.flags & CLONE_CLEAR_SIGHAND != 0
    }

    /// The flags of the call that is made here.
    fn flags_here(&self) -> u64 {
        let flags = self.flags & !(VFORK | PIDFD);
        // What the guest's parent is, is home's affair.
        if self.is_thread() { flags } else { flags | PARENT }
    }

    /// The structure for clone3.
    fn args_here(&self, rsp: u64) -> [u64; 8] {
        let top = if self.stack == 0 { rsp } else { self.stack };
        // clone3 wants a base and a size; only their sum counts.
        [
            self.flags_here(),
            0,
            self.child_tid,
            self.parent_tid,
            0,
            top - 1,
            1,
            self.tls,
        ]
    }
}

/// Where a rewritten call is after a stop of the thread that makes it.
#[derive(Debug)]
pub enum CloneStep {
    /// It goes on; the thread was resumed.
    Running,
    /// The child was made, with this id as the tracer sees it; the call goes on, the thread was resumed. The child's first stop
    /// comes, or came, by itself.
    Born(i32),
    /// The call was not made because the thread is to stop first (PTRACE_INTERRUPT, SIGSTOP). It has its own registers, and is to
    /// be resumed: it will make the call, and the seccomp stop, again, and nothing of the guest runs before that.
    Again(Stopped),
    /// The call is over; the thread has its own registers and rax says what it returned: the child's id inside, or a negative
    /// errno.
    Returned(Stopped, i64),
}

/// Why a child is not the one that was asked for.
#[derive(Debug, Error)]
pub enum CloneError {
    /// ptrace failed.
    #[error(transparent)]
    Ptrace(#[from] PtraceError),
    /// Another process had the number, or made a child in between. The child is stopped: see [`CloneRewrite::dismiss`].
    #[error("child {outer} got the id {got} inside, not {wanted}")]
    WrongId {
        /// the child, as the tracer sees it
        outer: i32,
        /// its id inside
        got: i32,
        /// what home gave
        wanted: i32,
    },
    /// The place for clone3's structure below the stack cannot be used. Nothing was done.
    #[error("no room below the stack at {0:#x}")]
    NoRoom(u64),
}

/// A call of the clone family that is made in another form. See the module's text.
///
/// The caller keeps it while the call is under way, gives it every stop of the thread ([`CloneRewrite::parent_stop`]) and the first
/// stop of the child ([`CloneRewrite::child_stop`]), in whatever order these come.
#[derive(Debug, Clone)]
pub struct CloneRewrite {
    request: CloneRequest,
    /// registers at the seccomp stop
    original: Regs,
    /// What clone3's structure covers, and where.
    covered: Option<(u64, Vec<u8>)>,
    born: bool,
    /// The thread's own mask, while it has all signals blocked: with a handler in between, the call would not come again next, but
    /// perhaps another one.
    mask: Option<u64>,
}

impl CloneRewrite {
    /// For the call that `request` was parsed from; `regs` are those of the same stop.
    pub fn new(request: CloneRequest, regs: &Regs) -> CloneRewrite {
        CloneRewrite {
            request,
            original: *regs,
            covered: None,
            born: false,
            mask: None,
        }
    }

    /// What was asked for.
    pub fn request(&self) -> &CloneRequest {
        &self.request
    }

    /// The registers at the seccomp stop.
    pub fn original(&self) -> &Regs {
        &self.original
    }

    /// Exchanges the call of a thread in its seccomp stop, and resumes it. Nothing else in the cage may clone between the choice
    /// of the id and [`CloneStep::Born`].
    ///
    /// # Errors
    /// [`CloneError::NoRoom`], [`CloneError::Ptrace`].
    pub fn start(&mut self, mut stopped: Stopped, memory: &dyn GuestMemory) -> Result<(), CloneError> {
        let request = self.request;
        let mut regs = Regs {
            // What the kernel puts there before a call.
            rax: -i64::from(libc::ENOSYS) as u64,
            ..self.original
        };
        if request.clears_handlers() {
            let args = request.args_here(regs.rsp);
            let bytes: Vec<u8> = args.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let place = regs.rsp.wrapping_sub(RED_ZONE + bytes.len() as u64) & !15;
            let mut old = vec![0; bytes.len()];
            memory
                .read(place, &mut old)
                .and_then(|()| memory.write(place, &bytes))
                .map_err(|_| CloneError::NoRoom(place))?;
            self.covered = Some((place, old));
            regs.orig_rax = libc::SYS_clone3 as u64;
            regs.rdi = place;
            regs.rsi = bytes.len() as u64;
        } else {
            regs.orig_rax = libc::SYS_clone as u64;
            regs.rdi = request.flags_here();
            regs.rsi = request.stack;
            regs.rdx = request.parent_tid;
            regs.r10 = request.child_tid;
            regs.r8 = request.tls;
        }
        self.born = false;
        if self.mask.is_none() {
            self.mask = Some(stopped.sigmask()?);
            stopped.set_sigmask(u64::MAX)?;
        }
        stopped.set_regs(&regs)?;
        stopped.syscall(0)?;
        Ok(())
    }

    /// Goes on after a stop of the thread that clones. It must not be resumed by others before [`CloneStep::Again`] or
    /// [`CloneStep::Returned`].
    ///
    /// # Errors
    /// The thread is gone.
    pub fn parent_stop(
        &mut self,
        mut stopped: Stopped,
        memory: &dyn GuestMemory,
    ) -> Result<CloneStep, CloneError> {
        match stopped.stop() {
            Stop::Fork(child) | Stop::Vfork(child) | Stop::Clone(child) => {
                // The kernel has read the structure, and neither has run: a child on the same stack must not find its bytes
                // changed later.
                self.uncover(memory);
                self.born = true;
                stopped.syscall(0)?;
                Ok(CloneStep::Born(child))
            }
            Stop::Syscall => {
                if !self.born {
                    self.uncover(memory);
                    self.covered = None;
                }
                let now = stopped.regs()?;
                let ret = now.rax as i64;
                if ret == RESTARTNOINTR {
                    let again = Regs {
                        rax: now.rax,
                        ..self.original
                    };
                    stopped.set_regs(&again)?;
                    return Ok(CloneStep::Again(stopped));
                }
                stopped.set_regs(&Regs {
                    rax: now.rax,
                    orig_rax: u64::MAX,
                    ..self.original
                })?;
                if let Some(mask) = self.mask {
                    stopped.set_sigmask(mask)?;
                }
                Ok(CloneStep::Returned(stopped, ret))
            }
            // Interrupts and group-stops; who wants the thread stopped asks again afterwards.
            _ => {
                stopped.syscall(0)?;
                Ok(CloneStep::Running)
            }
        }
    }

    /// Puts the covered bytes back. They are kept: a child with a copy of this memory needs them too.
    fn uncover(&self, memory: &dyn GuestMemory) {
        if let Some((place, old)) = &self.covered
            && memory.write(*place, old).is_err()
        {
            tracing::debug!(place, "the stack's old bytes are lost");
        }
    }

    /// Gives the child, at its first stop and before [`CloneRewrite::parent_stop`] says that the call returned or after it, its own
    /// registers and memory. It is not resumed.
    ///
    /// # Errors
    /// [`CloneError::WrongId`], checked against /proc; the child is gone.
    pub fn child_stop(&self, child: &mut Stopped, wanted: i32) -> Result<(), CloneError> {
        let outer = child.tid();
        let now = child.regs()?;
        let got = inner_id(outer).unwrap_or(0);
        if got != wanted {
            return Err(CloneError::WrongId { outer, got, wanted });
        }
        if let Some((place, old)) = self.covered.as_ref().filter(|_| !self.request.shares_memory())
            && ProcessMemory::new(outer).write(*place, old).is_err()
        {
            tracing::debug!(place, "the stack's old bytes are lost in the child");
        }
        child.set_regs(&Regs {
            rax: 0,
            orig_rax: u64::MAX,
            rsp: now.rsp,
            fs_base: now.fs_base,
            gs_base: now.gs_base,
            ..self.original
        })?;
        if let Some(mask) = self.mask {
            child.set_sigmask(mask)?;
        }
        Ok(())
    }

    /// After [`CloneStep::Returned`] with a wrong child: puts the thread before its call again. It is to be resumed, and will make
    /// the seccomp stop again, before anything of the guest runs.
    ///
    /// # Errors
    /// The thread is gone.
    pub fn repeat(&mut self, stopped: &mut Stopped) -> Result<(), CloneError> {
        self.covered = None;
        stopped.set_sigmask(u64::MAX)?;
        stopped.set_regs(&Regs {
            rax: self.original.orig_rax,
            orig_rax: u64::MAX,
            rip: self.original.rip.wrapping_sub(SYSCALL_LEN),
            ..self.original
        })?;
        Ok(())
    }

    /// Lets a child with a wrong id end; `key` lets its exit pass the filter ([`crate::filter::Pass::key`]). A thread clears its id
    /// and wakes who waits for that, which nobody does yet.
    ///
    /// # Errors
    /// The child is gone.
    pub fn dismiss(&self, mut child: Stopped, key: u64) -> Result<(), CloneError> {
        child.set_regs(&Regs {
            rax: if self.request.is_thread() {
                libc::SYS_exit
            } else {
                libc::SYS_exit_group
            } as u64,
            orig_rax: u64::MAX,
            rip: self.original.rip.wrapping_sub(SYSCALL_LEN),
            rdi: 0,
            r9: key,
            ..self.original
        })?;
        child.cont(0)?;
        Ok(())
    }
}

/// The id of a thread in its innermost pid namespace (proc_pid_status(5), NSpid).
pub fn inner_id(outer: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{outer}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().last()?.parse().ok()
}

#[cfg(test)]
mod tests;
