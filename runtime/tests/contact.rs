//! What a supervisor is sent by a deputy that means it no good, or is broken: it ends, with a word in its log, and leaves
//! nothing.

mod common;

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::MOSD;
use linklayer::frame::Header;
use linklayer::quic::{Fingerprint, Handler, Link, LinkError, OneTimeKey, Options};
use linklayer::wire::{self, Kind};
use runtime::job_id::JobId;
use runtime::supervisor::{SupervisorAnswer, SupervisorConfig, SupervisorLimits, SupervisorReady};

/// What the product promises.
const SOON: Duration = Duration::from_secs(2);

struct Deaf;

impl Handler for Deaf {
    fn frame(&self, _: &Link, _: u32, _: Header, _: Vec<u8>) {}
    fn lost(&self, _: &LinkError) {}
}

struct Supervisor {
    child: Child,
    ready: SupervisorReady,
    key: OneTimeKey,
    log: tempfile::NamedTempFile,
}

impl Supervisor {
    fn start() -> Self {
        let key = OneTimeKey::generate().unwrap();
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut child = Command::new(MOSD)
            .arg("supervise")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(log.path()).unwrap())
            .spawn()
            .unwrap();
        let config = SupervisorConfig {
            job: JobId::new(1, 77),
            node: 2,
            node_name: "two".into(),
            home_node: 1,
            home_name: "one".into(),
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            groups: Vec::new(),
            peer_fingerprint: key.fingerprint().0,
            listen: "127.0.0.1".parse().unwrap(),
            limits: SupervisorLimits::default(),
            store: None,
        };
        config.write_to(&mut child.stdin.take().unwrap()).unwrap();
        let answer = SupervisorAnswer::read_from(&mut child.stdout.take().unwrap()).unwrap();
        let SupervisorAnswer::Ready(ready) = answer else {
            panic!("{answer:?}");
        };
        Self {
            child,
            ready,
            key,
            log,
        }
    }

    fn connect(&self, key: &OneTimeKey) -> Result<Link, LinkError> {
        let peer = Fingerprint(self.ready.fingerprint);
        Link::connect(self.ready.addr, key, peer, Arc::new(Deaf), Options::default())
    }

    fn log(&self) -> String {
        fs::read_to_string(self.log.path()).unwrap()
    }

    fn ended(&mut self, what: &str) -> String {
        let end = Instant::now() + SOON;
        while self.child.try_wait().unwrap().is_none() {
            assert!(
                Instant::now() < end,
                "{what}: the supervisor goes on: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        let log = self.log();
        assert!(!log.contains("panicked"), "{what}: {log}");
        log
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(link: &Link, kind: u16, tid: i32, payload: &[u8]) {
    let _ = link.send(0, Header::new(kind, tid, link.next_seq()), &[payload]);
}

#[test]
fn frames_that_break_the_protocol_end_it() {
    let hello = |version| {
        wire::encode(&wire::Hello {
            version,
            node: 1,
            refuse_homeward: false,
            topology_of_home: false,
            instructions: Vec::new(),
        })
    };
    let cases: [(&str, Kind, Vec<u8>, &str); 6] = [
        (
            "another version",
            Kind::Hello,
            hello(wire::PROTOCOL_VERSION + 1),
            "update the older one",
        ),
        (
            "half a greeting",
            Kind::Hello,
            hello(1)[..1].to_vec(),
            "breaks the protocol",
        ),
        ("no image", Kind::Launch, vec![0xff; 64], "breaks the protocol"),
        (
            "pages for nobody",
            Kind::Pages,
            vec![0; 4104],
            "was not announced",
        ),
        (
            "pages without an address",
            Kind::Pages,
            vec![0; 3],
            "breaks the protocol",
        ),
        (
            "a supervisor's word",
            Kind::Homecoming,
            vec![0; 8],
            "is not for a supervisor",
        ),
    ];
    for (what, kind, payload, said) in cases {
        let mut supervisor = Supervisor::start();
        let link = supervisor.connect(&supervisor.key).unwrap();
        send(&link, kind as u16, 1234, &payload);
        let log = supervisor.ended(what);
        assert!(log.contains(said), "{what}: {log}");
    }
    let mut supervisor = Supervisor::start();
    let link = supervisor.connect(&supervisor.key).unwrap();
    send(&link, 9999, 1, b"?");
    assert!(supervisor.ended("an unknown kind").contains("unknown kind 9999"));
}

/// Bytes at random, behind every kind that there is: it goes on or ends, and never panics.
#[test]
fn noise_of_every_kind() {
    let mut state = 88_172_645_463_325_252u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for kind in (0..200u16).filter(|n| Kind::from_u16(*n).is_some()) {
        let mut supervisor = Supervisor::start();
        let link = supervisor.connect(&supervisor.key).unwrap();
        for len in [0, 1, 4, 8, 64, 4000, 200_000] {
            let noise: Vec<u8> = (0..len).map(|_| random() as u8).collect();
            send(&link, kind, random() as i32, &noise);
            // Lengths that promise more than there is.
            send(&link, kind, 1, &[&[0xfd; 9][..], &noise].concat());
        }
        drop(link);
        supervisor.ended(&format!("noise of kind {kind}"));
    }
}

#[test]
fn only_the_jobs_own_deputy_is_heard() {
    let mut supervisor = Supervisor::start();
    let stranger = OneTimeKey::generate().unwrap();
    assert!(supervisor.connect(&stranger).is_err());
    let link = supervisor.connect(&supervisor.key).unwrap();
    send(&link, Kind::End as u16, 0, &wire::encode(&wire::Errno(0)));
    let log = supervisor.ended("the end of the job");
    assert!(log.contains("the job has ended"), "{log}");
}
