//! How a process gets to a node: on the contact, or on a link of its own, so that the calls of others do not wait for its pages.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use linklayer::frame::Header;
use linklayer::image::ProcessImage;
use linklayer::pages::Writer;
use linklayer::quic::{Fingerprint, Handler, Link, LinkError, OneTimeKey, Options};
use linklayer::wire::{self, FileRef, Kind, Listening, MoveReport, Place};

use crate::shared::Shared;

/// A process with more memory than this gets a link of its own, bytes.
const LARGE_BYTES: u64 = 4 << 20;
/// How long a link of a process that stands still may be silent.
const PATIENCE: Duration = Duration::from_secs(10);

/// A way to a node.
#[derive(Debug)]
pub struct Road {
    /// The node.
    pub node: u32,
    /// The contact to it.
    pub contact: Link,
    /// A link for this process alone.
    bulk: Option<Link>,
}

/// What it takes to build a process, but its pages.
pub struct Description {
    /// The process.
    pub image: ProcessImage,
    /// The files that it maps.
    pub files: Vec<FileRef>,
}

/// A link that only sends, and gets answers.
struct Mute;

impl Handler for Mute {
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

/// Options of a link for one process.
pub fn options() -> Options {
    Options {
        give_up_after: PATIENCE,
        ..Options::bulk()
    }
}

/// Has a supervisor wait for a process on a link of its own. Gives where, and the key to show there.
pub fn listen(contact: &Link, pid: i32) -> anyhow::Result<(Place, OneTimeKey)> {
    let key = OneTimeKey::generate()?;
    let body = wire::encode(&wire::Listen {
        pid,
        peer: key.fingerprint().0,
    });
    let header = Header::new(Kind::Listen as u16, pid, contact.next_seq());
    let (_, answer) = contact.call(pid as u32, header, &[&body])?;
    match wire::decode(&answer)? {
        Listening::At(place) => Ok((place, key)),
        Listening::Refused(why) => anyhow::bail!("{why}"),
    }
}

impl Road {
    /// Opens the way for a process of this size.
    ///
    /// # Errors
    /// The node cannot be reached.
    pub fn open(shared: &Arc<Shared>, node: u32, pid: i32, size_bytes: u64) -> Result<Road, String> {
        let contact = shared.contact(node)?;
        let mut road = Road {
            node,
            contact,
            bulk: None,
        };
        if size_bytes > LARGE_BYTES {
            match road.open_bulk(pid) {
                Ok(link) => road.bulk = Some(link),
                Err(e) => tracing::warn!(pid, node, error = format!("{e:#}"), "pages go on the contact"),
            }
        }
        Ok(road)
    }

    fn open_bulk(&self, pid: i32) -> anyhow::Result<Link> {
        let (place, key) = listen(&self.contact, pid)?;
        let peer = Fingerprint(place.fingerprint);
        Ok(Link::connect(place.addr, &key, peer, Arc::new(Mute), options())?)
    }

    /// Whether pages can be sent while the process runs.
    pub fn has_link(&self) -> bool {
        self.bulk.is_some()
    }

    fn link(&self) -> &Link {
        self.bulk.as_ref().unwrap_or(&self.contact)
    }

    /// Sends one frame about a process.
    ///
    /// # Errors
    /// The link is lost.
    pub fn send(&self, pid: i32, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
        send(self.link(), pid, kind, parts)
    }

    /// See [`send_process`].
    ///
    /// # Errors
    /// As there.
    pub fn send_process(
        &self,
        description: Description,
        runs: &[Range<u64>],
        present: Option<&[Range<u64>]>,
        writer: &mut Writer,
        report: &mut MoveReport,
    ) -> anyhow::Result<()> {
        send_process(self.link(), description, runs, present, writer, report)
    }
}

impl Description {
    /// What is pending for single threads stays at home: the vessel will relay it.
    pub fn leave_pending(&mut self) {
        for thread in &mut self.image.threads {
            thread.pending.clear();
        }
    }
}

fn send(link: &Link, pid: i32, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
    let header = Header::new(kind as u16, pid, link.next_seq());
    link.send(pid as u32, header, parts).map_err(io::Error::other)
}

/// Sends a stopped process and waits until it stands ready. `runs` are the pages that are still to be sent; `present` are all that
/// it has, when some were sent before.
///
/// # Errors
/// It was refused, or the link is lost.
pub fn send_process(
    link: &Link,
    description: Description,
    runs: &[Range<u64>],
    present: Option<&[Range<u64>]>,
    writer: &mut Writer,
    report: &mut MoveReport,
) -> anyhow::Result<()> {
    let (pid, tid) = (description.image.pid, description.image.reached_by());
    let hostname = nix::unistd::gethostname()
        .map(|h| h.into_encoded_bytes())
        .unwrap_or_default();
    let launch = wire::encode(&wire::Launch {
        image: description.image,
        files: description.files,
        hostname,
        overruns: Vec::new(),
    });
    let begun = Instant::now();
    send(link, pid, Kind::Launch, &[&launch])?;
    shim::capture::write_pages(tid, runs, writer, &mut |kind, parts| send(link, pid, kind, parts))
        .context("its memory")?;
    if let Some(present) = present {
        wire::present(present, &mut |body| send(link, pid, Kind::Present, &[body]))?;
    }
    report.times.pages_us = begun.elapsed().as_micros() as u64;
    report.pages = writer.counts;
    let header = Header::new(Kind::LaunchBuild as u16, pid, link.next_seq());
    let asked = Instant::now();
    let (_, answer) = link.call(pid as u32, header, &[&wire::encode(&wire::Pid(pid))])?;
    let ready: wire::LaunchReady = wire::decode(&answer)?;
    anyhow::ensure!(ready.refused.is_empty(), "refused by the node: {}", ready.refused);
    let waited = asked.elapsed().as_micros() as u64;
    report.times.restore_us = ready.restore_us.min(waited);
    report.times.transfer_us = waited - report.times.restore_us;
    Ok(())
}

impl Drop for Road {
    fn drop(&mut self) {
        // What was sent on it has been answered, or is of no use any more.
        if let Some(link) = self.bulk.take() {
            link.close();
        }
    }
}
