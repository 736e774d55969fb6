//! A host whose TPM is software keys in TPM structures.

use attest::eventlog::{FirmwareLog, ImaLog, LayerLog, firmware};
use attest::protocol::{Challenge, Credential, Evidence, PROTOCOL_VERSION};
use attest::qualify::Qualified;
use attest::tpm::attested::{Attested, ClockInfo};
use attest::tpm::credential::{kdfa, kdfe};
use attest::tpm::pcr::{Selection, composite, policy_pcr_digest};
use attest::tpm::public::{HashAlg, Scheme, Symmetric, attribute as a, hierarchy};
use attest::tpm::{Attest, Public, Signature, WRAP_PCRS};
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey, UnparsedPublicKey, agree};
use aws_lc_rs::cipher::{AES_128, DecryptingKey, DecryptionContext, UnboundCipherKey};
use aws_lc_rs::encoding::{AsBigEndian, EcPrivateKeyBin};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use policy::instance::EarlierPeer;
use policy::operation::OperationRequest;
use policy::{CustomerId, Digest, HostId, VmId};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair as Pair, PublicKeyData,
};
use std::collections::BTreeMap;

const BORN_INSIDE: u32 = a::FIXED_TPM | a::FIXED_PARENT | a::SENSITIVE_DATA_ORIGIN;
const AK: u32 = BORN_INSIDE | a::RESTRICTED | a::SIGN | a::USER_WITH_AUTH | a::NO_DA;
const EK: u32 = BORN_INSIDE | a::RESTRICTED | a::DECRYPT;
const WRAP: u32 = BORN_INSIDE | a::DECRYPT | a::NO_DA;

/// A maker of TPMs: a certificate authority.
pub(crate) struct Maker {
    issuer: Issuer<'static, Pair>,
    pem: String,
}

impl Maker {
    pub(crate) fn new() -> Self {
        Self::until(2060)
    }

    /// One whose own certificate ends with that year.
    pub(crate) fn until(year: i32) -> Self {
        let key = Pair::generate().expect("key");
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        let pem = params.self_signed(&key).expect("signed").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    fn certify(&self, key: &impl PublicKeyData) -> Vec<u8> {
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Other(vec![2, 23, 133, 8, 1])];
        params.signed_by(key, &self.issuer).expect("signed").der().to_vec()
    }
}

struct Point([u8; 65]);

impl PublicKeyData for Point {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

/// A signing key that plays an AK.
pub(crate) struct SoftAk {
    pair: EcdsaKeyPair,
    pub(crate) public: Public,
}

impl SoftAk {
    pub(crate) fn new() -> Self {
        Self::with(AK)
    }

    pub(crate) fn with(attributes: u32) -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("random");
        let point: [u8; 65] = pair.public_key().as_ref().try_into().expect("65 bytes");
        let scheme = Scheme::Ecdsa(HashAlg::Sha256);
        let public = Public::ecc(attributes, &[], Symmetric::None, scheme, &point).expect("good");
        Self { pair, public }
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let signature = self.pair.sign(&SystemRandom::new(), message).expect("signed");
        Signature::from_fixed(signature.as_ref().try_into().expect("64 bytes")).to_bytes()
    }
}

/// The host. Its logs can be changed before it attests.
pub(crate) struct SoftHost {
    ek: PrivateKey,
    pub(crate) ek_public: Public,
    pub(crate) certificate: Vec<u8>,
    pub(crate) ak: SoftAk,
    wrap: PrivateKey,
    pub(crate) firmware: Vec<u8>,
    pub(crate) layers: Vec<u8>,
    pcrs: BTreeMap<u8, Digest>,
    /// The IMA log, once it has one.
    pub(crate) ima: Vec<u8>,
    pub(crate) clock: ClockInfo,
}

/// What a VM process and its service put into a quote.
pub(crate) struct Statement<'a> {
    pub(crate) customer: CustomerId,
    pub(crate) vm: VmId,
    pub(crate) file: Digest,
    pub(crate) operation: OperationRequest,
    pub(crate) client_key: Digest,
    pub(crate) bundle_key: [u8; 32],
    pub(crate) pin: Digest,
    pub(crate) earlier_peer: EarlierPeer,
    pub(crate) challenge: &'a Challenge,
}

impl SoftHost {
    pub(crate) fn new(maker: &Maker) -> Self {
        Self::running(maker, &[("fealty-host", b"host"), ("fealty", b"vmm")])
    }

    /// A host that runs these layers.
    pub(crate) fn running(maker: &Maker, layers: &[(&str, &[u8])]) -> Self {
        let ek = PrivateKey::generate(&ECDH_P256).expect("random");
        let point = point_of(&ek);
        let ek_public = Public::ecc(EK, &[7; 32], Symmetric::AesCfb(128), Scheme::None, &point).expect("good");
        let certificate = maker.certify(&Point(point));
        let mut host = Self {
            ek,
            ek_public,
            certificate,
            ak: SoftAk::new(),
            wrap: PrivateKey::generate(&ECDH_P256).expect("random"),
            firmware: Vec::new(),
            layers: Vec::new(),
            pcrs: BTreeMap::new(),
            ima: Vec::new(),
            clock: ClockInfo { clock: 1000, reset_count: 7, restart_count: 0, safe: true },
        };
        host.boot(layers);
        host
    }

    /// Boots: firmware, then these layers. A new wrap key, as after each reset.
    pub(crate) fn boot(&mut self, layers: &[(&str, &[u8])]) {
        let mut firmware = FirmwareLog::new();
        firmware.event(0, 8, b"firmware 1.0");
        firmware.measured(4, 0x8000_0003, Digest::of(b"kernel"), b"kernel");
        firmware.event(7, 0x8000_0001, b"SecureBoot on");
        for pcr in 0..8 {
            firmware.separator(pcr);
        }
        let mut log = LayerLog::new();
        for (name, content) in layers {
            let record = log.layer(name, "1.0", Digest::of(content)).expect("fits");
            log.append(record);
        }
        let seal = log.seal();
        log.append(seal);
        self.pcrs = firmware::replay(firmware.as_bytes()).expect("good").pcrs;
        self.pcrs.insert(14, log.pcr_value(Digest([0; 32])));
        self.firmware = firmware.as_bytes().to_vec();
        self.layers = log.as_bytes().to_vec();
        self.wrap = PrivateKey::generate(&ECDH_P256).expect("random");
    }

    /// Begins an IMA log with the boot aggregate.
    pub(crate) fn start_ima(&mut self) {
        self.pcrs.remove(&10);
        self.ima.clear();
        let mut log = ImaLog::new();
        let digest = log.boot_aggregate(&self.pcrs);
        self.extend_ima(&log, digest);
    }

    /// A file was run.
    pub(crate) fn measure(&mut self, path: &str, content: &[u8]) {
        let mut log = ImaLog::new();
        let digest = log.entry(path, &Digest::of(content));
        self.extend_ima(&log, digest);
    }

    fn extend_ima(&mut self, log: &ImaLog, digest: Digest) {
        let before = self.pcrs.get(&10).copied().unwrap_or(Digest([0; 32]));
        self.pcrs.insert(10, attest::tpm::pcr::extend(&before, &digest));
        self.ima.extend_from_slice(log.as_bytes());
    }

    /// Resets: the TPM counts, and keys of the boot before are gone.
    pub(crate) fn reset(&mut self) {
        self.clock.reset_count += 1;
        self.boot(&[("fealty-host", b"host"), ("fealty", b"vmm")]);
    }

    pub(crate) fn id(&self) -> HostId {
        self.ek_public.host_id()
    }

    pub(crate) fn wrap_public(&self) -> Public {
        let policy = policy_pcr_digest(&WRAP_PCRS, &self.pcrs);
        Public::ecc(WRAP, policy.as_bytes(), Symmetric::None, Scheme::None, &point_of(&self.wrap)).expect("good")
    }

    /// TPM2_ECDH_ZGen on the wrap key; y is not needed.
    pub(crate) fn ecdh(&self, point: &[u8; 65]) -> [u8; 65] {
        let mut out = [0; 65];
        out[0] = 4;
        out[1..33].copy_from_slice(&shared_x(&self.wrap, point));
        out
    }

    /// TPM2_ActivateCredential (part 1, sections 24 and C.6.1), for the AK named in `name`.
    pub(crate) fn activate(&self, credential: &Credential, name: &[u8]) -> Option<Vec<u8>> {
        let (x, rest) = sized(credential.secret.get(2..)?)?;
        let (y, _) = sized(rest)?;
        let mut point = [4; 65];
        point[1..33].copy_from_slice(x);
        point[33..].copy_from_slice(y);
        let z = shared_x(&self.ek, &point);
        let own = point_of(&self.ek);
        let seed = kdfe(HashAlg::Sha256, &z, b"IDENTITY", x, &own[1..33], 256);
        let storage = kdfa(HashAlg::Sha256, &seed, b"STORAGE", name, &[], 128);
        let (_, identity) = sized(credential.blob.get(2..)?)?;
        let mut identity = identity.to_vec();
        let key = UnboundCipherKey::new(&AES_128, &storage).ok()?;
        let context = DecryptionContext::Iv128(FixedLength::from([0; 16]));
        let plain = DecryptingKey::cfb128(key).ok()?.decrypt(&mut identity, context).ok()?;
        sized(plain).map(|(secret, _)| secret.to_vec())
    }

    /// Evidence, signed by `ak`.
    pub(crate) fn evidence(&self, ak: &SoftAk, s: &Statement<'_>, activation: Option<Vec<u8>>) -> Evidence {
        let wrap = self.wrap_public();
        let pcrs = &s.challenge.pcrs;
        let ima_offset = s.challenge.ima_offset.unwrap_or(0);
        let from = usize::try_from(ima_offset).expect("in memory").min(self.ima.len());
        let ima_log = if s.challenge.ima_offset.is_some() { self.ima[from..].to_vec() } else { Vec::new() };
        let claims = br#"{"key_memory":"memfd-secret","ptrace_scope":3}"#;
        let qualified = Qualified {
            nonce: &s.challenge.nonce,
            attestation: &s.challenge.id,
            host: &s.challenge.host,
            customer: &s.customer,
            vm: &s.vm,
            vm_file: &s.file,
            operation: &s.operation,
            bundle_key: &s.bundle_key,
            client_key: &s.client_key,
            wrap_key_name: &wrap.name().0,
            earlier_peer: s.earlier_peer,
            firmware_log: &self.firmware,
            layer_log: &self.layers,
            ima_log: &ima_log,
            ima_offset,
            pin: &s.pin,
            claims,
        };
        let statement = |extra_data: Vec<u8>, attested| Attest {
            qualified_signer: ak.public.qualified_name_in(hierarchy::ENDORSEMENT),
            extra_data,
            clock: self.clock,
            firmware_version: 0x2020_0312,
            attested,
        };
        let quote = Attested::Quote {
            selection: vec![Selection::sha256(pcrs)],
            pcr_digest: composite(pcrs, &self.pcrs).as_bytes().to_vec(),
        };
        let quote = statement(qualified.digest().as_bytes().to_vec(), quote).to_bytes();
        let qualified_name = wrap.qualified_name_in(hierarchy::NULL);
        let certify = statement(vec![], Attested::Certify { name: wrap.name(), qualified_name }).to_bytes();
        Evidence {
            version: PROTOCOL_VERSION,
            vm_file: s.file,
            operation: s.operation.clone(),
            activation: activation.map(Into::into),
            bundle_key: s.bundle_key[..].into(),
            quote_signature: ak.sign(&quote).into(),
            quote: quote.into(),
            wrap_public: wrap.as_bytes().into(),
            wrap_signature: ak.sign(&certify).into(),
            wrap_certify: certify.into(),
            pcr_values: Vec::new(),
            earlier_peer: s.earlier_peer,
            firmware_log: self.firmware.clone().into(),
            layer_log: self.layers.clone().into(),
            ima_log: ima_log.into(),
            ima_offset,
            claims: claims.to_vec().into(),
        }
    }
}

fn point_of(key: &PrivateKey) -> [u8; 65] {
    key.compute_public_key().expect("public").as_ref().try_into().expect("65 bytes")
}

fn shared_x(key: &PrivateKey, point: &[u8; 65]) -> [u8; 32] {
    // `agree` consumes nothing of the key; a copy keeps the signature simple.
    let bytes: EcPrivateKeyBin<'_> = key.as_be_bytes().expect("bytes");
    let copy = PrivateKey::from_private_key(&ECDH_P256, bytes.as_ref()).expect("a key");
    agree(&copy, UnparsedPublicKey::new(&ECDH_P256, point), (), |x| Ok(x.try_into().expect("32 bytes")))
        .expect("agrees")
}

fn sized(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(u16::from_be_bytes(*length).into())
}
