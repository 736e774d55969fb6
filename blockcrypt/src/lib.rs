//! The encrypted volume (being built: the signatures stand, the blocks live in memory so far).

mod error;
mod hooks;
mod store;
mod volume;

pub use error::{AnchorRefused, VolumeError};
pub use hooks::{Anchors, Events, Nobody};
pub use store::{FileStore, MemoryStore, Store};
pub use volume::{Kek, OpenOptions, Volume, VolumeInfo};
