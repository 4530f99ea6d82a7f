//! Making the labs in which is measured.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, ensure};

/// The port of the echo server on node 2.
pub const ECHO_PORT: u16 = 7999;
/// The port of what takes and drops everything on node 2.
pub const SINK_PORT: u16 = 7997;
/// The port of what runs lines of shell on node 2.
pub const AGENT_PORT: u16 = 7996;
/// The address of node 2 in a lab.
pub const NODE_2: &str = "10.77.0.2";

/// How the machine and the links are, for one series of measurements.
struct Setting {
    name: &'static str,
    /// What it is, in a table's title.
    title: &'static str,
    /// Options of `lab up`.
    options: &'static [&'static str],
    /// What is measured there; `None`: everything.
    only: Option<&'static str>,
    /// Put in front of it: what a lab's processes inherit.
    before: &'static [&'static str],
}

const SETTINGS: [Setting; 5] = [
    Setting {
        name: "free",
        title: "both processors",
        options: &[],
        only: None,
        before: &[],
    },
    Setting {
        name: "one-core",
        title: "all on one processor",
        options: &[],
        only: Some("call"),
        before: &["taskset", "-c", "0"],
    },
    Setting {
        name: "far",
        title: "a link with 250 us each way",
        options: &["--delay-us", "250"],
        only: Some("call"),
        before: &[],
    },
    Setting {
        name: "jumbo",
        title: "both processors, packets of 9000 bytes",
        options: &["--mtu", "9000"],
        only: Some("whole"),
        before: &[],
    },
    Setting {
        name: "gigabit",
        title: "both processors, links of 1 Gbit/s",
        options: &["--rate", "1gbit"],
        only: Some("whole"),
        before: &[],
    },
];

/// Ends a process when it goes out of scope.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A lab of two nodes; it is ended when this is dropped.
struct Lab {
    mosctl: PathBuf,
    name: String,
}

impl Lab {
    fn up(programs: &Path, setting: &Setting) -> anyhow::Result<Lab> {
        let lab = Lab {
            mosctl: programs.join("mosctl"),
            name: format!("bench-{}-{}", setting.name, std::process::id()),
        };
        let mut words = setting
            .before
            .iter()
            .map(std::convert::AsRef::as_ref)
            .chain([lab.mosctl.as_os_str()]);
        let mut command = Command::new(words.next().context("a command")?);
        command
            .args(words)
            .args(["lab", "up", "--nodes", "2", "--name", &lab.name])
            .args(setting.options);
        let output = command
            .output()
            .with_context(|| format!("{command:?} cannot be started"))?;
        ensure!(
            output.status.success(),
            "lab up: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(lab)
    }

    fn exec(&self, node: &str, options: &[&str]) -> Command {
        let mut command = Command::new(&self.mosctl);
        command
            .args(["lab", "exec", "--name", &self.name])
            .args(options)
            .args([node, "--"]);
        command
    }

    /// A server on node 2 with this machine's files.
    fn serve(&self, words: &[&std::ffi::OsStr]) -> anyhow::Result<Ending> {
        let child = self
            .exec("2", &["--machine-files"])
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Ending(child))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = Command::new(&self.mosctl)
            .args(["lab", "down", "--name", &self.name])
            .status();
    }
}

/// Builds the programs, makes labs, and measures in them what was chosen.
pub fn run(chosen: &[&str]) -> anyhow::Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "labs need root");
    let own = std::env::current_exe()?;
    let programs = own.parent().context("a directory")?.to_owned();
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args(["build", "--quiet", "--package", "runtime", "--bins"]);
    if programs.ends_with("release") {
        build.arg("--release");
    } else {
        println!("These are numbers of a debug build; measure with --release.");
    }
    ensure!(build.status()?.success(), "the programs do not build");
    for setting in &SETTINGS {
        let here: Vec<_> = chosen
            .iter()
            .filter(|c| setting.only.is_none_or(|only| only == **c))
            .collect();
        if here.is_empty() {
            continue;
        }
        println!("\n### {}", setting.title);
        let lab = Lab::up(&programs, setting)?;
        let pinned: Vec<&std::ffi::OsStr> = setting.before.iter().map(std::convert::AsRef::as_ref).collect();
        let mut servers = Vec::new();
        for (name, port) in [("echo", ECHO_PORT), ("sink", SINK_PORT), ("agent", AGENT_PORT)] {
            let address = format!("{NODE_2}:{port}");
            let mut words = pinned.clone();
            words.push(own.as_os_str());
            words.extend(["--probe", name, &address].map(std::ffi::OsStr::new));
            servers.push(lab.serve(&words)?);
        }
        let ssh = crate::measure::ssh::Server::prepare();
        for what in here {
            let sshd = match (*what, &ssh) {
                ("start", Ok(server)) => Some(lab.serve(&server.command())?),
                ("start", Err(why)) => {
                    println!("\nssh is not measured: {why}");
                    None
                }
                _ => None,
            };
            let mut measure = lab.exec("1", &[]);
            measure
                .args(&pinned)
                .arg(&own)
                .args(["--measure", what, setting.name]);
            if let (Some(_), Ok(server)) = (&sshd, &ssh) {
                measure.env(crate::measure::ssh::DIRECTORY, server.directory());
            }
            ensure!(measure.status()?.success(), "{what} could not be measured");
        }
        drop(servers);
    }
    Ok(())
}
