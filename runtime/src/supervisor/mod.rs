//! The supervisor: the process on a remote node that owns the guests of one job.
//!
//! `mosd` starts it as `mosd supervise`, writes one [`SupervisorConfig`] to its standard input, and reads one
//! [`SupervisorAnswer`] from its standard output. After that the two have nothing to do with each other: the supervisor
//! is in a session of its own, and lives until its job ends or its contact is lost for good. A restart of `mosd` does
//! not touch it.

mod arrivals;
mod begun;
mod build;
mod calls;
mod clone;
mod contact;
mod deadline;
mod departure;
pub mod files;
mod guest;
pub mod handshake;
mod held;
mod homeward;
mod notify;
mod postcopy;
mod proc_files;
mod quiet;
mod shared;
mod signals;
mod split;
mod starter;
mod stored;
mod tracer;
mod transfer;
mod usage;

pub use handshake::{
    StoreConfig, SupervisorAnswer, SupervisorConfig, SupervisorLimits, SupervisorReady, answer_and_detach,
};

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use linklayer::frame::Header;
use linklayer::quic::{Fingerprint, Link, LinkListener, OneTimeKey, Options};
use linklayer::wire::{self, Kind};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};

/// How long a deputy may take from asking for a supervisor to its first packet.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a supervisor whose job is over goes on to put pages into the page store.
const LAST_PAGES: Duration = Duration::from_secs(1);

/// What files may take of this node's memory without [`SupervisorLimits::max_memory_bytes`], bytes.
const FILES_LIMIT_BYTES: u64 = 2 << 30;

/// Runs the supervisor of one job, in a process that has the job's user already, until the job has ended.
///
/// Listens on an address of its own, and says so to `mosd` with [`answer_and_detach`].
///
/// # Errors
/// What made it impossible to serve the job; `mosd` was told when it had not been answered before.
pub fn run(config: SupervisorConfig) -> anyhow::Result<()> {
    // Every thread inherits it: the tracer takes SIGCHLD from a descriptor.
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    // A write beyond RLIMIT_FSIZE is an error and not the end.
    set.add(Signal::SIGXFSZ);
    set.thread_block()?;
    shim::process::raise_nofile();
    shim::faults::look_in(crate::rundir::path());
    starter::run(|starter| contact(config, starter), trace)
}

/// What the tracer needs.
struct Ready {
    config: SupervisorConfig,
    shared: Arc<shared::Shared>,
    commands: crossbeam_channel::Receiver<shared::Command>,
    wake: Arc<EventFd>,
    link: Link,
}

/// Listens, tells `mosd`, and waits for home.
fn contact(config: SupervisorConfig, starter: starter::Starter) -> anyhow::Result<Ready> {
    let listening = (|| {
        let key = OneTimeKey::generate()?;
        let fingerprint = key.fingerprint();
        let listener = LinkListener::bind(SocketAddr::new(config.listen, 0), key)?;
        anyhow::Ok((listener, fingerprint))
    })();
    let (listener, fingerprint) = match listening {
        Ok(l) => l,
        Err(e) => {
            answer_and_detach(&SupervisorAnswer::Failed(format!("{e:#}")))?;
            return Err(e);
        }
    };
    let ready = SupervisorReady {
        addr: listener.local_addr(),
        fingerprint: fingerprint.0,
        pid: std::process::id(),
    };
    answer_and_detach(&SupervisorAnswer::Ready(ready))?;

    let (send, commands) = crossbeam_channel::unbounded();
    let wake = Arc::new(EventFd::from_flags(
        EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
    )?);
    let files_limit = config
        .limits
        .max_memory_bytes
        .map_or(FILES_LIMIT_BYTES, |m| m / 2);
    let stored = stored::Stored::start(config.store.clone());
    let shared = Arc::new(shared::Shared::new(
        send,
        wake.clone(),
        starter,
        stored,
        config.uid,
        files_limit,
        config.listen,
    ));
    let contact = Arc::new(contact::Contact::new(shared.clone()));
    let peer = Fingerprint(config.peer_fingerprint);
    let link = listener
        .accept(peer, contact, ACCEPT_TIMEOUT, Options::default())
        .context("waiting for home")?;
    shared.set_link(link.clone());
    let hello = wire::encode(&wire::Hello {
        version: wire::PROTOCOL_VERSION,
        node: config.node,
        refuse_homeward: false,
        topology_of_home: false,
        instructions: Vec::new(),
    });
    link.send(0, Header::new(Kind::Hello as u16, 0, link.next_seq()), &[&hello])?;
    usage::start(shared.clone())?;
    Ok(Ready {
        config,
        shared,
        commands,
        wake,
        link,
    })
}

/// The tracer's life.
fn trace(ready: Ready) -> anyhow::Result<()> {
    let stored = ready.shared.stored.clone();
    let mut tracer = tracer::Tracer::new(ready.shared, ready.commands, ready.wake, ready.config)?;
    let why = tracer.run()?;
    tracing::info!(why, "ends");
    tracer.tear_down();
    ready.link.close();
    stored.finish(LAST_PAGES);
    Ok(())
}
