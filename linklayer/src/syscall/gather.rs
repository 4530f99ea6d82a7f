//! Copying the arguments of a call out of guest memory, and its results into it.

use super::kind::{Actual, Buf, Dir, Disposition, HomeReason, Kind, Size, When};
use super::request::{
    CallRequest, Malformed, Out, OutLen, OutWhen, Place, Reloc, Reply, SLOT_DATA_LEN, Target,
};
use super::transfer::Transfer;
use super::{Call, resolve};
use crate::memory::{GuestMemory, LOW_END, USER_END};

/// The most bytes of a body (the data of `read`, `write`, `sendmsg` and their kind) that travel in one call: what a
/// slot holds, less room for an array of `iovec`, names and control data. A whole number of pages.
pub const BODY_MAX: usize = 224 * 1024;

/// `MAX_RW_COUNT`: the kernel transfers no more in one call.
pub(super) const MAX_RW_COUNT: u64 = 0x7fff_f000;
/// `UIO_MAXIOV`.
pub(super) const MAX_IOV: u64 = 1024;
/// `MAX_ARG_STRLEN`, of which a string of `execve` must stay below.
const MAX_ARG_STRLEN: usize = 128 * 1024;
/// Marks an offset in the part of the data area behind the image while the image's length is not known yet.
const OUT_ZONE: u32 = 1 << 30;
const EFAULT: i64 = 14;

/// Why a call is not forwarded in one request.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// The body is larger than a message: several calls transfer it.
    #[error("the body is transferred in parts")]
    TooBig(Box<Transfer>),
    /// The process goes home and makes the call there.
    #[error("the process goes home: {}", .0.text())]
    GoHome(HomeReason),
}

/// A call whose arguments have been copied out of guest memory.
#[derive(Debug)]
pub struct Gathered {
    /// What is to be sent.
    pub request: CallRequest,
    /// The signal mask that is to hold while the call waits (`ppoll`, `pselect6`, `epoll_pwait`). The request does
    /// not contain it.
    pub temp_mask: Option<u64>,
    dests: Vec<Dest>,
}

/// Where in the guest the bytes of an out range go; several in a row share a range in order.
#[derive(Debug, Clone, Copy)]
struct Dest {
    out: u32,
    addr: u64,
    len: u32,
    quiet: bool,
}

impl Gathered {
    /// A call of our own that has no destinations in the guest.
    pub(super) fn internal(request: CallRequest) -> Gathered {
        Gathered {
            request,
            temp_mask: None,
            dests: Vec::new(),
        }
    }

    /// Takes the control data from a `sendmsg`: it has gone with the first part.
    pub(super) fn drop_control(&mut self) {
        const CONTROL_AT: u32 = 32;
        let header = self
            .request
            .relocs
            .iter()
            .find_map(|reloc| match (reloc.place, reloc.target) {
                (Place::Arg(1), Target::Data(at)) => Some(at),
                _ => None,
            });
        if let Some(header) = header {
            let control = (header + CONTROL_AT) as usize;
            self.request
                .relocs
                .retain(|reloc| reloc.place != Place::Image(header + CONTROL_AT));
            if let Some(fields) = self.request.image.get_mut(control..control + 16) {
                fields.fill(0);
            }
        }
    }

    /// Puts the results into guest memory and gives the call's result: the reply's, or `-EFAULT` where a result found
    /// no place. A reply that does not fit the request may have been written in part.
    pub fn scatter(&self, mut reply: Reply<'_>, mem: &dyn GuestMemory) -> Result<i64, Malformed> {
        let mut ret = reply.ret;
        let mut dests = self.dests.iter().peekable();
        for (index, out) in self.request.outs.iter().enumerate() {
            let mut bytes = reply.next_out()?;
            if bytes.len() > out.len as usize {
                return Err(Malformed::Offset);
            }
            while let Some(dest) = dests.next_if(|dest| dest.out as usize == index) {
                let (here, rest) = bytes.split_at(bytes.len().min(dest.len as usize));
                bytes = rest;
                if !here.is_empty() && mem.write(dest.addr, here).is_err() && !dest.quiet {
                    ret = -EFAULT;
                }
            }
        }
        reply.end()?;
        Ok(ret)
    }
}

/// A part of a body in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub addr: u64,
    pub len: u64,
}

/// Copies the arguments of a call out of guest memory.
///
/// Works for every disposition except `GoHome`: the handler of a `Split` call uses it for its forwarded half.
pub fn gather(nr: u32, args: &[u64; 6], mem: &dyn GuestMemory) -> Result<Gathered, GatherError> {
    gather_part(nr, args, mem, None)
}

/// As [`gather`]; with `part`, the bodies of an `iovec` or `msghdr` are these segments instead of its own.
pub(super) fn gather_part(
    nr: u32,
    args: &[u64; 6],
    mem: &dyn GuestMemory,
    part: Option<&[Segment]>,
) -> Result<Gathered, GatherError> {
    let call = resolve(nr, args);
    if let Disposition::GoHome(reason) = call.disposition {
        return Err(GatherError::GoHome(reason));
    }
    let mut builder = Builder {
        mem,
        nr,
        given: *args,
        call,
        part,
        args: *args,
        image: Vec::new(),
        out_space: 0,
        out_align: 16,
        relocs: Vec::new(),
        outs: Vec::new(),
        dests: Vec::new(),
        at: [None; 6],
        temp_mask: None,
    };
    builder.all()?;
    builder.finish()
}

/// A request under construction.
pub(super) struct Builder<'m> {
    pub mem: &'m dyn GuestMemory,
    pub nr: u32,
    /// The registers as the guest gave them.
    pub given: [u64; 6],
    call: Call,
    pub part: Option<&'m [Segment]>,
    /// The registers as they will be sent.
    pub args: [u64; 6],
    image: Vec<u8>,
    out_space: u32,
    out_align: u32,
    relocs: Vec<Reloc>,
    outs: Vec<Out>,
    dests: Vec<Dest>,
    /// Offsets of the blocks behind the arguments.
    at: [Option<u32>; 6],
    temp_mask: Option<u64>,
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

/// The size of a block, as far as it can be told.
enum Extent {
    Bytes(u64),
    /// The kernel refuses the size before it looks at the pointer.
    Refused,
}

/// Direct I/O needs buffers that are aligned as the guest's are.
fn body_align(addr: u64, len: u64) -> u32 {
    match addr | len {
        both if both % 4096 == 0 => 4096,
        both if both % 512 == 0 => 512,
        _ => 8,
    }
}

impl Builder<'_> {
    fn all(&mut self) -> Result<(), GatherError> {
        let declared = self.call.kinds;
        // A block whose size is in a length word comes after that word.
        for late in [false, true] {
            for (index, kind) in declared.iter().enumerate() {
                let is_late = matches!(
                    kind,
                    Some(Kind::Buf(Buf {
                        size: Size::Word(..),
                        ..
                    }))
                );
                match kind {
                    Some(kind) if is_late == late => self.one(index, *kind)?,
                    None if !self.call.raw_rest => self.args[index] = 0,
                    _ => (),
                }
            }
        }
        Ok(())
    }

    fn one(&mut self, index: usize, kind: Kind) -> Result<(), GatherError> {
        if matches!(kind, Kind::Val(_)) {
            return Ok(());
        }
        let addr = self.given[index];
        if let Pointer::AsItIs = pointer(addr) {
            return Ok(());
        }
        match kind {
            Kind::Val(_) | Kind::Sub(_) => Ok(()),
            Kind::Str(max) => {
                let text = self.mem.read_string(addr, max as usize).ok();
                let at = text.map(|text| self.append(&text, 1));
                self.point(Place::Arg(index as u8), at);
                Ok(())
            }
            Kind::Buf(buf) => self.block(index, buf, addr),
            Kind::StrArray => self.strings(index, addr),
            Kind::Iovec { count, dir } => {
                let count = self.value(count);
                let at = self.iovec(addr, count as u64, dir)?;
                self.point(Place::Arg(index as u8), at);
                Ok(())
            }
            Kind::Msg(dir) => {
                let at = self.message(addr, dir)?;
                self.point(Place::Arg(index as u8), at);
                Ok(())
            }
            Kind::Mmsg { count, dir } => self.messages(index, count, dir),
            Kind::TempMask { size } => {
                let mask = (self.given[usize::from(size)] == 8)
                    .then(|| self.mem.read_u64(addr).ok())
                    .flatten();
                match mask {
                    Some(mask) => {
                        self.temp_mask = Some(mask);
                        self.args[index] = 0;
                    }
                    None => self.point(Place::Arg(index as u8), None),
                }
                Ok(())
            }
            Kind::TempMaskPair => {
                self.mask_pair(index, addr);
                Ok(())
            }
            Kind::MqNotify => {
                self.mq_notify(index, addr);
                Ok(())
            }
            Kind::Ifconf => {
                self.ifconf(index, addr);
                Ok(())
            }
        }
    }

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
    fn append_from(&mut self, addr: u64, len: u64, align: u32) -> Option<u32> {
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
    pub fn dest(&mut self, addr: u64, len: u64, quiet: bool) {
        self.dests.push(Dest {
            out: (self.outs.len() - 1) as u32,
            addr,
            len: len as u32,
            quiet,
        });
    }

    /// Changes eight bytes of the image.
    pub fn patch(&mut self, at: u32, bytes: &[u8]) {
        self.image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn cap_word(&mut self, at: u32, max: u32) {
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

    fn extent(&mut self, size: Size, addr: u64) -> Extent {
        let arg = |this: &Self, index: u8| u64::try_from(this.value(index)).ok();
        let bytes = match size {
            Size::Fixed(len) => Some(u64::from(len)),
            Size::Arg(index) | Size::Stream(index) => arg(self, index),
            Size::Clamp(index, max) => arg(self, index).map(|len| {
                if len > u64::from(max) {
                    self.args[usize::from(index)] = u64::from(max);
                }
                len.min(u64::from(max))
            }),
            Size::Limit(index, max) => arg(self, index).map(|len| len.min(u64::from(max))),
            Size::Plus(index, more) => arg(self, index).map(|len| len.saturating_add(u64::from(more))),
            Size::Count(index, scale) => arg(self, index).map(|n| n.saturating_mul(u64::from(scale))),
            Size::ClampCount(index, scale) => arg(self, index).map(|n| {
                let max = BODY_MAX as u64 / u64::from(scale);
                if n > max {
                    self.args[usize::from(index)] = max;
                }
                n.min(max) * u64::from(scale)
            }),
            Size::FdSet(index) => arg(self, index).map(|n| n.div_ceil(64) * 8),
            Size::Word(index, max) => match self.mem.read_u32(self.given[usize::from(index)]) {
                Ok(word) => u64::try_from(word as i32).ok().map(|len| len.min(u64::from(max))),
                Err(_) => None,
            },
            Size::Head { plus, min, max } => match self.mem.read_u32(addr) {
                Ok(word) => Some(
                    u64::from(word)
                        .saturating_add(u64::from(plus))
                        .clamp(min.into(), max.into()),
                ),
                Err(_) => None,
            },
            Size::CapData(header) => match self.mem.read_u32(self.given[usize::from(header)]) {
                Ok(0x1998_0330) => Some(12),
                Ok(0x2007_1026 | 0x2008_0522) => Some(24),
                _ => None,
            },
        };
        bytes.map_or(Extent::Refused, Extent::Bytes)
    }

    fn block(&mut self, index: usize, buf: Buf, addr: u64) -> Result<(), GatherError> {
        let place = Place::Arg(index as u8);
        let mut len = match self.extent(buf.size, addr) {
            Extent::Bytes(len) => len,
            Extent::Refused => {
                self.point(place, None);
                return Ok(());
            }
        };
        if let Size::Stream(_) = buf.size {
            if matches!(self.nr, libc_nr::SENDTO | libc_nr::RECVFROM) {
                len = len.min(MAX_RW_COUNT);
            }
            if addr.checked_add(len).is_none_or(|end| end > USER_END) {
                // access_ok() fails on the range as a whole, before anything is looked at.
                self.args[index] = USER_END;
                return Ok(());
            }
            if len > BODY_MAX as u64 {
                return Err(GatherError::TooBig(Box::new(Transfer::new(
                    self.nr, self.given, self.mem,
                )?)));
            }
        }
        if len > BODY_MAX as u64 {
            return Err(GatherError::GoHome(HomeReason::TooBig));
        }
        if len == 0 {
            self.at[index] = Some(0);
            self.point(place, Some(0));
            return Ok(());
        }
        // The kernel copies a structure as a whole. Of a longer body it would have transferred what it could.
        let divisible = !matches!(buf.size, Size::Fixed(_) | Size::Head { .. } | Size::CapData(_));
        if buf.dir != Dir::In && buf.early && !self.mem.writable(addr, len) {
            if divisible && self.mem.writable(addr, 1) {
                return Err(GatherError::GoHome(HomeReason::PartialBuffer));
            }
            self.point(place, None);
            return Ok(());
        }
        let align = if let Size::Stream(_) = buf.size {
            body_align(addr, len)
        } else {
            8
        };
        let at = match buf.dir {
            Dir::Out => self.reserve(len, align)?,
            Dir::In | Dir::InOut => match self.append_from(addr, len, align) {
                Some(at) => at,
                None if matches!(buf.size, Size::Stream(_)) && self.mem.readable(addr, 1) => {
                    return Err(GatherError::GoHome(HomeReason::PartialBuffer));
                }
                None => {
                    self.point(place, None);
                    return Ok(());
                }
            },
        };
        self.at[index] = Some(at);
        self.point(place, Some(at));
        if let Size::Word(word, max) = buf.size
            && let Some(word) = self.at[usize::from(word)]
        {
            // The kernel must not believe that there is more room than has been made.
            self.cap_word(word, max);
        }
        if buf.dir != Dir::In {
            let when = match buf.when {
                When::Success => OutWhen::Success,
                When::Positive => OutWhen::Positive,
                When::Always => OutWhen::Always,
            };
            let actual = match (buf.actual, buf.size) {
                (Actual::Ret { scale, plus }, _) => OutLen::Ret {
                    scale: scale as u16,
                    plus,
                },
                (Actual::Word, Size::Word(word, _)) => match self.at[usize::from(word)] {
                    Some(at) => OutLen::Word32 { at },
                    None => OutLen::Whole,
                },
                // A structure that begins with its own length.
                (Actual::Word, _) => OutLen::Word32 { at },
                (Actual::Whole, _) => OutLen::Whole,
            };
            self.out(at, len, when, actual);
            self.dest(addr, len, buf.quiet);
        }
        Ok(())
    }

    fn strings(&mut self, index: usize, addr: u64) -> Result<(), GatherError> {
        let mut pointers = Vec::new();
        let mut at = addr;
        loop {
            match self.mem.read_u64(at) {
                Ok(0) => break,
                Ok(pointer) if pointers.len() < SLOT_DATA_LEN / 9 => pointers.push(pointer),
                Ok(_) => return Err(GatherError::GoHome(HomeReason::TooBig)),
                Err(_) => {
                    self.point(Place::Arg(index as u8), None);
                    return Ok(());
                }
            }
            at += 8;
        }
        let mut offsets = Vec::with_capacity(pointers.len());
        for &string in &pointers {
            let offset = match self.mem.read_string(string, MAX_ARG_STRLEN) {
                Ok(text) => {
                    if text.len() == MAX_ARG_STRLEN || self.used() + text.len() > SLOT_DATA_LEN {
                        return Err(GatherError::GoHome(HomeReason::TooBig));
                    }
                    Some(self.append(&text, 1))
                }
                Err(_) => None,
            };
            offsets.push(offset);
        }
        let array = self.append(&vec![0; (pointers.len() + 1) * 8], 8);
        for (slot, offset) in offsets.into_iter().enumerate() {
            self.point(Place::Image(array + 8 * slot as u32), offset);
        }
        self.point(Place::Arg(index as u8), Some(array));
        Ok(())
    }

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
            self.dest(segment.addr, segment.len, false);
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

    fn mask_pair(&mut self, index: usize, addr: u64) {
        let place = Place::Arg(index as u8);
        let (Ok(mask), Ok(size)) = (self.mem.read_u64(addr), self.mem.read_u64(addr.wrapping_add(8))) else {
            self.point(place, None);
            return;
        };
        if mask == 0 {
            self.args[index] = 0;
            return;
        }
        if size == 8
            && let Ok(value) = self.mem.read_u64(mask)
        {
            self.temp_mask = Some(value);
            self.args[index] = 0;
            return;
        }
        let pair = self.append(&[0; 16], 8);
        self.patch(pair + 8, &size.to_le_bytes());
        self.point(Place::Image(pair), None);
        self.point(place, Some(pair));
    }

    fn mq_notify(&mut self, index: usize, addr: u64) {
        const SIGEV_THREAD: u32 = 2;
        const COOKIE_LEN: u64 = 32;
        let Some(event) = self.append_from(addr, 64, 8) else {
            self.point(Place::Arg(index as u8), None);
            return;
        };
        self.point(Place::Arg(index as u8), Some(event));
        let value = self.mem.read_u64(addr).unwrap_or(0);
        let notify = self.mem.read_u32(addr + 12).unwrap_or(0);
        if notify == SIGEV_THREAD
            && let Pointer::Follow = pointer(value)
        {
            let cookie = self.append_from(value, COOKIE_LEN, 8);
            self.point(Place::Image(event), cookie);
        }
    }

    fn ifconf(&mut self, index: usize, addr: u64) {
        let Some(conf) = self.append_from(addr, 16, 8) else {
            self.point(Place::Arg(index as u8), None);
            return;
        };
        self.point(Place::Arg(index as u8), Some(conf));
        self.out(conf, 4, OutWhen::Success, OutLen::Whole);
        self.dest(addr, 4, false);
        let len = self.mem.read_u32(addr).unwrap_or(0) as i32;
        let list = self.mem.read_u64(addr + 8).unwrap_or(0);
        if let Pointer::AsItIs = pointer(list) {
            return;
        }
        let len = u64::try_from(len).unwrap_or(0).min(BODY_MAX as u64 / 2);
        self.patch(conf, &(len as u32).to_le_bytes());
        let Ok(at) = self.reserve(len, 8) else { return };
        self.point(Place::Image(conf + 8), Some(at));
        self.out(at, len, OutWhen::Success, OutLen::Word32 { at: conf });
        self.dest(list, len, false);
    }

    /// Reads a block that is not an argument by itself into the image.
    pub fn inner(&mut self, addr: u64, len: u64) -> Option<u32> {
        self.append_from(addr, len, 8)
    }

    fn finish(mut self) -> Result<Gathered, GatherError> {
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

/// See [`Builder::mark`].
pub(super) struct Mark {
    image: usize,
    out_space: u32,
    relocs: usize,
    outs: usize,
    dests: usize,
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

/// Numbers of calls that are named here.
pub(super) mod libc_nr {
    pub const READ: u32 = 0;
    pub const WRITE: u32 = 1;
    pub const FSTAT: u32 = 5;
    pub const PREAD64: u32 = 17;
    pub const PWRITE64: u32 = 18;
    pub const READV: u32 = 19;
    pub const WRITEV: u32 = 20;
    pub const SENDTO: u32 = 44;
    pub const RECVFROM: u32 = 45;
    pub const SENDMSG: u32 = 46;
    pub const RECVMSG: u32 = 47;
    pub const GETSOCKOPT: u32 = 55;
    pub const PREADV: u32 = 295;
    pub const PWRITEV: u32 = 296;
    pub const PREADV2: u32 = 327;
    pub const PWRITEV2: u32 = 328;
}
