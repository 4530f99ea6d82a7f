//! Faults in the middle of moves: at points of our programs (`shim/src/faults.rs`), and links that are cut.

use std::path::PathBuf;
use std::time::Duration;

use crate::lab::Lab;
use crate::running::within;

/// How long a move may take to come to a point of it.
const PATIENCE: Duration = Duration::from_secs(40);

/// The nodes of a lab, where faults can be asked for.
#[derive(Debug)]
pub struct Faults {
    /// Their directories for that, as this machine sees them.
    dirs: Vec<PathBuf>,
}

/// A fault that was asked for, on a node.
#[derive(Debug)]
pub struct Fault {
    armed: PathBuf,
    reached: PathBuf,
}

impl Faults {
    /// Of a lab with this many nodes.
    ///
    /// # Panics
    /// When a directory cannot be made.
    pub fn of(lab: &Lab, nodes: u32) -> Self {
        let rundir = runtime::rundir::path();
        let rundir = rundir.strip_prefix("/").unwrap_or(&rundir);
        let dirs = (1..=nodes)
            .map(|node| {
                let dir = lab.root_of(node).join(rundir).join("faults");
                std::fs::create_dir_all(&dir).expect("a directory for faults");
                dir
            })
            .collect();
        Self { dirs }
    }

    /// Has something happen at a point of the next move, on a node; of this process, or of any.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn arm(&self, node: u32, point: &str, pid: Option<i32>, what: &str) -> Fault {
        let dir = &self.dirs[node as usize - 1];
        let name = pid.map_or(point.to_owned(), |pid| format!("{point}.{pid}"));
        let fault = Fault {
            armed: dir.join(&name),
            reached: dir.join(format!("{name}.reached")),
        };
        let _ = std::fs::remove_file(&fault.reached);
        // It must not be read before it is complete.
        let new = dir.join(format!("{name}.new"));
        std::fs::write(&new, what).expect("the fault is written");
        std::fs::rename(new, &fault.armed).expect("the fault is there");
        fault
    }
}

impl Fault {
    /// Whether it has happened.
    pub fn happened(&self) -> bool {
        !self.armed.exists()
    }

    /// Waits until it has happened; says whether it has in time.
    pub fn await_it(&self) -> bool {
        within(PATIENCE, || self.happened())
    }

    /// Whoever waits there goes on.
    pub fn go(&self) {
        let _ = std::fs::remove_file(&self.reached);
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.armed);
        let _ = std::fs::remove_file(&self.reached);
    }
}

/// Links between nodes that are cut: what is sent vanishes, and nobody is told. They are made whole when this is dropped.
#[derive(Debug)]
pub struct Cut<'a> {
    lab: &'a Lab,
    pairs: Vec<(u32, u32)>,
}

impl<'a> Cut<'a> {
    /// Cuts the links between each two nodes.
    pub fn between(lab: &'a Lab, pairs: &[(u32, u32)]) -> Self {
        let cut = Self {
            lab,
            pairs: pairs.to_vec(),
        };
        // Frames to an address that no card has.
        cut.each("replace", "lladdr 02:00:00:00:0d:ad nud permanent");
        cut
    }

    fn each(&self, verb: &str, how: &str) {
        let mut nodes: Vec<u32> = self.pairs.iter().flat_map(|(a, b)| [*a, *b]).collect();
        nodes.sort_unstable();
        nodes.dedup();
        for node in nodes {
            let others = self.pairs.iter().filter_map(|(a, b)| match node {
                _ if node == *a => Some(b),
                _ if node == *b => Some(a),
                _ => None,
            });
            let script: String = others
                .map(|other| format!("ip neigh {verb} 10.77.0.{other} {how} dev eth0\n"))
                .collect();
            self.lab.inspect(node, script);
        }
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        self.each("del", "");
    }
}

/// Waits until none of these nodes has a process whose command line matches.
///
/// # Panics
/// When one stays.
pub fn await_none(lab: &Lab, nodes: &[u32], pattern: &str, limit: Duration) {
    let ended = within(limit, || {
        nodes.iter().all(|node| {
            let script = format!("pgrep -f '{pattern}' || true");
            lab.inspect(*node, script).trim().is_empty()
        })
    });
    assert!(ended, "something is left after {limit:?}\n{}", lab.diagnosis());
}
