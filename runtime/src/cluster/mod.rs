//! The cluster: who is in it, who is up, and how loaded each node is.

pub mod authority;
pub mod gossip;
pub mod invites;
pub mod join;
pub mod load;
pub mod members;
pub mod names;
pub mod protocol;
pub mod state;
pub mod store;
pub mod tls;
pub mod token;
