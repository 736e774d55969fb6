//! Clients that misbehave, and TPMs that do.
mod common;

use attest::service::{Answer, ControlRequest, Registering, VmRequest, frame};
use common::{Host, LIMIT, Sleeper, pidfd, quote, refused};
use fealty_tests::process::{Background, run};
use policy::Digest;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

const ALL: [u8; 9] = [0, 1, 2, 3, 4, 5, 6, 7, 14];

/// A VM's socket, and its process, for bytes of one's own choice.
fn raw_vm(host: &Host, process: &Sleeper) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let (customer, vm) = ("acme".parse().expect("a label"), "raw".parse().expect("a label"));
    let file = Digest::of(b"file");
    host.control()
        .register(&customer, &vm, file, theirs.as_fd(), pidfd(process).as_fd())
        .and_then(Registering::done)
        .expect("registered");
    ours.set_read_timeout(Some(LIMIT)).expect("set");
    ours
}

fn ask(stream: &mut UnixStream, json: &[u8]) -> Option<Answer> {
    stream.write_all(&(json.len() as u32).to_be_bytes()).ok()?;
    stream.write_all(json).ok()?;
    frame::read(stream, attest::service::ANSWER_LIMIT).ok()
}

#[test]
fn a_vm_socket_serves_five_requests_and_nothing_else() {
    let host = Host::booted();
    let _service = host.ready();
    let process = Sleeper::new();
    let mut stream = raw_vm(&host, &process);
    let before = host.control().status().expect("status");
    let extend = ControlRequest::Extend { layer: "evil".into(), version: String::new(), digest: Digest::of(b"x") };
    let register = ControlRequest::Register {
        customer: "rival".parse().expect("a label"),
        vm: "b".parse().expect("a label"),
        vm_file: Digest::of(b""),
    };
    for request in [extend, register, ControlRequest::Reseal, ControlRequest::Status] {
        let json = serde_json::to_vec(&request).expect("JSON");
        let answer = ask(&mut stream, &json).expect("an answer");
        assert!(matches!(answer, Answer::Refused { again: false, .. }), "{answer:?}");
    }
    let identity = serde_json::to_vec(&VmRequest::Identity).expect("JSON");
    assert!(matches!(ask(&mut stream, &identity), Some(Answer::Identity(_))), "it still serves what it serves");
    let after = host.control().status().expect("status");
    assert_eq!((before.layers, before.sealed), (after.layers, after.sealed));
}

#[test]
fn attack_39_garbage_on_sockets_harms_nobody() {
    let host = Host::booted();
    let service = host.ready();
    let process = Sleeper::new();
    let mut vm = host.vm("acme", "payroll");
    let deep = "[".repeat(60_000);
    let texts: [&[u8]; 6] =
        [b"", b"{}", b"\xff\xfe", b"{\"request\":\"ecdh\",\"point\":\"\",\"x\":1}", deep.as_bytes(), b"null"];
    for connect in [true, false] {
        let mut stream =
            if connect { UnixStream::connect(host.socket()).expect("connects") } else { raw_vm(&host, &process) };
        for text in texts {
            let answer = ask(&mut stream, text).expect("an answer");
            let Answer::Refused { reason, again: false } = answer else { panic!("{answer:?}") };
            assert_eq!(reason.lines().count(), 1);
        }
    }
    for bytes in [&[0xff; 4][..], &[0, 1, 0, 1], &[0, 0, 0, 9, b'{'], &[0], &[0xaa; 5000]] {
        let mut streams = [UnixStream::connect(host.socket()).expect("connects"), raw_vm(&host, &process)];
        for stream in &mut streams {
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
        }
    }
    // Half a frame that never goes on holds up nobody else.
    let mut slow = raw_vm(&host, &process);
    slow.write_all(&[0, 0]).expect("sent");
    vm.client.quote(&quote(1, &ALL, None)).expect("still serves");
    service.signal(15);
    let ended = service.end(LIMIT).good();
    assert!(!ended.err.contains("panicked"), "{}", ended.err);
}

#[test]
fn seeded_garbage_is_survived() {
    let host = Host::booted();
    let service = host.ready();
    let process = Sleeper::new();
    let good: Vec<Vec<u8>> = [VmRequest::Identity, VmRequest::CertifyWrapKey, quote(1, &ALL, Some(0))]
        .iter()
        .map(|r| serde_json::to_vec(r).expect("JSON"))
        .collect();
    let mut state = 0x1234_5678_9abc_def0_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    let mut stream = raw_vm(&host, &process);
    for _ in 0..300 {
        let mut bytes = good[next() % good.len()].clone();
        for _ in 0..=next() % 4 {
            let at = next() % bytes.len();
            bytes[at] = next() as u8;
        }
        assert!(ask(&mut stream, &bytes).is_some(), "every frame has its answer");
    }
    let identity = serde_json::to_vec(&VmRequest::Identity).expect("JSON");
    assert!(matches!(ask(&mut stream, &identity), Some(Answer::Identity(_))));
    service.signal(15);
    service.end(LIMIT).good();
}

#[test]
fn registration_takes_a_socket_and_a_pidfd() {
    let host = Host::booted();
    let _service = host.ready();
    let process = Sleeper::new();
    let (customer, vm) = ("acme".parse().expect("a label"), "payroll".parse().expect("a label"));
    let null = File::open("/dev/null").expect("opens");
    let (socket, _other) = UnixStream::pair().expect("a pair");
    let pid = pidfd(&process);
    let file = Digest::of(b"");
    let pairs = [(null.as_fd(), pid.as_fd()), (socket.as_fd(), null.as_fd()), (pid.as_fd(), socket.as_fd())];
    for (first, second) in pairs {
        refused(host.control().register(&customer, &vm, file, first, second).and_then(Registering::done));
    }
    // Without descriptors at all.
    let mut stream = UnixStream::connect(host.socket()).expect("connects");
    let request = serde_json::to_vec(&ControlRequest::Register { customer, vm, vm_file: file }).expect("JSON");
    assert!(matches!(ask(&mut stream, &request), Some(Answer::Refused { .. })));
    assert_eq!(host.control().status().expect("status").vms, 0);
}

#[test]
fn the_control_socket_is_for_root_and_its_owner() {
    let host = Host::booted();
    let _service = host.ready();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(host.socket()).expect("there").permissions());
    assert_eq!(mode & 0o777, 0o600);
    let folder = std::fs::metadata(host.path("run")).expect("there").permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&folder) & 0o077, 0);
}

#[test]
fn a_tpm_that_dies_in_the_middle_is_told_and_survived() {
    let mut host = Host::booted();
    let service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    vm.client.quote(&quote(1, &ALL, None)).expect("a quote");
    host.tpm.power_off();
    for _ in 0..3 {
        let (reason, again) = refused(vm.client.quote(&quote(1, &ALL, None)));
        assert!(reason.contains("can't be reached") && again, "{reason}");
    }
    // Who asks for the identity will ask for a quote, at the price of a nonce: told before that.
    let (reason, again) = refused(vm.client.identity());
    assert!(reason.contains("can't be reached") && again, "{reason}");
    assert!(host.control().status().expect("status").sealed);
    service.signal(15);
    service.end(LIMIT).good();
}

/// A TPM that answers every command with one response code.
fn fake_tpm(code: u32) -> u16 {
    let (commands, control) = loop {
        let first = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = first.local_addr().expect("bound").port();
        if let Some(Ok(second)) = port.checked_add(1).map(|p| TcpListener::bind(("127.0.0.1", p))) {
            break (first, second);
        }
    };
    let port = commands.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for stream in control.incoming().flatten() {
            answer_all(stream, |_| vec![0; 4]);
        }
    });
    std::thread::spawn(move || {
        for stream in commands.incoming().flatten() {
            std::thread::spawn(move || {
                answer_all(stream, |_| [&[0x80, 0x01, 0, 0, 0, 10][..], &code.to_be_bytes()].concat());
            });
        }
    });
    port
}

fn answer_all(mut stream: std::net::TcpStream, answer: impl Fn(&[u8]) -> Vec<u8>) {
    let mut buffer = [0; 4096];
    let _ = stream.set_read_timeout(Some(Duration::from_secs(30)));
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&answer(&buffer[..count])).is_err() {
            return;
        }
    }
}

#[test]
fn tpms_that_fail_are_told_apart() {
    let dir = tempfile::tempdir().expect("a folder");
    for (code, needle) in
        [(0x101, "failure mode"), (0x921, "lockout"), (0x902, "too many objects"), (0x100, "not started")]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fealty-host"));
        command.args(["tpm", "--tcti", &format!("swtpm:host=127.0.0.1,port={}", fake_tpm(code)), "--runtime-dir"]);
        let ended = run(command.arg(dir.path().join(code.to_string())), LIMIT);
        assert_eq!(ended.code, Some(1), "{}", ended.err);
        assert!(ended.err.contains(needle) && ended.err.trim().lines().count() == 1, "{code:x}: {}", ended.err);
    }
}

#[test]
fn a_busy_control_socket_does_not_starve_vms() {
    let host = Host::booted();
    let _service: Background = host.ready();
    let mut vm = host.vm("acme", "payroll");
    let idle: Vec<UnixStream> = (0..200).map(|_| UnixStream::connect(host.socket()).expect("connects")).collect();
    vm.client.quote(&quote(1, &ALL, None)).expect("a quote");
    drop(idle);
}
