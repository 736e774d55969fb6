//! Reads and writes on an honest store.

use crate::common::{MIB, Provider, Random, check_good};
use fealty_blockcrypt::{MemoryStore, VolumeError};
use policy::AnchorMode;
use std::sync::Arc;

#[test]
fn what_is_written_is_read_also_after_closing() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Arc::new(MemoryStore::default()));
    let size = 3 * MIB + 1536;
    let volume = provider.create(store.clone(), size).expect("a volume");
    assert_eq!((volume.size(), volume.id()), (size, provider.volume));
    let mut model = vec![0; size as usize];
    let mut random = Random(1);
    for (offset, length) in [(0, 4096), (512, 512), (3584, 1024), (4096, 300_000 / 512 * 512), (size - 512, 512)] {
        let part = &mut model[offset as usize..][..length];
        random.fill(part);
        volume.write(offset, part).expect("written");
    }
    let mut found = vec![1; size as usize];
    volume.read(0, &mut found).expect("read");
    assert!(found == model);
    assert_eq!(volume.close().expect("closed"), provider.anchor().expect("kept"));
    assert_eq!(volume.close().expect("closed already"), provider.anchor().expect("kept"));
    assert!(matches!(volume.read(0, &mut found[..512]), Err(VolumeError::Closed)));
    assert!(matches!(volume.write(0, &found[..512]), Err(VolumeError::Closed)));
    drop(volume);

    let volume = provider.open(store.clone()).expect("opens");
    volume.read(0, &mut found).expect("read");
    assert!(found == model);
    let info = volume.info();
    assert_eq!((info.size, info.dropped_writes), (size, 0));
    assert!(info.mapped < size / 2, "what was never written takes no room: {info:?}");
    check_good(&volume);
    let text = store.bytes();
    assert!(!text.windows(32).any(|w| w == &model[8192..8224]), "no plain text in the store");
}

#[test]
fn impossible_requests_change_nothing() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(MemoryStore::default(), MIB + 512).expect("a volume");
    let mut buffer = vec![0; 4096];
    for (offset, length) in [(1, 512), (0, 511), (MIB + 512, 512), (MIB, 1024), (u64::MAX - 511, 512), (u64::MAX, 512)]
    {
        let refused = |r| matches!(r, Err(VolumeError::Request { .. }));
        assert!(refused(volume.read(offset, &mut buffer[..length])), "{offset} {length}");
        assert!(refused(volume.write(offset, &buffer[..length])), "{offset} {length}");
    }
    volume.read(MIB + 512, &mut []).expect("nothing at the end");
    volume.write(0, &[]).expect("nothing");
    for size in [0, 513, u64::MAX] {
        let made = Provider::new(AnchorMode::Close).create(MemoryStore::default(), size);
        assert!(matches!(made.err(), Some(VolumeError::Size { .. })));
    }
}

#[test]
fn overwriting_a_full_volume_never_runs_out() {
    let (provider, store) = (Provider::new(AnchorMode::Close), Arc::new(MemoryStore::default()));
    let volume = provider.create(store.clone(), MIB).expect("a volume");
    let mut data = vec![0; MIB as usize];
    for round in 0..8 {
        Random(round).fill(&mut data);
        // No FLUSH at all: the engine finds room by itself.
        volume.write(0, &data).expect("written");
    }
    volume.flush().expect("flushed");
    check_good(&volume);
    let mut found = vec![0; MIB as usize];
    volume.read(0, &mut found).expect("read");
    assert!(found == data);
}

#[test]
fn a_read_only_volume_writes_nothing() {
    let (provider, store) = (Provider::new(AnchorMode::Flush), Arc::new(MemoryStore::default()));
    let volume = provider.create(store.clone(), MIB).expect("a volume");
    volume.close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    volume.write(8192, &[3; 512]).expect("written");
    volume.flush().expect("flushed");
    drop(volume);
    let (before, anchor) = (store.bytes(), provider.anchor());
    let volume = provider.open_read_only(store.clone()).expect("opens with its log replayed");
    let mut sector = [0; 512];
    volume.read(8192, &mut sector).expect("read");
    assert_eq!(sector, [3; 512]);
    assert!(matches!(volume.write(0, &sector), Err(VolumeError::ReadOnly)));
    volume.flush().expect("nothing to do");
    volume.checkpoint().expect("nothing to do");
    check_good(&volume);
    assert_eq!(volume.close().ok(), anchor);
    assert!(store.bytes() == before && provider.anchor() == anchor);
}

#[test]
fn several_threads_share_a_volume() {
    let provider = Provider::new(AnchorMode::Flush);
    let volume = provider.create(MemoryStore::default(), 2 * MIB).expect("a volume");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let volume = &volume;
            scope.spawn(move || {
                let mut random = Random(thread);
                let base = thread * MIB / 2;
                let mut model = vec![0; (MIB / 2) as usize];
                for _ in 0..40 {
                    let at = random.below(120) * 4096 + random.below(8) * 512;
                    let part = &mut model[at as usize..][..4096];
                    random.fill(part);
                    volume.write(base + at, part).expect("written");
                    if random.chance(20) {
                        volume.flush().expect("flushed");
                    }
                    let at = random.below(128) * 4096;
                    let mut found = [0; 4096];
                    volume.read(base + at, &mut found).expect("read");
                    assert!(found == model[at as usize..][..4096]);
                }
            });
        }
    });
    check_good(&volume);
}
