//! What the servers lend.

use blockcrypt::VolumeError;

/// A disk as its users see it: 512-byte sectors. Requests come from several threads at once.
pub trait Disk: Send + Sync {
    /// Bytes, a multiple of 512.
    fn size(&self) -> u64;

    /// Whether it takes no writes.
    fn read_only(&self) -> bool;

    /// Fills `buffer` from `offset`; both in sectors.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Fault>;

    /// Writes `data` at `offset`; both in sectors.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault>;

    /// Several reads at once, each an offset and a buffer; says of each how it went, in order.
    fn read_many(&self, requests: &mut [(u64, &mut [u8])]) -> Vec<Result<(), Fault>> {
        requests.iter_mut().map(|(offset, buffer)| self.read(*offset, buffer)).collect()
    }

    /// Several writes at once, each an offset and data; says of each how it went, in order. Where two meet, the later one holds.
    fn write_many(&self, requests: &[(u64, &[u8])]) -> Vec<Result<(), Fault>> {
        requests.iter().map(|(offset, data)| self.write(*offset, data)).collect()
    }

    /// Returns when every write that returned before is durable.
    fn flush(&self) -> Result<(), Fault>;

    /// The bytes are needed no more; they read as zeroes.
    fn discard(&self, offset: u64, length: u64) -> Result<(), Fault>;

    /// The bytes read as zeroes; room for them is given up only if `may_unmap`.
    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<(), Fault>;
}

/// Why a request failed, as far as whoever asked needs to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// It could not be read or written, or is not what was written.
    #[error("input or output error")]
    Io,
    /// No room.
    #[error("no room is left")]
    Full,
    /// It takes no writes.
    #[error("read only")]
    ReadOnly,
    /// The request makes no sense.
    #[error("not within the disk, or not whole sectors")]
    Request,
    /// The disk takes no requests any more.
    #[error("closed")]
    Gone,
}

impl From<&VolumeError> for Fault {
    fn from(error: &VolumeError) -> Self {
        match error {
            VolumeError::Full(_) => Self::Full,
            VolumeError::ReadOnly => Self::ReadOnly,
            VolumeError::Request { .. } => Self::Request,
            VolumeError::NoKeys | VolumeError::Closed => Self::Gone,
            _ => Self::Io,
        }
    }
}
