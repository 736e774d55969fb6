//! What the TPM service does with its TPM: three keys, and the commands that it needs them for.
//!
//! A TPM without resource manager holds three objects and three sessions. EK, AK and wrap key are the objects; a session
//! that authorizes, one for the wrap key's policy and, while a credential is activated, one for the EK's policy are the
//! sessions. All are salted to the EK, so that whoever listens on the TPM's bus can't compute their keys.

use crate::connection::{Tpm, selection};
use crate::ek::{self, EkChoice, EkKind};
use crate::error::TpmError;
use crate::template;
use attest::tcti::Tcti;
use attest::tpm::WRAP_PCRS;
use policy::Digest;
use tss_esapi::attributes::SessionAttributesBuilder;
use tss_esapi::constants::SessionType;
use tss_esapi::handles::{AuthHandle, KeyHandle, SessionHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    Attest, AttestInfo, Data, DigestList, EccParameter, EccPoint, EncryptedSecret, IdObject, Nonce, Public, Signature,
    SignatureScheme, SymmetricDefinition,
};
use tss_esapi::traits::Marshall;

/// A TPM with the service's keys loaded.
pub struct HostTpm {
    tpm: Tpm,
    ek: KeyHandle,
    ak: KeyHandle,
    wrap: Option<KeyHandle>,
    /// Whether the wrap key's policy session is satisfied and waits for its use.
    armed: bool,
    authorize: AuthSession,
    wrap_policy: AuthSession,
    identity: TpmIdentity,
    boot: BootCount,
}

/// What a TPM is known by: the same for each start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TpmIdentity {
    /// The kind of endorsement key.
    pub ek_kind: EkKind,
    /// Its certificate, DER, where the TPM holds one.
    pub ek_certificate: Option<Vec<u8>>,
    /// TPMT_PUBLIC.
    pub ek_public: Vec<u8>,
    /// TPMT_PUBLIC.
    pub ak_public: Vec<u8>,
}

/// Which boot of the TPM this is (TPM 2.0 part 1, 36.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BootCount {
    /// TPM resets.
    pub reset: u32,
    /// Restarts and resumes since the last reset.
    pub restart: u32,
}

/// Something that the AK signed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signed {
    /// TPMS_ATTEST.
    pub attest: Vec<u8>,
    /// TPMT_SIGNATURE.
    pub signature: Vec<u8>,
}

/// A quote.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Quote {
    /// What was signed.
    pub signed: Signed,
    /// SHA-256 over the quoted PCRs' values, as it stands in the quote.
    pub pcr_digest: Digest,
    /// The boot.
    pub boot: BootCount,
}

/// The wrap key and its certification.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CertifiedKey {
    /// TPMT_PUBLIC.
    pub public: Vec<u8>,
    /// TPM2_Certify by the AK, with empty qualifying data.
    pub certification: Signed,
}

impl HostTpm {
    /// Opens the TPM and loads EK and AK. Only whoever holds the one lock of this TPM may call it.
    pub fn open(tcti: &Tcti, choice: EkChoice) -> Result<Self, TpmError> {
        let mut tpm = Tpm::open(tcti)?;
        let record = ek::find(&mut tpm, choice)?;
        let (ek, ek_public) = primary(&mut tpm, AuthSession::Password, Hierarchy::Endorsement, record.template)?;
        let authorize = salted(&mut tpm, ek, SessionType::Hmac, HashingAlgorithm::Sha256)?;
        encrypting(&mut tpm, authorize)?;
        let wrap_policy = salted(&mut tpm, ek, SessionType::Policy, HashingAlgorithm::Sha256)?;
        encrypting(&mut tpm, wrap_policy)?;
        let (ak, ak_public) = primary(&mut tpm, authorize, Hierarchy::Endorsement, template::ak()?)?;
        let identity = TpmIdentity { ek_kind: record.kind, ek_certificate: record.certificate, ek_public, ak_public };
        let boot = BootCount { reset: 0, restart: 0 };
        let mut host = Self { tpm, ek, ak, wrap: None, armed: false, authorize, wrap_policy, identity, boot };
        host.boot = host.quote(&Digest([0; 32]), &[0])?.boot;
        Ok(host)
    }

    /// Opens the TPM again after its connection broke; it must be the same TPM in the same boot.
    pub fn reopen(tcti: &Tcti, identity: &TpmIdentity, boot: BootCount) -> Result<Self, TpmError> {
        let host = Self::open(tcti, EkChoice::Kind(identity.ek_kind))?;
        if host.identity.ek_public != identity.ek_public {
            Err(TpmError::Exchanged)
        } else if host.boot != boot {
            Err(TpmError::Reset)
        } else {
            Ok(host)
        }
    }

    /// Who it is.
    pub fn identity(&self) -> &TpmIdentity {
        &self.identity
    }

    /// Which boot this is.
    pub fn boot(&self) -> BootCount {
        self.boot
    }

    /// The TPM itself, for what needs no key.
    pub fn tpm(&mut self) -> &mut Tpm {
        &mut self.tpm
    }

    /// TPM2_Shutdown, then closes the connection.
    pub fn shut_down(mut self) -> Result<(), TpmError> {
        let loaded = [Some(self.ak), self.wrap, Some(self.ek)];
        for key in loaded.into_iter().flatten() {
            self.tpm.flush(key)?;
        }
        for session in [self.authorize, self.wrap_policy] {
            self.tpm.flush(SessionHandle::from(session))?;
        }
        self.tpm.shut_down()
    }

    /// TPM2_ActivateCredential (TPM 2.0 part 3, 12.5): the secret of at most 32 bytes that a provider sealed to this EK
    /// and this AK. `blob` is a TPM2B_ID_OBJECT, `secret` a TPM2B_ENCRYPTED_SECRET, both with their size fields.
    pub fn activate(&mut self, blob: &[u8], secret: &[u8]) -> Result<Vec<u8>, TpmError> {
        let wrong = |_| TpmError::WrongCredential;
        let blob = IdObject::try_from(sized(blob).ok_or(TpmError::WrongCredential)?).map_err(wrong)?;
        let secret = EncryptedSecret::try_from(sized(secret).ok_or(TpmError::WrongCredential)?).map_err(wrong)?;
        let hash = match self.identity.ek_kind {
            EkKind::P384 => HashingAlgorithm::Sha384,
            EkKind::Rsa2048 | EkKind::P256 => HashingAlgorithm::Sha256,
        };
        let session = salted(&mut self.tpm, self.ek, SessionType::Policy, hash)?;
        lasting(&mut self.tpm, session)?;
        let opened = self.activate_with(session, blob, secret);
        let flushed = self.tpm.flush(SessionHandle::from(session));
        let opened = opened?;
        flushed?;
        Ok(opened)
    }

    fn activate_with(
        &mut self,
        session: AuthSession,
        blob: IdObject,
        secret: EncryptedSecret,
    ) -> Result<Vec<u8>, TpmError> {
        self.satisfy_ek(session)?;
        let (ak, ek) = (self.ak, self.ek);
        let opened = self
            .tpm
            .context
            .execute_with_sessions((Some(self.authorize), Some(session), None), |c| {
                c.activate_credential(ak, ek, blob, secret)
            })
            .map_err(|e| match TpmError::of("TPM2_ActivateCredential", e) {
                TpmError::Refused { .. } | TpmError::WrongPoint => TpmError::WrongCredential,
                TpmError::PcrsChanged => TpmError::ForeignPolicy,
                other => other,
            })?;
        Ok(opened.to_vec())
    }

    /// The EK's authPolicy: PolicyA, TPM2_PolicySecret(TPM_RH_ENDORSEMENT); in the high range PolicyB, which is PolicyA or
    /// PolicyC (EK Credential Profile 2.5, B.6). Not its authValue, because that is subject to lockout.
    fn satisfy_ek(&mut self, session: AuthSession) -> Result<(), TpmError> {
        let policy = policy_session(session)?;
        let none = || (Nonce::default(), tss_esapi::structures::Digest::default(), Nonce::default());
        let (nonce, cp_hash, reference) = none();
        self.tpm
            .context
            .execute_with_session(Some(self.authorize), |c| {
                c.policy_secret(policy, AuthHandle::Endorsement, nonce, cp_hash, reference, None)
            })
            .map_err(|e| hierarchy("TPM2_PolicySecret", "endorsement", e))?;
        if self.identity.ek_kind != EkKind::P384 {
            return Ok(());
        }
        let fail = |e| TpmError::of("TPM2_PolicyOR", e);
        let mut branches = DigestList::new();
        for branch in [POLICY_A_SHA384, POLICY_C_SHA384] {
            branches.add(branch.to_vec().try_into().map_err(fail)?).map_err(fail)?;
        }
        self.tpm.without_sessions(|c| c.policy_or(policy, branches)).map_err(fail)
    }

    /// Makes the wrap key anew under the present values of [`WRAP_PCRS`] and lets the AK certify it. In the same boot, the
    /// same values give the same key.
    pub fn make_wrap_key(&mut self) -> Result<CertifiedKey, TpmError> {
        self.armed = false;
        if let Some(old) = self.wrap.take() {
            self.tpm.flush(old)?;
        }
        self.restart_wrap_policy()?;
        let policy = policy_session(self.wrap_policy)?;
        let fail = |e| TpmError::of("TPM2_PolicyGetDigest", e);
        let digest = self.tpm.without_sessions(|c| c.policy_get_digest(policy)).map_err(fail)?;
        let digest = digest.value().try_into().map(Digest).map_err(|_| TpmError::Answer("TPM2_PolicyGetDigest"))?;
        let (wrap, public) = primary(&mut self.tpm, self.authorize, Hierarchy::Null, template::wrap_key(&digest)?)?;
        self.wrap = Some(wrap);
        let ak = self.ak;
        let (attest, signature) = self
            .tpm
            .context
            .execute_with_sessions((Some(AuthSession::Password), Some(self.authorize), None), |c| {
                c.certify(wrap.into(), ak, Data::default(), SignatureScheme::Null)
            })
            .map_err(|e| TpmError::of("TPM2_Certify", e))?;
        Ok(CertifiedKey { public, certification: signed(&attest, &signature)? })
    }

    /// TPM2_Quote over `pcrs` (rising, SHA-256 bank) by the AK.
    pub fn quote(&mut self, qualifying: &Digest, pcrs: &[u8]) -> Result<Quote, TpmError> {
        let name = "TPM2_Quote";
        let list = selection(pcrs)?;
        let data = Data::try_from(qualifying.as_bytes().to_vec()).map_err(|e| TpmError::of(name, e))?;
        let ak = self.ak;
        let (attest, signature) = self
            .tpm
            .context
            .execute_with_session(Some(self.authorize), |c| c.quote(ak, data, SignatureScheme::Null, list))
            .map_err(|e| TpmError::of(name, e))?;
        let AttestInfo::Quote { info } = attest.attested() else { return Err(TpmError::Answer(name)) };
        let pcr_digest = info.pcr_digest().value().try_into().map(Digest).map_err(|_| TpmError::Answer(name))?;
        let clock = attest.clock_info();
        let boot = BootCount { reset: clock.reset_count(), restart: clock.restart_count() };
        Ok(Quote { signed: signed(&attest, &signature)?, pcr_digest, boot })
    }

    /// TPM2_ECDH_ZGen on the wrap key (TPM 2.0 part 3, 14.5). Points are uncompressed (SEC 1, 2.3.3).
    pub fn ecdh(&mut self, point: &[u8; 65]) -> Result<[u8; 65], TpmError> {
        let wrap = self.wrap.ok_or(TpmError::PcrsChanged)?;
        let parameter = |bytes: &[u8]| EccParameter::try_from(bytes).map_err(|_| TpmError::WrongPoint);
        if point[0] != 4 {
            return Err(TpmError::WrongPoint);
        }
        let given = EccPoint::new(parameter(&point[1..33])?, parameter(&point[33..])?);
        let mut attempt = 1;
        loop {
            self.arm()?;
            self.armed = false;
            let given = given.clone();
            let shared = self
                .tpm
                .context
                .execute_with_session(Some(self.wrap_policy), |c| c.ecdh_z_gen(wrap, given))
                .map_err(|e| TpmError::of("TPM2_ECDH_ZGen", e));
            match shared {
                Ok(shared) => return uncompressed(&shared).ok_or(TpmError::Answer("TPM2_ECDH_ZGen")),
                // Some PCR, if only IMA's, moved between TPM2_PolicyPCR and the use.
                Err(TpmError::PcrsMoving) if attempt < POLICY_ATTEMPTS => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Satisfies the wrap key's policy ahead of its next use, which then takes one command instead of three. Does nothing
    /// where that is done, or where there is no wrap key.
    pub fn arm(&mut self) -> Result<(), TpmError> {
        if !self.armed && self.wrap.is_some() {
            self.restart_wrap_policy()?;
            self.armed = true;
        }
        Ok(())
    }

    fn restart_wrap_policy(&mut self) -> Result<(), TpmError> {
        let policy = policy_session(self.wrap_policy)?;
        let list = selection(&WRAP_PCRS)?;
        self.tpm
            .without_sessions(|c| {
                c.policy_restart(policy)?;
                c.policy_pcr(policy, tss_esapi::structures::Digest::default(), list)
            })
            .map_err(|e| TpmError::of("TPM2_PolicyPCR", e))
    }
}

impl std::fmt::Debug for HostTpm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostTpm").field("ek_kind", &self.identity.ek_kind).field("boot", &self.boot).finish()
    }
}

fn primary(
    tpm: &mut Tpm,
    session: AuthSession,
    parent: Hierarchy,
    template: Public,
) -> Result<(KeyHandle, Vec<u8>), TpmError> {
    let which = if matches!(parent, Hierarchy::Null) { "NULL" } else { "endorsement" };
    let made = tpm
        .context
        .execute_with_session(Some(session), |c| c.create_primary(parent, template, None, None, None, None))
        .map_err(|e| hierarchy("TPM2_CreatePrimary", which, e))?;
    let public = made.out_public.marshall().map_err(|e| TpmError::of("TPM2_CreatePrimary", e))?;
    Ok((made.key_handle, public))
}

/// A session salted to the EK.
fn salted(tpm: &mut Tpm, ek: KeyHandle, kind: SessionType, hash: HashingAlgorithm) -> Result<AuthSession, TpmError> {
    tpm.without_sessions(|c| c.start_auth_session(Some(ek), None, None, kind, SymmetricDefinition::AES_128_CFB, hash))
        .map_err(|e| TpmError::of("TPM2_StartAuthSession", e))?
        .ok_or(TpmError::Answer("TPM2_StartAuthSession"))
}

/// Makes a session last beyond its first use.
fn lasting(tpm: &mut Tpm, session: AuthSession) -> Result<(), TpmError> {
    let (attributes, mask) = SessionAttributesBuilder::new().with_continue_session(true).build();
    let set = tpm.context.tr_sess_set_attributes(session, attributes, mask);
    set.map_err(|e| TpmError::of("TPM2_StartAuthSession", e))
}

/// Makes a session last, and encrypt the first parameter of each answer. One session of a command may do that.
fn encrypting(tpm: &mut Tpm, session: AuthSession) -> Result<(), TpmError> {
    let (attributes, mask) = SessionAttributesBuilder::new().with_continue_session(true).with_encrypt(true).build();
    let set = tpm.context.tr_sess_set_attributes(session, attributes, mask);
    set.map_err(|e| TpmError::of("TPM2_StartAuthSession", e))
}

fn policy_session(session: AuthSession) -> Result<PolicySession, TpmError> {
    PolicySession::try_from(session).map_err(|e| TpmError::of("TPM2_StartAuthSession", e))
}

fn hierarchy(command: &'static str, which: &'static str, error: tss_esapi::Error) -> TpmError {
    use tss_esapi::constants::response_code::Tss2ResponseCodeKind as Kind;
    if let tss_esapi::Error::Tss2Error(code) = error
        && matches!(code.kind(), Some(Kind::Hierarchy | Kind::BadAuth | Kind::AuthFail | Kind::AuthUnavailable))
    {
        return TpmError::Hierarchy(which);
    }
    TpmError::of(command, error)
}

fn signed(attest: &Attest, signature: &Signature) -> Result<Signed, TpmError> {
    let fail = |e| TpmError::of("TPMS_ATTEST", e);
    Ok(Signed { attest: attest.marshall().map_err(fail)?, signature: signature.marshall().map_err(fail)? })
}

/// The content of a TPM2B.
pub(crate) fn sized(bytes: &[u8]) -> Option<Vec<u8>> {
    let (size, content) = bytes.split_first_chunk::<2>()?;
    (usize::from(u16::from_be_bytes(*size)) == content.len()).then(|| content.to_vec())
}

fn uncompressed(point: &EccPoint) -> Option<[u8; 65]> {
    let mut bytes = [0; 65];
    bytes[0] = 4;
    let (x, y) = bytes[1..].split_at_mut(32);
    for (to, from) in [(x, point.x()), (y, point.y())] {
        to.get_mut(32_usize.checked_sub(from.len())?..)?.copy_from_slice(from);
    }
    Some(bytes)
}

/// How often a use of the wrap key is tried again because a PCR moved.
const POLICY_ATTEMPTS: u32 = 16;

/// EK Credential Profile 2.5, B.6.2: PolicyA with SHA-384.
const POLICY_A_SHA384: [u8; 48] = [
    0x8b, 0xbf, 0x22, 0x66, 0x53, 0x7c, 0x17, 0x1c, 0xb5, 0x6e, 0x40, 0x3c, 0x4d, 0xc1, 0xd4, 0xb6, 0x4f, 0x43, 0x26,
    0x11, 0xdc, 0x38, 0x6e, 0x6f, 0x53, 0x20, 0x50, 0xc3, 0x27, 0x8c, 0x93, 0x0e, 0x14, 0x3e, 0x8b, 0xb1, 0x13, 0x38,
    0x24, 0xcc, 0xb4, 0x31, 0x05, 0x38, 0x71, 0xc6, 0xdb, 0x53,
];

/// EK Credential Profile 2.5, B.6.4: PolicyC with SHA-384.
const POLICY_C_SHA384: [u8; 48] = [
    0xd6, 0x03, 0x2c, 0xe6, 0x1f, 0x2f, 0xb3, 0xc2, 0x40, 0xeb, 0x3c, 0xf6, 0xa3, 0x32, 0x37, 0xef, 0x2b, 0x6a, 0x16,
    0xf4, 0x29, 0x3c, 0x22, 0xb4, 0x55, 0xe2, 0x61, 0xcf, 0xfd, 0x21, 0x7a, 0xd5, 0xb4, 0x94, 0x7c, 0x2d, 0x73, 0xe6,
    0x30, 0x05, 0xee, 0xd2, 0xdc, 0x2b, 0x35, 0x93, 0xd1, 0x65,
];

#[cfg(test)]
mod tests {
    use super::*;
    use tss_esapi::constants::tss::{TPM2_RH_NULL, TPM2_ST_HASHCHECK};
    use tss_esapi::structures::MaxBuffer;
    use tss_esapi::tss2_esys::TPMT_TK_HASHCHECK;

    #[test]
    fn sizes_must_be_exact() {
        assert_eq!(sized(&[0, 2, 7, 8]), Some(vec![7, 8]));
        for bad in [&[][..], &[0], &[0, 2, 7], &[0, 1, 7, 8]] {
            assert_eq!(sized(bad), None);
        }
    }

    #[test]
    fn short_coordinates_are_padded() {
        let point = EccPoint::new(
            EccParameter::try_from(vec![1; 31]).expect("fits"),
            EccParameter::try_from(vec![2; 32]).expect("fits"),
        );
        let bytes = uncompressed(&point).expect("a point");
        assert_eq!((bytes[0], bytes[1], bytes[2], bytes[33]), (4, 0, 1, 2));
        let long = EccPoint::new(EccParameter::try_from(vec![1; 33]).expect("fits"), EccParameter::default());
        assert_eq!(uncompressed(&long), None);
    }

    /// TPM2_Sign by the AK over a digest of `data`, with a ticket where the TPM itself hashed it and gave one.
    fn sign(host: &mut HostTpm, data: &[u8], hashed_inside: bool) -> Result<(), String> {
        let ak = host.ak;
        let buffer = MaxBuffer::try_from(data.to_vec()).expect("fits");
        let hash = host.tpm.without_sessions(|c| c.hash(buffer, HashingAlgorithm::Sha256, Hierarchy::Owner));
        let (digest, mut ticket) = hash.expect("TPM2_Hash");
        if !hashed_inside {
            let none =
                TPMT_TK_HASHCHECK { tag: TPM2_ST_HASHCHECK, hierarchy: TPM2_RH_NULL, digest: Default::default() };
            ticket = none.try_into().expect("a null ticket");
        }
        let session = Some(AuthSession::Password);
        let signed =
            host.tpm.context.execute_with_session(session, |c| c.sign(ak, digest, SignatureScheme::Null, ticket));
        signed.map(drop).map_err(|e| e.to_string())
    }

    #[test]
    fn attack_51_the_ak_signs_nothing_that_poses_as_the_tpm_s_own() {
        let dir = tempfile::tempdir().expect("a folder");
        let swtpm = fealty_tests::swtpm::Swtpm::start(dir.path());
        let tcti: Tcti = swtpm.tcti().parse().expect("a TCTI string");
        Tpm::start_up(&tcti).expect("TPM2_Startup");
        let mut host = HostTpm::open(&tcti, EkChoice::Certified).expect("opens");
        let quote = host.quote(&Digest::of(b"h"), &[0]).expect("a quote").signed.attest;
        // Whoever has the AK's handle makes up a quote: hashed outside, or by the TPM, which knows its own kind (TPM_GENERATED).
        for hashed_inside in [false, true] {
            let refused = sign(&mut host, &quote, hashed_inside).expect_err("a made-up quote was signed");
            assert!(refused.contains("ticket"), "{refused}");
        }
        // The key does sign what the TPM hashed and found to be none of its own: the refusals above are not for another reason.
        sign(&mut host, b"a letter", true).expect("signed");
        let refused = sign(&mut host, b"a letter", false).expect_err("a digest from outside was signed");
        assert!(refused.contains("ticket"), "{refused}");
    }
}
