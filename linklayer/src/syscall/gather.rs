//! Copying the arguments of a call out of guest memory, and its results into it.

use super::builder::{Builder, Pointer, body_align, pointer};
use super::kind::{Actual, Blocking, Buf, Dir, Disposition, HomeReason, Kind, Scalar, Size, When};
use super::request::{CallRequest, Malformed, OutLen, OutWhen, Place, Reply, SLOT_DATA_LEN, Target};
use super::resolve;
use super::transfer::Transfer;
use super::vector::{MAX_RW_COUNT, Segment};
use crate::memory::{GuestMemory, USER_END};

/// The most bytes of a body (the data of `read`, `write`, `sendmsg` and their kind) that travel in one call: what a
/// slot holds, less room for an array of `iovec`, names and control data. A whole number of pages.
pub const BODY_MAX: usize = 224 * 1024;

/// `MAX_ARG_STRLEN`, of which a string of `execve` must stay below.
const MAX_ARG_STRLEN: usize = 128 * 1024;
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
    pub(super) dests: Vec<Dest>,
}

/// Where in the guest the bytes of an out range go; several in a row share a range in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dest {
    pub out: u32,
    pub addr: u64,
    pub len: u32,
    pub when: When,
    pub quiet: bool,
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
            let start = out.offset as usize;
            let as_before = self
                .request
                .image
                .get(start..start + bytes.len())
                .is_some_and(|image| image == bytes);
            while let Some(dest) = dests.next_if(|dest| dest.out as usize == index) {
                let (here, rest) = bytes.split_at(bytes.len().min(dest.len as usize));
                bytes = rest;
                // Writing what the kernel has not written could fail where the call did not, or undo what another thread
                // of the guest has done meanwhile.
                let untouched = as_before
                    && match dest.when {
                        When::Changed => true,
                        When::SuccessOrChanged => ret < 0,
                        When::Success | When::Positive | When::Always => false,
                    };
                if !here.is_empty() && !untouched && mem.write(dest.addr, here).is_err() && !dest.quiet {
                    ret = -EFAULT;
                }
            }
        }
        reply.end()?;
        Ok(ret)
    }
}

/// Copies the arguments of a call out of guest memory.
///
/// Works for every disposition except `GoHome`: the handler of a `Split` call uses it for its forwarded half. A call with
/// an address that the row does not describe ([`Scalar::Addr`]) is refused with [`HomeReason::Opaque`], so that no
/// address of the guest can reach the vessel, where it means something else.
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

/// The size of a block, as far as it can be told.
enum Extent {
    Bytes(u64),
    /// The kernel refuses the size before it looks at the pointer.
    Refused,
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
        if matches!(kind, Kind::Val(scalar) if scalar != Scalar::Addr) {
            return Ok(());
        }
        let addr = self.given[index];
        if let Pointer::AsItIs = pointer(addr) {
            return Ok(());
        }
        match kind {
            Kind::Val(_) | Kind::Sub(_) => Err(GatherError::GoHome(HomeReason::Opaque)),
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
        if buf.timeout && self.image[at as usize..].iter().all(|&byte| byte == 0) {
            self.call.blocking = Blocking::Never;
        }
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
                When::Always | When::Changed | When::SuccessOrChanged => OutWhen::Always,
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
            self.dest_when(addr, len, buf.when, buf.quiet);
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
        self.dest(addr, 4);
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
        self.dest(list, len);
    }
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
