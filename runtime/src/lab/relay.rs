//! A switch with slow and lossy links: what the lab uses where the kernel has no netem.
//!
//! [`Switch`] decides, without I/O, clock or entropy of its own: frames and the time go in, frames that are due come out.
//! [`run`] drives one over TAP devices.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Most bytes under way at once; frames beyond it are lost, as on a full queue of a real switch.
const MAX_QUEUED_BYTES: usize = 64 << 20;
/// Largest frame: a TAP device without offloads gives one MTU and the Ethernet header.
const MAX_FRAME_BYTES: usize = 65_536;
/// Ends of an Ethernet address in a frame.
const ADDRESS_BYTES: usize = 6;

/// A port of the switch: an index from 0.
pub type Port = usize;

struct Pending {
    due: Duration,
    from: Port,
    to: Option<Port>,
    frame: Vec<u8>,
}

/// A learning Ethernet switch. Every frame arrives `delay` later, or, with probability `loss`, never.
///
/// The caller gives frames to [`handle_frame`](Self::handle_frame), and takes those that are due from
/// [`poll_frame`](Self::poll_frame) whenever [`poll_timeout`](Self::poll_timeout) has come. Times are since any fixed
/// moment and must not go back.
pub struct Switch {
    ports: usize,
    delay: Duration,
    loss: f64,
    rng: SmallRng,
    learned: HashMap<[u8; ADDRESS_BYTES], Port>,
    queue: VecDeque<Pending>,
    queued_bytes: usize,
}

impl Switch {
    /// A switch of `ports` ports; the losses follow from `seed`.
    pub fn new(ports: usize, delay: Duration, loss: f64, seed: u64) -> Self {
        Self {
            ports,
            delay,
            loss,
            rng: SmallRng::seed_from_u64(seed),
            learned: HashMap::new(),
            queue: VecDeque::new(),
            queued_bytes: 0,
        }
    }

    /// A frame came in at `from`. Frames that are too short to have addresses are dropped.
    pub fn handle_frame(&mut self, now: Duration, from: Port, frame: Vec<u8>) {
        let address =
            |at: usize| -> Option<[u8; ADDRESS_BYTES]> { frame.get(at..at + ADDRESS_BYTES)?.try_into().ok() };
        let (Some(to), Some(source)) = (address(0), address(ADDRESS_BYTES)) else {
            return;
        };
        let group = |a: &[u8; ADDRESS_BYTES]| a[0] & 1 == 1;
        // A node has one address; the table is bounded all the same, for a guest may send what it likes.
        if !group(&source) && (self.learned.len() < 4096 || self.learned.contains_key(&source)) {
            self.learned.insert(source, from);
        }
        let to = if group(&to) {
            None
        } else {
            self.learned.get(&to).copied()
        };
        if to == Some(from) || self.queued_bytes + frame.len() > MAX_QUEUED_BYTES {
            return;
        }
        if self.loss > 0.0 && self.rng.random_bool(self.loss) {
            return;
        }
        self.queued_bytes += frame.len();
        self.queue.push_back(Pending {
            due: now + self.delay,
            from,
            to,
            frame,
        });
    }

    /// When [`poll_frame`](Self::poll_frame) will have something.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.queue.front().map(|p| p.due)
    }

    /// The next frame that is due, with the ports it goes to.
    pub fn poll_frame(&mut self, now: Duration) -> Option<(Vec<u8>, Vec<Port>)> {
        if self.queue.front()?.due > now {
            return None;
        }
        let Pending { from, to, frame, .. } = self.queue.pop_front()?;
        self.queued_bytes -= frame.len();
        let ports = match to {
            Some(port) => vec![port],
            None => (0..self.ports).filter(|p| *p != from).collect(),
        };
        Some((frame, ports))
    }
}

/// Carries frames between the TAP devices of all nodes until something fails.
pub fn run(devices: Vec<OwnedFd>, delay: Duration, loss: f64, seed: u64) -> io::Result<()> {
    let mut devices: Vec<File> = devices.into_iter().map(File::from).collect();
    let mut switch = Switch::new(devices.len(), delay, loss, seed);
    let start = Instant::now();
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    loop {
        while let Some((frame, ports)) = switch.poll_frame(start.elapsed()) {
            for port in ports {
                // A full or downed device loses the frame, as a cable would.
                let _ = devices[port].write(&frame);
            }
        }
        let wait = switch
            .poll_timeout()
            .map(|due| TimeSpec::from(due.saturating_sub(start.elapsed())));
        let readable: Vec<bool> = {
            let mut fds: Vec<PollFd> = devices
                .iter()
                .map(|d| PollFd::new(d.as_fd(), PollFlags::POLLIN))
                .collect();
            match ppoll(&mut fds, wait, None) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            fds.iter()
                .map(|f| f.revents().is_some_and(|r| r.contains(PollFlags::POLLIN)))
                .collect()
        };
        for (port, device) in devices.iter_mut().enumerate().filter(|(port, _)| readable[*port]) {
            // A bounded burst from each in turn, so that one flooding node does not delay what is due.
            for _ in 0..64 {
                match device.read(&mut buffer) {
                    Ok(length) => switch.handle_frame(start.elapsed(), port, buffer[..length].to_vec()),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[..6].copy_from_slice(&if to == 255 { [255; 6] } else { [2, 0, 0, 0, 0, to] });
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, from]);
        frame
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn floods_until_it_has_learned() {
        let mut switch = Switch::new(3, Duration::ZERO, 0.0, 1);
        switch.handle_frame(MS, 0, frame(2, 1));
        assert_eq!(switch.poll_frame(MS).unwrap().1, [1, 2]);
        switch.handle_frame(MS, 1, frame(1, 2));
        assert_eq!(switch.poll_frame(MS).unwrap().1, [0]);
        switch.handle_frame(MS, 0, frame(2, 1));
        assert_eq!(switch.poll_frame(MS).unwrap().1, [1]);
        switch.handle_frame(MS, 1, frame(255, 2));
        assert_eq!(switch.poll_frame(MS).unwrap().1, [0, 2]);
        switch.handle_frame(MS, 1, vec![0; 11]);
        assert!(switch.poll_frame(MS).is_none());
    }

    #[test]
    fn holds_frames_for_the_delay() {
        let mut switch = Switch::new(2, 5 * MS, 0.0, 1);
        switch.handle_frame(MS, 0, frame(2, 1));
        switch.handle_frame(2 * MS, 0, frame(2, 1));
        assert_eq!(switch.poll_timeout(), Some(6 * MS));
        assert!(switch.poll_frame(5 * MS).is_none());
        assert!(switch.poll_frame(6 * MS).is_some());
        assert!(switch.poll_frame(6 * MS).is_none());
        assert_eq!(switch.poll_timeout(), Some(7 * MS));
    }

    #[test]
    fn loses_the_same_frames_for_the_same_seed() {
        let arrivals = |seed| {
            let mut switch = Switch::new(2, Duration::ZERO, 0.25, seed);
            (0..2000)
                .filter(|_| {
                    switch.handle_frame(MS, 0, frame(2, 1));
                    switch.poll_frame(MS).is_some()
                })
                .collect::<Vec<_>>()
        };
        let first = arrivals(7);
        assert_eq!(first, arrivals(7));
        assert_ne!(first, arrivals(8));
        assert!((1400..1600).contains(&first.len()), "{}", first.len());
    }

    #[test]
    fn a_full_queue_loses_frames_rather_than_memory() {
        let mut switch = Switch::new(2, Duration::from_secs(1), 0.0, 1);
        for _ in 0..2000 {
            switch.handle_frame(MS, 0, {
                let mut f = frame(2, 1);
                f.resize(60_000, 0);
                f
            });
        }
        assert!(switch.queued_bytes <= MAX_QUEUED_BYTES);
    }
}
