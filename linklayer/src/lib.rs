//! linklayer

pub mod choice;
pub mod cpu;
pub mod frame;
pub mod image;
pub mod memory;
pub mod pages;
pub mod postcopy;
pub mod quic;
pub mod session;
pub mod stay;
pub mod syscall;
pub mod wire;
