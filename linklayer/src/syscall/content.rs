//! Which descriptors of a call lead to the content of a file.

use super::kind::{Kind, Scalar};

/// Calls that name a file by a descriptor and neither read nor change its content (`asm/unistd_64.h`).
const HARMLESS: [u32; 22] = [
    3,   // close
    5,   // fstat
    73,  // flock
    81,  // fchdir
    91,  // fchmod
    93,  // fchown
    138, // fstatfs
    187, // readahead
    190, // fsetxattr
    193, // fgetxattr
    196, // flistxattr
    199, // fremovexattr
    221, // fadvise64
    233, // epoll_ctl
    257, // openat
    260, // fchownat
    262, // newfstatat
    268, // fchmodat
    269, // faccessat
    280, // utimensat
    332, // statx
    439, // faccessat2
];
const LSEEK: u32 = 8;
const FCNTL: u32 = 72;
/// The largest of SEEK_SET, SEEK_CUR and SEEK_END; the others tell where there is content.
const SEEK_END: u32 = 2;
/// Commands of fcntl(2) about the descriptor, its flags and locks.
const COMMANDS: [u32; 11] = [
    0,    // F_DUPFD
    1,    // F_GETFD
    2,    // F_SETFD
    3,    // F_GETFL
    5,    // F_GETLK
    6,    // F_SETLK
    7,    // F_SETLKW
    36,   // F_OFD_GETLK
    37,   // F_OFD_SETLK
    38,   // F_OFD_SETLKW
    1030, // F_DUPFD_CLOEXEC
];

/// The descriptors by which a call may read or change the content of files, or what the kernel keeps with the open file.
pub fn content_of(nr: u32, args: &[u64; 6]) -> Vec<i32> {
    let command = args[1] as u32;
    let harmless = match nr {
        LSEEK => args[2] as u32 <= SEEK_END,
        FCNTL => COMMANDS.contains(&command),
        nr => HARMLESS.contains(&nr),
    };
    if harmless {
        return Vec::new();
    }
    let call = super::resolve(nr, args);
    let of_row = call.row.map(|row| row.args).unwrap_or_default().iter();
    of_row
        .zip(args)
        .filter(|(arg, _)| matches!(arg.kind, Kind::Val(Scalar::Fd)))
        .map(|(_, value)| *value as i32)
        .filter(|fd| *fd >= 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reads_or_writes_leads_to_content_and_what_asks_does_not() {
        let at = |nr, args: [u64; 3]| content_of(nr, &[args[0], args[1], args[2], 0, 0, 0]);
        assert_eq!(at(0, [7, 0, 10]), [7], "read");
        assert_eq!(at(77, [7, 0, 0]), [7], "ftruncate");
        assert_eq!(at(40, [4, 7, 0]), [4, 7], "sendfile");
        assert_eq!(at(326, [7, 0, 9]), [7, 9], "copy_file_range");
        assert_eq!(at(LSEEK, [7, 0, 3]), [7], "SEEK_DATA");
        assert_eq!(at(FCNTL, [7, 1024, 0]), [7], "F_SETLEASE");
        for (nr, command) in [(3, 0), (5, 0), (FCNTL, 1030), (LSEEK, 0), (32, 0), (33, 9)] {
            assert!(at(nr, [7, command, 0]).is_empty(), "{nr}");
        }
        for nr in HARMLESS {
            let known = super::super::row(nr).is_some_and(|row| row.nr == nr);
            assert!(known, "{nr} is no call");
        }
    }
}
