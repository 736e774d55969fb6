//! The guest's memory map, as both boot protocols tell it (ACPI 6.5, 15: address range types).

use crate::machine::layout::{ECAM, ECAM_SIZE, KERNEL, LOW_RAM_END};
use crate::machine::memory::Memory;

/// A range of the map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) kind: u32,
}

/// Usable memory.
pub(super) const RAM: u32 = 1;
/// Not usable.
pub(super) const RESERVED: u32 = 2;

/// The map, rising.
pub(super) fn ranges(memory: &Memory) -> Vec<Range> {
    let mut map = vec![
        Range { start: 0, length: LOW_RAM_END, kind: RAM },
        Range { start: LOW_RAM_END, length: KERNEL - LOW_RAM_END, kind: RESERVED },
        Range { start: KERNEL, length: memory.low_end() - KERNEL, kind: RAM },
        Range { start: ECAM, length: ECAM_SIZE, kind: RESERVED },
    ];
    map.extend(memory.ranges().skip(1).map(|(start, length)| Range { start, length, kind: RAM }));
    map
}
