//! Homecoming: a vessel becomes the process again.
//!
//! The vessel still has the layout with which its guest left. What the guest changed is found by comparing the two
//! layouts piece by piece, and made by calls of a worker; then pages are written into it (by whoever receives them),
//! and last each worker takes the state of its guest thread.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use linklayer::image::{Area, AreaFlags, AreaKind, PAGE, ProcessImage, SigInfo, ThreadImage};
use linklayer::pages::Landed;
use nix::errno::Errno;

use super::room::{Carried, put_down};
use super::{ARENA_ADDRESS, ARENA_LEN, KEEPERS, Raised, Slot, Vessel, VesselError};
use crate::capture::{self, MapLine, in_pieces, map_lines, reserved, vdso_site};
use crate::memory::ProcessMemory;
use crate::ptrace::{self, PendingQueue, Stop, Stopped};
use crate::remote_call::RemoteCalls;
use crate::restore::{self, TRAMPOLINE, carry, register, requeue, set_xstate};
use crate::{userfault, xstate};

/// A piece of the address space that has to change.
#[derive(Debug, PartialEq, Eq)]
enum Change<'a> {
    Unmap(Range<u64>),
    Map(Range<u64>, &'a Area),
    Protect(Range<u64>, u8),
    Advise(Range<u64>, i32),
}

/// Makes what has changed in the layout of a vessel. What was put into places that are made anew is read first.
fn make_changes(
    image: &ProcessImage,
    worker: &Slot,
    (file, object, keeper): (Opened<'_>, Opened<'_>, &dyn Fn(u64) -> Option<Range<u64>>),
    landed: &Landed,
    carried: &mut Carried,
) -> Result<(), VesselError> {
    let lines: Vec<MapLine> = map_lines(image.reached_by(), true)?
        .into_iter()
        .filter(|l| !reserved(&l.range) && !special(l))
        .collect();
    let call = |what, nr: i64, args| call(worker, what, nr, args);
    let memory = ProcessMemory::new(image.reached_by());
    for change in changes(&lines, image, file) {
        if let Change::Unmap(range) | Change::Map(range, _) = &change {
            carry(&memory, range, landed, carried)?;
        }
        match change {
            Change::Unmap(r) => {
                call("munmap", libc::SYS_munmap, [r.start, r.end - r.start, 0, 0, 0, 0])?;
            }
            Change::Protect(r, prot) => {
                let args = [r.start, r.end - r.start, u64::from(prot), 0, 0, 0];
                call("mprotect", libc::SYS_mprotect, args)?;
            }
            Change::Map(r, area) => match area.kind {
                AreaKind::Held { id, offset } => {
                    let offset = offset + (r.start - area.start);
                    let from = keeper(id).filter(|from| offset < from.end - from.start);
                    let from = from.ok_or(missing("held file of a mapping"))?.start + offset;
                    map_kept(&call, from, &r, area.prot.0)?;
                }
                _ => map(worker, &call, &r, area, file, object)?,
            },
            Change::Advise(r, advice) => {
                let args = [r.start, r.end - r.start, advice as u64, 0, 0, 0];
                let done = call("madvise", libc::SYS_madvise, args);
                // The others are hints, which this kernel may not know.
                let about_fork = libc::MADV_DONTFORK..=libc::MADV_DOFORK;
                let about_wipe = libc::MADV_WIPEONFORK..=libc::MADV_KEEPONFORK;
                if about_fork.contains(&advice) || about_wipe.contains(&advice) {
                    done?;
                }
            }
        }
    }
    Ok(())
}

/// Gives the open file behind a number.
type Opened<'a> = &'a dyn Fn(u64) -> Option<Arc<File>>;

impl Vessel {
    /// Makes the areas of a vessel those of the image. It waits for the vessel, which may be stopped: not for the thread
    /// that traces it. `worker` is one of its idle workers; `file` gives the open file
    /// behind a number, `object` the one behind the id of shared anonymous memory, which is mapped anew, and `keeper` tells where the vessel
    /// keeps a held file ([`Vessel::keep`]). The pages that were put into its [room](Vessel::make_room), `landed`, stay where they are.
    ///
    /// # Errors
    /// A call that fails. The vessel then still executes calls, and the guest may go on.
    pub fn adapt_layout(
        image: &ProcessImage,
        worker: &Slot,
        file: &dyn Fn(u64) -> Option<Arc<File>>,
        object: &dyn Fn(u64) -> Option<Arc<File>>,
        keeper: &dyn Fn(u64) -> Option<Range<u64>>,
        landed: &Landed,
    ) -> Result<(), VesselError> {
        for thread in &image.threads {
            xstate::fits(&thread.xstate, &image.xstate_layout)?;
        }
        let _raised = Raised::new(image.reached_by(), &[libc::RLIMIT_NOFILE, libc::RLIMIT_AS]);
        let call = |what, nr: i64, args| call(worker, what, nr, args);
        let memory = ProcessMemory::new(image.reached_by());
        let mut carried = Carried::new();
        make_changes(image, worker, (file, object, keeper), landed, &mut carried)?;
        put_down(&memory, image, &carried)?;
        let lines = map_lines(image.reached_by(), false)?;
        let pieces = in_pieces(&lines, &image.areas);
        if !pieces.is_empty() {
            carried.clear();
            for area in pieces {
                carry(&memory, &area.range(), landed, &mut carried)?;
                let args = [area.start, area.end - area.start, 0, 0, 0, 0];
                call("munmap", libc::SYS_munmap, args)?;
            }
            let none = Landed::default();
            make_changes(image, worker, (file, object, keeper), &none, &mut carried)?;
            put_down(&memory, image, &carried)?;
        }
        // The end of the heap, and nothing else (prctl(2), PR_SET_MM_MAP without an auxiliary vector).
        let mm = &image.mm;
        let words = [
            mm.start_code,
            mm.end_code,
            mm.start_data,
            mm.end_data,
            mm.start_brk,
            mm.brk,
            mm.start_stack,
            mm.arg_start,
            mm.arg_end,
            mm.env_start,
            mm.env_end,
            0,
            u64::from(u32::MAX) << 32,
        ];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        worker.write(0, &bytes);
        call(
            "prctl(PR_SET_MM_MAP)",
            libc::SYS_prctl,
            [35, 14, worker.data_address(), 104, 0, 0],
        )?;
        Ok(())
    }

    /// Maps a file of a vessel, named by one of its own descriptors, at an address of [`KEEPERS`], by one of its idle workers.
    ///
    /// # Errors
    /// A call that fails, which changes nothing.
    pub fn keep(tid: i32, worker: &Slot, fd: i32, at: Range<u64>) -> Result<(), VesselError> {
        let _raised = Raised::new(tid, &[libc::RLIMIT_AS]);
        let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
        let args = [at.start, at.end - at.start, 0, flags, fd as u64, 0];
        call(worker, "mmap of a held file", libc::SYS_mmap, args)?;
        Ok(())
    }

    /// Has a vessel make a userfaultfd, by one of its idle workers, and takes it away from it.
    ///
    /// # Errors
    /// A call that fails, which changes nothing.
    pub fn make_userfault(tid: i32, worker: &Slot) -> Result<OwnedFd, VesselError> {
        let _raised = Raised::new(tid, &[libc::RLIMIT_NOFILE]);
        let call = |what, nr: i64, args| call(worker, what, nr, args);
        let made = match call(
            "userfaultfd",
            libc::SYS_userfaultfd,
            [userfault::FLAGS, 0, 0, 0, 0, 0],
        ) {
            Ok(made) => made,
            Err(refused) => {
                let Ok(userfault::Source::Device(device)) = userfault::source() else {
                    return Err(refused);
                };
                let path = format!("/proc/{}/fd/{}\0", std::process::id(), device.as_raw_fd());
                worker.write(0, path.as_bytes());
                let open = (libc::O_RDWR | libc::O_CLOEXEC) as u64;
                let args = [worker.data_address(), open, 0, 0, 0, 0];
                let fd = call("open of the userfaultfd device", libc::SYS_open, args)?;
                let args = [fd, userfault::IOC_NEW, userfault::FLAGS, 0, 0, 0];
                let made = call("ioctl of the userfaultfd device", libc::SYS_ioctl, args);
                call("close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
                made?
            }
        };
        let taken = crate::fd::get_from_thread(tid, made as i32);
        call("close", libc::SYS_close, [made, 0, 0, 0, 0, 0])?;
        Ok(taken?)
    }

    /// Gives every worker the state of its guest thread and takes the stub and the arena out of the process. The threads
    /// are given back stopped; resumed, they are the process. The catcher has ended, as [`ptrace::wait`] will report.
    ///
    /// # Errors
    /// A thread is gone: the process was killed.
    pub fn resume(self, image: &ProcessImage) -> Result<Vec<Stopped>, VesselError> {
        self.gather(image, &mut Vec::new())?.finish(true)
    }

    /// The first part of [`Vessel::resume`]: everything but what ends the vessel, so that vessels that share their memory
    /// can all be brought so far before one of them takes the stub away. What the catcher takes only now and is among `carried` is
    /// in the image.
    ///
    /// # Errors
    /// A thread is gone: the process was killed.
    pub fn gather<'a>(
        self,
        image: &'a ProcessImage,
        carried: &mut Vec<SigInfo>,
    ) -> Result<Homebound<'a>, VesselError> {
        let site = vdso_site(image.reached_by())?;
        let memory = ProcessMemory::new(image.reached_by());
        let mut threads = Vec::new();
        let mut caught = Vec::new();
        for thread in &image.threads {
            let mut own = Vec::new();
            let stopped = stop(thread.tid, &mut own)?;
            let (own, all): (Vec<SigInfo>, Vec<SigInfo>) =
                own.into_iter().partition(crate::signal::is_for_one_thread);
            caught.extend(all);
            let mut calls = RemoteCalls::begin(stopped, TRAMPOLINE)?;
            register(&mut calls, &memory, thread)?;
            for info in thread.pending.iter().chain(&own) {
                requeue(&mut calls, &memory, self.pid, thread.tid, false, info)?;
            }
            threads.push((calls, thread));
        }
        let in_front = !carried.is_empty() || !image.pending.is_empty();
        end_catcher(self.catcher, in_front, &mut caught)?;
        caught.retain(|info| match carried.iter().position(|c| c == info) {
            Some(at) => {
                carried.swap_remove(at);
                false
            }
            None => true,
        });
        if let Some((calls, first)) = threads.first_mut() {
            // Those that the guest changed last may not have been told.
            let present = capture::actions(calls, &memory)?;
            restore::actions(calls, &memory, &image.actions, &present)?;
            for info in image.pending.iter().chain(&caught) {
                requeue(calls, &memory, self.pid, first.tid, true, info)?;
            }
        }
        Ok(Homebound { threads, site, image })
    }
}

/// A vessel whose threads have all they need to be the process again. See [`Vessel::gather`].
#[derive(Debug)]
pub struct Homebound<'a> {
    threads: Vec<(RemoteCalls, &'a ThreadImage)>,
    site: u64,
    image: &'a ProcessImage,
}

impl Homebound<'_> {
    /// The second part of [`Vessel::resume`]. With `clear`, the stub and the arena are taken out of the memory: nobody who
    /// shares it may need them any more.
    ///
    /// # Errors
    /// A thread is gone: the process was killed.
    pub fn finish(self, clear: bool) -> Result<Vec<Stopped>, VesselError> {
        let mut running = Vec::new();
        for (index, (mut calls, thread)) in self.threads.into_iter().enumerate() {
            if index == 0 && clear {
                calls.move_to(self.site);
                calls.call("munmap", libc::SYS_munmap, [TRAMPOLINE, 2 * PAGE, 0, 0, 0, 0])?;
                let arena = [ARENA_ADDRESS, ARENA_LEN as u64, 0, 0, 0, 0];
                calls.call("munmap", libc::SYS_munmap, arena)?;
                let keepers = [KEEPERS.start, KEEPERS.end - KEEPERS.start, 0, 0, 0, 0];
                calls.call("munmap", libc::SYS_munmap, keepers)?;
            }
            set_xstate(calls.stopped(), thread, &self.image.xstate_layout)?;
            running.push(calls.end_with(&thread.resumed(), thread.sigmask)?);
        }
        Ok(running)
    }
}

/// A call by an idle worker.
pub(super) fn call(worker: &Slot, what: &'static str, nr: i64, args: [u64; 6]) -> Result<u64, VesselError> {
    worker.post(nr as u64, args);
    let errno = match worker.wait(None) {
        Some(ret) if !(-4095..0).contains(&ret) => return Ok(ret as u64),
        Some(ret) => Errno::from_raw(-ret as i32),
        None => Errno::ESRCH,
    };
    Err(VesselError::Slot { what, errno })
}

pub(super) fn special(line: &MapLine) -> bool {
    matches!(
        line.path.as_slice(),
        b"[vdso]" | b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]"
    )
}

/// What has to change, in the order of addresses.
fn changes<'a>(
    lines: &[MapLine],
    image: &'a ProcessImage,
    file: &dyn Fn(u64) -> Option<Arc<File>>,
) -> Vec<Change<'a>> {
    // What was one area away, and lies over several here, does not become one by itself, and an mremap(2) of it would fail.
    let in_pieces = |area: &Area| {
        let one = |l: &MapLine| l.range.start <= area.start && area.end <= l.range.end;
        area.kind == AreaKind::Anon && !area.flags.has(AreaFlags::GROWSDOWN) && !lines.iter().any(one)
    };
    let mut lines = lines.iter().peekable();
    let mut areas = image.areas.iter().filter(|a| !a.is_kernel()).peekable();
    let mut out: Vec<Change> = Vec::new();
    let mut at = 0;
    loop {
        // Both lists are sorted: `at` moves from edge to edge, and what lies behind it is done with.
        while lines.next_if(|l| l.range.end <= at).is_some() {}
        while areas.next_if(|a| a.end <= at).is_some() {}
        let (line, area) = (lines.peek().copied(), areas.peek().copied());
        let edges = [
            line.map(|l| l.range.start),
            line.map(|l| l.range.end),
            area.map(|a| a.start),
            area.map(|a| a.end),
        ];
        let Some(next) = edges.into_iter().flatten().filter(|edge| *edge > at).min() else {
            return out;
        };
        let piece = at..next;
        at = next;
        let line = line.filter(|l| l.range.start <= piece.start);
        let area = area.filter(|a| a.start <= piece.start);
        let (line, area) = match (line, area) {
            (None, None) => continue,
            (Some(_), None) => {
                add(&mut out, Change::Unmap(piece));
                continue;
            }
            (line, Some(area)) => match line.filter(|l| !in_pieces(area) && same(l, area, piece.start, file))
            {
                None => {
                    add(&mut out, Change::Map(piece.clone(), area));
                    advise(&mut out, piece, AreaFlags::default(), area.flags);
                    continue;
                }
                Some(line) => (line, area),
            },
        };
        if line.prot != area.prot {
            add(&mut out, Change::Protect(piece.clone(), area.prot.0));
        }
        advise(&mut out, piece, line.area_flags(), area.flags);
    }
}

/// What makes the flags of a piece those that are wanted.
fn advise(out: &mut Vec<Change<'_>>, piece: Range<u64>, has: AreaFlags, wanted: AreaFlags) {
    let switches = [
        (AreaFlags::DONTFORK, libc::MADV_DONTFORK, libc::MADV_DOFORK),
        (
            AreaFlags::WIPEONFORK,
            libc::MADV_WIPEONFORK,
            libc::MADV_KEEPONFORK,
        ),
        (AreaFlags::DONTDUMP, libc::MADV_DONTDUMP, libc::MADV_DODUMP),
        (AreaFlags::MERGEABLE, libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE),
        (AreaFlags::HUGEPAGE, libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE),
        (AreaFlags::NOHUGEPAGE, libc::MADV_NOHUGEPAGE, libc::MADV_HUGEPAGE),
    ];
    for (flag, on, off) in switches {
        let huge = flag == AreaFlags::HUGEPAGE || flag == AreaFlags::NOHUGEPAGE;
        match (has.has(flag), wanted.has(flag)) {
            (false, true) => add(out, Change::Advise(piece.clone(), on)),
            // Huge pages once advised for or against can only be advised otherwise.
            (true, false) if !huge => add(out, Change::Advise(piece.clone(), off)),
            _ => {}
        }
    }
}

/// Adds a change; neighbours of one kind become one.
fn add<'a>(out: &mut Vec<Change<'a>>, change: Change<'a>) {
    match (out.last_mut(), &change) {
        (Some(Change::Unmap(last)), Change::Unmap(new)) if last.end == new.start => last.end = new.end,
        (Some(Change::Map(last, a)), Change::Map(new, b))
            if last.end == new.start && std::ptr::eq(*a, *b) =>
        {
            last.end = new.end;
        }
        (Some(Change::Protect(last, a)), Change::Protect(new, b)) if last.end == new.start && *a == *b => {
            last.end = new.end;
        }
        _ => out.push(change),
    }
}

/// Whether a piece of the vessel is backed by what the guest's area is backed by.
fn same(line: &MapLine, area: &Area, at: u64, file: &dyn Fn(u64) -> Option<Arc<File>>) -> bool {
    if line.shared != area.shared() {
        return false;
    }
    match area.kind {
        AreaKind::Anon => line.ino == 0,
        AreaKind::File { file_id, offset } => {
            let Some(meta) = file(file_id).and_then(|f| f.metadata().ok()) else {
                return false;
            };
            let here = line.offset + (at - line.range.start);
            let there = offset + (at - area.start);
            (meta.dev(), meta.ino()) == (line.dev, line.ino) && here == there
        }
        _ => false,
    }
}

fn missing(what: &'static str) -> VesselError {
    VesselError::Slot {
        what,
        errno: Errno::ENOENT,
    }
}

/// Maps a part of a held file at its place: a remapping of nothing (old size 0) of a shared mapping makes another of the same
/// (mremap(2)), for which the file need not be opened.
fn map_kept(
    call: &dyn Fn(&'static str, i64, [u64; 6]) -> Result<u64, VesselError>,
    from: u64,
    range: &Range<u64>,
    prot: u8,
) -> Result<(), VesselError> {
    let len = range.end - range.start;
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    let args = [from, 0, len, flags, range.start, 0];
    call("mremap of a held file", libc::SYS_mremap, args)?;
    let args = [range.start, len, u64::from(prot), 0, 0, 0];
    call("mprotect of a held file", libc::SYS_mprotect, args)?;
    Ok(())
}

fn map(
    worker: &Slot,
    call: &dyn Fn(&'static str, i64, [u64; 6]) -> Result<u64, VesselError>,
    range: &Range<u64>,
    area: &Area,
    file: &dyn Fn(u64) -> Option<Arc<File>>,
    object: &dyn Fn(u64) -> Option<Arc<File>>,
) -> Result<(), VesselError> {
    let mut flags = libc::MAP_FIXED;
    flags |= if area.shared() {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE
    };
    if area.flags.has(AreaFlags::GROWSDOWN) {
        flags |= libc::MAP_GROWSDOWN;
    }
    if area.flags.has(AreaFlags::NORESERVE) {
        flags |= libc::MAP_NORESERVE;
    }
    let len = range.end - range.start;
    let prot = u64::from(area.prot.0);
    let args = |flags: i32, fd: u64, offset| [range.start, len, prot, flags as u64, fd, offset];
    let (backing, access, offset) = match area.kind {
        AreaKind::File { file_id, offset } => {
            let file = file(file_id).ok_or(missing("file of a mapping"))?;
            (file, libc::O_RDONLY, offset)
        }
        AreaKind::SharedAnon { id, offset, .. } => {
            let object = object(id).ok_or(missing("shared memory of a mapping"))?;
            (object, libc::O_RDWR, offset)
        }
        _ => {
            let args = args(flags | libc::MAP_ANONYMOUS, u64::MAX, 0);
            call("mmap", libc::SYS_mmap, args)?;
            return Ok(());
        }
    };
    // The deputy's own descriptor names the very file, also when it was deleted.
    let path = format!("/proc/{}/fd/{}\0", std::process::id(), backing.as_raw_fd());
    worker.write(0, path.as_bytes());
    let open = (access | libc::O_CLOEXEC) as u64;
    let fd = call(
        "open of a mapped file",
        libc::SYS_open,
        [worker.data_address(), open, 0, 0, 0, 0],
    )?;
    let offset = offset + (range.start - area.start);
    let mapped = call("mmap", libc::SYS_mmap, args(flags, fd, offset));
    call("close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
    mapped?;
    Ok(())
}

/// Brings a thread of the vessel to an event stop. A stop signal begins its group-stop; others (those of the terminal, and those that are
/// for it alone, which workers do not block) are kept.
fn stop(tid: i32, caught: &mut Vec<SigInfo>) -> Result<Stopped, VesselError> {
    loop {
        ptrace::interrupt(tid)?;
        let stopped = ptrace::wait_stop(tid)?;
        match stopped.stop() {
            Stop::Interrupt | Stop::Group(_) => return Ok(stopped),
            Stop::Signal(libc::SIGSTOP) => stopped.cont(libc::SIGSTOP)?,
            Stop::Signal(_) => {
                caught.push(stopped.siginfo()?);
                stopped.cont(0)?;
            }
            _ => stopped.cont(0)?,
        }
    }
}

/// Has the catcher end, and waits until it has; its end is still to be reported by [`ptrace::wait`]. The signals that it took
/// meanwhile nobody has seen yet. With `all` it takes all that are there: the guest has some of them already, or has others that come
/// in front of them.
fn end_catcher(tid: i32, all: bool, caught: &mut Vec<SigInfo>) -> Result<(), VesselError> {
    ptrace::interrupt(tid)?;
    loop {
        let Ok(mut stopped) = ptrace::wait_stop(tid) else {
            return Ok(());
        };
        if let Stop::Signal(_) = stopped.stop() {
            caught.push(stopped.siginfo()?);
        }
        if all && !stopped.first_pending(PendingQueue::Process)?.is_empty() {
            // Also what it left to a worker in a call on a terminal.
            stopped.set_sigmask(0)?;
            stopped.cont(0)?;
        } else {
            to_exit(stopped)?;
        }
    }
}

/// The same for a catcher that has not run yet.
pub(super) fn end_stopped(catcher: Stopped) -> Result<(), VesselError> {
    let tid = catcher.tid();
    to_exit(catcher)?;
    while let Ok(stopped) = ptrace::wait_stop(tid) {
        to_exit(stopped)?;
    }
    Ok(())
}

/// Sends a thread of a vessel into exit(2).
fn to_exit(mut stopped: Stopped) -> Result<(), VesselError> {
    let mut regs = stopped.regs()?;
    regs.rip = TRAMPOLINE;
    regs.set_call(libc::SYS_exit as u64, [0; 6]);
    regs.orig_rax = u64::MAX;
    stopped.set_regs(&regs)?;
    stopped.set_sigmask(u64::MAX)?;
    stopped.cont(0)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use linklayer::image::Prot;

    fn line(start: u64, end: u64, prot: u8) -> MapLine {
        MapLine {
            range: start..end,
            prot: Prot(prot),
            shared: false,
            offset: 0,
            dev: 0,
            ino: 0,
            path: Vec::new(),
            flags: Vec::new(),
            protection_key: 0,
        }
    }

    fn anon(start: u64, end: u64, prot: u8) -> Area {
        Area {
            start,
            end,
            prot: Prot(prot),
            flags: AreaFlags(0),
            kind: AreaKind::Anon,
        }
    }

    fn image(areas: Vec<Area>) -> ProcessImage {
        ProcessImage {
            areas,
            ..crate::test_image()
        }
    }

    #[test]
    fn only_what_differs_changes() {
        let mut forkless = anon(0xa000, 0xb000, 3);
        forkless.flags.0 = AreaFlags::DONTFORK | AreaFlags::NOHUGEPAGE;
        let image = image(vec![
            anon(0x1000, 0x3000, 3),
            anon(0x5000, 0x6000, 1),
            anon(0x8000, 0x9000, 3),
            forkless,
            anon(0xb000, 0xc000, 3),
        ]);
        let mut advised = line(0xb000, 0xc000, 3);
        advised.flags = vec![*b"dc", *b"hg"];
        let lines = [
            line(0x1000, 0x4000, 3),
            line(0x5000, 0x6000, 3),
            line(0xa000, 0xb000, 3),
            advised,
        ];
        let found = changes(&lines, &image, &|_| None);
        assert_eq!(
            found,
            [
                Change::Unmap(0x3000..0x4000),
                Change::Protect(0x5000..0x6000, 1),
                Change::Map(0x8000..0x9000, &image.areas[2]),
                Change::Advise(0xa000..0xb000, libc::MADV_DONTFORK),
                Change::Advise(0xa000..0xb000, libc::MADV_NOHUGEPAGE),
                Change::Advise(0xb000..0xc000, libc::MADV_DOFORK),
            ]
        );
    }

    #[test]
    fn pieces_are_cut_at_every_edge() {
        let mut stack = anon(0x2000, 0x8000, 3);
        stack.flags.0 = AreaFlags::GROWSDOWN;
        let image = image(vec![stack]);
        let mut shared = line(0x3000, 0x4000, 3);
        shared.shared = true;
        let lines = [line(0x1000, 0x3000, 3), shared, line(0x7000, 0x9000, 1)];
        let found = changes(&lines, &image, &|_| None);
        assert_eq!(
            found,
            [
                Change::Unmap(0x1000..0x2000),
                Change::Map(0x3000..0x7000, &image.areas[0]),
                Change::Protect(0x7000..0x8000, 3),
                Change::Unmap(0x8000..0x9000),
            ]
        );
        assert_eq!(changes(&[], &super::tests::image(vec![]), &|_| None), []);
    }

    #[test]
    fn what_was_one_area_becomes_one() {
        let image = image(vec![anon(0x1000, 0x3000, 3), anon(0x4000, 0x6000, 3)]);
        let lines = [
            line(0x1000, 0x2000, 3),
            line(0x2000, 0x3000, 3),
            line(0x3000, 0x7000, 3),
        ];
        assert_eq!(
            changes(&lines, &image, &|_| None),
            [
                Change::Map(0x1000..0x3000, &image.areas[0]),
                Change::Unmap(0x3000..0x4000),
                Change::Unmap(0x6000..0x7000),
            ]
        );
    }
}
