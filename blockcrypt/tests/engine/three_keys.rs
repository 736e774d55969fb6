//! What tests of keys share: a volume with data under three keys, and the key slots that a store holds.

use crate::common::{MIB, Provider, Random, SimStore, check_good, lock};
use fealty_blockcrypt::Volume;
use policy::AnchorMode;
use std::sync::Arc;

pub(crate) const BLOCKS: u64 = 200;

pub(crate) fn content(lba: u64) -> Vec<u8> {
    let mut block = vec![0; 4096];
    Random(lba).fill(&mut block);
    block
}

/// A volume with data under three keys.
pub(crate) fn made() -> (Arc<Provider>, Arc<SimStore>) {
    made_with(AnchorMode::Close)
}

pub(crate) fn made_with(mode: AnchorMode) -> (Arc<Provider>, Arc<SimStore>) {
    let (provider, store) = (Provider::new(mode), SimStore::new());
    provider.create(store.clone(), MIB).expect("a volume").close().expect("closed");
    for key in 1..4 {
        *lock(&provider.key_id) = key;
        let volume = provider.open(store.clone()).expect("opens");
        for lba in (0..BLOCKS).filter(|lba| lba % 3 == key - 1) {
            volume.write(lba * 4096, &content(lba)).expect("written");
        }
        volume.close().expect("closed");
    }
    (provider, store)
}

#[track_caller]
pub(crate) fn check(volume: &Volume) {
    for lba in 0..BLOCKS {
        let mut found = vec![0; 4096];
        volume.read(lba * 4096, &mut found).expect("read");
        assert!(found == content(lba), "{lba}");
    }
    check_good(volume);
}

/// The wrapped masters that the superblocks and slot pages of a store hold.
pub(crate) fn wrapped(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for block in bytes.as_chunks::<4096>().0 {
        if block.starts_with(b"fealty volume") {
            all.push(block[384 + 44..][..32].to_vec());
        } else if block[..4] == [3, 0, 0, 0] && block[48..64] == [0; 16] {
            let count = usize::from(block[112]);
            all.extend((0..count).map(|i| block[128 + i * 128 + 44..][..32].to_vec()));
        }
    }
    all
}

pub(crate) fn holds(bytes: &[u8], wrapped: &[Vec<u8>]) -> usize {
    wrapped.iter().filter(|w| bytes.windows(32).any(|b| b == &w[..])).count()
}
