//! IMA's log: read from where it is asked for, replayed from where it was replayed last.

use attest::eventlog::{ImaState, LogError, ima};
use attest::protocol::LOG_LIMIT;
use policy::Digest;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

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
    /// More was asked for than there is.
    #[error("the IMA log ends before byte {0}, from which it was asked for")]
    Short(u64),
}

impl ImaLog {
    /// The log at `path`, else where Linux has it; `boot` is what the firmware's log replays to, for the boot aggregate.
    pub(super) fn new(path: Option<PathBuf>, boot: BTreeMap<u8, Digest>) -> Self {
        Self { path: path.unwrap_or_else(|| LINUX_IMA_LOG.into()), boot, state: ImaState::START }
    }

    /// The log from `offset` to its present end; nothing where none is asked for.
    pub(super) fn part(&mut self, offset: Option<u64>) -> Result<ImaPart, ImaError> {
        let Some(offset) = offset else { return Ok(ImaPart::default()) };
        let start = offset.min(self.state.offset);
        let bytes = read_from(&self.path, start).map_err(|e| ImaError::Io(self.path.clone(), e))?;
        let from = |at: u64| usize::try_from(at - start).ok().and_then(|at| bytes.get(at..));
        let fresh = from(self.state.offset).ok_or(ImaError::Short(self.state.offset))?;
        (self.state, _) = ima::replay(fresh, self.state, &self.boot)?;
        let asked = from(offset).ok_or(ImaError::Short(offset))?;
        Ok(ImaPart { bytes: asked.to_vec(), offset, pcr: Some(self.state.pcr) })
    }
}

fn read_from(path: &Path, start: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LOG_LIMIT as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > LOG_LIMIT {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "too much was measured since the last attestation"));
    }
    Ok(bytes)
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
        assert!(matches!(log.part(Some(end * 9)), Err(ImaError::Short(_))));
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
}
