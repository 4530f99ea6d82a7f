//! The supervisors that this node has started.
//!
//! They outlive the daemon, so the list is also on disk: `<rundir>/supervisors/<pid>`, one file each, with the start time
//! of the process, by which a pid that was given to somebody else is noticed (proc_pid_stat(5), field 22).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::control::HostedJob;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    job: HostedJob,
    start_ticks: u64,
}

/// The list.
#[derive(Debug)]
pub struct Hosted {
    dir: PathBuf,
    map: Mutex<BTreeMap<u32, Record>>,
}

impl Hosted {
    /// Takes up the list of the daemon that served `rundir` before.
    pub fn open(rundir: &Path) -> Self {
        let dir = rundir.join("supervisors");
        let mut map = BTreeMap::new();
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let record = std::fs::read(entry.path())
                .ok()
                .and_then(|b| serde_json::from_slice::<Record>(&b).ok());
            match record.filter(is_alive) {
                Some(record) => drop(map.insert(record.job.pid, record)),
                None => drop(std::fs::remove_file(entry.path())),
            }
        }
        Hosted {
            dir,
            map: Mutex::new(map),
        }
    }

    /// Adds a supervisor that has just started.
    pub fn add(&self, job: HostedJob) {
        let Some(start_ticks) = start_ticks(job.pid) else {
            return;
        };
        let record = Record { job, start_ticks };
        let write = || -> std::io::Result<()> {
            std::fs::create_dir_all(&self.dir)?;
            std::fs::write(self.file(record.job.pid), serde_json::to_vec(&record)?)
        };
        if let Err(e) = write() {
            tracing::warn!(
                "{}: {e}; a restarted mosd will not count this supervisor",
                self.dir.display()
            );
        }
        self.map.lock().insert(record.job.pid, record);
    }

    fn file(&self, pid: u32) -> PathBuf {
        self.dir.join(pid.to_string())
    }

    /// Removes those that have ended.
    pub fn sweep(&self) {
        self.map.lock().retain(|pid, record| {
            let alive = is_alive(record);
            if !alive {
                let _ = std::fs::remove_file(self.file(*pid));
            }
            alive
        });
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.map.lock().len() as u32
    }

    /// All of them, in the order of their pids.
    pub fn list(&self) -> Vec<HostedJob> {
        self.map.lock().values().map(|r| r.job.clone()).collect()
    }
}

fn is_alive(record: &Record) -> bool {
    start_ticks(record.job.pid) == Some(record.start_ticks)
}

/// When a process started, in clock ticks since boot; `None` when it is dead or a zombie.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if fields.next()? == "Z" {
        return None;
    }
    // the state was field 3; 22 is 18 further on
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job_id::JobId;

    #[test]
    fn the_list_survives_and_forgets_the_dead() {
        let top = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let hosted = Hosted::open(top.path());
        let id = JobId::new(2, 7);
        let job = |pid| HostedJob { job: id, uid: 1, pid };
        hosted.add(job(child.id()));
        hosted.add(job(std::process::id()));
        hosted.add(job(u32::MAX));
        assert_eq!(hosted.count(), 2);
        let again = Hosted::open(top.path());
        assert_eq!(again.list(), hosted.list());
        child.kill().unwrap();
        child.wait().unwrap();
        again.sweep();
        assert_eq!(again.list(), [job(std::process::id())]);
        // somebody else with the same pid
        std::fs::write(
            hosted.file(1),
            serde_json::to_vec(&Record {
                job: job(1),
                start_ticks: 3,
            })
            .unwrap(),
        )
        .unwrap();
        assert_eq!(Hosted::open(top.path()).count(), 1);
        assert!(!hosted.file(1).exists());
    }
}
