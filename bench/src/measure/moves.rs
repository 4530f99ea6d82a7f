//! Moving programs: how long they stand still, how fast their memory goes, and what that does to them meanwhile.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::criu::Criu;
use crate::lab::{NODE_2, SINK_PORT};
use crate::stats::{head, line, median};

/// The ways in which memory moves.
const MODES: [&str; 4] = ["freeze", "precopy", "postcopy", "hybrid"];
/// Sizes in MiB, and how often each is moved there and back.
const SIZES: [(u64, usize); 3] = [(64, 5), (1024, 3), (4096, 1)];
/// What a program changes while it is moved, MiB/s.
const RATES: [&str; 2] = ["0", "100"];
/// The size of what is compared with a TCP connection, and of what is slowed down, MiB.
const WHOLE_MIB: u64 = 1024;
/// The size of what is moved to one node again, MiB: less than a page store has room for.
const AGAIN_MIB: u64 = 128;
const BYTES_PER_MIB: f64 = 1048576.0;

/// A program with memory of its own that tells what it saw of its moves.
struct Mover {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// What a move took.
struct Moved {
    /// The longest time in which the program did nothing, ms.
    still: f64,
    /// From the order to its end, ms.
    whole: f64,
    /// What was sent for pages, bytes.
    bytes: f64,
    /// What the program got done, each millisecond.
    speed: f64,
}

impl Mover {
    fn start(mib: u64, rate: &str) -> anyhow::Result<Mover> {
        let own = std::env::current_exe()?;
        // Not with -h: what was started so is to outlive its deputy, and does not come home before its memory.
        let mut child = Command::new("mosrun")
            .args(["-r", "2", "--"])
            .arg(own)
            .args(["--probe", "memory", &mib.to_string(), rate])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("the program's input")?;
        let output = BufReader::new(child.stdout.take().context("the program's output")?);
        let mut mover = Mover { child, input, output };
        mover.line().context("the program's memory")?;
        mover.freeze("home")?;
        Ok(mover)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "the program ended");
        Ok(line)
    }

    /// What it has seen since it was asked last: the longest time without itself, and its speed.
    fn seen(&mut self) -> anyhow::Result<(f64, f64)> {
        self.input.write_all(b"\n")?;
        let line = self.line()?;
        let (still, speed) = line.trim().split_once(' ').context("two numbers")?;
        Ok((still.parse()?, speed.parse()?))
    }

    /// Moves it as every kernel can.
    fn freeze(&mut self, to: &str) -> anyhow::Result<Moved> {
        self.go(to, "freeze")?
            .context("a move that every kernel can make")
    }

    /// Moves it; `None` when such moves are not possible here, with the reason printed.
    fn go(&mut self, to: &str, mode: &str) -> anyhow::Result<Option<Moved>> {
        self.seen()?;
        let begin = Instant::now();
        let output = Command::new("mosmigrate")
            .args(["--json", "--mode", mode, &self.child.id().to_string(), to])
            .stderr(Stdio::piped())
            .output()?;
        let whole = begin.elapsed().as_secs_f64() * 1e3;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stdout);
            println!("\nnot measured: {mode} to {to}: {}", why.trim());
            return Ok(None);
        }
        let (still, speed) = self.seen()?;
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let report = report.get(0).unwrap_or(&report);
        if report["mode"] != mode {
            println!("\n{mode} to {to} became {}: {}", report["mode"], report["note"]);
        }
        let bytes = report["pages"]["bytes"].as_f64().context("bytes of pages")?;
        Ok(Some(Moved {
            still,
            whole,
            bytes,
            speed,
        }))
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How long programs stand still when they are moved.
pub fn freeze() -> anyhow::Result<()> {
    for (mib, rounds) in SIZES {
        for rate in RATES {
            freezes(mib, rate, rounds)?;
        }
    }
    Ok(())
}

fn freezes(mib: u64, rate: &str, rounds: usize) -> anyhow::Result<()> {
    head(&format!(
        "longest stand-still of a program with {mib} MiB that changes {rate} MiB/s"
    ));
    let mut base = None;
    for mode in MODES {
        let [mut out, mut back] = [const { Vec::new() }; 2];
        let mut mover = Mover::start(mib, rate)?;
        for _ in 0..rounds {
            let Some(there) = mover.go("2", mode)? else { break };
            out.push(there.still);
            let Some(here) = mover.go("home", mode)? else {
                break;
            };
            back.push(here.still);
        }
        if out.is_empty() {
            continue;
        }
        let base = *base.get_or_insert_with(|| median(&out));
        line(&format!("{mode}, to the node"), &out, "ms", base);
        if !back.is_empty() {
            line(&format!("{mode}, home"), &back, "ms", base);
        }
    }
    Ok(())
}

/// A whole move beside a TCP connection and CRIU.
pub fn whole() -> anyhow::Result<()> {
    let [mut tcp, mut criu, mut there] = [const { Vec::new() }; 3];
    let peer = Criu::find();
    if let Err(why) = &peer {
        println!("\nCRIU is not measured: {why:#}");
    }
    for _ in 0..3 {
        tcp.push(raw()?);
        if let Ok(peer) = &peer {
            criu.push(peer.moved(WHOLE_MIB)?);
        }
        let mut mover = Mover::start(WHOLE_MIB, "0")?;
        there.push(mover.freeze("2")?.whole);
    }
    head(&format!("{WHOLE_MIB} MiB of unique data, stop and copy"));
    line("TCP connection between the nodes", &tcp, "ms", median(&tcp));
    line("`mosmigrate`, start to end", &there, "ms", median(&tcp));
    if !criu.is_empty() {
        line(
            "CRIU with a page server, dump and restore",
            &criu,
            "ms",
            median(&tcp),
        );
    }
    Ok(())
}

/// What is sent for the memory of a program that has been at a node, and for that of another one that has the same.
pub fn again() -> anyhow::Result<()> {
    let [mut first, mut second] = [const { Vec::new() }; 2];
    for _ in 0..3 {
        let mut mover = Mover::start(AGAIN_MIB, "0")?;
        first.push(mover.freeze("2")?.bytes / BYTES_PER_MIB);
        mover.freeze("home")?;
        second.push(mover.freeze("2")?.bytes / BYTES_PER_MIB);
    }
    head(&format!(
        "what is sent for the memory of a program with {AGAIN_MIB} MiB of unique data"
    ));
    line("first move", &first, "MiB", median(&first));
    line("second move to the same node", &second, "MiB", median(&first));
    Ok(())
}

/// Milliseconds that a TCP connection takes for as much.
fn raw() -> anyhow::Result<f64> {
    let data = vec![0x5a; 1 << 20];
    let mut stream = TcpStream::connect((NODE_2, SINK_PORT)).context("the sink on node 2")?;
    let begin = Instant::now();
    for _ in 0..WHOLE_MIB {
        stream.write_all(&data)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut end = Vec::new();
    stream.read_to_end(&mut end)?;
    ensure!(end == b"done", "the sink did not get everything");
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

/// What a program gets done while its memory is sent.
pub fn slow() -> anyhow::Result<()> {
    let [mut before, mut during] = [const { Vec::new() }; 2];
    let mut mover = Mover::start(WHOLE_MIB, "compute")?;
    for _ in 0..3 {
        mover.seen()?;
        std::thread::sleep(std::time::Duration::from_secs(1));
        before.push(mover.seen()?.1);
        let Some(moved) = mover.go("2", "precopy")? else {
            bail!("no pre-copy here");
        };
        during.push(moved.speed);
        mover.freeze("home")?;
    }
    head("speed of a program that computes");
    line("at home", &before, "rounds/ms", median(&before));
    line(
        "while it is moved with pre-copy",
        &during,
        "rounds/ms",
        median(&before),
    );
    Ok(())
}
