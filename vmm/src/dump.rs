//! A core dump: guest memory and registers as an ELF core file, sealed for the customer before it leaves this process.

use crate::core_file;
use crate::machine::{InspectError, Running};
use attest::protocol::Release;
use attest::stream::{Direction, Sealer, StreamError, StreamInfo};
use policy::KeyId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use secretmem::Secret;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::time::{Duration, Instant};

/// Guest memory is copied in pieces of this many bytes.
const PIECE: usize = 64 * 1024;

/// Bytes written at once.
const PIPE_BUF: usize = 4096;

/// How long whoever takes the dump may take nothing of it: the VM stands still for him, and its socket serves nobody else.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often it is looked whether the VM ends.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

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

/// Writes a sealed core dump of a paused machine to `to`. Whoever holds its other end decides how fast that goes, not whether the
/// machine can be stopped meanwhile: then, and when nothing is taken for [`PATIENCE`], the dump ends with an error.
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
    let mut sealer = Sealer::new(Outlet { to, running }, key, &info)?;
    let bytes = copy(running, &mut sealer)?;
    let (_, tag) = sealer.finish()?;
    Ok(Written { bytes, tag: hex::encode(tag) })
}

/// Copies a machine that nobody lets run before this is done. It is looked at piece by piece, and not held over a write.
fn copy(running: &Running, to: &mut impl Write) -> Result<u64, DumpError> {
    let (vcpus, regions) = running.inspect(|frozen| (frozen.vcpus(), frozen.regions()))?;
    let head = core_file::head(&vcpus?, &regions);
    to.write_all(&head)?;
    let mut bytes = head.len() as u64;
    let mut piece = vec![0; PIECE];
    for (start, length) in regions {
        let mut done = 0;
        while done < length {
            let take = usize::try_from(length - done).map_or(PIECE, |left| left.min(PIECE));
            running.inspect(|frozen| frozen.read(start + done, &mut piece[..take]))??;
            to.write_all(&piece[..take])?;
            done += take as u64;
        }
        bytes += length;
    }
    Ok(bytes)
}

/// Where the dump goes.
struct Outlet<'a> {
    to: File,
    running: &'a Running,
}

impl Write for Outlet<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let begun = Instant::now();
        loop {
            if self.running.ends() {
                return Err(io::Error::other("the VM ends"));
            }
            // A poll that was interrupted found nothing.
            if poll(&mut [PollFd::new(&self.to, PollFlags::OUT)], Some(&LOOK)).is_ok_and(|ready| ready > 0) {
                break;
            }
            if begun.elapsed() >= PATIENCE {
                let what = format!("nobody took any of it for {} s", PATIENCE.as_secs());
                return Err(io::Error::new(ErrorKind::TimedOut, what));
            }
        }
        // Where poll(2) says that a pipe takes something, it takes PIPE_BUF bytes without waiting.
        self.to.write(&bytes[..bytes.len().min(PIPE_BUF)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
