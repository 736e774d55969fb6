//! Attacks on evidence, each against one check: the evidence is good but for what the attacker changed.

use super::*;
use crate::eventlog::{FirmwareLog, LayerLog, tcg};
use crate::testing::{AK_ATTRIBUTES, Asked, SoftAk, SoftHost, SoftKey, WRAP_ATTRIBUTES, other_name};
use crate::tpm::pcr::Selection;
use crate::tpm::public::attribute as a;

fn expected<'e>(host: &'e SoftHost, asked: &'e Asked) -> Expected<'e> {
    Expected {
        nonce: &asked.nonce,
        attestation: &asked.attestation,
        host: &asked.host,
        customer: &asked.customer,
        vm: &asked.vm,
        operation: &asked.operation,
        client_key: &asked.client_key,
        pin: &asked.pin,
        pcrs: &asked.pcrs,
        ak_public: host.ak.public.as_bytes(),
        ima: asked.pcrs.contains(&IMA_PCR).then_some(ImaState::START),
    }
}

fn judge(host: &SoftHost, asked: &Asked, evidence: &Evidence) -> Result<VerifiedEvidence, VerifyError> {
    verify(evidence, &expected(host, asked))
}

#[test]
fn good_evidence_holds() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let verified = judge(&host, &asked, &host.evidence(&asked)).expect("holds");
    assert_eq!(verified.state.pcrs.keys().copied().collect::<Vec<_>>(), asked.pcrs);
    let names: Vec<_> = verified.state.measurements.iter().filter_map(|m| m.layer.as_deref()).collect();
    assert_eq!(names, ["fealty-host", "fealty"]);
    assert_eq!((verified.clock.reset_count, verified.ima), (7, None));
    assert_eq!(verified.wrap_key.name(), host.wrap.public().name());
}

#[test]
fn good_evidence_with_an_ima_log_holds_and_continues() {
    let (host, mut asked) = (SoftHost::new(), Asked::new());
    asked.pcrs = vec![0, 4, 7, 10, 14];
    let first = judge(&host, &asked, &host.evidence(&asked)).expect("holds");
    let after = first.ima.expect("replayed");
    assert_eq!(after.offset, host.ima.len() as u64);
    let empty = host.evidence_with(&asked, |e| {
        e.ima_log = vec![].into();
        e.ima_offset = after.offset;
    });
    let next = Expected { ima: Some(after), ..expected(&host, &asked) };
    assert_eq!(verify(&empty, &next).map(|v| v.ima), Ok(Some(after)));
    assert_eq!(judge(&host, &asked, &empty), Err(VerifyError::ImaOffset));
    // The whole log once more, as after a reset.
    assert_eq!(verify(&host.evidence(&asked), &next).map(|v| v.ima), Ok(Some(after)));
}

#[test]
fn attack_01_03_a_quote_for_another_nonce_is_refused() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let mut old = asked.clone();
    old.nonce = Nonce([2; 32]);
    assert_eq!(judge(&host, &asked, &host.evidence(&old)), Err(VerifyError::Qualifying));
    // No qualifying data at all.
    let mut evidence = host.evidence(&asked);
    let mut quote = host.quote(&asked, &evidence);
    quote.extra_data.clear();
    host.set_quote(&mut evidence, &quote);
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Qualifying));
}

#[test]
fn attack_11_12_47_a_quote_for_anything_else_is_refused() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let others: [fn(&mut Asked); 7] = [
        |a| a.attestation = AttestationId([9; 16]),
        |a| a.host = HostId(Digest::of(b"another host")),
        |a| a.customer = "other".parse().expect("label"),
        |a| a.vm = "other".parse().expect("label"),
        |a| a.client_key = Digest::of(b"another key"),
        |a| a.pin = Digest::of(b"another ca"),
        |a| a.operation.parameters = [("x".to_owned(), "y".to_owned())].into(),
    ];
    for (index, change) in others.iter().enumerate() {
        let mut other = asked.clone();
        change(&mut other);
        let mut evidence = host.evidence(&other);
        evidence.operation = asked.operation.clone();
        assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Qualifying), "{index}");
    }
}

#[test]
fn attack_12_fields_changed_after_the_quote_are_refused() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let changes: [fn(&mut Evidence); 5] = [
        |e| e.bundle_key = vec![7; 32].into(),
        |e| e.vm_file = Digest::of(b"older file"),
        |e| e.earlier_peer = EarlierPeer::Unknown,
        |e| e.claims = br#"{"key_memory":"memfd-secret","ptrace_scope":3} "#.to_vec().into(),
        |e| e.ima_offset = 1,
    ];
    for (index, change) in changes.iter().enumerate() {
        let mut evidence = host.evidence(&asked);
        change(&mut evidence);
        assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Qualifying), "{index}");
    }
    let mut evidence = host.evidence(&asked);
    evidence.operation.parameters.insert("x".into(), "y".into());
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Contradiction("operation")));
    let mut evidence = host.evidence(&asked);
    evidence.version = 2;
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Version(2)));
}

#[test]
fn attack_04_a_quote_of_another_tpm_is_refused() {
    let (good, bad, asked) = (SoftHost::new(), SoftHost::new(), Asked::new());
    let evidence = bad.evidence(&asked);
    assert!(matches!(judge(&good, &asked, &evidence), Err(VerifyError::Structure("quote", TpmError::Signature(_)))));
    // The wrap key certified by another TPM.
    let mut evidence = good.evidence(&asked);
    bad.set_certify(&mut evidence, &good.certify());
    assert!(matches!(judge(&good, &asked, &evidence), Err(VerifyError::Structure(_, TpmError::Signature(_)))));
}

#[test]
fn attack_06_an_ak_that_signs_anything_is_refused() {
    let asked = Asked::new();
    for attributes in [AK_ATTRIBUTES & !a::RESTRICTED, AK_ATTRIBUTES & !a::FIXED_TPM, AK_ATTRIBUTES | a::DECRYPT] {
        let host = SoftHost { ak: SoftAk::with(attributes), ..SoftHost::new() };
        assert!(matches!(judge(&host, &asked, &host.evidence(&asked)), Err(VerifyError::Key(_))));
    }
    // Bytes that no TPM made, properly signed.
    let host = SoftHost::new();
    let mut evidence = host.evidence(&asked);
    let mut forged = evidence.quote.0.clone();
    forged[0] = 0;
    evidence.quote_signature = host.ak.sign(&forged).into();
    evidence.quote = forged.into();
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Structure("quote", TpmError::Magic)));
}

#[test]
fn attack_06_an_attestation_of_another_kind_is_refused() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let mut evidence = host.evidence(&asked);
    let quote = host.quote(&asked, &evidence);
    let as_quote = Attest { extra_data: quote.extra_data.clone(), ..host.certify() };
    host.set_quote(&mut evidence, &as_quote);
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Kind("quote")));
    let mut evidence = host.evidence(&asked);
    host.set_certify(&mut evidence, &quote);
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Kind("wrap key's certification")));
}

#[test]
fn an_ak_outside_the_endorsement_hierarchy_is_refused() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let mut evidence = host.evidence(&asked);
    let elsewhere = host.ak.public.qualified_name_in(0x4000_0001);
    let quote = Attest { qualified_signer: elsewhere, ..host.quote(&asked, &evidence) };
    host.set_quote(&mut evidence, &quote);
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Signer("quote")));
}

#[test]
fn attack_13_other_pcrs_more_banks_and_inactive_banks_are_refused() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let selections = [
        vec![],
        vec![Selection::sha256(&[])],
        vec![Selection::sha256(&[0, 4, 7])],
        vec![Selection::sha256(&[0, 1, 4, 7, 14])],
        vec![Selection { bank: 4, ..Selection::sha256(&asked.pcrs) }],
        vec![Selection { bank: 0x0c, ..Selection::sha256(&asked.pcrs) }],
        vec![Selection::sha256(&asked.pcrs), Selection { bank: 4, map: vec![0, 0, 0] }],
        vec![Selection { map: vec![0x91, 0x40], ..Selection::sha256(&[]) }],
    ];
    for selection in selections {
        let mut evidence = host.evidence(&asked);
        let mut quote = host.quote(&asked, &evidence);
        let Attested::Quote { selection: place, .. } = &mut quote.attested else { panic!("a quote") };
        place.clone_from(&selection);
        host.set_quote(&mut evidence, &quote);
        assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Selection), "{selection:?}");
    }
    let nothing = Asked { pcrs: vec![], ..asked };
    assert_eq!(judge(&host, &nothing, &host.evidence(&nothing)), Err(VerifyError::Selection));
}

/// The firmware log's records, to be put together anew.
fn records(host: &SoftHost) -> (Vec<u8>, Vec<Vec<u8>>) {
    let log = &host.firmware;
    let mut cuts: Vec<usize> = tcg::parse(log, "firmware").expect("good").iter().map(|e| e.offset).collect();
    cuts.push(log.len());
    let records = cuts.windows(2).map(|w| log[w[0]..w[1]].to_vec()).collect();
    (log[..cuts[0]].to_vec(), records)
}

#[test]
fn attack_16_a_log_that_lacks_repeats_adds_or_reorders_an_entry_is_refused() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let (head, records) = records(&host);
    let judge_log = |log: Vec<u8>| judge(&host, &asked, &host.evidence_with(&asked, |e| e.firmware_log = log.into()));
    let put = |parts: &[&[u8]]| [&head[..], &parts.concat()].concat();
    let all: Vec<&[u8]> = records.iter().map(Vec::as_slice).collect();
    assert!(judge_log(put(&all)).is_ok());

    assert_eq!(judge_log(put(&all[1..])), Err(VerifyError::Pcr(0)));
    let mut repeated = all.clone();
    repeated.insert(1, all[1]);
    assert_eq!(judge_log(put(&repeated)), Err(VerifyError::Pcr(4)));
    let added = tcg::record(7, 8, &Digest::of(b"more"), b"more");
    let mut more = all.clone();
    more.push(&added);
    assert_eq!(judge_log(put(&more)), Err(VerifyError::Pcr(7)));
    // The event of PCR 0 after its separator.
    let mut reordered = all[1..].to_vec();
    reordered.push(all[0]);
    assert_eq!(judge_log(put(&reordered)), Err(VerifyError::Pcr(0)));
}

#[test]
fn attack_16_without_pcr_values_a_wrong_log_is_refused_all_the_same() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let (head, records) = records(&host);
    let cut = [head, records[1..].concat()].concat();
    let evidence = host.evidence_with(&asked, |e| {
        e.firmware_log = cut.clone().into();
        e.pcr_values.clear();
    });
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Composite));
    let lying = host.evidence_with(&asked, |e| {
        e.firmware_log = cut.into();
        e.pcr_values[0] = Digest([1; 32]);
    });
    assert_eq!(judge(&host, &asked, &lying), Err(VerifyError::Values));
}

#[test]
fn attack_16_a_layer_log_with_another_layer_is_refused() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let mut other = LayerLog::new();
    let record = other.layer("fealty", "1.0", Digest::of(b"another vmm")).expect("fits");
    other.append(record);
    let seal = other.seal();
    other.append(seal);
    let evidence = host.evidence_with(&asked, |e| e.layer_log = other.as_bytes().into());
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Pcr(14)));
}

#[test]
fn attack_14_pcrs_that_firmware_left_alone_are_zero_in_the_verdict() {
    // A TPM whose boot PCRs nobody extended, with the log of a good boot, and with an honest empty one.
    let (mut host, asked) = (SoftHost::new(), Asked::new());
    host.pcrs.retain(|pcr, _| *pcr > 7);
    assert_eq!(judge(&host, &asked, &host.evidence(&asked)), Err(VerifyError::Pcr(0)));
    host.firmware = FirmwareLog::new().as_bytes().to_vec();
    let policy = policy_pcr_digest(&WRAP_PCRS, &host.pcrs);
    host.wrap = SoftKey::with(WRAP_ATTRIBUTES, policy.as_bytes());
    let verified = judge(&host, &asked, &host.evidence(&asked)).expect("nothing is false in it");
    // Which is why reference values refuse all-zero PCRs.
    assert_eq!(verified.state.pcrs[&0], Digest([0; 32]));
}

#[test]
fn attack_21_a_forged_or_foreign_ima_log_is_refused() {
    let (host, mut asked) = (SoftHost::new(), Asked::new());
    asked.pcrs = vec![0, 4, 7, 10, 14];
    let mut more = crate::eventlog::ImaLog::new();
    more.entry("/tmp/evil", &Digest::of(b"evil"));
    let appended = [&host.ima[..], more.as_bytes()].concat();
    let evidence = host.evidence_with(&asked, |e| e.ima_log = appended.into());
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Pcr(10)));
    let evidence = host.evidence_with(&asked, |e| e.ima_log = vec![].into());
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Log(LogError::BootAggregate)));
    // One that nobody asked for.
    let plain = Asked::new();
    let evidence = host.evidence_with(&plain, |e| e.ima_log = host.ima.clone().into());
    assert_eq!(judge(&host, &plain, &evidence), Err(VerifyError::ImaOffset));
}

#[test]
fn attack_25_51_a_wrap_key_with_another_policy_or_attributes_is_refused() {
    let asked = Asked::new();
    let good = SoftHost::new();
    let policy = policy_pcr_digest(&WRAP_PCRS, &good.pcrs);
    let mut later = good.pcrs.clone();
    later.insert(14, Digest([1; 32]));
    let wraps = [
        SoftKey::with(WRAP_ATTRIBUTES, policy_pcr_digest(&WRAP_PCRS, &later).as_bytes()),
        SoftKey::with(WRAP_ATTRIBUTES, policy_pcr_digest(&[14], &good.pcrs).as_bytes()),
        SoftKey::with(WRAP_ATTRIBUTES, &[]),
        SoftKey::with(WRAP_ATTRIBUTES | a::USER_WITH_AUTH, policy.as_bytes()),
        SoftKey::with(WRAP_ATTRIBUTES | a::SIGN, policy.as_bytes()),
        SoftKey::with(WRAP_ATTRIBUTES & !a::FIXED_TPM, policy.as_bytes()),
        SoftKey::with(WRAP_ATTRIBUTES & !a::SENSITIVE_DATA_ORIGIN, policy.as_bytes()),
    ];
    for (index, wrap) in wraps.into_iter().enumerate() {
        let host = SoftHost { wrap, ..SoftHost::new() };
        assert!(matches!(judge(&host, &asked, &host.evidence(&asked)), Err(VerifyError::Key(_))), "{index}");
    }
}

#[test]
fn attack_28_a_wrap_key_of_another_boot_or_hierarchy_is_refused() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let with = |change: fn(&mut Attest)| {
        let mut evidence = host.evidence(&asked);
        let mut certify = host.certify();
        change(&mut certify);
        host.set_certify(&mut evidence, &certify);
        judge(&host, &asked, &evidence)
    };
    assert!(with(|_| {}).is_ok());
    assert_eq!(with(|c| c.clock.reset_count -= 1), Err(VerifyError::WrapBoot));
    assert_eq!(with(|c| c.clock.restart_count += 1), Err(VerifyError::WrapBoot));
    let name = host.wrap.public().name();
    let certify = |name: crate::tpm::Name, qualified_name| Attested::Certify { name, qualified_name };
    for handle in [hierarchy::ENDORSEMENT, 0x4000_0001, 0x4000_000c] {
        let mut evidence = host.evidence(&asked);
        let attested = certify(name.clone(), host.wrap.public().qualified_name_in(handle));
        host.set_certify(&mut evidence, &Attest { attested, ..host.certify() });
        assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::WrapHierarchy));
    }
    let mut evidence = host.evidence(&asked);
    let attested = certify(other_name(), host.wrap.public().qualified_name_in(hierarchy::NULL));
    host.set_certify(&mut evidence, &Attest { attested, ..host.certify() });
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::WrapName));
}

#[test]
fn attack_26_a_host_with_a_shell_is_refused_as_untrusted() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let mut log = LayerLog::parse(&host.layers).expect("good");
    let shell = log.shell(Digest::of(b"shell"));
    log.append(shell);
    let evidence = host.evidence_with(&asked, |e| e.layer_log = log.as_bytes().into());
    let refused = judge(&host, &asked, &evidence).expect_err("refused");
    assert_eq!((&refused, refused.problem()), (&VerifyError::Log(LogError::Shell), ProblemType::UntrustedPlatform));
}

#[test]
fn attack_39_oversized_or_garbled_parts_are_refused() {
    let (host, asked) = (SoftHost::new(), Asked::new());
    let changes: [fn(&mut Evidence); 8] = [
        |e| e.firmware_log = vec![0; crate::protocol::LOG_LIMIT + 1].into(),
        |e| e.layer_log = vec![0xff; 100].into(),
        |e| e.wrap_public = vec![0; 10].into(),
        |e| e.wrap_certify = vec![0xff; 60_000].into(),
        |e| e.wrap_signature = vec![].into(),
        |e| e.quote = vec![0; 3].into(),
        |e| e.quote_signature.0.push(0),
        |e| e.bundle_key = vec![6; 31].into(),
    ];
    for (index, change) in changes.iter().enumerate() {
        let mut evidence = host.evidence(&asked);
        change(&mut evidence);
        assert!(judge(&host, &asked, &evidence).is_err(), "{index}");
    }
    let evidence = host.evidence_with(&asked, |e| e.claims = b"{}x".to_vec().into());
    assert_eq!(judge(&host, &asked, &evidence), Err(VerifyError::Claims));
}
