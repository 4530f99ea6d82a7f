//! Links of a lab, made by iproute2 in the namespaces they belong to. The machine's own network is not touched.

use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

use super::LabError;

/// Name of a node's interface inside of it.
pub const INTERFACE: &str = "eth0";

/// Address of a node; every lab uses the same ones, for each has a network of its own.
pub fn address(node: u32) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, node as u8)
}

/// The network namespace of a process, held open.
#[derive(Debug)]
pub struct Network(File);

impl Network {
    /// Opens the network namespace of `pid`.
    pub fn of(pid: i32) -> Result<Self, LabError> {
        let path = format!("/proc/{pid}/ns/net");
        File::open(&path)
            .map(Self)
            .map_err(LabError::system(format!("opening {path}")))
    }

    /// Runs `work` on a thread that is in this network; the rest of the process stays where it is.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T, LabError> + Send) -> Result<T, LabError> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.0, CloneFlags::CLONE_NEWNET)
                        .map_err(LabError::system("entering a network namespace"))?;
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Carries out `ip` commands (one a line) in this network.
    pub fn ip(&self, batch: &str) -> Result<(), LabError> {
        let ip = find("ip").ok_or(LabError::MissingTool {
            tool: "ip",
            package: "iproute2",
        })?;
        self.within(|| feed(&ip, &["-batch", "-"], batch))
    }

    /// Lets at most `bits` per second leave by the node's interface (tc-tbf(8)).
    pub fn limit(&self, bits: u64) -> Result<(), LabError> {
        let tc = find("tc").ok_or(LabError::MissingTool {
            tool: "tc",
            package: "iproute2",
        })?;
        // The bucket must hold what passes between two timer ticks, and a whole segmented packet.
        let burst_bytes = (bits / 8 / 100).max(65_536);
        let line =
            format!("qdisc add dev {INTERFACE} root tbf rate {bits}bit burst {burst_bytes} latency 50ms\n");
        self.within(|| feed(&tc, &["-batch", "-"], &line))
    }
}

/// A bridge, as hub of a lab.
pub const BRIDGE_UP: &str = "link set lo up
link add hub type bridge
link set hub addrgenmode none
link set hub up
";

/// In the hub: a cable from the bridge to node `node`, whose first process is `pid` there.
pub fn cable(node: u32, pid: i32, mtu_bytes: Option<u32>) -> String {
    let mtu = mtu(mtu_bytes);
    format!(
        "link add node{node} type veth peer name {INTERFACE} netns {pid}
link set node{node} {mtu} addrgenmode none master hub
link set node{node} up
"
    )
}

/// In a node: its interface gets its address.
pub fn node_up(node: u32, mtu_bytes: Option<u32>) -> String {
    let (address, mtu) = (address(node), mtu(mtu_bytes));
    format!(
        "link set lo up
link set {INTERFACE} {mtu} addrgenmode none
address add {address}/24 dev {INTERFACE}
link set {INTERFACE} up
"
    )
}

/// Words of `ip link set`.
fn mtu(bytes: Option<u32>) -> String {
    bytes.map(|bytes| format!("mtu {bytes}")).unwrap_or_default()
}

fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(tool))
        .find(|p| p.is_file())
}

fn feed(tool: &Path, arguments: &[&str], input: &str) -> Result<(), LabError> {
    let name = || format!("{} {}", tool.display(), arguments.join(" "));
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(LabError::system(format!("starting {}", name())))?;
    if let Some(mut pipe) = child.stdin.take() {
        // If the tool ends early, what it says tells more than our EPIPE.
        let _ = pipe.write_all(input.as_bytes());
    }
    let output = child
        .wait_with_output()
        .map_err(LabError::system(format!("waiting for {}", name())))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let message = if said.is_empty() {
        output.status.to_string()
    } else {
        said
    };
    Err(LabError::Tool {
        tool: name(),
        message,
    })
}
