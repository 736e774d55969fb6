//! Memory for blocks on their way to the store. It is used again and again: fresh memory for each request would cost a tenth of its
//! time.

use crate::format::{BLOCK, Block};
use std::cell::Cell;

/// Where it begins: no vector of a cipher's lies in two lines of the cache, and O_DIRECT takes it as it is.
const ALIGN: usize = 4096;

thread_local! {
    static ROOM: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Gives `f` this thread's room for `count` blocks, which hold anything.
pub(crate) fn with_room<R>(count: usize, f: impl FnOnce(&mut [Block]) -> R) -> R {
    let (mut room, bytes) = (ROOM.take(), count * BLOCK);
    if room.len() < bytes + ALIGN {
        room.resize(bytes + ALIGN, 0);
    }
    let start = room.as_ptr().align_offset(ALIGN).min(ALIGN);
    let done = f(room[start..start + bytes].as_chunks_mut().0);
    ROOM.set(room);
    done
}
