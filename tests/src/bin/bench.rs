//! `bench start|attest|queue [--json] [--rounds N]`: see `fealty_tests::bench`; `scripts/bench` builds and runs it.

use clap::Parser;
use fealty_tests::bench::{Arguments, run};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
