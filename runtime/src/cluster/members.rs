//! The table of nodes: what is known of each, from whatever source. No I/O; time is a parameter.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::gossip::GossipId;
use super::protocol::LoadReport;
use super::state::{LoadVector, NodeState, NodeStatus};
use super::store::{MAX_MEMBERS, MemberRecord};

/// A placement shows in the load of its node after this time, at the latest.
const PENDING: Duration = Duration::from_millis(1500);
/// Placements that are remembered for one node.
const MAX_PENDING: usize = 1000;

#[derive(Debug)]
struct Entry {
    record: MemberRecord,
    generation: u64,
    status: NodeStatus,
    load: Option<(LoadVector, Instant)>,
    pending: VecDeque<Instant>,
}

/// The nodes, this one included.
#[derive(Debug)]
pub struct MemberTable {
    own: u32,
    entries: BTreeMap<u32, Entry>,
    revision: u64,
}

impl MemberTable {
    /// A table that knows only this node.
    pub fn new(own: &GossipId) -> Self {
        let mut table = MemberTable {
            own: own.number,
            entries: BTreeMap::new(),
            revision: 0,
        };
        table.alive(own);
        table
    }

    /// Changes with every change of what [`MemberTable::records`] returns.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Takes in what somebody has heard of a node. What we know of it at first hand is not touched.
    pub fn heard(&mut self, record: MemberRecord) {
        if record.number == 0 || record.number == self.own {
            return;
        }
        let room = self.entries.len() < MAX_MEMBERS;
        match self.entries.get_mut(&record.number) {
            Some(entry) if entry.generation == 0 && entry.record.addr.is_none() && record.addr.is_some() => {
                entry.record = record;
            }
            Some(_) => return,
            None if room => {
                let entry = Entry {
                    record,
                    generation: 0,
                    status: NodeStatus::Down,
                    load: None,
                    pending: VecDeque::new(),
                };
                self.entries.insert(entry.record.number, entry);
            }
            None => return,
        }
        self.revision += 1;
    }

    /// A node is up. Returns whether it is another life of it than the one we knew.
    pub fn alive(&mut self, id: &GossipId) -> bool {
        if self.entries.len() >= MAX_MEMBERS && !self.entries.contains_key(&id.number) {
            return false;
        }
        let record = MemberRecord {
            number: id.number,
            name: id.name.clone(),
            host: id.host.clone(),
            addr: Some(id.addr),
        };
        let entry = self.entries.entry(id.number).or_insert_with(|| Entry {
            record: record.clone(),
            generation: 0,
            status: NodeStatus::Down,
            load: None,
            pending: VecDeque::new(),
        });
        if id.generation < entry.generation {
            return false;
        }
        let another = id.generation > entry.generation;
        if another {
            entry.generation = id.generation;
            entry.load = None;
        }
        entry.status = NodeStatus::Alive;
        if entry.record != record || another {
            entry.record = record;
            self.revision += 1;
        }
        another
    }

    /// A node did not answer; `generation` says which life of it.
    pub fn suspect(&mut self, number: u32, generation: u64) {
        self.set(number, generation, NodeStatus::Suspect);
    }

    /// A node is down; `generation` says which life of it.
    pub fn down(&mut self, number: u32, generation: u64) {
        self.set(number, generation, NodeStatus::Down);
    }

    fn set(&mut self, number: u32, generation: u64, status: NodeStatus) {
        if number == self.own {
            return;
        }
        if let Some(entry) = self
            .entries
            .get_mut(&number)
            .filter(|e| e.generation <= generation)
        {
            entry.status = status;
        }
    }

    /// Takes in a load report. An older one than what is known is ignored.
    pub fn load(&mut self, report: &LoadReport, now: Instant) {
        let Some(measured) = now.checked_sub(Duration::from_millis(report.age_ms.into())) else {
            return;
        };
        if let Some(entry) = self.entries.get_mut(&report.number)
            && entry.load.as_ref().is_none_or(|(_, known)| *known < measured)
        {
            entry.load = Some((report.load, measured));
        }
    }

    /// Something was placed on a node.
    pub fn placed(&mut self, number: u32, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&number)
            && entry.pending.len() < MAX_PENDING
        {
            entry.pending.push_back(now);
        }
    }

    /// The loads that are known, for passing them on; this node's own is the first.
    pub fn reports(&self, now: Instant) -> Vec<LoadReport> {
        let report = |(number, entry): (&u32, &Entry)| {
            let (load, measured) = entry.load?;
            let age_ms = now.duration_since(measured).as_millis().min(u32::MAX.into()) as u32;
            Some(LoadReport {
                number: *number,
                age_ms,
                load,
            })
        };
        let own = self.entries.get_key_value(&self.own).and_then(report);
        own.into_iter()
            .chain(
                self.entries
                    .iter()
                    .filter(|(n, _)| **n != self.own)
                    .filter_map(report),
            )
            .collect()
    }

    /// What [`crate::placement`] wants to know, in the order of the numbers.
    pub fn states(&mut self, now: Instant) -> Vec<NodeState> {
        let own = self.own;
        let state = |(number, entry): (&u32, &mut Entry)| {
            entry.pending.retain(|at| now.duration_since(*at) < PENDING);
            NodeState {
                number: *number,
                name: entry.record.name.clone(),
                host: entry.record.host.clone(),
                addr: entry.record.addr,
                is_self: *number == own,
                status: entry.status,
                load: entry.load.map(|(load, _)| load),
                load_age_ms: entry
                    .load
                    .map(|(_, at)| now.duration_since(at).as_millis() as u64),
                pending: entry.pending.len() as u32,
            }
        };
        self.entries.iter_mut().map(state).collect()
    }

    /// What is worth remembering of the nodes.
    pub fn records(&self) -> Vec<MemberRecord> {
        self.entries.values().map(|e| e.record.clone()).collect()
    }

    /// One node, and whether it is up.
    pub fn get(&self, number: u32) -> Option<(&MemberRecord, NodeStatus)> {
        self.entries.get(&number).map(|e| (&e.record, e.status))
    }

    /// The other nodes of which `status` is true.
    pub fn others(&self, status: impl Fn(NodeStatus) -> bool) -> Vec<MemberRecord> {
        let others = self
            .entries
            .iter()
            .filter(|(n, e)| **n != self.own && status(e.status));
        others.map(|(_, e)| e.record.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u32, generation: u64) -> GossipId {
        let addr = format!("10.0.0.{number}:{generation}").parse().unwrap();
        GossipId {
            number,
            generation,
            addr,
            name: format!("n{number}"),
            host: String::new(),
        }
    }

    fn record(number: u32, addr: Option<&str>) -> MemberRecord {
        let addr = addr.map(|a| a.parse().unwrap());
        MemberRecord {
            number,
            name: format!("old{number}"),
            host: String::new(),
            addr,
        }
    }

    fn status(table: &mut MemberTable, number: u32) -> NodeStatus {
        table.get(number).unwrap().1
    }

    #[test]
    fn hearsay_does_not_overrule_what_was_seen() {
        let mut table = MemberTable::new(&id(1, 5));
        table.heard(record(2, None));
        table.heard(record(2, Some("10.0.0.9:9")));
        table.heard(record(2, Some("10.0.0.8:8")));
        assert_eq!(table.get(2).unwrap().0.addr, Some("10.0.0.9:9".parse().unwrap()));
        assert_eq!(status(&mut table, 2), NodeStatus::Down);
        assert!(table.alive(&id(2, 7)));
        let revision = table.revision();
        table.heard(record(2, Some("10.0.0.8:8")));
        table.heard(record(1, Some("10.0.0.8:8")));
        assert_eq!(table.revision(), revision);
        assert_eq!(table.get(2).unwrap().0.name, "n2");
    }

    #[test]
    fn lives_are_told_apart() {
        let mut table = MemberTable::new(&id(1, 5));
        assert!(table.alive(&id(2, 7)));
        assert!(!table.alive(&id(2, 7)));
        assert!(table.alive(&id(2, 8)));
        table.down(2, 7);
        assert_eq!(status(&mut table, 2), NodeStatus::Alive);
        assert!(!table.alive(&id(2, 7)));
        assert_eq!(table.get(2).unwrap().0.addr, Some(id(2, 8).addr));
        table.suspect(2, 8);
        assert_eq!(status(&mut table, 2), NodeStatus::Suspect);
        table.down(2, 8);
        assert_eq!(status(&mut table, 2), NodeStatus::Down);
        table.down(1, 99);
        assert_eq!(status(&mut table, 1), NodeStatus::Alive);
    }

    #[test]
    fn the_freshest_load_counts() {
        let start = Instant::now() + Duration::from_secs(100);
        let mut table = MemberTable::new(&id(1, 5));
        table.alive(&id(2, 7));
        let load = |guests| LoadVector {
            cores: 1,
            runnable_milli: 0,
            speed: 1000,
            memory_total_bytes: 0,
            memory_free_bytes: 0,
            guests,
            admits: true,
        };
        let report = |number, age_ms, guests| LoadReport {
            number,
            age_ms,
            load: load(guests),
        };
        table.load(&report(2, 100, 1), start);
        table.load(&report(2, 200, 2), start);
        table.load(&report(9, 0, 9), start);
        table.load(&report(2, u32::MAX, 9), start);
        let later = start + Duration::from_millis(50);
        let state = table.states(later).remove(1);
        assert_eq!((state.load.unwrap().guests, state.load_age_ms), (1, Some(150)));
        table.load(&report(1, 0, 3), later);
        let reports = table.reports(later);
        assert_eq!(
            reports.iter().map(|r| (r.number, r.age_ms)).collect::<Vec<_>>(),
            [(1, 0), (2, 150)]
        );
        // another life has another load
        table.alive(&id(2, 8));
        assert_eq!(table.states(later)[1].load, None);
    }

    #[test]
    fn placements_count_until_the_load_shows_them() {
        let start = Instant::now();
        let mut table = MemberTable::new(&id(1, 5));
        table.alive(&id(2, 7));
        table.placed(2, start);
        table.placed(2, start + Duration::from_secs(1));
        assert_eq!(table.states(start + Duration::from_secs(1))[1].pending, 2);
        assert_eq!(table.states(start + Duration::from_secs(2))[1].pending, 1);
        assert_eq!(table.states(start + Duration::from_secs(9))[1].pending, 0);
    }
}
