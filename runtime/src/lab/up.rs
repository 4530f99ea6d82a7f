//! Creating and ending a lab.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::keeper::{Order, Plan, Started};
use super::net::{self, Network};
use super::root::{Files, PROGRAMS};
use super::state::{self, Keeper, LabDir, Node, Options, Record};
use super::{LabError, cgroup, cluster};

/// How long the processes of a killed node may take to be gone. They hold nothing that takes time, but for one that is
/// stopped outside of the lab (a suspended `lab exec`).
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// Makes a lab. On failure everything that was made is undone.
pub fn up(name: &str, options: &Options) -> Result<Record, LabError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    let dir = LabDir::new(name)?;
    fs::create_dir_all(dir.path()).map_err(LabError::system(format!("creating {}", dir.path().display())))?;
    let lock = dir.lock()?;
    if let Some(old) = dir.read()? {
        if old.alive() {
            return Err(LabError::Exists(name.to_owned()));
        }
        // What an interrupted `up`, a crash or a reboot left.
        clear(&dir, &old)?;
        fs::create_dir_all(dir.path())
            .map_err(LabError::system(format!("creating {}", dir.path().display())))?;
    }
    let mut record = Record {
        name: name.to_owned(),
        options: options.clone(),
        boot_id: state::boot_id(),
        hub: None,
        nodes: Vec::new(),
        cgroups: Vec::new(),
        complete: false,
    };
    let made = Builder {
        dir: &dir,
        record: &mut record,
    }
    .build();
    if let Err(error) = made {
        // The first error is the one to tell; what cannot be undone shows in `lab status`.
        let _ = clear(&dir, &record);
        return Err(error);
    }
    drop(lock);
    Ok(record)
}

/// Ends a lab: kills all its processes and removes everything that was made for it.
pub fn down(name: &str) -> Result<(), LabError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    let dir = LabDir::new(name)?;
    if !dir.path().is_dir() {
        return Err(LabError::Unknown(name.to_owned()));
    }
    let _lock = dir.lock()?;
    match dir.read()? {
        Some(record) => clear(&dir, &record),
        None => dir.remove(),
    }
}

/// Kills and removes what the record names.
fn clear(dir: &LabDir, record: &Record) -> Result<(), LabError> {
    let leftover = |what: String| LabError::Leftover {
        lab: record.name.clone(),
        what,
    };
    if record.boot_id == state::boot_id() {
        let keepers = || record.nodes.iter().map(|n| &n.keeper).chain(&record.hub);
        for keeper in keepers() {
            // All at once first, so that no node waits for another one's end.
            keeper.kill(Duration::ZERO);
        }
        if let Some(Keeper { pid, .. }) = keepers().find(|k| !k.kill(KILL_PATIENCE)) {
            return Err(leftover(format!("process {pid} does not end")));
        }
        for group in &record.cgroups {
            remove_group(group).map_err(|e| leftover(format!("{}: {e}", group.display())))?;
        }
    }
    dir.remove()
}

/// A group is busy for a moment after its last process has ended.
fn remove_group(group: &Path) -> std::io::Result<()> {
    let mut patience = 200;
    loop {
        match fs::remove_dir(group) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && patience > 0 => {
                patience -= 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

struct Builder<'a> {
    dir: &'a LabDir,
    record: &'a mut Record,
}

impl Builder<'_> {
    fn build(mut self) -> Result<(), LabError> {
        let options = self.record.options.clone();
        self.dir.write(self.record)?;
        let groups = self.groups(&options)?;
        let programs = programs()?;
        let scratch = self.dir.path().join("root");
        fs::create_dir_all(&scratch).map_err(LabError::system(format!("creating {}", scratch.display())))?;
        let rundirs: Vec<_> = (1..=options.nodes)
            .map(|number| {
                if number == 1 {
                    crate::rundir::path()
                } else {
                    PathBuf::from("/run/mosrun")
                }
            })
            .collect();
        let mut placed = if options.daemons {
            let addresses: Vec<_> = (1..=options.nodes).map(net::address).collect();
            cluster::make(self.dir, &addresses, &rundirs)?
        } else {
            vec![Vec::new(); options.nodes as usize]
        };
        let hosts: Vec<_> = (1..=options.nodes)
            .map(|n| (net::address(n).to_string(), node_name(n)))
            .collect();

        let mut nodes = Vec::new();
        for (number, cgroup) in (1..=options.nodes).zip(groups) {
            let files = Files {
                machine: number == 1,
                hostname: node_name(number),
                scratch: scratch.clone(),
                rundir: rundirs[number as usize - 1].clone(),
                programs: programs.clone(),
                hosts: hosts.clone(),
                placed: std::mem::take(&mut placed[number as usize - 1]),
                user: options.user.clone(),
            };
            let mut node = Started::new(&format!("node {number}"), self.log(&node_name(number))?)?;
            self.record.nodes.push(Node {
                number,
                name: node_name(number),
                address: net::address(number).to_string(),
                keeper: node.keeper.clone(),
                cgroup,
                rundir: files.rundir.clone(),
            });
            self.dir.write(self.record)?;
            node.plan(&Plan::Node(files))?;
            nodes.push(node);
        }
        let mut hub = self.hub(&options)?;
        for node in &self.record.nodes {
            let network = Network::of(node.keeper.pid)?;
            network.ip(&net::node_up(node.number, options.mtu_bytes))?;
            if let Some(bits) = options.rate_bits {
                network.limit(bits)?;
            }
        }
        if options.daemons {
            for (node, keeper) in self.record.nodes.iter().zip(&mut nodes) {
                keeper.order(&Order::Start(cluster::daemon(self.record, node)))?;
            }
        }
        self.record.complete = true;
        self.dir.write(self.record)?;
        if options.daemons {
            cluster::wait(self.record)?;
        }
        for keeper in nodes.iter_mut().chain([&mut hub]) {
            keeper.order(&Order::Stay)?;
        }
        Ok(())
    }

    fn groups(&mut self, options: &Options) -> Result<Vec<Option<PathBuf>>, LabError> {
        let Some(cores) = options.cpu_quota_cores else {
            return Ok(vec![None; options.nodes as usize]);
        };
        let groups = cgroup::Groups::create(&self.record.name)?;
        self.record.cgroups = vec![groups.base().to_owned()];
        let mut dirs = Vec::new();
        for number in 1..=options.nodes {
            let dir = groups.add(&node_name(number), cores)?;
            self.record.cgroups.insert(0, dir.clone());
            dirs.push(Some(dir));
        }
        self.dir.write(self.record)?;
        Ok(dirs)
    }

    fn hub(&mut self, options: &Options) -> Result<Started, LabError> {
        let mut hub = Started::new("the hub", self.log("hub")?)?;
        self.record.hub = Some(hub.keeper.clone());
        self.dir.write(self.record)?;
        let pids = || self.record.nodes.iter().map(|n| n.keeper.pid);
        if options.needs_relay() {
            hub.plan(&Plan::Relay {
                nodes: pids().collect(),
                delay_us: options.delay_us,
                loss: options.loss,
                seed: options.seed,
            })?;
        } else {
            hub.plan(&Plan::Bridge)?;
            let cables: String = (1..)
                .zip(pids())
                .map(|(number, pid)| net::cable(number, pid, options.mtu_bytes))
                .collect();
            Network::of(hub.keeper.pid)?.ip(&format!("{}{cables}", net::BRIDGE_UP))?;
        }
        Ok(hub)
    }

    fn log(&self, of: &str) -> Result<File, LabError> {
        let path = self.dir.path().join(format!("{of}.log"));
        File::create(&path).map_err(LabError::system(format!("creating {}", path.display())))
    }
}

/// Hostname of a node.
pub fn node_name(number: u32) -> String {
    format!("node{number}")
}

/// The directory that holds our programs: the one that this program was started from.
fn programs() -> Result<PathBuf, LabError> {
    let own = std::env::current_exe().map_err(LabError::system("finding our own program"))?;
    let dir = own.parent().unwrap_or(Path::new("/")).to_owned();
    for program in PROGRAMS {
        let path = dir.join(program);
        fs::metadata(&path).map_err(LabError::system(format!(
            "looking for {} beside this program",
            path.display()
        )))?;
    }
    Ok(dir)
}
