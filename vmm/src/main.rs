//! `fealty`: see `fealty --help` and the library.

fn main() -> std::process::ExitCode {
    fealty_vmm::cli::main()
}
