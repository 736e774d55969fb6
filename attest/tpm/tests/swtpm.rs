//! Keys and commands of the TPM service against software TPMs, one each.

use attest::tcti::Tcti;
use attest::tpm::pcr::composite;
use attest::tpm::{Attest, Public, Signature, WRAP_PCRS, check_ak, check_ek, check_wrap_key, policy_pcr_digest};
use fealty_attest_tpm::{EkChoice, EkKind, HostTpm, Tpm, TpmError};
use fealty_tests::swtpm::Swtpm;
use policy::Digest;
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{
    Auth, Digest as TpmDigest, KeyedHashScheme, PublicBuilder, PublicKeyedHashParameters, SensitiveData,
};

struct Lab {
    _dir: tempfile::TempDir,
    tpm: Swtpm,
    tcti: Tcti,
}

fn bare(banks: &str) -> Lab {
    let dir = tempfile::tempdir().expect("a folder");
    let tpm = Swtpm::start_with(dir.path(), banks);
    let tcti = tpm.tcti().parse().expect("a TCTI string");
    Lab { _dir: dir, tpm, tcti }
}

fn started() -> Lab {
    let lab = bare("sha256");
    Tpm::start_up(&lab.tcti).expect("TPM2_Startup");
    lab
}

fn own_point(public: &[u8]) -> [u8; 65] {
    Public::parse(public).expect("a public area").p256_point().expect("a point")
}

#[test]
fn keys_of_each_kind_do_what_they_must() {
    let lab = started();
    for (kind, certificate) in [
        (EkKind::P384, Some(lab.tpm.ek_certificate())),
        (EkKind::Rsa2048, Some(lab.tpm.rsa_ek_certificate())),
        (EkKind::P256, None),
    ] {
        let mut host = HostTpm::open(&lab.tcti, EkChoice::Kind(kind)).expect("opens");
        let identity = host.identity().clone();
        assert_eq!(identity.ek_certificate, certificate.map(|path| std::fs::read(path).expect("a file")), "{kind}");
        let ek = Public::parse(&identity.ek_public).expect("an EK");
        let ak = Public::parse(&identity.ak_public).expect("an AK");
        check_ek(&ek).expect("a good EK");
        check_ak(&ak).expect("a good AK");

        let pcrs = host.tpm().pcr_read(&WRAP_PCRS).expect("PCRs");
        let quote = host.quote(&Digest::of(b"qualifying"), &WRAP_PCRS).expect("a quote");
        assert_eq!(quote.pcr_digest, composite(&WRAP_PCRS, &pcrs));
        let signature = Signature::parse(&quote.signed.signature).expect("a signature");
        signature.verify(&ak, &quote.signed.attest, "quote").expect("by the AK");
        let said = Attest::parse(&quote.signed.attest).expect("TPMS_ATTEST");
        assert_eq!(said.extra_data, Digest::of(b"qualifying").as_bytes());
        assert_eq!((said.clock.reset_count, said.clock.restart_count), (quote.boot.reset, quote.boot.restart));

        assert_eq!(host.ecdh(&[4; 65]), Err(TpmError::PcrsChanged), "no wrap key yet");
        let wrap = host.make_wrap_key().expect("a wrap key");
        let public = Public::parse(&wrap.public).expect("a key");
        check_wrap_key(&public, &policy_pcr_digest(&WRAP_PCRS, &pcrs)).expect("a good wrap key");
        let shared = host.ecdh(&own_point(&wrap.public)).expect("ECDH");
        host.arm().expect("armed");
        assert_eq!(host.ecdh(&own_point(&wrap.public)), Ok(shared));
        assert_eq!(host.make_wrap_key().expect("again").public, wrap.public, "the same values, the same key");

        let credential = attest::tpm::make_credential(&ek, &ak.name(), &[5; 32]).expect("made");
        assert_eq!(host.activate(&credential.blob, &credential.secret), Ok(vec![5; 32]), "{kind}");
        assert_eq!(host.activate(&[0, 2, 1, 2], &[0, 2, 1, 2]), Err(TpmError::WrongCredential));
        assert_eq!(host.tpm().loaded(), Ok(5), "three objects, two sessions, whatever failed");
        host.shut_down().expect("TPM2_Shutdown");
    }
}

#[test]
fn the_ak_is_the_same_after_each_start_and_the_wrap_key_is_not() {
    let mut lab = started();
    let mut host = HostTpm::open(&lab.tcti, EkChoice::Certified).expect("opens");
    let (identity, boot) = (host.identity().clone(), host.boot());
    assert_eq!(identity.ek_kind, EkKind::P384, "the strongest that has a certificate");
    let wrap = host.make_wrap_key().expect("a wrap key").public;
    host.shut_down().expect("TPM2_Shutdown");
    HostTpm::reopen(&lab.tcti, &identity, boot).expect("the same TPM in the same boot").shut_down().expect("shut down");
    lab.tpm.reset();
    assert!(matches!(HostTpm::open(&lab.tcti, EkChoice::Certified), Err(TpmError::NotStarted)));
    Tpm::start_up(&lab.tcti).expect("TPM2_Startup");
    assert!(matches!(HostTpm::reopen(&lab.tcti, &identity, boot), Err(TpmError::Reset)));
    let mut host = HostTpm::open(&lab.tcti, EkChoice::Certified).expect("opens");
    assert_eq!(host.identity(), &identity);
    assert_eq!(host.boot().reset, boot.reset + 1);
    assert_ne!(host.make_wrap_key().expect("a wrap key").public, wrap);
    let other = started();
    assert!(matches!(HostTpm::reopen(&other.tcti, &identity, boot), Err(TpmError::Exchanged)));
}

#[test]
fn attack_25_an_extend_between_policy_and_use_is_retried_or_refused() {
    let lab = started();
    let mut host = HostTpm::open(&lab.tcti, EkChoice::Certified).expect("opens");
    let wrap = host.make_wrap_key().expect("a wrap key");
    let point = own_point(&wrap.public);
    host.arm().expect("armed");
    // IMA's PCR: no part of the policy, but it makes the TPM forget what was satisfied.
    host.tpm().pcr_extend(10, &Digest::of(b"file")).expect("extended");
    host.ecdh(&point).expect("retried");
    host.arm().expect("armed");
    host.tpm().pcr_extend(14, &Digest::of(b"layer")).expect("extended");
    for _ in 0..2 {
        assert_eq!(host.ecdh(&point), Err(TpmError::PcrsChanged));
    }
    let next = host.make_wrap_key().expect("a wrap key for the new values");
    assert_ne!(next.public, wrap.public);
    host.ecdh(&point).expect("it works");
}

#[test]
fn attack_50_lockout_stops_others_not_us() {
    let lab = started();
    let mut host = HostTpm::open(&lab.tcti, EkChoice::Certified).expect("opens");
    let before = host.tpm().lockout().expect("counted");
    assert!(!before.locked);
    host.shut_down().expect("shut down");
    lock_out(&lab.tcti, before.limit + 1);
    let mut host = HostTpm::open(&lab.tcti, EkChoice::Certified).expect("opens");
    assert!(host.tpm().lockout().expect("counted").locked, "the test must lock the TPM out");
    let (ek, ak) = (host.identity().ek_public.clone(), host.identity().ak_public.clone());
    let wrap = host.make_wrap_key().expect("a wrap key");
    host.quote(&Digest::of(b"x"), &WRAP_PCRS).expect("a quote");
    host.ecdh(&own_point(&wrap.public)).expect("ECDH");
    let ek = Public::parse(&ek).expect("an EK");
    let ak = Public::parse(&ak).expect("an AK");
    let credential = attest::tpm::make_credential(&ek, &ak.name(), &[5; 32]).expect("made");
    assert_eq!(host.activate(&credential.blob, &credential.secret), Ok(vec![5; 32]));
}

/// Guesses the password of an object that is not exempt until the TPM is locked out.
fn lock_out(tcti: &Tcti, guesses: u32) {
    let conf = tcti.to_string().parse().expect("a TCTI string");
    let mut context = tss_esapi::Context::new(conf).expect("the TPM");
    let attributes = tss_esapi::attributes::ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_user_with_auth(true)
        .build()
        .expect("attributes");
    let sealed = PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::KeyedHash)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_keyed_hash_parameters(PublicKeyedHashParameters::new(KeyedHashScheme::Null))
        .with_keyed_hash_unique_identifier(TpmDigest::default())
        .build()
        .expect("a template");
    context.set_sessions((Some(AuthSession::Password), None, None));
    let password = Auth::try_from(b"right".to_vec()).expect("short");
    let data = SensitiveData::try_from(b"x".to_vec()).expect("short");
    let made = context.create_primary(Hierarchy::Owner, sealed, Some(password), Some(data), None, None).expect("made");
    context.tr_set_auth(made.key_handle.into(), Auth::try_from(b"wrong".to_vec()).expect("short")).expect("set");
    for _ in 0..guesses {
        assert!(context.unseal(made.key_handle.into()).is_err());
    }
}

#[test]
fn attack_13_14_a_tpm_without_an_active_sha256_bank_is_told() {
    let lab = bare("sha384");
    let mut tpm = Tpm::start_up(&lab.tcti).expect("TPM2_Startup");
    assert_eq!(tpm.pcr_read(&[0]), Err(TpmError::NoSha256));
    drop(tpm);
    let mut host = HostTpm::open(&lab.tcti, EkChoice::Certified).expect("opens");
    assert_eq!(host.tpm().pcr_read(&WRAP_PCRS), Err(TpmError::NoSha256));
}

#[test]
fn what_a_dead_client_left_is_flushed() {
    let lab = started();
    {
        let conf = lab.tpm.tcti().parse().expect("a TCTI string");
        let mut context = std::mem::ManuallyDrop::new(tss_esapi::Context::new(conf).expect("the TPM"));
        for kind in [tss_esapi::constants::SessionType::Hmac, tss_esapi::constants::SessionType::Policy] {
            let cipher = tss_esapi::structures::SymmetricDefinition::AES_128_CFB;
            context.start_auth_session(None, None, None, kind, cipher, HashingAlgorithm::Sha256).expect("a session");
        }
    }
    {
        let host = HostTpm::open(&lab.tcti, EkChoice::Certified).expect("opens");
        std::mem::forget(host);
    }
    let mut tpm = Tpm::open(&lab.tcti).expect("opens");
    assert_eq!(tpm.loaded(), Ok(0));
}

#[test]
fn a_tpm_that_is_not_there_is_away() {
    let mut lab = bare("sha256");
    lab.tpm.power_off();
    assert!(matches!(Tpm::open(&lab.tcti), Err(TpmError::Away(_))));
    let missing: Tcti = "device:/dev/no-such-tpm".parse().expect("a TCTI string");
    assert!(matches!(Tpm::open(&missing), Err(TpmError::Away(_))));
}
