//! The lease on this side: the gate that vCPUs and disks ask, and the clock that says what is due.

mod clock;
mod gate;

pub use clock::{Due, LeaseClock};
pub use gate::{LeaseGate, boottime_ms};
