//! A path between two ends that can be cut, can lose, and can change its address.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

/// Forwards datagrams between whoever sends to it and a fixed address, until it is dropped.
pub(super) struct Relay {
    pub(super) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    front: UdpSocket,
    back: Mutex<Arc<UdpSocket>>,
    target: SocketAddr,
    client: Mutex<Option<SocketAddr>>,
    cut: AtomicBool,
    /// Datagrams of a thousand that are lost.
    loss_per_mille: AtomicU32,
    ended: AtomicBool,
}

impl Relay {
    pub(super) fn new(target: SocketAddr) -> Self {
        let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        front.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let address = front.local_addr().unwrap();
        let shared = Arc::new(Shared {
            front,
            back: Mutex::new(back()),
            target,
            client: Mutex::new(None),
            cut: AtomicBool::new(false),
            loss_per_mille: AtomicU32::new(0),
            ended: AtomicBool::new(false),
        });
        let (there, again) = (Arc::clone(&shared), Arc::clone(&shared));
        thread::spawn(move || there.forward());
        thread::spawn(move || again.backward());
        Self { address, shared }
    }

    /// Whether nothing passes.
    pub(super) fn set_cut(&self, cut: bool) {
        self.shared.cut.store(cut, Ordering::SeqCst);
    }

    pub(super) fn set_loss_per_mille(&self, loss: u32) {
        self.shared.loss_per_mille.store(loss, Ordering::SeqCst);
    }

    /// From now on the target sees another address, as behind a NAT that forgot.
    pub(super) fn change_address(&self) {
        *self.shared.back.lock() = back();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
    }
}

impl Shared {
    fn forward(&self) {
        let mut buffer = vec![0; 65536];
        while !self.ended.load(Ordering::SeqCst) {
            let Ok((len, from)) = self.front.recv_from(&mut buffer) else {
                continue;
            };
            *self.client.lock() = Some(from);
            if self.passes() {
                let socket = Arc::clone(&self.back.lock());
                let _ = socket.send_to(&buffer[..len], self.target);
            }
        }
    }

    fn backward(&self) {
        let mut buffer = vec![0; 65536];
        while !self.ended.load(Ordering::SeqCst) {
            let socket = Arc::clone(&self.back.lock());
            let Ok((len, _)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            let client = *self.client.lock();
            if let Some(client) = client
                && self.passes()
            {
                let _ = self.front.send_to(&buffer[..len], client);
            }
        }
    }

    fn passes(&self) -> bool {
        !self.cut.load(Ordering::SeqCst)
            && rand::random_range(0..1000) >= self.loss_per_mille.load(Ordering::SeqCst)
    }
}

fn back() -> Arc<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    Arc::new(socket)
}
