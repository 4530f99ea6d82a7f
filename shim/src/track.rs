//! Which pages of a running process change.
//!
//! A userfaultfd that is made in the process and taken out of it (pidfd_getfd(2)) has its memory write-protected; the kernel
//! itself lifts the protection of a page that is written (UFFD_FEATURE_WP_ASYNC, Linux 6.7), so that nobody waits for anybody,
//! and PAGEMAP_SCAN tells and protects anew.
//!
//! Only what the process has when it is looked at first is watched. All of what it maps later counts as changed each time, and so does an
//! area to which another one is moved with mremap(2), which the kernel gives up (mm/mremap.c, mremap_userfaultfd_prep). To take such an area
//! in while the process runs is not safe: its pages keep marks that mean nothing any more, and look unchanged whatever is written to
//! them; and where it is another area by then it is cut in two, so that an mremap(2) of the program fails.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use linklayer::choice::{self, Round};
use linklayer::image::{PAGE, RESERVED};
use linklayer::pages::Writer;
use linklayer::stay::StayReason;
use linklayer::wire::{Kind, Mode, MoveReport, Phase, Progress};

use crate::capture::{
    CaptureError, Found, MapLine, map_lines, page_runs_of, scan_written, vdso_site, write_running,
};
use crate::ptrace::Stopped;
use crate::remote_call::RemoteCalls;
use crate::userfault::{UFFD_API, UFFDIO_API, UFFDIO_REGISTER};

/// linux/userfaultfd.h.
const USER_MODE_ONLY: u64 = 1;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
const WRITEPROTECT_MODE_WP: u64 = 1;
const WRITEPROTECT_MODE_DONTWAKE: u64 = 2;
/// The end of what a process can map (arch/x86/include/asm/page_64_types.h, TASK_SIZE_MAX).
const LAST: u64 = (1 << 47) - PAGE;

/// Watches the memory of one process. When it is dropped, the memory is as it was.
#[derive(Debug)]
pub struct Tracker {
    pid: i32,
    uffd: OwnedFd,
    pagemap: File,
    /// It has been looked at.
    watches: AtomicBool,
}

impl Tracker {
    /// Begins to watch a process all of whose threads are stopped; `stopped` is one of them, and `key` lets calls pass its
    /// filter (0: it has none). Pages count as changed until [`Tracker::round`] has told of them.
    ///
    /// # Errors
    /// The kernel cannot do it, the process uses userfaultfd(2) itself, or it is gone. It is as it was.
    pub fn begin(stopped: &mut Stopped, key: u64) -> Result<Tracker, CaptureError> {
        let pid = stopped.tid();
        let own = map_lines(pid, true)?
            .iter()
            .any(|l| [b"um", b"uw", b"ui"].iter().any(|mark| l.flags.contains(*mark)));
        if own {
            return Err(CaptureError::Unsuitable(StayReason::Userfaultfd));
        }
        let site = vdso_site(pid)?;
        let mut calls = RemoteCalls::begin(Stopped::assume(pid, stopped.stop()), site)?;
        calls.show(key);
        let made = make(&mut calls);
        *stopped = calls.end()?;
        let uffd = made?;
        let mut api = [UFFD_API, FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED, 0];
        // SAFETY: the request reads and writes a struct uffdio_api, three words.
        if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) } < 0 {
            return Err(CaptureError::Unsuitable(StayReason::Hidden(format!(
                "which pages change (userfaultfd with asynchronous write protection, Linux 6.7): {}",
                io::Error::last_os_error()
            ))));
        }
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Tracker {
            pid,
            uffd,
            pagemap,
            watches: AtomicBool::new(false),
        })
    }

    /// What has changed since the last time, in the order of addresses: only pages that cannot be had from files.
    ///
    /// # Errors
    /// The process is gone.
    pub fn round(&self) -> io::Result<Vec<Range<u64>>> {
        self.round_of(&map_lines(self.pid, false)?)
    }

    /// The same for the areas that the process had a moment ago: they may be others by now.
    ///
    /// # Errors
    /// The process is gone.
    pub fn round_of(&self, lines: &[MapLine]) -> io::Result<Vec<Range<u64>>> {
        let begins = !self.watches.swap(true, Ordering::AcqRel);
        let mut runs = Vec::new();
        let mut start = lines.first().map_or(LAST, |line| line.range.start);
        for together in lines.chunk_by(|a, b| watched(a) == watched(b)) {
            let last = together.last().map_or(start, |line| line.range.end);
            if watched(&together[0]) {
                let next = lines.partition_point(|line| line.range.start < last);
                let end = lines.get(next).map_or(LAST, |line| line.range.start.min(LAST));
                let all = start..end;
                self.changed(together, begins.then_some(&all), &mut runs)?;
            }
            start = last;
        }
        Ok(runs)
    }

    /// What has changed in areas between which there are only gaps. They are watched from now on with `all`, which is what lies between
    /// their neighbours.
    fn changed(
        &self,
        lines: &[MapLine],
        all: Option<&Range<u64>>,
        runs: &mut Vec<Range<u64>>,
    ) -> io::Result<()> {
        let private_file = |line: &MapLine| line.ino != 0;
        let mut looks = Vec::with_capacity(lines.len());
        for line in lines {
            looks.push(scan_written(&self.pagemap, &line.range, private_file(line))?);
        }
        // All at once and with the gaps: an area that grows meanwhile must not be cut in two where it ended.
        let whole = all.is_some_and(|all| self.register(all).is_ok());
        for (line, look) in lines.iter().zip(looks) {
            match look {
                Found::Runs(more) => runs.extend(more),
                // Part of it may have been watched before something else was mapped into it. What the look had found there until it
                // failed is protected already, and nobody was told of it: everything counts as changed.
                Found::Unwatched => {
                    // What cannot be watched counts as changed each time.
                    if whole || (all.is_some() && self.register(&line.range).is_ok()) {
                        for run in page_runs_of(self.pid, &line.range, private_file(line))? {
                            let _ = self.protect(&run, WRITEPROTECT_MODE_WP);
                        }
                    }
                    runs.extend(page_runs_of(self.pid, &line.range, private_file(line))?);
                }
            }
        }
        match all {
            Some(all) if whole => self.mistrust(lines, all),
            _ => Ok(()),
        }
    }

    /// Areas have been taken in together, and perhaps others than those that were looked at, with marks of an earlier tracker: what is
    /// another one by now counts as changed when it is looked at next.
    fn mistrust(&self, lines: &[MapLine], all: &Range<u64>) -> io::Result<()> {
        let looked: HashSet<&Range<u64>> = lines.iter().map(|line| &line.range).collect();
        for line in map_lines(self.pid, false)? {
            let among = line.range.start < all.end && line.range.end > all.start;
            if among && !looked.contains(&line.range) {
                // It may have been mapped after that, and is not watched then.
                let _ = self.protect(&line.range, WRITEPROTECT_MODE_DONTWAKE);
            }
        }
        Ok(())
    }

    /// Sends the memory of the process, which home knows as `process`, while it runs, again and again what has changed, until little changes or it does not get
    /// less. `settle` waits until what was sent has arrived; `tell` hears after each round how far it is. Gives the rounds.
    ///
    /// # Errors
    /// The process is gone, or `sink`'s.
    pub fn precopy(
        &self,
        process: i32,
        writer: &mut Writer,
        sink: &mut impl FnMut(Kind, &[&[u8]]) -> io::Result<()>,
        settle: &mut dyn FnMut() -> io::Result<()>,
        tell: &mut dyn FnMut(Progress),
    ) -> io::Result<Vec<Round>> {
        let mut rounds = Vec::new();
        while choice::goes_on(&rounds) {
            let begun = Instant::now();
            let runs = self.round()?;
            let pages = runs.iter().map(|r| (r.end - r.start) / PAGE).sum::<u64>();
            write_running(self.pid, &runs, writer, sink)?;
            settle()?;
            let took = begun.elapsed();
            rounds.push(Round { pages, took });
            tell(Progress {
                pid: process,
                phase: Phase::Precopy,
                report: MoveReport {
                    pages: writer.counts,
                    rounds: rounds.len() as u32,
                    mode: Mode::Precopy,
                    ..MoveReport::default()
                },
                left: pages,
            });
        }
        Ok(rounds)
    }

    fn register(&self, range: &Range<u64>) -> io::Result<()> {
        let mut request = [range.start, range.end - range.start, MODE_WP, 0];
        // SAFETY: the request reads and writes a struct uffdio_register, four words.
        if unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_REGISTER, request.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Protects pages, or takes their protection and marks away.
    fn protect(&self, range: &Range<u64>, mode: u64) -> io::Result<()> {
        let mut request = [range.start, range.end - range.start, mode];
        // SAFETY: the request reads a struct uffdio_writeprotect, three words.
        if unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_WRITEPROTECT, request.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Whether pages of an area are moved with the process at all.
fn watched(line: &MapLine) -> bool {
    let kernel = matches!(
        line.path.as_slice(),
        b"[vdso]" | b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]"
    );
    let reserved = line.range.start < RESERVED.end && RESERVED.start < line.range.end;
    !kernel && !reserved && !line.shared
}

/// Has the process make a userfaultfd, and takes it away from it.
fn make(calls: &mut RemoteCalls) -> Result<OwnedFd, CaptureError> {
    let tid = calls.tid();
    let flags = libc::O_CLOEXEC as u64 | USER_MODE_ONLY;
    let fd = calls.call("userfaultfd", libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0])?;
    let taken = crate::fd::get_from(tid, fd as i32);
    calls.call("close", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
    Ok(taken?)
}
