//! Emptying a blank process, and the areas that its kernel made: the vDSO and its data.

use std::ops::Range;

use linklayer::image::{Area, AreaKind, PAGE, ProcessImage};

use super::{RestoreError, SCRATCH, TRAMPOLINE, batched};
use crate::capture::{map_lines, vdso_bytes};
use crate::memory::ProcessMemory;
use crate::remote_call::{BatchCall, RemoteCalls};
use crate::vdso;

/// Where this kernel's vDSO lies behind another kernel's: in the part of the address space that no guest may use.
const BEHIND: u64 = SCRATCH + 16 * PAGE;
/// memfd_create(2): may be executed, whatever vm.memfd_noexec says short of forbidding it.
const MFD_EXEC: u64 = 0x10;

/// An area that the kernel made.
#[derive(Debug, Clone)]
pub(super) struct Own {
    kind: AreaKind,
    range: Range<u64>,
}

impl Own {
    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// The call that moves it.
    fn to(&mut self, address: u64) -> BatchCall {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let len = self.len();
        let call = batched(
            "mremap",
            libc::SYS_mremap,
            [self.range.start, len, len, flags, address, 0],
        );
        self.range = address..address + len;
        call
    }
}

/// Unmaps everything but the site and puts the kernel's own areas where no guest has any; gives these.
pub(super) fn empty(calls: &mut RemoteCalls, memory: &ProcessMemory) -> Result<Vec<Own>, RestoreError> {
    let mut own = Vec::new();
    let mut batch = Vec::new();
    for line in map_lines(memory.pid(), false)? {
        let range = line.range.clone();
        let kind = match line.path.as_slice() {
            b"[vdso]" => AreaKind::Vdso,
            b"[vvar]" => AreaKind::Vvar,
            b"[vvar_vclock]" => AreaKind::VvarVclock,
            b"[vsyscall]" => continue,
            _ if range.start >= TRAMPOLINE && range.end <= SCRATCH + PAGE => continue,
            _ => {
                let args = [range.start, range.end - range.start, 0, 0, 0, 0];
                batch.push(batched("munmap", libc::SYS_munmap, args));
                continue;
            }
        };
        own.push(Own { kind, range });
    }
    // The code finds its data at a fixed distance.
    let first = own.iter().map(|area| area.range.start).min().unwrap_or(BEHIND);
    for area in &mut own {
        batch.push(area.to(area.range.start - first + BEHIND));
    }
    calls.batch_all(&batch)?;
    Ok(own)
}

/// Puts the kernel's own areas where the image has them, or has what stands for them there lead to them.
pub(super) fn place(
    calls: &mut RemoteCalls,
    memory: &ProcessMemory,
    image: &ProcessImage,
    own: &mut [Own],
) -> Result<(), RestoreError> {
    let (_, here) = vdso_bytes(memory.pid())?;
    let place = |kind: &AreaKind| image.areas.iter().find(|a| a.kind == *kind);
    let alike = (image.vdso.is_empty() || image.vdso == here)
        && own
            .iter()
            .all(|area| place(&area.kind).is_none_or(|a| a.len() == area.len()));
    if alike {
        let mut batch = Vec::new();
        for area in own {
            batch.push(match place(&area.kind) {
                Some(wanted) => area.to(wanted.start),
                None => batched(
                    "munmap",
                    libc::SYS_munmap,
                    [area.range.start, area.len(), 0, 0, 0, 0],
                ),
            });
        }
        calls.batch_all(&batch)?;
        return Ok(());
    }
    match (
        place(&AreaKind::Vdso),
        own.iter().find(|area| area.kind == AreaKind::Vdso),
    ) {
        (Some(wanted), Some(area)) => stand_in(calls, memory, image, wanted, &here, area.range.start),
        // The program has none, so it does not miss it.
        _ => Ok(()),
    }
}

/// Puts home's vDSO, with its functions leading to this kernel's at `address`, where home has it. It is a file of its own, by which a
/// capture knows it.
fn stand_in(
    calls: &mut RemoteCalls,
    memory: &ProcessMemory,
    image: &ProcessImage,
    wanted: &Area,
    here: &[u8],
    address: u64,
) -> Result<(), RestoreError> {
    let unsuitable = |e: vdso::VdsoError| RestoreError::Unsuitable(e.to_string());
    let content = vdso::redirected(&image.vdso, here, address).map_err(unsuitable)?;
    if content.len() as u64 != wanted.len() {
        return Err(RestoreError::Unsuitable(
            "home's vDSO is not as long as its area".into(),
        ));
    }
    memory.write_forced(SCRATCH, b"mosrun-vdso\0")?;
    let mut fd = calls.raw(libc::SYS_memfd_create, [SCRATCH, MFD_EXEC, 0, 0, 0, 0])?;
    if fd == -i64::from(libc::EINVAL) {
        // Before Linux 6.3 all were executable.
        fd = calls.raw(libc::SYS_memfd_create, [SCRATCH, 0, 0, 0, 0, 0])?;
    }
    if fd < 0 {
        return Err(RestoreError::Unsuitable(
            "no file can be made for home's vDSO".into(),
        ));
    }
    let (prot, flags) = (
        (libc::PROT_READ | libc::PROT_EXEC) as u64,
        (libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE) as u64,
    );
    calls.batch_all(&[
        batched(
            "ftruncate",
            libc::SYS_ftruncate,
            [fd as u64, wanted.len(), 0, 0, 0, 0],
        ),
        batched(
            "mmap",
            libc::SYS_mmap,
            [wanted.start, wanted.len(), prot, flags, fd as u64, 0],
        ),
        batched("close", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]),
    ])?;
    memory.write_forced(wanted.start, &content)?;
    Ok(())
}
