//! `fealty-disk`.
fn main() {}
