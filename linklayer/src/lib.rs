//! linklayer

pub mod image;
pub mod stay;
pub mod wire;
