//! The end of a link that is connected to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::core::Core;
use super::link::{Handler, Link};
use super::socket::Sock;
use super::{Fingerprint, LinkError, OneTimeKey, Options};

/// A bound UDP socket that becomes one end of one [`Link`].
#[derive(Debug)]
pub struct LinkListener {
    socket: Mutex<Option<Sock>>,
    local: SocketAddr,
    key: OneTimeKey,
}

impl LinkListener {
    /// Binds to `local` (port 0: any). Who connects from now on is answered once [`LinkListener::accept`] is called.
    pub fn bind(local: SocketAddr, key: OneTimeKey) -> Result<Self, LinkError> {
        let socket = Sock::listening(local).map_err(LinkError::io("bind the link's socket"))?;
        let local = socket
            .local_addr()
            .map_err(LinkError::io("ask for the socket's address"))?;
        Ok(Self {
            socket: Mutex::new(Some(socket)),
            local,
            key,
        })
    }

    /// The address that it is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Waits up to `timeout` for the end whose key has the fingerprint `peer`. Anybody else is turned away.
    ///
    /// A listener makes one link, which goes on to answer the same peer when it connects anew; afterwards this is
    /// [`LinkError::InUse`]. After [`LinkError::TimedOut`] it can be called again.
    pub fn accept(
        &self,
        peer: Fingerprint,
        handler: Arc<dyn Handler>,
        timeout: Duration,
        options: Options,
    ) -> Result<Link, LinkError> {
        let mut slot = self.socket.lock();
        let socket = slot.as_ref().ok_or(LinkError::InUse)?;
        let options = options.clone().fitted(socket.tune(&options));
        let probe_mtu = !socket.may_fragment();
        let core = Core::listening(Instant::now(), &self.key, peer, probe_mtu, options.clone())?;
        let again = socket
            .try_clone()
            .map_err(LinkError::io("clone the link's socket"))?;
        let link = Link::start(core, again, handler, options)?.established(timeout)?;
        *slot = None;
        Ok(link)
    }
}
