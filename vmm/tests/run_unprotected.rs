//! `fealty run --unprotected` with the small guest: what starts, how it ends, what it gives up.

mod common;

use common::{Program, configuration, fealty, guest};
use rustix::process::Signal;
use std::path::Path;
use std::process::{Command, Stdio};

fn run(words: &str, more: &[&str]) -> (tempfile::TempDir, Command) {
    let folder = tempfile::tempdir().expect("folder");
    let path = configuration(folder.path(), words, serde_json::json!([]));
    let mut command = fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]);
    command.args(more);
    (folder, command)
}

#[test]
fn a_guest_speaks_and_powers_off() {
    let (_folder, mut command) = run("hello,poweroff", &[]);
    let ended = Program::start(&mut command).end().code(0);
    assert!(ended.out.starts_with("fealty-guest"), "the console alone is on standard output: {}", ended.out);
    assert!(ended.out.contains("hello"));
    assert!(ended.err.contains("runs"), "steps are on standard error: {}", ended.err);
}

#[test]
fn a_disk_keeps_what_the_guest_flushed() {
    let folder = tempfile::tempdir().expect("folder");
    let image = folder.path().join("root.img");
    std::fs::write(&image, vec![0x11; 1 << 20]).expect("written");
    let disks = serde_json::json!([{ "id": "root", "path": "root.img" }]);
    let path = configuration(folder.path(), "write:5:0xab,flush,verify:5:0xab,poweroff", disks);
    let mut command = fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]);
    let ended = Program::start(&mut command).end().code(0);
    assert!(ended.out.contains("verify 5 ok"), "{}", ended.out);
    let bytes = std::fs::read(&image).expect("read");
    assert!(bytes[5 * 4096..6 * 4096].iter().all(|b| *b == 0xab));
    assert_eq!(bytes[6 * 4096], 0x11);
}

#[test]
fn a_disk_is_served_by_rings_that_were_made_before_the_sandbox_closed() {
    let folder = tempfile::tempdir().expect("folder");
    std::fs::write(folder.path().join("root.img"), vec![0; 4 << 20]).expect("written");
    let limits = serde_json::json!({"ops": {"size": 1_000_000, "refill_time": 100}});
    let disks = serde_json::json!([{
        "id": "root", "path": "root.img", "num_queues": 3, "queue_size": 128, "serial": "SN 7", "rate_limiter_config": limits,
    }]);
    let path = configuration(folder.path(), "queues,serial,storm:2000,discard:0:16,zeroes:16:16,spin", disks);
    let mut vm = Program::start(&mut fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]));
    vm.until("spinning");
    let rings = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).expect("descriptors").flatten();
    let rings = rings.filter(|e| std::fs::read_link(e.path()).is_ok_and(|l| l.ends_with("anon_inode:[io_uring]")));
    assert_eq!(rings.count(), 3, "one for each queue");
    vm.signal(Signal::TERM);
    vm.until_step("power-button");
    vm.signal(Signal::TERM);
    let ended = vm.end().code(14);
    for line in ["queues 3", "serial SN 7", "storm ok", "discard 0 ok", "zeroes 16 ok"] {
        assert!(ended.out.contains(line), "{line}: {}", ended.out);
    }
    assert!(!ended.err.contains("disk-without-io-uring"), "{}", ended.err);
}

/// The program's process finds a kernel that has no io_uring.
#[allow(unsafe_code)]
fn without_io_uring(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    const fn operation(code: u32, k: u32, jt: u8) -> libc::sock_filter {
        libc::sock_filter { code: code as u16, jt, jf: 0, k }
    }
    let begin = || {
        let mut list = [
            operation(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
            operation(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_io_uring_setup as u32, 1),
            operation(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
            operation(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32, 0),
        ];
        let filter = libc::sock_fprog { len: list.len() as u16, filter: list.as_mut_ptr() };
        // SAFETY: the calls take numbers, and a pointer to a list of as many operations as it says, all alive.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
        };
        if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec it makes two system calls, and allocates nothing.
    unsafe { command.pre_exec(begin) };
}

#[test]
fn a_disk_is_served_where_the_kernel_has_no_io_uring() {
    let folder = tempfile::tempdir().expect("folder");
    std::fs::write(folder.path().join("root.img"), vec![0x77; 4 << 20]).expect("written");
    let disks = serde_json::json!([{ "id": "root", "path": "root.img", "num_queues": 3, "queue_size": 128 }]);
    let words = "queues,storm:1000,discard:0:16,zeroes:16:16,verify:16:0,write:5:9,flush,verify:5:9,poweroff";
    let path = configuration(folder.path(), words, disks);
    let mut command = fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]);
    without_io_uring(&mut command);
    let ended = Program::start(&mut command).end().code(0);
    for line in ["queues 3", "storm ok", "discard 0 ok", "zeroes 16 ok", "verify 16 ok", "flush ok", "verify 5 ok"] {
        assert!(ended.out.contains(line), "{line}: {}", ended.out);
    }
    assert!(ended.err.contains("disk-without-io-uring: root: "), "{}", ended.err);
}

#[test]
fn steps_come_as_json_one_object_a_line() {
    let (_folder, mut command) = run("hello,poweroff", &["--json"]);
    let ended = Program::start(&mut command).end().code(0);
    let steps: Vec<serde_json::Value> =
        ended.err.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(steps.iter().any(|s| s["step"] == "runs" && s["ms"].is_number()), "{}", ended.err);
}

#[test]
fn a_reset_has_its_own_code() {
    let (_folder, mut command) = run("reset", &[]);
    assert!(Program::start(&mut command).end().code(12).why().contains("reset"));
}

/// Runs `words`, which must end the VM with the exit code of a guest that failed and one line that has `why` and the vCPU's state, of
/// which it must have `state`; for people and for scripts.
#[track_caller]
fn fails(words: &str, why: &str, state: &str) {
    fails_in(words, serde_json::json!({}), why, state);
}

/// The same in a VM with the fields of `more`.
#[track_caller]
fn fails_in(words: &str, more: serde_json::Value, why: &str, state: &str) {
    let folder = tempfile::tempdir().expect("folder");
    let path = common::configuration_with(folder.path(), words, more);
    let mut command = fealty(&["run", "--unprotected", path.to_str().expect("UTF-8")]);
    let ended = Program::start(&mut command).end().code(10);
    let said = ended.why().to_owned();
    assert!(said.starts_with(&format!("the guest failed: vCPU 0: {why}; rip=0x")), "{said}");
    assert_eq!(ended.err.lines().last(), Some(format!("fealty: {said}").as_str()), "it is the last one");
    for register in ["rsp=", "rflags=", "cs=", "cpl=", "cr0=", "cr2=", "cr3=", "cr4=", "efer=", state] {
        assert!(said.contains(&format!(" {register}")), "{register} is not in {said}");
    }
    assert!(!ended.out.contains("done"), "the guest went on: {}", ended.out);

    let ended = Program::start(command.arg("--json")).end().code(10);
    let lines = ended.err.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    let errors: Vec<_> = lines.filter(|line| line["event"] == "error").collect();
    assert_eq!((errors.len(), &errors[0]["exit"]), (1, &10.into()), "{}", ended.err);
    assert!(errors[0]["message"].as_str().expect("text").contains(why), "{}", ended.err);
}

#[test]
fn a_triple_fault_ends_the_vm_with_one_line() {
    // Not where: on AMD's processors nobody knows any more.
    fails("hello,panic,hello", "triple fault", "cpl=");
}

#[test]
fn code_where_no_memory_is_ends_the_vm_with_one_line() {
    let why = "KVM internal error, suberror 1: an instruction that KVM can't emulate";
    fails("ring0-nowhere,hello", why, "cpl=0");
    let (_folder, mut command) = run("ring0-nowhere", &[]);
    let said = Program::start(&mut command).end().code(10).why().to_owned();
    assert!(said.contains("rip=0x30000000 "), "{said}");
}

#[test]
fn memory_that_nobody_gave_it_yet_ends_the_vm_with_one_line() {
    let memory = serde_json::json!({ "memory": { "size": 64 << 20, "hotplug_size": 1 << 30 } });
    fails_in("touch:0x100000000,hello", memory, "it touched memory that the host can't give it", "cpl=3");
    // Where there is not even a place for memory, it is a device's that is not there.
    let (_folder, mut command) = run("touch:0x100000000,poweroff", &[]);
    assert!(Program::start(&mut command).end().code(0).out.contains("touched 0xff"));
}

#[test]
fn what_kvm_can_not_emulate_ends_the_vm_with_one_line() {
    for word in ["ring0-cmpxchg16b", "ring0-xrstor", "ring0-int3"] {
        let (_folder, mut command) = run(word, &[]);
        let ended = Program::start(&mut command).end();
        // Where the processor runs ring 0 by itself, the guest can do it, says so, and powers off.
        if ended.code == Some(0) {
            assert!(ended.out.contains("fault vector="), "{word}: {}", ended.out);
        } else {
            fails(word, "KVM internal error, suberror 1: an instruction that KVM can't emulate", "cpl=0");
        }
    }
}

#[test]
fn the_first_signal_presses_the_button_and_a_second_one_stops() {
    let (_folder, mut command) = run("wait-button,hello,poweroff", &[]);
    let mut vm = Program::start(&mut command);
    vm.until("waiting for the button");
    vm.signal(Signal::TERM);
    let ended = vm.end().code(0);
    assert!(ended.out.contains("hello"), "the guest went on after the button: {}", ended.out);

    let (_folder, mut command) = run("spin", &[]);
    let mut vm = Program::start(&mut command);
    vm.until_step("runs");
    vm.signal(Signal::TERM);
    // Two signals of one kind that wait together count once: the second comes after the first was seen.
    vm.until_step("power-button");
    vm.signal(Signal::TERM);
    vm.end().code(14);
}

#[test]
fn a_guest_that_ignores_the_button_is_stopped_after_the_grace_time() {
    let (_folder, mut command) = run("spin", &["--grace", "1"]);
    let mut vm = Program::start(&mut command);
    vm.until_step("runs");
    vm.signal(Signal::INT);
    assert!(vm.end().code(14).why().contains("before the guest powered off"));
}

#[test]
fn what_is_typed_reaches_the_guest() {
    let (_folder, mut command) = run("echo,poweroff", &[]);
    command.stdin(Stdio::piped());
    let mut vm = Program::start(&mut command);
    vm.until("fealty-guest");
    let mut keyboard = vm.stdin();
    std::io::Write::write_all(&mut keyboard, b"good morning\nquit\n").expect("typed");
    let ended = vm.end().code(0);
    assert!(ended.out.contains("good morning"), "{}", ended.out);
}

#[test]
fn the_console_goes_into_a_file_or_nowhere() {
    let (folder, mut command) = run("hello,poweroff", &[]);
    let file = folder.path().join("console.log");
    command.args(["--console", &format!("file:{}", file.display())]);
    assert_eq!(Program::start(&mut command).end().code(0).out, "");
    assert!(std::fs::read_to_string(&file).expect("written").contains("hello"));
    let (_folder, mut command) = run("hello,poweroff", &["--console", "null"]);
    assert_eq!(Program::start(&mut command).end().code(0).out, "");
}

#[test]
fn every_thread_is_under_its_filter_and_no_needless_descriptor_is_open() {
    let (folder, mut command) = run("spin", &[]);
    command.args(["--api-socket", folder.path().join("api").to_str().expect("UTF-8")]);
    let mut vm = Program::start(&mut command);
    vm.until("fealty-guest");
    let mut names = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", vm.pid())).expect("tasks").flatten() {
        let status = std::fs::read_to_string(task.path().join("status")).expect("status");
        assert!(status.contains("Seccomp:\t2"), "{status}");
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        names.push(std::fs::read_to_string(task.path().join("comm")).expect("a name"));
    }
    assert!(names.iter().any(|n| n.starts_with("vcpu")) && names.iter().any(|n| n.starts_with("api")), "{names:?}");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", vm.pid())).expect("limits");
    let core = limits.lines().find(|l| l.starts_with("Max core file size")).expect("a limit");
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");

    let open: Vec<String> = std::fs::read_dir(format!("/proc/{}/fd", vm.pid()))
        .expect("descriptors")
        .flatten()
        .map(|e| std::fs::read_link(e.path()).expect("a link").display().to_string())
        .collect();
    let known = ["/dev/null", "pipe:", "socket:", "anon_inode:[eventfd]", "anon_inode:[signalfd]", "anon_inode:kvm"];
    for descriptor in &open {
        assert!(known.iter().any(|k| descriptor.starts_with(k)), "{descriptor} of {open:#?}");
    }
    assert_eq!(open.iter().filter(|d| d.starts_with("socket:")).count(), 1, "the control socket alone: {open:#?}");
    assert!(!open.iter().any(|d| d == "/dev/kvm"), "{open:#?}");
}

#[test]
fn descriptors_that_were_left_open_are_closed() {
    let secret = tempfile::NamedTempFile::new().expect("file");
    let (_folder, command) = run("spin", &[]);
    let words: Vec<_> = command.get_args().map(|a| a.to_str().expect("UTF-8").to_owned()).collect();
    let mut shell = Command::new("bash");
    shell.args(["-c", "exec 9<\"$1\"; shift; exec \"$@\"", "bash"]);
    shell.arg(secret.path()).arg(env!("CARGO_BIN_EXE_fealty")).args(words).stdin(Stdio::null());
    let mut vm = Program::start(&mut shell);
    vm.until("fealty-guest");
    assert!(!Path::new(&format!("/proc/{}/fd/9", vm.pid())).exists() || !points_at(vm.pid(), secret.path()));
}

fn points_at(pid: u32, path: &Path) -> bool {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
    entries.flatten().any(|e| std::fs::read_link(e.path()).is_ok_and(|l| l == path))
}

#[test]
fn bad_input_gets_one_clear_line_and_its_code() {
    let folder = tempfile::tempdir().expect("folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let kernel = guest().display().to_string();
    let config = |kernel: &str, more: &str| {
        format!(r#"{{"cpus":{{"boot_vcpus":1}},"memory":{{"size":67108864}},"payload":{{"kernel":"{kernel}"}}{more}}}"#)
    };
    let cases = [
        (write("empty", ""), 3),
        (write("truncated", "{\"cpus\":"), 3),
        (write("unknown", &config(&kernel, ",\"customer\":\"acme\"")), 3),
        (write("volume", &config(&kernel, ",\"disks\":[{\"id\":\"a\",\"path\":\"b\",\"volume\":\"c\"}]")), 3),
        (write("no-kernel", &config("missing", "")), 3),
        (write("no-elf", &config("empty", "")), 3),
        (write("no-disk", &config(&kernel, ",\"disks\":[{\"id\":\"a\",\"path\":\"missing\"}]")), 3),
        (write("queues", &config(&kernel, ",\"disks\":[{\"id\":\"a\",\"path\":\"empty\",\"num_queues\":0}]")), 3),
        (write("size", &config(&kernel, ",\"disks\":[{\"id\":\"a\",\"path\":\"empty\",\"queue_size\":77}]")), 3),
        (write("serial", &config(&kernel, ",\"disks\":[{\"id\":\"a\",\"path\":\"empty\",\"serial\":\"\"}]")), 3),
        (
            write(
                "twins",
                &config(&kernel, ",\"disks\":[{\"id\":\"a\",\"path\":\"empty\"},{\"id\":\"a\",\"path\":\"empty\"}]"),
            ),
            3,
        ),
        (
            write(
                "rate",
                &config(
                    &kernel,
                    ",\"disks\":[{\"id\":\"a\",\"path\":\"empty\",\"rate_limiter_config\":{\"ops\":{\"size\":0,\"refill_time\":1}}}]",
                ),
            ),
            3,
        ),
        (write("memory", &config(&kernel, "").replace("67108864", "5")), 3),
        (folder.path().join("nothing").display().to_string(), 3),
        (folder.path().display().to_string(), 3),
    ];
    for (path, code) in cases {
        let ended = Program::start(&mut fealty(&["run", "--unprotected", &path])).end().code(code);
        assert!(!ended.why().is_empty() && ended.out.is_empty(), "{path}");
    }
    for words in [&["run"][..], &["run", "x", "--grace", "-1"], &["run", "x", "--console", "tty"], &["walk"]] {
        let ended = Program::start(&mut fealty(words)).end().code(2);
        assert!(!ended.why().is_empty(), "{words:?}");
    }
    let missing = folder.path().join("missing.vm").display().to_string();
    assert!(Program::start(&mut fealty(&["run", &missing])).end().code(3).why().contains("missing.vm"));
}

#[test]
fn help_names_every_exit_code() {
    let ended = Program::start(&mut fealty(&["--help"])).end().code(0);
    assert!(ended.out.contains("Exit codes") && ended.out.contains("14"), "{}", ended.out);
}

#[test]
fn attack_28_whoever_does_not_read_its_lines_holds_up_nothing() {
    let (_folder, mut command) = run("hello,poweroff", &[]);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    // Full to the last byte: a line that waited for room would wait for ever, as nobody reads.
    rustix::io::ioctl_fionbio(&writer, true).expect("set");
    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
    while rustix::io::write(&writer, &[0]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).expect("set");
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer).spawn().expect("started");
    let begun = std::time::Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("waited") {
            break status;
        }
        if begun.elapsed() > std::time::Duration::from_secs(120) {
            child.kill().expect("killed");
            panic!("it waits for a reader");
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
    drop(reader);
}
