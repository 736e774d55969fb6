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
    let free = std::fs::read_to_string("/proc/meminfo").expect("read");
    if free.lines().any(|line| line.split_whitespace().eq(["HugePages_Free:", "0"])) {
        refused(with(&["memory", "hugepages"], json!(true)), 13, "raise vm.nr_hugepages");
    }
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
fn what_is_no_file_is_no_kernel_and_no_disk_and_hangs_nobody() {
    let folder = tempfile::tempdir().expect("folder");
    let fifo = folder.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).expect("a FIFO");
    let refused = |part: &str, value: Value, words: &str| {
        let mut config = good();
        config[part] = value;
        refused(folder.path(), &config, 3, words);
    };
    let kernel = |path: &str, initramfs: Option<&str>| json!({ "kernel": path, "initramfs": initramfs });
    let elf = guest().display().to_string();
    for none in ["fifo", ".", "/dev/null"] {
        refused("payload", kernel(none, None), "is no regular file");
        refused("payload", kernel(&elf, Some(none)), "is no regular file");
        let words = "is neither a regular file nor a block device";
        refused("disks", json!([{ "id": "root", "path": none, "readonly": true }]), words);
    }
    let words = "is neither a regular file nor a block device";
    refused("disks", json!([{ "id": "root", "path": "/dev/null" }]), words);
}

#[test]
fn an_image_is_written_by_one_disk_of_one_vm() {
    let folder = tempfile::tempdir().expect("folder");
    let image = folder.path().join("root.img");
    std::fs::write(&image, vec![0; 1 << 20]).expect("written");
    let disks = |second_only_reads: bool| {
        let more = json!({ "id": "b", "path": image, "readonly": second_only_reads });
        json!([{ "id": "a", "path": image, "readonly": second_only_reads }, more])
    };
    let with = |disks: Value| {
        let mut config = good();
        config["disks"] = disks;
        config
    };
    refused(folder.path(), &with(disks(false)), 3, "disk b: ");
    refused(folder.path(), &with(disks(false)), 3, "root.img is in use by another disk or another VM");

    let mine = tempfile::tempdir().expect("folder");
    let one = json!([{ "id": "root", "path": image }]);
    let path = configuration(mine.path(), "write:1:7,spin", one.clone());
    let mut vm = Program::start(&mut fealty(&["run", "--unprotected", &path.display().to_string()]));
    vm.until("write 1 ok");
    refused(folder.path(), &with(one.clone()), 3, "in use by another disk or another VM");
    refused(folder.path(), &with(disks(true)), 3, "in use by another disk or another VM");
    // Killed, it lets go; and readers may be several.
    drop(vm);
    let path = configuration(mine.path(), "hello,poweroff", disks(true));
    Program::start(&mut fealty(&["run", "--unprotected", &path.display().to_string()])).end().code(0);
    // One that ended in order leaves nothing behind that anybody waits for.
    let path = configuration(mine.path(), "write:1:7,poweroff", one.clone());
    for _ in 0..5 {
        Program::start(&mut fealty(&["run", "--unprotected", &path.display().to_string()])).end().code(0);
        let free = std::fs::File::open(&image).expect("opened");
        rustix::fs::flock(&free, rustix::fs::FlockOperation::NonBlockingLockExclusive).expect("it let go");
    }
    for _ in 0..5 {
        let path = configuration(mine.path(), "write:1:7,spin", one.clone());
        let mut vm = Program::start(&mut fealty(&["run", "--unprotected", &path.display().to_string()]));
        vm.until("write 1 ok");
    }
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
