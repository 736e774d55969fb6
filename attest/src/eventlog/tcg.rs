//! Records of the TCG crypto-agile log, little-endian:
//!
//! ```text
//! first    u32 PCR 0, u32 EV_NO_ACTION, 20 zero bytes, u32 size, TCG_EfiSpecIDEvent
//! header   "Spec ID Event03\0", u32 class, u8 minor, u8 major, u8 errata, u8 uintn,
//!          u32 count, count x {u16 algorithm, u16 digest size}, u8 size, vendor info
//! others   u32 PCR, u32 type, u32 count, count x {u16 algorithm, digest}, u32 size, data
//! ```

use super::LogError;
use crate::protocol::LOG_LIMIT;
use policy::Digest;

pub(crate) const EV_NO_ACTION: u32 = 0x03;
pub(crate) const EV_SEPARATOR: u32 = 0x04;
pub(crate) const EV_EVENT_TAG: u32 = 0x06;
pub(crate) const EV_EFI_ACTION: u32 = 0x8000_0007;

const SIGNATURE: &[u8; 16] = b"Spec ID Event03\0";
const ALG_SHA256: u16 = 0x000b;
const MAX_BANKS: u32 = 16;

/// One record after the header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event<'a> {
    /// Where it begins in the log, in bytes.
    pub offset: usize,
    /// The PCR.
    pub pcr: u32,
    /// Its type, a number that [`event_name`] knows or not.
    pub kind: u32,
    /// The SHA-256 digest that was extended (unless the type is EV_NO_ACTION).
    pub digest: Digest,
    /// Its data.
    pub data: &'a [u8],
}

/// Reads `log` (called `name` in errors), all of it.
pub fn parse<'a>(log: &'a [u8], name: &'static str) -> Result<Vec<Event<'a>>, LogError> {
    if log.len() > LOG_LIMIT {
        return Err(LogError::TooLong(name));
    }
    let mut cursor = Cursor { log, at: 0 };
    let banks = cursor.header().ok_or(LogError::Header(name))?;
    if !banks.contains(&(ALG_SHA256, 32)) {
        return Err(LogError::NoSha256(name));
    }
    let mut events = Vec::new();
    while cursor.at < log.len() {
        let offset = cursor.at;
        let event = cursor.event(&banks).ok_or(LogError::Truncated { log: name, offset })?;
        events.push(event.map_err(|WrongBanks| LogError::Banks { log: name, offset })?);
    }
    Ok(events)
}

/// The TCG's name of an event type; `None` for types that are not known, which a verifier refuses.
pub fn event_name(kind: u32) -> Option<&'static str> {
    KNOWN.iter().find(|(known, _)| *known == kind).map(|(_, name)| *name)
}

/// The header record of a log with these banks (algorithm, digest length).
pub fn header(banks: &[(u16, u16)]) -> Vec<u8> {
    let mut spec = SIGNATURE.to_vec();
    spec.extend([0, 0, 0, 0, 0, 2, 0, 2]);
    spec.extend((banks.len() as u32).to_le_bytes());
    for (algorithm, size) in banks {
        spec.extend(algorithm.to_le_bytes());
        spec.extend(size.to_le_bytes());
    }
    spec.push(0);
    let mut out = Vec::new();
    out.extend(0_u32.to_le_bytes());
    out.extend(EV_NO_ACTION.to_le_bytes());
    out.extend([0; 20]);
    out.extend((spec.len() as u32).to_le_bytes());
    out.extend(spec);
    out
}

/// The header of a log with the SHA-256 bank alone.
pub fn sha256_header() -> Vec<u8> {
    header(&[(ALG_SHA256, 32)])
}

/// A record of a log with the SHA-256 bank alone.
pub fn record(pcr: u32, kind: u32, digest: &Digest, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(50 + data.len());
    out.extend(pcr.to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend(1_u32.to_le_bytes());
    out.extend(ALG_SHA256.to_le_bytes());
    out.extend(digest.as_bytes());
    out.extend((data.len() as u32).to_le_bytes());
    out.extend(data);
    out
}

struct WrongBanks;

struct Cursor<'a> {
    log: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(count)?;
        let bytes = self.log.get(self.at..end)?;
        self.at = end;
        Some(bytes)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }

    /// The first record: the banks it announces.
    fn header(&mut self) -> Option<Vec<(u16, u16)>> {
        if self.u32()? != 0 || self.u32()? != EV_NO_ACTION || self.take(20)? != [0; 20] {
            return None;
        }
        let size = self.u32()? as usize;
        let end = self.at.checked_add(size)?;
        if self.take(16)? != SIGNATURE {
            return None;
        }
        self.take(8)?;
        let count = self.u32()?;
        if count == 0 || count > MAX_BANKS {
            return None;
        }
        let mut banks: Vec<(u16, u16)> = Vec::new();
        for _ in 0..count {
            let bank = (self.u16()?, self.u16()?);
            if bank.1 == 0 || bank.1 > 64 || banks.iter().any(|b| b.0 == bank.0) {
                return None;
            }
            banks.push(bank);
        }
        let vendor = self.u8()?;
        self.take(vendor.into())?;
        (self.at == end).then_some(banks)
    }

    /// One record; `None` where the log ends inside it.
    fn event(&mut self, banks: &[(u16, u16)]) -> Option<Result<Event<'a>, WrongBanks>> {
        let offset = self.at;
        let (pcr, kind, count) = (self.u32()?, self.u32()?, self.u32()?);
        if count as usize != banks.len() {
            return Some(Err(WrongBanks));
        }
        let mut seen: Vec<u16> = Vec::new();
        let mut digest = None;
        for _ in 0..count {
            let algorithm = self.u16()?;
            let Some((_, size)) = banks.iter().find(|b| b.0 == algorithm) else { return Some(Err(WrongBanks)) };
            let bytes = self.take(usize::from(*size))?;
            if seen.contains(&algorithm) {
                return Some(Err(WrongBanks));
            }
            seen.push(algorithm);
            if algorithm == ALG_SHA256 {
                digest = bytes.try_into().ok().map(Digest);
            }
        }
        let size = self.u32()? as usize;
        let data = self.take(size)?;
        Some(digest.map(|digest| Event { offset, pcr, kind, digest, data }).ok_or(WrongBanks))
    }
}

/// Event types of the PC Client Platform Firmware Profile, table 27.
const KNOWN: &[(u32, &str)] = &[
    (0x01, "EV_POST_CODE"),
    (EV_NO_ACTION, "EV_NO_ACTION"),
    (EV_SEPARATOR, "EV_SEPARATOR"),
    (0x05, "EV_ACTION"),
    (EV_EVENT_TAG, "EV_EVENT_TAG"),
    (0x07, "EV_S_CRTM_CONTENTS"),
    (0x08, "EV_S_CRTM_VERSION"),
    (0x09, "EV_CPU_MICROCODE"),
    (0x0a, "EV_PLATFORM_CONFIG_FLAGS"),
    (0x0b, "EV_TABLE_OF_DEVICES"),
    (0x0c, "EV_COMPACT_HASH"),
    (0x0d, "EV_IPL"),
    (0x0e, "EV_IPL_PARTITION_DATA"),
    (0x0f, "EV_NONHOST_CODE"),
    (0x10, "EV_NONHOST_CONFIG"),
    (0x11, "EV_NONHOST_INFO"),
    (0x12, "EV_OMIT_BOOT_DEVICE_EVENTS"),
    (0x13, "EV_POST_CODE2"),
    (0x8000_0001, "EV_EFI_VARIABLE_DRIVER_CONFIG"),
    (0x8000_0002, "EV_EFI_VARIABLE_BOOT"),
    (0x8000_0003, "EV_EFI_BOOT_SERVICES_APPLICATION"),
    (0x8000_0004, "EV_EFI_BOOT_SERVICES_DRIVER"),
    (0x8000_0005, "EV_EFI_RUNTIME_SERVICES_DRIVER"),
    (0x8000_0006, "EV_EFI_GPT_EVENT"),
    (EV_EFI_ACTION, "EV_EFI_ACTION"),
    (0x8000_0008, "EV_EFI_PLATFORM_FIRMWARE_BLOB"),
    (0x8000_0009, "EV_EFI_HANDOFF_TABLES"),
    (0x8000_000a, "EV_EFI_PLATFORM_FIRMWARE_BLOB2"),
    (0x8000_000b, "EV_EFI_HANDOFF_TABLES2"),
    (0x8000_000c, "EV_EFI_VARIABLE_BOOT2"),
    (0x8000_000d, "EV_EFI_GPT_EVENT2"),
    (0x8000_0010, "EV_EFI_HCRTM_EVENT"),
    (0x8000_00e0, "EV_EFI_VARIABLE_AUTHORITY"),
    (0x8000_00e1, "EV_EFI_SPDM_FIRMWARE_BLOB"),
    (0x8000_00e2, "EV_EFI_SPDM_FIRMWARE_CONFIG"),
    (0x8000_00e3, "EV_EFI_SPDM_DEVICE_POLICY"),
    (0x8000_00e4, "EV_EFI_SPDM_DEVICE_AUTHORITY"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn log() -> Vec<u8> {
        [sha256_header(), record(0, 8, &Digest([1; 32]), b"v1"), record(7, 4, &Digest([2; 32]), &[0; 4])].concat()
    }

    #[test]
    fn what_is_written_reads_back() {
        let log = log();
        let events = parse(&log, "firmware").expect("good");
        let seen: Vec<_> = events.iter().map(|e| (e.pcr, e.kind, e.digest, e.data)).collect();
        assert_eq!(seen, [(0, 8, Digest([1; 32]), &b"v1"[..]), (7, 4, Digest([2; 32]), &[0; 4][..])]);
    }

    #[test]
    fn attack_14_15_a_log_without_sha256_is_refused() {
        assert_eq!(parse(&header(&[(4, 20)]), "firmware"), Err(LogError::NoSha256("firmware")));
        assert_eq!(parse(&header(&[(0x0b, 20)]), "firmware"), Err(LogError::NoSha256("firmware")));
        assert_eq!(parse(&header(&[(0x0b, 32), (0x0b, 32)]), "firmware"), Err(LogError::Header("firmware")));
        // The header promises two banks, the records carry one.
        let mixed = [header(&[(4, 20), (0x0b, 32)]), record(0, 8, &Digest([1; 32]), b"")].concat();
        assert!(matches!(parse(&mixed, "firmware"), Err(LogError::Banks { .. })));
    }

    #[test]
    fn attack_39_lengths_that_lie_are_refused() {
        let mut bad = log();
        let at = sha256_header().len() + 4 + 4 + 4 + 2 + 32;
        bad[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(parse(&bad, "firmware"), Err(LogError::Truncated { .. })));
        assert_eq!(parse(&vec![0; LOG_LIMIT + 1], "firmware"), Err(LogError::TooLong("firmware")));
    }

    proptest! {
        #[test]
        fn a_cut_log_is_refused_or_ends_between_records(keep in 0..250_usize) {
            let log = log();
            prop_assume!(keep < log.len());
            let whole = [sha256_header().len(), sha256_header().len() + record(0, 8, &Digest([1; 32]), b"v1").len()];
            prop_assert_eq!(parse(&log[..keep], "firmware").is_ok(), whole.contains(&keep));
        }
    }
}
