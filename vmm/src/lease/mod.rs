//! The lease on this side: the gate that vCPUs and disks ask, the clock that says what is due, and the deadline for when
//! nobody looks at the clock.

mod clock;
mod deadline;
mod gate;

pub use clock::{Due, LeaseClock};
pub use deadline::Deadline;
pub use gate::{LeaseGate, boottime_ms};
