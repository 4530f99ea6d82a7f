use super::sub_rows;
use crate::syscall::kind::SubRow;
use crate::syscall::table::words::*;

/// `struct flock`.
const FLOCK: Kind = inp(Fixed(32));
const FLOCK_ASK: Kind = inout(Fixed(32));

/// `fcntl` by command.
pub(super) const ROWS: &[SubRow] = sub_rows! {
    0 F_DUPFD(fd: INT) Forward;
    1 F_GETFD() Forward;
    2 F_SETFD(flags: INT) Forward;
    3 F_GETFL() Forward;
    4 F_SETFL(flags: FLAGS) Forward;
    5 F_GETLK(lock: FLOCK_ASK) Forward;
    6 F_SETLK(lock: FLOCK) Forward;
    7 F_SETLKW(lock: FLOCK) Forward, Long;
    8 F_SETOWN(pid: PID) Forward;
    9 F_GETOWN() Forward;
    10 F_SETSIG(sig: SIG) Forward;
    11 F_GETSIG() Forward;
    15 F_SETOWN_EX(owner: inp(Fixed(8))) Forward;
    16 F_GETOWN_EX(owner: out(Fixed(8))) Forward;
    17 F_GETOWNER_UIDS(uids: out(Fixed(8))) Forward;
    36 F_OFD_GETLK(lock: FLOCK_ASK) Forward;
    37 F_OFD_SETLK(lock: FLOCK) Forward;
    38 F_OFD_SETLKW(lock: FLOCK) Forward, Long;
    1024 F_SETLEASE(kind: INT) Forward, May;
    1025 F_GETLEASE() Forward;
    1026 F_NOTIFY(events: FLAGS) Forward;
    1027 F_DUPFD_QUERY(fd: INT) Forward;
    1028 F_CREATED_QUERY(zero: INT) Forward;
    1029 F_CANCELLK(lock: FLOCK) Forward;
    1030 F_DUPFD_CLOEXEC(fd: INT) Forward;
    1031 F_SETPIPE_SZ(size: INT) Forward;
    1032 F_GETPIPE_SZ() Forward;
    1033 F_ADD_SEALS(seals: UINT) Forward;
    1034 F_GET_SEALS() Forward;
    1035 F_GET_RW_HINT(hint: out(Fixed(8))) Forward;
    1036 F_SET_RW_HINT(hint: inp(Fixed(8))) Forward;
    1037 F_GET_FILE_RW_HINT(hint: out(Fixed(8))) Forward;
    1038 F_SET_FILE_RW_HINT(hint: inp(Fixed(8))) Forward;
};
