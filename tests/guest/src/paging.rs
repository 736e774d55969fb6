//! Mapping more than entry did. The page tables are ordinary memory of ring 3: new entries need no visit to ring 0, because a missing
//! one is never cached.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const LARGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x67;
/// As a table, and uncached, dirty, 2 MiB.
const DEVICE: u64 = 0xff;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Tables to spare: one or two for each GiB that devices live in.
const SPARE: usize = 16;

#[repr(C, align(4096))]
struct Table([AtomicU64; ENTRIES as usize]);

static TABLES: [Table; SPARE] = [const { Table([const { AtomicU64::new(0) }; ENTRIES as usize]) }; SPARE];
static TAKEN: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {
    safe static pml4: Table;
}

/// Makes `length` bytes of physical memory at `address` visible at the same address, uncached where not visible yet.
///
/// # Panics
/// When the addresses wrap or lie so far apart that the spare tables run out.
pub fn map(address: u64, length: u64) {
    let end = address.checked_add(length).expect("a range that wraps");
    let mut at = address & !(LARGE - 1);
    while at < end {
        map_large(at);
        at += LARGE;
    }
}

fn map_large(address: u64) {
    let slot = |level: u32| (address >> (12 + 9 * level)) % ENTRIES;
    let directory = below(below(&pml4, slot(3)), slot(2));
    let entry = &directory.0[slot(1) as usize];
    if entry.load(Ordering::Relaxed) == 0 {
        entry.store(address | DEVICE, Ordering::Release);
    }
}

/// The table under an entry; a spare one if there was none.
fn below(table: &'static Table, slot: u64) -> &'static Table {
    let entry = &table.0[slot as usize];
    let value = entry.load(Ordering::Relaxed);
    if value == 0 {
        let spare = TABLES.get(TAKEN.fetch_add(1, Ordering::Relaxed)).expect("a spare page table");
        entry.store(spare as *const Table as u64 | TABLE, Ordering::Release);
        return spare;
    }
    // SAFETY: every table in use is one of this guest's statics, identity-mapped and only ever accessed through atomics.
    unsafe { &*((value & ADDRESS) as *const Table) }
}
