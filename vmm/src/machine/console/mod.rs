//! The console device (virtio 1.3, 5.3) with one port: [`ConsoleDevice`] is what the guest sees, its worker carries bytes between
//! the queues and a [`Line`]: what the serial port would have, or a socket to which one client at a time connects.

mod counters;
mod device;
#[doc(hidden)]
pub mod fuzz;
mod line;
mod worker;

pub use counters::ConsoleCounters;
pub use device::ConsoleDevice;
pub use line::Line;
