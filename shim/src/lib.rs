//! shim
pub mod lab;

pub mod ptrace;
