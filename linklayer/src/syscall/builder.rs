//! A request under construction: the image, the room behind it, and what points where.

use super::Call;
use super::gather::{Dest, GatherError, Gathered};
use super::kind::{HomeReason, Kind, When};
use super::request::{CallRequest, Out, OutLen, OutWhen, Place, Reloc, SLOT_DATA_LEN, Target};
use super::vector::Segment;
use crate::memory::{GuestMemory, LOW_END, USER_END};

/// Marks an offset in the part of the data area behind the image while the image's length is not known yet.
const OUT_ZONE: u32 = 1 << 30;

/// A request under construction.
pub(super) struct Builder<'m> {
    pub mem: &'m dyn GuestMemory,
    pub nr: u32,
    /// The registers as the guest gave them.
    pub given: [u64; 6],
    pub call: Call,
    pub part: Option<&'m [Segment]>,
    /// The registers as they will be sent.
    pub args: [u64; 6],
    pub image: Vec<u8>,
    pub out_space: u32,
    pub out_align: u32,
    pub relocs: Vec<Reloc>,
    pub outs: Vec<Out>,
    pub dests: Vec<Dest>,
    /// Offsets of the blocks behind the arguments.
    pub at: [Option<u32>; 6],
    pub temp_mask: Option<u64>,
}

/// See [`Builder::mark`].
pub(super) struct Mark {
    image: usize,
    out_space: u32,
    relocs: usize,
    outs: usize,
    dests: usize,
}

/// What is to be done about a pointer.
pub(super) enum Pointer {
    /// It means the same in every process: null, or never mapped.
    AsItIs,
    /// It may be followed.
    Follow,
}

pub(super) fn pointer(addr: u64) -> Pointer {
    if (LOW_END..USER_END).contains(&addr) {
        Pointer::Follow
    } else {
        Pointer::AsItIs
    }
}

/// Direct I/O needs buffers that are aligned as the guest's are.
pub(super) fn body_align(addr: u64, len: u64) -> u32 {
    match addr | len {
        both if both % 4096 == 0 => 4096,
        both if both % 512 == 0 => 512,
        _ => 8,
    }
}

impl Builder<'_> {
    /// The value of a plain argument, in the width that the kernel looks at.
    pub fn value(&self, index: u8) -> i64 {
        let register = self.given[usize::from(index)];
        match self.call.kind(usize::from(index)) {
            Some(Kind::Val(scalar)) => scalar.value(register),
            _ => register as i64,
        }
    }

    /// Appends bytes to the image at a multiple of `align` and gives their offset.
    pub fn append(&mut self, bytes: &[u8], align: u32) -> u32 {
        let at = self.image.len().next_multiple_of(align as usize);
        self.image.resize(at, 0);
        self.image.extend_from_slice(bytes);
        at as u32
    }

    /// Reads guest memory straight into the image; `None` and no change on a fault.
    pub fn append_from(&mut self, addr: u64, len: u64, align: u32) -> Option<u32> {
        let before = self.image.len();
        let at = before.next_multiple_of(align as usize);
        if len > SLOT_DATA_LEN as u64 {
            return None;
        }
        self.image.resize(at + len as usize, 0);
        if self.mem.read(addr, &mut self.image[at..]).is_err() {
            self.image.truncate(before);
            return None;
        }
        Some(at as u32)
    }

    /// Reserves room behind the image.
    pub fn reserve(&mut self, len: u64, align: u32) -> Result<u32, GatherError> {
        let at = self.out_space.next_multiple_of(align);
        if u64::from(at) + len > SLOT_DATA_LEN as u64 {
            return Err(GatherError::GoHome(HomeReason::TooBig));
        }
        self.out_align = self.out_align.max(align);
        self.out_space = at + len as u32;
        Ok(OUT_ZONE | at)
    }

    /// Lets a place point to a block, or, for a bad pointer, to the hole.
    pub fn point(&mut self, place: Place, at: Option<u32>) {
        let target = at.map_or(Target::Hole, Target::Data);
        if let Place::Arg(index) = place {
            self.args[usize::from(index)] = 0;
        }
        self.relocs.push(Reloc { place, target });
    }

    /// Adds an out range; its destinations follow with [`Builder::dest`].
    pub fn out(&mut self, offset: u32, len: u64, when: OutWhen, actual: OutLen) {
        self.outs.push(Out {
            offset,
            len: len as u32,
            when,
            actual,
        });
    }

    /// Adds a destination of the newest out range.
    pub fn dest(&mut self, addr: u64, len: u64) {
        self.dest_when(addr, len, When::Success, false);
    }

    /// Adds a destination that is not always written, or that need not be there.
    pub fn dest_when(&mut self, addr: u64, len: u64, when: When, quiet: bool) {
        let out = (self.outs.len() - 1) as u32;
        self.dests.push(Dest {
            out,
            addr,
            len: len as u32,
            when,
            quiet,
        });
    }

    /// Overwrites bytes of the image.
    pub fn patch(&mut self, at: u32, bytes: &[u8]) {
        self.image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// Lowers a 32-bit length in the image to `max`.
    pub fn cap_word(&mut self, at: u32, max: u32) {
        let at = at as usize;
        if let Some(word) = self.image.get_mut(at..at + 4)
            && i32::from_le_bytes([word[0], word[1], word[2], word[3]]) > max as i32
        {
            word.copy_from_slice(&max.to_le_bytes());
        }
    }

    /// Bytes used so far.
    pub fn used(&self) -> usize {
        self.image.len() + self.out_space as usize
    }

    /// The state to come back to if something turns out not to fit.
    pub fn mark(&self) -> Mark {
        Mark {
            image: self.image.len(),
            out_space: self.out_space,
            relocs: self.relocs.len(),
            outs: self.outs.len(),
            dests: self.dests.len(),
        }
    }

    /// Forgets what was added since `mark`.
    pub fn rewind(&mut self, mark: Mark) {
        self.image.truncate(mark.image);
        self.out_space = mark.out_space;
        self.relocs.truncate(mark.relocs);
        self.outs.truncate(mark.outs);
        self.dests.truncate(mark.dests);
    }

    /// Reads a block that is not an argument by itself into the image.
    pub fn inner(&mut self, addr: u64, len: u64) -> Option<u32> {
        self.append_from(addr, len, 8)
    }

    /// Fixes all offsets and gives the request.
    pub fn finish(mut self) -> Result<Gathered, GatherError> {
        let base = if self.out_space == 0 {
            self.image.len()
        } else {
            self.image.len().next_multiple_of(self.out_align as usize)
        };
        let space = base + self.out_space as usize;
        if space > SLOT_DATA_LEN {
            return Err(GatherError::GoHome(HomeReason::TooBig));
        }
        let settle = |at: &mut u32| {
            if *at & OUT_ZONE != 0 {
                *at = (*at & !OUT_ZONE) + base as u32;
            }
        };
        for reloc in &mut self.relocs {
            if let Target::Data(at) = &mut reloc.target {
                settle(at);
            }
        }
        for out in &mut self.outs {
            settle(&mut out.offset);
            if let OutLen::Word32 { at } | OutLen::Word64 { at } = &mut out.actual {
                settle(at);
            }
        }
        let request = CallRequest {
            nr: self.nr,
            blocking: self.call.blocking,
            args: self.args,
            image: self.image,
            space: space as u32,
            relocs: self.relocs,
            outs: self.outs,
        };
        Ok(Gathered {
            request,
            temp_mask: self.temp_mask,
            dests: self.dests,
        })
    }
}
