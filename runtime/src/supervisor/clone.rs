//! Children and threads of guests, with the ids that home gave them.
//!
//! The filter stops clone, clone3, fork and vfork with SECCOMP_RET_TRACE. Home creates the real child first; then the
//! guest's call is rewritten into a legacy clone whose child gets the same id (ns_last_pid), has the supervisor as its
//! parent (so that nothing of a wait is left here), and sees its own argument registers again.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Context;
use linklayer::image::Regs;
use linklayer::memory::GuestMemory;
use linklayer::stay::StayReason;
use linklayer::wire::{self, Kind};
use shim::ptrace::{Stop, Stopped};

use super::guest::{Guest, SignalStatus, Thread};
use super::shared::Command;
use super::tracer::{RESTARTNOINTR, Traced, Tracer};

/// Size of clone3's first argument structure (CLONE_ARGS_SIZE_VER0) and of the newest known one, bytes.
const CLONE_ARGS_MIN: u64 = 64;
const CLONE_ARGS_MAX: u64 = 88;

/// What a call of the clone family asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    flags: u64,
    exit_signal: i32,
    /// Stack pointer of the child, 0: the parent's.
    stack: u64,
    parent_tid: u64,
    child_tid: u64,
    pidfd: u64,
    tls: u64,
}

/// A clone in progress.
pub(super) struct Cloning {
    original: Regs,
    request: Request,
    /// Stopped before the call, while home is asked.
    waiting: Option<Stopped>,
    reply: Option<wire::CloneReply>,
    /// The child as this node sees it.
    child: Option<i32>,
    /// The parent's token after its call, while the child is not set up yet.
    returned: Option<Stopped>,
    child_ready: bool,
}

enum Parsed {
    Request(Request),
    Errno(i32),
    GoHome(&'static str),
}

fn parse(regs: &Regs, memory: &dyn GuestMemory) -> Parsed {
    let signal = libc::SIGCHLD;
    let request = match regs.orig_rax as i64 {
        libc::SYS_fork => Request {
            exit_signal: signal,
            ..Request::default()
        },
        libc::SYS_vfork => Request {
            flags: (libc::CLONE_VM | libc::CLONE_VFORK) as u64,
            exit_signal: signal,
            ..Request::default()
        },
        libc::SYS_clone => {
            let pidfd = if regs.rdi & libc::CLONE_PIDFD as u64 != 0 {
                regs.rdx
            } else {
                0
            };
            Request {
                flags: regs.rdi & 0xffff_ff00,
                exit_signal: (regs.rdi & 0xff) as i32,
                stack: regs.rsi,
                // With CLONE_PIDFD legacy clone has one place for both.
                parent_tid: if pidfd == 0 { regs.rdx } else { 0 },
                child_tid: regs.r10,
                pidfd,
                tls: regs.r8,
            }
        }
        _ => {
            let (address, size) = (regs.rdi, regs.rsi);
            if size < CLONE_ARGS_MIN {
                return Parsed::Errno(libc::EINVAL);
            }
            if size > 4096 {
                return Parsed::Errno(libc::E2BIG);
            }
            let mut bytes = vec![0; size.max(CLONE_ARGS_MAX) as usize];
            if memory.read(address, &mut bytes[..size as usize]).is_err() {
                return Parsed::Errno(libc::EFAULT);
            }
            if bytes[CLONE_ARGS_MAX as usize..].iter().any(|b| *b != 0) {
                return Parsed::Errno(libc::E2BIG);
            }
            let word = |i: usize| {
                let mut w = [0; 8];
                w.copy_from_slice(&bytes[i * 8..i * 8 + 8]);
                u64::from_ne_bytes(w)
            };
            if word(8) != 0 || word(9) != 0 || word(10) != 0 {
                return Parsed::GoHome("clone3 with set_tid or a cgroup");
            }
            let (stack, size) = (word(5), word(6));
            if (stack == 0) != (size == 0) || word(4) > 64 {
                return Parsed::Errno(libc::EINVAL);
            }
            Request {
                flags: word(0),
                exit_signal: word(4) as i32,
                stack: stack.wrapping_add(size),
                parent_tid: word(3),
                child_tid: word(2),
                pidfd: word(1),
                tls: word(7),
            }
        }
    };
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    if request.flags & namespaces as u64 != 0 {
        return Parsed::GoHome("a child in new namespaces");
    }
    if request.flags >> 32 != 0 {
        return Parsed::GoHome("clone3 with flags that clone has not");
    }
    if request.flags & (libc::CLONE_UNTRACED | libc::CLONE_PTRACE) as u64 != 0 {
        return Parsed::GoHome("a child with tracing flags");
    }
    Parsed::Request(request)
}

impl Tracer {
    /// A thread is about to clone.
    pub(super) fn clone_begins(&mut self, outer: i32, mut stopped: Stopped) -> anyhow::Result<()> {
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let regs = stopped.regs()?;
        if let Some(cloning) = traced.cloning.as_mut() {
            // A signal came between; home has its child already.
            cloning.waiting = Some(stopped);
            return self.clone_here(outer);
        }
        let thread = traced.thread.clone();
        match parse(&regs, &thread.guest.memory) {
            Parsed::Errno(errno) => {
                let regs = Regs {
                    orig_rax: u64::MAX,
                    rax: -i64::from(errno) as u64,
                    ..regs
                };
                stopped.set_regs(&regs)?;
                stopped.cont(0)?;
            }
            Parsed::GoHome(note) => {
                // Skip the call and stand before it again.
                let again = Regs {
                    orig_rax: u64::MAX,
                    rax: regs.orig_rax,
                    rip: regs.rip - 2,
                    ..regs
                };
                stopped.set_regs(&again)?;
                stopped.cont(0)?;
                let reason = StayReason::Call {
                    nr: regs.orig_rax as u32,
                    note: note.into(),
                };
                self.shared.post(Command::GoHome(thread.guest.pid, reason));
            }
            Parsed::Request(request) => {
                let mask = SignalStatus::read(outer).unwrap_or_default().blocked;
                let body = wire::Clone {
                    flags: request.flags,
                    exit_signal: request.exit_signal,
                    sigmask: mask,
                };
                traced.cloning = Some(Cloning {
                    original: regs,
                    request,
                    waiting: Some(stopped),
                    reply: None,
                    child: None,
                    returned: None,
                    child_ready: false,
                });
                let shared = self.shared.clone();
                let tid = thread.tid;
                std::thread::Builder::new()
                    .name("clone".into())
                    .stack_size(128 << 10)
                    .spawn(move || {
                        let failed = wire::CloneReply {
                            tid: -i64::from(libc::EAGAIN),
                            pidfd: -1,
                        };
                        let reply = shared
                            .ask(tid, tid, Kind::Clone, &wire::encode(&body))
                            .ok()
                            .and_then(|b| wire::decode(&b).ok())
                            .unwrap_or(failed);
                        shared.post(Command::Cloned { outer, reply });
                    })?;
            }
        }
        Ok(())
    }

    /// Home answered.
    pub(super) fn cloned(&mut self, outer: i32, reply: wire::CloneReply) -> anyhow::Result<()> {
        let Some(traced) = self.threads.get_mut(&outer) else {
            return Ok(());
        };
        let Some(cloning) = traced.cloning.as_mut() else {
            return Ok(());
        };
        if reply.tid < 0 {
            let regs = Regs {
                orig_rax: u64::MAX,
                rax: reply.tid as u64,
                ..cloning.original
            };
            if let Some(mut stopped) = cloning.waiting.take() {
                stopped.set_regs(&regs)?;
                stopped.cont(0)?;
            }
            traced.cloning = None;
            return Ok(());
        }
        if reply.pidfd >= 0 {
            let address = cloning.request.pidfd;
            if traced
                .thread
                .guest
                .memory
                .write(address, &reply.pidfd.to_ne_bytes())
                .is_err()
            {
                tracing::debug!("pidfd's place is not writable");
            }
        }
        cloning.reply = Some(reply);
        self.clone_here(outer)
    }

    /// Makes the guest's own child.
    fn clone_here(&mut self, outer: i32) -> anyhow::Result<()> {
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let cloning = traced.cloning.as_mut().context("clone")?;
        let (Some(reply), true) = (cloning.reply, cloning.waiting.is_some()) else {
            return Ok(());
        };
        if self.cloning_now.is_some_and(|now| now != outer) {
            self.clone_queue.push_back(outer);
            return Ok(());
        }
        self.cloning_now = Some(outer);
        self.cage
            .as_ref()
            .context("cage")?
            .set_last_pid(reply.tid as i32 - 1)?;
        let mut flags = cloning.request.flags & !((libc::CLONE_VFORK | libc::CLONE_PIDFD) as u64);
        if flags & libc::CLONE_THREAD as u64 == 0 {
            flags |= libc::CLONE_PARENT as u64;
        }
        let r = &cloning.request;
        let regs = Regs {
            rax: -i64::from(libc::ENOSYS) as u64,
            orig_rax: libc::SYS_clone as u64,
            rdi: flags,
            rsi: r.stack,
            rdx: r.parent_tid,
            r10: r.child_tid,
            r8: r.tls,
            ..cloning.original
        };
        if let Some(mut stopped) = cloning.waiting.take() {
            stopped.set_regs(&regs)?;
            stopped.syscall(0)?;
        }
        Ok(())
    }

    /// A thread is not in the kernel's clone any more: the next one may be.
    pub(super) fn clone_left(&mut self, outer: i32) {
        if self.cloning_now == Some(outer) {
            self.cloning_now = None;
            while let Some(next) = self.clone_queue.pop_front() {
                if let Err(e) = self.clone_here(next) {
                    tracing::debug!(error = format!("{e:#}"), "queued clone");
                }
                if self.cloning_now.is_some() {
                    break;
                }
            }
        }
    }

    /// A stop of a thread that is in the middle of a clone.
    pub(super) fn clone_proceeds(&mut self, outer: i32, mut stopped: Stopped) -> anyhow::Result<()> {
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let Some(cloning) = traced.cloning.as_mut() else {
            stopped.cont(0)?;
            return Ok(());
        };
        match stopped.stop() {
            Stop::Fork(child) | Stop::Vfork(child) | Stop::Clone(child) => {
                cloning.child = Some(child);
                stopped.syscall(0)?;
                self.clone_child(outer)
            }
            Stop::Syscall => {
                self.clone_left(outer);
                let traced = self.threads.get_mut(&outer).context("thread that clones")?;
                let cloning = traced.cloning.as_mut().context("clone")?;
                let now = stopped.regs()?;
                let original = cloning.original;
                let ret = now.rax as i64;
                if ret == RESTARTNOINTR {
                    // Nothing was created: a signal is taken first, then the call comes again.
                    let again = Regs {
                        rax: now.rax,
                        ..original
                    };
                    stopped.set_regs(&again)?;
                    stopped.cont(0)?;
                    return Ok(());
                }
                let back = Regs {
                    rax: now.rax,
                    orig_rax: u64::MAX,
                    rip: now.rip,
                    rsp: now.rsp,
                    ..original
                };
                stopped.set_regs(&back)?;
                if ret < 0 {
                    let born = cloning.reply.map_or(0, |r| r.tid as i32);
                    tracing::error!(ret, "this node could not make the child that home has");
                    traced.cloning = None;
                    stopped.cont(0)?;
                    let died = wire::Died {
                        pid: born,
                        signal: libc::SIGKILL,
                    };
                    self.shared.tell(born, Kind::Died, &wire::encode(&died));
                    return Ok(());
                }
                cloning.returned = Some(stopped);
                self.clone_child(outer)
            }
            _ => {
                // An interrupt before the call; it is asked for again afterwards.
                stopped.syscall(0)?;
                Ok(())
            }
        }
    }

    /// Sets up the child when it has stopped for the first time, and lets both go when the parent's call is over too.
    fn clone_child(&mut self, outer: i32) -> anyhow::Result<()> {
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let parent = traced.thread.clone();
        let Some(cloning) = traced.cloning.as_mut() else {
            return Ok(());
        };
        let Some(child) = cloning.child else { return Ok(()) };
        if !cloning.child_ready {
            let Some(mut stray) = self.strays.remove(&child) else {
                return Ok(());
            };
            let home = cloning.reply.map_or(0, |r| r.tid as i32);
            anyhow::ensure!(
                ns_pid(child) == Some(home),
                "child {child} did not get the id {home}"
            );
            let now = stray.regs()?;
            let original = cloning.original;
            let back = Regs {
                rax: 0,
                orig_rax: u64::MAX,
                rip: now.rip,
                rsp: now.rsp,
                fs_base: now.fs_base,
                gs_base: now.gs_base,
                ..original
            };
            stray.set_regs(&back)?;
            let flags = cloning.request.flags;
            let has = |flag: i32| flags & flag as u64 != 0;
            let guest = if has(libc::CLONE_THREAD) {
                parent.guest.clone()
            } else {
                let actions = parent.guest.actions.lock().clone();
                let guest = Arc::new(Guest::new(
                    home,
                    child,
                    parent.guest.listener.clone(),
                    parent.guest.pass_key,
                    actions,
                )?);
                if has(libc::CLONE_VM) {
                    *guest.shares_with.lock() = Some(parent.guest.pid);
                }
                self.shared.guests.write().insert(home, guest.clone());
                guest
            };
            let thread = Arc::new(Thread::new(home, child, guest));
            self.shared.threads.write().insert(child, thread.clone());
            self.threads.insert(child, Traced::new(thread));
            stray.cont(0)?;
            if let Some(c) = self.threads.get_mut(&outer).and_then(|t| t.cloning.as_mut()) {
                c.child_ready = true;
            }
        }
        let traced = self.threads.get_mut(&outer).context("thread that clones")?;
        let Some(cloning) = traced.cloning.as_mut() else {
            return Ok(());
        };
        let Some(stopped) = cloning.returned.take() else {
            return Ok(());
        };
        let vfork = cloning.request.flags & libc::CLONE_VFORK as u64 != 0;
        let home = cloning.reply.map_or(0, |r| r.tid as i32);
        traced.cloning = None;
        if vfork && self.shared.guests.read().contains_key(&home) {
            traced.vfork = Some((home, stopped));
            return Ok(());
        }
        self.resume_or_hold(outer, stopped)
    }

    /// A stopped child whose parent may have told of it.
    pub(super) fn stray_appears(&mut self, child: i32) -> anyhow::Result<()> {
        let parent = self
            .threads
            .iter()
            .find(|(_, t)| t.cloning.as_ref().is_some_and(|c| c.child == Some(child)));
        match parent.map(|(outer, _)| *outer) {
            Some(outer) => self.clone_child(outer),
            None => Ok(()),
        }
    }

    /// The child of a vfork has executed something or ended: its parent goes on.
    pub(super) fn vfork_ended(&mut self, child: i32) {
        let waiting = self
            .threads
            .iter_mut()
            .find(|(_, t)| t.vfork.as_ref().is_some_and(|(c, _)| *c == child))
            .and_then(|(outer, t)| Some((*outer, t.vfork.take()?.1)));
        if let Some((outer, stopped)) = waiting
            && let Err(e) = self.resume_or_hold(outer, stopped)
        {
            tracing::debug!(error = format!("{e:#}"), "vfork parent");
        }
    }

    /// Lets a thread go on; one whose guest is being stopped stops again at once, outside of any call.
    fn resume_or_hold(&mut self, outer: i32, stopped: Stopped) -> anyhow::Result<()> {
        let held = self.threads.get(&outer).is_some_and(|t| {
            self.holds.contains_key(&t.thread.guest.pid) || t.thread.guest.freezing.load(Ordering::Acquire)
        });
        if held {
            shim::ptrace::interrupt(outer)?;
        }
        stopped.cont(0)?;
        Ok(())
    }
}

/// The id of a thread in its innermost pid namespace.
fn ns_pid(outer: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{outer}/status")).ok()?;
    status
        .lines()
        .find_map(|l| l.strip_prefix("NSpid:"))?
        .split_whitespace()
        .last()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use linklayer::memory::LocalMemory;

    fn regs(nr: i64) -> Regs {
        Regs {
            orig_rax: nr as u64,
            ..Regs::default()
        }
    }

    #[test]
    fn all_forms_of_clone_say_the_same() {
        let memory = LocalMemory::new();
        let Parsed::Request(fork) = parse(&regs(libc::SYS_fork), &memory) else {
            panic!("fork")
        };
        let mut r = regs(libc::SYS_clone);
        r.rdi = libc::SIGCHLD as u64;
        let Parsed::Request(clone) = parse(&r, &memory) else {
            panic!("clone")
        };
        assert_eq!(fork, clone);
        r.rdi |= libc::CLONE_NEWPID as u64;
        assert!(matches!(parse(&r, &memory), Parsed::GoHome(_)));
    }

    #[test]
    fn clone3_with_a_bad_structure_fails_as_the_kernel_does() {
        let memory = LocalMemory::new();
        let mut r = regs(libc::SYS_clone3);
        r.rsi = 8;
        assert!(matches!(parse(&r, &memory), Parsed::Errno(libc::EINVAL)));
        r.rsi = 88;
        r.rdi = 16;
        assert!(matches!(parse(&r, &memory), Parsed::Errno(libc::EFAULT)));
    }
}
