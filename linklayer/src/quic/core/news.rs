//! What follows from what a connection says: hello, trouble, the end.

use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn_proto::{ConnectionError, ConnectionHandle, TransportErrorCode, VarInt};

use super::{Core, Notice, Phase, RETRY_MAX, RETRY_MIN, Request, Role, find};
use crate::quic::LinkError;
use crate::quic::conn::News;
use crate::quic::control::{Control, Hello, VERSION};

/// Codes that a link closes a connection with.
pub(super) mod code {
    /// The link is done.
    pub(in crate::quic) const DONE: u32 = 0;
    /// The peer broke the protocol.
    pub(in crate::quic) const PROTOCOL: u32 = 1;
    /// The peer speaks another version.
    pub(in crate::quic) const VERSION: u32 = 2;
    /// The peer's session is not the one of this link.
    pub(in crate::quic) const SESSION: u32 = 3;
    /// Nothing was heard for too long.
    pub(in crate::quic) const GAVE_UP: u32 = 4;
}

impl Core {
    pub(super) fn on_news(&mut self, now: Instant, handle: ConnectionHandle, news: News) {
        if self.phase == Phase::Lost {
            return;
        }
        match news {
            News::Connected => self.on_connected(handle),
            News::Control(Control::Hello(hello)) => self.on_hello(now, handle, &hello),
            News::Control(Control::Acks(acks)) => {
                if self.current != Some(handle) {
                    return;
                }
                for (lane, upto) in acks {
                    if let Err(error) = self.session.acknowledged(lane, upto) {
                        self.broken(now, handle, error.to_string());
                        return;
                    }
                }
            }
            News::Control(Control::AckNow) => self.session.hurry_acks(now),
            News::Gone(reason) => self.on_gone(now, handle, reason),
            News::Broken(what) => self.broken(now, handle, what),
        }
    }

    /// The end that connected says hello first.
    pub(super) fn on_connected(&mut self, handle: ConnectionHandle) {
        let Role::Connecting { session, .. } = self.role else {
            return;
        };
        let (epoch, positions) = (self.epoch, self.session.positions());
        if let Some(conn) = find(&mut self.conns, handle) {
            conn.send_control(&Control::Hello(Hello {
                version: VERSION,
                session,
                epoch,
                positions,
            }));
        }
    }

    pub(super) fn on_hello(&mut self, now: Instant, handle: ConnectionHandle, hello: &Hello) {
        let Some(conn) = find(&mut self.conns, handle) else {
            return;
        };
        if conn.established {
            self.broken(now, handle, "it said hello twice".to_owned());
            return;
        }
        if hello.version != VERSION {
            let error = LinkError::Version {
                ours: VERSION,
                theirs: hello.version,
            };
            self.fail(now, handle, error, code::VERSION);
            return;
        }
        match &mut self.role {
            Role::Connecting { session, .. } => {
                if hello.session != *session || hello.epoch != self.epoch {
                    self.broken(now, handle, "it answered another hello".to_owned());
                    return;
                }
            }
            Role::Listening { session, .. } => {
                if session.is_some_and(|known| known != hello.session) {
                    let error = LinkError::Protocol("it began another session".to_owned());
                    self.fail(now, handle, error, code::SESSION);
                    return;
                }
                if hello.epoch <= self.epoch {
                    // A connection that was given up long ago.
                    self.drop_conns(|conn| conn.handle == handle);
                    return;
                }
                *session = Some(hello.session);
                self.epoch = hello.epoch;
                let answer = Hello {
                    positions: self.session.positions(),
                    ..hello.clone()
                };
                conn.send_control(&Control::Hello(answer));
            }
        }
        self.adopt(now, handle, hello);
    }

    /// `handle` becomes the connection in use.
    pub(super) fn adopt(&mut self, now: Instant, handle: ConnectionHandle, hello: &Hello) {
        if let Err(error) = self.session.resume(&hello.positions) {
            self.fail(now, handle, error.into(), code::PROTOCOL);
            return;
        }
        let old = self.current.replace(handle);
        let connecting = matches!(self.role, Role::Connecting { .. });
        self.drop_conns(|conn| conn.handle != handle && (connecting || Some(conn.handle) == old));
        self.heard = now;
        self.refused = None;
        if let Role::Connecting { pause, .. } = &mut self.role {
            *pause = RETRY_MIN;
        }
        let Some(conn) = find(&mut self.conns, handle) else {
            return;
        };
        let (remote, local_ip) = (conn.quic.remote_address(), conn.quic.local_ip());
        self.requests.push_back(Request::Promote { remote, local_ip });
        match self.phase {
            Phase::Starting => self.notices.push_back(Notice::Established),
            Phase::Live => self.past.reconnects += 1,
            Phase::Interrupted { .. } => {
                self.past.reconnects += 1;
                self.notices.push_back(Notice::Restored);
            }
            Phase::Lost => {}
        }
        self.phase = Phase::Live;
        for item in conn.establish(now, &mut self.session, &mut self.inbox) {
            self.on_news(now, handle, item);
        }
    }

    pub(super) fn on_gone(&mut self, now: Instant, handle: ConnectionHandle, reason: ConnectionError) {
        let in_use = self.current == Some(handle);
        let fatal = match &reason {
            ConnectionError::ApplicationClosed(close) => Some(closed(close.error_code, &close.reason)),
            ConnectionError::TransportError(error) => untrusted(error.code, &error.reason),
            ConnectionError::ConnectionClosed(close) => {
                untrusted(close.error_code, &String::from_utf8_lossy(&close.reason))
            }
            ConnectionError::VersionMismatch => {
                Some(LinkError::Protocol("it speaks another QUIC".to_owned()))
            }
            _ => None,
        };
        tracing::debug!(%reason, in_use, "connection gone");
        if in_use {
            self.current = None;
            self.session.disconnected();
        }
        if let Some(conn) = find(&mut self.conns, handle) {
            // It stays for a moment, to tell the peer why, and is then forgotten.
            conn.established = false;
            conn.expires = now + RETRY_MIN;
        }
        let starting = self.phase == Phase::Starting && matches!(self.role, Role::Connecting { .. });
        match fatal {
            Some(error) if in_use || starting => self.lose(now, error, None),
            _ if in_use => self.interrupt(now),
            _ => {}
        }
        if let Role::Connecting {
            next_attempt, pause, ..
        } = &mut self.role
        {
            *next_attempt = now + *pause;
            *pause = (*pause * 2).min(RETRY_MAX);
        }
    }

    pub(super) fn broken(&mut self, now: Instant, handle: ConnectionHandle, what: String) {
        self.fail(now, handle, LinkError::Protocol(what), code::PROTOCOL);
    }

    /// Closes a connection for what the peer did. If the link depends on it, the link is lost.
    pub(super) fn fail(&mut self, now: Instant, handle: ConnectionHandle, error: LinkError, code: u32) {
        let starting = self.phase == Phase::Starting && matches!(self.role, Role::Connecting { .. });
        if self.current == Some(handle) || starting {
            self.lose(now, error, Some(code));
            return;
        }
        tracing::debug!(%error, "connection refused");
        if let Some(conn) = find(&mut self.conns, handle) {
            conn.quic
                .close(now, VarInt::from_u32(code), Bytes::from(error.to_string()));
            // Let the close go out, then forget it.
            conn.expires = now + RETRY_MIN;
        }
    }

    pub(super) fn lose(&mut self, now: Instant, error: LinkError, code: Option<u32>) {
        tracing::debug!(%error, "link lost");
        if let Some(code) = code {
            self.close_conns(now, code, &error.to_string());
        }
        self.phase = Phase::Lost;
        self.session.disconnected();
        self.notices.push_back(Notice::Lost(error));
    }

    pub(super) fn close_conns(&mut self, now: Instant, code: u32, reason: &str) {
        for conn in &mut self.conns {
            conn.quic.close(
                now,
                VarInt::from_u32(code),
                Bytes::copy_from_slice(reason.as_bytes()),
            );
        }
    }

    pub(super) fn interrupt(&mut self, now: Instant) {
        if self.phase != Phase::Live {
            return;
        }
        self.phase = Phase::Interrupted { since: self.heard };
        self.notices.push_back(Notice::Interrupted);
        if let Role::Connecting { next_attempt, .. } = &mut self.role {
            *next_attempt = now;
        }
    }
}

/// What the peer means by closing with `code`.
fn closed(code: VarInt, reason: &[u8]) -> LinkError {
    let reason = String::from_utf8_lossy(reason).into_owned();
    match u32::try_from(code.into_inner()) {
        Ok(code::DONE) => LinkError::Closed,
        Ok(code::GAVE_UP) => LinkError::TimedOut(Duration::ZERO),
        _ => LinkError::Rejected(reason),
    }
}

/// A handshake that failed in TLS: one of the two is not who the other expects.
fn untrusted(code: TransportErrorCode, reason: &str) -> Option<LinkError> {
    let code: u64 = code.into();
    (0x100..0x200)
        .contains(&code)
        .then(|| LinkError::Untrusted(reason.to_owned()))
}
