//! Links over loopback sockets.

mod hostile;
mod relay;
mod trouble;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use parking_lot::Mutex;

use super::*;
use crate::frame::Header;

const ECHO: u16 = 1;
const NOTE: u16 = 2;
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers ECHO with the same payload, and reports everything else.
struct Peer {
    events: Mutex<Sender<Seen>>,
}

#[derive(Debug)]
enum Seen {
    Frame(u32, Header, Vec<u8>),
    Lost(LinkError),
    Interrupted,
    Restored,
}

impl Peer {
    fn new() -> (Arc<Self>, Receiver<Seen>) {
        let (sender, receiver) = channel();
        (
            Arc::new(Self {
                events: Mutex::new(sender),
            }),
            receiver,
        )
    }

    fn say(&self, seen: Seen) {
        let _ = self.events.lock().send(seen);
    }
}

impl Handler for Peer {
    fn frame(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>) {
        if header.kind == ECHO {
            let _ = link.send(lane, header.reply(ECHO), &[&payload]);
        } else {
            self.say(Seen::Frame(lane, header, payload));
        }
    }

    fn lost(&self, why: &LinkError) {
        self.say(Seen::Lost(why.clone()));
    }

    fn interrupted(&self) {
        self.say(Seen::Interrupted);
    }

    fn restored(&self) {
        self.say(Seen::Restored);
    }
}

struct Both {
    a: Link,
    b: Link,
    seen_a: Receiver<Seen>,
    seen_b: Receiver<Seen>,
}

fn local() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

/// `a` has connected to `b`.
fn both(options: Options) -> Both {
    let (key_a, key_b) = (OneTimeKey::generate().unwrap(), OneTimeKey::generate().unwrap());
    let listener = LinkListener::bind(local(), key_b.clone()).unwrap();
    let (address, fingerprint) = (listener.local_addr(), key_a.fingerprint());
    let (peer_a, seen_a) = Peer::new();
    let (peer_b, seen_b) = Peer::new();
    let accepted = {
        let options = options.clone();
        thread::spawn(move || listener.accept(fingerprint, peer_b, PATIENCE, options).unwrap())
    };
    let a = Link::connect(address, &key_a, key_b.fingerprint(), peer_a, options).unwrap();
    Both {
        a,
        b: accepted.join().unwrap(),
        seen_a,
        seen_b,
    }
}

fn echo(link: &Link, lane: u32, payload: &[u8]) {
    let header = Header::new(ECHO, 7, link.next_seq());
    let (reply, body) = link.call(lane, header, &[payload]).unwrap();
    assert_eq!(
        (reply.tid, reply.seq, reply.is_reply()),
        (header.tid, header.seq, true)
    );
    assert_eq!(reply.len as usize, body.len());
    assert!(body == payload, "the payload came back changed");
}

#[test]
fn calls_are_answered_in_both_directions() {
    let both = both(Options::default());
    for n in 0..200u8 {
        echo(&both.a, 1, &[n; 100]);
        echo(&both.b, u32::from(n % 3), &[n; 10]);
    }
    assert_eq!(both.a.stats().reconnects, 0);
}

#[test]
fn links_stand_on_ipv6_and_on_wildcards() {
    for bind in ["[::1]:0", "0.0.0.0:0", "[::]:0"] {
        let (key_a, key_b) = (OneTimeKey::generate().unwrap(), OneTimeKey::generate().unwrap());
        let listener = LinkListener::bind(bind.parse().unwrap(), key_b.clone()).unwrap();
        let mut address = listener.local_addr();
        if address.ip().is_unspecified() {
            address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        let fingerprint = key_a.fingerprint();
        let accepted = thread::spawn(move || {
            listener
                .accept(fingerprint, Peer::new().0, PATIENCE, Options::default())
                .unwrap()
        });
        let a = Link::connect(
            address,
            &key_a,
            key_b.fingerprint(),
            Peer::new().0,
            Options::default(),
        )
        .unwrap();
        let b = accepted.join().unwrap();
        for _ in 0..20 {
            echo(&a, 0, b"there");
            echo(&b, 0, b"back");
        }
    }
}

#[test]
fn a_call_after_a_pause_is_answered() {
    let both = both(Options::default());
    for pause_ms in [0, 1, 3, 10, 40, 100, 700] {
        thread::sleep(Duration::from_millis(pause_ms));
        echo(&both.a, 1, b"still there?");
    }
}

#[test]
fn many_threads_call_at_once() {
    let both = both(Options::default());
    thread::scope(|scope| {
        for lane in 0..8u32 {
            let link = if lane % 2 == 0 { &both.a } else { &both.b };
            scope.spawn(move || {
                for n in 0..300usize {
                    echo(link, lane, &vec![lane as u8; n * 7 % 3000]);
                }
            });
        }
    });
}

#[test]
fn frames_of_a_lane_come_in_order() {
    let both = both(Options::default());
    for seq in 0..2000u64 {
        both.a
            .send((seq % 4) as u32, Header::new(NOTE, 0, seq), &[&seq.to_le_bytes()])
            .unwrap();
    }
    let mut next = [0u64, 1, 2, 3];
    for _ in 0..2000 {
        let Seen::Frame(lane, header, payload) = both.seen_b.recv_timeout(PATIENCE).unwrap() else {
            panic!()
        };
        assert_eq!(header.seq, next[lane as usize]);
        assert_eq!(payload, header.seq.to_le_bytes());
        next[lane as usize] += 4;
    }
}

#[test]
fn there_may_be_more_lanes_than_streams() {
    let both = both(Options::default());
    for lane in (0..20_000).step_by(7) {
        both.a
            .send(lane, Header::new(NOTE, 1, 0), &[&lane.to_le_bytes()])
            .unwrap();
        both.a
            .send(lane, Header::new(NOTE, 1, 1), &[&lane.to_le_bytes()])
            .unwrap();
    }
    let mut seen = std::collections::HashMap::new();
    while seen.len() < 20_000_usize.div_ceil(7) || seen.values().any(|next| *next < 2) {
        let Seen::Frame(lane, header, payload) = both.seen_b.recv_timeout(PATIENCE).unwrap() else {
            panic!()
        };
        let next = seen.entry(lane).or_insert(0);
        assert_eq!((header.seq, payload.as_slice()), (*next, &lane.to_le_bytes()[..]));
        *next += 1;
    }
    echo(&both.b, u32::MAX, b"the last lane");
}

#[test]
fn the_largest_payload_passes_and_a_larger_one_does_not() {
    let both = both(Options::default());
    let payload: Vec<u8> = (0..MAX_PAYLOAD).map(|n| ((n * 31) >> 3) as u8).collect();
    echo(&both.a, 3, &payload);
    let error = both
        .a
        .send(3, Header::new(NOTE, 0, 0), &[&payload, b"!"])
        .unwrap_err();
    assert!(matches!(error, LinkError::TooLong { len } if len == MAX_PAYLOAD + 1));
    echo(&both.a, 3, b"unharmed");
}

#[test]
fn much_data_passes_with_a_bounded_queue() {
    let both = both(Options {
        queue_bytes: 2 << 20,
        ..Options::bulk()
    });
    let payload = vec![9; 256 << 10];
    let total = 200;
    thread::scope(|scope| {
        scope.spawn(|| {
            for seq in 0..total {
                both.a.send(0, Header::new(NOTE, 0, seq), &[&payload]).unwrap();
                assert!(both.a.stats().unacknowledged_bytes <= (2 << 20) + (257 << 10));
            }
        });
        for seq in 0..total {
            let Seen::Frame(_, header, body) = both.seen_b.recv_timeout(PATIENCE).unwrap() else {
                panic!()
            };
            assert_eq!(header.seq, seq);
            assert!(body == payload);
        }
    });
}

#[test]
fn a_close_is_heard_at_once_and_after_what_was_sent() {
    let both = both(Options::default());
    for seq in 0..100 {
        both.a.send(1, Header::new(NOTE, 0, seq), &[&[1; 5000]]).unwrap();
    }
    let before = Instant::now();
    both.a.close();
    for seq in 0..100 {
        let Seen::Frame(_, header, _) = both.seen_b.recv_timeout(PATIENCE).unwrap() else {
            panic!()
        };
        assert_eq!(header.seq, seq);
    }
    let seen = both.seen_b.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(seen, Seen::Lost(LinkError::Closed)), "{seen:?}");
    assert!(
        before.elapsed() < Duration::from_millis(900),
        "{:?}",
        before.elapsed()
    );
    assert!(matches!(
        both.a.send(1, Header::default(), &[]),
        Err(LinkError::ShutDown)
    ));
    assert!(matches!(
        both.b.call(1, Header::default(), &[]),
        Err(LinkError::Closed)
    ));
    assert!(both.seen_a.try_recv().is_err(), "who closes is not told");
}

#[test]
fn dropping_the_link_closes_it_and_ends_a_waiting_call() {
    let Both { a, b, seen_b, seen_a } = both(Options::default());
    let waiting = thread::spawn(move || b.call(1, Header::new(NOTE, 0, 0), &[]).unwrap_err());
    seen_a.recv_timeout(PATIENCE).unwrap();
    drop(a);
    let error = waiting.join().unwrap();
    assert!(matches!(error, LinkError::Closed), "{error:?}");
    assert!(matches!(
        seen_b.recv_timeout(PATIENCE).unwrap(),
        Seen::Lost(LinkError::Closed)
    ));
}

#[test]
fn strangers_are_turned_away() {
    let (key_a, key_b, key_c) = (
        OneTimeKey::generate().unwrap(),
        OneTimeKey::generate().unwrap(),
        OneTimeKey::generate().unwrap(),
    );
    let listener = LinkListener::bind(local(), key_b.clone()).unwrap();
    let (address, fingerprint) = (listener.local_addr(), key_a.fingerprint());
    let accepted = thread::spawn(move || {
        listener
            .accept(fingerprint, Peer::new().0, PATIENCE, Options::default())
            .unwrap()
    });
    let connect = |key, peer| Link::connect(address, key, peer, Peer::new().0, Options::default());
    let error = connect(&key_a, key_c.fingerprint()).unwrap_err();
    assert!(
        matches!(error, LinkError::Untrusted(_)),
        "wrong listener: {error:?}"
    );
    let error = connect(&key_c, key_b.fingerprint()).unwrap_err();
    assert!(
        matches!(error, LinkError::Untrusted(_)),
        "wrong client: {error:?}"
    );
    let a = connect(&key_a, key_b.fingerprint()).unwrap();
    let b = accepted.join().unwrap();
    echo(&a, 0, b"the right one");
    drop(b);
}

#[test]
fn garbage_does_no_harm() {
    let both = both(Options::default());
    let stranger = UdpSocket::bind(local()).unwrap();
    for n in 0..500usize {
        let noise: Vec<u8> = (0..n * 3 % 1400).map(|_| rand::random()).collect();
        for to in [both.a.local_addr(), both.b.local_addr()] {
            let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), to.port());
            let _ = stranger.send_to(&noise, to);
        }
        if n % 50 == 0 {
            echo(&both.a, 0, b"ping");
        }
    }
    echo(&both.b, 0, b"ping");
}

#[test]
fn nobody_there_is_found_out_quickly() {
    let closed = UdpSocket::bind(local()).unwrap().local_addr().unwrap();
    let key = OneTimeKey::generate().unwrap();
    let (peer, seen) = Peer::new();
    let before = Instant::now();
    let error = Link::connect(closed, &key, key.fingerprint(), peer, Options::default()).unwrap_err();
    assert!(matches!(error, LinkError::Refused), "{error:?}");
    assert!(before.elapsed() < Duration::from_secs(1));
    assert!(
        seen.recv_timeout(Duration::from_millis(50)).is_err(),
        "the caller knows"
    );
}

#[test]
fn a_listener_waits_no_longer_than_asked_and_can_wait_again() {
    let (key_a, key_b) = (OneTimeKey::generate().unwrap(), OneTimeKey::generate().unwrap());
    let listener = LinkListener::bind(local(), key_b.clone()).unwrap();
    let short = Duration::from_millis(30);
    let error = listener
        .accept(key_a.fingerprint(), Peer::new().0, short, Options::default())
        .unwrap_err();
    assert!(matches!(error, LinkError::TimedOut(_)), "{error:?}");
    let (address, fingerprint) = (listener.local_addr(), key_a.fingerprint());
    let accepted = thread::spawn(move || {
        let link = listener
            .accept(fingerprint, Peer::new().0, PATIENCE, Options::default())
            .unwrap();
        let again = listener.accept(fingerprint, Peer::new().0, PATIENCE, Options::default());
        assert!(matches!(again, Err(LinkError::InUse)));
        link
    });
    let a = Link::connect(
        address,
        &key_a,
        key_b.fingerprint(),
        Peer::new().0,
        Options::default(),
    )
    .unwrap();
    let _b = accepted.join().unwrap();
    echo(&a, 0, b"hello");
}
