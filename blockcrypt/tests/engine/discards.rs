//! Discards and writes of zeroes: what can be read then, and the room that they give back.

use crate::common::{MIB, Provider, Random, SimStore, check_good};
use fealty_blockcrypt::{FileStore, MemoryStore, Volume, VolumeError};
use policy::AnchorMode;

/// Room that a volume takes in the store, in blocks that hold something.
fn data_blocks(volume: &Volume) -> u64 {
    volume.info().mapped / 4096
}

#[test]
fn discarded_blocks_read_as_zeroes_and_give_their_room_back() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    let size = 4 * MIB + 512;
    let volume = provider.create(store.clone(), size).expect("a volume");
    let mut model = vec![0; size as usize];
    Random(3).fill(&mut model);
    volume.write(0, &model).expect("written");
    volume.flush().expect("flushed");
    let before = (data_blocks(&volume), store.blocks_held());
    // Not aligned: the edges stay.
    volume.discard(512, MIB).expect("discarded");
    model[4096..MIB as usize].fill(0);
    volume.write_zeroes(2 * MIB + 512, 4096 + 1024, true).expect("zeroed");
    model[2 * MIB as usize + 512..][..4096 + 1024].fill(0);
    volume.write_zeroes(3 * MIB + 1024, 1024, true).expect("zeroed within a block");
    model[3 * MIB as usize + 1024..][..1024].fill(0);
    // The last block is cut short by the volume's end.
    volume.discard(4 * MIB, 512).expect("discarded");
    model[4 * MIB as usize..].fill(0);
    let read = |volume: &Volume| {
        let mut found = vec![1; size as usize];
        volume.read(0, &mut found).expect("read");
        found
    };
    assert!(read(&volume) == model);
    assert!(store.blocks_held() >= before.1, "nothing is given back before it is durable");
    volume.flush().expect("flushed");
    // 255 blocks, and the last one; the other zeroes lie across two blocks.
    assert_eq!(before.0 - data_blocks(&volume), 256);
    assert!(before.1 - store.blocks_held() >= 250, "{} {}", before.1, store.blocks_held());
    check_good(&volume);
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    assert!(read(&volume) == model);
    // Told not to: the room stays.
    let held = store.blocks_held();
    volume.write_zeroes(2 * MIB, MIB, false).expect("zeroed");
    volume.flush().expect("flushed");
    model[2 * MIB as usize..][..MIB as usize].fill(0);
    assert!(read(&volume) == model && store.blocks_held() >= held);
    volume.write(0, &model[..MIB as usize]).expect("written again");
    check_good(&volume);
}

#[test]
fn impossible_discards_change_nothing() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), MIB + 512).expect("a volume");
    let refused = |r| matches!(r, Err(VolumeError::Request { .. }));
    for (offset, length) in [(1, 512), (0, 511), (MIB, 1024), (u64::MAX - 511, 512), (512, u64::MAX - 511)] {
        assert!(refused(volume.discard(offset, length)), "{offset} {length}");
        assert!(refused(volume.write_zeroes(offset, length, true)), "{offset} {length}");
    }
    volume.discard(MIB + 512, 0).expect("nothing at the end");
    volume.write_zeroes(0, 0, true).expect("nothing");
}

/// What is not there is not visited: this would take hours block by block.
#[test]
fn discarding_all_of_a_large_empty_volume_is_quick() {
    let provider = Provider::new(AnchorMode::Close);
    let size = 1 << 36;
    let store = FileStore::exclusive(tempfile::tempfile().expect("a file")).expect("a store");
    let volume = provider.create(store, size).expect("a volume");
    for at in [0, size / 3 / 4096 * 4096, size - 4096] {
        volume.write(at, &[7; 4096]).expect("written");
    }
    volume.checkpoint().expect("a checkpoint");
    volume.write(size / 2, &[8; 4096]).expect("written");
    volume.discard(0, size).expect("discarded");
    assert_eq!(volume.info().mapped, 0);
    for at in [0, size / 3 / 4096 * 4096, size / 2, size - 4096] {
        let mut found = [1; 4096];
        volume.read(at, &mut found).expect("read");
        assert!(found == [0; 4096]);
    }
}

/// Also where a snapshot's checkpoint is what made the discards durable, and no FLUSH follows.
#[test]
fn what_was_discarded_finds_room_again_without_a_flush() {
    let (provider, blocks) = (Provider::new(AnchorMode::Close), 1024);
    let volume = provider.create(SimStore::new(), blocks * 4096).expect("a volume");
    for round in 0..3 {
        for lba in 0..blocks {
            volume.write(lba * 4096, &[round; 4096]).expect("there is room");
        }
        volume.discard(0, blocks * 4096).expect("discarded");
        volume.take_snapshot("of nothing").expect("taken");
    }
    check_good(&volume);
}
