//! One blocking UDP socket of a link.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use quinn_udp::{RecvMeta, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use super::Options;

/// How long a receiving thread stays in the kernel before it looks at its timers.
pub(super) const TICK: Duration = Duration::from_millis(4);
/// Room for one receive: the kernel may hand over several datagrams of equal size in one go.
pub(super) const RECEIVE_BYTES: usize = 64 << 10;
/// The most bytes that the kernel takes in one segmented send.
const MAX_SEND_BYTES: usize = 65_000;

/// A blocking UDP socket whose receives end after [`TICK`]. Connected sockets hear of a port that nobody listens on.
#[derive(Debug)]
pub(super) struct Sock {
    socket: UdpSocket,
    state: UdpSocketState,
    peer: Option<SocketAddr>,
}

impl Sock {
    /// A socket bound to `local`. Its port can be shared with [`Sock::accepted`].
    pub(super) fn listening(local: SocketAddr) -> io::Result<Self> {
        Self::new(local, None)
    }

    /// A socket of its own port that speaks to `peer` alone.
    pub(super) fn connected(peer: SocketAddr) -> io::Result<Self> {
        let any: IpAddr = if peer.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        Self::new(SocketAddr::new(any, 0), Some(peer))
    }

    /// A second socket on the port of a listening one, that gets what `peer` sends from now on.
    pub(super) fn accepted(local: SocketAddr, peer: SocketAddr) -> io::Result<Self> {
        Self::new(local, Some(peer))
    }

    fn new(local: SocketAddr, peer: Option<SocketAddr>) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::for_address(local),
            Type::DGRAM.cloexec(),
            Some(Protocol::UDP),
        )?;
        // The same port for the listening socket and the connected one beside it; other users cannot join in. A port that the kernel
        // chooses is one of its own only while sharing is not allowed yet (net/ipv4/udp.c, udp_lib_lport_inuse): another link's peer
        // would be heard here, and this one's there.
        let chosen = local.port() == 0;
        if !chosen {
            socket.set_reuse_port(true)?;
        }
        socket.bind(&local.into())?;
        if chosen && peer.is_none() {
            socket.set_reuse_port(true)?;
        }
        if let Some(peer) = peer {
            socket.connect(&peer.into())?;
        }
        let state = UdpSocketState::new((&socket).into())?;
        // quinn-udp leaves it non-blocking; here threads wait in the kernel, which is the fastest way to be woken.
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(TICK))?;
        if peer.is_some() {
            // What it asked for to come with every datagram costs time, and is known here.
            let _ = socket.set_recv_tos_v4(false);
            let _ = setsockopt(&socket, sockopt::Ipv4PacketInfo, &false);
            let _ = setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &false);
        }
        Ok(Self {
            socket: socket.into(),
            state,
            peer,
        })
    }

    /// Another handle on the same socket.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let socket = self.socket.try_clone()?;
        let state = UdpSocketState::new((&socket).into())?;
        socket.set_nonblocking(false)?;
        Ok(Self {
            socket,
            state,
            peer: self.peer,
        })
    }

    /// Whether it speaks to one peer alone.
    pub(super) fn is_connected(&self) -> bool {
        self.peer.is_some()
    }

    /// The one that it speaks to.
    pub(super) fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// Applies what only the user of the link knows; nothing of it is needed for correctness. Returns how much the
    /// kernel keeps for a slow receiver, in bytes of its own accounting.
    pub(super) fn tune(&self, options: &Options) -> usize {
        let socket = socket2::SockRef::from(&self.socket);
        // Beyond net.core.rmem_max (socket(7)) only with CAP_NET_ADMIN.
        let bytes = options.socket_buffer_bytes;
        if setsockopt(&self.socket, sockopt::RcvBufForce, &bytes).is_err() {
            let _ = socket.set_recv_buffer_size(bytes);
        }
        if setsockopt(&self.socket, sockopt::SndBufForce, &bytes).is_err() {
            let _ = socket.set_send_buffer_size(bytes);
        }
        if let Some(priority) = options.priority {
            let _ = socket.set_priority(priority);
        }
        socket.recv_buffer_size().unwrap_or(bytes)
    }

    /// The address it is bound to.
    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Whether path MTU probes make sense on it.
    pub(super) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    /// How many datagrams of `mtu` bytes one send can carry.
    pub(super) fn segments(&self, mtu: u16) -> usize {
        self.state
            .max_gso_segments()
            .min(MAX_SEND_BYTES / usize::from(mtu.max(1)))
            .max(1)
    }

    /// Waits up to [`TICK`] for datagrams, which come `stride` bytes each, one after the other in `buffer`.
    ///
    /// On a connected socket, the first `spin` of it are spent on the CPU.
    ///
    /// `WouldBlock` when none came; `ConnectionRefused` when the kernel knows that nobody listens at the peer's address.
    pub(super) fn receive(&self, buffer: &mut [u8], spin: Duration) -> io::Result<RecvMeta> {
        let Some(peer) = self.peer else {
            let mut meta = [RecvMeta::default()];
            self.state
                .recv((&self.socket).into(), &mut [IoSliceMut::new(buffer)], &mut meta)?;
            return Ok(meta[0]);
        };
        let mut space = nix::cmsg_space!(i32);
        let mut parts = [IoSliceMut::new(buffer)];
        let mut spinning = !spin.is_zero();
        let begun = spinning.then(Instant::now);
        let message = loop {
            let flags = if spinning {
                MsgFlags::MSG_DONTWAIT
            } else {
                MsgFlags::empty()
            };
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
                Ok(message) => break message,
                Err(Errno::EAGAIN) if spinning => {
                    // Whoever else wants this core goes first: it may be the one that is waited for.
                    std::thread::yield_now();
                    spinning = begun.is_some_and(|begun| begun.elapsed() < spin);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        let stride = message.cmsgs()?.find_map(|item| match item {
            ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok(),
            _ => None,
        });
        let len = message.bytes;
        Ok(RecvMeta {
            addr: peer,
            len,
            stride: stride.unwrap_or(len),
            ecn: None,
            dst_ip: None,
        })
    }

    /// Sends. A datagram that the kernel refuses counts as lost on the way, which QUIC repairs. Returns
    /// whether the kernel reported that nobody listens at the peer's address.
    pub(super) fn send(&self, transmit: &quinn_proto::Transmit, contents: &[u8]) -> bool {
        let mut refused = false;
        for _ in 0..3 {
            let outcome = match self.peer {
                Some(peer) if transmit.segment_size.is_none() && peer == transmit.destination => {
                    self.socket.send(contents).map(drop)
                }
                _ => self.state.try_send(
                    (&self.socket).into(),
                    &quinn_udp::Transmit {
                        destination: transmit.destination,
                        ecn: None,
                        contents,
                        segment_size: transmit.segment_size,
                        src_ip: if self.peer.is_some() {
                            None
                        } else {
                            transmit.src_ip
                        },
                    },
                ),
            };
            match outcome {
                Ok(()) => {
                    return refused;
                }
                // The error belongs to an earlier datagram; this one was not sent.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => refused = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::trace!(%error, to = %transmit.destination, "datagram not sent");
                    return refused;
                }
            }
        }
        refused
    }
}

impl AsFd for Sock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_port_that_the_kernel_chooses_is_nobody_elses() {
        // With as many as this, two would have the same one nearly always (the usual range has 28,232).
        const MANY: usize = 700;
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listening: Vec<Sock> = (0..MANY).map(|_| Sock::listening(any).unwrap()).collect();
        let ports = listening.iter().map(|sock| sock.local_addr().unwrap());
        assert_eq!(ports.collect::<HashSet<_>>().len(), MANY);
        // But the socket of its peer is beside it.
        let local = listening[0].local_addr().unwrap();
        let peer = listening[1].local_addr().unwrap();
        let beside = Sock::accepted(local, peer).unwrap();
        assert_eq!(beside.local_addr().unwrap(), local);
    }
}
