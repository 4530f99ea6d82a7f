//! The programs under test: what they measure of themselves they print, in microseconds.

use std::hint::black_box;
use std::io::{BufRead, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// A round of calls is timed as a whole, so that reading the clock does not count.
const CALLS_PER_ROUND: u32 = 50;

/// Runs the probe that the words name.
pub fn run(words: &[&str]) -> anyhow::Result<()> {
    match words {
        ["calls", rounds] => {
            calls(10);
            println!("{:.4}", calls(rounds.parse()?));
        }
        ["cpu"] => println!("{:.1}", cpu()),
        // Started, it waits for a line, so that it can be moved before it is measured.
        ["calls-on-line", rounds] => {
            wait_for_line()?;
            calls(10);
            println!("{:.4}", calls(rounds.parse()?));
        }
        ["cpu-on-line"] => {
            wait_for_line()?;
            println!("{:.1}", cpu());
        }
        ["echo", address] => echo(address)?,
        ["sink", address] => sink(address)?,
        ["agent", address] => agent(address)?,
        ["memory", mib, "alone"] => memory(mib.parse()?, Some(0), false)?,
        ["memory", mib, "compute"] => memory(mib.parse()?, None, true)?,
        ["memory", mib, rate] => memory(mib.parse()?, Some(rate.parse()?), true)?,
        _ => bail!("no such probe: {words:?}"),
    }
    Ok(())
}

fn wait_for_line() -> anyhow::Result<()> {
    std::io::stdin()
        .lock()
        .read_line(&mut String::new())
        .context("the word to begin")?;
    Ok(())
}

/// Median time of one null call that is forwarded when the program is away.
fn calls(rounds: u32) -> f64 {
    let times: Vec<f64> = (0..rounds)
        .map(|_| {
            let begin = Instant::now();
            for _ in 0..CALLS_PER_ROUND {
                black_box(nix::unistd::getppid());
            }
            begin.elapsed().as_secs_f64() * 1e6 / f64::from(CALLS_PER_ROUND)
        })
        .collect();
    crate::stats::median(&times)
}

/// Time that a fixed amount of computing takes: integers, branches, and memory of a few MiB.
fn cpu() -> f64 {
    let begin = Instant::now();
    const LIMIT: usize = 4 << 20;
    for _ in 0..black_box(12) {
        let mut composite = vec![false; LIMIT];
        let mut primes = 0u32;
        for n in 2..LIMIT {
            if !composite[n] {
                primes += 1;
                (n * n..LIMIT).step_by(n).for_each(|m| composite[m] = true);
            }
        }
        black_box(primes);
    }
    begin.elapsed().as_secs_f64() * 1e6
}

/// Sends back what comes, until it is killed.
fn echo(address: &str) -> anyhow::Result<()> {
    let socket = UdpSocket::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let mut buffer = [0; 2048];
    loop {
        let (len, from) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..len], from)?;
    }
}

/// Reads what comes and says when that was all, for one connection after another, until it is killed.
fn sink(address: &str) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let (mut stream, _) = listener.accept()?;
        while stream.read(&mut buffer)? > 0 {}
        stream.write_all(b"done")?;
    }
}

/// Set when a line was read; taken back by who answers it.
static ASKED: AtomicBool = AtomicBool::new(false);

/// Has memory in which no page is like another, and changes so many MiB of it in a second; or computes (`None`). For each line
/// that is read it says in which time, at most, it did nothing (ms), and how many rounds it made in a millisecond, since it
/// was asked last.
fn memory(mib: u64, rate: Option<u64>, asked: bool) -> anyhow::Result<()> {
    const WORDS_PER_MIB: u64 = (1 << 20) / 8;
    /// 4 KiB.
    const WORDS_PER_PAGE: usize = 512;
    // Another content each time, which no node has seen.
    let since = std::time::UNIX_EPOCH.elapsed()?.as_nanos() as u64;
    let mut state = since.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut words: Vec<u64> = (0..mib * WORDS_PER_MIB).map(|_| next()).collect();
    let listen = || {
        for _ in std::io::stdin().lock().lines().map_while(Result::ok) {
            ASKED.store(true, Ordering::Release);
        }
        std::process::exit(0);
    };
    if asked {
        std::thread::spawn(listen);
        println!("ready");
    }
    let mut since = Instant::now();
    let (mut last, mut longest) = (since, Duration::ZERO);
    let (mut rounds, mut changed, mut place) = (0u64, 0u64, 0);
    loop {
        if ASKED.swap(false, Ordering::AcqRel) {
            let took = since.elapsed().as_secs_f64() * 1e3;
            println!("{:.3} {:.3}", longest.as_secs_f64() * 1e3, rounds as f64 / took);
            since = Instant::now();
            (last, longest, rounds, changed) = (since, Duration::ZERO, 0, 0);
        }
        match rate {
            Some(rate) => {
                let due = (last - since).as_micros() as u64 * rate * (WORDS_PER_MIB / WORDS_PER_PAGE as u64)
                    / 1_000_000;
                while changed < due {
                    place = (place + WORDS_PER_PAGE) % words.len();
                    words[place] = next();
                    changed += 1;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            None => {
                for _ in 0..1000 {
                    black_box(next());
                }
            }
        }
        rounds += 1;
        let now = Instant::now();
        longest = longest.max(now - last);
        last = now;
    }
}

/// Runs what comes as a line of shell and says `ok`, or what it wrote, for one connection after another, until it is killed.
fn agent(address: &str) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    loop {
        let (mut stream, _) = listener.accept()?;
        let mut line = String::new();
        stream.read_to_string(&mut line)?;
        // What goes on in the background must not keep a pipe open.
        let mut output = tempfile::tempfile()?;
        let status = std::process::Command::new("sh")
            .args(["-c", &line])
            .stdin(std::process::Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?)
            .status()?;
        let mut said = String::new();
        if status.success() {
            said.push_str("ok");
        } else {
            std::io::Seek::rewind(&mut output)?;
            output.read_to_string(&mut said)?;
            said.push_str(&status.to_string());
        }
        stream.write_all(said.as_bytes())?;
    }
}
