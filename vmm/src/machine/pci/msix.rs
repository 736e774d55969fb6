//! MSI-X (PCI local bus 3.0, 6.8.2): the vector table, the pending bits, and the interrupt lines behind them.

use crate::machine::sync::lock;
use crate::machine::wires::{Message, WireError, Wires};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// The most vectors a function may have here: the pending bits fit one word.
pub const VECTORS_MAX: u16 = 64;
/// Bytes of the pending bits.
pub const MSIX_PBA_SIZE: u64 = 8;
const ENTRY_SIZE: usize = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;
const ENTRY_MASKED: u32 = 1;

/// The vectors of one function.
pub struct MsixTable {
    wires: Arc<dyn Wires>,
    lines: Vec<(u32, EventFd)>,
    state: Mutex<State>,
    failures: AtomicU64,
}

struct State {
    control: u16,
    entries: Vec<Entry>,
    pending: u64,
    /// Its function has left the bus.
    withdrawn: bool,
}

/// One vector: address (low, high), data, control.
#[derive(Clone, Copy)]
struct Entry([u32; 4]);

impl MsixTable {
    /// `vectors` vectors (1 to [`VECTORS_MAX`]), all masked.
    pub fn new(vectors: u16, wires: Arc<dyn Wires>) -> Result<Self, WireError> {
        let vectors = vectors.clamp(1, VECTORS_MAX);
        let lines = (0..vectors).map(|_| wires.message_line()).collect::<Result<_, _>>()?;
        let state = Mutex::new(State::new(vectors));
        Ok(Self { wires, lines, state, failures: AtomicU64::new(0) })
    }

    /// How many vectors.
    pub fn vectors(&self) -> u16 {
        self.lines.len() as u16
    }

    /// How often KVM refused a route that the guest asked for.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Raises vector `vector`, or notes it as pending where it is masked. Without MSI-X nothing happens: there is no INTx.
    pub fn signal(&self, vector: u16) {
        let mut state = lock(&self.state);
        let Some((_, event)) = self.lines.get(usize::from(vector)) else { return };
        if state.withdrawn || state.control & CONTROL_ENABLE == 0 {
            return;
        }
        if state.masked(vector) {
            state.pending |= 1 << vector;
        } else {
            // The counter can't overflow: KVM drains it.
            let _ = event.write(1);
        }
    }

    /// The guest wrote message control.
    pub fn set_control(&self, control: u16) {
        let mut state = lock(&self.state);
        if state.control != control {
            state.control = control;
            (0..self.vectors()).for_each(|vector| self.settle(&mut state, vector));
        }
    }

    /// Reads the table from `offset`, in aligned units of 4 or 8 bytes.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let mut at = offset;
        for word in data.chunks_mut(4) {
            let value = state.word(at).unwrap_or(0).to_le_bytes();
            word.copy_from_slice(&value[..word.len()]);
            at = at.saturating_add(4);
        }
    }

    /// Writes the table from `offset`, in aligned units of 4 or 8 bytes; other accesses are undefined by the
    /// specification and ignored here.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        let mut at = offset;
        for word in data.chunks_exact(4) {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            if let Some((vector, field)) = state.locate(at) {
                state.entries[vector].0[field] = if field == 3 { value & ENTRY_MASKED } else { value };
                self.settle(&mut state, vector as u16);
            }
            at = at.saturating_add(4);
        }
    }

    /// Reads the pending bits from `offset`.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        let pending = lock(&self.state).pending.to_le_bytes();
        let from = pending.iter().skip(offset.min(MSIX_PBA_SIZE) as usize).chain(std::iter::repeat(&0));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    /// Everything as after power-on.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        *state = State { withdrawn: state.withdrawn, ..State::new(self.vectors()) };
    }

    /// Gives the interrupt lines back: nothing raises an interrupt from now on.
    pub fn withdraw(&self) {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.withdrawn, true) {
            return;
        }
        for (line, event) in &self.lines {
            // A line that KVM does not let go of is not used again.
            let _ = self.wires.release_line(*line, event);
        }
    }

    /// Brings KVM's route up to date with what the guest wrote, and raises what was pending.
    fn settle(&self, state: &mut State, vector: u16) {
        if state.withdrawn || state.control & CONTROL_ENABLE == 0 || state.masked(vector) {
            return;
        }
        let (line, event) = &self.lines[usize::from(vector)];
        if self.wires.route(*line, event, state.entries[usize::from(vector)].message()).is_err() {
            self.failures.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if state.pending & 1 << vector != 0 {
            state.pending &= !(1 << vector);
            let _ = event.write(1);
        }
    }
}

impl State {
    fn new(vectors: u16) -> Self {
        Self {
            control: 0,
            entries: vec![Entry([0, 0, 0, ENTRY_MASKED]); usize::from(vectors)],
            pending: 0,
            withdrawn: false,
        }
    }

    fn masked(&self, vector: u16) -> bool {
        self.control & CONTROL_MASK != 0 || self.entries[usize::from(vector)].0[3] & ENTRY_MASKED != 0
    }

    fn locate(&self, offset: u64) -> Option<(usize, usize)> {
        let at = usize::try_from(offset).ok().filter(|at| at.is_multiple_of(4))?;
        let (vector, field) = (at / ENTRY_SIZE, at % ENTRY_SIZE / 4);
        (vector < self.entries.len()).then_some((vector, field))
    }

    fn word(&self, offset: u64) -> Option<u32> {
        self.locate(offset).map(|(vector, field)| self.entries[vector].0[field])
    }
}

impl Entry {
    fn message(&self) -> Message {
        Message { address: u64::from(self.0[1]) << 32 | u64::from(self.0[0]), data: self.0[2] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::wires::mock::MockWires;
    use proptest::prelude::*;

    fn table() -> (Arc<MockWires>, MsixTable) {
        let wires = Arc::new(MockWires::default());
        let table = MsixTable::new(2, wires.clone()).expect("eventfds");
        (wires, table)
    }

    fn program(table: &MsixTable, vector: u64, data: u32, control: u32) {
        for (field, value) in [(0, 0xfee0_1000), (4, 0), (8, data), (12, control)] {
            table.table_write(vector * 16 + field, &u32::to_le_bytes(value));
        }
    }

    fn raised(table: &MsixTable, vector: usize) -> bool {
        table.lines[vector].1.read().is_ok()
    }

    #[test]
    fn a_vector_is_raised_once_it_is_enabled_and_unmasked() {
        let (wires, table) = table();
        table.signal(0);
        assert!(!raised(&table, 0), "MSI-X is off");
        table.set_control(CONTROL_ENABLE);
        program(&table, 0, 0x41, 0);
        assert_eq!(lock(&wires.routes)[&0], Message { address: 0xfee0_1000, data: 0x41 });
        table.signal(0);
        assert!(raised(&table, 0) && !raised(&table, 1));
        table.signal(7);
    }

    #[test]
    fn a_masked_vector_waits_in_the_pending_bits() {
        let (_, table) = table();
        table.set_control(CONTROL_ENABLE);
        program(&table, 1, 0x42, 1);
        table.signal(1);
        let mut pending = [0; 8];
        table.pending_read(0, &mut pending);
        assert_eq!((pending[0], raised(&table, 1)), (2, false));
        program(&table, 1, 0x42, 0);
        table.pending_read(0, &mut pending);
        assert_eq!((pending[0], raised(&table, 1)), (0, true));
        table.set_control(CONTROL_ENABLE | CONTROL_MASK);
        table.signal(1);
        assert!(!raised(&table, 1));
        table.set_control(CONTROL_ENABLE);
        assert!(raised(&table, 1));
    }

    proptest! {
        #[test]
        fn no_access_panics(offset in 0_u64..4096, data: [u8; 8], width in 0_usize..4, control: u16, vector: u16) {
            let (_, table) = table();
            let mut bytes = data;
            let bytes = &mut bytes[..1 << width];
            table.set_control(control);
            table.table_write(offset, bytes);
            table.table_read(offset, bytes);
            table.pending_read(offset, bytes);
            table.signal(vector);
            table.reset();
        }
    }
}
