//! `struct msghdr` and `struct mmsghdr`: names, bodies in several parts, and control data.
//!
//! Descriptors in control data (`SCM_RIGHTS`) need no translation: they are descriptors of the vessel on both ends.

use super::builder::{Builder, Pointer, pointer};
use super::gather::{BODY_MAX, GatherError};
use super::kind::{Dir, HomeReason};
use super::request::{OutLen, OutWhen, Place};
use super::transfer::Transfer;
use super::vector::{MAX_IOV, MAX_RW_COUNT, Segment, read_segments};
use crate::memory::USER_END;

const MSGHDR_LEN: u64 = 56;
const MMSGHDR_LEN: u64 = 64;
const NAMELEN_AT: u32 = 8;
const IOV_AT: u32 = 16;
const CONTROL_AT: u32 = 32;
const CONTROLLEN_AT: u32 = 40;
const MSG_LEN_AT: u32 = 56;
/// `sizeof(struct sockaddr_storage)`: the kernel touches no more of a name.
const NAME_MAX: u64 = 128;
/// The most control data that is received in one message. `SCM_MAX_FD` descriptors need 1 KiB.
const CONTROL_RECV_MAX: u64 = 16 * 1024;
/// The most that is sent: above it the process goes home.
const CONTROL_SEND_MAX: u64 = 20 * 1024;
const MSG_DONTWAIT: u64 = 0x40;
const MSG_WAITFORONE: u64 = 0x1_0000;

/// A `msghdr` as read from the guest.
struct Header {
    bytes: [u8; MSGHDR_LEN as usize],
}

impl Header {
    fn word(&self, at: u32) -> u64 {
        let at = at as usize;
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap_or_default())
    }

    fn namelen(&self) -> i32 {
        self.word(NAMELEN_AT) as u32 as i32
    }
}

impl Builder<'_> {
    /// One message at `addr`; gives the offset of its header, `None` for the hole.
    pub fn message(&mut self, addr: u64, dir: Dir) -> Result<Option<u32>, GatherError> {
        let mut header = Header {
            bytes: [0; MSGHDR_LEN as usize],
        };
        if self.mem.read(addr, &mut header.bytes).is_err() {
            return Ok(None);
        }
        let iov = header.word(IOV_AT);
        let count = header.word(IOV_AT + 8);
        let bodies = self.message_bodies(iov, count)?;
        if let Bodies::Listed(segments) = &bodies {
            let total: u64 = segments.iter().map(|s| s.len).sum();
            if total > BODY_MAX as u64 {
                return Err(GatherError::TooBig(Box::new(Transfer::new(
                    self.nr, self.given, self.mem,
                )?)));
            }
        }
        let at = self.append(&header.bytes, 8);
        let actual = OutLen::Ret { scale: 1, plus: 0 };
        self.message_at(&header, at, dir, &bodies, OutWhen::Success, actual)?;
        if dir != Dir::In {
            self.out(at + NAMELEN_AT, 4, OutWhen::Success, OutLen::Whole);
            self.dest(addr + u64::from(NAMELEN_AT), 4);
            self.out(at + CONTROLLEN_AT, 12, OutWhen::Success, OutLen::Whole);
            self.dest(addr + u64::from(CONTROLLEN_AT), 12);
        }
        Ok(Some(at))
    }

    fn message_bodies(&mut self, iov: u64, count: u64) -> Result<Bodies, GatherError> {
        if let Some(part) = self.part {
            return Ok(Bodies::Listed(part.to_vec()));
        }
        if count > MAX_IOV {
            return Ok(Bodies::Refused);
        }
        if let Pointer::AsItIs = pointer(iov) {
            return Ok(if count == 0 {
                Bodies::Listed(Vec::new())
            } else {
                Bodies::AsItIs
            });
        }
        let Some(segments) = read_segments(self.mem, iov, count) else {
            return Ok(Bodies::Refused);
        };
        let sound = |s: &Segment| s.addr.checked_add(s.len).is_some_and(|end| end <= USER_END);
        if let Some(bad) = segments.iter().find(|s| !sound(s)) {
            // EINVAL for a length below zero comes before EFAULT for an address; both before any effect.
            let negative = segments.iter().any(|s| s.len > i64::MAX as u64);
            return Ok(Bodies::Bad(if negative {
                Segment {
                    addr: 0,
                    len: u64::MAX,
                }
            } else {
                *bad
            }));
        }
        let mut room = MAX_RW_COUNT;
        Ok(Bodies::Listed(
            segments
                .into_iter()
                .map(|s| {
                    let len = s.len.min(room);
                    room -= len;
                    Segment { addr: s.addr, len }
                })
                .collect(),
        ))
    }

    /// Everything behind a header that has been copied to `at`.
    #[allow(clippy::too_many_arguments)] // each is a part of one message; a struct would be used once
    fn message_at(
        &mut self,
        header: &Header,
        at: u32,
        dir: Dir,
        bodies: &Bodies,
        when: OutWhen,
        actual: OutLen,
    ) -> Result<(), GatherError> {
        match bodies {
            Bodies::Listed(segments) => {
                let total = segments.iter().map(|s| s.len).sum();
                let start = self.bodies(segments, total, dir, when, actual)?;
                let array = self.iovec_array(segments, start);
                self.point(Place::Image(at + IOV_AT), Some(array));
                self.patch(at + IOV_AT + 8, &(segments.len() as u64).to_le_bytes());
            }
            Bodies::Refused => self.point(Place::Image(at + IOV_AT), None),
            Bodies::AsItIs => (),
            Bodies::Bad(segment) => {
                let entry = self.append(&[0; 16], 8);
                let base = if segment.addr == 0 { 0 } else { USER_END };
                self.patch(entry, &base.to_le_bytes());
                self.patch(entry + 8, &segment.len.to_le_bytes());
                self.point(Place::Image(at + IOV_AT), Some(entry));
                self.patch(at + IOV_AT + 8, &1u64.to_le_bytes());
            }
        }
        self.message_name(header, at, dir, when)?;
        self.message_control(header, at, dir, when)
    }

    fn message_name(&mut self, header: &Header, at: u32, dir: Dir, when: OutWhen) -> Result<(), GatherError> {
        let name = header.word(0);
        if let Pointer::AsItIs = pointer(name) {
            return Ok(());
        }
        let Ok(len) = u64::try_from(header.namelen()) else {
            // EINVAL, before the name is looked at.
            self.point(Place::Image(at), None);
            return Ok(());
        };
        let len = len.min(NAME_MAX);
        if dir == Dir::In {
            let copy = self.inner(name, len);
            self.point(Place::Image(at), copy);
            return Ok(());
        }
        // A name that finds no place is noticed natively when the message is already gone: so it is here.
        let room = self.reserve(len, 8)?;
        self.point(Place::Image(at), Some(room));
        self.out(room, len, when, OutLen::Word32 { at: at + NAMELEN_AT });
        self.dest(name, len);
        Ok(())
    }

    fn message_control(
        &mut self,
        header: &Header,
        at: u32,
        dir: Dir,
        when: OutWhen,
    ) -> Result<(), GatherError> {
        let control = header.word(CONTROL_AT);
        let len = header.word(CONTROLLEN_AT);
        if let Pointer::AsItIs = pointer(control) {
            return Ok(());
        }
        if dir == Dir::In {
            if len > i32::MAX as u64 {
                // ENOBUFS, before the data is looked at.
                self.point(Place::Image(at + CONTROL_AT), None);
                return Ok(());
            }
            if len > CONTROL_SEND_MAX {
                return Err(GatherError::GoHome(HomeReason::TooBig));
            }
            let copy = self.inner(control, len);
            self.point(Place::Image(at + CONTROL_AT), copy);
            return Ok(());
        }
        let len = len.min(CONTROL_RECV_MAX);
        self.patch(at + CONTROLLEN_AT, &len.to_le_bytes());
        // Descriptors would be installed although nobody could learn their numbers: look before.
        if !self.mem.writable(control, len) {
            self.point(Place::Image(at + CONTROL_AT), None);
            return Ok(());
        }
        let room = self.reserve(len, 8)?;
        self.point(Place::Image(at + CONTROL_AT), Some(room));
        self.out(
            room,
            len,
            when,
            OutLen::Word64 {
                at: at + CONTROLLEN_AT,
            },
        );
        self.dest(control, len);
        Ok(())
    }

    /// `sendmmsg` and `recvmmsg`. Where not all messages fit, fewer are sent or asked for, if the call may return
    /// early by its own rules.
    pub fn messages(&mut self, index: usize, count_arg: u8, dir: Dir) -> Result<(), GatherError> {
        let addr = self.given[index];
        let count = (self.value(count_arg) as u64).min(MAX_IOV);
        let flags = self.given[usize::from(count_arg) + 1];
        let place = Place::Arg(index as u8);
        let mut vector = vec![0; (count * MMSGHDR_LEN) as usize];
        if self.mem.read(addr, &mut vector).is_err() {
            self.point(place, None);
            return Ok(());
        }
        let array = self.append(&vector, 8);
        let mut fit = 0;
        while fit < count {
            let mark = self.mark();
            match self.one_of(addr, array, &vector, fit, dir) {
                Ok(true) => fit += 1,
                Ok(false) | Err(GatherError::GoHome(HomeReason::TooBig)) => {
                    self.rewind(mark);
                    break;
                }
                Err(other) => return Err(other),
            }
        }
        let early = dir == Dir::In || flags & (MSG_DONTWAIT | MSG_WAITFORONE) != 0;
        if fit < count {
            if fit == 0 || !early {
                return Err(GatherError::GoHome(HomeReason::TooBig));
            }
            self.args[usize::from(count_arg)] = fit;
        }
        self.point(place, Some(array));
        Ok(())
    }

    /// Message `n` of a vector; `false` if it does not fit any more.
    fn one_of(
        &mut self,
        addr: u64,
        array: u32,
        vector: &[u8],
        n: u64,
        dir: Dir,
    ) -> Result<bool, GatherError> {
        let from = (n * MMSGHDR_LEN) as usize;
        let mut header = Header {
            bytes: [0; MSGHDR_LEN as usize],
        };
        header
            .bytes
            .copy_from_slice(&vector[from..from + MSGHDR_LEN as usize]);
        let addr = addr + from as u64;
        let at = array + from as u32;
        let bodies = self.message_bodies(header.word(IOV_AT), header.word(IOV_AT + 8))?;
        if let Bodies::Listed(segments) = &bodies {
            let total: u64 = segments.iter().map(|s| s.len).sum();
            if self.used() as u64 + total + segments.len() as u64 * 16 > BODY_MAX as u64 {
                return Ok(false);
            }
        }
        let when = OutWhen::Above(n as u16);
        self.message_at(
            &header,
            at,
            dir,
            &bodies,
            when,
            OutLen::Word32 { at: at + MSG_LEN_AT },
        )?;
        if dir == Dir::In {
            self.out(at + MSG_LEN_AT, 4, when, OutLen::Whole);
            self.dest(addr + u64::from(MSG_LEN_AT), 4);
        } else {
            self.out(at + NAMELEN_AT, 4, when, OutLen::Whole);
            self.dest(addr + u64::from(NAMELEN_AT), 4);
            // Length of the control data, flags, padding as it was, length of the message.
            self.out(at + CONTROLLEN_AT, 20, when, OutLen::Whole);
            self.dest(addr + u64::from(CONTROLLEN_AT), 20);
        }
        Ok(true)
    }
}

/// The bodies of a message.
enum Bodies {
    Listed(Vec<Segment>),
    /// The array cannot be read, or has too many entries: the kernel sees the same count and a bad pointer.
    Refused,
    /// The pointer to the array is null or never mapped.
    AsItIs,
    /// An entry that makes the kernel refuse the array as a whole.
    Bad(Segment),
}
