//! IMA's binary measurement list, template `ima-ng` (Linux, Documentation/security/IMA-templates.rst), little-endian:
//!
//! ```text
//! u32 PCR 10, 20 bytes SHA-1 of the template data, u32 6 "ima-ng", u32 size of the template data,
//! { u32 length, "sha256:" NUL digest }, { u32 length, path NUL }
//! ```
//!
//! In the SHA-256 bank the kernel (5.8 and later) extends the SHA-256 of the template data. The first entry is the boot
//! aggregate: SHA-256 over PCRs 0 to 9.

use super::LogError;
use crate::protocol::IMA_LIMIT;
use crate::tpm::pcr::{composite, extend};
use policy::Digest;
use policy::reference::{IMA_PCR, Measurement};
use std::collections::BTreeMap;

const TEMPLATE: &[u8] = b"ima-ng";
const ALGORITHM: &[u8] = b"sha256:\0";
const AGGREGATE: &[u8] = b"boot_aggregate";
const MAX_PATH: usize = 4096 + 256;

/// How far a host's IMA log was replayed, and what PCR 10 was then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ImaState {
    /// Bytes of the log replayed.
    pub offset: u64,
    /// The value of PCR 10 after them.
    pub pcr: Digest,
}

impl ImaState {
    /// Before the first entry.
    pub const START: Self = Self { offset: 0, pcr: Digest([0; 32]) };
}

/// Replays `log`, which continues from `state`. At offset 0 the first entry must be the boot aggregate of `boot`, PCRs 0
/// to 9 as the firmware's log replays them. Gives the state after it, and the entries (the boot aggregate left out).
pub fn replay(
    log: &[u8],
    state: ImaState,
    boot: &BTreeMap<u8, Digest>,
) -> Result<(ImaState, Vec<Measurement>), LogError> {
    if log.len() > IMA_LIMIT {
        return Err(LogError::ImaTooLong);
    }
    let mut pcr = state.pcr;
    let mut measurements = Vec::new();
    let mut rest = log;
    let mut first = state.offset == 0;
    while !rest.is_empty() {
        let offset = log.len() - rest.len();
        let entry = read(&mut rest, offset)?;
        pcr = extend(&pcr, &entry.extended);
        if first {
            if entry.path != AGGREGATE || entry.digest != aggregate(boot) {
                return Err(LogError::BootAggregate);
            }
            first = false;
            continue;
        }
        measurements.push(Measurement {
            pcr: IMA_PCR,
            layer: Some(String::from_utf8_lossy(entry.path).into_owned()),
            version: None,
            digest: entry.digest,
            kind: "IMA".to_owned(),
        });
    }
    if first {
        return Err(LogError::BootAggregate);
    }
    Ok((ImaState { offset: state.offset + log.len() as u64, pcr }, measurements))
}

/// How many bytes of `log` are whole entries, from its beginning on: where a log that is read in pieces can be cut.
pub fn whole_entries(log: &[u8]) -> usize {
    let mut rest = log;
    loop {
        let end = log.len() - rest.len();
        if frame(&mut rest).is_none() {
            return end;
        }
    }
}

/// The boot aggregate: SHA-256 over PCRs 0 to 9.
pub fn aggregate(boot: &BTreeMap<u8, Digest>) -> Digest {
    composite(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], boot)
}

struct Entry<'a> {
    extended: Digest,
    digest: Digest,
    path: &'a [u8],
}

fn read<'a>(rest: &mut &'a [u8], offset: usize) -> Result<Entry<'a>, LogError> {
    let truncated = LogError::Truncated { log: "IMA", offset };
    let Frame { pcr, sha1, name, data } = frame(rest).ok_or(truncated)?;
    if pcr != u32::from(IMA_PCR) {
        return Err(LogError::Pcr { log: "IMA", pcr });
    }
    if sha1 == [0; 20] {
        return Err(LogError::ImaViolation(offset));
    }
    let (digest, path) = (name == TEMPLATE).then(|| template(data)).flatten().ok_or(LogError::ImaTemplate(offset))?;
    Ok(Entry { extended: Digest::of(data), digest, path })
}

struct Frame<'a> {
    pcr: u32,
    sha1: &'a [u8],
    name: &'a [u8],
    data: &'a [u8],
}

fn frame<'a>(rest: &mut &'a [u8]) -> Option<Frame<'a>> {
    let pcr = u32::from_le_bytes(take(rest, 4)?.try_into().ok()?);
    let sha1 = take(rest, 20)?;
    let name = sized(rest)?;
    let data = sized(rest)?;
    Some(Frame { pcr, sha1, name, data })
}

fn template(data: &[u8]) -> Option<(Digest, &[u8])> {
    let mut rest = data;
    let digest = sized(&mut rest)?.strip_prefix(ALGORITHM)?;
    let path = sized(&mut rest)?.strip_suffix(&[0])?;
    let fits = rest.is_empty() && path.len() <= MAX_PATH && !path.contains(&0);
    fits.then_some((Digest(digest.try_into().ok()?), path))
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(count)?;
    *rest = tail;
    Some(head)
}

fn sized<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32::from_le_bytes(take(rest, 4)?.try_into().ok()?);
    take(rest, usize::try_from(length).ok()?)
}

/// An IMA log being written, by whoever plays a kernel on a bare software TPM.
#[derive(Clone, Debug, Default)]
pub struct ImaLog {
    bytes: Vec<u8>,
}

impl ImaLog {
    /// An empty log.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the boot aggregate of PCRs 0 to 9; gives what PCR 10 must be extended with.
    pub fn boot_aggregate(&mut self, boot: &BTreeMap<u8, Digest>) -> Digest {
        self.append(AGGREGATE, &aggregate(boot))
    }

    /// Appends a file; gives what PCR 10 must be extended with.
    pub fn entry(&mut self, path: &str, digest: &Digest) -> Digest {
        self.append(path.as_bytes(), digest)
    }

    /// The log.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn append(&mut self, path: &[u8], digest: &Digest) -> Digest {
        let field = |content: &[u8]| [&(content.len() as u32).to_le_bytes(), content].concat();
        let hash = [ALGORITHM, digest.as_bytes()].concat();
        let data = [field(&hash), field(&[path, &[0]].concat())].concat();
        let sha1 = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, &data);
        self.bytes.extend(u32::from(IMA_PCR).to_le_bytes());
        self.bytes.extend_from_slice(sha1.as_ref());
        self.bytes.extend(field(TEMPLATE));
        self.bytes.extend(field(&data));
        Digest::of(&data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot() -> BTreeMap<u8, Digest> {
        [(0, Digest([1; 32])), (7, Digest([7; 32]))].into()
    }

    #[test]
    fn a_log_replays_whole_and_in_parts() {
        let mut log = ImaLog::new();
        let mut pcr = Digest([0; 32]);
        pcr = extend(&pcr, &log.boot_aggregate(&boot()));
        pcr = extend(&pcr, &log.entry("/usr/bin/fealty", &Digest([5; 32])));
        let cut = log.as_bytes().len();
        let (half, seen) = replay(log.as_bytes(), ImaState::START, &boot()).expect("good");
        assert_eq!((half.pcr, half.offset, seen.len()), (pcr, cut as u64, 1));
        pcr = extend(&pcr, &log.entry("/usr/bin/more", &Digest([6; 32])));
        let (end, seen) = replay(&log.as_bytes()[cut..], half, &boot()).expect("good");
        assert_eq!((end.pcr, seen.len()), (pcr, 1));
        assert_eq!(replay(log.as_bytes(), ImaState::START, &boot()).map(|(s, _)| s), Ok(end));
        assert_eq!(replay(&[], end, &boot()), Ok((end, vec![])));
    }

    #[test]
    fn attack_21_the_first_entry_must_be_the_boot_aggregate() {
        let mut other = ImaLog::new();
        other.boot_aggregate(&BTreeMap::new());
        assert_eq!(replay(other.as_bytes(), ImaState::START, &boot()), Err(LogError::BootAggregate));
        let mut none = ImaLog::new();
        none.entry("/bin/sh", &Digest([5; 32]));
        assert_eq!(replay(none.as_bytes(), ImaState::START, &boot()), Err(LogError::BootAggregate));
        assert_eq!(replay(&[], ImaState::START, &boot()), Err(LogError::BootAggregate));
    }

    #[test]
    fn attack_21_a_second_boot_aggregate_is_an_entry_like_any_other() {
        let mut log = ImaLog::new();
        log.boot_aggregate(&boot());
        log.boot_aggregate(&BTreeMap::new());
        let (_, seen) = replay(log.as_bytes(), ImaState::START, &boot()).expect("replays");
        assert_eq!(seen[0].digest, aggregate(&BTreeMap::new()));
    }

    #[test]
    fn violations_and_other_templates_are_refused() {
        let mut log = ImaLog::new();
        log.boot_aggregate(&boot());
        let mut violation = log.as_bytes().to_vec();
        violation[4..24].fill(0);
        assert_eq!(replay(&violation, ImaState::START, &boot()), Err(LogError::ImaViolation(0)));
        let mut sig = log.as_bytes().to_vec();
        sig[28 + 4] = b's';
        assert_eq!(replay(&sig, ImaState::START, &boot()), Err(LogError::ImaTemplate(0)));
        for keep in 1..log.as_bytes().len() {
            assert!(replay(&log.as_bytes()[..keep], ImaState::START, &boot()).is_err(), "{keep}");
        }
    }
}
