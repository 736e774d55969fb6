//! The encrypted volume: secret, authenticated block by block, fresh, and crash-safe with no barrier but the guest's own FLUSH.
//!
//! A [`Volume`] lies in a [`Store`] (a file or a block device), which nobody trusts. AES-256-XTS keeps its blocks secret,
//! HMAC-SHA256 authenticates them and all metadata, and an *anchor* of 120 bytes, kept by the key provider through [`Anchors`],
//! names the newest state, so that an older copy does not open. Blocks are never overwritten in place: a write goes to a free
//! block, its record to a log, and a checkpoint folds the log into a map. [`mod@format`] draws all of it, and says what a crash
//! and a hostile store can do.
//!
//! ```
//! # use fealty_blockcrypt as blockcrypt;
//! # use blockcrypt::{AnchorRefused, Anchors, Kek, MemoryStore, Nobody, OpenOptions, Volume};
//! # use std::sync::{Arc, Mutex};
//! # struct Kept(Mutex<Option<policy::VolumeAnchor>>);
//! # impl Anchors for Kept {
//! #     fn keep(&self, a: &policy::VolumeAnchor) -> Result<(), AnchorRefused> { *self.0.lock().unwrap() = Some(a.clone()); Ok(()) }
//! # }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let kept = Arc::new(Kept(Mutex::new(None)));
//! # let mut grant = policy::disk::VolumeGrant { volume: policy::VolumeId::random(), customer: "acme".parse()?,
//! #     cipher: policy::disk::CipherSuite::Aes256XtsHmacSha256, kek_id: policy::KeyId(1), key_id: policy::KeyId(2),
//! #     open_number: 1.try_into()?, anchor: None, anchor_mode: policy::AnchorMode::Close };
//! # let kek = Kek::new(policy::KeyId(1), secretmem::Secret::random()?);
//! let store = Arc::new(MemoryStore::default());
//! let volume = Volume::create(store.clone(), 1 << 20, &grant, &kek, kept.clone(), Arc::new(Nobody))?;
//! volume.write(4096, &[7; 512])?;
//! grant.anchor = Some(volume.close()?);
//! grant.open_number = 2.try_into()?;
//!
//! let volume = Volume::open(store, &grant, &kek, OpenOptions::default(), kept, Arc::new(Nobody))?;
//! let mut sector = [0; 512];
//! volume.read(4096, &mut sector)?;
//! assert_eq!(sector, [7; 512]);
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`mod@format`] | the bytes on disk |
//! | `keys` | from the key-encryption key to what seals blocks |
//! | `crypto` | their ciphers, on the fastest path that the processor has |
//! | `store`, `hooks` | what a volume stands on: bytes at offsets, anchors, events |
//! | `backing`, `room`, `tree`, `space`, `blockset` | verified blocks, memory for them, cached pages, free blocks |
//! | `volume` | the engine |

mod backing;
#[doc(hidden)]
pub mod bench;
mod blockset;
mod crypto;
mod error;
pub mod format;
#[doc(hidden)]
pub mod fuzz;
mod hooks;
mod keys;
mod room;
mod space;
mod store;
mod tree;
mod volume;

pub use error::{AnchorRefused, VolumeError};
pub use format::geometry::store_size;
pub use hooks::{Anchors, Events, Nobody};
pub use keys::Kek;
pub use store::{FileStore, MemoryStore, Next, Ready, Store, lock};
pub use volume::{
    CheckReport, CheckStep, OpenOptions, PlainInfo, SnapshotInfo, Volume, VolumeInfo, erase, inspect, make_room,
};
