//! Disks that come and go while the machine runs: [`Slots`] is what the guest sees, three registers by which it is told and answers;
//! the [`Bay`] is where its owner brings a disk and asks for it back.
//!
//! ```text
//! owner ─► Bay::plug ─► its thread: device, threads, slot ─► Slots::filled ─► event, Notify(slot, 1) ─► the guest's driver
//! owner ─► Bay::ask ──► Slots::ask ─► event, Notify(slot, 3) ─► the driver lets go, _EJ0 ─► off the bus ─► Bay's thread clears away
//! ```
//!
//! The vCPU that ejects takes the function off the bus and goes on: nothing in which it could have to wait is done by it.

mod device;
mod worker;

pub(super) use device::{Emptied, Slots};
pub(super) use worker::{Bay, Ground};
pub use worker::{Gone, PlugError, UnplugError};
