//! linklayer
