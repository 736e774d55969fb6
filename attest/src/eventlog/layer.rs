//! The layer log: what the host measured of itself into PCR 14, in the order in which it was added.
//!
//! A log of the same format as the firmware's, with records of type EV_EVENT_TAG only. Their data is a
//! TCG_PCClientTaggedEvent, whose SHA-256 is the digest that is extended:
//!
//! ```text
//! layer   u32 LE tag 0x46454c01, u32 LE size, {u32 BE length, name}, {u32 BE length, version}, {u32 BE 32, file's digest}
//! seal    u32 LE tag 0x46454c02, u32 LE 32, SHA-256 of the log before this record
//! shell   u32 LE tag 0x46454c03, u32 LE 32, digest of the support shell
//! ```

use super::tcg::{self, EV_EVENT_TAG, Event};
use super::{LogError, Replay};
use policy::Digest;
use policy::reference::{LAYER_PCR, Measurement};

const LOG: &str = "layer";
const TAG_LAYER: u32 = 0x4645_4c01;
const TAG_SEAL: u32 = 0x4645_4c02;
const TAG_SHELL: u32 = 0x4645_4c03;

/// One layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerRecord {
    /// Its name: 1 to 255 bytes.
    pub name: String,
    /// Its version: 0 to 255 bytes.
    pub version: String,
    /// SHA-256 of the file.
    pub digest: Digest,
}

/// A record made but not yet in a log: extend PCR 14 with [`Self::digest`], then [`LayerLog::append`] it.
#[derive(Clone, PartialEq, Eq, Debug)]
#[must_use = "a record counts only once it is extended and appended"]
pub struct Pending {
    digest: Digest,
    content: Content,
    data: Vec<u8>,
}

impl Pending {
    /// What PCR 14 must be extended with.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    fn new(tag: u32, body: &[u8], content: Content) -> Self {
        let mut data = Vec::with_capacity(8 + body.len());
        data.extend(tag.to_le_bytes());
        data.extend((body.len() as u32).to_le_bytes());
        data.extend(body);
        Self { digest: Digest::of(&data), content, data }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Content {
    Layer(LayerRecord),
    Seal,
    Shell,
}

/// A layer log, complete so far.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerLog {
    bytes: Vec<u8>,
    layers: Vec<LayerRecord>,
    extended: Vec<Digest>,
    sealed: bool,
    shell: bool,
}

impl LayerLog {
    /// A log with its header.
    pub fn new() -> Self {
        Self { bytes: tcg::sha256_header(), layers: vec![], extended: vec![], sealed: false, shell: false }
    }

    /// Reads a log: every record must be a layer, a seal that fits, or a shell.
    pub fn parse(bytes: &[u8]) -> Result<Self, LogError> {
        let mut log = Self { bytes: bytes.to_vec(), ..Self::new() };
        for event in tcg::parse(bytes, LOG)? {
            let before = bytes.get(..event.offset).unwrap_or_default();
            let content = read(&event, before)?;
            log.note(content, event.digest);
        }
        Ok(log)
    }

    /// A record of a layer.
    pub fn layer(&self, name: &str, version: &str, digest: Digest) -> Result<Pending, LogError> {
        if !(1..=255).contains(&name.len()) || version.len() > 255 {
            return Err(LogError::LayerText);
        }
        let body = [name.as_bytes(), version.as_bytes(), digest.as_bytes()]
            .map(|field| [&(field.len() as u32).to_be_bytes(), field].concat())
            .concat();
        let record = LayerRecord { name: name.to_owned(), version: version.to_owned(), digest };
        Ok(Pending::new(TAG_LAYER, &body, Content::Layer(record)))
    }

    /// A seal over the log so far.
    pub fn seal(&self) -> Pending {
        Pending::new(TAG_SEAL, Digest::of(&self.bytes).as_bytes(), Content::Seal)
    }

    /// The record of a support shell: from then on the host gets no keys.
    pub fn shell(&self, digest: Digest) -> Pending {
        Pending::new(TAG_SHELL, digest.as_bytes(), Content::Shell)
    }

    /// Appends a record made for this log, after PCR 14 was extended with its digest.
    pub fn append(&mut self, record: Pending) {
        self.bytes.extend(tcg::record(LAYER_PCR.into(), EV_EVENT_TAG, &record.digest, &record.data));
        self.note(record.content, record.digest);
    }

    /// The log.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its layers, in order.
    pub fn layers(&self) -> &[LayerRecord] {
        &self.layers
    }

    /// Whether its last record is a seal.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Whether a support shell was started.
    pub fn has_shell(&self) -> bool {
        self.shell
    }

    /// The value of PCR 14 after this log, starting from `start` (its value after the firmware's log).
    pub fn pcr_value(&self, start: Digest) -> Digest {
        self.extended.iter().fold(start, |value, digest| crate::tpm::pcr::extend(&value, digest))
    }

    fn note(&mut self, content: Content, digest: Digest) {
        self.extended.push(digest);
        self.sealed = content == Content::Seal;
        match content {
            Content::Layer(record) => self.layers.push(record),
            Content::Seal => {}
            Content::Shell => self.shell = true,
        }
    }
}

impl Default for LayerLog {
    fn default() -> Self {
        Self::new()
    }
}

/// Replays a layer log on top of what the firmware's log gave. It must be sealed and without a shell.
pub fn replay(bytes: &[u8], replay: &mut Replay) -> Result<(), LogError> {
    let log = LayerLog::parse(bytes)?;
    if log.has_shell() {
        return Err(LogError::Shell);
    }
    if !log.is_sealed() {
        return Err(LogError::Unsealed);
    }
    let value = log.pcr_value(replay.value(LAYER_PCR));
    replay.pcrs.insert(LAYER_PCR, value);
    replay.measurements.extend(log.layers.into_iter().map(|layer| Measurement {
        pcr: LAYER_PCR,
        layer: Some(layer.name),
        version: Some(layer.version),
        digest: layer.digest,
        kind: "layer".to_owned(),
    }));
    Ok(())
}

fn read(event: &Event<'_>, before: &[u8]) -> Result<Content, LogError> {
    if event.pcr != u32::from(LAYER_PCR) {
        return Err(LogError::Pcr { log: LOG, pcr: event.pcr });
    }
    if event.kind != EV_EVENT_TAG {
        return Err(LogError::NotALayer("not of type EV_EVENT_TAG"));
    }
    if event.digest != Digest::of(event.data) {
        return Err(LogError::Digest(LOG));
    }
    let (tag, rest) = split_u32(event.data, u32::from_le_bytes).ok_or(LogError::NotALayer("without a tag"))?;
    let (size, body) = split_u32(rest, u32::from_le_bytes).ok_or(LogError::NotALayer("without a size"))?;
    if size as usize != body.len() {
        return Err(LogError::NotALayer("of another size than it says"));
    }
    match tag {
        TAG_LAYER => read_layer(body).map(Content::Layer).ok_or(LogError::NotALayer("with other fields")),
        TAG_SEAL if body == Digest::of(before).as_bytes() => Ok(Content::Seal),
        TAG_SEAL => Err(LogError::Unsealed),
        TAG_SHELL => Ok(Content::Shell),
        _ => Err(LogError::NotALayer("with an unknown tag")),
    }
}

fn read_layer(body: &[u8]) -> Option<LayerRecord> {
    let (name, rest) = field(body)?;
    let (version, rest) = field(rest)?;
    let (digest, rest) = field(rest)?;
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
    let record = LayerRecord { name: text(name)?, version: text(version)?, digest: Digest(digest.try_into().ok()?) };
    let fits = rest.is_empty() && (1..=255).contains(&name.len()) && version.len() <= 255;
    fits.then_some(record)
}

fn field(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = split_u32(bytes, u32::from_be_bytes)?;
    rest.split_at_checked(length as usize)
}

fn split_u32(bytes: &[u8], read: fn([u8; 4]) -> u32) -> Option<(u32, &[u8])> {
    bytes.split_first_chunk::<4>().map(|(head, rest)| (read(*head), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> LayerLog {
        let mut log = LayerLog::new();
        for (name, byte) in [("fealty-host", 1), ("fealty", 2)] {
            let record = log.layer(name, "1.0", Digest([byte; 32])).expect("fits");
            log.append(record);
        }
        let seal = log.seal();
        log.append(seal);
        log
    }

    #[test]
    fn a_sealed_log_replays_to_its_layers() {
        let log = log();
        assert_eq!(LayerLog::parse(log.as_bytes()), Ok(log.clone()));
        let mut state = Replay::default();
        assert_eq!(replay(log.as_bytes(), &mut state), Ok(()));
        assert_eq!(state.measurements.len(), 2);
        assert_eq!(state.measurements[1].layer.as_deref(), Some("fealty"));
        assert_eq!(state.value(14), log.pcr_value(Digest([0; 32])));
    }

    #[test]
    fn later_layers_need_a_new_seal() {
        let mut log = log();
        let more = log.layer("agent", "", Digest([3; 32])).expect("fits");
        log.append(more);
        assert!(!log.is_sealed());
        assert_eq!(replay(log.as_bytes(), &mut Replay::default()), Err(LogError::Unsealed));
        let seal = log.seal();
        log.append(seal);
        assert_eq!(replay(log.as_bytes(), &mut Replay::default()), Ok(()));
    }

    #[test]
    fn attack_16_a_log_cut_before_its_seal_or_with_a_layer_taken_out_is_refused() {
        let whole = log();
        let header = tcg::sha256_header().len();
        let events: Vec<usize> = tcg::parse(whole.as_bytes(), LOG).expect("good").iter().map(|e| e.offset).collect();
        let unsealed = &whole.as_bytes()[..events[2]];
        assert_eq!(replay(unsealed, &mut Replay::default()), Err(LogError::Unsealed));
        let taken_out = [&whole.as_bytes()[..header], &whole.as_bytes()[events[1]..]].concat();
        assert_eq!(replay(&taken_out, &mut Replay::default()), Err(LogError::Unsealed));
    }

    #[test]
    fn attack_26_a_shell_is_refused_even_under_a_seal() {
        let mut log = log();
        let shell = log.shell(Digest([9; 32]));
        log.append(shell);
        let seal = log.seal();
        log.append(seal);
        assert_eq!(replay(log.as_bytes(), &mut Replay::default()), Err(LogError::Shell));
    }

    #[test]
    fn attack_17_records_that_are_no_layers_are_refused() {
        let with = |record: Vec<u8>| LayerLog::parse(&[tcg::sha256_header(), record].concat());
        let data = log().layer("a", "", Digest([1; 32])).expect("fits").data;
        let digest = Digest::of(&data);
        assert!(with(tcg::record(14, EV_EVENT_TAG, &digest, &data)).is_ok());
        assert!(matches!(with(tcg::record(13, EV_EVENT_TAG, &digest, &data)), Err(LogError::Pcr { pcr: 13, .. })));
        assert!(matches!(with(tcg::record(14, 0x0d, &digest, &data)), Err(LogError::NotALayer(_))));
        assert_eq!(with(tcg::record(14, EV_EVENT_TAG, &Digest([0; 32]), &data)), Err(LogError::Digest(LOG)));
        for change in [|d: &mut Vec<u8>| d[0] ^= 0x10, |d: &mut Vec<u8>| d.push(0), |d: &mut Vec<u8>| d[11] = 200] {
            let mut bad = data.clone();
            change(&mut bad);
            let record = tcg::record(14, EV_EVENT_TAG, &Digest::of(&bad), &bad);
            assert!(matches!(with(record), Err(LogError::NotALayer(_))));
        }
    }
}
