//! The keys and commands of the TPM service against software TPMs, one each.
#[path = "../../../tests/src/process.rs"]
mod process;
#[path = "../../../tests/src/swtpm.rs"]
mod swtpm;

use fealty_attest_tpm::{BOOT_PCRS, EkChoice, EkKind, HostTpm, Tcti, Tpm, TpmError};
use policy::Digest;
use swtpm::Swtpm;

struct Bare {
    _dir: tempfile::TempDir,
    tpm: Swtpm,
    tcti: Tcti,
}

fn bare() -> Bare {
    let dir = tempfile::tempdir().expect("a folder");
    let tpm = Swtpm::start(dir.path());
    let tcti = tpm.tcti().parse().expect("a TCTI string");
    Bare { _dir: dir, tpm, tcti }
}

fn started() -> Bare {
    let bare = bare();
    Tpm::start_up(&bare.tcti).expect("TPM2_Startup");
    bare
}

#[test]
fn keys_of_each_kind() {
    let t = started();
    for kind in [EkKind::P384, EkKind::Rsa2048, EkKind::P256] {
        let start = std::time::Instant::now();
        let mut host = HostTpm::open(&t.tcti, EkChoice::Kind(kind)).expect("opens");
        println!("{kind} open {:?}", start.elapsed());
        let start = std::time::Instant::now();
        let q = host.quote(&Digest::of(b"x"), &BOOT_PCRS).expect("quote");
        println!("quote {:?} {}", start.elapsed(), q.signed.attest.len());
        let start = std::time::Instant::now();
        let w = host.make_wrap_key().expect("wrap key");
        println!("wrap {:?}", start.elapsed());
        let point: [u8; 65] = {
            let p = &w.public[w.public.len() - 68..];
            let mut out = [4; 65];
            out[1..33].copy_from_slice(&p[2..34]);
            out[33..].copy_from_slice(&p[36..68]);
            out
        };
        let start = std::time::Instant::now();
        host.ecdh(&point).expect("ecdh");
        println!("ecdh {:?}", start.elapsed());
        assert_eq!(host.activate(&[0, 2, 1, 2], &[0, 2, 1, 2]), Err(TpmError::WrongCredential));
        println!("loaded {}", host.tpm().loaded().expect("count"));
        println!("{:?}", host.tpm().lockout());
        host.shut_down().expect("shutdown");
    }
    let _ = &t.tpm;
}
