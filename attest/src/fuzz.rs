//! One function per parser, for any bytes: each must return, without a panic, in time and memory bounded by its input. Where
//! a parser has a writer, what was read must be written as it was. `cargo fuzz` targets call these; the tests run them over
//! the corpus in `tests/corpus` and seeded mutations of it.

use crate::client::resolve::{self, Kind};
use crate::eventlog::{LayerLog, Replay, firmware, ima, ima::ImaState, layer};
use crate::hpke::{self, X25519Key};
use crate::note::{self, Receipt};
use crate::protocol::{Evidence, Problem, Release, Released};
use crate::service::frame;
use crate::service::{ANSWER_LIMIT, Answer, ControlRequest, REQUEST_LIMIT, VmRequest};
use crate::tpm::{Attest, Public, Signature};
use crate::vmfile::VmFile;
use crate::{der, ek};
use std::collections::BTreeMap;

/// A target: its name, which is that of its corpus folder, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 15] = [
    ("firmware-log", firmware_log),
    ("layer-log", layer_log),
    ("ima-log", ima_log),
    ("attest", attest),
    ("public", public),
    ("signature", signature),
    ("evidence", evidence),
    ("vm-file", vm_file),
    ("note", note),
    ("stream", stream),
    ("vm-request", vm_request),
    ("service-answer", service_answer),
    ("dns-answer", dns_answer),
    ("certificate", certificate),
    ("bundle", bundle),
];

/// The firmware's log.
pub fn firmware_log(data: &[u8]) {
    if let Ok(replay) = firmware::replay(data) {
        assert!(replay.measurements.len() <= data.len() / 50, "a record has 50 bytes at least");
    }
}

/// The layer log.
pub fn layer_log(data: &[u8]) {
    if let Ok(log) = LayerLog::parse(data) {
        assert_eq!(log.as_bytes(), data);
        let good = layer::replay(data, &mut Replay::default()).is_ok();
        assert_eq!(good, log.is_sealed() && !log.has_shell());
    }
}

/// IMA's log, from its start and from somewhere else.
pub fn ima_log(data: &[u8]) {
    let cut = ima::whole_entries(data);
    assert!(cut <= data.len() && ima::whole_entries(&data[..cut]) == cut);
    let _ = ima::replay(data, ImaState::START, &BTreeMap::new());
    let later = ImaState { offset: 1, ..ImaState::START };
    if let Ok((state, _)) = ima::replay(data, later, &BTreeMap::new()) {
        assert_eq!(state.offset, 1 + data.len() as u64);
    }
}

/// TPMS_ATTEST.
pub fn attest(data: &[u8]) {
    if let Ok(attest) = Attest::parse(data) {
        assert_eq!(attest.to_bytes(), data);
    }
}

/// TPMT_PUBLIC.
pub fn public(data: &[u8]) {
    if let Ok(public) = Public::parse(data) {
        assert_eq!(public.as_bytes(), data);
        let _ = (public.name(), public.spki(), ek::check_key(&public));
    }
}

/// TPMT_SIGNATURE: numbers may come without their leading zeros, so only the meaning comes back.
pub fn signature(data: &[u8]) {
    if let Ok(signature) = Signature::parse(data) {
        assert_eq!(Signature::parse(&signature.to_bytes()), Ok(signature));
    }
}

/// Bodies of the provider protocol.
pub fn evidence(data: &[u8]) {
    if let Ok(evidence) = serde_json::from_slice::<Evidence>(data) {
        let text = serde_json::to_vec(&evidence).unwrap_or_default();
        assert_eq!(serde_json::from_slice::<Evidence>(&text).ok(), Some(evidence));
    }
    let _ = serde_json::from_slice::<Released>(data);
    let _ = serde_json::from_slice::<Release>(data);
    let _ = serde_json::from_slice::<Problem>(data);
}

/// VM files, and the opening of what looks like one.
pub fn vm_file(data: &[u8]) {
    if let (Ok(file), Ok(key)) = (VmFile::read(data), secretmem::Secret::zeroed()) {
        let _ = file.open(&key);
    }
}

/// Signed notes and receipts.
pub fn note(data: &[u8]) {
    let Ok(seed) = secretmem::Secret::copy_of(&[1; 32]) else { return };
    if let (Ok(text), Ok(key)) = (std::str::from_utf8(data), note::public_key(&seed)) {
        let _ = note::verify(text, "keys.example/acme", &key);
        let _ = Receipt::verify(text, "keys.example/acme", &key);
    }
}

/// Sealed streams.
pub fn stream(data: &[u8]) {
    use crate::stream::{Direction, Opener, StreamInfo};
    let (Ok(customer), Ok(vm)) = ("acme".parse(), "payroll".parse()) else { return };
    let info = StreamInfo {
        customer: &customer,
        vm: &vm,
        key_id: policy::KeyId(7),
        direction: Direction::CoreDump,
        connection: 0,
    };
    let Ok(key) = secretmem::Secret::zeroed() else { return };
    let opened = Opener::new(data, &key, &info).and_then(|o| o.copy_to(&mut std::io::sink()));
    assert!(opened.is_err(), "nobody sealed it with this key");
}

/// Frames to the TPM service.
pub fn vm_request(data: &[u8]) {
    let _ = frame::read::<VmRequest>(&mut &data[..], REQUEST_LIMIT);
    let _ = frame::read::<ControlRequest>(&mut &data[..], REQUEST_LIMIT);
}

/// Frames from the TPM service.
pub fn service_answer(data: &[u8]) {
    let _ = frame::read::<Answer>(&mut &data[..], ANSWER_LIMIT);
}

/// DNS answers: the first 29 bytes stand for the question.
pub fn dns_answer(data: &[u8]) {
    let (question, message) = data.split_at(data.len().min(29));
    for kind in [Kind::A, Kind::Aaaa] {
        assert!(resolve::answer(message, question, kind).is_none_or(|found| found.len() <= 8));
    }
}

/// Certificates of endorsement keys.
pub fn certificate(data: &[u8]) {
    let _ = der::validity(data);
    let _ = ek::host_id(data);
}

/// Both layers of a key bundle.
pub fn bundle(data: &[u8]) {
    let Ok(key) = X25519Key::generate() else { return };
    assert!(hpke::open_x25519(&key, b"", b"", data).is_err(), "nobody sealed it to this key");
    let _ = hpke::p256_encapsulation(data);
    if let Ok(shared) = secretmem::Secret::zeroed() {
        assert!(hpke::open_p256(&shared, &[4; 65], b"", b"", data).is_err(), "nobody sealed it to this key");
    }
}
