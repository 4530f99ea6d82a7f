//! Starting and ending the daemon.

use std::io::{Read, Write};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use shim::confine::{self, Role};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::config::Config;
use super::control::ControlSocket;
use super::node::Node;
use super::spawner::Spawner;
use super::{logging, membership, serve, upkeep};
use crate::pagestore;

/// Set for the process that [`background`] starts.
const BACKGROUND: &str = "MOSD_BACKGROUND";
/// What a daemon in the background tells who started it.
const READY: &[u8] = b"ready\n";
/// How long saying goodbye may take.
const GOODBYE: Duration = Duration::from_millis(500);

/// Runs a daemon in this process until it is told to end by SIGTERM or SIGINT.
///
/// # Errors
/// It could not start; nothing is left of it.
pub fn run(config: Config) -> anyhow::Result<()> {
    if let Some(file) = &config.log.file {
        logging::stderr_to(file).with_context(|| format!("log file {}", file.display()))?;
    }
    logging::to_stderr(&config.log.level);
    let in_background = std::env::var_os(BACKGROUND).is_some();
    if in_background {
        nix::unistd::setsid().context("setsid")?;
        shim::process::prefer_session();
        nix::unistd::chdir("/").context("chdir to /")?;
    }
    let spawner = Spawner::start().context("no thread to start supervisors")?;
    // All threads that are made from here on inherit it.
    if let Err(e) = confine::this_thread(Role::Daemon) {
        tracing::warn!("mosd is not confined: {e}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let done = runtime.block_on(async {
        let rundir = config.rundir();
        let credentials = config.state_dir().credentials()?;
        let socket = ControlSocket::bind(&rundir)
            .with_context(|| format!("control socket in {}", rundir.display()))?;
        let (gossip, events) = mpsc::channel(membership::QUEUE);
        let node = Node::new(config, credentials, gossip, spawner)?;
        tracing::info!(
            "node {} ({}) of cluster {} listens on {}, is dialled at {}, and serves {}",
            node.id.number,
            node.id.name,
            node.credentials.cluster,
            node.endpoint.local_addr()?,
            node.id.addr,
            rundir.display()
        );
        if node.config.store.limit_bytes == 0
            && let Err(e) = pagestore::remove_all(&node.config.store_dir())
        {
            tracing::warn!("page stores that are not wanted: {e}");
        }
        tokio::spawn(membership::run(node.clone(), events));
        tokio::spawn(serve::run(node.clone()));
        tokio::spawn(upkeep::loads(node.clone()));
        tokio::spawn(upkeep::look_for_nodes(node.clone()));
        tokio::spawn(upkeep::remember(node.clone()));
        tell_ready(&node, in_background);
        tokio::select! {
            () = socket.run(&node) => {}
            ended = until_told() => ended?,
        }
        tracing::info!("ending; supervisors go on");
        // new programs should not find a daemon that is on its way out
        drop(socket);
        end(&node).await;
        anyhow::Ok(())
    });
    // blocking tasks (none of them long) need not be waited for
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

async fn until_told() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

async fn end(node: &Arc<Node>) {
    let _ = notify_systemd("STOPPING=1");
    membership::leave(node, GOODBYE).await;
    upkeep::save(node).await;
    // the farewell packets are datagrams: let them out before the connections are closed
    tokio::time::sleep(Duration::from_millis(50)).await;
    node.endpoint.close(0u32.into(), b"mosd ends");
    let _ = tokio::time::timeout(GOODBYE, node.endpoint.wait_idle()).await;
}

/// Says that programs may connect now: to systemd (sd_notify(3)), or to the process that put us in the background.
fn tell_ready(node: &Node, in_background: bool) {
    if let Err(e) = notify_systemd("READY=1") {
        tracing::warn!("systemd was not told that mosd is ready: {e}");
    }
    if in_background {
        // from here on the terminal, or whatever standard error is, is left alone
        if node.config.log.file.is_none()
            && let Err(e) = logging::stderr_to(&node.state.path().join("mosd.log"))
        {
            tracing::warn!("no log file: {e}");
        }
        let _ = std::io::stdout()
            .write_all(READY)
            .and_then(|()| std::io::stdout().flush());
        if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
            let _ = nix::unistd::dup2_stdout(&null);
        }
    }
}

fn notify_systemd(state: &str) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let addr = match path.as_bytes() {
        [b'@', name @ ..] => std::os::unix::net::SocketAddr::from_abstract_name(name)?,
        _ => std::os::unix::net::SocketAddr::from_pathname(&path)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &addr)?;
    Ok(())
}

/// Starts the same daemon in the background, and returns when it serves its socket or has failed. `arguments` are those
/// of this process, which the other one gets, too.
///
/// # Errors
/// It could not be started. A failure of its own shows on its standard error and in the exit code.
pub fn background(arguments: impl Iterator<Item = std::ffi::OsString>) -> anyhow::Result<ExitCode> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("mosd")
        .args(arguments)
        .arg("--foreground")
        .env(BACKGROUND, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start mosd in the background")?;
    let mut said = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(READY.len() as u64).read_to_end(&mut said)?;
    }
    if said == READY {
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait()?;
    Ok(ExitCode::from(
        status.code().map_or(1, |code| code.clamp(1, 255) as u8),
    ))
}
