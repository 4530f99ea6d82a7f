//! Reading the pages of a process that moves.

use std::io;
use std::ops::Range;

use linklayer::image::{Area, PAGE};
use linklayer::pages::{CHUNK_BYTES, Writer};
use linklayer::wire::Kind;

use super::pages::page_runs;
use crate::memory::ProcessMemory;

/// All pages of a process that cannot be had from its files, in the order of addresses.
///
/// # Errors
/// The process is gone.
pub fn all_runs(pid: i32, areas: &[Area]) -> io::Result<Vec<Range<u64>>> {
    let mut runs = Vec::new();
    for area in areas.iter().filter(|a| !a.is_kernel()) {
        runs.extend(page_runs(pid, area)?);
    }
    Ok(runs)
}

/// Reads pages of a process, which stands still, and gives them to `sink` in frames.
///
/// # Errors
/// The process is gone, or `sink`'s.
pub fn write_pages(
    pid: i32,
    runs: &[Range<u64>],
    writer: &mut Writer,
    sink: &mut impl FnMut(Kind, &[&[u8]]) -> io::Result<()>,
) -> io::Result<()> {
    write_memory(&ProcessMemory::new(pid), runs, writer, sink)
}

/// The same of memory that was opened before.
///
/// # Errors
/// As there.
pub(crate) fn write_memory(
    memory: &ProcessMemory,
    runs: &[Range<u64>],
    writer: &mut Writer,
    sink: &mut impl FnMut(Kind, &[&[u8]]) -> io::Result<()>,
) -> io::Result<()> {
    each_chunk(runs, |at, chunk| {
        memory.read_forced(at, chunk)?;
        writer.write(at, chunk, sink)
    })
}

/// The same of a process that runs: pages that it has given up meanwhile are left out.
///
/// # Errors
/// The process is gone, or `sink`'s.
pub fn write_running(
    pid: i32,
    runs: &[Range<u64>],
    writer: &mut Writer,
    sink: &mut impl FnMut(Kind, &[&[u8]]) -> io::Result<()>,
) -> io::Result<()> {
    let memory = ProcessMemory::new(pid);
    each_chunk(runs, |at, chunk| {
        if memory.read_forced(at, chunk).is_ok() {
            return writer.write(at, chunk, sink);
        }
        for (page, to) in chunk.chunks_mut(PAGE as usize).zip((at..).step_by(PAGE as usize)) {
            if memory.read_forced(to, page).is_ok() {
                writer.write(to, page, sink)?;
            }
        }
        Ok(())
    })
}

fn each_chunk(runs: &[Range<u64>], mut work: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            // Chunks end where those that a receiver keeps end.
            let end = run.end.min((at / CHUNK_BYTES as u64 + 1) * CHUNK_BYTES as u64);
            work(at, &mut buffer[..(end - at) as usize])?;
            at = end;
        }
    }
    Ok(())
}
