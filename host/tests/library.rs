//! What the program and the libraries under it bind to.

use std::process::Command;

/// The dynamic linker says where each library finds its functions (ld.so(8)).
#[test]
fn libtss2_gets_its_openssl_contexts_from_this_program() {
    let program = env!("CARGO_BIN_EXE_fealty-host");
    let mut command = Command::new(program);
    let output = command.arg("--version").env("LD_BIND_NOW", "1").env("LD_DEBUG", "bindings").output().expect("runs");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    let bound: Vec<&str> = told
        .lines()
        .filter(|line| line.contains("symbol `OSSL_LIB_CTX_new'") && line.contains("libtss2-esys"))
        .filter_map(|line| line.split(" to ").nth(1))
        .collect();
    assert!(!bound.is_empty() && bound.iter().all(|to| to.contains("fealty-host")), "{bound:?}");
}
