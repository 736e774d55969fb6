//! Where a volume lies: bytes at offsets, hostile as far as the engine is concerned.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `file` | a file or a block device |
//! | `lock` | who else may have it open |
//! | `uring`, `bounce` | past the page cache: several transfers at once, and buffers that lie badly |
//! | `memory` | bytes in memory, for tests |

mod bounce;
mod file;
mod lock;
mod memory;
mod uring;

pub use file::FileStore;
pub use lock::lock;
pub use memory::MemoryStore;

use std::io;
use std::sync::Arc;

/// Bytes at offsets. Nothing it returns is trusted; what [`sync_data`](Self::sync_data) acknowledged is hoped to be durable.
pub trait Store: Send + Sync {
    /// Its length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether it holds nothing at all.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buffer` from `offset`; an error where the store ends before.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Fills several buffers, each from its offset; an error where one can't be filled. What has to be fetched is fetched at the same
    /// time, where the store can do that.
    fn read_many_at(&self, parts: &mut [(u64, &mut [u8])]) -> io::Result<()> {
        parts.iter_mut().try_for_each(|(offset, buffer)| self.read_at(buffer, *offset))
    }

    /// Writes all of `bytes` at `offset`. Durable only after [`sync_data`](Self::sync_data).
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Writes several pieces, each at its offset, as [`write_at`](Self::write_at) does: at the same time, where the store can do that. After
    /// an error any of them may have been written.
    fn write_many_at(&self, parts: &[(u64, &[u8])]) -> io::Result<()> {
        parts.iter().try_for_each(|(offset, bytes)| self.write_at(bytes, *offset))
    }

    /// Whether transfers go on while something else is computed, so that it pays to hand it many in lots.
    fn overlaps(&self) -> bool {
        false
    }

    /// As [`read_many_at`](Self::read_many_at), but gives `ready` each lot of parts when they are filled, in order: those of later lots
    /// may still be under way then. A lot goes from the end of the one before it to its own in `ends`, which rise to the number of parts.
    /// After an error no later lot is given.
    fn read_lots_at(&self, parts: &mut [(u64, &mut [u8])], ends: &[usize], ready: &mut Ready) -> io::Result<()> {
        read_at_once(self, parts, ends, ready)
    }

    /// As [`write_many_at`](Self::write_many_at), but takes pieces in lots, and asks `next` for more, until it has none, while those before
    /// may be under way.
    fn write_lots_at<'a>(&self, next: &mut Next<'a, '_>) -> io::Result<()> {
        write_in_turn(self, next)
    }

    /// Returns when everything written before is durable.
    fn sync_data(&self) -> io::Result<()>;

    /// What is read from now on is what the store itself holds: after an fdatasync that failed, kernels keep what they could not write,
    /// show it to readers, and call it durable. Where the store can't do that, it does nothing.
    fn drop_cached(&self) -> io::Result<()> {
        Ok(())
    }

    /// Makes it `bytes` long. A store whose length is given (a block device) must have as many, and keeps the rest.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Sees to it that later writes to these bytes find room. Where the store can't promise that, it does nothing.
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let _ = (offset, bytes);
        Ok(())
    }

    /// Gives these bytes' room back: they read as anything until they are written again. Where the store can't do that, it does
    /// nothing.
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let _ = (offset, bytes);
        Ok(())
    }
}

/// Is given a lot's parts: from which offset each was read, and what.
pub type Ready<'r> = dyn FnMut(&mut [(u64, &mut [u8])]) + 'r;

/// Gives the next lot of parts: at which offset each is written, and what.
pub type Next<'a, 'n> = dyn FnMut() -> Option<Vec<(u64, &'a [u8])>> + 'n;

fn read_at_once<S: Store + ?Sized>(
    store: &S,
    parts: &mut [(u64, &mut [u8])],
    ends: &[usize],
    ready: &mut Ready,
) -> io::Result<()> {
    store.read_many_at(parts)?;
    let mut start = 0;
    for end in ends {
        ready(&mut parts[start..*end]);
        start = *end;
    }
    Ok(())
}

fn write_in_turn<'a, S: Store + ?Sized>(store: &S, next: &mut Next<'a, '_>) -> io::Result<()> {
    while let Some(parts) = next() {
        store.write_many_at(&parts)?;
    }
    Ok(())
}

impl<S: Store + ?Sized> Store for Arc<S> {
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_at(buffer, offset)
    }
    fn read_many_at(&self, parts: &mut [(u64, &mut [u8])]) -> io::Result<()> {
        (**self).read_many_at(parts)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        (**self).write_at(bytes, offset)
    }
    fn write_many_at(&self, parts: &[(u64, &[u8])]) -> io::Result<()> {
        (**self).write_many_at(parts)
    }
    fn overlaps(&self) -> bool {
        (**self).overlaps()
    }
    fn read_lots_at(&self, parts: &mut [(u64, &mut [u8])], ends: &[usize], ready: &mut Ready) -> io::Result<()> {
        (**self).read_lots_at(parts, ends, ready)
    }
    fn write_lots_at<'a>(&self, next: &mut Next<'a, '_>) -> io::Result<()> {
        (**self).write_lots_at(next)
    }
    fn sync_data(&self) -> io::Result<()> {
        (**self).sync_data()
    }
    fn drop_cached(&self) -> io::Result<()> {
        (**self).drop_cached()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        (**self).set_len(bytes)
    }
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        (**self).reserve(offset, bytes)
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        (**self).punch(offset, bytes)
    }
}
