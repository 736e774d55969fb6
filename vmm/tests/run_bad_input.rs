//! What `fealty run` says to a configuration that can't be a machine: one line that names what is wrong, before anything starts.

mod common;

use common::{Program, configuration, fealty, guest};
use serde_json::{Value, json};
use std::path::Path;

fn good() -> Value {
    json!({
        "cpus": { "boot_vcpus": 1 },
        "memory": { "size": 64u64 << 20 },
        "payload": { "kernel": guest(), "cmdline": "console=ttyS0 fealty.do=hello,poweroff" },
    })
}

/// Runs `config` in `folder`; it must end with `code` and one line that holds `words`, and start no guest.
#[track_caller]
fn refused(folder: &Path, config: &Value, code: i32, words: &str) {
    let path = folder.join("plain.json");
    std::fs::write(&path, config.to_string()).expect("written");
    let path = path.display().to_string();
    let ended = Program::start(&mut fealty(&["run", "--unprotected", &path])).end().code(code);
    assert!(ended.why().contains(words), "{words:?} is not in: {}", ended.why());
    assert_eq!(ended.out, "", "the guest ran");
    assert!(!ended.err.contains("runs"), "{}", ended.err);
}

#[test]
fn processors_memory_and_disks_have_bounds() {
    let folder = tempfile::tempdir().expect("folder");
    let with = |path: &[&str], value: Value| {
        let mut config = good();
        let place = path.iter().fold(&mut config, |at, name| &mut at[*name]);
        *place = value;
        config
    };
    let refused = |config, code, words| refused(folder.path(), &config, code, words);
    refused(with(&["cpus", "boot_vcpus"], json!(0)), 3, "boot_vcpus is 0");
    refused(with(&["cpus", "boot_vcpus"], json!(17)), 3, "boot_vcpus is 17");
    refused(with(&["cpus", "baseline"], json!("x86-64-v9")), 3, "x86-64-v9");
    refused(with(&["memory", "size"], json!(1)), 3, "memory size 1 ");
    refused(with(&["memory", "size"], json!(1u64 << 40)), 13, "but this host has");
    refused(
        with(&["memory"], json!({"size": 1u64 << 30, "hugepage_size": 4096, "hugepages": true})),
        3,
        "hugepage_size",
    );
    let disk = json!({ "id": "root", "path": "root.img" });
    refused(with(&["disks"], json!([disk, disk])), 3, "two disks are called root");
    refused(with(&["disks"], json!([disk])), 3, "root.img");
    refused(with(&["gpus"], json!([])), 3, "gpus");
    refused(with(&["payload", "cmdline"], json!("x".repeat(2048))), 3, "command line");
}

#[test]
fn kernels_and_initrds_must_be_some_and_fit() {
    let folder = tempfile::tempdir().expect("folder");
    let with = |kernel: &str, initramfs: Option<&str>| {
        let mut config = good();
        config["payload"]["kernel"] = json!(kernel);
        config["payload"]["initramfs"] = json!(initramfs);
        config
    };
    let refused = |config, words| refused(folder.path(), &config, 3, words);
    let write = |name: &str, at: usize, bytes: &[u8]| {
        let mut file = vec![0; 64 << 10];
        file[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(folder.path().join(name), file).expect("written");
    };
    refused(with("missing", None), "missing");
    write("zeros", 0, &[]);
    refused(with("zeros", None), "neither a bzImage nor");
    // A bzImage of protocol 2.00; one without a 64-bit entry; one whose file ends where its code begins.
    let header = |version: u16, flags: u8, long: u16| {
        let mut bytes = vec![0; 0x80];
        bytes[1] = 0x66;
        bytes[2..6].copy_from_slice(b"HdrS");
        bytes[6..8].copy_from_slice(&version.to_le_bytes());
        bytes[0x11] = flags;
        bytes[0x36..0x38].copy_from_slice(&long.to_le_bytes());
        bytes
    };
    write("old", 0x200, &header(0x200, 1, 1));
    refused(with("old", None), "older than 2.12");
    write("short", 0x200, &header(0x20f, 1, 0));
    refused(with("short", None), "64-bit entry");

    let kernel = guest().display().to_string();
    refused(with(&kernel, Some("missing")), "missing");
    let huge = std::fs::File::create(folder.path().join("huge")).expect("a file");
    huge.set_len(100 << 20).expect("a sparse file");
    refused(with(&kernel, Some("huge")), "initrd does not fit");
}

#[test]
fn a_baseline_is_all_there_or_the_line_says_what_is_missing() {
    let folder = tempfile::tempdir().expect("folder");
    let run = |change: &dyn Fn(&mut Value)| {
        let path = configuration(folder.path(), "hello,poweroff", json!([]));
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
        change(&mut config);
        std::fs::write(&path, config.to_string()).expect("written");
        Program::start(&mut fealty(&["run", "--unprotected", &path.display().to_string()])).end()
    };
    let huge = run(&|config| config["memory"]["thp"] = json!(true)).code(0);
    assert!(huge.out.contains("hello"), "{}", huge.out);
    let ended = run(&|config| config["cpus"]["baseline"] = json!("x86-64-v2"));
    // A KVM without hardware virtualization may offer less than its processor has.
    if ended.code == Some(0) {
        assert!(ended.out.contains("hello"), "{}", ended.out);
    } else {
        let why = ended.code(13).why().to_owned();
        assert!(why.contains("lacks ") && why.contains("the CPU baseline x86-64-v2"), "{why}");
    }
}

#[test]
fn a_tpm_that_can_not_be_named_so_is_told_in_one_line_before_anything_starts() {
    for tcti in ["swtpm:path=/run/tpm.sock", "swtpm:host=127.0.0.1", "tabrmd", "device:tpm0"] {
        for words in [&["run", "a.vm"][..], &["attest", "a.vm", "--dry-run"]] {
            let ended = Program::start(&mut fealty(&[words, &["--tcti", tcti]].concat())).end().code(2);
            assert_eq!(ended.err.lines().count(), 1, "{}", ended.err);
            assert!(ended.err.starts_with("fealty: invalid value") && ended.err.contains("--tcti"), "{}", ended.err);
            let ended = Program::start(&mut fealty(&[words, &["--json", "--tcti", tcti]].concat())).end().code(2);
            let said: Value = serde_json::from_str(&ended.err).expect("one JSON object");
            assert_eq!((&said["event"], &said["exit"]), (&json!("error"), &json!(2)));
        }
    }
    for command in ["run", "attest"] {
        let help = Program::start(&mut fealty(&[command, "--help"])).end().code(0).out;
        assert!(help.contains("swtpm:host=HOST,port=PORT") && !help.contains("swtpm:path"), "{help}");
    }
}
