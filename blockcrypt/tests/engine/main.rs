//! The engine as its users see it, over stores that are honest, lose power, run full, hang, or lie.

mod anchors;
mod batches;
mod common;
mod fuzz;
mod hostile;
mod kill;
mod model;
mod owner;
mod parallel;
mod rekey;
mod replays;
mod requests;
mod room;
mod snapshots;
mod tamper;
