//! The firmware's log: replay, and a builder for whoever plays firmware on a bare software TPM.

use super::tcg::{self, EV_EFI_ACTION, EV_NO_ACTION, EV_SEPARATOR, Event};
use super::{LogError, Replay, initial};
use policy::Digest;
use policy::reference::Measurement;

const LOG: &str = "firmware";
const LOCALITY: &[u8; 16] = b"StartupLocality\0";

/// Actions of fixed text that firmware logs on its way (PFP 1.06, section 10.4.4): they tell nothing of what runs.
const CAPPED_ACTIONS: &[&[u8]] = &[
    b"Calling EFI Application from Boot Option",
    b"Returning from EFI Application from Boot Option",
    b"Exit Boot Services Invocation",
    b"Exit Boot Services Returned with Success",
];

/// Replays the firmware's log. Every event type must be known; EV_NO_ACTION extends nothing; a startup locality gives
/// PCR 0 its first value; each of PCRs 0 to 7 that was extended must have its good separator.
pub fn replay(log: &[u8]) -> Result<Replay, LogError> {
    let mut replay = Replay::default();
    let mut separated = [false; 8];
    for event in tcg::parse(log, LOG)? {
        let name =
            tcg::event_name(event.kind).ok_or(LogError::UnknownEvent { log: LOG, kind: event.kind, pcr: event.pcr })?;
        if event.kind == EV_NO_ACTION {
            no_action(&mut replay, &event)?;
            continue;
        }
        let pcr = pcr_of(&event)?;
        replay.extend(pcr, &event.digest);
        if event.kind == EV_SEPARATOR {
            separator(&event, pcr)?;
            if let Some(seen) = separated.get_mut(usize::from(pcr)) {
                *seen = true;
            }
        } else if !is_capped_action(&event) {
            let kind = name.to_owned();
            replay.measurements.push(Measurement { pcr, layer: None, version: None, digest: event.digest, kind });
        }
    }
    match replay.pcrs.keys().find(|pcr| **pcr < 8 && !separated[usize::from(**pcr)]) {
        Some(pcr) => Err(LogError::Separator(*pcr)),
        None => Ok(replay),
    }
}

fn pcr_of(event: &Event<'_>) -> Result<u8, LogError> {
    // IMA's PCR and the resettable ones are none of the firmware's.
    u8::try_from(event.pcr)
        .ok()
        .filter(|pcr| *pcr < 23 && ![10, 16].contains(pcr))
        .ok_or(LogError::Pcr { log: LOG, pcr: event.pcr })
}

fn no_action(replay: &mut Replay, event: &Event<'_>) -> Result<(), LogError> {
    let Some(locality) = event.data.strip_prefix(LOCALITY) else { return Ok(()) };
    let [locality @ (0 | 3 | 4)] = locality else { return Err(LogError::Locality) };
    if event.pcr != 0 || replay.pcrs.contains_key(&0) {
        return Err(LogError::Locality);
    }
    let mut first = initial(0);
    first.0[31] = *locality;
    replay.pcrs.insert(0, first);
    Ok(())
}

fn separator(event: &Event<'_>, pcr: u8) -> Result<(), LogError> {
    // 0xffffffff stands for the same as zero in BIOS days; 1 reports an error.
    let good = matches!(event.data, [0, 0, 0, 0] | [0xff, 0xff, 0xff, 0xff]) && event.digest == Digest::of(event.data);
    if good { Ok(()) } else { Err(LogError::Separator(pcr)) }
}

fn is_capped_action(event: &Event<'_>) -> bool {
    event.kind == EV_EFI_ACTION && CAPPED_ACTIONS.contains(&event.data) && event.digest == Digest::of(event.data)
}

/// A firmware log being written: SHA-256 bank alone.
#[derive(Clone, Debug)]
pub struct FirmwareLog {
    bytes: Vec<u8>,
}

impl FirmwareLog {
    /// A log with its header.
    pub fn new() -> Self {
        Self { bytes: tcg::sha256_header() }
    }

    /// Says from which locality the TPM was started: before any event of PCR 0.
    pub fn startup_locality(&mut self, locality: u8) {
        let data = [&LOCALITY[..], &[locality]].concat();
        self.bytes.extend(tcg::record(0, EV_NO_ACTION, &Digest([0; 32]), &data));
    }

    /// Appends an event whose digest is that of its data; the digest is what PCR `pcr` must be extended with.
    pub fn event(&mut self, pcr: u8, kind: u32, data: &[u8]) -> Digest {
        self.measured(pcr, kind, Digest::of(data), data)
    }

    /// Appends an event that measures something else than its data (a firmware volume, an EFI application).
    pub fn measured(&mut self, pcr: u8, kind: u32, digest: Digest, data: &[u8]) -> Digest {
        self.bytes.extend(tcg::record(pcr.into(), kind, &digest, data));
        digest
    }

    /// Appends a separator.
    pub fn separator(&mut self, pcr: u8) -> Digest {
        self.event(pcr, EV_SEPARATOR, &[0; 4])
    }

    /// The log.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Default for FirmwareLog {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tpm::pcr::extend;

    fn log() -> FirmwareLog {
        let mut log = FirmwareLog::new();
        log.event(0, 8, b"firmware 1");
        log.event(4, EV_EFI_ACTION, CAPPED_ACTIONS[0]);
        log.separator(0);
        log.separator(4);
        log
    }

    #[test]
    fn replay_adds_up_and_leaves_out_what_tells_nothing() {
        let replay = replay(log().as_bytes()).expect("good");
        let first = extend(&Digest([0; 32]), &Digest::of(b"firmware 1"));
        assert_eq!(replay.value(0), extend(&first, &Digest::of(&[0; 4])));
        assert_eq!(replay.measurements.len(), 1);
        assert_eq!(replay.measurements[0].digest, Digest::of(b"firmware 1"));
    }

    #[test]
    fn a_real_firmwares_log_replays_to_the_values_its_tpm_had() {
        // OVMF 2022.11 (Debian 12) under QEMU 7.2, booted to its shell; banks SHA-256 and SHA-384. The values stood in the
        // TPM's own state.
        let log = include_bytes!("../../tests/corpus/firmware-log/ovmf-two-banks");
        let replay = replay(log).expect("good");
        let separated = "3d458cfe55cc03ea1f443f1562beec8df51c75e14a9fcf9a7234a13f198e7969";
        let values = [
            (0, "ce729d0e02d46cecb9baa54228e55d1be49de54981fe6485a59bf9b222bcc061"),
            (1, "38cc739fefc308c7692dffc3d28b5c797f5a01b66eaad8cce47005daa15074e9"),
            (2, separated),
            (3, separated),
            (4, "50291ed1a756661b8e9904f21b66ecdaf747e6a99002202125de060ef5f16c4b"),
            (5, separated),
            (6, separated),
            (7, "65caf8dd1e0ea7a6347b635d2b379c93b9a1351edc2afc3ecda700e534eb3068"),
        ];
        assert_eq!(replay.pcrs.len(), values.len());
        for (pcr, value) in values {
            assert_eq!(replay.value(pcr).to_string(), value, "PCR {pcr}");
        }
        // Version, two firmware volumes; Secure Boot's five variables; boot order and options; the shell.
        let of = |pcr| replay.measurements.iter().filter(|m| m.pcr == pcr).count();
        assert_eq!([of(0), of(1), of(4), of(7)], [3, 4, 1, 5]);
    }

    #[test]
    fn a_unified_kernel_images_log_replays_to_what_the_machines_own_tpm_quoted() {
        // OVMF 2022.11 that boots a unified kernel image with systemd's stub 252: what the kernel showed as
        // binary_bios_measurements in a machine whose TPM then quoted these values.
        let log = include_bytes!("../../tests/corpus/firmware-log/ovmf-uki");
        let replay = replay(log).expect("good");
        let values = [
            (0, "1119fe2cc2550e9294b01a6355bfeb7ac1507139f07c0afec49f6644002acca9"),
            (4, "279fbc98035d2b948e8091ba31a0acd565d472634e9e2f3490196e4d8bfb87af"),
            (5, "a5ceb755d043f32431d63e39f5161464620a3437280494b5850dc1b47cc074e0"),
            (7, "65caf8dd1e0ea7a6347b635d2b379c93b9a1351edc2afc3ecda700e534eb3068"),
            (9, "46284b3786bc503ae5f999cb6f8b90c83d8d15a6b3d5ad2c1552947642fc070a"),
            (11, "667ee28cf0fb62d745d42bc16364685c9ff45ad59221c133a283c6178dff299e"),
        ];
        for (pcr, value) in values {
            assert_eq!(replay.value(pcr).to_string(), value, "PCR {pcr}");
        }
        // The image and the kernel in it; command line and initrd; name and content of the stub's four sections. What
        // firmware says as it starts and leaves the boot loader (PCR 5) tells nothing.
        let of = |pcr| replay.measurements.iter().filter(|m| m.pcr == pcr).count();
        assert_eq!([of(4), of(5), of(9), of(11)], [2, 0, 2, 8]);
    }

    #[test]
    fn attack_19_no_action_extends_nothing_and_start_values_are_the_specifications() {
        let mut with = FirmwareLog::new();
        with.measured(0, EV_NO_ACTION, Digest([7; 32]), b"anything");
        with.event(0, 8, b"v");
        with.separator(0);
        let mut without = FirmwareLog::new();
        without.event(0, 8, b"v");
        without.separator(0);
        assert_eq!(replay(with.as_bytes()), replay(without.as_bytes()));

        let mut local = FirmwareLog::new();
        local.startup_locality(3);
        local.event(0, 8, b"v");
        local.separator(0);
        let mut start = Digest([0; 32]);
        start.0[31] = 3;
        let expected = extend(&extend(&start, &Digest::of(b"v")), &Digest::of(&[0; 4]));
        assert_eq!(replay(local.as_bytes()).map(|r| r.value(0)), Ok(expected));

        let mut drtm = FirmwareLog::new();
        drtm.event(17, 8, b"v");
        let expected = extend(&Digest([0xff; 32]), &Digest::of(b"v"));
        assert_eq!(replay(drtm.as_bytes()).map(|r| (r.value(17), r.value(18), r.value(16))), {
            Ok((expected, Digest([0xff; 32]), Digest([0; 32])))
        });
    }

    #[test]
    fn attack_19_a_locality_out_of_place_is_refused() {
        let mut late = log();
        late.startup_locality(3);
        assert_eq!(replay(late.as_bytes()), Err(LogError::Locality));
        let mut twice = FirmwareLog::new();
        twice.startup_locality(3);
        twice.startup_locality(0);
        assert_eq!(replay(twice.as_bytes()), Err(LogError::Locality));
        let mut odd = FirmwareLog::new();
        odd.startup_locality(2);
        assert_eq!(replay(odd.as_bytes()), Err(LogError::Locality));
    }

    #[test]
    fn attack_16_unknown_events_pcrs_and_separators_are_refused() {
        let mut unknown = log();
        unknown.event(2, 0x8000_1234, b"x");
        assert!(matches!(replay(unknown.as_bytes()), Err(LogError::UnknownEvent { kind: 0x8000_1234, pcr: 2, .. })));
        for pcr in [10, 16, 23, 24] {
            let mut bad = log();
            bad.event(pcr, 8, b"x");
            assert_eq!(replay(bad.as_bytes()), Err(LogError::Pcr { log: LOG, pcr: pcr.into() }));
        }
        let mut unseparated = log();
        unseparated.event(7, 8, b"x");
        assert_eq!(replay(unseparated.as_bytes()), Err(LogError::Separator(7)));
        let mut error = log();
        error.event(5, EV_SEPARATOR, &[1, 0, 0, 0]);
        assert_eq!(replay(error.as_bytes()), Err(LogError::Separator(5)));
        let mut lying = log();
        lying.measured(5, EV_SEPARATOR, Digest::of(b"code"), &[0; 4]);
        assert_eq!(replay(lying.as_bytes()), Err(LogError::Separator(5)));
    }

    #[test]
    fn attack_17_an_action_with_another_digest_is_a_measurement() {
        let mut lying = log();
        lying.measured(4, EV_EFI_ACTION, Digest::of(b"code"), CAPPED_ACTIONS[0]);
        let replay = replay(lying.as_bytes()).expect("replays");
        assert!(replay.measurements.iter().any(|m| m.digest == Digest::of(b"code")));
    }
}
