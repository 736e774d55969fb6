//! Software keys that imitate a TPM's structures, so that tests can break one check at a time.

use crate::eventlog::{FirmwareLog, ImaLog, LayerLog, firmware};
use crate::protocol::{Evidence, PROTOCOL_VERSION, Release};
use crate::qualify::Qualified;
use crate::tpm::attested::{Attested, ClockInfo};
use crate::tpm::pcr::{Selection, composite, policy_pcr_digest};
use crate::tpm::public::{HashAlg, Name, Scheme, Symmetric, attribute as a, hierarchy};
use crate::tpm::wire::Writer;
use crate::tpm::{Attest, Public, Signature, WRAP_PCRS};
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey, UnparsedPublicKey, agree};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair};
use policy::disk::{CipherSuite, VolumeGrant};
use policy::document::PolicyInForce;
use policy::instance::EarlierPeer;
use policy::lease::OnExpiry;
use policy::operation::OperationRequest;
use policy::reference::IMA_PCR;
use policy::{
    AnchorMode, AttestationId, CustomerId, Digest, HostId, InstanceNumber, KeyId, LeaseTerms, Nonce, Operation, VmId,
};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair as Pair};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::collections::BTreeMap;
use std::time::Duration;

pub(crate) fn moment() -> UnixTime {
    // 2026-03-01, within rcgen's default validity (1975 to 4096) and that of the test CA.
    UnixTime::since_unix_epoch(Duration::from_secs(1_772_323_200))
}

pub(crate) fn release() -> Release {
    Release {
        version: PROTOCOL_VERSION,
        customer: "acme".parse().expect("label"),
        vm: "payroll".parse().expect("label"),
        instance: InstanceNumber::try_from(4).expect("number"),
        attestation: AttestationId([5; 16]),
        qualified: Digest::of(b"h"),
        host: HostId(Digest::of(b"host")),
        lab: true,
        cloud: "lab".parse().expect("label"),
        operation: OperationRequest::plain(Operation::PowerOn),
        lease: LeaseTerms { seconds: 60, quiesce_seconds: 10, on_expiry: OnExpiry::Pause },
        unreported_seconds: 3600,
        policy: policy_in_force("acme", 1),
        volumes: vec![],
        keys: vec![],
    }
}

/// A volume, opened for the `open`th time.
pub(crate) fn grant(open: u32) -> VolumeGrant {
    VolumeGrant {
        volume: policy::VolumeId([8; 16]),
        customer: "acme".parse().expect("label"),
        cipher: CipherSuite::Aes256XtsHmacSha256,
        kek_id: KeyId(1),
        key_id: KeyId(2),
        open_number: u64::from(open).try_into().expect("number"),
        anchor: None,
        anchor_mode: AnchorMode::Close,
    }
}

/// Version `version` of a customer's policy, signed with the policy key of this seed.
pub(crate) fn policy_in_force(customer: &str, version: u64) -> PolicyInForce {
    let document = Digest::of(b"a policy");
    let unsigned = PolicyInForce { version, document, signature: vec![].into() };
    let said = unsigned.statement(&customer.parse().expect("label")).signed_bytes();
    PolicyInForce { signature: policy_key().sign(&said).as_ref().into(), ..unsigned }
}

pub(crate) fn policy_key() -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[4; 32]).expect("a key")
}

pub(crate) fn rsa_public() -> Public {
    use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
    let pair = aws_lc_rs::rsa::PrivateDecryptingKey::generate(aws_lc_rs::rsa::KeySize::Rsa2048).expect("random");
    let spki: PublicKeyX509Der<'_> = pair.public_key().as_der().expect("spki");
    let modulus = &spki.as_ref()[33..33 + 256];
    let ek = a::FIXED_TPM | a::FIXED_PARENT | a::SENSITIVE_DATA_ORIGIN | a::RESTRICTED | a::DECRYPT;
    let head = Writer::new().u16(1).u16(0x0b).u32(ek).sized(&[7; 32]).u16(6).u16(128).u16(0x43).u16(0x10);
    Public::parse(&head.u16(2048).u32(0).sized(modulus).finish()).expect("good")
}

/// An ECDH key that plays the TPM's wrap key.
pub(crate) struct SoftKey {
    private: PrivateKey,
    public: Public,
}

impl SoftKey {
    pub(crate) fn wrap() -> Self {
        Self::with(WRAP_ATTRIBUTES, &[9; 32])
    }

    pub(crate) fn with(attributes: u32, policy: &[u8]) -> Self {
        let private = PrivateKey::generate(&ECDH_P256).expect("random");
        let point: [u8; 65] = private.compute_public_key().expect("public").as_ref().try_into().expect("65 bytes");
        let public = Public::ecc(attributes, policy, Symmetric::None, Scheme::None, &point).expect("good");
        Self { private, public }
    }

    pub(crate) fn public(&self) -> &Public {
        &self.public
    }

    /// The shared point; its y coordinate is not needed and left zero.
    pub(crate) fn ecdh(&self, point: &[u8; 65]) -> [u8; 65] {
        let mut out = [0; 65];
        out[0] = 4;
        agree(&self.private, UnparsedPublicKey::new(&ECDH_P256, point), (), |x| {
            out[1..33].copy_from_slice(x);
            Ok(())
        })
        .expect("agrees");
        out
    }
}

/// An endorsement key with a certificate of a CA of its own.
pub(crate) struct SoftEk {
    pub(crate) public: Public,
    pub(crate) certificate: Vec<u8>,
    pub(crate) root: CertificateDer<'static>,
}

impl SoftEk {
    pub(crate) fn new() -> Self {
        let ek = Pair::generate().expect("key");
        let point: [u8; 65] = ek.public_key_raw().try_into().expect("65 bytes");
        let attributes = a::FIXED_TPM | a::FIXED_PARENT | a::SENSITIVE_DATA_ORIGIN | a::RESTRICTED | a::DECRYPT;
        let public = Public::ecc(attributes, &[7; 32], Symmetric::AesCfb(128), Scheme::None, &point).expect("good");
        let ca = Pair::generate().expect("key");
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2060, 1, 1);
        let root = params.self_signed(&ca).expect("signed").der().clone();
        let issuer = Issuer::new(params, ca);
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(vec![2, 23, 133, 8, 1])];
        let certificate = params.signed_by(&ek, &issuer).expect("signed").der().to_vec();
        Self { public, certificate, root }
    }
}

pub(crate) const AK_ATTRIBUTES: u32 =
    a::FIXED_TPM | a::FIXED_PARENT | a::SENSITIVE_DATA_ORIGIN | a::RESTRICTED | a::SIGN | a::USER_WITH_AUTH | a::NO_DA;
pub(crate) const WRAP_ATTRIBUTES: u32 =
    a::FIXED_TPM | a::FIXED_PARENT | a::SENSITIVE_DATA_ORIGIN | a::DECRYPT | a::NO_DA;

/// A signing key that plays an AK.
pub(crate) struct SoftAk {
    pair: EcdsaKeyPair,
    pub(crate) public: Public,
}

impl SoftAk {
    pub(crate) fn with(attributes: u32) -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("random");
        let point: [u8; 65] = pair.public_key().as_ref().try_into().expect("65 bytes");
        let public =
            Public::ecc(attributes, &[], Symmetric::None, Scheme::Ecdsa(HashAlg::Sha256), &point).expect("good");
        Self { pair, public }
    }

    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        let signature = self.pair.sign(&SystemRandom::new(), message).expect("signed");
        Signature::from_fixed(signature.as_ref().try_into().expect("64 bytes")).to_bytes()
    }
}

/// The provider's side of one attestation.
#[derive(Clone)]
pub(crate) struct Asked {
    pub(crate) nonce: Nonce,
    pub(crate) attestation: AttestationId,
    pub(crate) host: HostId,
    pub(crate) customer: CustomerId,
    pub(crate) vm: VmId,
    pub(crate) operation: OperationRequest,
    pub(crate) client_key: Digest,
    pub(crate) pin: Digest,
    pub(crate) pcrs: Vec<u8>,
}

impl Asked {
    pub(crate) fn new() -> Self {
        Self {
            nonce: Nonce([1; 32]),
            attestation: AttestationId([5; 16]),
            host: HostId(Digest::of(b"host")),
            customer: "acme".parse().expect("label"),
            vm: "payroll".parse().expect("label"),
            operation: OperationRequest::plain(Operation::PowerOn),
            client_key: Digest::of(b"client key"),
            pin: Digest::of(b"ca"),
            pcrs: vec![0, 4, 7, 14],
        }
    }
}

/// A host in software: every part can be changed before [`SoftHost::evidence`] signs it.
pub(crate) struct SoftHost {
    pub(crate) ak: SoftAk,
    pub(crate) wrap: SoftKey,
    pub(crate) firmware: Vec<u8>,
    pub(crate) layers: Vec<u8>,
    pub(crate) ima: Vec<u8>,
    /// What the TPM's PCRs hold.
    pub(crate) pcrs: BTreeMap<u8, Digest>,
    pub(crate) clock: ClockInfo,
}

impl SoftHost {
    pub(crate) fn new() -> Self {
        let mut firmware = FirmwareLog::new();
        firmware.event(0, 8, b"firmware 1.0");
        firmware.measured(4, 0x8000_0003, Digest::of(b"kernel"), b"kernel");
        firmware.event(7, 0x8000_0001, b"SecureBoot on");
        for pcr in 0..8 {
            firmware.separator(pcr);
        }
        let mut layers = LayerLog::new();
        for (name, content) in [("fealty-host", &b"host"[..]), ("fealty", b"vmm")] {
            let record = layers.layer(name, "1.0", Digest::of(content)).expect("fits");
            layers.append(record);
        }
        let seal = layers.seal();
        layers.append(seal);
        let mut pcrs = firmware::replay(firmware.as_bytes()).expect("good").pcrs;
        pcrs.insert(14, layers.pcr_value(Digest([0; 32])));
        let mut ima = ImaLog::new();
        let mut pcr10 = Digest([0; 32]);
        for digest in [ima.boot_aggregate(&pcrs), ima.entry("/usr/bin/fealty", &Digest::of(b"vmm"))] {
            pcr10 = crate::tpm::pcr::extend(&pcr10, &digest);
        }
        pcrs.insert(IMA_PCR, pcr10);
        let policy = policy_pcr_digest(&WRAP_PCRS, &pcrs);
        Self {
            ak: SoftAk::with(AK_ATTRIBUTES),
            wrap: SoftKey::with(WRAP_ATTRIBUTES, policy.as_bytes()),
            firmware: firmware.as_bytes().to_vec(),
            layers: layers.as_bytes().to_vec(),
            ima: ima.as_bytes().to_vec(),
            pcrs,
            clock: ClockInfo { clock: 1000, reset_count: 7, restart_count: 0, safe: true },
        }
    }

    /// The quote's statement for `asked`, over `evidence`'s fields.
    pub(crate) fn quote(&self, asked: &Asked, evidence: &Evidence) -> Attest {
        let bundle_key: &[u8; 32] = evidence.bundle_key[..].try_into().expect("32 bytes");
        let qualified = Qualified {
            nonce: &asked.nonce,
            attestation: &asked.attestation,
            host: &asked.host,
            customer: &asked.customer,
            vm: &asked.vm,
            vm_file: &evidence.vm_file,
            operation: &asked.operation,
            bundle_key,
            client_key: &asked.client_key,
            wrap_key_name: &self.wrap.public().name().0,
            earlier_peer: evidence.earlier_peer,
            firmware_log: &evidence.firmware_log,
            layer_log: &evidence.layer_log,
            ima_log: &evidence.ima_log,
            ima_offset: evidence.ima_offset,
            pin: &asked.pin,
            claims: &evidence.claims,
        };
        Attest {
            qualified_signer: self.ak.public.qualified_name_in(hierarchy::ENDORSEMENT),
            extra_data: qualified.digest().as_bytes().to_vec(),
            clock: self.clock,
            firmware_version: 0x2020_0312,
            attested: Attested::Quote {
                selection: vec![Selection::sha256(&asked.pcrs)],
                pcr_digest: composite(&asked.pcrs, &self.pcrs).as_bytes().to_vec(),
            },
        }
    }

    /// The wrap key's certification.
    pub(crate) fn certify(&self) -> Attest {
        Attest {
            qualified_signer: self.ak.public.qualified_name_in(hierarchy::ENDORSEMENT),
            extra_data: vec![],
            clock: self.clock,
            firmware_version: 0x2020_0312,
            attested: Attested::Certify {
                name: self.wrap.public().name(),
                qualified_name: self.wrap.public().qualified_name_in(hierarchy::NULL),
            },
        }
    }

    pub(crate) fn set_quote(&self, evidence: &mut Evidence, quote: &Attest) {
        let bytes = quote.to_bytes();
        evidence.quote_signature = self.ak.sign(&bytes).into();
        evidence.quote = bytes.into();
    }

    pub(crate) fn set_certify(&self, evidence: &mut Evidence, certify: &Attest) {
        let bytes = certify.to_bytes();
        evidence.wrap_signature = self.ak.sign(&bytes).into();
        evidence.wrap_certify = bytes.into();
    }

    /// Good evidence for `asked`, after `change` had its way with the fields that the quote covers.
    pub(crate) fn evidence_with(&self, asked: &Asked, change: impl FnOnce(&mut Evidence)) -> Evidence {
        let with_ima = asked.pcrs.contains(&IMA_PCR);
        let mut evidence = Evidence {
            version: PROTOCOL_VERSION,
            vm_file: Digest::of(b"vm file"),
            operation: asked.operation.clone(),
            activation: None,
            bundle_key: vec![6; 32].into(),
            quote: vec![].into(),
            quote_signature: vec![].into(),
            wrap_public: self.wrap.public().as_bytes().into(),
            wrap_certify: vec![].into(),
            wrap_signature: vec![].into(),
            pcr_values: asked.pcrs.iter().map(|pcr| self.pcrs.get(pcr).copied().unwrap_or(Digest([0; 32]))).collect(),
            earlier_peer: EarlierPeer::None,
            firmware_log: self.firmware.clone().into(),
            layer_log: self.layers.clone().into(),
            ima_log: if with_ima { self.ima.clone().into() } else { vec![].into() },
            ima_offset: 0,
            claims: br#"{"key_memory":"memfd-secret","ptrace_scope":3}"#.to_vec().into(),
        };
        change(&mut evidence);
        let quote = self.quote(asked, &evidence);
        self.set_quote(&mut evidence, &quote);
        self.set_certify(&mut evidence, &self.certify());
        evidence
    }

    pub(crate) fn evidence(&self, asked: &Asked) -> Evidence {
        self.evidence_with(asked, |_| {})
    }
}

/// A name that no key has.
pub(crate) fn other_name() -> Name {
    Name(vec![0, 0x0b, 9, 9])
}

/// Writes seeds for the fuzz targets whose inputs are made of software keys: by hand, when a format changes.
#[test]
#[ignore = "writes tests/corpus anew"]
fn write_corpus() {
    let (host, mut asked) = (SoftHost::new(), Asked::new());
    asked.pcrs = vec![0, 4, 7, 10, 14];
    let evidence = host.evidence(&asked);
    let frame = |message: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        message(&mut bytes);
        bytes
    };
    let request = crate::service::VmRequest::Quote {
        nonce: asked.nonce,
        attestation: asked.attestation,
        operation: asked.operation.clone(),
        bundle_key: vec![6; 32].into(),
        client_key: asked.client_key,
        pin: asked.pin,
        pcrs: asked.pcrs.clone(),
        ima_offset: Some(7),
        claims: evidence.claims.clone(),
    };
    let refused = crate::service::Answer::Refused { reason: "PCR 14 moved".into(), again: true };
    let seed = secretmem::Secret::copy_of(&[1; 32]).expect("memory");
    let receipt = crate::note::Receipt { origin: "keys.example/acme".into(), sequence: 7, event: Digest::of(b"e") };
    let ek = SoftEk::new();
    let dns = b"\xab\xcd\x01\0\0\x01\0\0\0\0\0\0\x04keys\x05local\0\0\x01\0\x01";
    let mut reply = dns.to_vec();
    reply[2] = 0x81;
    reply[7] = 1;
    reply.extend(b"\xc0\x0c\0\x01\0\x01\0\0\0\x09\0\x04\x0a\0\0\x01");
    let bundle_key = crate::bundle::BundleKey::generate().expect("memory");
    let point: [u8; 65] = host.wrap.public().p256_point().expect("P-256");
    let inner = crate::hpke::seal_p256(&point, b"", b"", b"key").expect("sealed");
    let outer = crate::hpke::seal_x25519(bundle_key.public(), b"", b"", &inner).expect("sealed");
    let seeds: [(&str, Vec<u8>); 18] = [
        ("firmware-log/boot", host.firmware.clone()),
        ("layer-log/two-layers", host.layers.clone()),
        ("ima-log/two-entries", host.ima.clone()),
        ("attest/quote", evidence.quote.0.clone()),
        ("attest/certify", evidence.wrap_certify.0.clone()),
        ("public/ak", host.ak.public.as_bytes().to_vec()),
        ("public/wrap", host.wrap.public().as_bytes().to_vec()),
        ("public/rsa", rsa_public().as_bytes().to_vec()),
        ("signature/ecdsa", evidence.quote_signature.0.clone()),
        ("evidence/power-on", serde_json::to_vec(&evidence).expect("json")),
        ("evidence/release", serde_json::to_vec(&release()).expect("json")),
        ("note/receipt", receipt.sign(&seed).expect("signed").into_bytes()),
        ("vm-request/quote", frame(&|out| crate::service::frame::write(out, &request).expect("written"))),
        ("service-answer/refused", frame(&|out| crate::service::frame::write(out, &refused).expect("written"))),
        ("dns-answer/one", [&dns[..], &reply].concat()),
        ("certificate/ek", ek.certificate),
        ("bundle/inner", inner),
        ("bundle/outer", outer),
    ];
    for (name, bytes) in seeds {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        std::fs::write(path, bytes).expect("written");
    }
}
