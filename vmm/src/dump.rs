//! A core dump: guest memory and registers as an ELF core file, sealed for the customer before it leaves this process.

use crate::core_file;
use crate::machine::{Frozen, InspectError, Running};
use attest::protocol::Release;
use attest::stream::{Direction, Sealer, StreamError, StreamInfo};
use policy::KeyId;
use secretmem::Secret;
use std::fs::File;
use std::io::Write;

/// Guest memory is copied in pieces of this many bytes.
const PIECE: usize = 64 * 1024;

/// Why a dump failed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The provider permitted it and sent no key.
    #[error("the key provider sent no key for it")]
    NoKey,
    /// The machine can't be looked at.
    #[error(transparent)]
    Inspect(#[from] InspectError),
    /// It could not be sealed or written.
    #[error("the sealed dump can't be written")]
    Seal(#[from] StreamError),
    /// The descriptor took nothing more.
    #[error("the sealed dump can't be written")]
    Write(#[from] std::io::Error),
}

/// What was written.
pub struct Written {
    /// Plain bytes of the core file.
    pub bytes: u64,
    /// The stream's final tag, in hex.
    pub tag: String,
}

/// Writes a sealed core dump of a paused machine to `to`.
pub fn write(
    running: &Running,
    to: File,
    key_id: KeyId,
    key: &Secret<32>,
    release: &Release,
) -> Result<Written, DumpError> {
    let info = StreamInfo {
        customer: &release.customer,
        vm: &release.vm,
        key_id,
        direction: Direction::CoreDump,
        connection: 0,
    };
    running.inspect(|frozen| {
        let mut sealer = Sealer::new(to, key, &info)?;
        let bytes = copy(frozen, &mut sealer)?;
        let (_, tag) = sealer.finish()?;
        Ok(Written { bytes, tag: hex::encode(tag) })
    })?
}

fn copy(frozen: &Frozen<'_>, to: &mut impl Write) -> Result<u64, DumpError> {
    let regions = frozen.regions();
    let head = core_file::head(&frozen.vcpus()?, &regions);
    to.write_all(&head)?;
    let mut bytes = head.len() as u64;
    let mut piece = vec![0; PIECE];
    for (start, length) in regions {
        let mut done = 0;
        while done < length {
            let take = usize::try_from(length - done).map_or(PIECE, |left| left.min(PIECE));
            frozen.read(start + done, &mut piece[..take])?;
            to.write_all(&piece[..take])?;
            done += take as u64;
        }
        bytes += length;
    }
    Ok(bytes)
}
