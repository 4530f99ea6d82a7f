//! Socket options. All that are listed are blocks of plain data whose length the caller gives; an option with a
//! pointer inside (filters, `TCP_ZEROCOPY_RECEIVE`, address tables) is not listed, so that the process goes home.

use crate::syscall::kind::{Arg as Argument, Blocking, SubRow};
use crate::syscall::table::words::*;

/// The kernel reads less than this of any listed option.
const SET_MAX: u32 = 4096;
/// `SO_PEERGROUPS` is the longest list.
const GET_MAX: u32 = 65536;
const SET_ARGS: &[Argument] = &[
    Argument {
        name: "optval",
        kind: inp(Limit(4, SET_MAX)),
    },
    Argument {
        name: "optlen",
        kind: INT,
    },
];
const GET_ARGS: &[Argument] = &[
    Argument {
        name: "optval",
        kind: out(Word(4, GET_MAX)),
    },
    // Written with ERANGE as well, to tell how much is needed.
    Argument {
        name: "optlen",
        kind: inout(Fixed(4)).or_changed(),
    },
];

macro_rules! options {
    ($( $level:literal $prefix:literal: $( $number:literal $name:literal ),* ; )*) => {
        /// `setsockopt` by level and option.
        pub(super) const SET: &[SubRow] = &[
            $( $( option($level, $number, concat!($prefix, $name), SET_ARGS), )* )*
            SubRow {
                disposition: GoHome(HomeReason::ZeroCopy),
                note: "The kernel would go on reading memory that is used again.",
                ..option(1, 60, "SO_ZEROCOPY", SET_ARGS)
            },
        ];
        /// `getsockopt` by level and option.
        pub(super) const GET: &[SubRow] = &[
            $( $( option($level, $number, concat!($prefix, $name), GET_ARGS), )* )*
            option(1, 60, "SO_ZEROCOPY", GET_ARGS),
        ];
    };
}

const fn option(level: u64, number: u64, name: &'static str, args: &'static [Argument]) -> SubRow {
    SubRow {
        code: level << 32 | number,
        name,
        args,
        disposition: Forward,
        blocking: Blocking::Never,
        note: "",
    }
}

options! {
    1 "SO_":
        1 "DEBUG", 2 "REUSEADDR", 3 "TYPE", 4 "ERROR", 5 "DONTROUTE", 6 "BROADCAST", 7 "SNDBUF", 8
        "RCVBUF", 9 "KEEPALIVE", 10 "OOBINLINE", 11 "NO_CHECK", 12 "PRIORITY", 13 "LINGER", 14
        "BSDCOMPAT", 15 "REUSEPORT", 16 "PASSCRED", 17 "PEERCRED", 18 "RCVLOWAT", 19 "SNDLOWAT", 20
        "RCVTIMEO", 21 "SNDTIMEO", 25 "BINDTODEVICE", 27 "DETACH_FILTER", 28 "PEERNAME", 29
        "TIMESTAMP", 30 "ACCEPTCONN", 31 "PEERSEC", 32 "SNDBUFFORCE", 33 "RCVBUFFORCE", 34
        "PASSSEC", 35 "TIMESTAMPNS", 36 "MARK", 37 "TIMESTAMPING", 38 "PROTOCOL", 39 "DOMAIN", 40
        "RXQ_OVFL", 41 "WIFI_STATUS", 42 "PEEK_OFF", 43 "NOFCS", 44 "LOCK_FILTER", 45
        "SELECT_ERR_QUEUE", 46 "BUSY_POLL", 47 "MAX_PACING_RATE", 48 "BPF_EXTENSIONS", 49
        "INCOMING_CPU", 50 "ATTACH_BPF", 52 "ATTACH_REUSEPORT_EBPF", 53 "CNX_ADVICE", 55 "MEMINFO",
        56 "INCOMING_NAPI_ID", 57 "COOKIE", 59 "PEERGROUPS", 61 "TXTIME", 62 "BINDTOIFINDEX", 63
        "TIMESTAMP_NEW", 64 "TIMESTAMPNS_NEW", 65 "TIMESTAMPING_NEW", 66 "RCVTIMEO_NEW", 67
        "SNDTIMEO_NEW", 68 "DETACH_REUSEPORT_BPF", 69 "PREFER_BUSY_POLL", 70 "BUSY_POLL_BUDGET", 71
        "NETNS_COOKIE", 72 "BUF_LOCK", 73 "RESERVE_MEM", 74 "TXREHASH", 75 "RCVMARK", 76
        "PASSPIDFD", 77 "PEERPIDFD";
    6 "TCP_":
        1 "NODELAY", 2 "MAXSEG", 3 "CORK", 4 "KEEPIDLE", 5 "KEEPINTVL", 6 "KEEPCNT", 7 "SYNCNT", 8
        "LINGER2", 9 "DEFER_ACCEPT", 10 "WINDOW_CLAMP", 11 "INFO", 12 "QUICKACK", 13 "CONGESTION",
        14 "MD5SIG", 16 "THIN_LINEAR_TIMEOUTS", 17 "THIN_DUPACK", 18 "USER_TIMEOUT", 23 "FASTOPEN",
        24 "TIMESTAMP", 25 "NOTSENT_LOWAT", 26 "CC_INFO", 27 "SAVE_SYN", 28 "SAVED_SYN", 30
        "FASTOPEN_CONNECT", 31 "ULP", 32 "MD5SIG_EXT", 33 "FASTOPEN_KEY", 34 "FASTOPEN_NO_COOKIE",
        36 "INQ", 37 "TX_DELAY";
    0 "IP_":
        1 "TOS", 2 "TTL", 3 "HDRINCL", 4 "OPTIONS", 5 "ROUTER_ALERT", 6 "RECVOPTS", 7 "RETOPTS", 8
        "PKTINFO", 9 "PKTOPTIONS", 10 "MTU_DISCOVER", 11 "RECVERR", 12 "RECVTTL", 13 "RECVTOS", 14
        "MTU", 15 "FREEBIND", 18 "PASSSEC", 19 "TRANSPARENT", 20 "RECVORIGDSTADDR", 21 "MINTTL", 22
        "NODEFRAG", 23 "CHECKSUM", 24 "BIND_ADDRESS_NO_PORT", 25 "RECVFRAGSIZE", 26
        "RECVERR_RFC4884", 32 "MULTICAST_IF", 33 "MULTICAST_TTL", 34 "MULTICAST_LOOP", 35
        "ADD_MEMBERSHIP", 36 "DROP_MEMBERSHIP", 37 "UNBLOCK_SOURCE", 38 "BLOCK_SOURCE", 39
        "ADD_SOURCE_MEMBERSHIP", 40 "DROP_SOURCE_MEMBERSHIP", 42 "MCAST_JOIN_GROUP", 43
        "MCAST_BLOCK_SOURCE", 44 "MCAST_UNBLOCK_SOURCE", 45 "MCAST_LEAVE_GROUP", 46
        "MCAST_JOIN_SOURCE_GROUP", 47 "MCAST_LEAVE_SOURCE_GROUP", 49 "MULTICAST_ALL", 50
        "UNICAST_IF", 51 "LOCAL_PORT_RANGE", 52 "PROTOCOL", 80 "ORIGINAL_DST";
    41 "IPV6_":
        1 "ADDRFORM", 2 "2292PKTINFO", 3 "2292HOPOPTS", 4 "2292DSTOPTS", 5 "2292RTHDR", 7
        "CHECKSUM", 8 "2292HOPLIMIT", 9 "NEXTHOP", 11 "FLOWINFO", 16 "UNICAST_HOPS", 17
        "MULTICAST_IF", 18 "MULTICAST_HOPS", 19 "MULTICAST_LOOP", 20 "ADD_MEMBERSHIP", 21
        "DROP_MEMBERSHIP", 22 "ROUTER_ALERT", 23 "MTU_DISCOVER", 24 "MTU", 25 "RECVERR", 26
        "V6ONLY", 27 "JOIN_ANYCAST", 28 "LEAVE_ANYCAST", 29 "MULTICAST_ALL", 30
        "ROUTER_ALERT_ISOLATE", 31 "RECVERR_RFC4884", 33 "FLOWINFO_SEND", 36 "HDRINCL", 42
        "MCAST_JOIN_GROUP", 43 "MCAST_BLOCK_SOURCE", 44 "MCAST_UNBLOCK_SOURCE", 45
        "MCAST_LEAVE_GROUP", 46 "MCAST_JOIN_SOURCE_GROUP", 47 "MCAST_LEAVE_SOURCE_GROUP", 49
        "RECVPKTINFO", 50 "PKTINFO", 51 "RECVHOPLIMIT", 52 "HOPLIMIT", 53 "RECVHOPOPTS", 54
        "HOPOPTS", 55 "RTHDRDSTOPTS", 56 "RECVRTHDR", 57 "RTHDR", 58 "RECVDSTOPTS", 59 "DSTOPTS", 60
        "RECVPATHMTU", 61 "PATHMTU", 62 "DONTFRAG", 66 "RECVTCLASS", 67 "TCLASS", 70
        "AUTOFLOWLABEL", 72 "ADDR_PREFERENCES", 73 "MINHOPCOUNT", 74 "RECVORIGDSTADDR", 75
        "TRANSPARENT", 76 "UNICAST_IF", 77 "RECVFRAGSIZE", 78 "FREEBIND", 80 "ORIGINAL_DST";
    17 "UDP_":
        1 "CORK", 100 "ENCAP", 101 "NO_CHECK6_TX", 102 "NO_CHECK6_RX", 103 "SEGMENT", 104 "GRO";
    40 "VSOCK_":
        0 "BUFFER_SIZE", 1 "BUFFER_MIN_SIZE", 2 "BUFFER_MAX_SIZE", 3 "PEER_HOST_VM_ID", 5 "TRUSTED",
        6 "CONNECT_TIMEOUT_OLD", 7 "NONBLOCK_TXRX", 8 "CONNECT_TIMEOUT_NEW";
    58 "ICMPV6_":
        1 "FILTER";
    255 "RAW_":
        1 "ICMP_FILTER";
    263 "PACKET_":
        1 "ADD_MEMBERSHIP", 2 "DROP_MEMBERSHIP", 5 "RX_RING", 6 "STATISTICS", 7 "COPY_THRESH", 8
        "AUXDATA", 9 "ORIGDEV", 10 "VERSION", 12 "RESERVE", 13 "TX_RING", 14 "LOSS", 15 "VNET_HDR",
        16 "TX_TIMESTAMP", 17 "TIMESTAMP", 18 "FANOUT", 19 "TX_HAS_OFF", 20 "QDISC_BYPASS", 21
        "ROLLOVER_STATS", 23 "IGNORE_OUTGOING", 24 "VNET_HDR_SZ";
    270 "NETLINK_":
        1 "ADD_MEMBERSHIP", 2 "DROP_MEMBERSHIP", 3 "PKTINFO", 4 "BROADCAST_ERROR", 5 "NO_ENOBUFS", 8
        "LISTEN_ALL_NSID", 9 "LIST_MEMBERSHIPS", 10 "CAP_ACK", 11 "EXT_ACK", 12 "GET_STRICT_CHK";
    279 "ALG_":
        1 "SET_KEY", 2 "SET_IV", 3 "SET_OP", 4 "SET_AEAD_ASSOCLEN", 5 "SET_AEAD_AUTHSIZE", 6
        "SET_DRBG_ENTROPY";
    282 "TLS_":
        1 "TX", 2 "RX", 3 "TX_ZEROCOPY_RO", 4 "RX_EXPECT_NO_PAD";
}
