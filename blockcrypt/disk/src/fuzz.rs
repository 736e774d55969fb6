//! Targets for fuzzing: every parser of bytes that a client supplies. None may panic, loop or allocate without bound, whatever the
//! bytes.

mod front_end;

pub use front_end::fuzz_vhost_user;

use crate::nbd::{Export, parsing};
use crate::vhost_user::request::{BATCH, LONGEST_CHAIN, Performer};
use crate::{Disk, Fault};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A client's side of an NBD handshake.
pub fn fuzz_nbd_handshake(data: &[u8]) {
    parsing::handshake(data, &export(data));
}

/// A client's requests after its handshake, as they come in pieces.
pub fn fuzz_nbd_requests(data: &[u8]) {
    parsing::requests(data, &export(data));
}

/// The memory of a guest, from its first byte on: a queue's descriptors, its rings at 0x200 and 0x300, and whatever they point at.
pub fn fuzz_virtio_queue(data: &[u8]) {
    const SIZE: u16 = 16;
    let Ok(memory) = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]) else { return };
    let _ = memory.write_slice(&data[..data.len().min(0x4000)], GuestAddress(0));
    let Ok(mut queue) = Queue::new(SIZE) else { return };
    let set = [
        queue.try_set_desc_table_address(GuestAddress(0)),
        queue.try_set_avail_ring_address(GuestAddress(0x200)),
        queue.try_set_used_ring_address(GuestAddress(0x300)),
    ];
    assert!(set.iter().all(Result::is_ok));
    queue.set_ready(true);
    let mut performer = Performer::new("fuzz");
    let disk = Checked::default();
    // A guest may go on for ever, but not within one look at its ring.
    for _ in 0..2 * SIZE {
        let Ok(available) = queue.iter(&memory) else { return };
        let chains: Vec<_> = available.take(1 + data.len() % BATCH).collect();
        let count = chains.len();
        let long: Vec<bool> = chains.iter().map(|chain| chain.clone().nth(LONGEST_CHAIN).is_some()).collect();
        let used = performer.perform(&disk, data.len().is_multiple_of(2), chains, &memory);
        assert_eq!(used.len(), count);
        assert!(used.iter().zip(long).all(|((_, written), long)| !long || *written == 0));
        if count == 0 || used.into_iter().any(|(head, written)| queue.add_used(&memory, head, written).is_err()) {
            return;
        }
    }
}

/// A disk that makes sure of what it is asked.
#[derive(Default)]
struct Checked {
    asked: AtomicU16,
    /// It was asked for what can't be: a thread that panics for that may have nobody who notices.
    wronged: AtomicBool,
}

impl Checked {
    fn check(&self, offset: u64, length: u64) -> Result<(), Fault> {
        let sectors = length > 0 && offset.is_multiple_of(512) && length.is_multiple_of(512);
        if !sectors || offset.checked_add(length).is_none_or(|end| end > self.size()) {
            self.wronged.store(true, Ordering::Relaxed);
            panic!("{length} bytes at {offset}");
        }
        // Now and then it fails.
        if self.asked.fetch_add(1, Ordering::Relaxed) % 7 == 6 { Err(Fault::Io) } else { Ok(()) }
    }
}

impl Disk for Checked {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Fault> {
        self.check(offset, buffer.len() as u64)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        self.check(offset, data.len() as u64)
    }

    fn flush(&self) -> Result<(), Fault> {
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Fault> {
        self.check(offset, length)
    }

    fn write_zeroes(&self, offset: u64, length: u64, _: bool) -> Result<(), Fault> {
        self.check(offset, length)
    }
}

/// Some of all exports.
fn export(data: &[u8]) -> Export {
    let odd = !data.len().is_multiple_of(2);
    Export {
        size: if odd { 1 << 20 } else { 1 << 62 },
        read_only: data.len().is_multiple_of(5),
        description: "a disk".into(),
    }
}
