//! How a process gets to a node: on the contact, or on a link of its own, so that the calls of others do not wait for its pages.

use std::sync::Arc;

use linklayer::image::ProcessImage;
use linklayer::pages::Writer;
use linklayer::quic::{Fingerprint, Link, OneTimeKey, Options};
use linklayer::wire::{self, FileRef, Kind, LARGE_BYTES, Launch, Listening, Place};
use shim::postcopy::SourceLink;

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
    /// What the node may say on that.
    pub source: Arc<SourceLink>,
    /// Why the process cannot run there before its memory has come.
    no_postcopy: String,
}

/// A supervisor that waits for a process.
pub struct Waiting {
    /// Where.
    pub place: Place,
    /// The key to show there.
    pub key: OneTimeKey,
    /// Why the process cannot run there before its memory has come; empty when it can.
    pub no_postcopy: String,
}

/// What it takes to build a process, but its pages.
pub struct Description {
    /// The process.
    pub image: ProcessImage,
    /// The files that it maps.
    pub files: Vec<FileRef>,
}

/// This machine's host name.
pub fn hostname() -> Vec<u8> {
    let name = nix::unistd::gethostname();
    name.map(|name| name.into_encoded_bytes()).unwrap_or_default()
}

/// Has a supervisor wait for a process on a link of its own.
pub fn listen(contact: &Link, pid: i32) -> anyhow::Result<Waiting> {
    let key = OneTimeKey::generate()?;
    let body = wire::encode(&wire::Listen {
        pid,
        peer: key.fingerprint().0,
    });
    match wire::decode(&contact.ask(pid, Kind::Listen, &body)?)? {
        Listening::At(place, no_postcopy) => Ok(Waiting {
            place,
            key,
            no_postcopy,
        }),
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
            source: Arc::default(),
            no_postcopy: "there is no link of its own to the node".into(),
        };
        if size_bytes > LARGE_BYTES {
            match road.open_bulk(pid) {
                Ok((link, place, no_postcopy)) => {
                    road.bulk = Some((link, place));
                    road.no_postcopy = no_postcopy;
                }
                Err(e) => tracing::warn!(pid, node, error = format!("{e:#}"), "pages go on the contact"),
            }
        }
        Ok(road)
    }

    fn open_bulk(&self, pid: i32) -> anyhow::Result<(Link, Place, String)> {
        let Waiting {
            place,
            key,
            no_postcopy,
        } = listen(&self.contact, pid)?;
        let peer = Fingerprint(place.fingerprint);
        let link = Link::connect(place.addr, &key, peer, self.source.clone(), Options::of_process())?;
        Ok((link, place, no_postcopy))
    }

    /// Whether the process can run there before its memory has come.
    ///
    /// # Errors
    /// Why not, for a person.
    pub fn postcopy(&self) -> Result<(), &str> {
        match self.no_postcopy.as_str() {
            "" => Ok(()),
            why => Err(why),
        }
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
        Launch {
            image: self.image,
            files: self.files,
            hostname: hostname(),
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
