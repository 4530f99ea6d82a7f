//! Paths that are cut, lose or move, and peers that are killed.

use std::io::{BufRead, BufReader, Write};
use std::panic::AssertUnwindSafe;
use std::process::{Child, Command, Stdio};

use super::relay::Relay;
use super::*;

/// Set in the process that [`kill`] tests start: the fingerprint of its peer.
const CHILD_PEER: &str = "MOSRUN_TEST_LINK_PEER";

/// Quick to notice silence.
fn nervous() -> Options {
    Options {
        silence: Duration::from_millis(300),
        keep_alive: Duration::from_millis(100),
        give_up_after: Duration::from_secs(20),
        ..Options::default()
    }
}

/// `a` has connected to `b` through the relay.
fn through_relay(options: Options) -> (Relay, Both) {
    let (key_a, key_b) = (OneTimeKey::generate().unwrap(), OneTimeKey::generate().unwrap());
    let listener = LinkListener::bind(local(), key_b.clone()).unwrap();
    let relay = Relay::new(listener.local_addr());
    let fingerprint = key_a.fingerprint();
    let (peer_a, seen_a) = Peer::new();
    let (peer_b, seen_b) = Peer::new();
    let accepted = {
        let options = options.clone();
        thread::spawn(move || listener.accept(fingerprint, peer_b, PATIENCE, options).unwrap())
    };
    let a = Link::connect(relay.address, &key_a, key_b.fingerprint(), peer_a, options).unwrap();
    (
        relay,
        Both {
            a,
            b: accepted.join().unwrap(),
            seen_a,
            seen_b,
        },
    )
}

/// Waits for an event that is no frame.
fn event(seen: &Receiver<Seen>) -> Seen {
    loop {
        match seen.recv_timeout(PATIENCE).unwrap() {
            Seen::Frame(..) => {}
            other => return other,
        }
    }
}

/// Both ends send numbered frames and call while `trouble` is made; afterwards all must have come once and in order.
fn undisturbed(both: &Both, frames: u64, trouble: impl FnOnce() + Send) {
    thread::scope(|scope| {
        scope.spawn(trouble);
        for (link, lane) in [(&both.a, 10), (&both.b, 11)] {
            scope.spawn(move || {
                for seq in 0..frames {
                    link.send(lane, Header::new(NOTE, 0, seq), &[&seq.to_le_bytes()])
                        .unwrap();
                    if seq % 8 == 0 {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            scope.spawn(move || {
                for n in 0..frames / 4 {
                    echo(link, lane + 10, &vec![n as u8; n as usize % 5000]);
                }
            });
        }
        for seen in [&both.seen_a, &both.seen_b] {
            let mut next = 0;
            while next < frames {
                if let Seen::Frame(_, header, _) = seen.recv_timeout(PATIENCE).unwrap() {
                    assert_eq!(header.seq, next);
                    next += 1;
                }
            }
        }
    });
    for link in [&both.a, &both.b] {
        assert!(link.lost().is_none());
    }
}

#[test]
fn loss_is_repaired() {
    let (relay, both) = through_relay(Options::default());
    relay.set_loss_per_mille(30);
    undisturbed(&both, 400, || {});
    assert!(both.a.stats().lost_packets + both.b.stats().lost_packets > 0);
}

#[test]
fn a_cut_is_survived() {
    let (relay, both) = through_relay(nervous());
    undisturbed(&both, 800, || {
        for cut_ms in [50, 700, 1200] {
            thread::sleep(Duration::from_millis(30));
            relay.set_cut(true);
            thread::sleep(Duration::from_millis(cut_ms));
            relay.set_cut(false);
        }
    });
}

#[test]
fn a_cut_is_told_and_so_is_its_end() {
    let (relay, both) = through_relay(nervous());
    relay.set_cut(true);
    assert!(matches!(event(&both.seen_a), Seen::Interrupted));
    assert!(matches!(event(&both.seen_b), Seen::Interrupted));
    relay.set_cut(false);
    let before = Instant::now();
    assert!(matches!(event(&both.seen_a), Seen::Restored));
    assert!(matches!(event(&both.seen_b), Seen::Restored));
    assert!(
        before.elapsed() < Duration::from_millis(1500),
        "{:?}",
        before.elapsed()
    );
    echo(&both.a, 0, b"again");
    echo(&both.b, 0, b"again");
}

#[test]
fn a_change_of_address_is_survived() {
    let (relay, both) = through_relay(nervous());
    undisturbed(&both, 800, || {
        for _ in 0..4 {
            thread::sleep(Duration::from_millis(100));
            relay.change_address();
        }
    });
}

#[test]
fn a_new_connection_goes_on_where_the_old_one_ended() {
    let (_relay, both) = through_relay(nervous());
    undisturbed(&both, 4000, || {
        for _ in 0..6 {
            thread::sleep(Duration::from_millis(120));
            both.a.drop_connection();
        }
    });
    assert!(both.a.stats().reconnects >= 3, "{:?}", both.a.stats());
}

#[test]
fn a_peer_that_stays_silent_is_given_up() {
    let options = Options {
        give_up_after: Duration::from_millis(900),
        ..nervous()
    };
    let (relay, both) = through_relay(options);
    relay.set_cut(true);
    let before = Instant::now();
    let error = both.a.call(0, Header::new(NOTE, 0, 0), &[]).unwrap_err();
    assert!(matches!(error, LinkError::TimedOut(_)), "{error:?}");
    assert!(matches!(event(&both.seen_b), Seen::Interrupted));
    assert!(matches!(event(&both.seen_b), Seen::Lost(LinkError::TimedOut(_))));
    assert!(before.elapsed() < Duration::from_secs(2));
}

/// A process that is killed at the latest when this is dropped.
struct Other(Child);

impl Other {
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts this program again as the listening end; returns it and where it listens.
fn child(peer: Fingerprint) -> (Other, SocketAddr, Fingerprint) {
    let command = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "quic::tests::trouble::listening_child",
            "--ignored",
            "--nocapture",
        ])
        .env(CHILD_PEER, peer.0.map(|byte| format!("{byte:02x}")).concat())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = Other(command.unwrap());
    for line in BufReader::new(child.0.stdout.take().unwrap()).lines() {
        if let Some(rest) = line.unwrap().strip_prefix("LISTENING ") {
            let (address, fingerprint) = rest.split_once(' ').unwrap();
            return (child, address.parse().unwrap(), from_hex(fingerprint));
        }
    }
    panic!("the child says nothing");
}

fn from_hex(text: &str) -> Fingerprint {
    let mut bytes = [0; 32];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap();
    }
    Fingerprint(bytes)
}

#[test]
#[ignore = "is the other process of the tests that kill one"]
fn listening_child() {
    let Ok(peer) = std::env::var(CHILD_PEER) else {
        return;
    };
    let key = OneTimeKey::generate().unwrap();
    let listener = LinkListener::bind(local(), key.clone()).unwrap();
    println!("\nLISTENING {} {}", listener.local_addr(), key.fingerprint());
    std::io::stdout().flush().unwrap();
    let link = listener
        .accept(from_hex(&peer), Peer::new().0, PATIENCE, Options::default())
        .unwrap();
    while link.lost().is_none() {
        thread::sleep(Duration::from_millis(20));
    }
}

fn killed(pause: Duration, busy: bool) {
    let key = OneTimeKey::generate().unwrap();
    let (mut process, address, fingerprint) = child(key.fingerprint());
    let (peer, seen) = Peer::new();
    let link = Link::connect(address, &key, fingerprint, peer, Options::default()).unwrap();
    echo(&link, 0, b"alive?");
    thread::sleep(pause);
    let calling = busy.then(|| {
        let link = link.clone();
        thread::spawn(move || {
            loop {
                if let Err(error) = link.call(1, Header::new(ECHO, 0, link.next_seq()), &[]) {
                    return error;
                }
            }
        })
    });
    thread::sleep(Duration::from_millis(20));
    process.kill();
    let before = Instant::now();
    let seen = event(&seen);
    assert!(matches!(seen, Seen::Lost(LinkError::Refused)), "{seen:?}");
    assert!(
        before.elapsed() < Duration::from_secs(1),
        "{:?}",
        before.elapsed()
    );
    if let Some(calling) = calling {
        assert!(matches!(calling.join().unwrap(), LinkError::Refused));
    }
}

#[test]
fn a_killed_peer_is_noticed_by_an_idle_link() {
    killed(Duration::from_millis(350), false);
}

#[test]
fn a_killed_peer_is_noticed_by_a_busy_link() {
    killed(Duration::ZERO, true);
}

#[test]
fn a_listener_notices_that_its_peer_vanished() {
    let both = both(Options::default());
    echo(&both.b, 0, b"alive?");
    // As if the process were killed: the sockets are closed and nobody is told.
    both.a.vanish();
    let before = Instant::now();
    let seen = event(&both.seen_b);
    assert!(matches!(seen, Seen::Lost(LinkError::Refused)), "{seen:?}");
    assert!(
        before.elapsed() < Duration::from_secs(1),
        "{:?}",
        before.elapsed()
    );
}

#[test]
fn a_handler_that_panics_ends_its_link() {
    struct Clumsy;
    impl Handler for Clumsy {
        fn frame(&self, _link: &Link, _lane: u32, _header: Header, _payload: Vec<u8>) {
            panic!("this is part of the test");
        }
        fn lost(&self, _why: &LinkError) {}
    }
    let (key_a, key_b) = (OneTimeKey::generate().unwrap(), OneTimeKey::generate().unwrap());
    let listener = LinkListener::bind(local(), key_b.clone()).unwrap();
    let (address, fingerprint) = (listener.local_addr(), key_a.fingerprint());
    let accepted = thread::spawn(move || {
        listener
            .accept(fingerprint, Arc::new(Clumsy), PATIENCE, Options::default())
            .unwrap()
    });
    let (peer, seen) = Peer::new();
    let a = Link::connect(address, &key_a, key_b.fingerprint(), peer, Options::default()).unwrap();
    let b = accepted.join().unwrap();
    assert!(a.call(0, Header::new(ECHO, 0, 1), &[]).is_err());
    assert!(matches!(event(&seen), Seen::Lost(LinkError::Closed)));
    assert!(matches!(
        b.call(0, Header::new(ECHO, 0, 1), &[]),
        Err(LinkError::ShutDown)
    ));
}

#[test]
fn a_call_from_inside_the_handler_is_refused() {
    struct Nesting(Mutex<Sender<bool>>);
    impl Handler for Nesting {
        fn frame(&self, link: &Link, lane: u32, header: Header, _payload: Vec<u8>) {
            let outcome =
                std::panic::catch_unwind(AssertUnwindSafe(|| link.call(lane, header, &[]).is_err()));
            let _ = self.0.lock().send(outcome.unwrap_or(true));
        }
        fn lost(&self, _why: &LinkError) {}
    }
    let (key_a, key_b) = (OneTimeKey::generate().unwrap(), OneTimeKey::generate().unwrap());
    let listener = LinkListener::bind(local(), key_b.clone()).unwrap();
    let (address, fingerprint) = (listener.local_addr(), key_a.fingerprint());
    let (sender, refused) = channel();
    let accepted = thread::spawn(move || {
        let handler = Arc::new(Nesting(Mutex::new(sender)));
        listener
            .accept(fingerprint, handler, PATIENCE, Options::default())
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
    let _b = accepted.join().unwrap();
    a.send(0, Header::new(NOTE, 0, 1), &[]).unwrap();
    assert!(refused.recv_timeout(PATIENCE).unwrap());
}

#[test]
fn nothing_is_left_of_a_link_that_was_dropped() {
    // Other tests of this process may hold some of their own for a moment; what these links leave would stay.
    let threads = || {
        let names = std::fs::read_dir("/proc/self/task").unwrap();
        names
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|name| name.trim() == "shortlived")
            .count()
    };
    for _ in 0..5 {
        let both = both(Options {
            thread_name: "shortlived".to_owned(),
            ..Options::default()
        });
        echo(&both.a, 0, b"hello");
        assert!(threads() > 0);
    }
    let deadline = Instant::now() + PATIENCE;
    while threads() > 0 {
        assert!(Instant::now() < deadline, "the threads of dropped links go on");
        thread::sleep(Duration::from_millis(5));
    }
}
