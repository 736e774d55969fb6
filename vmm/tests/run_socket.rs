//! The control socket of a running VM, through `fealty ctl` and by hand.

mod common;

use common::{Ended, LIMIT, Program, configuration, configuration_with, fealty};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

struct Vm {
    folder: tempfile::TempDir,
    program: Program,
}

fn start(words: &str) -> Vm {
    start_with(words, serde_json::json!([]))
}

/// With disks; each has a file of 1 MiB.
fn start_with(words: &str, disks: serde_json::Value) -> Vm {
    start_configured(words, |folder, words| {
        for disk in disks.as_array().into_iter().flatten() {
            std::fs::write(folder.join(disk["path"].as_str().expect("a path")), vec![0; 1 << 20]).expect("written");
        }
        configuration(folder, words, disks)
    })
}

fn start_configured(words: &str, configuration: impl FnOnce(&Path, &str) -> PathBuf) -> Vm {
    let folder = tempfile::tempdir().expect("folder");
    let path = configuration(folder.path(), words);
    let socket = folder.path().join("api.sock");
    let mut command = fealty(&["run", "--unprotected", path.to_str().expect("UTF-8"), "--api-socket"]);
    let mut program = Program::start(command.arg(&socket));
    program.until("fealty-guest");
    program.until_step("runs");
    Vm { folder, program }
}

impl Vm {
    fn socket(&self) -> PathBuf {
        self.folder.path().join("api.sock")
    }

    #[track_caller]
    fn ctl(&self, words: &[&str]) -> Ended {
        let socket = self.socket().display().to_string();
        Program::start(&mut fealty(&[&["ctl", &socket], words].concat())).end()
    }

    fn raw(&self, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.socket()).expect("connected");
        stream.set_read_timeout(Some(LIMIT)).expect("set");
        stream.write_all(request).expect("written");
        let mut answer = Vec::new();
        let mut piece = [0; 4096];
        while !String::from_utf8_lossy(&answer).contains("\r\n\r\n") {
            match stream.read(&mut piece).expect("an answer") {
                0 => break,
                length => answer.extend_from_slice(&piece[..length]),
            }
        }
        String::from_utf8_lossy(&answer).into_owned()
    }
}

#[test]
fn a_vm_is_shown_paused_resumed_and_ended() {
    let vm = start("tick");
    assert!(vm.ctl(&["info"]).code(0).out.to_lowercase().contains("running"));
    let info: serde_json::Value = serde_json::from_str(&vm.ctl(&["info", "--json"]).code(0).out).expect("JSON");
    assert_eq!(info["info"]["config"]["memory"]["size"], 64u64 << 20);
    vm.ctl(&["pause"]).code(0);
    assert!(vm.ctl(&["pause"]).code(4).why().contains("paused already"));
    assert!(vm.ctl(&["info"]).code(0).out.contains("Paused"));
    let ticks = vm.program.out().matches("tick").count();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(vm.program.out().matches("tick").count(), ticks, "it ran while paused");
    vm.ctl(&["resume"]).code(0);
    assert!(vm.ctl(&["resume"]).code(4).why().contains("not paused"));
    vm.ctl(&["shutdown"]).code(0);
    vm.program.end().code(0);
}

#[test]
fn the_power_button_is_pressed() {
    let mut vm = start("wait-button,hello,poweroff");
    vm.program.until("waiting for the button");
    vm.ctl(&["power-button"]).code(0);
    assert!(vm.program.end().code(0).out.contains("hello"));
}

#[test]
fn a_disk_that_grows_is_told_to_the_guest() {
    let disks = serde_json::json!([{ "id": "root", "path": "root.img" }]);
    let mut vm = start_with("wait-resize,write:300:7,verify:300:7,poweroff", disks);
    vm.program.until("waiting for another size");
    assert!(vm.ctl(&["resize-disk", "data"]).code(4).why().contains("no disk data"));
    let body = br#"{"id":"root","desired_size":2097152}"#;
    let request = format!("PUT /api/v1/vm.resize-disk HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
    let request = [request.as_bytes(), body].concat();
    let answer = vm.raw(&request);
    assert!(answer.starts_with("HTTP/1.1 409") && answer.contains("has 1048576 bytes"), "{answer}");
    assert!(vm.raw(b"PUT /api/v1/vm.resize-disk HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}").starts_with("HTTP/1.1 400"));
    let file = std::fs::File::options().write(true).open(vm.folder.path().join("root.img")).expect("open");
    file.set_len(2 << 20).expect("larger");
    assert!(vm.ctl(&["resize-disk", "root"]).code(0).out.contains("root has 2097152 bytes"));
    let ended = vm.program.end().code(0);
    assert!(ended.out.contains("disk 0 bytes=2097152") && ended.out.contains("verify 300 ok"), "{}", ended.out);
}

#[test]
fn devices_are_shown_and_a_balloon_is_resized() {
    let devices = serde_json::json!({
        "rng": {}, "pvpanic": true, "balloon": { "size": 4096 }, "vsock": { "cid": 3, "socket": "vsock.sock" },
        "console": { "mode": "Socket", "socket": "hvc.sock" } });
    let vm = start_configured("spin", |folder, words| configuration_with(folder, words, devices));
    let info: serde_json::Value = serde_json::from_str(&vm.ctl(&["info", "--json"]).code(0).out).expect("JSON");
    let config = &info["info"]["config"];
    assert_eq!((&config["pvpanic"], &config["vsock"]), (&true.into(), &serde_json::json!({ "cid": 3 })), "no paths");
    assert!(vm.ctl(&["info"]).code(0).out.contains("devices: rng, console, vsock, balloon, pvpanic"));
    assert!(vm.ctl(&["resize-balloon", "8192"]).code(0).out.contains("8192"));
    for bytes in ["1", "67108864"] {
        assert!(vm.ctl(&["resize-balloon", bytes]).code(4).why().contains("multiple of 4096"));
    }
    let body = br#"{"desired_vcpus":2}"#;
    let request = format!("PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
    assert!(vm.raw(&[request.as_bytes(), body].concat()).starts_with("HTTP/1.1 400"));
    assert!(start("spin").ctl(&["resize-balloon", "4096"]).code(4).why().contains("no balloon"));
}

#[test]
fn cloud_hypervisors_clients_find_their_paths() {
    let vm = start("spin");
    let answer = vm.raw(b"GET /api/v1/vm.info HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"Running\""), "{answer}");
    assert!(vm.raw(b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n").contains("build_version"));
    assert!(vm.raw(b"PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 0\r\n\r\n").starts_with("HTTP/1.1 204"));
}

#[test]
fn a_core_dump_of_an_unprotected_vm_has_nobody_to_permit_it() {
    let vm = start("spin");
    let out = vm.folder.path().join("core").display().to_string();
    assert!(vm.ctl(&["coredump", "--out", &out]).code(4).why().contains("provider"));
    assert!(!std::path::Path::new(&out).exists(), "nothing is left behind");
    std::fs::write(&out, b"precious").expect("written");
    assert!(vm.ctl(&["coredump", "--out", &out]).code(13).why().contains("never overwritten"));
    let answer = vm.raw(b"PUT /api/v1/vm.coredump HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}");
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("fealty/vm.coredump"), "{answer}");
    let answer = vm.raw(b"PUT /api/v1/fealty/vm.coredump HTTP/1.1\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("descriptor"), "{answer}");
}

#[test]
fn bad_requests_get_one_clear_error_and_change_nothing() {
    let vm = start("spin");
    for (request, status) in [
        (&b"\x16\x03\x01\x02\x00\r\n\r\n"[..], 400),
        (b"POST /api/v1/vm.pause HTTP/1.1\r\n\r\n", 405),
        (b"PUT /api/v1/vm.pause HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"PUT /api/v1/vm.pause HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
        (b"PUT /api/v1/vm.explode HTTP/1.1\r\n\r\n", 404),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (&[b"GET /", &[b'a'; 20_000][..], b" HTTP/1.1\r\n\r\n"].concat(), 431),
    ] {
        let answer = vm.raw(request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    assert!(vm.ctl(&["info"]).code(0).out.contains("Running"));
}

#[test]
fn a_socket_that_nobody_serves_is_said_to_be_so() {
    let folder = tempfile::tempdir().expect("folder");
    let socket = folder.path().join("none").display().to_string();
    assert!(Program::start(&mut fealty(&["ctl", &socket, "info"])).end().code(13).why().contains("no VM answers"));
}

/// The driver waits for slots as ACPI's methods would have it, and lets go of what it is asked for.
#[test]
fn a_disk_is_added_and_removed_while_the_guest_runs() {
    let image = |vm: &Vm, name: &str, fill: u8| {
        let path = vm.folder.path().join(name);
        std::fs::write(&path, vec![fill; 1 << 20]).expect("written");
        path.display().to_string()
    };
    let disks = serde_json::json!([{ "id": "root", "path": "root.img" }]);
    let words = "write:5:7,eject:255,wait-slots,disk:1,serial,verify:3:0x33,write:9:0xab,flush,eject:255,wait-slots,let-go,eject:1,\
                 wait-slots,disk:1,serial,queues,verify:3:0x44,write:3:1,verify:3:1,disk:0,verify:5:7,tick";
    let mut vm = start_with(words, disks);
    vm.program.until("waiting for slots");
    let (first, second) = (image(&vm, "first.img", 0x33), image(&vm, "second.img", 0x44));
    assert!(vm.ctl(&["remove-device", "late"]).code(4).why().contains("no disk late"));
    assert!(vm.ctl(&["remove-device", "root"]).code(4).why().contains("was there when the VM started"));
    assert!(vm.ctl(&["add-disk", "root", &first]).code(4).why().contains("has a disk root already"));
    let root = vm.folder.path().join("root.img").display().to_string();
    assert!(vm.ctl(&["add-disk", "other", &root]).code(4).why().contains("in use by another disk"));
    for (body, why) in [
        (r#"{"id":"x"}"#, "opens no paths"),
        (r#"{"id":"x","path":"/x"}"#, "comes as a descriptor"),
        (r#"{"id":"x","queue_size":3}"#, "not a power of two"),
    ] {
        let request = format!("PUT /api/v1/vm.add-disk HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let answer = vm.raw(request.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains(why), "{answer}");
    }

    assert!(vm.ctl(&["add-disk", "late", &first]).code(0).out.contains("late is at 0000:00:18.0"));
    assert!(vm.ctl(&["add-disk", "again", &first]).code(4).why().contains("in use by another disk"));
    vm.program.until("ejected 255, disks=2");
    let shown = |vm: &Vm| {
        let info: serde_json::Value = serde_json::from_str(&vm.ctl(&["info", "--json"]).code(0).out).expect("JSON");
        let disks = info["info"]["config"]["disks"].as_array().expect("disks").clone();
        assert_eq!(info["counters"]["disks"].as_object().expect("counters").len(), disks.len());
        disks.iter().map(|disk| disk["id"].as_str().expect("a name").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(shown(&vm), ["root", "late"]);
    vm.ctl(&["remove-device", "late"]).code(0);
    vm.program.until_step("disk-removed");
    vm.program.until("ejected 1, disks=1");
    assert_eq!(shown(&vm), ["root"]);
    assert_eq!(std::fs::read(&first).expect("read")[9 * 4096], 0xab);
    let held = std::fs::read_dir(format!("/proc/{}/fd", vm.program.pid())).expect("descriptors").flatten();
    let mut held = held.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    assert!(held.all(|file| !file.ends_with("first.img")), "nobody holds the image any more");
    vm.ctl(&["pause"]).code(0);
    for (option, value, why) in [
        ("--queues", "17", "has num_queues 17"),
        ("--serial", "", "serial number of disk later"),
        ("--bytes-per-second", "0", "rate_limiter_config of disk later"),
        ("--requests-per-second", "0", "rate_limiter_config of disk later"),
    ] {
        assert!(vm.ctl(&["add-disk", "later", &second, option, value]).code(4).why().contains(why), "{option}");
    }
    let limits = ["--bytes-per-second", "1000000", "--requests-per-second", "1000"];
    vm.ctl(&[&["add-disk", "later", &second, "--queues", "3", "--serial", "SN 7"][..], &limits].concat()).code(0);
    assert!(vm.ctl(&["add-disk", "first", "--readonly", &first]).code(0).out.contains("0000:00:19.0"));
    vm.ctl(&["resume"]).code(0);
    vm.program.until("tick 1");
    let out = vm.program.out();
    for line in [
        "ejected 255, disks=1",
        "slots filled=1 asked=0",
        "serial late",
        "verify 3 ok",
        "slots filled=0 asked=1",
        "disk 1 let go",
        "slots filled=3 asked=0",
        "serial SN 7",
        "queues 3",
        "write 3 ok",
        "verify 5 ok",
    ] {
        assert!(out.contains(line), "{line}: {out}");
    }
    assert_eq!(out.matches("verify 3 ok").count(), 3, "{out}");
    vm.ctl(&["shutdown"]).code(0);
    vm.program.end().code(0);
    assert_eq!(std::fs::read(&second).expect("read")[3 * 4096], 1);
}

/// The last one is ejected by a guest that has not reset it.
#[test]
fn a_slot_is_used_again_and_again_and_nothing_is_left_of_what_was_there() {
    let cycle = "wait-slots,disk:1,serial,write:2:9,verify:2:9,wait-slots,let-go,eject:1,".repeat(12);
    let words =
        format!("write:5:7,{cycle}wait-slots,disk:1,serial,write:2:8,wait-slots,eject:1,disk:0,verify:5:7,tick");
    let mut vm = start_with(&words, serde_json::json!([{ "id": "root", "path": "root.img" }]));
    let image = vm.folder.path().join("late.img");
    std::fs::write(&image, vec![0; 1 << 20]).expect("written");
    let entries = |vm: &Vm, what: &str| {
        std::fs::read_dir(format!("/proc/{}/{what}", vm.program.pid())).expect("there").flatten().collect::<Vec<_>>()
    };
    let held = |vm: &Vm| {
        let names =
            entries(vm, "task").into_iter().filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        // The kernel makes and ends workers of its own for a ring.
        let mut names: Vec<_> = names.filter(|name| !name.starts_with("iou-")).collect();
        names.sort();
        (entries(vm, "fd").len(), names)
    };
    let before = held(&vm);
    for round in 0..13 {
        let name = format!("late{round}");
        vm.ctl(&["add-disk", &name, &image.display().to_string()]).code(0);
        vm.program.until(&format!("serial {name}"));
        vm.ctl(&["remove-device", &name]).code(0);
        vm.program.until_step(&format!("disk-removed: {name}"));
    }
    vm.program.until("tick 1");
    let out = vm.program.out();
    assert_eq!((out.matches("verify 2 ok").count(), out.matches("ejected 1, disks=1").count()), (12, 13), "{out}");
    assert!(out.contains("verify 5 ok"), "{out}");
    let (start, mut now) = (Instant::now(), held(&vm));
    while now != before {
        // The socket's side of a client that has just gone.
        assert!(start.elapsed() < LIMIT, "descriptors and threads: {now:?}, not {before:?}");
        std::thread::sleep(Duration::from_millis(100));
        now = held(&vm);
    }
    vm.ctl(&["shutdown"]).code(0);
    vm.program.end().code(0);
    assert_eq!(std::fs::read(&image).expect("read")[2 * 4096], 8);
}

/// A driver that does anything, for real: through KVM's doorbells and interrupt routes, under the sandbox, with a disk beside it that
/// goes on. The seeds are fixed, so that what one test found the next one finds.
#[test]
fn a_hostile_driver_breaks_its_own_devices_only() {
    for seed in [1, 2] {
        let words = format!("write:5:7,hostile:4000:{seed},verify:5:7,write:6:9,flush,verify:6:9,tick");
        let vm = start_configured(&words, |folder, words| {
            let disk = |name: &str| {
                let path = folder.join(name);
                std::fs::write(&path, vec![0; 1 << 20]).expect("written");
                serde_json::json!({ "id": name, "path": path, "num_queues": 2 })
            };
            let devices = serde_json::json!({
                "disks": [disk("first"), disk("second"), disk("third")], "rng": {},
                "balloon": { "size": 1 << 20, "free_page_reporting": true },
                "vsock": { "cid": 3, "socket": "vsock.sock" },
                "console": { "mode": "Socket", "socket": "console.sock" },
            });
            configuration_with(folder, words, devices)
        });
        let Vm { mut program, folder } = vm;
        program.until("tick 1");
        let out = program.out();
        for line in ["hostile to 6", "hostile done", "verify 5 ok", "write 6 ok", "flush ok", "verify 6 ok"] {
            assert!(out.contains(line), "{line}: {out}");
        }
        let socket = folder.path().join("api.sock").display().to_string();
        let told = Program::start(&mut fealty(&["ctl", &socket, "info", "--json"])).end().code(0);
        let told: serde_json::Value = serde_json::from_str(&told.out).expect("JSON");
        let counters = &told["counters"];
        let breaks = |device: &serde_json::Value| device["breaks"].as_u64().expect("a number");
        let disks = &counters["disks"];
        assert_eq!((breaks(&disks["first"]), &disks["first"]["errors"]), (0, &0.into()), "{counters:#}");
        for device in [&disks["second"], &disks["third"]] {
            assert!(breaks(device) > 0, "{counters:#}");
        }
        for name in ["rng", "balloon", "vsock", "console"] {
            assert!(breaks(&counters[name]) > 0, "{name}: {counters:#}");
        }
        program.signal(rustix::process::Signal::TERM);
        program.until_step("power-button");
        program.signal(rustix::process::Signal::TERM);
        let ended = program.end().code(14);
        assert!(!ended.err.contains("panicked"), "{}", ended.err);
    }
}
