//! The engine as its users see it, over stores that are honest, lose power, run full, hang, or lie.

mod anchors;
mod batches;
mod common;
mod faults;
mod fuzz;
mod kill;
mod model;
mod parallel;
mod rekey;
mod requests;
mod room;
mod snapshots;
mod tamper;
