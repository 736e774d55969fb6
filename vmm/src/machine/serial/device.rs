//! A 16550A at COM1 (`vm-superio`), and what its line is connected to.

use crate::machine::sync::lock;
use crate::machine::wires::{WireError, new_event};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::EventFd;

const MODEM_CONTROL: u16 = 4;

/// The other end of the serial line.
pub struct ConsoleBackend {
    /// What the guest receives: a descriptor to read, non-blocking or not; none for a line on which nobody types.
    pub input: Option<OwnedFd>,
    /// What the guest sends, a byte a call. A vCPU waits for it, so it should not block for long; errors lose the byte.
    pub output: Box<dyn Write + Send>,
}

/// The port.
pub(crate) struct SerialPort {
    chip: Mutex<vm_superio::Serial<Line, Arc<Space>, Box<dyn Write + Send>>>,
    space: Arc<Space>,
    lost: AtomicU64,
}

/// The interrupt line.
struct Line(EventFd);

/// Tells the input thread that the guest has read everything.
pub(super) struct Space(pub(super) EventFd);

impl SerialPort {
    /// A port whose interrupts go to `interrupt` and whose output to `output`.
    pub(crate) fn new(interrupt: EventFd, output: Box<dyn Write + Send>) -> Result<Self, WireError> {
        let space = Arc::new(Space(new_event()?));
        let chip = Mutex::new(vm_superio::Serial::with_events(Line(interrupt), space.clone(), output));
        Ok(Self { chip, space, lost: AtomicU64::new(0) })
    }

    /// A byte from register `at` (0 to 7).
    pub(crate) fn read(&self, at: u16) -> u8 {
        u8::try_from(at).map_or(0xff, |at| lock(&self.chip).read(at))
    }

    /// A byte to register `at`.
    pub(crate) fn write(&self, at: u16, value: u8) {
        let done = u8::try_from(at).map(|at| lock(&self.chip).write(at, value));
        if let Ok(Err(_)) = done {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        if at == MODEM_CONTROL {
            // In loop mode the chip takes no input; this may be its end.
            self.space.in_buffer_empty();
        }
    }

    /// Puts what was typed into the FIFO, as much as fits, unless `hold` says no; gives how much was taken.
    pub(super) fn enqueue(&self, input: &[u8], hold: impl FnOnce() -> bool) -> usize {
        let mut chip = lock(&self.chip);
        if hold() { 0 } else { chip.enqueue_raw_bytes(input).unwrap_or(0) }
    }

    /// Room in the FIFO, in bytes.
    pub(super) fn room(&self) -> usize {
        lock(&self.chip).fifo_capacity()
    }

    /// Signalled when the FIFO has become empty.
    pub(super) fn space(&self) -> &EventFd {
        &self.space.0
    }

    /// Bytes that the other end did not take.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl SerialEvents for Space {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // The counter can't overflow: the input thread drains it.
        let _ = self.0.write(1);
    }
}
