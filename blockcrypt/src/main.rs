//! fealty-disk: being written by helper `disktool` (main.rs and disk_tool/*); the engine helper leaves it.
fn main() {}
