//! The paravirtualised panic device (QEMU, docs/specs/pvpanic): a guest's kernel that panics says so, instead of spinning.

mod device;

pub(super) use device::PanicDevice;
