//! Everything that reaches into another process or the raw kernel ABI; the one crate with unsafe code.

pub mod cage;
pub mod capture;
pub mod clone_rewrite;
pub mod confine;
pub mod faults;
pub mod fd;
pub mod filter;
pub mod lab;
pub mod memory;
pub mod notify;
pub mod peer;
pub mod postcopy;
pub mod privileges;
pub mod probe;
pub mod process;
pub mod ptrace;
pub mod remote_call;
pub mod restore;
pub mod shared_memory;
pub mod signal;
pub mod startup;
pub mod timed;
pub mod track;
pub mod userfault;
pub mod vdso;
pub mod vessel;
pub mod xstate;

#[cfg(test)]
fn test_image() -> linklayer::image::ProcessImage {
    linklayer::image::ProcessImage {
        pid: 1,
        areas: Vec::new(),
        mm: Default::default(),
        auxv: Vec::new(),
        threads: Vec::new(),
        actions: Vec::new(),
        pending: Vec::new(),
        rlimits: Vec::new(),
        personality: 0,
        dumpable: 1,
        xstate_layout: Vec::new(),
        vdso: Vec::new(),
    }
}
