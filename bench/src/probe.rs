//! The programs under test: what they measure of themselves they print, in microseconds.

use std::hint::black_box;
use std::io::BufRead;
use std::net::UdpSocket;
use std::time::Instant;

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
