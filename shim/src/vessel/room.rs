//! Memory that is in a vessel before its guest comes home.
//!
//! A vessel has the areas with which its guest left. Where the guest has got private memory since, the vessel gets some, too, so that its
//! pages can be put there while the guest still runs; the rest of the layout is made when the guest stands still. Until it is at
//! home, or does not come, the vessel is not empty.

use std::ops::Range;

use linklayer::image::{Area, AreaFlags, AreaKind, ProcessImage};

use super::home::special;
use super::{MADV_DONTNEED_LOCKED, Raised, Slot, Vessel, VesselError, drop_pages};
use crate::capture::{map_lines, reserved};
use crate::memory::ProcessMemory;
use crate::ptrace::Stopped;
use crate::remote_call::{BatchCall, RemoteCalls};
use crate::restore::{Room, TRAMPOLINE};

/// What was in areas that are made anew, and belongs there all the same.
pub(super) type Carried = Vec<(u64, Vec<u8>)>;

impl Vessel {
    /// Makes room for the pages of private memory (areas of a valid image) by calls of the catcher, which has stopped. What cannot be
    /// made now is made when the guest comes.
    ///
    /// # Errors
    /// The process is dead.
    pub fn make_room(&self, catcher: Stopped, areas: &[Area]) -> Result<(Stopped, Room), VesselError> {
        let by = catcher.tid();
        let _raised = Raised::new(by, &[libc::RLIMIT_AS]);
        let mut calls = RemoteCalls::begin(catcher, TRAMPOLINE)?;
        let taken: Vec<Range<u64>> = map_lines(by, false)?.into_iter().map(|l| l.range).collect();
        let mut batch = Vec::new();
        for area in areas.iter().filter(|a| a.kind == AreaKind::Anon && !a.shared()) {
            let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            if area.flags.has(AreaFlags::GROWSDOWN) {
                flags |= libc::MAP_GROWSDOWN;
            }
            if area.flags.has(AreaFlags::NORESERVE) {
                flags |= libc::MAP_NORESERVE;
            }
            for gap in crate::restore::outside(&area.range(), &taken) {
                let prot = u64::from(area.prot.0);
                batch.push(BatchCall {
                    what: "mmap",
                    nr: libc::SYS_mmap,
                    args: [gap.start, gap.end - gap.start, prot, flags as u64, u64::MAX, 0],
                });
            }
        }
        calls.batch(&batch)?;
        let mut room = Vec::new();
        for line in map_lines(by, false)? {
            if line.ino == 0 && !line.shared && !special(&line) && !reserved(&line.range) {
                let wanted: Vec<Range<u64>> = areas.iter().map(Area::range).collect();
                room.extend(crate::restore::inside(&line.range, &wanted));
            }
        }
        let memory = ProcessMemory::new(by);
        // Opened now: what it executes later is another memory.
        memory.read_forced(TRAMPOLINE, &mut [0])?;
        Ok((calls.end()?, Room::new(memory, room)))
    }

    /// Drops the pages of a vessel that is not empty, by calls of an idle worker (as [`Vessel::adapt_layout`] says).
    ///
    /// # Errors
    /// The process is dead.
    pub fn drop_by_worker(tid: i32, worker: &Slot) -> Result<(), VesselError> {
        let kept = crate::capture::argument_pages(tid)?;
        let mut runs = Vec::new();
        for line in map_lines(tid, false)? {
            if !special(&line) && !reserved(&line.range) && !line.shared {
                runs.extend(crate::restore::outside(&line.range, std::slice::from_ref(&kept)));
            }
        }
        Vessel::drop_runs(worker, &runs)
    }

    /// Drops these pages of a vessel, by calls of an idle worker. Those that it does not have any more are none.
    ///
    /// # Errors
    /// The process is dead.
    pub fn drop_runs(worker: &Slot, runs: &[Range<u64>]) -> Result<(), VesselError> {
        for run in runs {
            let drop = |advice: u64| {
                let args = [run.start, run.end - run.start, advice, 0, 0, 0];
                super::home::call(worker, "madvise", libc::SYS_madvise, args)
            };
            let dropped = drop(MADV_DONTNEED_LOCKED).or_else(|e| match e {
                e if e.is_gone() => Err(e),
                // Before Linux 5.18.
                _ => drop(libc::MADV_DONTNEED as u64),
            });
            match dropped {
                Err(e) if e.is_gone() => return Err(e),
                // Not there any more; or sealed, and then it was never written.
                _ => {}
            }
        }
        Ok(())
    }

    /// Drops the pages that the child of a vessel has from its parent. It has stopped, and done nothing yet.
    pub(super) fn drop_inherited(calls: &mut RemoteCalls) -> Result<(), VesselError> {
        let tid = calls.tid();
        drop_pages(calls, tid)
    }
}

/// Writes it where the image has private memory.
pub(super) fn put_down(
    memory: &ProcessMemory,
    image: &ProcessImage,
    carried: &Carried,
) -> Result<(), VesselError> {
    for (at, data) in carried {
        let end = at + data.len() as u64;
        let areas = image.areas.iter().filter(|a| !a.is_kernel() && !a.shared());
        for area in areas.filter(|a| a.start < end && *at < a.end) {
            let (from, to) = (area.start.max(*at), area.end.min(end));
            let part = &data[(from - at) as usize..(to - at) as usize];
            memory.write_forced(from, part)?;
        }
    }
    Ok(())
}
