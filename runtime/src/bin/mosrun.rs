//! mosrun
fn main() {}
