//! Address arithmetic of the bus, at every place that matters instead of at some.

use super::*;
use crate::machine::sync::lock;
use crate::machine::wires::mock::MockWires;
use std::sync::Mutex;

const WIDTHS: [usize; 4] = [1, 2, 4, 8];
const BAR_SIZE: u64 = 0x8000;

/// A function with a BAR of 32 KiB that notes each access, and 256 registers that hold their own number.
#[derive(Default)]
struct Noting {
    base: Mutex<Option<u64>>,
    accesses: Mutex<Vec<(u64, usize)>>,
}

impl PciFunction for Noting {
    fn config_read(&self, offset: u8, data: &mut [u8]) {
        data.iter_mut().enumerate().for_each(|(at, to)| *to = u8::try_from(usize::from(offset) + at).unwrap_or(0));
    }
    fn config_write(&self, offset: u8, data: &[u8]) {
        lock(&self.accesses).push((u64::from(offset), data.len()));
    }
    fn window(&self) -> Range<u64> {
        lock(&self.base).map_or(0..0, |base| base..base + BAR_SIZE)
    }
    fn bar_read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.accesses).push((offset, data.len()));
    }
    fn bar_write(&self, offset: u64, data: &[u8]) {
        lock(&self.accesses).push((offset, data.len()));
    }
}

fn bus(function: &Arc<Noting>) -> PciBus {
    let mut bus = PciBus::default();
    bus.add(function.clone()).expect("a slot");
    bus
}

/// An access reaches the BAR exactly where each of its bytes lies inside, and at the right offset.
#[test]
fn bars_decode_what_lies_inside_and_nothing_else() {
    let function = Arc::new(Noting::default());
    let bus = bus(&function);
    for base in [0, BAR_SIZE, 0xc001_0000, 0xdff0_0000, 0xe011_0000, 0xffff_8000] {
        *lock(&function.base) = Some(base);
        let edges = (0..24).chain(BAR_SIZE - 24..BAR_SIZE + 24);
        let below = (1..24).filter_map(|back| base.checked_sub(back));
        let all = edges.map(|at| base + at).chain(below).chain([u64::MAX - 7, u64::MAX, 1 << 32, 1 << 63]);
        for address in all {
            for width in WIDTHS {
                let inside = (0..width as u64)
                    .all(|at| address.checked_add(at).is_some_and(|byte| byte >= base && byte - base < BAR_SIZE));
                let hit = bus.memory_read(address, &mut [0; 8][..width]);
                assert_eq!(
                    (hit, bus.memory_write(address, &[0; 8][..width])),
                    (inside, inside),
                    "{address:#x} {width}"
                );
                let noted = std::mem::take(&mut *lock(&function.accesses));
                let want = if inside { vec![(address - base, width); 2] } else { vec![] };
                assert_eq!(noted, want, "{base:#x} {address:#x} {width}");
            }
        }
    }
}

/// Each byte of the enhanced configuration space, in each width: slot, function and register are taken apart right.
#[test]
fn every_register_of_every_slot_is_where_it_should_be() {
    let function = Arc::new(Noting::default());
    let bus = bus(&function);
    let mut bridge = [0; 256];
    HostBridge::default().config_read(0, &mut bridge);
    let byte = |at: u64| match (at >> 15, at >> 12 & 7, at & 0xfff) {
        (0, 0, register @ 0..256) => bridge[register as usize],
        (1, 0, register @ 0..256) => register as u8,
        (0 | 1, 0, _) => 0,
        _ => 0xff,
    };
    for at in 0..ECAM_SIZE {
        // Beyond the third slot there is nothing; each 4 KiB's edges will do.
        if at > 0x1_8000 && !(0x10..0xff0).contains(&(at & 0xfff)) && at & 0xf != 0 {
            continue;
        }
        for width in WIDTHS {
            // Guests access registers aligned; an access does not leave its function.
            if !at.is_multiple_of(width as u64) {
                continue;
            }
            let mut data = [0; 8];
            assert!(bus.memory_read(ECAM + at, &mut data[..width]));
            let want: Vec<u8> = (at..at + width as u64).map(byte).collect();
            assert_eq!(data[..width], want, "{at:#x} {width}");
        }
    }
    assert!(!bus.memory_read(ECAM + ECAM_SIZE, &mut [0]) && !bus.memory_read(ECAM - 1, &mut [0]));
}

/// Configuration mechanism 1 leads to the same places, for each address register that differs.
#[test]
fn the_ports_reach_what_the_memory_reaches() {
    let bus = bus(&Arc::new(Noting::default()));
    for slot in 0..4_u32 {
        for number in 0..8 {
            for register in (0..256).step_by(4) {
                let address = 1 << 31 | slot << 11 | number << 8 | register;
                bus.port_write(0xcf8, &address.to_le_bytes());
                for (shift, width) in [(0_u16, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2), (0, 4)] {
                    let (mut by_port, mut by_memory) = ([0; 4], [0; 4]);
                    bus.port_read(0xcfc + shift, &mut by_port[..width]);
                    let at = u64::from(slot << 15 | number << 12 | register) + u64::from(shift);
                    bus.memory_read(ECAM + at, &mut by_memory[..width]);
                    assert_eq!(by_port, by_memory, "{address:#x} {shift} {width}");
                }
            }
        }
    }
}

/// Each access to the MSI-X table and its pending bits, for tables of several sizes, against bytes that were written one entry
/// after the other.
#[test]
fn msix_tables_keep_what_is_written_where_it_is_written() {
    for vectors in [1_u16, 2, 3, 63, 64] {
        let size = 16 * u64::from(vectors);
        let offsets = (0..size.min(64) + 32).chain(size.saturating_sub(24)..size + 24).chain([0xff8, u64::MAX - 7]);
        for offset in offsets {
            for width in WIDTHS {
                let table = MsixTable::new(vectors, Arc::new(MockWires::default())).expect("eventfds");
                let data = [0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8];
                table.table_write(offset, &data[..width]);
                let mut model: Vec<u8> = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0].repeat(usize::from(vectors));
                for word in 0..width / 4 {
                    let at = offset.saturating_add(4 * word as u64);
                    if at % 4 == 0 && at.checked_add(4).is_some_and(|end| end <= size) {
                        let masked = [data[4 * word] & 1, 0, 0, 0];
                        let value = if at % 16 == 12 { &masked } else { &data[4 * word..4 * word + 4] };
                        model[at as usize..at as usize + 4].copy_from_slice(value);
                    }
                }
                let mut found = vec![0xee; size as usize];
                for (at, word) in (0..).step_by(4).zip(found.chunks_mut(4)) {
                    table.table_read(at, word);
                }
                assert_eq!(found, model, "{vectors} {offset:#x} {width}");
                let mut pending = [0xee; 8];
                table.pending_read(offset, &mut pending[..width]);
                assert_eq!(pending[..width], [0; 8][..width]);
            }
        }
    }
}
