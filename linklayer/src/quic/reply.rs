//! Answers, and links on which only one end asks.

use super::{Handler, Link, LinkError};
use crate::frame::{Header, flags};
use crate::wire::{self, Kind};

/// Where an answer goes.
#[derive(Clone)]
pub struct ReplyTo {
    /// The link by which the request came.
    pub link: Link,
    /// Its lane.
    pub lane: u32,
    /// Its header.
    pub header: Header,
}

impl ReplyTo {
    /// Sends the answer. A lost link is noticed elsewhere.
    pub fn send(&self, parts: &[&[u8]]) {
        let header = Header {
            flags: flags::REPLY,
            ..self.header
        };
        if let Err(e) = self.link.send(self.lane, header, parts) {
            tracing::debug!(error = %e, "answer not sent");
        }
    }

    /// Sends an errno.
    pub fn errno(&self, errno: i32) {
        self.send(&[&wire::encode(&wire::Errno(errno))]);
    }
}

/// The end of a link that sends and gets answers, and is asked nothing.
pub struct SendOnly;

impl Handler for SendOnly {
    fn frame(&self, link: &Link, _lane: u32, header: Header, _payload: Vec<u8>) {
        tracing::error!(
            kind = header.kind,
            "a frame that nobody asked for on the link of a process"
        );
        link.close();
    }

    fn lost(&self, why: &LinkError) {
        tracing::debug!(error = %why, "link of a process");
    }
}

impl Link {
    /// Sends a frame about a process or thread, on a lane.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub fn tell(&self, lane: i32, about: i32, kind: Kind, parts: &[&[u8]]) -> Result<(), LinkError> {
        let header = Header::new(kind as u16, about, self.next_seq());
        self.send(lane as u32, header, parts)
    }

    /// Asks about a process on its own lane, and waits for the answer.
    ///
    /// # Errors
    /// As [`Link::call`].
    pub fn ask(&self, pid: i32, kind: Kind, body: &[u8]) -> Result<Vec<u8>, LinkError> {
        let header = Header::new(kind as u16, pid, self.next_seq());
        Ok(self.call(pid as u32, header, &[body])?.1)
    }
}
