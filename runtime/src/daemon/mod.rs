//! `mosd`: the node's part in its cluster.
//!
//! One process with a few tasks: [`serve`] answers other nodes, [`control`] the programs of this machine, [`membership`]
//! runs the gossip protocol, [`upkeep`] measures and tells the load. What a job needs for running is not here: its data
//! goes between its deputy and its supervisors, so that a daemon that restarts hurts no job.

pub mod config;
pub mod control;
pub mod frames;
pub mod hosted;
mod join;
pub mod logging;
pub mod membership;
pub mod node;
pub mod peers;
pub mod serve;
pub mod spawner;
pub mod start;
pub mod supervise;
pub mod upkeep;
