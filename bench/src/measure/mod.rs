//! Measuring, on node 1 of a lab.

mod criu;
mod moves;
pub mod ssh;

use std::io::Write;
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::lab::{ECHO_PORT, NODE_2};
use crate::stats::{head, line, median};

/// Rounds in which the compared things take turns.
const ROUNDS: usize = 9;
/// Pings of a round.
const PINGS: usize = 2500;
/// Rounds of calls of a probe, 50 calls each.
const CALL_ROUNDS: &str = "50";
/// Starts of each kind.
const STARTS: usize = 25;
/// Bytes of a ping: what a small call's frame has.
const PING_BYTES: usize = 64;

/// Measures one of the things that there are.
pub fn run(what: &str, setting: &str) -> anyhow::Result<()> {
    match what {
        "call" => call(),
        "cpu" => cpu(),
        "home" => home(),
        "freeze" => moves::freeze(),
        "whole" => {
            moves::whole()?;
            // How much is sent does not depend on the link.
            match setting {
                "free" => moves::again(),
                _ => Ok(()),
            }
        }
        "slow" => moves::slow(),
        "start" => start(),
        _ => bail!("nothing is called {what}"),
    }
}

/// What runs a probe.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Native,
    Home,
    Away,
}

fn probe(how: How, words: &[&str]) -> anyhow::Result<Command> {
    let own = std::env::current_exe()?;
    let mut command = match how {
        How::Native => Command::new(&own),
        How::Home | How::Away => {
            let mut command = Command::new("mosrun");
            command
                .args(if how == How::Home {
                    ["-h"].as_slice()
                } else {
                    ["-r", "2"].as_slice()
                })
                .arg("--")
                .arg(&own);
            command
        }
    };
    command.arg("--probe").args(words);
    Ok(command)
}

/// Runs a probe and gives the number that it prints.
fn number(mut command: Command) -> anyhow::Result<f64> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{command:?}"))?;
    parse(&output)
}

fn parse(output: &std::process::Output) -> anyhow::Result<f64> {
    ensure!(output.status.success(), "a probe ended with {}", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().with_context(|| format!("{text:?}"))
}

/// Runs a probe that waits for a line: it is started away, brought home, and then told to begin.
fn number_after_return(words: &[&str]) -> anyhow::Result<f64> {
    let mut child = probe(How::Away, words)?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    // It has to be at its read.
    std::thread::sleep(Duration::from_millis(300));
    let moved = Command::new("mosmigrate")
        .args([&child.id().to_string(), "home"])
        .status()?;
    ensure!(moved.success(), "the probe did not come home");
    child
        .stdin
        .take()
        .context("the probe's input")?
        .write_all(b"go\n")?;
    parse(&child.wait_with_output()?)
}

/// Median round trip of a ping in microseconds.
fn udp(socket: &UdpSocket) -> anyhow::Result<f64> {
    let mut buffer = [0; 2048];
    let mut times = Vec::with_capacity(PINGS);
    for _ in 0..PINGS {
        let begin = Instant::now();
        socket.send(&buffer[..PING_BYTES])?;
        socket.recv(&mut buffer).context("no answer to a ping")?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    Ok(median(&times))
}

fn call() -> anyhow::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((NODE_2, ECHO_PORT))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let (mut pings, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        pings.push(udp(&socket)?);
        calls.push(number(probe(How::Away, &["calls", CALL_ROUNDS])?)?);
    }
    let base = median(&pings);
    head("round trip of a null call");
    line("raw UDP, 64 bytes", &pings, "us", base);
    line("forwarded `getppid`", &calls, "us", base);
    Ok(())
}

fn cpu() -> anyhow::Result<()> {
    let (mut native, mut away) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        native.push(number(probe(How::Native, &["cpu"])?)? / 1e3);
        away.push(number(probe(How::Away, &["cpu"])?)? / 1e3);
    }
    head("a program that computes");
    line("native", &native, "ms", median(&native));
    line("away, once started", &away, "ms", median(&native));
    Ok(())
}

fn home() -> anyhow::Result<()> {
    let [mut cpu, mut cpu_h, mut cpu_back] = [const { Vec::new() }; 3];
    let [mut calls, mut calls_h, mut calls_back] = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        cpu.push(number(probe(How::Native, &["cpu"])?)? / 1e3);
        cpu_h.push(number(probe(How::Home, &["cpu"])?)? / 1e3);
        cpu_back.push(number_after_return(&["cpu-on-line"])? / 1e3);
        let rounds = "4000";
        calls.push(number(probe(How::Native, &["calls", rounds])?)? * 1e3);
        calls_h.push(number(probe(How::Home, &["calls", rounds])?)? * 1e3);
        calls_back.push(number_after_return(&["calls-on-line", rounds])? * 1e3);
    }
    head("at home: a program that computes");
    line("native", &cpu, "ms", median(&cpu));
    line("`mosrun -h`", &cpu_h, "ms", median(&cpu));
    line("under a deputy, come home", &cpu_back, "ms", median(&cpu));
    head("at home: one `getppid`");
    line("native", &calls, "ns", median(&calls));
    line("`mosrun -h`", &calls_h, "ns", median(&calls));
    line("under a deputy, come home", &calls_back, "ns", median(&calls));
    Ok(())
}

/// Wall clock time of a command, in milliseconds.
fn wall(command: &mut Command) -> anyhow::Result<f64> {
    let begin = Instant::now();
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("{command:?}"))?;
    let took = begin.elapsed().as_secs_f64() * 1e3;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(took)
}

fn start() -> anyhow::Result<()> {
    let client = ssh::Client::from_environment()?;
    let [mut native, mut home, mut away, mut full, mut shared] = [const { Vec::new() }; 5];
    for _ in 0..STARTS {
        native.push(wall(&mut Command::new("true"))?);
        home.push(wall(Command::new("mosrun").args(["-h", "true"]))?);
        away.push(wall(Command::new("mosrun").args(["-r", "2", "true"]))?);
        if let Some(client) = &client {
            full.push(wall(&mut client.full())?);
            shared.push(wall(&mut client.shared())?);
        }
    }
    let base = median(&away);
    head("start to end of `true`");
    line("native", &native, "ms", base);
    line("`mosrun -h true`", &home, "ms", base);
    line("`mosrun -r 2 true`", &away, "ms", base);
    if client.is_some() {
        line("`ssh node true`", &full, "ms", base);
        line("`ssh node true`, over a shared connection", &shared, "ms", base);
    }
    Ok(())
}
