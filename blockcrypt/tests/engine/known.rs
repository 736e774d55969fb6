//! What is known of a volume's blocks where requests may fail: one of several things.

use crate::hostile::BLOCK;
use std::collections::BTreeSet;
use std::sync::Arc;

pub(crate) type Content = Arc<Vec<u8>>;

/// What one block of a volume may hold.
#[derive(Clone)]
pub(crate) struct Known {
    /// Now: one thing, unless something failed.
    pub(crate) now: BTreeSet<Content>,
    /// Besides, after the volume is opened again: what it held since the last state that can't be lost.
    pub(crate) since: BTreeSet<Content>,
}

impl Known {
    pub(crate) fn zero() -> Self {
        Self { now: BTreeSet::from([Arc::new(vec![0; BLOCK])]), since: BTreeSet::new() }
    }

    /// Its bytes from `start` on are replaced; if that failed, they may be.
    pub(crate) fn write(&mut self, start: usize, data: &[u8], failed: bool) {
        let changed = self.now.iter().map(|content| {
            let mut content = (**content).clone();
            content[start..start + data.len()].copy_from_slice(data);
            Arc::new(content)
        });
        let changed: BTreeSet<Content> = changed.collect();
        self.set(changed, failed);
    }

    pub(crate) fn set(&mut self, changed: BTreeSet<Content>, failed: bool) {
        self.since.extend(self.now.iter().cloned());
        if failed {
            self.now.extend(changed);
        } else {
            self.now = changed;
        }
    }

    pub(crate) fn opened(&mut self) {
        self.now.append(&mut self.since);
    }

    pub(crate) fn may_be(&self, found: &[u8], also_since: bool) -> bool {
        let mut all = self.now.iter().chain(self.since.iter().filter(|_| also_since));
        all.any(|content| **content == found)
    }
}

/// A block that nobody else has.
pub(crate) fn content(lba: u64, number: u64) -> Vec<u8> {
    [lba.to_le_bytes(), number.to_le_bytes()].concat().repeat(BLOCK / 16)
}
