//! IMA's log: replayed piece by piece from where it was replayed last, then read from where it is asked for.

use attest::eventlog::{ImaState, LogError, ima};
use attest::protocol::IMA_LIMIT;
use policy::Digest;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;

/// Where Linux has IMA's log.
const LINUX_IMA_LOG: &str = "/sys/kernel/security/ima/binary_runtime_measurements";

/// IMA's log, as far as it was replayed.
#[derive(Debug)]
pub(super) struct ImaLog {
    path: PathBuf,
    boot: BTreeMap<u8, Digest>,
    state: ImaState,
}

/// A part of the log, and PCR 10 after it.
#[derive(Clone, Debug, Default)]
pub(super) struct ImaPart {
    pub(super) bytes: Vec<u8>,
    pub(super) offset: u64,
    pub(super) pcr: Option<Digest>,
}

/// An IMA log that can't be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImaError {
    /// The file.
    #[error("the IMA log {0} can't be read: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// Its content.
    #[error(transparent)]
    Log(#[from] LogError),
    /// It lost what was replayed already.
    #[error("the IMA log ends before byte {0}, to which it was replayed: reboot the host")]
    Short(u64),
    /// More than a piece of evidence may hold.
    #[error(
        "the IMA log has {0} bytes from where the key provider asks for it, of at most {IMA_LIMIT}: reboot the host"
    )]
    TooMuch(u64),
}

/// How much of the log is read at once, in bytes; far more than one entry.
const PIECE: usize = 1 << 20;

impl ImaLog {
    /// The log at `path`, else where Linux has it; `boot` is what the firmware's log replays to, for the boot aggregate.
    pub(super) fn new(path: Option<PathBuf>, boot: BTreeMap<u8, Digest>) -> Self {
        Self { path: path.unwrap_or_else(|| LINUX_IMA_LOG.into()), boot, state: ImaState::START }
    }

    /// The log from `offset` to its present end; nothing where none is asked for. All of it where it ends before `offset`: that is
    /// of an earlier boot, whose log was longer, and only evidence tells the key provider of the reset.
    pub(super) fn part(&mut self, offset: Option<u64>) -> Result<ImaPart, ImaError> {
        let Some(offset) = offset else { return Ok(ImaPart::default()) };
        self.catch_up()?;
        let offset = if offset > self.state.offset { 0 } else { offset };
        let length = self.state.offset - offset;
        let count = usize::try_from(length).ok().filter(|n| *n <= IMA_LIMIT).ok_or(ImaError::TooMuch(length))?;
        let bytes = self.read(offset, count)?;
        if bytes.len() < count {
            return Err(ImaError::Short(self.state.offset));
        }
        Ok(ImaPart { bytes, offset, pcr: Some(self.state.pcr) })
    }

    /// Replays what the log has grown by, however much that is.
    fn catch_up(&mut self) -> Result<(), ImaError> {
        loop {
            let piece = self.read(self.state.offset, PIECE)?;
            let last = piece.len() < PIECE;
            if last && piece.is_empty() && self.state != ImaState::START {
                return Ok(());
            }
            let whole = if last { piece.len() } else { ima::whole_entries(&piece) };
            // No entry fills a piece: what has none is no log, as its replay will say.
            let whole = if whole == 0 { piece.len() } else { whole };
            (self.state, _) = ima::replay(&piece[..whole], self.state, &self.boot)?;
            if last {
                return Ok(());
            }
        }
    }

    fn read(&self, start: u64, count: usize) -> Result<Vec<u8>, ImaError> {
        let read = || {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(start))?;
            let mut bytes = Vec::new();
            file.take(count as u64).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(|e| ImaError::Io(self.path.clone(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn parts_are_read_as_the_log_grows() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("ima.log");
        let mut whole = attest::eventlog::ImaLog::new();
        whole.boot_aggregate(&BTreeMap::new());
        fs::write(&path, whole.as_bytes()).expect("written");
        let mut log = ImaLog::new(Some(path.clone()), BTreeMap::new());
        let first = log.part(Some(0)).expect("good");
        assert_eq!(first.bytes, whole.as_bytes());
        let end = whole.as_bytes().len() as u64;
        whole.entry("/bin/fealty", &Digest([1; 32]));
        fs::write(&path, whole.as_bytes()).expect("written");
        let second = log.part(Some(end)).expect("good");
        assert_eq!(second.bytes, whole.as_bytes()[end as usize..]);
        assert_ne!(second.pcr, first.pcr);
        let again = log.part(Some(0)).expect("good");
        assert_eq!((again.bytes.as_slice(), again.pcr), (whole.as_bytes(), second.pcr));
        let of_an_earlier_boot = log.part(Some(end * 9)).expect("good");
        assert_eq!((of_an_earlier_boot.offset, of_an_earlier_boot.bytes), (0, again.bytes));
        assert!(log.part(None).expect("good").bytes.is_empty());
    }

    #[test]
    fn a_log_that_shrinks_or_is_garbage_is_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("ima.log");
        let mut whole = attest::eventlog::ImaLog::new();
        whole.boot_aggregate(&BTreeMap::new());
        fs::write(&path, whole.as_bytes()).expect("written");
        let mut log = ImaLog::new(Some(path.clone()), BTreeMap::new());
        log.part(Some(0)).expect("good");
        fs::write(&path, b"").expect("written");
        assert!(matches!(log.part(Some(0)), Err(ImaError::Short(_))));
        fs::write(&path, b"garbage").expect("written");
        let mut log = ImaLog::new(Some(path), BTreeMap::new());
        assert!(matches!(log.part(Some(0)), Err(ImaError::Log(_))));
        let mut none = ImaLog::new(Some(dir.path().join("none")), BTreeMap::new());
        assert!(matches!(none.part(Some(0)), Err(ImaError::Io(..))));
    }

    #[test]
    fn a_long_log_is_replayed_in_pieces_and_what_was_replayed_is_kept() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("ima.log");
        let mut whole = attest::eventlog::ImaLog::new();
        whole.boot_aggregate(&BTreeMap::new());
        let name = format!("/{}", "n".repeat(3000));
        let mut grow = |bytes: usize| {
            while whole.as_bytes().len() < bytes {
                whole.entry(&name, &Digest([1; 32]));
            }
            fs::write(&path, whole.as_bytes()).expect("written");
            whole.as_bytes().to_vec()
        };
        let three = grow(3 << 20);
        let first =
            ImaLog::new(Some(path.clone()), BTreeMap::new()).part(Some(0)).expect("more than a service reads at once");
        assert_eq!(first.bytes, three);
        let all = grow(IMA_LIMIT + 1);
        let mut log = ImaLog::new(Some(path.clone()), BTreeMap::new());
        assert!(matches!(log.part(Some(0)), Err(ImaError::TooMuch(n)) if n == all.len() as u64));
        let rest = log.part(Some(three.len() as u64)).expect("somebody who read the beginning gets the rest");
        assert_eq!(rest.bytes, all[three.len()..]);
        let from = ImaState { offset: three.len() as u64, pcr: first.pcr.expect("replayed") };
        assert_eq!(rest.pcr, Some(ima::replay(&rest.bytes, from, &BTreeMap::new()).expect("good").0.pcr));
        // The end of a log is where it is, also on the border of two pieces, and garbage is garbage there too.
        fs::write(&path, vec![0xff; 2 * PIECE]).expect("written");
        assert!(matches!(ImaLog::new(Some(path), BTreeMap::new()).part(Some(0)), Err(ImaError::Log(_))));
    }
}
