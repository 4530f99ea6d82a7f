//! Bodies larger than a message: one call of the guest becomes several calls at home.
//!
//! What is read or written decides how. A file takes and gives as much as asked for, so the calls go on while each is
//! full. A pipe, terminal or stream socket takes all that is written, and gives a short count when read. A datagram
//! is one whole, so that a process that sends one that does not fit goes home. What has been transferred when
//! something stops the rest is the result, as the kernel would have it.

use super::gather::{BODY_MAX, GatherError, Gathered, gather_part, libc_nr as nr};
use super::kind::{Blocking, Dir, HomeReason};
use super::request::{CallRequest, Malformed, Out, OutLen, OutWhen, Place, Reloc, Reply, Target};
use super::vector::{MAX_IOV, MAX_RW_COUNT, Segment, read_segments};
use crate::memory::GuestMemory;

const MSG_PEEK: u64 = 0x2;
const MSG_WAITALL: u64 = 0x100;
const RWF_ATOMIC: u64 = 0x40;
const SOL_SOCKET: u64 = 1;
const SO_TYPE: u64 = 3;
const SO_DOMAIN: u64 = 39;
const SOCK_STREAM: u32 = 1;
const AF_UNIX: u32 = 1;
const S_IFMT: u32 = 0o170_000;
const S_IFIFO: u32 = 0o010_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFREG: u32 = 0o100_000;
const S_IFSOCK: u32 = 0o140_000;
/// Major number of `/dev/zero`, `/dev/urandom` and their kind.
const MEM_MAJOR: u64 = 1;

/// A transfer in parts, without I/O of its own: call [`Transfer::next`], make the call it gives, hand the reply to
/// [`Transfer::reply`], and so on until the end.
#[derive(Debug)]
pub struct Transfer {
    nr: u32,
    args: [u64; 6],
    dir: Dir,
    segments: Vec<Segment>,
    total: u64,
    done: u64,
    /// The file takes and gives without waiting for anybody: the kernel is not interrupted in it.
    steady: bool,
    state: State,
    current: Option<Gathered>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// What kind of file is it?
    Stat,
    /// What kind of socket?
    SocketType,
    /// A datagram socket of which family?
    Domain,
    /// Parts follow while each is full.
    WhileFull,
    /// One part, whose count is the result.
    Once,
    Home(HomeReason),
    End(i64),
}

/// What is to be done next.
#[derive(Debug)]
pub enum Step<'a> {
    /// Make this call and give its reply to [`Transfer::reply`].
    Call(&'a CallRequest),
    /// The call is over with this result.
    Done(i64),
    /// The process goes home and makes the call there. Nothing has been transferred.
    GoHome(HomeReason),
}

impl Transfer {
    /// A transfer for a call whose body is larger than [`BODY_MAX`].
    pub(super) fn new(number: u32, args: [u64; 6], mem: &dyn GuestMemory) -> Result<Transfer, GatherError> {
        let opaque = || GatherError::GoHome(HomeReason::TooBig);
        let (dir, segments) = match number {
            nr::READ | nr::PREAD64 | nr::RECVFROM => (
                Dir::Out,
                vec![Segment {
                    addr: args[1],
                    len: args[2],
                }],
            ),
            nr::WRITE | nr::PWRITE64 | nr::SENDTO => (
                Dir::In,
                vec![Segment {
                    addr: args[1],
                    len: args[2],
                }],
            ),
            nr::READV | nr::PREADV | nr::PREADV2 => {
                (Dir::Out, read_segments(mem, args[1], args[2]).ok_or_else(opaque)?)
            }
            nr::WRITEV | nr::PWRITEV | nr::PWRITEV2 => {
                (Dir::In, read_segments(mem, args[1], args[2]).ok_or_else(opaque)?)
            }
            nr::SENDMSG | nr::RECVMSG => {
                let iov = mem.read_u64(args[1].wrapping_add(16)).map_err(|_| opaque())?;
                let count = mem.read_u64(args[1].wrapping_add(24)).map_err(|_| opaque())?;
                let controllen = mem.read_u64(args[1].wrapping_add(40)).map_err(|_| opaque())?;
                if count > MAX_IOV || (controllen > 0 && args[2] & MSG_WAITALL != 0) {
                    return Err(opaque());
                }
                let dir = if number == nr::SENDMSG { Dir::In } else { Dir::Out };
                (dir, read_segments(mem, iov, count).ok_or_else(opaque)?)
            }
            _ => return Err(opaque()),
        };
        if matches!(number, nr::PREADV2 | nr::PWRITEV2) && args[5] & RWF_ATOMIC != 0 {
            return Err(opaque());
        }
        let mut total = 0;
        let segments = segments
            .into_iter()
            .map(|s| {
                let len = s.len.min(MAX_RW_COUNT - total);
                total += len;
                Segment { addr: s.addr, len }
            })
            .collect();
        Ok(Transfer {
            nr: number,
            args,
            dir,
            segments,
            total,
            done: 0,
            steady: false,
            state: State::Stat,
            current: None,
        })
    }

    /// Number of bytes that have been transferred so far.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Whether the call has begun and is one that only a kill interrupts, so that it must be made to its end.
    pub fn is_steady(&self) -> bool {
        self.steady && self.done > 0
    }

    /// The call that [`Transfer::next`] gave was not made, with this restart code for a reason. One that must be made to its end is given
    /// again: it was interrupted before it had begun.
    pub fn not_made(&mut self, code: i64) {
        if self.is_steady() {
            return;
        }
        self.current = None;
        self.state = State::End(if self.done > 0 { self.done as i64 } else { code });
    }

    /// Number of bytes that the guest asked for.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The next call, or the end. To be called again only after its reply was handed in.
    pub fn next(&mut self, mem: &dyn GuestMemory) -> Step<'_> {
        if self.current.is_none() {
            let gathered = match self.state {
                State::End(ret) => return Step::Done(ret),
                State::Home(reason) => return Step::GoHome(reason),
                State::Stat => Ok(self.probe(CallRequest::plain(nr::FSTAT, [0; 6]), 1, 144)),
                State::SocketType => Ok(self.probe_socket(SO_TYPE)),
                State::Domain => Ok(self.probe_socket(SO_DOMAIN)),
                State::WhileFull | State::Once => self.part(mem),
            };
            match gathered {
                Ok(gathered) => self.current = Some(gathered),
                // The kernel gives the count of what it could transfer before the bad part.
                Err(_) if self.done > 0 => {
                    self.state = State::End(self.done as i64);
                    return Step::Done(self.done as i64);
                }
                Err(GatherError::GoHome(reason)) => {
                    self.state = State::Home(reason);
                    return Step::GoHome(reason);
                }
                Err(GatherError::TooBig(_)) => {
                    self.state = State::Home(HomeReason::TooBig);
                    return Step::GoHome(HomeReason::TooBig);
                }
            }
        }
        match &self.current {
            Some(gathered) => Step::Call(&gathered.request),
            None => Step::GoHome(HomeReason::TooBig),
        }
    }

    /// Takes the reply to the call that [`Transfer::next`] gave. Without such a call nothing happens.
    pub fn reply(&mut self, reply: Reply<'_>, mem: &dyn GuestMemory) -> Result<(), Malformed> {
        let Some(gathered) = self.current.take() else {
            return Ok(());
        };
        match self.state {
            State::Stat | State::SocketType | State::Domain => self.learn(reply),
            State::WhileFull | State::Once => {
                let asked = self.part_len();
                let ret = gathered.scatter(reply, mem)?;
                self.advance(ret, asked);
                Ok(())
            }
            State::End(_) | State::Home(_) => Ok(()),
        }
    }

    /// A call about the descriptor itself, with a result of `len` bytes behind argument `arg`.
    fn probe(&self, mut request: CallRequest, arg: u8, len: u32) -> Gathered {
        request.args[0] = self.args[0];
        request.relocs.push(Reloc {
            place: Place::Arg(arg),
            target: Target::Data(request.image.len() as u32),
        });
        let offset = request.image.len() as u32;
        request.outs.push(Out {
            offset,
            len,
            when: OutWhen::Success,
            actual: OutLen::Whole,
        });
        request.space = offset + len;
        Gathered::internal(request)
    }

    fn probe_socket(&self, option: u64) -> Gathered {
        let mut request = CallRequest::plain(nr::GETSOCKOPT, [0, SOL_SOCKET, option, 0, 0, 0]);
        request.image.extend_from_slice(&[4, 0, 0, 0, 0, 0, 0, 0]);
        request.relocs.push(Reloc {
            place: Place::Arg(4),
            target: Target::Data(0),
        });
        self.probe(request, 3, 4)
    }

    fn learn(&mut self, mut reply: Reply<'_>) -> Result<(), Malformed> {
        if reply.ret < 0 {
            self.state = State::End(reply.ret);
            return Ok(());
        }
        let bytes = reply.next_out()?;
        let word = |at: usize| -> Result<u32, Malformed> {
            let bytes = bytes.get(at..at + 4).ok_or(Malformed::Length)?;
            Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        };
        let writing = self.dir == Dir::In;
        self.state = match self.state {
            State::Stat => {
                // struct stat of x86_64: st_mode at 24, st_rdev at 40.
                let rdev = u64::from(word(40)?) | u64::from(word(44)?) << 32;
                let kind = word(24)? & S_IFMT;
                self.steady = matches!(kind, S_IFREG | S_IFBLK);
                match kind {
                    S_IFREG | S_IFBLK | S_IFDIR => State::WhileFull,
                    S_IFSOCK => State::SocketType,
                    S_IFCHR if !writing && rdev >> 8 & 0xfff != MEM_MAJOR => State::Once,
                    S_IFIFO if !writing => State::Once,
                    S_IFCHR | S_IFIFO => State::WhileFull,
                    _ => State::Once,
                }
            }
            State::SocketType => match word(0)? {
                SOCK_STREAM => self.stream(),
                _ if writing => State::Home(HomeReason::TooBig),
                _ => State::Domain,
            },
            // Only local datagrams can be larger than one part.
            State::Domain if word(0)? == AF_UNIX => State::Home(HomeReason::TooBig),
            _ => State::Once,
        };
        Ok(())
    }

    fn stream(&self) -> State {
        let flags = match self.nr {
            nr::RECVFROM => self.args[3],
            nr::RECVMSG => self.args[2],
            _ => 0,
        };
        match self.dir {
            Dir::In => State::WhileFull,
            _ if flags & MSG_WAITALL == 0 => State::Once,
            _ if flags & MSG_PEEK != 0 => State::Home(HomeReason::TooBig),
            _ => State::WhileFull,
        }
    }

    fn part_len(&self) -> u64 {
        (self.total - self.done).min(BODY_MAX as u64)
    }

    /// The segments of the next part.
    fn part_segments(&self) -> Vec<Segment> {
        let mut skip = self.done;
        let mut room = self.part_len();
        let mut part = Vec::new();
        for segment in &self.segments {
            let skipped = skip.min(segment.len);
            skip -= skipped;
            let len = (segment.len - skipped).min(room);
            if len > 0 {
                part.push(Segment {
                    addr: segment.addr + skipped,
                    len,
                });
                room -= len;
            }
        }
        part
    }

    fn part(&self, mem: &dyn GuestMemory) -> Result<Gathered, GatherError> {
        let mut args = self.args;
        let mut part = Vec::new();
        match self.nr {
            nr::READ | nr::WRITE | nr::SENDTO | nr::RECVFROM | nr::PREAD64 | nr::PWRITE64 => {
                args[1] += self.done;
                args[2] = self.part_len();
                if matches!(self.nr, nr::PREAD64 | nr::PWRITE64) {
                    args[3] = args[3].wrapping_add(self.done);
                }
            }
            _ => {
                part = self.part_segments();
                if !matches!(self.nr, nr::SENDMSG | nr::RECVMSG) {
                    args[2] = part.len() as u64;
                }
                let at_offset = match self.nr {
                    nr::PREADV | nr::PWRITEV => true,
                    // -1 means the file's own position, which moves by itself.
                    nr::PREADV2 | nr::PWRITEV2 => args[3] != u64::MAX,
                    _ => false,
                };
                if at_offset {
                    args[3] = args[3].wrapping_add(self.done);
                }
            }
        }
        let part = if part.is_empty() { None } else { Some(&part[..]) };
        let mut gathered = gather_part(self.nr, &args, mem, part)?;
        if self.nr == nr::SENDMSG && self.done > 0 {
            gathered.drop_control();
        }
        if self.done > 0 {
            // The first part may wait for a peer; the following ones do so as a rule.
            gathered.request.blocking = gathered.request.blocking.max(Blocking::May);
        }
        Ok(gathered)
    }

    fn advance(&mut self, ret: i64, asked: u64) {
        let Ok(count) = u64::try_from(ret) else {
            self.state = State::End(if self.done > 0 { self.done as i64 } else { ret });
            return;
        };
        // A hostile peer could give more than was asked for.
        self.done += count.min(asked);
        if self.state == State::Once || count < asked || self.done == self.total {
            self.state = State::End(self.done as i64);
        }
    }
}
