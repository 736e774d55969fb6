//! The small guest: boots in under a millisecond, does what its command line says, reports each step in one line on the serial
//! port and powers off. Tests and benchmarks run it where a stock kernel would be too slow or could not run at all.
//!
//! It starts at ring 0 as an operating system does, sets up segments and page tables, and then lives in ring 3 with I/O privilege
//! level 3: everything is mapped for it, ports and devices are its own, interrupts visit ring 0 for four instructions. On a KVM that
//! emulates ring 0 (each instruction there costs most of a microsecond) it so runs at native speed, and on VT-x and SVM it makes no
//! difference.
//!
//! Command line: `fealty.do=word,word,...`, carried out in order; [`commands`] has the words.

#![no_std]
#![no_main]

mod acpi;
mod apic;
mod boot;
mod commands;
mod entry;
mod interrupts;
mod memory;
mod paging;
mod pci;
mod port;
mod power;
mod serial;
mod tables;
mod virtio;

use core::panic::PanicInfo;

use boot::{BootInfo, Entry};
use power::Power;

/// Ring 3, stack and zeroed statics in place: the guest proper. `entry` says which protocol brought us here, `info` is the address of
/// its structure.
extern "C" fn ring3_main(entry: u32, info: u64) -> ! {
    let entry = Entry::from_register(entry);
    serial::init();
    serial::line(format_args!("ealty-guest {}", entry.name())); // the `f` went out first thing, in `entry`
    tables::init();
    apic::init();
    let boot = BootInfo::read(entry, info);
    commands::run(&boot);
    interrupts::sleep_forever()
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    serial::line(format_args!("panic: {}", info.message()));
    Power::last_resort()
}
