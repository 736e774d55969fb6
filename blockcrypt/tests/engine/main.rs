//! The engine as its users see it, over stores that are honest, lose power, run full, hang, or lie.

mod anchors;
mod batches;
mod bitmaps;
mod common;
mod device;
mod faults;
mod full;
mod fuzz;
mod growth;
mod hostile;
mod kill;
mod known;
mod model;
mod owner;
mod parallel;
mod rekey;
mod replays;
mod requests;
mod resize;
mod room;
mod slots;
mod snapshots;
mod sparse;
mod superblocks;
mod tamper;
mod unreadable;
