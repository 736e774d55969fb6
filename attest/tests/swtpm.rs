//! What this crate says of TPMs, held against a TPM: swtpm, driven by tpm2-tools. Credentials made here are opened there, names,
//! policies, quotes and certifications made there are read here, and a bundle's inner layer is opened with its ECDH.

#[path = "../../tests/src/process.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with other tests")]
mod process;
#[path = "../../tests/src/swtpm.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with other tests")]
mod swtpm;

use fealty_attest::ek;
use fealty_attest::hpke;
use fealty_attest::protocol::Credential;
use fealty_attest::tpm::attested::Attested;
use fealty_attest::tpm::pcr::{Selection, composite, extend};
use fealty_attest::tpm::public::hierarchy;
use fealty_attest::tpm::{
    Attest, Name, Public, Signature, check_ak, check_ek, check_wrap_key, make_credential, policy_pcr_digest,
};
use policy::Digest;
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject};
use secretmem::Secret;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use swtpm::Swtpm;

const AK: &str = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|sign";
const WRAP: &str = "fixedtpm|fixedparent|sensitivedataorigin|noda|decrypt";

/// A wrap key's PCRs but one: the tools take eight at most.
const EIGHT: [u8; 8] = [0, 2, 3, 4, 5, 6, 7, 14];

/// Making a TPM takes seconds of two cores: one test at a time.
static ONE: Mutex<()> = Mutex::new(());

struct Lab {
    dir: tempfile::TempDir,
    tpm: Swtpm,
    _one: MutexGuard<'static, ()>,
}

impl Lab {
    fn new() -> Self {
        let one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let dir = tempfile::tempdir().expect("a folder");
        let tpm = Swtpm::start(dir.path());
        let lab = Self { dir, tpm, _one: one };
        lab.tool("tpm2_startup", &["-c"]);
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Runs a tool in the folder; without a resource manager its objects must be flushed each time.
    fn tool(&self, name: &str, args: &[&str]) {
        self.try_tool(name, args).unwrap_or_else(|e| panic!("{name} {args:?}: {e}"));
        let _ = self.try_tool("tpm2_flushcontext", &["-t"]);
    }

    fn try_tool(&self, name: &str, args: &[&str]) -> Result<(), String> {
        let output = Command::new(name)
            .args(args)
            .current_dir(self.dir.path())
            .env("TPM2TOOLS_TCTI", self.tpm.tcti())
            .output()
            .expect("tpm2-tools are installed (package tpm2-tools)");
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    fn public(&self, context: &str) -> Public {
        self.tool("tpm2_readpublic", &["-Q", "-c", context, "-o", "read.pub", "-n", "read.name", "-q", "read.qname"]);
        let public = Public::parse_sized(&self.file("read.pub")).expect("a public area");
        assert_eq!(public.name().0, self.file("read.name"), "{context}: the name");
        public
    }

    fn make_ak(&self) -> Public {
        let algorithm = "ecc256:ecdsa-sha256:null";
        self.tool("tpm2_createprimary", &["-Q", "-C", "e", "-g", "sha256", "-G", algorithm, "-a", AK, "-c", "ak.ctx"]);
        let ak = self.public("ak.ctx");
        assert_eq!(ak.qualified_name_in(hierarchy::ENDORSEMENT).0, self.file("read.qname"));
        ak
    }

    fn extend(&self, pcr: u8, digest: &Digest) {
        self.tool("tpm2_pcrextend", &[&format!("{pcr}:sha256={digest}")]);
    }
}

fn extended(pcrs: &[(u8, Digest)]) -> BTreeMap<u8, Digest> {
    pcrs.iter().map(|(pcr, digest)| (*pcr, extend(&Digest([0; 32]), digest))).collect()
}

#[test]
fn credentials_made_here_open_in_a_tpm_whatever_its_ek_is() {
    let lab = Lab::new();
    let ak = lab.make_ak();
    for kind in ["rsa", "ecc", "ecc384"] {
        lab.tool("tpm2_createek", &["-Q", "-G", kind, "-c", "ek.ctx", "-u", "ek.pub"]);
        let ek = Public::parse_sized(&lab.file("ek.pub")).expect("a public area");
        check_ek(&ek).unwrap_or_else(|e| panic!("{kind}: {e}"));
        let secret = [0x5a; 32];
        let credential = make_credential(&ek, &ak.name(), &secret).expect("made");
        activate(&lab, kind, &credential).unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert_eq!(lab.file("opened"), secret, "{kind}");
        let other = make_credential(&ek, &Name([&[0, 0x0b], &[0; 32][..]].concat()), &secret).expect("made");
        let refused = activate(&lab, kind, &other).expect_err("attack 05: it is for another AK");
        assert!(refused.contains("integrity check failed"), "{kind}: {refused}");
    }
}

fn activate(lab: &Lab, kind: &str, credential: &Credential) -> Result<(), String> {
    // The tools' file: a magic number and a version before the two TPM2Bs.
    let head = [0xba, 0xdc, 0xc0, 0xde, 0, 0, 0, 1];
    fs::write(lab.path("credential"), [&head[..], &credential.blob, &credential.secret].concat()).expect("written");
    // The low-range templates want PolicySecret, the high-range one is content with the empty authorization.
    let by_policy = kind != "ecc384";
    let mut args = vec!["-Q", "-c", "ak.ctx", "-C", "ek.ctx", "-i", "credential", "-o", "opened"];
    if by_policy {
        lab.tool("tpm2_startauthsession", &["--policy-session", "-S", "session.ctx"]);
        lab.tool("tpm2_policysecret", &["-Q", "-S", "session.ctx", "-c", "e"]);
        args.extend(["-P", "session:session.ctx"]);
    }
    let done = lab.try_tool("tpm2_activatecredential", &args);
    let _ = lab.try_tool("tpm2_flushcontext", &["-t"]);
    if by_policy {
        let _ = lab.try_tool("tpm2_flushcontext", &["session.ctx"]);
    }
    done
}

#[test]
fn a_tpms_ek_certificate_chains_to_its_makers_roots() {
    let lab = Lab::new();
    let roots: Vec<CertificateDer<'static>> =
        CertificateDer::pem_file_iter(lab.tpm.roots()).expect("roots").collect::<Result<_, _>>().expect("PEM");
    for (kind, certificate) in [("ecc384", lab.tpm.ek_certificate()), ("rsa", lab.tpm.rsa_ek_certificate())] {
        lab.tool("tpm2_createek", &["-Q", "-G", kind, "-c", "ek.ctx", "-u", "ek.pub"]);
        let public = Public::parse_sized(&lab.file("ek.pub")).expect("a public area");
        let certificate = fs::read(certificate).expect("the certificate");
        let host = ek::check(&certificate, &public, &roots, UnixTime::now()).unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert_eq!(host, ek::host_id(&certificate).expect("a certificate"));
    }
}

#[test]
fn quotes_and_certifications_of_a_tpm_are_read_as_it_meant_them() {
    let lab = Lab::new();
    let ak = lab.make_ak();
    assert_eq!(check_ak(&ak), Ok(()));
    let measured = [(0, Digest::of(b"firmware")), (14, Digest::of(b"layer"))];
    measured.iter().for_each(|(pcr, digest)| lab.extend(*pcr, digest));
    let values = extended(&measured);

    let nonce = "11".repeat(32);
    lab.tool(
        "tpm2_quote",
        &["-Q", "-c", "ak.ctx", "-l", "sha256:0,7,14", "-q", &nonce, "-m", "quote", "-s", "quote.sig"],
    );
    let message = lab.file("quote");
    Signature::parse(&lab.file("quote.sig")).and_then(|s| s.verify(&ak, &message, "quote")).expect("signed");
    let quote = Attest::parse(&message).expect("a quote");
    assert_eq!(quote.extra_data, [0x11; 32]);
    assert_eq!(quote.qualified_signer, ak.qualified_name_in(hierarchy::ENDORSEMENT));
    let digest = composite(&[0, 7, 14], &values).as_bytes().to_vec();
    assert_eq!(quote.attested, Attested::Quote { selection: vec![Selection::sha256(&[0, 7, 14])], pcr_digest: digest });
    assert_eq!(quote.to_bytes(), message);

    let list = format!("sha256:{}", EIGHT.map(|p| p.to_string()).join(","));
    lab.tool("tpm2_createpolicy", &["-Q", "--policy-pcr", "-l", &list, "-L", "policy"]);
    let policy = policy_pcr_digest(&EIGHT, &values);
    assert_eq!(lab.file("policy"), policy.as_bytes());

    let algorithm = "ecc256:ecdh-sha256:null";
    let args = ["-Q", "-C", "n", "-g", "sha256", "-G", algorithm, "-a", WRAP, "-L", "policy", "-c", "wrap.ctx"];
    lab.tool("tpm2_createprimary", &args);
    let wrap = lab.public("wrap.ctx");
    assert_eq!(wrap.qualified_name_in(hierarchy::NULL).0, lab.file("read.qname"));
    assert_eq!(check_wrap_key(&wrap, &policy), Ok(()));
    lab.tool("tpm2_certify", &["-Q", "-c", "wrap.ctx", "-C", "ak.ctx", "-g", "sha256", "-o", "cert", "-s", "cert.sig"]);
    let message = lab.file("cert");
    Signature::parse(&lab.file("cert.sig")).and_then(|s| s.verify(&ak, &message, "certification")).expect("signed");
    let certify = Attest::parse(&message).expect("a certification");
    let qualified_name = wrap.qualified_name_in(hierarchy::NULL);
    assert_eq!(certify.attested, Attested::Certify { name: wrap.name(), qualified_name });
    let counters = |a: &Attest| (a.clock.reset_count, a.clock.restart_count);
    assert_eq!(counters(&certify), counters(&quote));

    // The inner layer of a bundle, opened with the TPM's own ECDH; and after one more extend, no longer.
    let point = wrap.p256_point().expect("P-256");
    let sealed = hpke::seal_p256(&point, b"info", b"aad", b"thirty-two bytes of key material").expect("sealed");
    let encapsulated = hpke::p256_encapsulation(&sealed).expect("a point");
    let (x, y) = encapsulated[1..].split_at(32);
    fs::write(lab.path("point"), [&[0, 68, 0, 32], x, &[0, 32], y].concat()).expect("written");
    let zgen = || {
        lab.tool("tpm2_startauthsession", &["--policy-session", "-S", "session.ctx"]);
        let bound = lab.try_tool("tpm2_policypcr", &["-Q", "-S", "session.ctx", "-l", &list]);
        let args = ["-Q", "-c", "wrap.ctx", "-p", "session:session.ctx", "-u", "point", "-o", "shared"];
        let done = bound.and_then(|()| lab.try_tool("tpm2_ecdhzgen", &args));
        let _ = lab.try_tool("tpm2_flushcontext", &["session.ctx"]);
        let _ = lab.try_tool("tpm2_flushcontext", &["-t"]);
        done
    };
    zgen().expect("the TPM agrees");
    let mut shared: [u8; 32] = lab.file("shared")[4..36].try_into().expect("x coordinate");
    let shared = Secret::take(&mut shared).expect("memory");
    let opened = hpke::open_p256(&shared, &point, b"info", b"aad", &sealed).expect("opens");
    assert_eq!(opened.expose(), b"thirty-two bytes of key material");
    lab.extend(14, &Digest::of(b"shell"));
    assert!(zgen().is_err(), "attack 25: the TPM refuses after an extend");
}

#[test]
fn attack_13_a_tpm_signs_a_quote_over_a_bank_that_nobody_fills_and_it_is_told_from_a_good_one() {
    let lab = Lab::new();
    let ak = lab.make_ak();
    lab.extend(0, &Digest::of(b"firmware"));
    lab.tool("tpm2_quote", &["-Q", "-c", "ak.ctx", "-l", "sha384:0,14", "-m", "quote", "-s", "quote.sig"]);
    let message = lab.file("quote");
    Signature::parse(&lab.file("quote.sig")).and_then(|s| s.verify(&ak, &message, "quote")).expect("properly signed");
    let Ok(Attest { attested: Attested::Quote { selection, .. }, .. }) = Attest::parse(&message) else {
        panic!("a quote")
    };
    assert!(!matches!(&selection[..], [only] if only.is_sha256_of(&[0, 14])));
}
