//! Clones: the same data under another UUID and a master of its own.
//!
//! Every block is read, verified, and sealed anew. No key of the source's goes along: whoever has the clone's key can neither read
//! what the source writes later, nor make pages or blocks that pass for the source's, nor open a copy of the source when that is
//! retired. Places, log and lists begin anew; snapshots are not copied.

use super::Volume;
use super::batch::CHUNK;
use crate::format::BLOCK;
use crate::format::page::{ENTRIES, Entry, Tree};
use crate::{Anchors, Events, Kek, Store, VolumeError};
use policy::disk::VolumeGrant;
use std::sync::Arc;

impl Volume {
    /// Makes a clone of `source` (a volume or a snapshot of one) in `store`, whose content is lost, for `grant`, which has no anchor yet:
    /// like a volume that was created, it can't be opened before [`close`](Self::close) has set the first one. Requests that change the
    /// source wait meanwhile. `heard` is told of how many blocks of data of how many are copied.
    pub fn create_clone(
        store: impl Store + 'static,
        source: &Self,
        grant: &VolumeGrant,
        kek: &Kek,
        anchors: Arc<dyn Anchors>,
        events: Arc<dyn Events>,
        heard: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, VolumeError> {
        source.shared.ready()?;
        let _alone = source.shared.alone_anyway();
        let clone = Self::create(store, source.size(), grant, kek, anchors, events)?;
        source.copy_to(&clone, heard)?;
        Ok(clone)
    }

    /// Writes to `clone`, which is empty and of this size, what this volume holds. Nothing changes this one meanwhile.
    fn copy_to(&self, clone: &Self, heard: &mut dyn FnMut(u64, u64)) -> Result<(), VolumeError> {
        let blocks = self.shared.backing.geometry().blocks();
        let (mut done, all) = (0, self.shared.core()?.mapped);
        let mut buffer = vec![0; CHUNK as usize * BLOCK];
        let mut index = 0;
        while let Some(leaf) = self.shared.with_core(|core| core.forest.next_leaf(Tree::Map, index))? {
            index = leaf + 1;
            let mut at = leaf * ENTRIES as u64;
            let end = (at + ENTRIES as u64).min(blocks);
            let mut entries = [Entry::UNMAPPED; ENTRIES];
            let mut rest = &mut entries[..end.saturating_sub(at) as usize];
            self.shared.with_core(|core| core.lookup(at, rest))?;
            let holds = |entry: &Entry| entry.data().is_some();
            while let Some(skip) = rest.iter().position(holds) {
                let run = rest[skip..].iter().take_while(|entry| holds(entry)).take(CHUNK as usize).count();
                let offset = (at + skip as u64) * BLOCK as u64;
                let length = (run as u64 * BLOCK as u64).min(self.size() - offset) as usize;
                self.read(offset, &mut buffer[..length])?;
                clone.write(offset, &buffer[..length])?;
                done += run as u64;
                heard(done, all);
                rest = &mut rest[skip + run..];
                at += (skip + run) as u64;
            }
        }
        Ok(())
    }
}
