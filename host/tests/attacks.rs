//! Attacks on attestation, as far as the TPM service stands in their way. Numbers are those of the project's list.
mod common;

use attest::eventlog::LayerLog;
use attest::tpm::{Attest, Public, make_credential};
use attest_tpm::Tpm;
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use common::{Host, h, quote, refused};
use fealty_tests::firmware::Boot;
use policy::Digest;
use std::fs;

const ALL: [u8; 9] = [0, 1, 2, 3, 4, 5, 6, 7, 14];

fn point() -> [u8; 65] {
    let key = PrivateKey::generate(&ECDH_P256).expect("a key");
    key.compute_public_key().expect("its point").as_ref().try_into().expect("65 bytes")
}

fn stop(service: fealty_tests::process::Background) {
    service.signal(15);
    service.end(common::LIMIT).good();
}

#[test]
fn attack_05_a_software_ak_is_not_activated() {
    let host = Host::booted();
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    let identity = vm.client.identity().expect("identity");
    let ek = Public::parse(&identity.ek_public).expect("an EK");
    let real = Public::parse(&identity.ak_public).expect("an AK");
    let software =
        Public::ecc(real.attributes, &real.auth_policy, real.symmetric, real.scheme, &point()).expect("well-formed");
    let credential = make_credential(&ek, &software.name(), &[7; 32]).expect("made");
    let (reason, again) = refused(vm.client.activate(&credential));
    assert!(reason.contains("credential") && !again, "{reason}");
}

#[test]
fn attack_12_47_a_vm_process_can_not_attest_as_another_vm() {
    let host = Host::booted();
    let _service = host.ready();
    let mut mine = host.vm("acme", "payroll");
    let mut other = host.vm("rival", "ledger");
    // Whatever the process asks for, H holds what it was registered as.
    let quoted = other.client.quote(&quote(1, &ALL, None)).expect("a quote");
    let id = other.client.identity().expect("identity").host;
    let said = Attest::parse(&quoted.quote).expect("TPMS_ATTEST").extra_data;
    assert_eq!(said, h(1, &id, (&other.customer, &other.name, &other.file), &quoted).as_bytes());
    assert_ne!(said, h(1, &id, (&mine.customer, &mine.name, &mine.file), &quoted).as_bytes());
    let again = mine.client.quote(&quote(1, &ALL, None)).expect("a quote");
    assert_ne!(Attest::parse(&again.quote).expect("TPMS_ATTEST").extra_data, said);
}

#[test]
fn attack_25_extending_pcr_14_ends_the_wrap_key() {
    let host = Host::booted();
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    let before = vm.client.certify_wrap_key().expect("a wrap key");
    vm.client.ecdh(&point()).expect("it works");
    host.control().extend("more", "1", Digest::of(b"more")).expect("measured");
    for answer in [vm.client.ecdh(&point()).map(|_| ()), vm.client.quote(&quote(1, &ALL, None)).map(|_| ())] {
        let (reason, _) = refused(answer);
        assert!(reason.contains("not sealed"), "{reason}");
    }
    host.control().reseal().expect("sealed");
    let after = vm.client.certify_wrap_key().expect("another wrap key");
    assert_ne!(before.public, after.public);
    vm.client.ecdh(&point()).expect("it works");
    let quoted = vm.client.quote(&quote(2, &ALL, None)).expect("a quote");
    common::verify(&host, &mut vm, 2, &ALL, &quoted);
}

#[test]
fn attack_26_no_keys_after_a_support_shell() {
    let host = Host::booted();
    stop(host.ready());
    let path = host.path("run/layers.log");
    let mut log = LayerLog::parse(&fs::read(&path).expect("a log")).expect("a good log");
    {
        let mut tpm = Tpm::open(&host.tcti()).expect("the TPM");
        let shell = log.shell(Digest::of(b"shell"));
        tpm.pcr_extend(14, shell.digest()).expect("extended");
        log.append(shell);
        let seal = log.seal();
        tpm.pcr_extend(14, seal.digest()).expect("extended");
        log.append(seal);
    }
    fs::write(&path, log.as_bytes()).expect("written");
    let _service = host.serve(&[]);
    let mut vm = host.vm("acme", "payroll");
    for answer in [
        vm.client.quote(&quote(1, &ALL, None)).map(|_| ()),
        vm.client.certify_wrap_key().map(|_| ()),
        vm.client.ecdh(&point()).map(|_| ()),
    ] {
        let (reason, again) = refused(answer);
        assert!(reason.contains("support shell") && !again, "{reason}");
    }
    host.run(&["measure", "more=more"]).refused();
}

#[test]
fn attack_26_hiding_the_shell_s_record_shows_in_pcr_14() {
    let host = Host::booted();
    stop(host.ready());
    Tpm::open(&host.tcti()).expect("the TPM").pcr_extend(14, &Digest::of(b"shell")).expect("extended");
    let _service = host.serve(&[]);
    let mut vm = host.vm("acme", "payroll");
    let (reason, again) = refused(vm.client.quote(&quote(1, &ALL, None)));
    assert!(reason.contains("PCR 14") && !again, "{reason}");
    let ended = host.run(&["measure", "more=more"]).refused();
    assert!(ended.err.contains("PCR 14"), "{}", ended.err);
}

#[test]
fn attack_28_the_wrap_key_dies_with_the_boot() {
    let mut host = Host::booted();
    let service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    let before = vm.client.certify_wrap_key().expect("a wrap key");
    let quoted = vm.client.quote(&quote(1, &ALL, None)).expect("a quote");
    stop(service);
    vm.end();
    host.tpm.reset();
    host.play(&Boot::default());
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    let after = vm.client.certify_wrap_key().expect("a wrap key");
    let again = vm.client.quote(&quote(1, &ALL, None)).expect("a quote");
    // The same PCRs, another key: what was sealed to the old one stays sealed.
    let policy = |key: &attest::service::WrapKey| Public::parse(&key.public).expect("a key").auth_policy;
    assert_eq!(policy(&before), policy(&after));
    assert_ne!(before.public, after.public);
    let count = |q: &attest::service::Quoted| Attest::parse(&q.quote).expect("TPMS_ATTEST").clock.reset_count;
    assert!(count(&again) > count(&quoted));
}

#[test]
fn attack_23_a_tpm_that_is_reset_under_the_service_serves_no_more() {
    let mut host = Host::booted();
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    host.tpm.reset();
    // First the TPM is not started; then it is, and its PCRs are even replayed.
    for _ in 0..2 {
        let (reason, _) = refused(vm.client.quote(&quote(1, &ALL, None)));
        assert!(reason.contains("not started") || reason.contains("can't be reached"), "{reason}");
    }
    host.play(&Boot::default());
    for _ in 0..2 {
        let (reason, again) = refused(vm.client.quote(&quote(1, &ALL, None)));
        assert!(reason.contains("reset") && reason.contains("reboot") && !again, "{reason}");
    }
}

#[test]
fn attack_25_a_pcr_that_is_extended_behind_the_service_ends_attestation() {
    let host = Host::booted();
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    vm.client.ecdh(&point()).expect("it works");
    // A software TPM takes commands from others in between; firmware's part of it is played once more.
    Tpm::start_up(&host.tcti()).expect("the TPM").pcr_extend(4, &Digest::of(b"another")).expect("extended");
    let (reason, again) = refused(vm.client.ecdh(&point()));
    assert!(reason.contains("PCRs changed") && !again, "{reason}");
    let (reason, again) = refused(vm.client.quote(&quote(1, &ALL, None)));
    assert!(reason.contains("PCR 4") && reason.contains("reboot") && !again, "{reason}");
}

#[test]
fn attack_21_ima_entries_count_as_far_as_pcr_10_has_them() {
    let host = Host::booted();
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    let with_ima = [0, 1, 2, 3, 4, 5, 6, 7, 10, 14];
    let first = vm.client.quote(&quote(1, &with_ima, Some(0))).expect("a quote");
    let mut entry = attest::eventlog::ImaLog::new();
    let digest = entry.entry("/bin/tool", &Digest::of(b"tool"));
    Tpm::start_up(&host.tcti()).expect("the TPM").pcr_extend(10, &digest).expect("extended");
    // The TPM has it, the log does not yet.
    let (_, again) = refused(vm.client.quote(&quote(2, &with_ima, Some(0))));
    assert!(again);
    fs::write(host.path("ima.log"), [&first.ima_log.0[..], entry.as_bytes()].concat()).expect("written");
    let second = vm.client.quote(&quote(3, &with_ima, Some(0))).expect("a quote");
    common::verify(&host, &mut vm, 3, &with_ima, &second);
    let rest = vm.client.quote(&quote(4, &with_ima, Some(first.ima_log.len() as u64))).expect("a quote");
    assert_eq!(rest.ima_log.0, entry.as_bytes());
    // Never part of the wrap key's policy.
    vm.client.ecdh(&point()).expect("it works");
}
