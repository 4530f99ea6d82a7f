//! A blank process that takes memory before it is known what process it becomes.
//!
//! The memory of a process that moves while it runs comes long before its description. So a blank process is emptied at once and given the
//! private memory that the process has so far, at the same addresses; pages are put there as they come, and when the description is
//! there only what has changed in the layout is made. A page that belongs where the shell's area is not the one that the process
//! has in the end is carried over.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use linklayer::image::{Area, AreaFlags, AreaKind, ProcessImage};
use linklayer::pages::{CHUNK_BYTES, Landed, Place};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::{Backing, Faults, Rebuilt, RestoreError, SCRATCH, SYSCALL, batched, kernel, map};
use crate::capture::{build_site, in_pieces, map_lines};
use crate::memory::ProcessMemory;
use crate::ptrace::Stopped;
use crate::remote_call::{BatchCall, RemoteCalls};

/// Most descriptors in a message: SCM_MAX_FD of net/scm.h.
const MAX_FDS: usize = 253;
/// Where a message's parts lie in the scratch page.
const HEADER: u64 = SCRATCH + 1024;
const VECTOR: u64 = HEADER + 64;
const BYTE: u64 = VECTOR + 16;
const CONTROL: u64 = BYTE + 16;
/// Of a struct cmsghdr.
const CONTROL_HEADER: usize = 16;

/// A blank process with nothing in it but the site of its construction, and areas that were made in it.
#[derive(Debug)]
pub struct Shell {
    calls: RemoteCalls,
    memory: ProcessMemory,
    own: Vec<kernel::Own>,
    /// In the order of addresses; neighbours that are alike are one.
    areas: Vec<Area>,
}

impl Shell {
    /// Empties a blank process (stopped in a system call's wake, with nothing of value in it).
    ///
    /// # Errors
    /// It was killed.
    pub fn new(stopped: Stopped) -> Result<Shell, RestoreError> {
        let memory = ProcessMemory::new(stopped.tid());
        let mut site = stopped.regs()?.rip.wrapping_sub(2);
        let mut code = [0; 2];
        memory.read_forced(site, &mut code)?;
        if code != SYSCALL {
            site += 2;
            memory.write_forced(site, &SYSCALL)?;
        }
        let mut calls = RemoteCalls::begin(stopped, site)?;
        build_site(&mut calls, &memory)?;
        let own = kernel::empty(&mut calls, &memory)?;
        Ok(Shell {
            calls,
            memory,
            own,
            areas: Vec::new(),
        })
    }

    /// Its process id here.
    pub fn pid(&self) -> i32 {
        self.calls.tid()
    }

    /// Makes areas of private anonymous memory, once. They are those of a valid image.
    ///
    /// # Errors
    /// It was killed, or one of them cannot be made.
    pub fn make(&mut self, areas: &[Area]) -> Result<(), RestoreError> {
        for area in areas {
            if area.kind != AreaKind::Anon || area.shared() {
                return Err(RestoreError::Unsuitable(
                    "an area that is not private memory".into(),
                ));
            }
            let area = Area {
                flags: AreaFlags(area.flags.0 & CREATED_WITH),
                ..area.clone()
            };
            match self.areas.last_mut() {
                Some(last)
                    if last.end == area.start && (last.prot, last.flags) == (area.prot, area.flags) =>
                {
                    last.end = area.end;
                }
                _ => self.areas.push(area),
            }
        }
        let batch: Vec<BatchCall> = self
            .areas
            .iter()
            .map(|area| map(area, &|_| None))
            .collect::<Result<_, _>>()?;
        Ok(self.calls.batch_all(&batch)?)
    }

    /// The areas that were made, as a place for pages. It is of use until the process is built.
    ///
    /// # Errors
    /// It was killed.
    pub fn room(&self) -> Result<Room, RestoreError> {
        let memory = ProcessMemory::new(self.pid());
        // Opened now: the number may be another process's later.
        memory.read_forced(SCRATCH, &mut [0])?;
        Ok(Room::new(memory, self.areas.iter().map(Area::range).collect()))
    }

    /// Gives it descriptors through a socket of which it has the other end, `inside`. Gives their numbers in it.
    ///
    /// # Errors
    /// It was killed, or takes no more descriptors.
    pub fn give(
        &mut self,
        socket: BorrowedFd<'_>,
        inside: i32,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<i32>, RestoreError> {
        let mut numbers = Vec::with_capacity(fds.len());
        for part in fds.chunks(MAX_FDS) {
            let raw: Vec<i32> = part.iter().map(AsRawFd::as_raw_fd).collect();
            sendmsg::<()>(
                socket.as_raw_fd(),
                &[IoSlice::new(b"f")],
                &[ControlMessage::ScmRights(&raw)],
                MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                None,
            )
            .map_err(io::Error::from)?;
            let room = CONTROL_HEADER + raw.len() * 4;
            let message = super::words(&[0, 0, VECTOR, 1, CONTROL, room as u64, 0]);
            self.memory.write_forced(HEADER, &message)?;
            self.memory.write_forced(VECTOR, &super::words(&[BYTE, 1]))?;
            let args = [inside as u64, HEADER, libc::MSG_DONTWAIT as u64, 0, 0, 0];
            self.calls.call("recvmsg", libc::SYS_recvmsg, args)?;
            let mut control = vec![0; room];
            self.memory.read_forced(CONTROL, &mut control)?;
            let (header, got) = control.split_at(CONTROL_HEADER);
            let len = header.first_chunk().map_or(0, |len| u64::from_ne_bytes(*len));
            if len != room as u64 {
                return Err(RestoreError::Unsuitable(
                    "the new process takes no more descriptors".into(),
                ));
            }
            let number = |word: &[u8]| word.try_into().map_or(-1, i32::from_ne_bytes);
            numbers.extend(got.chunks_exact(4).map(number));
        }
        Ok(numbers)
    }

    /// Makes it the process of the image. See [`super::rebuild`], which does this with a blank process; `landed` are the pages that were
    /// put into its [room](Shell::room), all of which belong to the process.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn rebuild<'a>(
        mut self,
        image: &ProcessImage,
        fd_of: &dyn Fn(Backing) -> Option<i32>,
        pages: impl IntoIterator<Item = (u64, &'a [u8])>,
        landed: &Landed,
        faults: Option<Faults>,
    ) -> Result<Rebuilt, RestoreError> {
        let plan = plan(&self.areas, &image.areas, landed);
        let mut carried = Vec::new();
        for range in &plan.unmap {
            carry(&self.memory, range, landed, &mut carried)?;
        }
        let mut batch: Vec<BatchCall> = plan
            .unmap
            .iter()
            .map(|r| batched("munmap", libc::SYS_munmap, [r.start, r.end - r.start, 0, 0, 0, 0]))
            .collect();
        let stale = landed
            .stale()
            .iter()
            .flat_map(|run| outside(run, &landed.runs(run)));
        for run in stale.flat_map(|run| inside(&run, &plan.stays)) {
            let args = [
                run.start,
                run.end - run.start,
                libc::MADV_DONTNEED as u64,
                0,
                0,
                0,
            ];
            batch.push(batched("madvise", libc::SYS_madvise, args));
        }
        self.calls.batch_all(&batch)?;
        kernel::place(&mut self.calls, &self.memory, image, &mut self.own)?;
        let mut batch: Vec<BatchCall> = plan
            .map
            .iter()
            .map(|area| map(area, fd_of))
            .collect::<Result<_, _>>()?;
        batch.extend(plan.protect.iter().map(|(range, prot)| {
            let args = [range.start, range.end - range.start, u64::from(*prot), 0, 0, 0];
            batched("mprotect", libc::SYS_mprotect, args)
        }));
        self.calls.batch_all(&batch)?;
        for (address, data) in carried {
            self.memory.write_forced(address, &data)?;
        }
        self.join(image, landed)?;
        for (address, data) in pages {
            self.memory.write_forced(address, data)?;
        }
        super::complete(self.calls, self.memory, image, faults)
    }

    /// Makes those areas anew that came out in pieces.
    fn join(&mut self, image: &ProcessImage, landed: &Landed) -> Result<(), RestoreError> {
        let lines = map_lines(self.pid(), false)?;
        for area in in_pieces(&lines, &image.areas) {
            let mut carried = Vec::new();
            carry(&self.memory, &area.range(), landed, &mut carried)?;
            let gone = [area.start, area.end - area.start, 0, 0, 0, 0];
            let anew = [batched("munmap", libc::SYS_munmap, gone), map(area, &|_| None)?];
            self.calls.batch_all(&anew)?;
            for (address, data) in carried {
                self.memory.write_forced(address, &data)?;
            }
        }
        Ok(())
    }
}

/// Reads the pages that were put into a range which is about to go.
pub(crate) fn carry(
    memory: &ProcessMemory,
    range: &Range<u64>,
    landed: &Landed,
    carried: &mut Vec<(u64, Vec<u8>)>,
) -> io::Result<()> {
    for run in landed.runs(range) {
        for at in run.clone().step_by(CHUNK_BYTES) {
            let mut data = vec![0; (run.end - at).min(CHUNK_BYTES as u64) as usize];
            memory.read_forced(at, &mut data)?;
            carried.push((at, data));
        }
    }
    Ok(())
}

/// The areas of a [`Shell`], as a place for pages. Who has it may put them there from any thread.
#[derive(Debug)]
pub struct Room {
    memory: ProcessMemory,
    areas: Vec<Range<u64>>,
}

impl Room {
    /// These areas of a process, in the order of addresses, whose memory has been opened.
    pub(crate) fn new(memory: ProcessMemory, areas: Vec<Range<u64>>) -> Room {
        Room { memory, areas }
    }
}

impl Place for Room {
    fn end_of(&self, page: u64) -> Option<u64> {
        let area = self
            .areas
            .get(self.areas.partition_point(|area| area.end <= page))?;
        (area.start <= page).then_some(area.end)
    }

    fn put(&self, address: u64, data: &[u8]) -> io::Result<()> {
        self.memory.write_forced(address, data)
    }
}

/// What of an area's flags cannot be changed any more when it is there.
const CREATED_WITH: u32 = AreaFlags::GROWSDOWN | AreaFlags::NORESERVE;

/// How the areas of a shell become those of an image.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// What goes.
    unmap: Vec<Range<u64>>,
    /// What stays as it is, but for its protection.
    stays: Vec<Range<u64>>,
    /// What is made.
    map: Vec<Area>,
    /// What is protected otherwise, when everything has been made.
    protect: Vec<(Range<u64>, u8)>,
}

/// Of what a shell has for an area of the image, one piece stays: that with the most pages. The kernel makes what is mapped beside it one
/// with it, but never two pieces that have pages; and an mremap(2) of an area that lies in two would fail.
fn plan(shell: &[Area], areas: &[Area], landed: &Landed) -> Plan {
    let mut plan = Plan::default();
    for area in areas.iter().filter(|a| !a.is_kernel()) {
        let first = shell.partition_point(|piece| piece.end <= area.start);
        let usable = |piece: &&Area| {
            area.kind == AreaKind::Anon && !area.shared() && area.flags.0 & CREATED_WITH == piece.flags.0
        };
        let common = |piece: &Area| piece.start.max(area.start)..piece.end.min(area.end);
        let base = shell[first..]
            .iter()
            .take_while(|piece| piece.start < area.end)
            .filter(usable)
            .max_by_key(|piece| {
                let range = common(piece);
                (landed.count(&range), range.end - range.start)
            });
        let Some(base) = base else {
            plan.map.push(area.clone());
            continue;
        };
        let stays = common(base);
        for (start, end) in [(area.start, stays.start), (stays.end, area.end)] {
            if start < end {
                plan.map.push(Area {
                    start,
                    end,
                    prot: base.prot,
                    ..area.clone()
                });
            }
        }
        if base.prot != area.prot {
            plan.protect.push((area.range(), area.prot.0));
        }
        plan.stays.push(stays);
    }
    let pieces = shell.iter().map(Area::range);
    plan.unmap = pieces.flat_map(|piece| outside(&piece, &plan.stays)).collect();
    plan
}

/// The parts of a range in others, which are in the order of addresses.
pub(crate) fn inside(range: &Range<u64>, others: &[Range<u64>]) -> Vec<Range<u64>> {
    let first = others.partition_point(|other| other.end <= range.start);
    others[first..]
        .iter()
        .take_while(|other| other.start < range.end)
        .map(|other| other.start.max(range.start)..other.end.min(range.end))
        .collect()
}

/// The parts of a range outside of others, which are in the order of addresses.
pub(crate) fn outside(range: &Range<u64>, others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut at = range.start;
    let mut out = Vec::new();
    for other in inside(range, others) {
        if at < other.start {
            out.push(at..other.start);
        }
        at = other.end;
    }
    if at < range.end {
        out.push(at..range.end);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use linklayer::image::{PAGE, Prot};

    fn area(start: u64, end: u64, prot: u8) -> Area {
        Area {
            start: start * PAGE,
            end: end * PAGE,
            prot: Prot(prot),
            flags: AreaFlags(0),
            kind: AreaKind::Anon,
        }
    }

    fn landed(runs: &[(u64, u64)]) -> Landed {
        let mut landed = Landed::default();
        for (start, end) in runs {
            landed.add(start * PAGE..end * PAGE);
        }
        landed
    }

    #[test]
    fn what_is_as_it_will_be_stays() {
        let areas = [area(1, 5, 3), area(8, 9, 1)];
        let plan = plan(&areas, &areas, &landed(&[(1, 5)]));
        assert_eq!(plan.stays, [PAGE..5 * PAGE, 8 * PAGE..9 * PAGE]);
        assert_eq!((plan.unmap, plan.map, plan.protect), (vec![], vec![], vec![]));
    }

    #[test]
    fn of_two_pieces_that_become_one_the_fuller_stays() {
        let shell = [area(1, 5, 3), area(7, 9, 1)];
        let plan = plan(&shell, &[area(0, 10, 5)], &landed(&[(1, 2), (7, 9)]));
        assert_eq!(
            plan,
            Plan {
                unmap: std::iter::once(PAGE..5 * PAGE).collect(),
                stays: std::iter::once(7 * PAGE..9 * PAGE).collect(),
                map: vec![area(0, 7, 1), area(9, 10, 1)],
                protect: vec![(0..10 * PAGE, 5)],
            }
        );
    }

    #[test]
    fn what_is_backed_otherwise_is_made_anew() {
        let mut file = area(1, 3, 3);
        file.kind = AreaKind::File {
            file_id: 7,
            offset: 0,
        };
        let mut stack = area(3, 5, 3);
        stack.flags.0 = AreaFlags::GROWSDOWN;
        let image = [file, stack];
        let plan = plan(&[area(1, 6, 3)], &image, &landed(&[(1, 6)]));
        assert_eq!(plan.unmap.first(), Some(&(PAGE..6 * PAGE)));
        assert_eq!((plan.map, plan.stays), (image.to_vec(), vec![]));
    }
}
