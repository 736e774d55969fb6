//! Buffers that lie where O_DIRECT does not take them: they are copied through memory that lies better.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What O_DIRECT may ask for at most: that buffers in memory, offsets and lengths are multiples of this.
pub(super) const ALIGN: usize = 4096;
/// Bytes that a buffer which lies badly is copied through at a time.
pub(super) const BOUNCE: usize = 256 << 10;

thread_local! {
    /// Where they are copied.
    static BOUNCED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Whether O_DIRECT takes `buffer` as it lies.
pub(super) fn lies_well(buffer: &[u8]) -> bool {
    buffer.as_ptr().align_offset(ALIGN) == 0
}

/// As `read_exact_at`.
pub(super) fn read(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    bounced(|room| {
        for (at, piece) in (offset..).step_by(BOUNCE).zip(buffer.chunks_mut(BOUNCE)) {
            let room = &mut room[..piece.len()];
            file.read_exact_at(room, at)?;
            piece.copy_from_slice(room);
        }
        Ok(())
    })
}

/// As `write_all_at`.
pub(super) fn write(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    bounced(|room| {
        for (at, piece) in (offset..).step_by(BOUNCE).zip(bytes.chunks(BOUNCE)) {
            let room = &mut room[..piece.len()];
            room.copy_from_slice(piece);
            file.write_all_at(room, at)?;
        }
        Ok(())
    })
}

/// Gives `f` [`BOUNCE`] bytes of memory that begin where O_DIRECT wants them.
fn bounced(f: impl FnOnce(&mut [u8]) -> io::Result<()>) -> io::Result<()> {
    let mut memory = BOUNCED.take();
    memory.resize(BOUNCE + ALIGN, 0);
    let start = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
    let done = f(&mut memory[start..start + BOUNCE]);
    BOUNCED.set(memory);
    done
}
