//! The node: daemon, supervisor, placement, and what the programs `mosrun`, `mosd` and `mosctl` are made of.

pub mod codec;
pub mod job_id;
pub mod jobs;
pub mod lab;
pub mod rundir;
pub mod supervisor;
