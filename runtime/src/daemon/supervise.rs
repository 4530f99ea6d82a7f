//! Starting supervisors, on both sides of the process boundary.
//!
//! [`start`] is the daemon's side, [`child_main`] that of the new process (`mosd supervise`). The child makes itself
//! independent of the daemon, becomes the job's user for good, and only then looks at anything that the job's user has a
//! say in.

use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::unistd::{Gid, Uid};
use tokio::process::{ChildStdin, ChildStdout};

use super::frames::{self, within};
use super::logging;
use super::node::Node;
use crate::codec::CodecError;
use crate::control::{Failure, FailureKind, HostedJob, Placement};
use crate::daemon::config::Accept;
use crate::pagestore;
use crate::supervisor::{self, StoreConfig, SupervisorAnswer, SupervisorConfig, answer_and_detach};

/// How long a new supervisor may take until it listens.
const LIMIT: Duration = Duration::from_secs(10);
/// Largest answer of a supervisor, in bytes.
const MAX_ANSWER: usize = 64 << 10;
/// Most supplementary groups (`NGROUPS_MAX`, getgroups(2)).
const MAX_GROUPS: usize = 65_536;
/// Environment variables that a supervisor is given. The daemon's own are none of the job's business.
const PASSED_ON: [&str; 4] = ["PATH", LOG, "RUST_BACKTRACE", "TZ"];
/// The environment variable with the log filter.
const LOG: &str = "MOSRUN_LOG";

fn refused(text: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Refused, text)
}

/// The page store of the job's user. Without one the job is held all the same.
fn store(node: &Node, config: &SupervisorConfig) -> Option<StoreConfig> {
    let limit_bytes = node.config.store.limit_bytes;
    if limit_bytes == 0 {
        return None;
    }
    let dir = node.config.store_dir();
    match pagestore::prepare(&dir, config.uid, config.gid) {
        Ok(dir) => Some(StoreConfig::new(&dir, limit_bytes)),
        Err(e) => {
            tracing::warn!("no page store for uid {}: {e}", config.uid);
            None
        }
    }
}

/// Starts a supervisor here, and returns when it listens.
///
/// # Errors
/// Why there is none.
pub async fn start(node: &Arc<Node>, mut config: SupervisorConfig) -> Result<Placement, Failure> {
    check(node, &config)?;
    config.store = store(node, &config);
    let begun = Instant::now();
    let mut command = Command::new(&node.program);
    command
        .arg("supervise")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    command.env_clear().env(LOG, &node.config.log.level).envs(
        PASSED_ON
            .iter()
            .filter_map(|name| Some((name, std::env::var_os(name)?))),
    );
    let failed = |what: &str, why: &dyn std::fmt::Display| {
        refused(format!(
            "node {} ({}) {what}: {why}",
            node.id.number, node.id.name
        ))
    };
    let cannot = |e: std::io::Error| failed("cannot start a supervisor", &e);
    let mut child = node.spawner.spawn(command).await.map_err(cannot)?;
    let pid = child.id();
    let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(failed("cannot start a supervisor", &"no pipes"));
    };
    let stdin = ChildStdin::from_std(stdin).map_err(cannot)?;
    let stdout = ChildStdout::from_std(stdout).map_err(cannot)?;
    let answer = within(LIMIT, handshake(&config, stdin, stdout)).await;
    let result = match answer {
        Some(Ok(SupervisorAnswer::Ready(ready))) => {
            let (addr, fingerprint) = (ready.addr, ready.fingerprint);
            node.hosted.add(HostedJob {
                job: config.job,
                uid: config.uid,
                pid,
            });
            tracing::info!(
                "job {}: supervisor {pid} for node {} listens on {addr} after {} ms",
                config.job,
                config.home_node,
                begun.elapsed().as_millis()
            );
            Ok(Placement {
                addr,
                fingerprint,
                pid,
            })
        }
        Some(Ok(SupervisorAnswer::Failed(why))) => Err(refused(format!("node {}: {why}", node.id.number))),
        Some(Err(CodecError::Closed)) => {
            Err(failed("cannot hold the job", &"its supervisor died; see its log"))
        }
        Some(Err(e)) => Err(failed("cannot hold the job", &e)),
        None => Err(failed(
            "cannot hold the job",
            &"its supervisor did not answer in time",
        )),
    };
    if result.is_err() {
        let _ = child.kill();
    }
    let node = node.clone();
    // A thread of its own: it lives as long as the job, and the runtime must not wait for it.
    let waiter = std::thread::Builder::new().name("waiter".into()).spawn(move || {
        match child.wait() {
            Ok(status) => tracing::debug!("supervisor {pid}: {status}"),
            Err(e) => tracing::warn!("supervisor {pid}: {e}"),
        }
        node.hosted.sweep();
    });
    if let Err(e) = waiter {
        tracing::warn!("supervisor {pid} will not be waited for: {e}");
    }
    result
}

async fn handshake(
    config: &SupervisorConfig,
    mut stdin: ChildStdin,
    mut stdout: ChildStdout,
) -> Result<SupervisorAnswer, CodecError> {
    frames::write(&mut stdin, config).await?;
    drop(stdin);
    frames::read(&mut stdout, MAX_ANSWER).await
}

fn check(node: &Node, config: &SupervisorConfig) -> Result<(), Failure> {
    let here = format!("node {} ({})", node.id.number, node.id.name);
    let own = nix::unistd::geteuid();
    if config.job.home != config.home_node {
        return Err(refused("a node can only ask for its own jobs"));
    }
    if config.groups.len() > MAX_GROUPS {
        return Err(refused(format!("{} groups are too many", config.groups.len())));
    }
    if node.config.guests.accept == Accept::None {
        return Err(refused(format!(
            "{here} takes no guests (guests.accept in its mosd.toml)"
        )));
    }
    if node.is_full() {
        return Err(refused(format!(
            "{here} has as many jobs as it takes (guests.max_jobs in its mosd.toml)"
        )));
    }
    if !own.is_root() && config.uid != own.as_raw() && !node.config.guests.other_users {
        return Err(refused(format!(
            "mosd of {here} runs as uid {own} and takes no jobs of uid {} (guests.other_users in its mosd.toml)",
            config.uid
        )));
    }
    Ok(())
}

/// The whole life of a `mosd supervise`.
pub fn child_main() -> ExitCode {
    logging::to_stderr(&std::env::var(LOG).unwrap_or_else(|_| "info".into()));
    let config = match SupervisorConfig::read_from(&mut std::io::stdin().lock()) {
        Ok(config) => config,
        Err(e) => {
            eprintln!("mosd supervise is started by mosd and by nobody else ({e})");
            return ExitCode::from(2);
        }
    };
    let job = config.job;
    if let Err(why) = become_independent().and_then(|()| become_user(&config)) {
        let _ = answer_and_detach(&SupervisorAnswer::Failed(why));
        return ExitCode::FAILURE;
    }
    match supervisor::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("job {job}: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Leaves the daemon's session, directory and name.
fn become_independent() -> Result<(), String> {
    // fails when this is a process group leader, as it is when started from a shell: then nothing is lost
    if nix::unistd::setsid().is_ok() {
        shim::process::prefer_session();
    }
    let _ = nix::sys::prctl::set_name(c"mosd-supervise");
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    nix::unistd::chdir("/").map_err(|e| format!("cannot change to /: {e}"))
}

/// Becomes the job's user, for good, when there is a choice.
fn become_user(config: &SupervisorConfig) -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() || config.uid == 0 {
        return Ok(());
    }
    let said =
        |what: &'static str| move |e: nix::Error| format!("cannot become uid {}: {what}: {e}", config.uid);
    let groups: Vec<Gid> = config.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    let (uid, gid) = (Uid::from_raw(config.uid), Gid::from_raw(config.gid));
    nix::unistd::setgroups(&groups).map_err(said("setgroups"))?;
    nix::unistd::setresgid(gid, gid, gid).map_err(said("setresgid"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(said("setresuid"))?;
    // the change of credentials made /proc/self root's (proc_pid(5)); the id maps of the cage are written there
    nix::sys::prctl::set_dumpable(true).map_err(said("prctl(PR_SET_DUMPABLE)"))
}
