//! The cluster: who is in it, who is up, and how loaded each node is.

pub mod authority;
pub mod invites;
pub mod names;
pub mod state;
pub mod store;
pub mod token;
