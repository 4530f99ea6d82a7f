//! Calls that need both sides, or special care.

use std::sync::atomic::Ordering;

use linklayer::image::SigInfo;
use linklayer::memory::GuestMemory;
use linklayer::stay::StayReason;
use linklayer::syscall::{self, GatherError, HomeReason, Row, SplitKind};
use linklayer::wire::{self, Kind};

use super::calls::{Call, Outcome};
use super::guest::Wait;
use super::shared::Command;

/// Handles the call; the error is an outcome too.
pub(super) fn split(call: &Call, row: &'static Row, kind: SplitKind) -> Result<Outcome, Outcome> {
    match kind {
        SplitKind::Mmap => mmap(call),
        SplitKind::Msync => Ok(super::held::msync(call)),
        SplitKind::Mremap => Ok(Outcome::Continue),
        // The filter hands these to the tracer; a notification of one means that the filter is not ours.
        SplitKind::Clone => Ok(Outcome::GoHome("clone that the tracer did not see".into())),
        SplitKind::SignalWait => Ok(Outcome::GoHome("wait that the tracer did not see".into())),
        SplitKind::Exec => exec(call),
        SplitKind::ExitThread => exit(call, Kind::ExitThread),
        SplitKind::ExitGroup => exit(call, Kind::ExitGroup),
        SplitKind::SignalSend => signal_send(call, row),
        SplitKind::SigAction => sigaction(call),
        SplitKind::Sleep => {
            *call.thread.sleep.lock() = Some(Wait::begin(call.nr, &call.args, memory(call)));
            Ok(Outcome::Continue)
        }
        SplitKind::Restart => restart(call, row),
        SplitKind::Open => super::proc_files::open(call, row),
        SplitKind::Readlink => Ok(call.forward(row)),
        SplitKind::Prctl => prctl(call, row),
        SplitKind::Rlimit => rlimit(call, row),
        SplitKind::Times => times(call, row),
        SplitKind::CpuTimer => Ok(Outcome::Continue),
        SplitKind::TempMask => temp_mask(call, row),
        SplitKind::Affinity => affinity(call, row),
    }
}

/// A wait that was interrupted goes on where it began: with the vessel's thread at home, or with this kernel.
fn restart(call: &Call, row: &'static Row) -> Result<Outcome, Outcome> {
    let at_home = &call.thread.sleeps_at_home;
    if !at_home.load(Ordering::Acquire) {
        return Ok(Outcome::Continue);
    }
    let outcome = call.forward(row);
    if let Outcome::Value(ret) = outcome
        && !super::tracer::is_restart(ret)
    {
        at_home.store(false, Ordering::Release);
    }
    Ok(outcome)
}

fn memory<'a>(call: &'a Call) -> &'a dyn GuestMemory {
    &call.thread.guest.memory
}

fn fault() -> Outcome {
    Outcome::Value(-i64::from(libc::EFAULT))
}

fn mmap(call: &Call) -> Result<Outcome, Outcome> {
    let [_, len, prot, flags, fd, offset] = call.args;
    let flags = flags as i32;
    if flags & libc::MAP_HUGETLB != 0 {
        return Ok(Outcome::GoHome("huge pages are those of home".into()));
    }
    if flags & libc::MAP_ANONYMOUS != 0 {
        // Shared with children, all of which are here; they move together.
        return Ok(Outcome::Continue);
    }
    let request = wire::MapFile {
        len,
        prot: prot as i32,
        flags,
        fd: fd as i32,
        offset,
    };
    loop {
        return match call.ask::<wire::MapFileReply>(Kind::MapFile, &wire::encode(&request))? {
            wire::MapFileReply::Errno(errno) => Ok(Outcome::Value(-i64::from(errno))),
            wire::MapFileReply::GoHome(reason) => Ok(Outcome::Stay(reason)),
            wire::MapFileReply::File(file) => call.map_file(&file, fd as i32),
            wire::MapFileReply::Held(file) => match super::held::map(call, &file, fd as i32)? {
                Some(outcome) => Ok(outcome),
                None => {
                    // Until it is there.
                    std::thread::sleep(std::time::Duration::from_millis(5));
                    continue;
                }
            },
        };
    }
}

fn exec(call: &Call) -> Result<Outcome, Outcome> {
    let gathered = match syscall::gather(call.nr, &call.args, memory(call)) {
        Ok(g) => g,
        Err(GatherError::GoHome(reason)) => return Ok(Outcome::GoHome(reason.text().into())),
        Err(GatherError::TooBig(_)) => return Ok(Outcome::GoHome(HomeReason::TooBig.text().into())),
    };
    super::held::before_end(call);
    let guest = &call.thread.guest;
    let relayed = guest.relayed.lock().begin_exec();
    let status = super::guest::SignalStatus::read(call.thread.outer).unwrap_or_default();
    let mut pending = Vec::new();
    if status.pending_thread | status.pending_process != 0 {
        let (answer, asked) = crossbeam_channel::bounded(1);
        call.shared.post(Command::Pending(call.thread.outer, answer));
        pending = asked.recv().unwrap_or_default();
    }
    let mut request = Vec::with_capacity(gathered.request.encoded_len());
    gathered.request.encode(&mut request);
    let body = wire::Exec {
        call: request,
        sigmask: status.blocked,
        pending,
        relayed,
    };
    // From here on the guest may be removed at any moment, and that is no death.
    guest.leaving.store(true, Ordering::Release);
    let wire::Errno(errno) = call.ask(Kind::Exec, &wire::encode(&body))?;
    if errno == 0 {
        return Ok(Outcome::Handled);
    }
    guest.leaving.store(false, Ordering::Release);
    for signal in guest.relayed.lock().end_exec() {
        let counted = call.shared.arrived(signal.pid);
        call.shared.post(Command::Signal(signal, counted));
    }
    Ok(Outcome::Value(-i64::from(errno)))
}

fn exit(call: &Call, kind: Kind) -> Result<Outcome, Outcome> {
    let group = kind == Kind::ExitGroup;
    super::held::before_end(call);
    if group {
        call.thread.guest.leaving.store(true, Ordering::Release);
    }
    let body = wire::encode(&wire::ExitCode(call.args[0] as i32));
    let wire::Errno(last) = call.ask(kind, &body)?;
    if group || last != 0 {
        // The process ended at home; the guest is removed.
        return Ok(Outcome::Handled);
    }
    call.shared.thread_ends(call.thread);
    // The guest's own kernel clears and wakes clear_child_tid and the robust futexes.
    Ok(Outcome::Continue)
}

fn signal_send(call: &Call, row: &'static Row) -> Result<Outcome, Outcome> {
    let guest = &call.thread.guest;
    let a = call.args;
    let own = |pid: u64| pid as i32 == guest.pid;
    let (mine, tid, sig, info) = match i64::from(call.nr) {
        libc::SYS_kill => (own(a[0]), 0, a[1] as i32, None),
        libc::SYS_tkill => (
            call.shared.owner_of(a[0] as i32) == Some(guest.pid),
            a[0] as i32,
            a[1] as i32,
            None,
        ),
        libc::SYS_tgkill => (own(a[0]), a[1] as i32, a[2] as i32, None),
        libc::SYS_rt_sigqueueinfo => (own(a[0]), 0, a[1] as i32, Some(a[2])),
        libc::SYS_rt_tgsigqueueinfo => (own(a[0]), a[1] as i32, a[2] as i32, Some(a[3])),
        _ => (false, 0, 0, None),
    };
    let stops = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
    let at_home = !(1..=64).contains(&sig)
        || [libc::SIGKILL, libc::SIGSTOP].contains(&sig)
        || (sig == libc::SIGCONT && guest.action(sig).handler <= 1)
        || (stops.contains(&sig) && guest.action(sig).handler == 0)
        || (tid != 0 && call.shared.owner_of(tid) != Some(guest.pid));
    if mine && tid != 0 && stops.contains(&sig) && at_home && call.shared.owner_of(tid) == Some(guest.pid) {
        // It stops the whole process, and a worker at home blocks what is sent to it alone.
        let to_all = Call {
            nr: libc::SYS_kill as u32,
            args: [guest.pid as u64, sig as u64, 0, 0, 0, 0],
            ..*call
        };
        return Ok(to_all.forward(row));
    }
    if !mine || at_home {
        return Ok(call.forward(row));
    }
    if tid == call.thread.tid || (tid == 0 && call.shared.threads_of(guest.pid) == 1) {
        // To itself: its own kernel delivers it before the call returns.
        return Ok(Outcome::Continue);
    }
    let info = match info {
        Some(at) => {
            let mut bytes = [0; 128];
            memory(call).read(at, &mut bytes).map_err(|_| fault())?;
            let info = SigInfo(bytes);
            if info.code() >= 0 || info.code() == libc::SI_TKILL {
                // Allowed to itself only as a whole thread group of one; the kernel at home decides.
                return Ok(call.forward(row));
            }
            bytes[..4].copy_from_slice(&sig.to_ne_bytes());
            SigInfo(bytes)
        }
        None => {
            let code = if tid == 0 { libc::SI_USER } else { libc::SI_TKILL };
            SigInfo::user(sig, code, guest.pid, call.shared.home_uid())
        }
    };
    let body = wire::Signal {
        pid: guest.pid,
        tid,
        signal: sig,
        info: info.0.to_vec(),
        counted: false,
    };
    call.shared.post(Command::Signal(body, None));
    // After the signal: it is pending when the call returns.
    call.shared.post(Command::Reply {
        outer: call.thread.outer,
        notification: call.notification,
        ret: 0,
        mask: None,
    });
    Ok(Outcome::Handled)
}

fn sigaction(call: &Call) -> Result<Outcome, Outcome> {
    let [signal, new, _, size, ..] = call.args;
    let settable = (1..=64).contains(&signal) && ![9, 19].contains(&signal) && size == 8;
    if new == 0 || !settable {
        return Ok(Outcome::Continue);
    }
    let mut bytes = [0; 32];
    if memory(call).read(new, &mut bytes).is_err() {
        return Ok(Outcome::Continue);
    }
    let word = |i: usize| {
        let mut w = [0; 8];
        w.copy_from_slice(&bytes[i * 8..i * 8 + 8]);
        u64::from_ne_bytes(w)
    };
    let action = linklayer::image::SigAction {
        handler: word(0),
        flags: word(1),
        restorer: word(2),
        mask: word(3),
    };
    if let Some(slot) = call.thread.guest.actions.lock().get_mut(signal as usize - 1) {
        if *slot == action {
            return Ok(Outcome::Continue);
        }
        *slot = action;
    }
    let body = wire::Action {
        pid: call.thread.guest.pid,
        signal: signal as i32,
        action: [action.handler, action.flags, action.restorer, action.mask],
    };
    call.shared
        .tell(call.thread.tid, Kind::Action, &wire::encode(&body));
    Ok(Outcome::Continue)
}

fn prctl(call: &Call, row: &'static Row) -> Result<Outcome, Outcome> {
    match call.forward(row) {
        Outcome::Value(ret) if ret >= 0 => Ok(Outcome::Continue),
        other => Ok(other),
    }
}

fn rlimit(call: &Call, row: &'static Row) -> Result<Outcome, Outcome> {
    let (pid, resource, new) = match i64::from(call.nr) {
        libc::SYS_prlimit64 => (call.args[0] as i32, call.args[1] as u32, call.args[2]),
        libc::SYS_setrlimit => (0, call.args[0] as u32, call.args[1]),
        _ => (0, 0, 0),
    };
    let outcome = call.forward(row);
    let enforced_here = [
        libc::RLIMIT_STACK,
        libc::RLIMIT_AS,
        libc::RLIMIT_DATA,
        libc::RLIMIT_CPU,
        libc::RLIMIT_SIGPENDING,
    ]
    .contains(&resource);
    let own = pid == 0 || pid == call.thread.guest.pid;
    if let Outcome::Value(0) = outcome {
        let mut bytes = [0; 16];
        if own && enforced_here && new != 0 && memory(call).read(new, &mut bytes).is_ok() {
            let (soft, hard) = bytes.split_at(8);
            let value = |b: &[u8]| b.try_into().map_or(u64::MAX, u64::from_ne_bytes);
            if let Err(e) =
                shim::process::set_limit(call.thread.guest.outer, resource, value(soft), value(hard))
            {
                // A limit above this node's hard one: what it allows beyond that cannot be used here.
                tracing::warn!(error = %e, resource, "limit not set here");
                return Ok(Outcome::Stay(StayReason::Limits));
            }
        }
    }
    Ok(outcome)
}

fn times(call: &Call, row: &'static Row) -> Result<Outcome, Outcome> {
    let children = call.nr == libc::SYS_getrusage as u32 && call.args[0] as i32 == libc::RUSAGE_CHILDREN;
    if children {
        Ok(call.forward(row))
    } else {
        Ok(Outcome::Continue)
    }
}

fn affinity(call: &Call, row: &'static Row) -> Result<Outcome, Outcome> {
    let tid = call.args[0] as i32;
    let here = tid == 0 || call.shared.owner_of(tid).is_some();
    if here {
        Ok(Outcome::Continue)
    } else {
        Ok(call.forward(row))
    }
}

fn temp_mask(call: &Call, row: &'static Row) -> Result<Outcome, Outcome> {
    let gathered = match syscall::gather(call.nr, &call.args, memory(call)) {
        Ok(g) => g,
        Err(_) => return Ok(call.forward(row)),
    };
    let Some(mask) = gathered.temp_mask else {
        return call.execute(&gathered, None).map(Outcome::Value);
    };
    // Where the mask is: for pselect6 behind a pointer to it and its size.
    let address = match i64::from(call.nr) {
        libc::SYS_ppoll => call.args[3],
        libc::SYS_pselect6 => memory(call).read_u64(call.args[5]).map_err(|_| fault())?,
        _ => call.args[4],
    };
    let ret = call.execute(&gathered, Some(mask))?;
    Ok(Outcome::Masked(ret, mask, address))
}
