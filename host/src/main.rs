//! `fealty-host`: see the library.
#![allow(unsafe_code)]

mod openssl;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    // SAFETY: this is the program's first statement; no other thread exists yet.
    unsafe { attest_tpm::silence_library() };
    fealty_host::cli::run(fealty_host::cli::Cli::parse())
}
