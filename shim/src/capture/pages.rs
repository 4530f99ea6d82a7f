//! Which pages of an area have content of their own.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use linklayer::image::{Area, AreaKind, PAGE};

/// struct pm_scan_arg of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// struct page_region of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// Flags of the scan: protect what is found; refuse memory that is not watched.
const WP_MATCHING: u64 = 1 << 0;
const CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// The ranges of an area whose pages are not as fresh memory or the mapped file would have them; none of memory that is
/// shared.
///
/// # Errors
/// The process is gone.
pub fn page_runs(pid: i32, area: &Area) -> io::Result<Vec<Range<u64>>> {
    if area.shared() && matches!(area.kind, AreaKind::File { .. }) {
        return Ok(Vec::new());
    }
    if matches!(area.kind, AreaKind::SharedAnon { .. } | AreaKind::Held { .. }) {
        // It is not of this process alone ([`super::SharedObjects`]).
        return Ok(Vec::new());
    }
    page_runs_of(pid, &area.range(), matches!(area.kind, AreaKind::File { .. }))
}

/// The same of private memory in a range, of a file or anonymous.
///
/// # Errors
/// The process is gone.
pub fn page_runs_of(pid: i32, range: &Range<u64>, private_file: bool) -> io::Result<Vec<Range<u64>>> {
    let map = File::open(format!("/proc/{pid}/pagemap"))?;
    match scan(&map, range, private_file, false) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            read_map(&map, range, private_file)
        }
        other => other,
    }
}

/// What a look at watched memory finds.
pub(crate) enum Found {
    /// The pages that changed. They are protected again.
    Runs(Vec<Range<u64>>),
    /// This memory is not watched.
    Unwatched,
}

/// The pages of a range that have changed since they were looked at last, of those that `page_runs_of` gives.
pub(crate) fn scan_written(map: &File, range: &Range<u64>, private_file: bool) -> io::Result<Found> {
    match scan(map, range, private_file, true) {
        Ok(runs) => Ok(Found::Runs(runs)),
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(Found::Unwatched),
        Err(e) => Err(e),
    }
}

fn scan(map: &File, range: &Range<u64>, private_file: bool, written: bool) -> io::Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut regions = vec![PageRegion::default(); 512];
    let excluded = PAGE_IS_PFNZERO | if private_file { PAGE_IS_FILE } else { 0 };
    let (flags, changed) = if written {
        (WP_MATCHING | CHECK_WPASYNC, PAGE_IS_WRITTEN)
    } else {
        (0, 0)
    };
    let mut at = range.start;
    while at < range.end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags,
            start: at,
            end: range.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: excluded,
            category_mask: excluded | changed,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT,
            ..ScanArg::default()
        };
        // SAFETY: `arg` is the structure the request takes, and `vec` names `vec_len` regions that live through the call.
        let got = unsafe { libc::ioctl(map.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        for region in &regions[..got as usize] {
            match runs.last_mut() {
                Some(last) if last.end == region.start => last.end = region.end,
                _ => runs.push(region.start..region.end),
            }
        }
        if arg.walk_end <= at {
            break;
        }
        at = arg.walk_end;
    }
    Ok(runs)
}

/// The same from /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst), for kernels before 6.7.
fn read_map(map: &File, range: &Range<u64>, private_file: bool) -> io::Result<Vec<Range<u64>>> {
    const AT_ONCE: u64 = 8192;
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let pages = AT_ONCE.min((range.end - at) / PAGE);
        let mut bytes = vec![0; pages as usize * 8];
        map.read_exact_at(&mut bytes, at / PAGE * 8)?;
        for (i, entry) in bytes.chunks_exact(8).enumerate() {
            let mut word = [0; 8];
            word.copy_from_slice(entry);
            let entry = u64::from_ne_bytes(word);
            let there = entry >> 62 != 0;
            let file = entry >> 61 & 1 == 1;
            if there && !(private_file && file) {
                let start = at + i as u64 * PAGE;
                match runs.last_mut() {
                    Some(last) if last.end == start => last.end += PAGE,
                    _ => runs.push(start..start + PAGE),
                }
            }
        }
        at += pages * PAGE;
    }
    Ok(runs)
}
