//! Everything that reaches into another process or the raw kernel ABI; the one crate with unsafe code.

pub mod areas;
pub mod arena;
pub mod cage;
pub mod capture;
pub mod entry;
pub mod fd;
pub mod filter;
pub mod inject;
pub mod lab;
pub mod limits;
pub mod memory;
pub mod notify;
pub mod process;
pub mod ptrace;
pub mod signal;
pub mod startup;
pub mod vessel;
