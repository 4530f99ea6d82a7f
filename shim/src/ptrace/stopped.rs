//! A stopped tracee and what can be done with it.

use linklayer::image::{MAX_XSTATE, Regs, Rseq, SigInfo};
use nix::errno::Errno;

use super::{Options, PtraceError, Result, RseqConfiguration, Stop, interrupt, raw, request, wait_stop};

const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;

/// Which queue of pending signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PendingQueue {
    /// directed at the thread
    Thread,
    /// directed at the process
    Process,
}

/// The right to look at and to resume a stopped tracee. See the module's text.
#[derive(Debug)]
#[must_use = "a dropped token leaves the thread stopped"]
pub struct Stopped {
    tid: i32,
    stop: Stop,
}

/// How many pending signals are looked at in one go.
const PEEK_BATCH: usize = 16;

impl Stopped {
    /// A token for a thread that the caller knows to be stopped for this reason (for example after its token was dropped).
    /// With a wrong claim the requests fail with [`PtraceError::Gone`].
    pub fn assume(tid: i32, stop: Stop) -> Self {
        Stopped { tid, stop }
    }

    /// The thread's id, as this process sees it.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// Why it stopped.
    pub fn stop(&self) -> Stop {
        self.stop
    }

    fn fail(&self, op: &'static str) -> impl FnOnce(Errno) -> PtraceError + use<> {
        let tid = self.tid;
        move |errno| PtraceError::new(op, tid, errno)
    }

    fn plain(&self, op: &'static str, req: u32, data: usize) -> Result<()> {
        // SAFETY: used only for requests that take no pointers.
        unsafe { raw(req, self.tid, 0, data) }.map_err(self.fail(op))?;
        Ok(())
    }

    // --- resuming

    /// Resumes the thread (PTRACE_CONT), delivering `sig` when it is in a signal-delivery-stop (0: no signal).
    pub fn cont(self, sig: i32) -> Result<()> {
        self.plain("PTRACE_CONT", libc::PTRACE_CONT, sig as usize)
    }

    /// Resumes it until the next entry to or exit from a system call (PTRACE_SYSCALL).
    pub fn syscall(self, sig: i32) -> Result<()> {
        self.plain("PTRACE_SYSCALL", libc::PTRACE_SYSCALL, sig as usize)
    }

    /// Resumes it for one instruction (PTRACE_SINGLESTEP).
    pub fn step(self, sig: i32) -> Result<()> {
        self.plain("PTRACE_SINGLESTEP", libc::PTRACE_SINGLESTEP, sig as usize)
    }

    /// Keeps a group-stopped thread stopped but lets it notice SIGCONT (PTRACE_LISTEN); it then reports [`Stop::Interrupt`].
    pub fn listen(self) -> Result<()> {
        self.plain("PTRACE_LISTEN", request::LISTEN, 0)
    }

    /// Lets go of it (PTRACE_DETACH), delivering `sig` as in [`Stopped::cont`].
    pub fn detach(self, sig: i32) -> Result<()> {
        self.plain("PTRACE_DETACH", libc::PTRACE_DETACH, sig as usize)
    }

    /// Resumes the thread with one of the requests above and waits for its next stop: the token is then for that stop.
    /// A kill gives [`PtraceError::Gone`].
    pub(crate) fn run_on(&mut self, req: u32, sig: i32) -> Result<Stop> {
        self.plain("ptrace resume", req, sig as usize)?;
        *self = wait_stop(self.tid)?;
        Ok(self.stop)
    }

    /// Lets the thread leave the system call that it is inside of (see [`Stop::inside_call`]) and waits for its syscall-exit
    /// stop, where rax is final. Nothing happens to a thread that is not inside a call.
    ///
    /// Other stops on the way are group-stops and interrupts only (signals are not delivered before the exit); they are passed
    /// over. A kill gives [`PtraceError::Gone`].
    pub fn leave_call(&mut self) -> Result<()> {
        if self.stop.inside_call() {
            while self.run_on(libc::PTRACE_SYSCALL, 0)? != Stop::Syscall {}
        }
        Ok(())
    }

    /// Brings a stopped thread to an EVENT_STOP ([`Stop::Interrupt`] or [`Stop::Group`]) with its registers unchanged, from any
    /// stop outside a call; a signal of a signal-delivery-stop is suppressed.
    pub fn settle(&mut self) -> Result<()> {
        interrupt(self.tid)?;
        while !matches!(
            self.run_on(libc::PTRACE_CONT, 0)?,
            Stop::Interrupt | Stop::Group(_)
        ) {}
        Ok(())
    }

    // --- registers

    fn regset(&self, op: &'static str, req: u32, kind: usize, bytes: *mut u8, len: usize) -> Result<usize> {
        let mut iov = libc::iovec {
            iov_base: bytes.cast(),
            iov_len: len,
        };
        // SAFETY: `iov` names `len` bytes that the callers below own and that are valid to read and write.
        unsafe { raw(req, self.tid, kind, &raw mut iov as usize) }.map_err(self.fail(op))?;
        Ok(iov.iov_len)
    }

    /// General registers (NT_PRSTATUS).
    pub fn regs(&self) -> Result<Regs> {
        let mut regs = Regs::default();
        let len = size_of::<Regs>();
        self.regset(
            "PTRACE_GETREGSET",
            request::GETREGSET,
            NT_PRSTATUS,
            (&raw mut regs).cast(),
            len,
        )?;
        Ok(regs)
    }

    /// Sets the general registers. EIO: a segment or base register has a value that user space cannot have.
    pub fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        let mut regs = *regs;
        let len = size_of::<Regs>();
        self.regset(
            "PTRACE_SETREGSET",
            request::SETREGSET,
            NT_PRSTATUS,
            (&raw mut regs).cast(),
            len,
        )?;
        Ok(())
    }

    /// Extended register state (NT_X86_XSTATE) in this kernel's layout.
    pub fn xstate(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; MAX_XSTATE];
        let len = self.regset(
            "PTRACE_GETREGSET",
            request::GETREGSET,
            NT_X86_XSTATE,
            bytes.as_mut_ptr(),
            MAX_XSTATE,
        )?;
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Sets the extended register state: exactly as many bytes as this kernel has, with no bit that it lacks (else EINVAL or
    /// EFAULT).
    pub fn set_xstate(&mut self, xstate: &[u8]) -> Result<()> {
        let mut copy = xstate.to_vec();
        self.regset(
            "PTRACE_SETREGSET",
            request::SETREGSET,
            NT_X86_XSTATE,
            copy.as_mut_ptr(),
            xstate.len(),
        )?;
        Ok(())
    }

    // --- signals

    /// The blocked signals, bit signo-1.
    pub fn sigmask(&self) -> Result<u64> {
        let mut mask = 0u64;
        // SAFETY: the kernel writes 8 bytes, as announced, to `mask`.
        unsafe { raw(request::GETSIGMASK, self.tid, 8, &raw mut mask as usize) }
            .map_err(self.fail("PTRACE_GETSIGMASK"))?;
        Ok(mask)
    }

    /// Sets the blocked signals (SIGKILL and SIGSTOP are ignored).
    pub fn set_sigmask(&mut self, mask: u64) -> Result<()> {
        // SAFETY: the kernel reads 8 bytes, as announced, from `mask`.
        unsafe { raw(request::SETSIGMASK, self.tid, 8, &raw const mask as usize) }
            .map_err(self.fail("PTRACE_SETSIGMASK"))?;
        Ok(())
    }

    /// The siginfo of the stop (PTRACE_GETSIGINFO); EINVAL in a group-stop that has none.
    pub fn siginfo(&self) -> Result<SigInfo> {
        let mut info = SigInfo::default();
        // SAFETY: the kernel writes a siginfo_t, 128 bytes, to `info`.
        unsafe { raw(libc::PTRACE_GETSIGINFO, self.tid, 0, &raw mut info as usize) }
            .map_err(self.fail("PTRACE_GETSIGINFO"))?;
        Ok(info)
    }

    /// Sets the siginfo that goes with the signal given to [`Stopped::cont`]; its signo must be that signal.
    pub fn set_siginfo(&mut self, info: &SigInfo) -> Result<()> {
        // SAFETY: the kernel reads a siginfo_t, 128 bytes, from `info`.
        unsafe { raw(libc::PTRACE_SETSIGINFO, self.tid, 0, &raw const *info as usize) }
            .map_err(self.fail("PTRACE_SETSIGINFO"))?;
        Ok(())
    }

    /// Copies the pending signals of a queue without taking them (PTRACE_PEEKSIGINFO).
    pub fn pending(&self, queue: PendingQueue) -> Result<Vec<SigInfo>> {
        let mut found: Vec<SigInfo> = Vec::new();
        loop {
            let more = self.pending_from(queue, found.len())?;
            found.extend_from_slice(&more);
            if more.len() < PEEK_BATCH {
                return Ok(found);
            }
        }
    }

    /// The first 16 of these, as the queue has them.
    pub fn first_pending(&self, queue: PendingQueue) -> Result<Vec<SigInfo>> {
        self.pending_from(queue, 0)
    }

    fn pending_from(&self, queue: PendingQueue, offset: usize) -> Result<Vec<SigInfo>> {
        #[repr(C)]
        struct PeekArgs {
            off: u64,
            flags: u32,
            nr: i32,
        }
        let args = PeekArgs {
            off: offset as u64,
            flags: u32::from(queue == PendingQueue::Process),
            nr: PEEK_BATCH as i32,
        };
        let mut batch = [SigInfo::default(); PEEK_BATCH];
        // SAFETY: the kernel reads `args` and writes at most `nr` siginfo_t of 128 bytes to `batch`.
        let got = unsafe {
            raw(
                request::PEEKSIGINFO,
                self.tid,
                &raw const args as usize,
                batch.as_mut_ptr() as usize,
            )
        }
        .map_err(self.fail("PTRACE_PEEKSIGINFO"))?;
        Ok(batch[..got as usize].to_vec())
    }

    // --- other state

    /// Changes the options that the tracee was seized with; PTRACE_O_TRACESYSGOOD is always added.
    pub fn set_options(&mut self, options: Options) -> Result<()> {
        let bits = (options | Options::PTRACE_O_TRACESYSGOOD).bits();
        self.plain("PTRACE_SETOPTIONS", libc::PTRACE_SETOPTIONS, bits as usize)
    }

    /// The thread's rseq(2) registration.
    pub fn rseq(&self) -> Result<Option<Rseq>> {
        let mut found = RseqConfiguration::default();
        let len = size_of::<RseqConfiguration>();
        // SAFETY: the kernel writes `len` bytes, as announced, to `found`.
        unsafe {
            raw(
                request::GET_RSEQ_CONFIGURATION,
                self.tid,
                len,
                &raw mut found as usize,
            )
        }
        .map_err(self.fail("PTRACE_GET_RSEQ_CONFIGURATION"))?;
        Ok(found.registration())
    }
}
