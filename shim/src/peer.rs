//! Who is at the other end of a unix socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `NGROUPS_MAX`: the most supplementary groups a process can have (getgroups(2)).
const MAX_GROUPS: usize = 65_536;

/// The supplementary groups that the peer had when it connected (`SO_PEERGROUPS`, unix(7)).
///
/// Unlike a look into /proc this cannot be fooled by a peer that executes a set-uid program after it has connected.
///
/// # Errors
/// getsockopt(2)'s; `ENOPROTOOPT` on a socket that is no unix socket.
pub fn groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut len = std::mem::size_of_val(groups.as_slice()) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes to the vector, which has that many, and then sets `len`.
        let done = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &mut len,
            )
        };
        let count = len as usize / size_of::<libc::gid_t>();
        if done == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // ERANGE sets the length to what is needed
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > MAX_GROUPS {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn own_groups_are_seen_through_a_socket_pair() {
        let (a, _b) = UnixStream::pair().unwrap();
        let mut seen = groups(a.as_fd()).unwrap();
        let mut own: Vec<u32> = nix::unistd::getgroups()
            .unwrap()
            .iter()
            .map(|g| g.as_raw())
            .collect();
        seen.sort_unstable();
        own.sort_unstable();
        assert_eq!(seen, own);
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(groups(udp.as_fd()).is_err());
    }
}
