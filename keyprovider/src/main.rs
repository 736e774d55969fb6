//! `fealty-keys`: the customer's key provider and tool.

fn main() -> std::process::ExitCode {
    fealty_keyprovider::cli::main()
}
