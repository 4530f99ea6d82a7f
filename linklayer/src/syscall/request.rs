//! A forwarded call on its way: what the supervisor sends, and how the deputy lays it out in a slot.
//!
//! All knowledge about system calls is on the supervisor's side. The deputy copies an image into the slot's data
//! area, turns offsets into addresses, and afterwards copies ranges back. It believes nothing: every offset is
//! checked against the area when the request is parsed.

use super::kind::Blocking;
use crate::memory::HOLE;

/// Bytes of a slot's data area: what one call can carry.
pub const SLOT_DATA_LEN: usize = 252 * 1024;

/// Size of the fixed part of an encoded request in bytes.
const HEAD_LEN: usize = 72;
const RELOC_LEN: usize = 8;
const OUT_LEN: usize = 16;
/// An out range for each of 1024 messages and then some; more is not produced by [`super::gather`].
const MAX_OUTS: usize = 8192;
/// Arguments, `iovec` bases, and strings of an `execve`, of which each takes at least eight bytes of the image.
const MAX_RELOCS: usize = 6 + SLOT_DATA_LEN / 8;
const ARG_FLAG: u32 = 1 << 31;
const HOLE_TARGET: u32 = u32::MAX;
/// Out ranges up to this length are cleared before the call, so that nothing of an earlier call shows.
const CLEARED_LEN: u32 = 4096;

/// A request or a reply that no correct peer sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It ends before it should, or has bytes behind its end.
    #[error("the length of a forwarded call does not fit its content")]
    Length,
    /// A range or an offset leaves the area.
    #[error("an offset of a forwarded call is out of range")]
    Offset,
    /// A field has a value that means nothing.
    #[error("a field of a forwarded call has no meaning")]
    Field,
}

/// Where an address must be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Into an argument register, 0 to 5.
    Arg(u8),
    /// Into eight bytes of the image at this offset.
    Image(u32),
}

/// What address that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The one of this offset in the data area.
    Data(u32),
    /// One that the kernel cannot access ([`HOLE`]): the guest's own pointer was bad.
    Hole,
}

/// An address to be filled in by the deputy, who alone knows where the slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reloc {
    /// Where it goes.
    pub place: Place,
    /// What it points to.
    pub target: Target,
}

/// Whether a range is copied back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutWhen {
    /// If the result is not negative.
    Success,
    /// If the result is above zero.
    Positive,
    /// In any case.
    Always,
    /// If the result is above this number (message `n` of a `recvmmsg`).
    Above(u16),
}

/// How much of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutLen {
    /// All.
    Whole,
    /// The result times `scale` plus `plus`, at most all.
    Ret {
        /// Bytes per unit of the result, 1 to 65535.
        scale: u16,
        /// Bytes in front of them.
        plus: u32,
    },
    /// What the 32-bit word at offset `at` of the data area says, at most all.
    Word32 {
        /// Offset of the word.
        at: u32,
    },
    /// As `Word32`, with a 64-bit word.
    Word64 {
        /// Offset of the word.
        at: u32,
    },
}

/// A range of the data area that is copied back after the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Out {
    /// Offset in the data area.
    pub offset: u32,
    /// Its capacity.
    pub len: u32,
    /// Whether it is copied back.
    pub when: OutWhen,
    /// How much of it is.
    pub actual: OutLen,
}

/// One call, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallRequest {
    /// Number of the call.
    pub nr: u32,
    /// How long it may take: a hint.
    pub blocking: Blocking,
    /// The registers; those named by a [`Reloc`] are replaced.
    pub args: [u64; 6],
    /// What the first bytes of the data area must be.
    pub image: Vec<u8>,
    /// How many bytes of the data area the call uses, the image included.
    pub space: u32,
    /// Addresses to fill in.
    pub relocs: Vec<Reloc>,
    /// Ranges to copy back.
    pub outs: Vec<Out>,
}

impl CallRequest {
    /// A call without any memory behind its arguments.
    pub fn plain(nr: u32, args: [u64; 6]) -> CallRequest {
        CallRequest {
            nr,
            blocking: Blocking::Never,
            args,
            image: Vec::new(),
            space: 0,
            relocs: Vec::new(),
            outs: Vec::new(),
        }
    }

    /// Number of bytes that [`CallRequest::encode`] appends.
    pub fn encoded_len(&self) -> usize {
        HEAD_LEN + self.relocs.len() * RELOC_LEN + self.outs.len() * OUT_LEN + self.image.len()
    }

    /// Appends the request to `to`, little-endian, the image last.
    pub fn encode(&self, to: &mut Vec<u8>) {
        to.reserve(self.encoded_len());
        to.extend_from_slice(&self.nr.to_le_bytes());
        to.extend_from_slice(&[self.blocking as u8, 0, 0, 0]);
        to.extend_from_slice(&(self.relocs.len() as u32).to_le_bytes());
        to.extend_from_slice(&(self.outs.len() as u32).to_le_bytes());
        to.extend_from_slice(&(self.image.len() as u32).to_le_bytes());
        to.extend_from_slice(&self.space.to_le_bytes());
        for arg in self.args {
            to.extend_from_slice(&arg.to_le_bytes());
        }
        for reloc in &self.relocs {
            let place = match reloc.place {
                Place::Arg(index) => ARG_FLAG | u32::from(index),
                Place::Image(offset) => offset,
            };
            let target = match reloc.target {
                Target::Data(offset) => offset,
                Target::Hole => HOLE_TARGET,
            };
            to.extend_from_slice(&place.to_le_bytes());
            to.extend_from_slice(&target.to_le_bytes());
        }
        for out in &self.outs {
            let (when, index) = match out.when {
                OutWhen::Success => (0u8, 0u16),
                OutWhen::Positive => (1, 0),
                OutWhen::Always => (2, 0),
                OutWhen::Above(index) => (3, index),
            };
            let (actual, scale, word) = match out.actual {
                OutLen::Whole => (0u8, 0u16, 0u32),
                OutLen::Ret { scale, plus } => (1, scale, plus),
                OutLen::Word32 { at } => (2, 0, at),
                OutLen::Word64 { at } => (3, 0, at),
            };
            to.extend_from_slice(&out.offset.to_le_bytes());
            to.extend_from_slice(&out.len.to_le_bytes());
            // An index is needed by `Above` only and a scale by `Ret` only; the two are never combined.
            to.extend_from_slice(&[when, actual]);
            to.extend_from_slice(&(index | scale).to_le_bytes());
            to.extend_from_slice(&word.to_le_bytes());
        }
        to.extend_from_slice(&self.image);
    }

    /// The request as the deputy sees it. Fails only on a request that [`super::gather`] does not make.
    pub fn decode(bytes: &[u8]) -> Result<CallRequest, Malformed> {
        let view = CallView::parse(bytes)?;
        Ok(CallRequest {
            nr: view.nr,
            blocking: view.blocking,
            args: view.args,
            image: view.image.to_vec(),
            space: view.space,
            relocs: view.relocs().collect(),
            outs: view.outs().collect(),
        })
    }
}

/// A received request, checked: every offset in it lies within the data area.
#[derive(Clone, Copy, Debug)]
pub struct CallView<'a> {
    /// Number of the call. The deputy decides whether it lets the vessel make it.
    pub nr: u32,
    /// How long it may take: a hint from the other side.
    pub blocking: Blocking,
    /// The registers before relocation.
    pub args: [u64; 6],
    /// Bytes of the data area that the call uses, at most [`SLOT_DATA_LEN`].
    pub space: u32,
    image: &'a [u8],
    relocs: &'a [u8],
    outs: &'a [u8],
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn parse_reloc(record: &[u8]) -> Reloc {
    let place = u32_at(record, 0);
    let target = u32_at(record, 4);
    Reloc {
        place: if place & ARG_FLAG != 0 {
            Place::Arg(place as u8)
        } else {
            Place::Image(place)
        },
        target: if target == HOLE_TARGET {
            Target::Hole
        } else {
            Target::Data(target)
        },
    }
}

fn parse_out(record: &[u8]) -> Option<Out> {
    let index = u16::from_le_bytes([record[10], record[11]]);
    let word = u32_at(record, 12);
    let when = match record[8] {
        0 => OutWhen::Success,
        1 => OutWhen::Positive,
        2 => OutWhen::Always,
        3 => OutWhen::Above(index),
        _ => return None,
    };
    let actual = match record[9] {
        0 => OutLen::Whole,
        1 if !matches!(when, OutWhen::Above(_)) => OutLen::Ret {
            scale: index,
            plus: word,
        },
        2 => OutLen::Word32 { at: word },
        3 => OutLen::Word64 { at: word },
        _ => return None,
    };
    Some(Out {
        offset: u32_at(record, 0),
        len: u32_at(record, 4),
        when,
        actual,
    })
}

impl<'a> CallView<'a> {
    /// Parses and checks a whole request.
    pub fn parse(bytes: &'a [u8]) -> Result<CallView<'a>, Malformed> {
        let (head, rest) = bytes.split_at_checked(HEAD_LEN).ok_or(Malformed::Length)?;
        let blocking = Blocking::from_number(head[4]).ok_or(Malformed::Field)?;
        if head[5..8] != [0; 3] {
            return Err(Malformed::Field);
        }
        let relocs = u32_at(head, 8) as usize;
        let outs = u32_at(head, 12) as usize;
        let image = u32_at(head, 16) as usize;
        let space = u32_at(head, 20);
        if relocs > MAX_RELOCS || outs > MAX_OUTS || space as usize > SLOT_DATA_LEN || image > space as usize
        {
            return Err(Malformed::Offset);
        }
        if rest.len() != relocs * RELOC_LEN + outs * OUT_LEN + image {
            return Err(Malformed::Length);
        }
        let (relocs, rest) = rest.split_at(relocs * RELOC_LEN);
        let (outs, image) = rest.split_at(outs * OUT_LEN);
        let mut args = [0; 6];
        for (index, arg) in args.iter_mut().enumerate() {
            *arg = u64_at(head, 24 + 8 * index);
        }
        let view = CallView {
            nr: u32_at(head, 0),
            blocking,
            args,
            space,
            image,
            relocs,
            outs,
        };
        view.check()?;
        Ok(view)
    }

    fn check(&self) -> Result<(), Malformed> {
        let within = |offset: u32, len: u32| u64::from(offset) + u64::from(len) <= u64::from(self.space);
        for record in self.relocs.chunks_exact(RELOC_LEN) {
            let place = u32_at(record, 0);
            let reloc = parse_reloc(record);
            match reloc.place {
                Place::Arg(_) if place & !ARG_FLAG > 5 => return Err(Malformed::Offset),
                Place::Image(offset) if offset as usize + 8 > self.image.len() => {
                    return Err(Malformed::Offset);
                }
                _ => (),
            }
            if let Target::Data(offset) = reloc.target
                && !within(offset, 0)
            {
                return Err(Malformed::Offset);
            }
        }
        for record in self.outs.chunks_exact(OUT_LEN) {
            let out = parse_out(record).ok_or(Malformed::Field)?;
            let word_ok = match out.actual {
                OutLen::Word32 { at } => within(at, 4),
                OutLen::Word64 { at } => within(at, 8),
                OutLen::Whole | OutLen::Ret { .. } => true,
            };
            if !within(out.offset, out.len) || !word_ok {
                return Err(Malformed::Offset);
            }
        }
        Ok(())
    }

    /// What the first bytes of the data area must be.
    pub fn image(&self) -> &'a [u8] {
        self.image
    }

    /// The addresses to fill in.
    pub fn relocs(&self) -> impl Iterator<Item = Reloc> + use<'a> {
        self.relocs.chunks_exact(RELOC_LEN).map(parse_reloc)
    }

    /// The ranges to copy back.
    pub fn outs(&self) -> impl Iterator<Item = Out> + use<'a> {
        self.outs.chunks_exact(OUT_LEN).filter_map(parse_out)
    }
}

/// The data area of a slot, which is shared with its vessel: bytes are copied into it and out of it, and nobody has a reference
/// to them. Both do nothing for what is beyond the area's end.
pub trait Area {
    /// Copies bytes into the area.
    fn write(&self, at: usize, bytes: &[u8]);
    /// Copies bytes out of the area.
    fn read(&self, at: usize, bytes: &mut [u8]);
}

/// Lays the call out in a slot's data area, which the vessel sees at address `base` and which has at least the call's `space`
/// bytes. Returns the registers. Nothing behind that space is touched.
pub fn place(call: &CallView<'_>, area: &impl Area, base: u64) -> [u64; 6] {
    const ZEROES: [u8; CLEARED_LEN as usize] = [0; CLEARED_LEN as usize];
    area.write(0, call.image);
    for out in call.outs() {
        if out.offset as usize >= call.image.len() && out.len <= CLEARED_LEN {
            area.write(out.offset as usize, &ZEROES[..out.len as usize]);
        }
    }
    let mut args = call.args;
    for reloc in call.relocs() {
        let address = match reloc.target {
            Target::Data(offset) => base.wrapping_add(u64::from(offset)),
            Target::Hole => HOLE,
        };
        match reloc.place {
            Place::Arg(index) => args[usize::from(index)] = address,
            Place::Image(offset) => area.write(offset as usize, &address.to_le_bytes()),
        }
    }
    args
}

/// Appends the reply to `to`: the result, then for each out range its actual length and that many bytes of the area.
///
/// The vessel's other threads share the slot's memory with us, so that a length word is whatever it is at the moment
/// it is read; it is bounded by the range that the request named.
pub fn collect(call: &CallView<'_>, area: &impl Area, ret: i64, to: &mut Vec<u8>) {
    to.extend_from_slice(&ret.to_le_bytes());
    for out in call.outs() {
        let written = match out.when {
            OutWhen::Success => ret >= 0,
            OutWhen::Positive => ret > 0,
            OutWhen::Always => true,
            OutWhen::Above(index) => ret > i64::from(index),
        };
        let len = match out.actual {
            _ if !written => 0,
            OutLen::Whole => u64::from(out.len),
            OutLen::Ret { scale, plus } => match u64::try_from(ret) {
                Ok(units) => units
                    .saturating_mul(u64::from(scale))
                    .saturating_add(u64::from(plus)),
                Err(_) => 0,
            },
            OutLen::Word32 { at } => {
                let mut word = [0; 4];
                area.read(at as usize, &mut word);
                u64::from(u32::from_le_bytes(word))
            }
            OutLen::Word64 { at } => {
                let mut word = [0; 8];
                area.read(at as usize, &mut word);
                u64::from_le_bytes(word)
            }
        };
        let len = len.min(u64::from(out.len)) as usize;
        to.extend_from_slice(&(len as u32).to_le_bytes());
        let start = to.len();
        to.resize(start + len, 0);
        area.read(out.offset as usize, &mut to[start..]);
    }
}

/// A received reply: the result, and the bytes of each out range in the order of the request.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    /// The result register, an errno negated, or a raw restart code (-512 and its kind).
    pub ret: i64,
    outs: &'a [u8],
}

impl<'a> Reply<'a> {
    /// Splits a reply; its out ranges are checked when they are read.
    pub fn parse(bytes: &'a [u8]) -> Result<Reply<'a>, Malformed> {
        let (ret, outs) = bytes.split_at_checked(8).ok_or(Malformed::Length)?;
        Ok(Reply {
            ret: u64_at(ret, 0) as i64,
            outs,
        })
    }

    /// A reply from its two parts, for callers that carry the result elsewhere.
    pub fn from_parts(ret: i64, outs: &'a [u8]) -> Reply<'a> {
        Reply { ret, outs }
    }

    /// The bytes of the out ranges behind the result, still encoded.
    pub fn outs_bytes(&self) -> &'a [u8] {
        self.outs
    }

    /// The next out range.
    pub(super) fn next_out(&mut self) -> Result<&'a [u8], Malformed> {
        let (len, rest) = self.outs.split_at_checked(4).ok_or(Malformed::Length)?;
        let (bytes, rest) = rest
            .split_at_checked(u32_at(len, 0) as usize)
            .ok_or(Malformed::Length)?;
        self.outs = rest;
        Ok(bytes)
    }

    /// Fails if anything is left.
    pub(super) fn end(&self) -> Result<(), Malformed> {
        if self.outs.is_empty() {
            Ok(())
        } else {
            Err(Malformed::Length)
        }
    }
}
