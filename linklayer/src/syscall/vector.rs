//! Vectors of buffers (`struct iovec`), whose bodies travel one behind the other.

use super::builder::{Builder, body_align};
use super::gather::{BODY_MAX, GatherError};
use super::kind::{Dir, HomeReason};
use super::request::{OutLen, OutWhen, Place};
use super::transfer::Transfer;
use crate::memory::{GuestMemory, USER_END};

/// `MAX_RW_COUNT`: the kernel transfers no more in one call.
pub(super) const MAX_RW_COUNT: u64 = 0x7fff_f000;
/// `UIO_MAXIOV`.
pub(super) const MAX_IOV: u64 = 1024;

/// A part of a body in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub addr: u64,
    pub len: u64,
}

impl Builder<'_> {
    /// The bodies of an `iovec` and the array itself; gives the array's offset, `None` for the hole.
    pub fn iovec(&mut self, addr: u64, count: u64, dir: Dir) -> Result<Option<u32>, GatherError> {
        if count > MAX_IOV {
            return Ok(None);
        }
        let own;
        let segments = match self.part {
            Some(part) => part,
            None => {
                let Some(read) = read_segments(self.mem, addr, count) else {
                    return Ok(None);
                };
                own = read;
                &own[..]
            }
        };
        let mut total = 0u64;
        for segment in segments {
            if segment.len > i64::MAX as u64
                || segment.addr.checked_add(segment.len).is_none_or(|e| e > USER_END)
            {
                // Refused as a whole, by the check of lengths and addresses that comes before any transfer.
                return Ok(Some(self.refused_iovec(segments)));
            }
            total = (total + segment.len).min(MAX_RW_COUNT);
        }
        if total > BODY_MAX as u64 {
            return Err(GatherError::TooBig(Box::new(Transfer::new(
                self.nr, self.given, self.mem,
            )?)));
        }
        let bodies = self.bodies(
            segments,
            total,
            dir,
            OutWhen::Success,
            OutLen::Ret { scale: 1, plus: 0 },
        )?;
        Ok(Some(self.iovec_array(segments, bodies)))
    }

    /// Copies or reserves the bodies, one behind the other; `None` if the first byte cannot be accessed.
    pub fn bodies(
        &mut self,
        segments: &[Segment],
        total: u64,
        dir: Dir,
        when: OutWhen,
        actual: OutLen,
    ) -> Result<Option<u32>, GatherError> {
        let filled = || segments.iter().filter(|s| s.len > 0);
        let Some(first) = filled().next() else {
            return Ok(Some(0));
        };
        let partial = |accessible: bool, index: usize| {
            if index > 0 || accessible {
                Err(GatherError::GoHome(HomeReason::PartialBuffer))
            } else {
                Ok(None)
            }
        };
        let align = body_align(first.addr, first.len);
        if dir == Dir::In {
            let mut start = None;
            for (index, segment) in filled().enumerate() {
                let align = if index == 0 { align } else { 1 };
                match self.append_from(segment.addr, segment.len, align) {
                    Some(at) => start = start.or(Some(at)),
                    None => return partial(self.mem.readable(segment.addr, 1), index),
                }
            }
            return Ok(start);
        }
        for (index, segment) in filled().enumerate() {
            if !self.mem.writable(segment.addr, segment.len) {
                return partial(self.mem.writable(segment.addr, 1), index);
            }
        }
        let at = self.reserve(total, align)?;
        self.out(at, total, when, actual);
        for segment in filled() {
            self.dest(segment.addr, segment.len);
        }
        Ok(Some(at))
    }

    /// An array of `iovec` whose bodies lie one behind the other.
    pub fn iovec_array(&mut self, segments: &[Segment], bodies: Option<u32>) -> u32 {
        let array = self.append(&vec![0; segments.len() * 16], 8);
        let mut at = bodies;
        for (index, segment) in segments.iter().enumerate() {
            let entry = array + 16 * index as u32;
            self.point(Place::Image(entry), if segment.len == 0 { Some(0) } else { at });
            self.patch(entry + 8, &segment.len.to_le_bytes());
            at = at.map(|at| at + segment.len as u32);
        }
        array
    }

    /// An array of `iovec` with the guest's lengths that the kernel will refuse as it would have natively.
    fn refused_iovec(&mut self, segments: &[Segment]) -> u32 {
        let array = self.append(&vec![0; segments.len() * 16], 8);
        for (index, segment) in segments.iter().enumerate() {
            let entry = array + 16 * index as u32;
            let fits = segment
                .addr
                .checked_add(segment.len)
                .is_some_and(|end| end <= USER_END);
            let base = if fits { 0 } else { USER_END };
            self.patch(entry, &base.to_le_bytes());
            self.patch(entry + 8, &segment.len.to_le_bytes());
        }
        array
    }
}

/// Reads an array of at most [`MAX_IOV`] `iovec`s.
pub(super) fn read_segments(mem: &dyn GuestMemory, addr: u64, count: u64) -> Option<Vec<Segment>> {
    let mut bytes = vec![0; count.min(MAX_IOV) as usize * 16];
    mem.read(addr, &mut bytes).ok()?;
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
    Some(
        (0..bytes.len() / 16)
            .map(|i| Segment {
                addr: word(16 * i),
                len: word(16 * i + 8),
            })
            .collect(),
    )
}
