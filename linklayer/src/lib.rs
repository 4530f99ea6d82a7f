//! linklayer

pub mod image;
pub mod memory;
pub mod stay;
pub mod wire;
