//! All of a link but its sockets and threads: connections, session, timers.
//!
//! Sans-IO. Inputs: [`Core::handle_datagram`], [`Core::handle_timeout`], [`Core::refused`], [`Core::send`],
//! [`Core::close`]. After any of them the outputs are to be polled in this order: [`Core::poll_request`],
//! [`Core::poll_transmit`], [`Core::poll_delivery`], [`Core::poll_notice`], [`Core::next_timeout`].

mod news;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn_proto::{
    ClientConfig, ConnectionHandle, DatagramEvent, Endpoint, EndpointConfig, EndpointEvent, Incoming,
    ServerConfig, Transmit,
};

use self::news::code;
use super::conn::{Conn, Delivery, Via};
use super::control::Control;
use super::keys::SERVER_NAME;
use super::transport::transport;
use super::{Fingerprint, LinkError, OneTimeKey, Options, Stats};
use crate::frame::Header;
use crate::session::Session;

/// How long one attempt at a connection may take.
const ATTEMPT: Duration = Duration::from_secs(3);
/// Pause between attempts that fail at once, at first and at most.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// A peer whose port is closed is asked again at this interval ...
const REFUSED_PROBE: Duration = Duration::from_millis(80);
/// ... and is gone when it was refused so often for so long.
const REFUSED_COUNT: u32 = 3;
const REFUSED_FOR: Duration = Duration::from_millis(200);
/// Handshakes that may be under way on a listening end besides the connection in use.
const MAX_CANDIDATES: usize = 4;
/// The largest UDP payload that a socket of ours receives.
const MAX_UDP_BYTES: u16 = 65_527;

/// What the owner of the sockets has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Replace the side socket by a new one that is connected to `remote`.
    OpenSide {
        /// The listening end.
        remote: SocketAddr,
    },
    /// The connection on the side socket is in use now: it becomes the main one (connecting end), or a main socket is
    /// to be made that is connected to `remote` (listening end), and [`Core::promoted`] called.
    Promote {
        /// The peer's address.
        remote: SocketAddr,
        /// The address that the peer knows this end by.
        local_ip: Option<IpAddr>,
    },
}

/// What the user of the link is to be told.
#[derive(Debug, Clone)]
pub(super) enum Notice {
    /// The first connection stands.
    Established,
    /// Nothing is heard from the peer, or the connection broke.
    Interrupted,
    /// It goes on.
    Restored,
    /// It is over.
    Lost(LinkError),
}

#[derive(Debug)]
enum Role {
    Connecting {
        remote: SocketAddr,
        config: Box<ClientConfig>,
        session: [u8; 16],
        next_attempt: Instant,
        pause: Duration,
    },
    Listening {
        config: Arc<ServerConfig>,
        session: Option<[u8; 16]>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting,
    Live,
    Interrupted { since: Instant },
    Lost,
}

#[derive(Debug, Clone, Copy)]
struct RefusedState {
    since: Instant,
    count: u32,
    probe_at: Instant,
}

/// See the module's documentation.
pub(super) struct Core {
    endpoint: Endpoint,
    conns: Vec<Conn>,
    current: Option<ConnectionHandle>,
    role: Role,
    /// Counts the connections of the session.
    epoch: u32,
    session: Session,
    phase: Phase,
    /// When something of the connection in use was last received.
    heard: Instant,
    refused: Option<RefusedState>,
    inbox: VecDeque<Delivery>,
    notices: VecDeque<Notice>,
    requests: VecDeque<Request>,
    responses: VecDeque<(Transmit, Vec<u8>)>,
    scratch: Vec<u8>,
    /// Something happened since [`Core::poll_transmit`] had nothing more to send.
    stirred: bool,
    /// Counters of connections that are gone.
    past: Stats,
    options: Options,
}

impl Core {
    /// The end that connects to `remote`.
    pub(super) fn connecting(
        now: Instant,
        remote: SocketAddr,
        key: &OneTimeKey,
        peer: Fingerprint,
        options: Options,
    ) -> Result<Self, LinkError> {
        let mut config = ClientConfig::new(key.client_config(peer)?);
        config.transport_config(transport(&options));
        let role = Role::Connecting {
            remote,
            config: Box::new(config),
            session: rand::random(),
            next_attempt: now,
            pause: RETRY_MIN,
        };
        Ok(Self::new(now, role, None, true, options))
    }

    /// The end that waits for `peer` to connect.
    pub(super) fn listening(
        now: Instant,
        key: &OneTimeKey,
        peer: Fingerprint,
        probe_mtu: bool,
        options: Options,
    ) -> Result<Self, LinkError> {
        let mut config = ServerConfig::with_crypto(key.server_config(peer)?);
        config
            .transport_config(transport(&options))
            .max_incoming(MAX_CANDIDATES);
        let config = Arc::new(config);
        let role = Role::Listening {
            config: Arc::clone(&config),
            session: None,
        };
        Ok(Self::new(now, role, Some(config), probe_mtu, options))
    }

    fn new(
        now: Instant,
        role: Role,
        server: Option<Arc<ServerConfig>>,
        probe_mtu: bool,
        options: Options,
    ) -> Self {
        let mut config = EndpointConfig::default();
        // Cannot fail: the bound is the largest that exists.
        let _ = config.max_udp_payload_size(MAX_UDP_BYTES);
        Self {
            endpoint: Endpoint::new(Arc::new(config), server, probe_mtu, None),
            conns: Vec::new(),
            current: None,
            role,
            epoch: 0,
            session: Session::new(),
            phase: Phase::Starting,
            heard: now,
            refused: None,
            inbox: VecDeque::new(),
            notices: VecDeque::new(),
            requests: VecDeque::new(),
            responses: VecDeque::new(),
            scratch: Vec::new(),
            stirred: true,
            past: Stats::default(),
            options,
        }
    }

    /// Takes a frame to be sent. On an error nothing has changed.
    pub(super) fn send(&mut self, lane: u32, header: Header, parts: &[&[u8]]) -> Result<(), LinkError> {
        self.stirred = true;
        self.session.push(lane, header, parts)?;
        if let Some(conn) = current(&mut self.conns, self.current) {
            conn.write_ready(&mut self.session);
        }
        Ok(())
    }

    /// Bytes that the peer has not acknowledged.
    pub(super) fn kept_bytes(&self) -> usize {
        self.session.kept_bytes()
    }

    /// From now on the link is lost after so much silence.
    pub(super) fn be_patient(&mut self, give_up_after: Duration) {
        self.options.give_up_after = give_up_after;
    }

    /// Asks the peer to acknowledge everything now.
    pub(super) fn ask_acks(&mut self) {
        self.stirred = true;
        if let Some(conn) = current(&mut self.conns, self.current) {
            conn.send_control(&Control::AckNow);
        }
    }

    /// A datagram arrived.
    pub(super) fn handle_datagram(
        &mut self,
        now: Instant,
        via: Via,
        remote: SocketAddr,
        local_ip: Option<IpAddr>,
        data: BytesMut,
    ) {
        self.stirred = true;
        self.scratch.clear();
        match self
            .endpoint
            .handle(now, remote, local_ip, None, data, &mut self.scratch)
        {
            None => {}
            Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                if self.current == Some(handle) {
                    self.heard = now;
                }
                self.refused = None;
                if let Some(conn) = find(&mut self.conns, handle) {
                    conn.quic.handle_event(event);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => self.accept(now, via, incoming),
            Some(DatagramEvent::Response(transmit)) => self.respond(transmit),
        }
    }

    /// To be called after a batch of [`Core::handle_datagram`].
    pub(super) fn advance(&mut self, now: Instant) {
        self.stirred = true;
        let mut news = Vec::new();
        let mut at = 0;
        while at < self.conns.len() {
            let conn = &mut self.conns[at];
            let handle = conn.handle;
            conn.advance(
                now,
                &mut self.endpoint,
                &mut self.session,
                &mut self.inbox,
                &mut news,
            );
            at += 1;
            if news.is_empty() && !conn.drained {
                continue;
            }
            for item in news.drain(..) {
                self.on_news(now, handle, item);
            }
            // Nothing is left to be sent on it, and its handle is free for the next one.
            self.drop_conns(|conn| conn.drained);
            // Others may be gone, too: to look at one again does no harm.
            at = 0;
        }
        if self.phase == Phase::Lost || self.current.is_none() {
            return;
        }
        if let Phase::Interrupted { .. } = self.phase
            && now.saturating_duration_since(self.heard) < self.options.silence
        {
            self.phase = Phase::Live;
            self.notices.push_back(Notice::Restored);
            let in_use = self.current;
            self.drop_conns(|conn| Some(conn.handle) != in_use);
        }
        if let Some(conn) = current(&mut self.conns, self.current) {
            conn.write_ready(&mut self.session);
        }
    }

    /// The kernel says that nobody listens at the peer's address.
    pub(super) fn refused(&mut self, now: Instant) {
        self.stirred = true;
        let state = self.refused.get_or_insert(RefusedState {
            since: now,
            count: 0,
            probe_at: now + REFUSED_PROBE,
        });
        state.count += 1;
        let gone = state.count >= REFUSED_COUNT && now.saturating_duration_since(state.since) >= REFUSED_FOR;
        let others = matches!(self.role, Role::Listening { .. }) && self.conns.len() > 1;
        if gone && !others && self.phase != Phase::Lost {
            self.lose(now, LinkError::Refused, None);
        }
    }

    /// Time has come to `now`.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.stirred = true;
        if self.phase == Phase::Lost {
            return;
        }
        let mut expired = false;
        for conn in &mut self.conns {
            if conn.quic.poll_timeout().is_some_and(|at| at <= now) {
                conn.quic.handle_timeout(now);
                expired = true;
            }
        }
        if expired {
            self.advance(now);
        }
        self.drop_conns(|conn| !conn.established && conn.expires <= now);
        if self.session.next_timeout().is_some_and(|at| at <= now)
            && let Some(conn) = current(&mut self.conns, self.current)
        {
            let acks = self.session.take_acks();
            if !acks.is_empty() {
                conn.send_control(&Control::Acks(acks));
            }
        }
        self.watch(now);
        self.attempt(now);
    }

    /// When [`Core::handle_timeout`] is to be called, however late.
    pub(super) fn next_timeout(&mut self) -> Option<Instant> {
        if self.phase == Phase::Lost {
            return None;
        }
        let mut next = self.session.next_timeout();
        let mut add = |at: Instant| next = Some(next.map_or(at, |next| next.min(at)));
        let mut trying = false;
        for conn in &mut self.conns {
            if let Some(at) = conn.quic.poll_timeout() {
                add(at);
            }
            if !conn.established {
                trying = true;
                add(conn.expires);
            }
        }
        match self.phase {
            Phase::Live => add(self.heard + self.options.silence),
            Phase::Interrupted { since } => add(since + self.options.give_up_after),
            Phase::Starting | Phase::Lost => {}
        }
        if let Some(refused) = self.refused {
            add(refused.probe_at);
        }
        if let Role::Connecting { next_attempt, .. } = self.role
            && self.phase != Phase::Live
            && !trying
        {
            add(next_attempt);
        }
        next
    }

    /// The next thing that the owner of the sockets has to do.
    pub(super) fn poll_request(&mut self) -> Option<Request> {
        self.requests.pop_front()
    }

    /// The main socket belongs to the connection in use from now on.
    pub(super) fn promoted(&mut self) {
        self.stirred = true;
        if let Some(conn) = current(&mut self.conns, self.current) {
            conn.via = Via::Main;
        }
    }

    /// The next datagrams to be sent, put into `buffer`, which must be empty.
    pub(super) fn poll_transmit(
        &mut self,
        now: Instant,
        segments: impl Fn(u16) -> usize,
        buffer: &mut Vec<u8>,
    ) -> Option<(Via, Transmit)> {
        // To find nothing to send takes the connection almost as long as to make a small datagram.
        if !self.stirred {
            return None;
        }
        if let Some((transmit, contents)) = self.responses.pop_front() {
            buffer.extend_from_slice(&contents);
            return Some((Via::Side, transmit));
        }
        for conn in &mut self.conns {
            let segments = segments(conn.quic.current_mtu()).min(self.options.segments);
            if let Some(transmit) = conn.quic.poll_transmit(now, segments, buffer) {
                return Some((conn.via, transmit));
            }
        }
        self.stirred = false;
        None
    }

    /// The next frame to be delivered.
    pub(super) fn poll_delivery(&mut self) -> Option<Delivery> {
        self.inbox.pop_front()
    }

    /// The next thing that the user is to be told.
    pub(super) fn poll_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    /// Whether a connection is in use and heard of.
    pub(super) fn is_live(&self) -> bool {
        self.phase == Phase::Live
    }

    /// Ends the link. What [`Core::poll_transmit`] gives afterwards tells the peer.
    pub(super) fn close(&mut self, now: Instant) {
        self.stirred = true;
        if self.phase != Phase::Lost {
            self.phase = Phase::Lost;
            self.close_conns(now, code::DONE, "");
        }
    }

    /// Forgets the connection in use.
    #[cfg(test)]
    pub(super) fn drop_connection(&mut self, now: Instant) {
        self.stirred = true;
        let in_use = self.current;
        self.drop_conns(|conn| Some(conn.handle) == in_use);
        self.interrupt(now);
    }

    /// Counters.
    pub(super) fn stats(&mut self) -> Stats {
        let mut stats = self.past;
        stats.unacknowledged_bytes = self.session.kept_bytes();
        stats.duplicates = self.session.duplicates();
        stats.resent = self.session.resent();
        if let Some(conn) = current(&mut self.conns, self.current) {
            let quic = conn.quic.stats();
            stats.rtt_us = conn.quic.rtt().as_micros() as u64;
            stats.mtu_bytes = conn.quic.current_mtu();
            stats.frames_sent += conn.frames_sent;
            stats.frames_received += conn.frames_received;
            stats.sent_bytes = quic.udp_tx.bytes;
            stats.received_bytes = quic.udp_rx.bytes;
            stats.lost_packets = quic.path.lost_packets;
        }
        stats
    }

    fn accept(&mut self, now: Instant, via: Via, incoming: Incoming) {
        let Role::Listening { config, .. } = &self.role else {
            self.endpoint.ignore(incoming);
            return;
        };
        let config = Arc::clone(config);
        let candidates = self.conns.iter().filter(|conn| !conn.established).count();
        if candidates >= MAX_CANDIDATES || self.phase == Phase::Lost {
            self.endpoint.ignore(incoming);
            return;
        }
        self.scratch.clear();
        match self
            .endpoint
            .accept(incoming, now, &mut self.scratch, Some(config))
        {
            Ok((handle, quic)) => self.conns.push(Conn::new(handle, quic, via, now + ATTEMPT)),
            Err(error) => {
                tracing::debug!(error = %error.cause, "handshake refused");
                if let Some(transmit) = error.response {
                    self.respond(transmit);
                }
            }
        }
    }

    /// Sends what is in `scratch`, unless too much of that kind waits already.
    fn respond(&mut self, transmit: Transmit) {
        if self.responses.len() < MAX_CANDIDATES {
            self.responses.push_back((transmit, self.scratch.clone()));
        }
    }

    /// Looks for silence, closed ports, and the end of patience.
    fn watch(&mut self, now: Instant) {
        match self.phase {
            Phase::Live if self.heard + self.options.silence <= now => self.interrupt(now),
            Phase::Interrupted { since } if since + self.options.give_up_after <= now => {
                let silent = now.saturating_duration_since(self.heard);
                self.lose(now, LinkError::TimedOut(silent), Some(code::GAVE_UP));
            }
            _ => {}
        }
        let Some(refused) = &mut self.refused else { return };
        if refused.probe_at > now {
            return;
        }
        refused.probe_at = now + REFUSED_PROBE;
        match current(&mut self.conns, self.current) {
            Some(conn) => conn.quic.ping(),
            // Without a connection, only a new attempt sends at once.
            None => {
                self.drop_conns(|conn| !conn.established);
                if let Role::Connecting { next_attempt, .. } = &mut self.role {
                    *next_attempt = now;
                }
            }
        }
    }

    /// Tries a new connection if one is due.
    fn attempt(&mut self, now: Instant) {
        if !matches!(self.phase, Phase::Starting | Phase::Interrupted { .. })
            || self.conns.iter().any(|conn| !conn.established)
        {
            return;
        }
        let Role::Connecting {
            remote,
            config,
            next_attempt,
            pause,
            ..
        } = &mut self.role
        else {
            return;
        };
        if *next_attempt > now {
            return;
        }
        *next_attempt = now + *pause;
        *pause = (*pause * 2).min(RETRY_MAX);
        let remote = *remote;
        match self
            .endpoint
            .connect(now, (**config).clone(), remote, SERVER_NAME)
        {
            Ok((handle, quic)) => {
                self.epoch += 1;
                self.requests.push_back(Request::OpenSide { remote });
                self.conns.push(Conn::new(handle, quic, Via::Side, now + ATTEMPT));
            }
            Err(error) => self.lose(now, LinkError::Protocol(error.to_string()), None),
        }
    }

    /// Forgets the connections for which `which` holds, without a word to the peer.
    fn drop_conns(&mut self, mut which: impl FnMut(&Conn) -> bool) {
        let mut at = 0;
        while at < self.conns.len() {
            if !which(&self.conns[at]) {
                at += 1;
                continue;
            }
            let conn = self.conns.remove(at);
            if !conn.drained {
                self.endpoint.handle_event(conn.handle, EndpointEvent::drained());
            }
            self.past.frames_sent += conn.frames_sent;
            self.past.frames_received += conn.frames_received;
            if self.current == Some(conn.handle) {
                self.current = None;
                self.session.disconnected();
            }
        }
    }
}

fn current(conns: &mut [Conn], handle: Option<ConnectionHandle>) -> Option<&mut Conn> {
    find(conns, handle?)
}

fn find(conns: &mut [Conn], handle: ConnectionHandle) -> Option<&mut Conn> {
    conns.iter_mut().find(|conn| conn.handle == handle)
}
