//! How a process gets to a node: on the contact, or on a link of its own, so that the calls of others do not wait for its pages.

use std::sync::Arc;

use linklayer::image::ProcessImage;
use linklayer::pages::Writer;
use linklayer::quic::{Fingerprint, Link, OneTimeKey, Options, SendOnly};
use linklayer::wire::{self, FileRef, Kind, LARGE_BYTES, Launch, Listening, Place};

use crate::shared::Shared;

/// A way to a node.
#[derive(Debug)]
pub struct Road {
    /// The node.
    pub node: u32,
    /// The contact to it.
    pub contact: Link,
    /// A link for this process alone.
    bulk: Option<(Link, Place)>,
}

/// What it takes to build a process, but its pages.
pub struct Description {
    /// The process.
    pub image: ProcessImage,
    /// The files that it maps.
    pub files: Vec<FileRef>,
}

/// Has a supervisor wait for a process on a link of its own. Gives where, and the key to show there.
pub fn listen(contact: &Link, pid: i32) -> anyhow::Result<(Place, OneTimeKey)> {
    let key = OneTimeKey::generate()?;
    let body = wire::encode(&wire::Listen {
        pid,
        peer: key.fingerprint().0,
    });
    match wire::decode(&contact.ask(pid, Kind::Listen, &body)?)? {
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
                Ok(bulk) => road.bulk = Some(bulk),
                Err(e) => tracing::warn!(pid, node, error = format!("{e:#}"), "pages go on the contact"),
            }
        }
        Ok(road)
    }

    fn open_bulk(&self, pid: i32) -> anyhow::Result<(Link, Place)> {
        let (place, key) = listen(&self.contact, pid)?;
        let peer = Fingerprint(place.fingerprint);
        let link = Link::connect(place.addr, &key, peer, Arc::new(SendOnly), Options::of_process())?;
        Ok((link, place))
    }

    /// Whether pages can be sent while the process runs.
    pub fn has_link(&self) -> bool {
        self.bulk.is_some()
    }

    /// Where its pages go.
    pub fn link(&self) -> &Link {
        self.bulk.as_ref().map_or(&self.contact, |(link, _)| link)
    }

    /// Asks which pages are there already, so that they go as hashes.
    pub fn learn_known(&self, pid: i32, writer: &mut Writer) {
        if let Some((link, place)) = &self.bulk {
            shim::capture::learn_known(link, pid, place, writer);
        }
    }
}

impl Description {
    /// What is pending for single threads stays at home: the vessel will relay it.
    pub fn leave_pending(&mut self) {
        for thread in &mut self.image.threads {
            thread.pending.clear();
        }
    }

    /// As it is told to the node.
    pub fn into_launch(self) -> Launch {
        let hostname = nix::unistd::gethostname()
            .map(|h| h.into_encoded_bytes())
            .unwrap_or_default();
        Launch {
            image: self.image,
            files: self.files,
            hostname,
            overruns: Vec::new(),
        }
    }
}

impl Drop for Road {
    fn drop(&mut self) {
        // What was sent on it has been answered, or is of no use any more.
        if let Some((link, _)) = self.bulk.take() {
            link.close();
        }
    }
}
