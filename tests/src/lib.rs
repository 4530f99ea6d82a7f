//! What the tests of the whole product share: a [`lab`], guests and our programs from [`build`], and a way to run a
//! program natively and by mosrun and to find what differs ([`compare`]). What cannot run somewhere is a typed
//! [`skip`](skip::Skip).
//!
//! `tests/setup.sh` installs the programs that the tests run.

pub mod build;
pub mod compare;
pub mod faults;
pub mod lab;
pub mod mover;
pub mod running;
pub mod skip;
pub mod terminal;
pub mod vm;
