use super::define_rows;
use super::words::*;

/// `sizeof(struct sockaddr_storage)`.
const ADDR_MAX: u32 = 128;
const SOCKADDR: Kind = inp(Limit(2, ADDR_MAX));
const SOCKADDR_OUT: Kind = out(Word(2, ADDR_MAX));
const LEN: Kind = inout(Fixed(4));
/// `MSG_ZEROCOPY`: the kernel would go on reading a slot that is used again.
const fn zero_copy(arg: u8) -> crate::syscall::kind::Cmp {
    has(arg, 0x400_0000)
}
const SEND_RULES: &[Rule] = &[Rule {
    when: &[zero_copy(3)],
    then: GoHome(HomeReason::ZeroCopy),
}];
const MSG_RULES: &[Rule] = &[Rule {
    when: &[zero_copy(2)],
    then: GoHome(HomeReason::ZeroCopy),
}];
const DONTWAIT: u64 = 0x40;

define_rows! {
    41 socket(domain: INT, type: INT, protocol: INT) Forward;
    42 connect(fd: FD, addr: SOCKADDR, addrlen: INT) Forward, blocking: May;
    43 accept(fd: FD, addr: out(Word(2, ADDR_MAX)).early(), addrlen: LEN.early()) Forward, blocking: Long;
    44 sendto(fd: FD, buf: inp(Stream(2)), len: SIZE, flags: FLAGS, addr: inp(Limit(5, ADDR_MAX)), addrlen: INT) Forward,
        blocking: May, quick: &[has(3, DONTWAIT)], rules: SEND_RULES,
        note: "A local datagram that does not fit into a message, or MSG_ZEROCOPY: goes home.";
    45 recvfrom(fd: FD, buf: out(Stream(2)).ret(1).early(), len: SIZE, flags: FLAGS, addr: out(Word(5, ADDR_MAX)).early(), addrlen: LEN.early()) Forward,
        blocking: May, quick: &[has(3, DONTWAIT)];
    46 sendmsg(fd: FD, msg: Msg(Dir::In), flags: FLAGS) Forward, blocking: May, quick: &[has(2, DONTWAIT)], rules: MSG_RULES,
        note: "Descriptors may be passed: they are at home on both ends.";
    47 recvmsg(fd: FD, msg: Msg(Dir::Out), flags: FLAGS) Forward, blocking: May, quick: &[has(2, DONTWAIT)];
    48 shutdown(fd: FD, how: INT) Forward;
    49 bind(fd: FD, addr: SOCKADDR, addrlen: INT) Forward, blocking: May;
    50 listen(fd: FD, backlog: INT) Forward;
    51 getsockname(fd: FD, addr: SOCKADDR_OUT, addrlen: LEN) Forward;
    52 getpeername(fd: FD, addr: SOCKADDR_OUT, addrlen: LEN) Forward;
    53 socketpair(domain: INT, type: INT, protocol: INT, fds: FD_PAIR) Forward;
    54 setsockopt(fd: FD, level: INT, optname: INT, optval: Sub(SubTable::SetSockopt)) Forward, note: "By option: see below.";
    55 getsockopt(fd: FD, level: INT, optname: INT, optval: Sub(SubTable::GetSockopt)) Forward, note: "By option: see below.";
    288 accept4(fd: FD, addr: out(Word(2, ADDR_MAX)).early(), addrlen: LEN.early(), flags: INT) Forward, blocking: Long;
    299 recvmmsg(fd: FD, msgvec: Mmsg { count: 2, dir: Dir::Out }, vlen: UINT, flags: FLAGS, timeout: inout(Fixed(16))) Forward,
        blocking: May, quick: &[has(3, DONTWAIT)], note: "Buffers that do not fit into a message, without MSG_DONTWAIT or MSG_WAITFORONE: goes home.";
    307 sendmmsg(fd: FD, msgvec: Mmsg { count: 2, dir: Dir::In }, vlen: UINT, flags: FLAGS) Forward,
        blocking: May, quick: &[has(3, DONTWAIT)], rules: SEND_RULES;
}
