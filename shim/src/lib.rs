//! shim
pub mod lab;
