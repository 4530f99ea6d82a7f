//! mosctl
fn main() {}
