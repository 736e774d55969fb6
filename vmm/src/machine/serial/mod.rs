//! The serial port: [`SerialPort`] is what the guest sees, [`ConsoleInput`] the thread that carries what is typed.

mod device;
mod worker;

pub use device::ConsoleBackend;
pub(super) use device::SerialPort;
pub(super) use worker::ConsoleInput;
