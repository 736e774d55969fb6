//! Where key slots may lie: nothing is left there of those that are not the volume's any more, whatever became of it, and whatever
//! crash came in between.

use crate::common::{MIB, Provider, Random, SimStore, lock};
use crate::three_keys::{BLOCKS, check, holds, made, wrapped};
use fealty_blockcrypt::{Store, Volume, VolumeError, erase, inspect};
use policy::KeyId;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A change of a volume's shape, and how it ends.
type Change = fn(&mut Volume) -> Result<(), VolumeError>;

/// As it was made; by a little, so that superblocks lie where others lay, and by much; with more room, with less size.
const CHANGES: [(&str, Change); 5] = [
    ("none", |_| Ok(())),
    ("a little larger", |volume| volume.grow(MIB + 4096)),
    ("larger", |volume| volume.grow(8 * MIB)),
    ("with room", |volume| volume.widen(8 * MIB)),
    ("smaller", |volume| volume.shrink(BLOCKS * 4096 + 512, true, &mut |_, _| {})),
];

/// A volume with data under three keys, after the change, and what its slots held at any time.
fn changed(change: Change) -> (Arc<Provider>, Arc<SimStore>, Vec<Vec<u8>>) {
    let (provider, store) = made();
    let mut slots = wrapped(&store.bytes());
    let mut volume = provider.open(store.clone()).expect("opens");
    change(&mut volume).expect("changed");
    check(&volume);
    volume.close().expect("closed");
    slots.extend(wrapped(&store.bytes()));
    (provider, store, slots)
}

/// A volume with more older keys than a page has room for.
fn crowded() -> (Arc<Provider>, Arc<SimStore>) {
    let (provider, store) = made();
    for key in 4..40 {
        *lock(&provider.key_id) = key;
        provider.open(store.clone()).expect("opens").close().expect("closed");
    }
    (provider, store)
}

/// What slots hold, each once.
fn distinct(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut slots = wrapped(bytes);
    slots.sort();
    slots.dedup();
    slots
}

/// Opens the volume under the key-encryption key that the provider's anchor names, and wraps its slots under another.
fn rewrap(provider: &Arc<Provider>, store: &Arc<SimStore>) {
    let volume = provider.open(store.clone()).expect("opens");
    let old = provider.kek();
    provider.set_kek(80, 80);
    volume.rewrap(&old, &provider.kek()).expect("rewrapped");
    check(&volume);
    volume.close().expect("closed");
}

#[test]
fn nothing_of_the_old_key_outlives_a_rewrap() {
    for (name, change) in CHANGES {
        let (provider, store, slots) = changed(change);
        rewrap(&provider, &store);
        assert_eq!(holds(&store.bytes(), &slots), 0, "{name}");
    }
}

#[test]
fn no_older_master_outlives_a_rotation() {
    for (name, change) in CHANGES {
        let (provider, store, slots) = changed(change);
        *lock(&provider.key_id) = 9;
        let volume = provider.open(store.clone()).expect("opens");
        assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
        assert_eq!(volume.info().older_keys, 0);
        check(&volume);
        volume.close().expect("closed");
        assert_eq!(holds(&store.bytes(), &slots), 0, "{name}");
    }
}

#[test]
fn no_slot_outlives_an_erasure() {
    for (name, change) in CHANGES {
        let (provider, store, slots) = changed(change);
        erase(&*store).expect("erased");
        assert_eq!(holds(&store.bytes(), &slots), 0, "{name}");
        assert!(matches!(provider.open(store).err(), Some(VolumeError::NotAVolume)), "{name}");
    }
}

/// Whatever operation the power fails at, nothing is left after an erasure of what the crash left, nor after the next rewrap.
#[test]
fn slots_that_a_crash_left_go_with_the_next_rewrap_or_erasure() {
    let changes = CHANGES[1..4].iter().map(|(name, change)| (*name, *change, false));
    for (name, change, rewraps) in changes.chain([("rewrapped", CHANGES[0].1, true)]) {
        let (provider, store) = made();
        let (before, anchor) = (store.bytes(), provider.anchor());
        let slots = wrapped(&before);
        for at in 1.. {
            store.set(before.clone());
            *lock(&provider.anchor) = anchor.clone();
            provider.set_kek(77, 9);
            let mut volume = provider.open(store.clone()).expect("opens");
            store.burn(at);
            let done = if rewraps {
                let old = provider.kek();
                provider.set_kek(78, 10);
                volume.rewrap(&old, &provider.kek())
            } else {
                change(&mut volume)
            };
            drop(volume);
            store.repair();
            store.crash(&mut Random(at));

            let crashed = store.bytes();
            let mut all = slots.clone();
            // A page of older slots that is written before the superblock is, which was to lead to it, is found by nobody.
            if !rewraps || inspect(&*store).expect("readable").kek_id == KeyId(78) {
                all.extend(wrapped(&crashed));
            }
            erase(&*store).expect("erased");
            assert_eq!(holds(&store.bytes(), &all), 0, "{name}: erased after {at}");

            store.set(crashed);
            if provider.anchor().and_then(|anchor| anchor.kek_id()) == Some(KeyId(77)) {
                provider.set_kek(77, 9);
            }
            rewrap(&provider, &store);
            assert_eq!(holds(&store.bytes(), &all), 0, "{name}: rewrapped after {at}");
            if done.is_ok() {
                assert!(at > 3, "{name}: {at}");
                break;
            }
        }
    }
}

/// Without a crash: the volume goes on, and knows what it wrote, be it one of two pages.
#[test]
fn what_a_rewrap_that_failed_wrote_goes_with_the_next() {
    let (provider, store) = crowded();
    let (before, anchor) = (store.bytes(), provider.anchor());
    let mut again = 0;
    for at in 1.. {
        store.set(before.clone());
        *lock(&provider.anchor) = anchor.clone();
        provider.set_kek(77, 9);
        let volume = provider.open(store.clone()).expect("opens");
        let old = provider.kek();
        provider.set_kek(78, 10);
        store.burn(at);
        let done = volume.rewrap(&old, &provider.kek());
        store.repair();
        let slots = distinct(&store.bytes());
        let unanchored = provider.anchor().and_then(|anchor| anchor.kek_id()) == Some(KeyId(77));
        let current = if unanchored { old } else { provider.kek() };
        provider.set_kek(79, 11);
        match volume.rewrap(&current, &provider.kek()) {
            Err(VolumeError::Failed(_)) => {}
            rewrapped => {
                rewrapped.unwrap_or_else(|e| panic!("{at}: {e}"));
                check(&volume);
                volume.close().expect("closed");
                assert_eq!(holds(&store.bytes(), &slots), 0, "failed at {at}");
                again += 1;
            }
        }
        if done.is_ok() {
            break;
        }
    }
    assert!(again > 3, "{again}");
}

/// A page of older slots leads to the next: what leads to others goes after them.
#[test]
fn an_erasure_that_was_interrupted_finds_each_page_of_older_slots_again() {
    let (_, store) = crowded();
    let (image, slots) = (store.bytes(), distinct(&store.bytes()));
    assert!(slots.len() > 38);
    let mut whole = false;
    // Two pages, and two superblocks at each end, with four barriers.
    for (step, seed) in (1..12).flat_map(|step| (0..4).map(move |seed| (step, seed))) {
        store.set(image.clone());
        store.burn(step);
        whole = erase(&*store).is_ok();
        store.repair();
        store.crash(&mut Random(seed));
        assert!(matches!(erase(&*store), Ok(_) | Err(VolumeError::NotAVolume)));
        assert_eq!(holds(&store.bytes(), &slots), 0, "a slot is left after {step}, seed {seed}");
    }
    assert!(whole, "it never came to its end");
}

/// A store that does not overwrite a page of key slots with zeroes, until it is told to.
struct Stubborn {
    inner: Arc<SimStore>,
    refuses: AtomicBool,
}

impl Store for Stubborn {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut before = vec![0; bytes.len()];
        self.inner.read_at(&mut before, offset)?;
        let wipes = bytes.iter().all(|b| *b == 0) && !wrapped(&before).is_empty();
        if wipes && self.refuses.load(Ordering::Relaxed) {
            return Err(rustix::io::Errno::IO.into());
        }
        self.inner.write_at(bytes, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.inner.set_len(bytes)
    }
}

/// One bad block must not keep a volume from opening; it is nothing else meanwhile, and goes as soon as the store takes it.
#[test]
fn a_volume_opens_although_a_page_of_slots_can_not_be_overwritten() {
    let (provider, sim) = made();
    let store = Arc::new(Stubborn { inner: sim.clone(), refuses: AtomicBool::new(true) });
    for key in 10..14 {
        *lock(&provider.key_id) = key;
        let volume = provider.open(store.clone()).expect("opens");
        assert!(provider.heard().iter().any(|note| note.contains("old key slots are not overwritten yet")));
        // Whatever is free is taken, and taken again.
        for _ in 0..4 {
            for lba in 0..BLOCKS {
                let mut data = vec![0; 4096];
                volume.read(lba * 4096, &mut data).expect("read");
                volume.write(lba * 4096, &data).expect("written");
            }
            volume.flush().expect("durable");
            volume.checkpoint().expect("durable");
        }
        check(&volume);
        volume.close().expect("closed");
    }
    store.refuses.store(false, Ordering::Relaxed);
    let slots = wrapped(&sim.bytes());
    *lock(&provider.key_id) = 14;
    let volume = provider.open(store).expect("opens");
    assert!(volume.rotate(&mut |_, _| true).expect("rotated"));
    check(&volume);
    volume.close().expect("closed");
    assert_eq!(provider.open(sim.clone()).expect("opens").info().older_keys, 0);
    assert_eq!(holds(&sim.bytes(), &slots), 0);
}
