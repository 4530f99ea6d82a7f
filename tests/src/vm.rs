//! A node with another kernel and another processor: a virtual machine, in software, that is part of a lab's cluster.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::build::programs;
use crate::lab::{Lab, text};
use crate::running::wait_for;
use crate::skip::{Skip, program};

/// Address of the machine in the lab's network.
const ADDRESS: &str = "10.77.0.99/24";
/// How long it may take to start, and then for each command. Software emulation on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(150);
/// The processor: one that lacks much of what today's have.
const CPU: &str = "SandyBridge";

/// The machine; it is switched off when this is dropped.
#[derive(Debug)]
pub struct Vm {
    qemu: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    /// What was read so far, for the message of a failed test.
    log: String,
}

impl Vm {
    /// Starts it, and has it join the cluster of a lab, as the next node.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn join(lab: &Lab) -> Result<Vm, Skip> {
        for name in ["qemu-system-x86_64", "cpio", "depmod", "nsenter", "busybox"] {
            program(name)?;
        }
        let kernel = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/kernel"));
        let image = find(&kernel.join("boot"), "vmlinuz-").ok_or(Skip::NoKernel)?;
        let archive = archive(&kernel);
        let hub = hub(lab);
        cable(&hub);
        let invited = lab
            .exec(1)
            .args(["mosctl", "cluster", "invite"])
            .output()
            .expect("mosctl starts");
        assert!(invited.status.success(), "{}", text(&invited));
        let invitation = String::from_utf8_lossy(&invited.stdout).trim().to_owned();
        let mut qemu = Command::new("nsenter")
            .args(["--net", "--target", &hub, "qemu-system-x86_64"])
            .args(["-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "2", "-m", "2G"])
            .args([
                "-display",
                "none",
                "-monitor",
                "none",
                "-serial",
                "stdio",
                "-no-reboot",
            ])
            .args(["-netdev", "tap,id=net,ifname=vm,script=no,downscript=no"])
            .args(["-device", "virtio-net-pci,netdev=net"])
            .arg("-kernel")
            .arg(image)
            .arg("-initrd")
            .arg(archive)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet panic=-1 mosrun.address={ADDRESS} mosrun.invitation={invitation}"
            ))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("nsenter starts");
        let input = qemu.stdin.take().expect("a pipe");
        let output = qemu.stdout.take().expect("a pipe");
        let (say, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if say.send(line).is_err() {
                    break;
                }
            }
        });
        let mut vm = Vm {
            qemu,
            input,
            lines,
            log: String::new(),
        };
        vm.until("=== ready");
        wait_for("the virtual machine to be up in the cluster", PATIENCE, || {
            let status = lab
                .exec(1)
                .args(["mosctl", "status"])
                .output()
                .expect("mosctl starts");
            let up = |l: &str| l.split_whitespace().skip(1).take(2).eq(["vm", "up"]);
            String::from_utf8_lossy(&status.stdout).lines().any(up)
        });
        Ok(vm)
    }

    /// Has a line executed by its shell; gives what it wrote and its exit status.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn run(&mut self, line: &str) -> (String, i32) {
        writeln!(self.input, "{line}").expect("its console takes it");
        let (output, last) = self.until("=== status ");
        // A console shows what is typed.
        let output = output.strip_prefix(&format!("{line}\n")).unwrap_or(&output);
        (output.to_owned(), last.trim().parse().expect("a status"))
    }

    /// What it writes up to a line that begins so, and the rest of that line.
    fn until(&mut self, mark: &str) -> (String, String) {
        let deadline = Instant::now() + PATIENCE;
        let mut before = String::new();
        loop {
            let line = match self
                .lines
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("the virtual machine does not say `{mark}`:\n{}", self.log)
                }
            };
            self.log += &line;
            self.log.push('\n');
            if let Some(rest) = line.strip_prefix(mark) {
                return (before, rest.to_owned());
            }
            before += &line;
            before.push('\n');
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn find(dir: &Path, prefix: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).ok()?;
    entries.flatten().map(|e| e.path()).find(|p| {
        p.file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with(prefix))
    })
}

/// Makes the machine's file system with the programs as they are now.
fn archive(kernel: &Path) -> PathBuf {
    let archive = kernel.join("initrd");
    let made = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/vm/initrd.sh"))
        .arg(kernel)
        .arg(programs())
        .arg(&archive)
        .output()
        .expect("initrd.sh starts");
    assert!(made.status.success(), "initrd.sh: {}", text(&made));
    archive
}

/// The process that holds the lab's bridge.
fn hub(lab: &Lab) -> String {
    let record = std::fs::read(lab.dir().join("lab.json")).expect("the lab's record");
    let record: serde_json::Value = serde_json::from_slice(&record).expect("JSON");
    record["hub"]["pid"].as_i64().expect("the hub's pid").to_string()
}

/// A cable from the bridge for the machine.
fn cable(hub: &str) {
    for command in ["tuntap add vm mode tap", "link set vm master hub up"] {
        let done = Command::new("nsenter")
            .args(["--net", "--target", hub, "ip"])
            .args(command.split(' '))
            .output()
            .expect("nsenter starts");
        assert!(done.status.success(), "ip {command}: {}", text(&done));
    }
}
