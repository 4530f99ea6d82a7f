//! Round trips and throughput of a link over loopback, beside raw UDP and raw TCP in the same run.
//!
//! `cargo run -p linklayer --example ping [-- free|same|cross]`: where the kernel puts them, both ends on one core
//! (the pure path of the CPU), or on one core each (wake-ups included). Interleaved rounds; medians. A second argument `calls` leaves out the rest.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use linklayer::frame::Header;
use linklayer::quic::{Handler, Link, LinkError, LinkListener, OneTimeKey, Options};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

const ROUNDS: usize = 15;
const PINGS: usize = 1500;
const BODY: usize = 100;
const BLOCK: usize = 256 << 10;
const BLOCKS: usize = 400;
const BLOCK_CALLS: usize = 10;
const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

struct Echo {
    bytes: AtomicU64,
}

impl Handler for Echo {
    fn frame(&self, link: &Link, lane: u32, header: Header, payload: Vec<u8>) {
        self.bytes.fetch_add(payload.len() as u64, Ordering::Release);
        if header.kind == 1 {
            let _ = link.send(lane, header.reply(1), &[&payload]);
        }
    }

    fn lost(&self, _why: &LinkError) {}
}

fn pin(core: usize) {
    let mut set = CpuSet::new();
    if set.set(core).is_ok() {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn pair(options: &Options, server_core: usize) -> (Link, Link, Arc<Echo>) {
    let (key_a, key_b) = (OneTimeKey::generate().unwrap(), OneTimeKey::generate().unwrap());
    let listener = LinkListener::bind(LOCAL, key_b.clone()).unwrap();
    let (address, peer, server_options) = (listener.local_addr(), key_a.fingerprint(), options.clone());
    let echo = Arc::new(Echo {
        bytes: AtomicU64::new(0),
    });
    let handler = Arc::clone(&echo);
    let accepted = thread::spawn(move || {
        pin(server_core);
        listener
            .accept(peer, handler, Duration::from_secs(5), server_options)
            .unwrap()
    });
    let mine = Arc::new(Echo {
        bytes: AtomicU64::new(0),
    });
    let a = Link::connect(address, &key_a, key_b.fingerprint(), mine, options.clone()).unwrap();
    (a, accepted.join().unwrap(), echo)
}

fn round_trips(server_core: usize, spin: Duration) {
    let server = UdpSocket::bind(LOCAL).unwrap();
    let client = UdpSocket::bind(LOCAL).unwrap();
    client.connect(server.local_addr().unwrap()).unwrap();
    server.connect(client.local_addr().unwrap()).unwrap();
    thread::spawn(move || {
        pin(server_core);
        let mut buffer = [0; 2000];
        while let Ok(len) = server.recv(&mut buffer) {
            if server.send(&buffer[..len]).is_err() {
                break;
            }
        }
    });
    let (a, _b, _) = pair(
        &Options {
            spin,
            ..Options::default()
        },
        server_core,
    );
    let body = [7; BODY];
    let mut buffer = [0; 2000];
    let (mut udp, mut link, mut block) = (Vec::new(), Vec::new(), Vec::new());
    let big = vec![1; BLOCK];
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        for _ in 0..PINGS {
            client.send(&body).unwrap();
            client.recv(&mut buffer).unwrap();
        }
        udp.push(begin.elapsed().as_secs_f64() * 1e6 / PINGS as f64);
        a.call(1, Header::new(1, 1, a.next_seq()), &[&body]).unwrap();
        let begin = Instant::now();
        for _ in 0..PINGS {
            a.call(1, Header::new(1, 1, a.next_seq()), &[&body]).unwrap();
        }
        link.push(begin.elapsed().as_secs_f64() * 1e6 / PINGS as f64);
        let begin = Instant::now();
        for _ in 0..BLOCK_CALLS {
            a.call(2, Header::new(1, 1, a.next_seq()), &[&big]).unwrap();
        }
        block.push(begin.elapsed().as_secs_f64() * 1e6 / BLOCK_CALLS as f64);
    }
    let waiting = {
        let link = a.clone();
        thread::spawn(move || link.call(3, Header::new(3, 1, 0), &[]).is_ok())
    };
    let mut beside = Vec::new();
    for _ in 0..ROUNDS {
        thread::sleep(Duration::from_millis(5));
        let begin = Instant::now();
        for _ in 0..PINGS {
            a.call(1, Header::new(1, 1, a.next_seq()), &[&body]).unwrap();
        }
        beside.push(begin.elapsed().as_secs_f64() * 1e6 / PINGS as f64);
    }
    let (udp, link, block, beside) = (median(udp), median(link), median(block), median(beside));
    println!(
        "  {BODY} bytes: UDP {udp:.1} us, link {link:.1} us, ratio {:.2}",
        link / udp
    );
    println!("  the same while another call waits: {beside:.1} us");
    println!(
        "  256 KiB echo: {block:.0} us, {:.2} GiB/s both ways",
        2.0 * BLOCK as f64 / block / 1073.741824
    );
    println!("  {:?}", a.stats());
    a.close();
    let _ = waiting.join();
}

fn one_way(name: &str, options: &Options, server_core: usize) -> f64 {
    let (a, _b, echo) = pair(options, server_core);
    let big = vec![1; BLOCK];
    let mut rates = Vec::new();
    for round in 1..=5u64 {
        let begin = Instant::now();
        for _ in 0..BLOCKS {
            a.send(2, Header::new(2, 1, 0), &[&big]).unwrap();
        }
        while echo.bytes.load(Ordering::Acquire) < round * (BLOCK * BLOCKS) as u64 {
            thread::sleep(Duration::from_micros(50));
        }
        rates.push((BLOCK * BLOCKS) as f64 / begin.elapsed().as_secs_f64() / f64::from(1 << 30));
    }
    let rate = median(rates);
    println!(
        "  one way in 256 KiB frames, {name}: {rate:.2} GiB/s, {:?}",
        a.stats()
    );
    rate
}

fn tcp(server_core: usize) -> f64 {
    let listener = TcpListener::bind(LOCAL).unwrap();
    let address = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        pin(server_core);
        let mut stream = listener.accept().unwrap().0;
        let mut buffer = vec![0; BLOCK];
        while stream.read(&mut buffer).unwrap() > 0 {}
    });
    let mut stream = TcpStream::connect(address).unwrap();
    let big = vec![1; BLOCK];
    let begin = Instant::now();
    for _ in 0..BLOCKS * 4 {
        stream.write_all(&big).unwrap();
    }
    drop(stream);
    server.join().unwrap();
    (BLOCK * BLOCKS * 4) as f64 / begin.elapsed().as_secs_f64() / f64::from(1 << 30)
}

fn main() {
    let which = std::env::args().nth(1).unwrap_or_else(|| "all".to_owned());
    for (name, server_core) in [("free", usize::MAX), ("same", 0), ("cross", 1)] {
        if which != "all" && which != name {
            continue;
        }
        println!("{name}:");
        if name != "free" {
            pin(0);
        }
        round_trips(server_core, Duration::ZERO);
        if name == "free" {
            println!(" allowed to spin:");
            round_trips(server_core, Options::default().spin);
        }
        if std::env::args().nth(2).is_some() {
            continue;
        }
        let calls = one_way("options for calls", &Options::default(), server_core);
        let bulk = one_way("bulk options", &Options::bulk(), server_core);
        let narrow = Options {
            mtu_bytes: 1472,
            ..Options::bulk()
        };
        let narrow = one_way("bulk options, MTU 1500", &narrow, server_core);
        let tcp = tcp(server_core);
        println!(
            "  TCP {tcp:.2} GiB/s; ratios: calls {:.2}, bulk {:.2}, bulk at MTU 1500 {:.2}",
            calls / tcp,
            bulk / tcp,
            narrow / tcp
        );
    }
}
