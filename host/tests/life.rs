//! How the service begins, ends, and begins again.
mod common;

use attest::eventlog::LayerLog;
use attest_tpm::Tpm;
use common::{Host, LIMIT, quote, refused};
use fealty_tests::process::run;
use policy::Digest;
use policy::instance::EarlierPeer;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

const ALL: [u8; 9] = [0, 1, 2, 3, 4, 5, 6, 7, 14];

fn earlier(vm: &mut common::Vm) -> EarlierPeer {
    vm.client.quote(&quote(1, &ALL, None)).expect("a quote").earlier_peer
}

#[test]
fn one_service_a_tpm_and_later_ones_join() {
    let host = Host::booted();
    let service = host.ready();
    let second = host.run(&["tpm"]);
    assert_eq!(second.code, Some(3), "{}", second.err);
    assert_eq!(
        second.err.trim(),
        format!("fealty-host: another TPM service serves this TPM (process {})", service.pid())
    );
    let binary = Path::new(env!("CARGO_BIN_EXE_fealty-host"));
    let mut joined = attest::service::spawn_or_join(&host.tcti(), Some(&host.path("run")), binary).expect("joined");
    assert_eq!(joined.status().expect("status").pid, service.pid());
}

#[test]
fn whoever_needs_it_starts_it_and_it_ends_when_idle() {
    let host = Host::booted();
    host.measure();
    let binary = Path::new(env!("CARGO_BIN_EXE_fealty-host"));
    // Two at once: one lock decides.
    let start = || attest::service::spawn_or_join(&host.tcti(), Some(&host.path("run")), binary).expect("a service");
    let (mut one, mut two) = std::thread::scope(|s| {
        let (a, b) = (s.spawn(start), s.spawn(start));
        (a.join().expect("no panic"), b.join().expect("no panic"))
    });
    let status = one.status().expect("status");
    assert_eq!(status, two.status().expect("status"));
    assert!(status.sealed, "layers are remembered");
    let mut vm = host.vm("acme", "payroll");
    drop((one, two));
    let quoted = vm.client.quote(&quote(1, &ALL, None)).expect("a service with a VM does not end");
    assert_eq!(quoted.earlier_peer, EarlierPeer::None);
    vm.end();
    drop(vm);
    let begin = Instant::now();
    while host.socket().exists() {
        assert!(begin.elapsed() < LIMIT, "it still runs");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn objects_of_a_dead_service_are_flushed() {
    let host = Host::booted();
    host.ready().signal(9);
    // Each leaves three objects and two sessions; without flushing, the second would find the TPM full.
    for _ in 0..3 {
        let service = host.serve(&[]);
        let mut vm = host.vm("acme", "payroll");
        vm.client.quote(&quote(1, &ALL, None)).expect("a quote");
        service.signal(9);
        service.end(LIMIT);
    }
    let mut tpm = Tpm::open(&host.tcti()).expect("opens");
    assert_eq!(tpm.loaded().expect("counted"), 0);
}

#[test]
fn an_orderly_end_leaves_nothing_behind() {
    let host = Host::booted();
    let service = host.ready();
    service.signal(15);
    let ended = service.end(LIMIT).good();
    assert_eq!(ended.err, "");
    assert!(!host.socket().exists());
    let mut tpm = Tpm::open(&host.tcti()).expect("opens");
    assert_eq!(tpm.loaded().expect("counted"), 0);
    drop(tpm);
    // The same layers, the same boot: the wrap key is there again, and is the same.
    let _service = host.serve(&[]);
    let mut vm = host.vm("acme", "payroll");
    let quoted = vm.client.quote(&quote(1, &ALL, None)).expect("a quote");
    common::verify(&host, &mut vm, 1, &ALL, &quoted);
}

#[test]
fn earlier_peers_are_known_until_a_service_dies() {
    let host = Host::booted();
    let service = host.ready();
    let mut first = host.vm("acme", "payroll");
    assert_eq!(earlier(&mut first), EarlierPeer::None);
    let mut second = host.vm("acme", "payroll");
    let mut other = host.vm("acme", "web");
    assert_eq!(earlier(&mut second), EarlierPeer::Lives);
    assert_eq!(earlier(&mut first), EarlierPeer::Lives, "the later one may have got keys meanwhile");
    assert_eq!(earlier(&mut other), EarlierPeer::None);
    first.end();
    assert_eq!(earlier(&mut second), EarlierPeer::None);
    // A service that dies while VMs live leaves nobody who could know.
    service.signal(9);
    service.end(LIMIT);
    let service = host.serve(&[]);
    let mut third = host.vm("acme", "payroll");
    assert_eq!(earlier(&mut third), EarlierPeer::Unknown);
    second.end();
    other.end();
    third.end();
    service.signal(15);
    service.end(LIMIT).good();
    // It stays so until the next boot.
    let _service = host.serve(&[]);
    assert_eq!(earlier(&mut host.vm("acme", "payroll")), EarlierPeer::Unknown);
}

#[test]
fn a_process_that_is_registered_again_is_one_and_has_one_connection() {
    let host = Host::booted();
    let service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    let again = host.register(&vm.process, &vm.customer, &vm.name, vm.file);
    assert!(vm.client.identity().is_err() && !vm.client.is_of_use(), "the older connection is closed");
    vm.client = again;
    assert_eq!(earlier(&mut vm), EarlierPeer::None, "there is no other");
    assert_eq!(host.control().status().expect("status").vms, 1);
    // By the next service too, which can't know of others.
    service.signal(9);
    service.end(LIMIT);
    let _service = host.serve(&[]);
    assert!(!vm.client.is_of_use());
    vm.client = host.register(&vm.process, &vm.customer, &vm.name, vm.file);
    assert_eq!(earlier(&mut vm), EarlierPeer::Unknown);
    assert_eq!(earlier(&mut host.vm("acme", "payroll")), EarlierPeer::Lives);
}

#[test]
fn a_service_that_ends_without_vms_forgets_nobody() {
    let host = Host::booted();
    let service = host.ready();
    host.vm("acme", "payroll").end();
    service.signal(15);
    service.end(LIMIT).good();
    let _service = host.serve(&[]);
    assert_eq!(earlier(&mut host.vm("acme", "payroll")), EarlierPeer::None);
}

#[test]
fn a_record_that_was_written_but_not_extended_does_not_count() {
    let host = Host::booted();
    let service = host.ready();
    service.signal(9);
    service.end(LIMIT);
    let path = host.path("run/layers.log");
    let whole = fs::read(&path).expect("a log");
    let mut log = LayerLog::parse(&whole).expect("a good log");
    let record = log.layer("more", "", Digest::of(b"more")).expect("fits");
    log.append(record);
    fs::write(&path, log.as_bytes()).expect("written");
    let _service = host.serve(&[]);
    let mut vm = host.vm("acme", "payroll");
    let quoted = vm.client.quote(&quote(1, &ALL, None)).expect("a quote");
    assert_eq!(quoted.layer_log.0, whole);
    common::verify(&host, &mut vm, 1, &ALL, &quoted);
}

#[test]
fn a_new_boot_begins_a_new_layer_log() {
    let mut host = Host::booted();
    let service = host.ready();
    service.signal(9);
    service.end(LIMIT);
    host.tpm.reset();
    host.play(&fealty_tests::firmware::Boot::with_version("another"));
    let _service = host.serve(&[]);
    let status = host.control().status().expect("status");
    assert!(status.layers.is_empty() && !status.sealed);
    let mut vm = host.vm("acme", "payroll");
    let (reason, _) = refused(vm.client.quote(&quote(1, &ALL, None)));
    assert!(reason.contains("not sealed"), "{reason}");
    host.measure();
    let quoted = vm.client.quote(&quote(1, &ALL, None)).expect("a quote");
    assert_eq!(quoted.earlier_peer, EarlierPeer::None);
    common::verify(&host, &mut vm, 1, &ALL, &quoted);
}

#[test]
fn what_can_not_start_says_why_in_one_line() {
    let host = Host::bare();
    let one_line = |ended: fealty_tests::process::Ended, needle: &str| {
        assert_eq!(ended.code, Some(1), "{}", ended.err);
        assert!(ended.err.contains(needle) && ended.err.trim().lines().count() == 1, "{}", ended.err);
    };
    fs::write(host.path("firmware.log"), b"").expect("written");
    one_line(host.run(&["tpm"]), "was not started");
    host.play(&fealty_tests::firmware::Boot::default());
    let log = fs::read(host.path("firmware.log")).expect("a log");
    fs::write(host.path("firmware.log"), &log[..log.len() - 1]).expect("written");
    one_line(host.run(&["tpm"]), "firmware log");
    fs::remove_file(host.path("firmware.log")).expect("removed");
    one_line(host.run(&["tpm"]), "firmware.log");
    fs::write(host.path("firmware.log"), log).expect("written");
    fs::set_permissions(host.path("run"), fs::Permissions::from_mode(0o777)).expect("changed");
    one_line(host.run(&["tpm"]), "others may write");
    fs::set_permissions(host.path("run"), fs::Permissions::from_mode(0o700)).expect("changed");
    fs::write(host.path("run/state.json"), "{").expect("written");
    one_line(host.run(&["tpm"]), "state.json");
    let nobody = Command::new(env!("CARGO_BIN_EXE_fealty-host"))
        .args(["tpm", "--tcti", "swtpm:host=127.0.0.1,port=1", "--runtime-dir"])
        .arg(host.path("other"))
        .env("FEALTY_RUNTIME_DIR", host.path("unused"))
        .spawn_ended();
    one_line(nobody, "can't be reached");
    one_line(host.run(&["status"]), "no TPM service runs");
    for tcti in ["tabrmd", "mssim", "swtpm:path=/run/x", "device:", "cmd:sh"] {
        let ended = Command::new(env!("CARGO_BIN_EXE_fealty-host")).args(["tpm", "--tcti", tcti]).spawn_ended();
        assert_eq!(ended.code, Some(2), "{tcti}: {}", ended.err);
    }
}

trait SpawnEnded {
    fn spawn_ended(&mut self) -> fealty_tests::process::Ended;
}

impl SpawnEnded for Command {
    fn spawn_ended(&mut self) -> fealty_tests::process::Ended {
        run(self, LIMIT)
    }
}
