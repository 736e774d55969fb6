//! Interrupt sources and sleeping until one of them calls.

use core::sync::atomic::{AtomicU8, Ordering};

/// Number of sources; each has a byte in [`PENDING`] and a vector.
pub const SOURCES: usize = 8;
/// Disks that can have a source of their own.
pub const DISKS: usize = 4;
/// Vector of source 0; the others follow.
pub const FIRST_VECTOR: u8 = 0x40;
/// What the local APIC delivers when an interrupt went away again.
pub const SPURIOUS_VECTOR: u8 = 0xff;

/// Who may interrupt.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The local APIC's timer.
    Timer,
    /// The serial port has input.
    Serial,
    /// The ACPI event device or the power management block.
    Acpi,
    /// Any other virtio device.
    Device,
    /// Disk 0 to 3 finished requests.
    Disk(u8),
}

impl Source {
    /// The vector to program into an interrupt controller or an MSI.
    pub fn vector(self) -> u8 {
        FIRST_VECTOR + self.index() as u8
    }

    /// Whether it called since the last time this was asked.
    pub fn take(self) -> bool {
        PENDING.0[self.index()].swap(0, Ordering::AcqRel) != 0
    }

    /// Sleeps until it calls; returns at once if it already did. The call stays pending until [`Source::take`].
    /// May return early, when another source called.
    pub fn sleep(self) {
        idle(0xff << (8 * self.index()));
    }

    fn index(self) -> usize {
        match self {
            Source::Timer => 0,
            Source::Serial => 1,
            Source::Acpi => 2,
            Source::Device => 3,
            Source::Disk(n) => SOURCES - DISKS + usize::from(n) % DISKS,
        }
    }
}

/// Nothing left to do: sleeps for ever, taking interrupts.
pub fn sleep_forever() -> ! {
    loop {
        idle(0);
    }
}

unsafe extern "sysv64" {
    /// Sleeps until an interrupt, unless one of the bytes in `mask` is set already (`tables`).
    safe fn idle(mask: u64);
}

#[repr(C, align(8))]
struct Pending([AtomicU8; SOURCES]);

/// One byte for each source, set by its stub in ring 0; read as one word by the idle gate.
#[unsafe(no_mangle)]
static PENDING: Pending = Pending([const { AtomicU8::new(0) }; SOURCES]);
