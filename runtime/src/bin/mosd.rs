//! mosd
fn main() {}
