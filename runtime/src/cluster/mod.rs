//! The cluster: who is in it, who is up, and how loaded each node is.

pub mod state;
