//! The peer of moving: CRIU, which dumps a process into a page server on the other node and restores it there.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::lab::{AGENT_PORT, NODE_2};

/// Environment variable with a criu to use in place of the one on PATH.
const CRIU: &str = "MOSRUN_BENCH_CRIU";
const PORT: u16 = 7995;

/// A criu that says that it can do its work here.
pub struct Criu {
    program: String,
}

impl Criu {
    /// Finds it.
    ///
    /// # Errors
    /// It is not there, or this kernel is not for it.
    pub fn find() -> anyhow::Result<Criu> {
        let program = std::env::var(CRIU).unwrap_or_else(|_| "criu".into());
        let output = Command::new(&program).arg("check").output();
        let output = output.with_context(|| format!("{program} (package criu; {CRIU} names another)"))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let last = said.lines().last().unwrap_or_default();
        ensure!(output.status.success(), "criu check: {last}");
        Ok(Criu { program })
    }

    /// Moves a program with so much memory to node 2, as fast as CRIU can: stop, memory to a page server there, restore. In ms.
    ///
    /// # Errors
    /// What CRIU says.
    pub fn moved(&self, mib: u64) -> anyhow::Result<f64> {
        let (here, there) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let own = std::env::current_exe()?;
        // A number that nobody has on the other node, where it will be used again.
        std::fs::write("/proc/sys/kernel/ns_last_pid", "30000").context("number of the program")?;
        // What was inherited from outside of the lab is in a mount namespace that criu cannot name.
        let alone = "for f in /proc/$$/fd/*; do n=${f##*/}; [ $n -le 2 ] || eval \"exec $n>&-\"; done; exec setsid \"$0\" \"$@\"";
        let mut program = Command::new("bash")
            .args(["-c", alone])
            .arg(own)
            .args(["--probe", "memory", &mib.to_string(), "alone"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pid = program.id().to_string();
        let ready = || {
            let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
            let pages = text.split(' ').nth(1).and_then(|p| p.parse::<u64>().ok());
            pages.unwrap_or(0) * 4096 > mib << 20
        };
        while !ready() {
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let (criu, to) = (&self.program, there.path().display());
        agent(&format!("{criu} page-server -d --images-dir {to} --port {PORT}"))?;
        let begin = Instant::now();
        let dumped = Command::new(criu)
            .args(["dump", "-t", &pid, "--images-dir"])
            .arg(here.path())
            .args(["--page-server", "--address", NODE_2, "--port", &PORT.to_string()])
            .output()?;
        let said = String::from_utf8_lossy(&dumped.stderr).into_owned();
        ensure!(dumped.status.success(), "criu dump: {said}");
        let _ = program.wait();
        // The rest of the image is small; both nodes see one file system.
        agent(&format!(
            "cp -n {}/*.img {to}/ && {criu} restore -d --images-dir {to}",
            here.path().display()
        ))?;
        let took = begin.elapsed().as_secs_f64() * 1e3;
        agent(&format!("kill -9 {pid}"))?;
        Ok(took)
    }
}

/// Has node 2 run a line of shell.
fn agent(line: &str) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect((NODE_2, AGENT_PORT)).context("the agent on node 2")?;
    stream.write_all(line.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    ensure!(said == "ok", "{line}: {said}");
    Ok(())
}
