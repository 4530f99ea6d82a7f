//! CPU quotas of nodes: cgroup v2 `cpu.max`, or `cpu.cfs_quota_us` where the controller is on a v1 hierarchy.

use std::fs;
use std::path::{Path, PathBuf};

use super::LabError;

/// Length of the period in which a quota applies. Short, so that a node with half a core stutters little.
const PERIOD_US: u64 = 20_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// The control groups of one lab, all under one directory.
#[derive(Debug)]
pub struct Groups {
    version: Version,
    base: PathBuf,
}

impl Groups {
    /// Makes the directory `mosrun-lab-NAME` beside the machine's own groups.
    pub fn create(lab: &str) -> Result<Self, LabError> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")
            .map_err(LabError::system("reading /proc/self/mountinfo"))?;
        let (version, root) = controller(&mounts, |mount| {
            let list = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
            list.split_whitespace().any(|c| c == "cpu")
        })
        .ok_or_else(|| LabError::NoCpuController("no mounted control group hierarchy has it".into()))?;
        let base = root.join(format!("mosrun-lab-{lab}"));
        let refuse =
            |what: String| move |e: std::io::Error| LabError::NoCpuController(format!("{what}: {e}"));
        if version == Version::Two {
            // A group can hand the controller to its children only when its own parent did.
            let subtree = root.join("cgroup.subtree_control");
            fs::write(&subtree, "+cpu").map_err(refuse(format!("enabling it in {}", subtree.display())))?;
        }
        match fs::create_dir(&base) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(refuse(format!("creating {}", base.display()))(e));
            }
            _ => {}
        }
        if version == Version::Two {
            let subtree = base.join("cgroup.subtree_control");
            fs::write(&subtree, "+cpu").map_err(refuse(format!("enabling it in {}", subtree.display())))?;
        }
        Ok(Self { version, base })
    }

    /// The directory above those of the nodes.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// Makes the group of one node with its quota.
    pub fn add(&self, node: &str, cores: f64) -> Result<PathBuf, LabError> {
        let dir = self.base.join(node);
        let quota_us = ((cores * PERIOD_US as f64) as u64).max(1000);
        let set = || -> std::io::Result<()> {
            match fs::create_dir(&dir) {
                Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            match self.version {
                Version::Two => fs::write(dir.join("cpu.max"), format!("{quota_us} {PERIOD_US}")),
                Version::One => {
                    fs::write(dir.join("cpu.cfs_period_us"), PERIOD_US.to_string())?;
                    fs::write(dir.join("cpu.cfs_quota_us"), quota_us.to_string())
                }
            }
        };
        set().map_err(|e| LabError::NoCpuController(format!("setting up {}: {e}", dir.display())))?;
        Ok(dir)
    }
}

/// The group of the same hierarchy that this process is in now, to come back to.
pub fn current(group: &Path) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    current_in(&mounts, &own, group)
}

fn current_in(mounts: &str, own: &str, group: &Path) -> Option<PathBuf> {
    let mount = mounts
        .lines()
        .filter_map(Mount::parse)
        .find(|m| group.starts_with(&m.point))?;
    let inside = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let fits = match mount.version {
            Version::Two => controllers.is_empty(),
            Version::One => controllers.split(',').any(|c| c == "cpu"),
        };
        fits.then_some(path)
    })?;
    Some(mount.point.join(inside.trim_start_matches('/')))
}

struct Mount {
    version: Version,
    point: PathBuf,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (place, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        let version = match kind.next()? {
            "cgroup2" => Version::Two,
            "cgroup" if kind.nth(1)?.split(',').any(|o| o == "cpu") => Version::One,
            _ => return None,
        };
        Some(Self {
            version,
            point: PathBuf::from(place.split(' ').nth(4)?),
        })
    }
}

/// The hierarchy that has the cpu controller, by preference v2.
fn controller(mounts: &str, v2_has_cpu: impl Fn(&Path) -> bool) -> Option<(Version, PathBuf)> {
    let all: Vec<Mount> = mounts.lines().filter_map(Mount::parse).collect();
    let two = all
        .iter()
        .find(|m| m.version == Version::Two && v2_has_cpu(&m.point));
    let one = all.iter().find(|m| m.version == Version::One);
    two.or(one).map(|m| (m.version, m.point.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn takes_the_hierarchy_that_has_the_controller() {
        let one = (Version::One, PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"));
        let two = (Version::Two, PathBuf::from("/sys/fs/cgroup/unified"));
        assert_eq!(controller(MOUNTS, |_| false), Some(one));
        assert_eq!(controller(MOUNTS, |_| true), Some(two));
        assert_eq!(controller("", |_| true), None);
    }

    #[test]
    fn finds_the_way_back() {
        let own = "4:cpu,cpuacct:/a/b\n3:cpuset:/\n0::/c\n";
        let back = |group: &str| current_in(MOUNTS, own, Path::new(group));
        assert_eq!(
            back("/sys/fs/cgroup/cpu,cpuacct/x"),
            Some("/sys/fs/cgroup/cpu,cpuacct/a/b".into())
        );
        assert_eq!(
            back("/sys/fs/cgroup/unified/x"),
            Some("/sys/fs/cgroup/unified/c".into())
        );
        assert_eq!(back("/elsewhere"), None);
    }
}
