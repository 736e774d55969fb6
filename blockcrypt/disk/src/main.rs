//! `fealty-disk`: makes, fills, empties, describes and verifies volumes. See `disk_tool`.

mod disk_tool;

fn main() -> std::process::ExitCode {
    disk_tool::main()
}
