//! The node: daemon, supervisor, placement, and what the programs `mosrun`, `mosd` and `mosctl` are made of.

pub mod cli;
pub mod cluster;
pub mod codec;
pub mod control;
pub mod daemon;
pub mod job_id;
pub mod jobs;
pub mod lab;
pub mod launcher;
pub mod pagestore;
pub mod placement;
pub mod rundir;
pub mod supervisor;
