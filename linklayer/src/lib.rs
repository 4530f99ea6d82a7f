//! linklayer

pub mod image;
