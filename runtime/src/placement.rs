//! Where a program should run: a pure function over node states.
//!
//! Nothing here talks to anybody. [`place`] turns a wish and what is known of the nodes into a list of places to try, in
//! order; the caller takes the first that answers. Home is always the last resort of a wish for the best node, and never
//! one of a wish for a named node.

use std::fmt;
use std::str::FromStr;

use crate::cluster::state::{NodeState, NodeStatus};

/// Home wins unless another node promises to be this much faster (a factor): being away costs something per call.
const HOME_ADVANTAGE: f64 = 1.1;
/// A node with less free memory than this is no candidate for the best node, in bytes.
const MIN_FREE_MEMORY_BYTES: u64 = 64 << 20;
/// Load older than this says nothing about a node, in milliseconds.
const MAX_LOAD_AGE_MS: u64 = 15_000;
/// Most node numbers that a list may name.
const MAX_LIST: usize = 65_536;

/// A node as a person names it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum NodeRef {
    /// By its number; 0 is home.
    Number(u32),
    /// By its name in the cluster, its host name, or its address.
    Name(String),
}

impl FromStr for NodeRef {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.parse() {
            Ok(number) => NodeRef::Number(number),
            Err(_) => NodeRef::Name(text.to_string()),
        })
    }
}

impl fmt::Display for NodeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NodeRef::Number(n) => write!(f, "{n}"),
            NodeRef::Name(name) => f.write_str(name),
        }
    }
}

/// Node numbers from a text such as `1-3,5`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeList(pub Vec<u32>);

/// The text is no list of nodes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NodeListError {
    /// A part is neither a number nor a range.
    #[error("{0:?} is neither a node number nor a range such as 2-5")]
    Part(String),
    /// A range ends before it begins.
    #[error("the range {0} ends before it begins")]
    Backwards(String),
    /// The list names too many nodes.
    #[error("the list names more than {MAX_LIST} nodes")]
    TooLong,
}

impl FromStr for NodeList {
    type Err = NodeListError;

    fn from_str(text: &str) -> Result<Self, NodeListError> {
        let mut nodes = Vec::new();
        for part in text.split(',') {
            let bad = || NodeListError::Part(part.to_string());
            let number = |s: &str| s.parse::<u32>().map_err(|_| bad());
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if last < first {
                return Err(NodeListError::Backwards(part.to_string()));
            }
            if (last - first) as usize >= MAX_LIST || nodes.len() + (last - first) as usize >= MAX_LIST {
                return Err(NodeListError::TooLong);
            }
            nodes.extend(first..=last);
        }
        nodes.sort_unstable();
        nodes.dedup();
        Ok(NodeList(nodes))
    }
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Want {
    /// The least loaded node that answers, home included.
    Best,
    /// The node where it was started.
    Home,
    /// This one and no other.
    Node(NodeRef),
    /// One of these, at random.
    Drawn(NodeList),
}

/// A place to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// Here.
    Home,
    /// The node of this number.
    Node(u32),
}

/// There is no place.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PlaceError {
    /// No such node.
    #[error("there is no node {wanted} in this cluster (known: {known})")]
    Unknown {
        /// As it was asked for.
        wanted: String,
        /// The nodes there are.
        known: String,
    },
    /// Several nodes have that host name or address.
    #[error("{wanted} could be any of the nodes {candidates}: use a number")]
    Ambiguous {
        /// As it was asked for.
        wanted: String,
        /// Their numbers.
        candidates: String,
    },
    /// The node is known, and does not answer.
    #[error("node {number} ({name}) is {status}")]
    Down {
        /// Its number.
        number: u32,
        /// Its name.
        name: String,
        /// What is known of it.
        status: NodeStatus,
    },
    /// None of the listed nodes answers.
    #[error("none of the nodes {0} is up")]
    NoneUp(String),
    /// This machine is in no cluster, or its daemon does not run.
    #[error(
        "no other node is known here: is mosd running, and is this machine in a cluster (`mosctl status`)?"
    )]
    NoCluster,
}

/// The places to try for `want`, the first one first. `nodes` is what the home node knows (itself included; empty when
/// there is no daemon), `draw` the randomness for [`Want::Drawn`].
///
/// # Errors
/// See [`PlaceError`]. [`Want::Best`] and [`Want::Home`] never fail.
pub fn place(want: &Want, nodes: &[NodeState], draw: u64) -> Result<Vec<Place>, PlaceError> {
    match want {
        Want::Home => Ok(vec![Place::Home]),
        Want::Best => Ok(best(nodes)),
        Want::Node(wanted) => {
            if *wanted == NodeRef::Number(0) {
                return Ok(vec![Place::Home]);
            }
            let node = find(wanted, nodes)?;
            if node.is_self {
                return Ok(vec![Place::Home]);
            }
            if node.status == NodeStatus::Down {
                let (number, name, status) = (node.number, node.name.clone(), node.status);
                return Err(PlaceError::Down { number, name, status });
            }
            Ok(vec![Place::Node(node.number)])
        }
        Want::Drawn(list) => drawn(list, nodes, draw),
    }
}

/// Finds the node that a person means: by number, else by name, else by host name, else by address.
///
/// # Errors
/// [`PlaceError::Unknown`], [`PlaceError::Ambiguous`], [`PlaceError::NoCluster`].
pub fn find<'a>(wanted: &NodeRef, nodes: &'a [NodeState]) -> Result<&'a NodeState, PlaceError> {
    if nodes.is_empty() {
        return Err(PlaceError::NoCluster);
    }
    type Matches = dyn Fn(&NodeState, &str) -> bool;
    let by: [&Matches; 3] = [
        &|node, text| node.name == text,
        &|node, text| node.host == text,
        &|node, text| {
            node.addr.is_some_and(|a| {
                a.to_string() == text || text.parse().is_ok_and(|ip: std::net::IpAddr| a.ip() == ip)
            })
        },
    ];
    let found = match wanted {
        NodeRef::Number(number) => nodes.iter().filter(|n| n.number == *number).collect(),
        NodeRef::Name(text) => by
            .iter()
            .map(|matches| nodes.iter().filter(|n| matches(n, text)).collect::<Vec<_>>())
            .find(|found| !found.is_empty())
            .unwrap_or_default(),
    };
    match found.as_slice() {
        [one] => Ok(one),
        [] => Err(PlaceError::Unknown {
            wanted: wanted.to_string(),
            known: join(nodes.iter().map(|n| format!("{} {}", n.number, n.name))),
        }),
        several => Err(PlaceError::Ambiguous {
            wanted: wanted.to_string(),
            candidates: join(several.iter().map(|n| n.number.to_string())),
        }),
    }
}

fn join(parts: impl Iterator<Item = String>) -> String {
    parts.collect::<Vec<_>>().join(", ")
}

/// Nodes for a process that is to leave where it is (`now`; 0 for home), the best first. Home is none of them.
pub fn elsewhere(nodes: &[NodeState], now: u32) -> Vec<u32> {
    let ranked = ranked(nodes, f64::INFINITY);
    ranked.into_iter().filter(|number| *number != now).collect()
}

fn best(nodes: &[NodeState]) -> Vec<Place> {
    let home = nodes.iter().find(|n| n.is_self);
    let home_cost = match home {
        Some(home) => match cost(home) {
            Some(cost) => cost / HOME_ADVANTAGE,
            // we know nothing of our own load: then there is nothing to compare with
            None => return vec![Place::Home],
        },
        None => return vec![Place::Home],
    };
    ranked(nodes, home_cost)
        .into_iter()
        .map(Place::Node)
        .chain([Place::Home])
        .collect()
}

/// The other nodes that take a program and are cheaper than that, the cheapest first.
fn ranked(nodes: &[NodeState], most: f64) -> Vec<u32> {
    let mut away: Vec<(f64, &NodeState)> = nodes
        .iter()
        .filter(|n| !n.is_self && n.status == NodeStatus::Alive)
        .filter(|n| n.load_age_ms.is_some_and(|age| age <= MAX_LOAD_AGE_MS))
        .filter(|n| {
            n.load
                .as_ref()
                .is_some_and(|l| l.memory_free_bytes >= MIN_FREE_MEMORY_BYTES && l.admits)
        })
        .filter_map(|n| cost(n).map(|c| (c, n)))
        .filter(|(c, _)| *c < most)
        .collect();
    away.sort_by(|(a, x), (b, y)| {
        let spare = |n: &NodeState| {
            n.load
                .as_ref()
                .map_or(f64::INFINITY, |l| crowding(l.runnable(), n))
        };
        a.total_cmp(b)
            .then_with(|| spare(x).total_cmp(&spare(y)))
            .then_with(|| x.number.cmp(&y.number))
    });
    away.iter().map(|(_, n)| n.number).collect()
}

/// How long a program of one thread that would take one second on an idle reference core takes on this node, in seconds.
fn cost(node: &NodeState) -> Option<f64> {
    let load = node.load.as_ref()?;
    let speed = f64::from(load.speed.max(1)) / 1000.0;
    Some(crowding(load.runnable() + 1.0, node).max(1.0) / speed)
}

/// Tasks per core, what was placed there lately and is not yet in its load counted in.
fn crowding(runnable: f64, node: &NodeState) -> f64 {
    let cores = node.load.as_ref().map_or(1, |l| l.cores.max(1));
    (runnable + f64::from(node.pending)) / f64::from(cores)
}

fn drawn(list: &NodeList, nodes: &[NodeState], draw: u64) -> Result<Vec<Place>, PlaceError> {
    let mut up = Vec::new();
    for number in &list.0 {
        if *number == 0 {
            up.push(Place::Home);
            continue;
        }
        // a range may name more than there is; a number alone that does not exist shows as such when nothing is left
        let Ok(node) = find(&NodeRef::Number(*number), nodes) else {
            continue;
        };
        match node.status {
            _ if node.is_self => up.push(Place::Home),
            NodeStatus::Alive | NodeStatus::Suspect => up.push(Place::Node(*number)),
            NodeStatus::Down => {}
        }
    }
    if up.is_empty() {
        return Err(if nodes.is_empty() {
            PlaceError::NoCluster
        } else {
            PlaceError::NoneUp(join(list.0.iter().map(u32::to_string)))
        });
    }
    let first = (draw % up.len() as u64) as usize;
    up.rotate_left(first);
    Ok(up)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::state::LoadVector;

    fn node(number: u32, cores: u32, runnable: f64, speed: u32) -> NodeState {
        NodeState {
            number,
            name: format!("n{number}"),
            host: format!("host{number}"),
            addr: Some(format!("10.0.0.{number}:7117").parse().unwrap()),
            is_self: number == 1,
            status: NodeStatus::Alive,
            load: Some(LoadVector {
                cores,
                runnable_milli: (runnable * 1000.0) as u32,
                speed,
                memory_total_bytes: 8 << 30,
                memory_free_bytes: 4 << 30,
                guests: 0,
                admits: true,
            }),
            load_age_ms: Some(100),
            pending: 0,
        }
    }

    fn first(want: Want, nodes: &[NodeState]) -> Place {
        place(&want, nodes, 0).unwrap()[0]
    }

    #[test]
    fn the_best_is_the_least_loaded_and_home_breaks_ties() {
        let idle = [
            node(1, 2, 0.0, 1000),
            node(2, 2, 0.0, 1000),
            node(3, 2, 0.0, 1050),
        ];
        assert_eq!(first(Want::Best, &idle), Place::Home);
        let busy = [
            node(1, 2, 4.0, 1000),
            node(2, 2, 1.5, 1000),
            node(3, 2, 3.0, 1000),
        ];
        let places = place(&Want::Best, &busy, 0).unwrap();
        assert_eq!(places, [Place::Node(2), Place::Node(3), Place::Home]);
        let fast = [
            node(1, 2, 0.0, 1000),
            node(2, 2, 0.0, 2000),
            node(3, 8, 0.0, 1000),
        ];
        assert_eq!(first(Want::Best, &fast), Place::Node(2));
        let equal = [
            node(1, 2, 4.0, 1000),
            node(2, 8, 6.0, 1000),
            node(3, 8, 1.0, 1000),
        ];
        assert_eq!(first(Want::Best, &equal), Place::Node(3));
    }

    #[test]
    fn what_does_not_count_for_the_best() {
        let mut nodes = vec![node(1, 2, 8.0, 1000), node(2, 2, 0.0, 1000)];
        let tries: [&dyn Fn(&mut NodeState); 6] = [
            &|n| n.status = NodeStatus::Suspect,
            &|n| n.status = NodeStatus::Down,
            &|n| n.load_age_ms = Some(60_000),
            &|n| n.load = None,
            &|n| n.load.as_mut().unwrap().memory_free_bytes = 1 << 20,
            &|n| n.load.as_mut().unwrap().admits = false,
        ];
        assert_eq!(first(Want::Best, &nodes), Place::Node(2));
        for spoil in tries {
            let kept = nodes[1].clone();
            spoil(&mut nodes[1]);
            assert_eq!(place(&Want::Best, &nodes, 0).unwrap(), [Place::Home]);
            nodes[1] = kept;
        }
        nodes[1].pending = 10;
        assert_eq!(first(Want::Best, &nodes), Place::Home);
        assert_eq!(place(&Want::Best, &[], 0).unwrap(), [Place::Home]);
    }

    #[test]
    fn a_node_by_any_of_its_names() {
        let mut nodes = [
            node(1, 1, 0.0, 1000),
            node(2, 1, 0.0, 1000),
            node(3, 1, 0.0, 1000),
        ];
        for text in ["2", "n2", "host2", "10.0.0.2", "10.0.0.2:7117"] {
            assert_eq!(
                first(Want::Node(text.parse().unwrap()), &nodes),
                Place::Node(2),
                "{text}"
            );
        }
        for text in ["0", "1", "n1"] {
            assert_eq!(
                first(Want::Node(text.parse().unwrap()), &nodes),
                Place::Home,
                "{text}"
            );
        }
        let unknown = place(&Want::Node("nine".parse().unwrap()), &nodes, 0).unwrap_err();
        assert_eq!(
            unknown.to_string(),
            "there is no node nine in this cluster (known: 1 n1, 2 n2, 3 n3)"
        );
        nodes[2].host = "host2".into();
        let ambiguous = place(&Want::Node("host2".parse().unwrap()), &nodes, 0).unwrap_err();
        assert!(matches!(ambiguous, PlaceError::Ambiguous { candidates, .. } if candidates == "2, 3"));
        nodes[1].status = NodeStatus::Down;
        let down = place(&Want::Node(NodeRef::Number(2)), &nodes, 0).unwrap_err();
        assert_eq!(down.to_string(), "node 2 (n2) is down");
        assert_eq!(
            place(&Want::Node(NodeRef::Number(2)), &[], 0),
            Err(PlaceError::NoCluster)
        );
        nodes[1].status = NodeStatus::Suspect;
        assert_eq!(first(Want::Node(NodeRef::Number(2)), &nodes), Place::Node(2));
    }

    #[test]
    fn drawing_from_a_list() {
        let mut nodes: Vec<_> = (1..=5).map(|n| node(n, 1, 0.0, 1000)).collect();
        nodes[2].status = NodeStatus::Down;
        let list = Want::Drawn("2-3,5,5".parse().unwrap());
        assert_eq!(place(&list, &nodes, 0).unwrap(), [Place::Node(2), Place::Node(5)]);
        assert_eq!(place(&list, &nodes, 7).unwrap(), [Place::Node(5), Place::Node(2)]);
        assert_eq!(
            place(&Want::Drawn("1".parse().unwrap()), &nodes, 3).unwrap(),
            [Place::Home]
        );
        let none = place(&Want::Drawn("3,9".parse().unwrap()), &nodes, 0).unwrap_err();
        assert_eq!(none.to_string(), "none of the nodes 3, 9 is up");
    }

    #[test]
    fn lists() {
        assert_eq!("1-3,5".parse::<NodeList>().unwrap().0, [1, 2, 3, 5]);
        assert_eq!("7,7,2".parse::<NodeList>().unwrap().0, [2, 7]);
        for bad in [
            "",
            "1,",
            "a",
            "1-",
            "-1",
            "3-1",
            "1-4000000000",
            "0-65535,7",
            "1--2",
        ] {
            assert!(bad.parse::<NodeList>().is_err(), "{bad}");
        }
    }
}
