//! The peer of starting: an ssh server on node 2 with keys of its own.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::lab::NODE_2;

/// Environment variable with the directory of the keys, for the part that measures.
pub const DIRECTORY: &str = "MOSRUN_BENCH_SSH";

const PORT: &str = "7998";
const SSHD: &str = "/usr/sbin/sshd";

/// Why ssh cannot be measured here.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Skip {
    /// It is not installed.
    #[error("{0} is not installed (package {1})")]
    NotInstalled(&'static str, &'static str),
    /// Its keys could not be made.
    #[error("keys: {0}")]
    Keys(String),
}

/// A server's configuration and keys.
pub struct Server {
    directory: tempfile::TempDir,
    configuration: PathBuf,
}

impl Server {
    /// Makes keys and a configuration.
    ///
    /// # Errors
    /// Why ssh cannot be measured.
    pub fn prepare() -> Result<Server, Skip> {
        for (program, package) in [
            (SSHD, "openssh-server"),
            ("/usr/bin/ssh", "openssh-client"),
            ("/usr/bin/ssh-keygen", "openssh-client"),
        ] {
            if !Path::new(program).exists() {
                return Err(Skip::NotInstalled(program, package));
            }
        }
        let keys = |e: std::io::Error| Skip::Keys(e.to_string());
        let directory = tempfile::tempdir().map_err(keys)?;
        let at = |name: &str| directory.path().join(name);
        for name in ["host", "user"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(at(name))
                .status()
                .map_err(keys)?;
            if !made.success() {
                return Err(Skip::Keys(made.to_string()));
            }
        }
        std::fs::copy(at("user.pub"), at("authorized")).map_err(keys)?;
        // sshd looks at the directories above a file of keys, and /tmp is everybody's: StrictModes is off. What root's shell reads
        // when it starts is not to count: another HOME.
        let text = format!(
            "Port {PORT}\nListenAddress {NODE_2}\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized\nPidFile none\n\
             StrictModes no\nUsePAM no\nLogLevel QUIET\nSetEnv HOME=/\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n",
            directory.path().display()
        );
        let configuration = at("sshd_config");
        std::fs::write(&configuration, text).map_err(keys)?;
        // Where sshd confines its unprivileged half; a service would have made it.
        let confined = Path::new("/run/sshd");
        if !confined.exists() {
            std::fs::create_dir(confined).map_err(keys)?;
            std::fs::set_permissions(confined, std::fs::Permissions::from_mode(0o755)).map_err(keys)?;
        }
        Ok(Server {
            directory,
            configuration,
        })
    }

    /// The directory of keys.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What starts the server in the foreground.
    pub fn command(&self) -> [&OsStr; 5] {
        [
            OsStr::new(SSHD),
            OsStr::new("-D"),
            OsStr::new("-e"),
            OsStr::new("-f"),
            self.configuration.as_os_str(),
        ]
    }
}

/// A client with a connection that can be shared; it is closed when this is dropped.
pub struct Client {
    directory: PathBuf,
}

impl Client {
    /// The client of the server that the environment tells of; `None` when there is none.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn from_environment() -> anyhow::Result<Option<Client>> {
        let Some(directory) = std::env::var_os(DIRECTORY) else {
            return Ok(None);
        };
        let client = Client {
            directory: directory.into(),
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !client.full().stderr(Stdio::null()).status()?.success() {
            ensure!(Instant::now() < deadline, "sshd does not answer");
            std::thread::sleep(Duration::from_millis(100));
        }
        let mut master = client.sharing();
        master.args(["-o", "ControlMaster=yes", "-o", "ControlPersist=yes"]);
        let opened = master.args([NODE_2, "true"]).status().context("ssh")?;
        ensure!(opened.success(), "no connection to share: {opened}");
        Ok(Some(client))
    }

    fn ssh(&self) -> Command {
        let mut command = Command::new("ssh");
        command
            .args(["-F", "none", "-p", PORT, "-l", "root", "-i"])
            .arg(self.directory.join("user"))
            .args([
                "-o",
                "BatchMode=yes",
                "-o",
                "LogLevel=ERROR",
                "-o",
                "StrictHostKeyChecking=no",
            ])
            .arg("-o")
            .arg(format!(
                "UserKnownHostsFile={}",
                self.directory.join("known").display()
            ));
        command
    }

    /// `ssh node true` with a connection of its own.
    pub fn full(&self) -> Command {
        let mut command = self.ssh();
        command.args([NODE_2, "true"]);
        command
    }

    fn sharing(&self) -> Command {
        let mut command = self.ssh();
        let path = self.directory.join("shared");
        command.arg("-o").arg(format!("ControlPath={}", path.display()));
        command
    }

    /// ... over the shared connection.
    pub fn shared(&self) -> Command {
        let mut command = self.sharing();
        command.args([NODE_2, "true"]);
        command
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self
            .sharing()
            .args(["-O", "exit", NODE_2])
            .stderr(Stdio::null())
            .status();
    }
}
