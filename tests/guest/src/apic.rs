//! Local APIC and I/O APIC, in their memory-mapped form: reachable from ring 3, and enabled at reset.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::interrupts::{SPURIOUS_VECTOR, Source};
use crate::memory::Registers;

/// Timer calls a second once [`start_timer`] ran.
pub const TICKS_PER_SECOND: u64 = 10;
/// Address of an MSI to this processor (the first; physical destination 0).
pub const MSI_ADDRESS: u64 = 0xfee0_0000;

const LOCAL: Registers = Registers::at(0xfee0_0000);
const IO: Registers = Registers::at(0xfec0_0000);

// Registers of the local APIC (Intel SDM 3A, table 11-1).
const TASK_PRIORITY: u64 = 0x80;
const SPURIOUS: u64 = 0xf0;
const TIMER: u64 = 0x320;
const TIMER_INITIAL: u64 = 0x380;
const TIMER_DIVIDE: u64 = 0x3e0;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_16: u32 = 0b0011;
/// KVM's and QEMU's local APICs count nanoseconds.
const TIMER_HERTZ: u64 = 1_000_000_000;

static TICKS: AtomicU64 = AtomicU64::new(0);

/// Lets interrupts in.
pub fn init() {
    LOCAL.write32(TASK_PRIORITY, 0);
    LOCAL.write32(SPURIOUS, 0x100 | u32::from(SPURIOUS_VECTOR));
}

/// Routes a line of the I/O APIC (edge, high) to `source`.
pub fn route(line: u8, source: Source) {
    let register = 0x10 + 2 * u32::from(line);
    write_io(register + 1, 0);
    write_io(register, u32::from(source.vector()));
}

/// Starts the periodic timer; the count of ticks starts anew.
pub fn start_timer() {
    TICKS.store(0, Ordering::Relaxed);
    LOCAL.write32(TIMER_DIVIDE, DIVIDE_BY_16);
    LOCAL.write32(TIMER, PERIODIC | u32::from(Source::Timer.vector()));
    LOCAL.write32(TIMER_INITIAL, (TIMER_HERTZ / 16 / TICKS_PER_SECOND) as u32);
}

/// Stops it.
pub fn stop_timer() {
    LOCAL.write32(TIMER_INITIAL, 0);
    Source::Timer.take();
}

/// Ticks seen since the timer started. Must be asked at least once a tick; calls that came together count once.
pub fn ticks() -> u64 {
    if Source::Timer.take() {
        TICKS.fetch_add(1, Ordering::Relaxed);
    }
    TICKS.load(Ordering::Relaxed)
}

fn write_io(register: u32, value: u32) {
    IO.write32(0, register);
    IO.write32(0x10, value);
}
