//! Event logs: the TCG crypto-agile format (PC Client Platform Firmware Profile 1.06, section 10), the host's layer log in
//! the same format, and IMA's. Parsing is total and bounded; replay gives PCR values and what was measured.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`tcg`] | records: parser and writer |
//! | [`firmware`] | replay of the firmware's log, and a builder for whoever plays firmware |
//! | [`layer`] | the layer log: records, seals, and their replay |
//! | [`ima`] | IMA's binary list, template `ima-ng` |

pub mod firmware;
pub mod ima;
pub mod layer;
pub mod tcg;

pub use firmware::FirmwareLog;
pub use ima::{ImaLog, ImaState};
pub use layer::LayerLog;
pub use tcg::Event;

use policy::Digest;
use policy::reference::Measurement;
use std::collections::BTreeMap;

/// A log that is none, or that says something no host of ours logs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LogError {
    /// Too long.
    #[error("the {0} log is longer than {limit} bytes", limit = crate::protocol::LOG_LIMIT)]
    TooLong(&'static str),
    /// Too much for one piece of evidence.
    #[error("the IMA log grew by more than {limit} bytes since it was last read: reboot the host", limit = crate::protocol::IMA_LIMIT)]
    ImaTooLong,
    /// Ends inside a record.
    #[error("the {log} log ends inside a record, at byte {offset}")]
    Truncated {
        /// Which log.
        log: &'static str,
        /// Where the record begins.
        offset: usize,
    },
    /// The header is not "Spec ID Event03" or lists algorithms twice.
    #[error("the {0} log does not begin with a crypto-agile header (Spec ID Event03)")]
    Header(&'static str),
    /// No SHA-256.
    #[error("the {0} log has no SHA-256 bank")]
    NoSha256(&'static str),
    /// Digests that the header does not announce.
    #[error("a record of the {log} log at byte {offset} has other digests than the log's header announces")]
    Banks {
        /// Which log.
        log: &'static str,
        /// Where.
        offset: usize,
    },
    /// An event type that is not known.
    #[error("the {log} log has an event of the unknown type 0x{kind:08x} for PCR {pcr}")]
    UnknownEvent {
        /// Which log.
        log: &'static str,
        /// Its type.
        kind: u32,
        /// Its PCR.
        pcr: u32,
    },
    /// No such PCR, or not one that this log may extend.
    #[error("the {log} log has an event for PCR {pcr}, where it has no business")]
    Pcr {
        /// Which log.
        log: &'static str,
        /// Its number.
        pcr: u32,
    },
    /// A digest that is not that of the data it stands beside.
    #[error("a record of the {0} log has another digest than its data")]
    Digest(&'static str),
    /// A startup locality after an extend, twice, or an impossible one.
    #[error("the firmware log's startup locality is out of place")]
    Locality,
    /// A separator that reports an error, or none.
    #[error("the firmware log has no good separator for PCR {0}: the firmware did not finish its measurements")]
    Separator(u8),
    /// Something else in the layer log.
    #[error("the layer log holds a record that is no layer: {0}")]
    NotALayer(&'static str),
    /// Not closed by a seal, or a seal that does not fit.
    #[error("the layer log is not closed by its seal")]
    Unsealed,
    /// A support shell was started.
    #[error("a support shell was started on this host; it gets no keys until it is rebooted")]
    Shell,
    /// Text that no record takes.
    #[error("a layer's name is 1 to 255 bytes, its version 0 to 255")]
    LayerText,
    /// Another template or algorithm in IMA's log.
    #[error("the IMA log has an entry that is not ima-ng with SHA-256, at byte {0}")]
    ImaTemplate(usize),
    /// A violation: a file changed while it was measured.
    #[error("the IMA log has a violation at byte {0}")]
    ImaViolation(usize),
    /// No, or a wrong, boot aggregate.
    #[error("the IMA log does not begin with the boot aggregate of the PCRs as the firmware log replays them")]
    BootAggregate,
}

/// PCR values and measurements that a log adds up to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Replay {
    /// Values of the PCRs that were extended (or started elsewhere than at zero).
    pub pcrs: BTreeMap<u8, Digest>,
    /// What was measured, in log order, separators and capped actions left out.
    pub measurements: Vec<Measurement>,
}

impl Replay {
    /// The value of a PCR: its initial one where nothing was extended (part 1 of the PC Client Platform TPM Profile,
    /// section 4.6: PCRs 17 to 22 begin with all bits set).
    pub fn value(&self, pcr: u8) -> Digest {
        self.pcrs.get(&pcr).copied().unwrap_or(initial(pcr))
    }

    pub(crate) fn extend(&mut self, pcr: u8, digest: &Digest) {
        let value = crate::tpm::pcr::extend(&self.value(pcr), digest);
        self.pcrs.insert(pcr, value);
    }
}

pub(crate) fn initial(pcr: u8) -> Digest {
    if (17..=22).contains(&pcr) { Digest([0xff; 32]) } else { Digest([0; 32]) }
}
