//! `mosd`: the node's part in its cluster.

pub mod config;
