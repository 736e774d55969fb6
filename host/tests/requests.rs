//! The five requests of a VM process, against a real software TPM.
mod common;

use attest::tpm::attested::Attested;
use attest::tpm::{Attest, Public, Signature, WRAP_PCRS, check_wrap_key, make_credential, policy_pcr_digest};
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey, UnparsedPublicKey, agree};
use common::{Host, quote, refused, verify};
use policy::instance::EarlierPeer;

const ALL: [u8; 9] = [0, 1, 2, 3, 4, 5, 6, 7, 14];

#[test]
fn a_vm_attests_and_uses_the_wrap_key() {
    let host = Host::booted();
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");

    let identity = vm.client.identity().expect("identity");
    let ek = Public::parse(&identity.ek_public).expect("an EK");
    attest::tpm::check_ek(&ek).expect("a good EK");
    assert_eq!(identity.host, ek.host_id());
    let file = std::fs::read(host.tpm.ek_certificate()).expect("the CA's copy");
    assert_eq!(identity.ek_certificate.map(|c| c.0), Some(file));

    let ak = Public::parse(&identity.ak_public).expect("an AK");
    let credential = make_credential(&ek, &ak.name(), &[7; 32]).expect("made");
    assert_eq!(vm.client.activate(&credential).expect("activated"), [7; 32]);

    let wrap_key = vm.client.certify_wrap_key().expect("a wrap key");
    let quoted = vm.client.quote(&quote(1, &ALL, None)).expect("a quote");
    verify(&host, &mut vm, 1, &ALL, &quoted);
    assert_eq!(quoted.wrap_key, wrap_key);
    assert_eq!(quoted.earlier_peer, EarlierPeer::None);
    assert!(quoted.ima_log.is_empty());

    let wrap = Public::parse(&wrap_key.public).expect("a key");
    let replay = host.replay(&quoted.layer_log);
    check_wrap_key(&wrap, &policy_pcr_digest(&WRAP_PCRS, &replay.pcrs)).expect("a good wrap key");
    let certification = Attest::parse(&wrap_key.certify).expect("TPMS_ATTEST");
    Signature::parse(&wrap_key.signature).and_then(|s| s.verify(&ak, &wrap_key.certify, "wrap key")).expect("signed");
    let null_hierarchy = wrap.qualified_name_in(0x4000_0007);
    assert_eq!(certification.attested, Attested::Certify { name: wrap.name(), qualified_name: null_hierarchy });
    let boot = Attest::parse(&quoted.quote).expect("TPMS_ATTEST").clock;
    assert_eq!(certification.clock.reset_count, boot.reset_count);
    assert_eq!(certification.clock.restart_count, boot.restart_count);

    let mine = PrivateKey::generate(&ECDH_P256).expect("a key");
    let point = mine.compute_public_key().expect("its point").as_ref().try_into().expect("65 bytes");
    let shared = vm.client.ecdh(&point).expect("ECDH");
    let theirs = UnparsedPublicKey::new(&ECDH_P256, wrap.p256_point().expect("a point"));
    let expected = agree(&mine, theirs, (), |x| Ok(x.to_vec())).expect("agreed");
    assert_eq!(shared[1..33], expected);
}

#[test]
fn every_kind_of_endorsement_key_serves() {
    let host = Host::booted();
    for (kind, certified) in [("rsa-2048", true), ("p-256", false), ("p-384", true)] {
        let service = host.serve(&["--ek", kind]);
        let mut vm = host.vm("acme", "payroll");
        let identity = vm.client.identity().expect("identity");
        assert_eq!(identity.ek_certificate.is_some(), certified, "{kind}");
        let ek = Public::parse(&identity.ek_public).expect("an EK");
        let ak = Public::parse(&identity.ak_public).expect("an AK");
        let credential = make_credential(&ek, &ak.name(), &[3; 16]).expect("made");
        assert_eq!(vm.client.activate(&credential).expect("activated"), [3; 16], "{kind}");
        service.signal(15);
        service.end(common::LIMIT).good();
    }
}

#[test]
fn quotes_cover_ima_from_where_it_is_asked() {
    let host = Host::booted();
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    let with_ima = [0, 1, 2, 3, 4, 5, 6, 7, 10, 14];
    let quoted = vm.client.quote(&quote(1, &with_ima, Some(0))).expect("a quote");
    assert_eq!(quoted.ima_log.0, std::fs::read(host.path("ima.log")).expect("the log"));
    verify(&host, &mut vm, 1, &with_ima, &quoted);
    let end = quoted.ima_log.len() as u64;
    let later = vm.client.quote(&quote(2, &with_ima, Some(end))).expect("a quote");
    assert!(later.ima_log.is_empty());
    assert_eq!(later.ima_offset, end);
    // From beyond its end the key provider asks after a reboot, by the log of the boot before: the whole log tells it.
    let whole = vm.client.quote(&quote(3, &with_ima, Some(end + 1))).expect("a quote");
    assert_eq!((whole.ima_offset, &whole.ima_log), (0, &quoted.ima_log));
    verify(&host, &mut vm, 3, &with_ima, &whole);
    // IMA's log says that something was measured, the TPM does not: claims without measurement get no quote.
    let mut log = attest::eventlog::ImaLog::new();
    log.entry("/bin/sh", &policy::Digest::of(b"sh"));
    let forged = [&quoted.ima_log.0[..], log.as_bytes()].concat();
    std::fs::write(host.path("ima.log"), forged).expect("written");
    let (_, again) = refused(vm.client.quote(&quote(4, &with_ima, Some(0))));
    assert!(again);
}

#[test]
fn attack_13_selections_that_prove_nothing_are_refused() {
    let host = Host::booted();
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    for pcrs in [&[][..], &[24], &[0, 0], &[7, 0], &[255]] {
        let (reason, again) = refused(vm.client.quote(&quote(1, pcrs, None)));
        assert!(reason.contains("PCRs to quote") && !again, "{reason}");
    }
    // PCRs beyond those of the wrap key are quoted as they are.
    let quoted = vm.client.quote(&quote(1, &[0, 11, 23], None)).expect("a quote");
    assert_eq!(quoted.pcr_values.len(), 3);
}

#[test]
fn bad_requests_change_nothing() {
    let host = Host::booted();
    let _service = host.ready();
    let mut vm = host.vm("acme", "payroll");
    let attest::service::VmRequest::Quote { nonce, attestation, operation, client_key, pin, pcrs, claims, .. } =
        quote(1, &ALL, None)
    else {
        panic!("a quote")
    };
    let short = attest::service::VmRequest::Quote {
        bundle_key: [9; 31][..].into(),
        ima_offset: None,
        nonce,
        attestation,
        operation,
        client_key,
        pin,
        pcrs,
        claims,
    };
    refused(vm.client.quote(&short));
    for point in [[0; 65], [4; 65], [0xff; 65]] {
        let (reason, again) = refused(vm.client.ecdh(&point));
        assert!(reason.contains("P-256") && !again, "{reason}");
    }
    for size in [0, 1, 2, 300, 4000] {
        let bytes: policy::Base64Url = vec![0xff; size].into();
        let credential = attest::protocol::Credential { blob: bytes.clone(), secret: bytes };
        let (reason, _) = refused(vm.client.activate(&credential));
        assert!(reason.contains("credential"), "{reason}");
    }
    vm.client.quote(&quote(1, &ALL, None)).expect("still serves");
}
