//! Anchors, open numbers, keys: what the provider decides.

use crate::common::{MIB, Provider, SimStore, check_good, lock};
use fealty_blockcrypt::{AnchorRefused, Anchors, Kek, MemoryStore, OpenOptions, Volume, VolumeError, inspect};
use policy::{AnchorMode, KeyId, VolumeAnchor, VolumeId};
use secretmem::Secret;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

fn made(mode: AnchorMode) -> (Arc<Provider>, Arc<SimStore>) {
    let (provider, store) = (Provider::new(mode), SimStore::new());
    let volume = provider.create(store.clone(), MIB).expect("a volume");
    volume.write(0, &[1; 4096]).expect("written");
    volume.close().expect("closed");
    (provider, store)
}

#[test]
fn a_new_volume_is_anchored_by_its_first_close_and_not_before() {
    for mode in [AnchorMode::Close, AnchorMode::Interval, AnchorMode::Flush] {
        let (provider, store) = (Provider::new(mode), SimStore::new());
        let volume = provider.create(store.clone(), MIB).expect("a volume");
        volume.write(0, &[1; 4096]).expect("written");
        volume.flush().expect("flushed");
        std::thread::sleep(Duration::from_millis(if mode == AnchorMode::Interval { 1300 } else { 0 }));
        assert_eq!(*lock(&provider.kept), 0);
        assert!(matches!(provider.open(store.clone()).err(), Some(VolumeError::NoAnchor)));
        volume.close().expect("closed");
        assert_eq!(*lock(&provider.kept), 1);
        drop(volume);
        let again = provider.create(store.clone(), MIB).err();
        assert!(matches!(again, Some(VolumeError::Exists)), "a grant with an anchor creates nothing");
        provider.open(store).expect("opens");
    }
}

/// In mode `flush` nothing that was done is undone by bringing back the store as it was before.
#[test]
fn what_is_done_without_a_flush_is_anchored_too() {
    type Operation = fn(&mut Volume) -> Result<(), VolumeError>;
    let operations: [(&str, Operation); 6] = [
        ("take", |volume| volume.take_snapshot("another").map(drop)),
        ("delete", |volume| volume.delete_snapshot(1, &mut |_, _| {})),
        ("revert", |volume| volume.revert(1)),
        ("grow", |volume| volume.grow(2 * MIB)),
        ("shrink", |volume| volume.shrink(MIB / 2, true, &mut |_, _| {})),
        ("rotate", |volume| volume.rotate(&mut |_, _| true).map(drop)),
    ];
    for (name, operation) in operations {
        let (provider, store) = made(AnchorMode::Flush);
        *lock(&provider.key_id) += 1;
        let mut volume = provider.open(store.clone()).expect("opens");
        volume.take_snapshot("one").expect("taken");
        volume.write(0, &[2; 4096]).and_then(|()| volume.flush()).expect("written");
        let before = store.bytes();
        operation(&mut volume).unwrap_or_else(|error| panic!("{name}: {error}"));
        drop(volume);
        store.set(before);
        let refused = provider.open(store).err();
        assert!(matches!(refused, Some(VolumeError::RolledBack(_))), "{name}: {refused:?}");
    }
}

#[test]
fn each_mode_anchors_when_it_says() {
    let kept = |p: &Provider| *lock(&p.kept);
    let (provider, store) = made(AnchorMode::Close);
    let volume = provider.open(store).expect("opens");
    assert_eq!(kept(&provider), 2, "the opener's own");
    volume.write(0, &[2; 512]).expect("written");
    volume.flush().expect("flushed");
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(kept(&provider), 2);
    volume.close().expect("closed");
    assert_eq!(kept(&provider), 3);

    let (provider, store) = made(AnchorMode::Flush);
    let volume = provider.open(store).expect("opens");
    for i in 0..3 {
        volume.write(0, &[3; 512]).expect("written");
        volume.flush().expect("flushed");
        volume.flush().expect("nothing new");
        assert_eq!(kept(&provider), 3 + i);
    }

    let (provider, store) = made(AnchorMode::Interval);
    let volume = provider.open(store).expect("opens");
    let begun = std::time::Instant::now();
    let before = provider.anchor();
    for _ in 0..10 {
        volume.write(0, &[4; 512]).expect("written");
        volume.flush().expect("flushed");
    }
    // One each second, not one each FLUSH; however slow this machine is.
    assert!(kept(&provider) <= begun.elapsed().as_secs() + 3);
    while provider.anchor() == before {
        assert!(begun.elapsed() < Duration::from_secs(30), "no anchor within 30 s");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(volume);
}

#[test]
fn a_refused_anchor_ends_all_writing() {
    for mode in [AnchorMode::Flush, AnchorMode::Close] {
        let (provider, store) = made(mode);
        let volume = provider.open(store).expect("opens");
        volume.write(0, &[2; 512]).expect("written");
        *lock(&provider.refuse) = Some(AnchorRefused::Refused("another holder has it".to_owned()));
        let refused = if mode == AnchorMode::Flush { volume.flush().err() } else { volume.close().err() };
        assert!(matches!(refused, Some(VolumeError::Anchor(AnchorRefused::Refused(_)))), "{refused:?}");
        assert!(matches!(volume.write(0, &[3; 512]), Err(VolumeError::Anchor(_))));
        let mut sector = [0; 512];
        volume.read(0, &mut sector).expect("reads go on");
        assert_eq!(sector, [2; 512]);
    }
}

#[test]
fn a_flush_waits_for_a_provider_that_is_away_until_the_keys_go() {
    let (provider, store) = made(AnchorMode::Flush);
    let volume = provider.open(store).expect("opens");
    volume.write(0, &[2; 512]).expect("written");
    *lock(&provider.refuse) = Some(AnchorRefused::Away("no route".to_owned()));
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| volume.flush());
        std::thread::sleep(Duration::from_millis(100));
        assert!(!flush.is_finished());
        volume.wipe_keys();
        assert!(matches!(flush.join().expect("joined"), Err(VolumeError::NoKeys)));
    });
    *lock(&provider.refuse) = None;
    volume.put_back_keys(&provider.kek()).expect("the same key");
    volume.flush().expect("flushed and anchored");
    volume.close().expect("closed");
}

/// A provider who hangs, at the end of a VM: each anchor is given up after longer than the volume's own thread rests between two.
#[derive(Default)]
struct Hung {
    asked: AtomicU64,
}

impl Hung {
    fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Anchors for Hung {
    fn keep(&self, _: &VolumeAnchor) -> Result<(), AnchorRefused> {
        // The first is the opener's own.
        if self.asked.fetch_add(1, Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_millis(1200));
            return Err(AnchorRefused::GivenUp("the VM ends".to_owned()));
        }
        Ok(())
    }
}

#[test]
fn a_volume_whose_own_thread_asks_for_anchors_in_vain_is_closed_after_one_of_its_own() {
    for _ in 0..3 {
        let (provider, store) = made(AnchorMode::Interval);
        let hung = Arc::new(Hung::default());
        let (grant, kek) = (provider.grant(), provider.kek());
        let volume = Volume::open(store, &grant, &kek, OpenOptions::default(), hung.clone(), provider).expect("opens");
        volume.write(0, &[2; 512]).and_then(|()| volume.flush()).expect("written");
        while hung.asked() < 2 {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(matches!(volume.close(), Err(VolumeError::Anchor(AnchorRefused::GivenUp(_)))));
        // The opener's, the one that was in hand, the last; and by now one more, for which the volume's thread waited meanwhile.
        assert!(hung.asked() <= 4, "{}", hung.asked());
    }
}

#[test]
fn an_opener_without_an_answer_serves_nothing_and_harms_nothing() {
    let (provider, store) = made(AnchorMode::Close);
    *lock(&provider.refuse) = Some(AnchorRefused::Refused("not the holder".to_owned()));
    let refused = provider.open(store.clone()).err();
    assert!(matches!(refused, Some(VolumeError::Anchor(_))));
    *lock(&provider.refuse) = None;
    let volume = provider.open(store).expect("opens");
    let mut found = [0; 4096];
    volume.read(0, &mut found).expect("read");
    assert!(found == [1; 4096]);
}

#[test]
fn an_open_number_that_does_not_rise_is_refused() {
    let (provider, store) = made(AnchorMode::Close);
    let old = provider.grant();
    provider.open(store.clone()).expect("opens").close().expect("closed");
    let again = || policy::disk::VolumeGrant { anchor: provider.anchor(), ..old.clone() };
    let refused = provider.open_with(store.clone(), &again(), OpenOptions::default()).err();
    assert!(matches!(refused, Some(VolumeError::StaleOpenNumber { .. })), "{refused:?}");
    // An opener whose anchor was never kept has used up its number as well.
    *lock(&provider.refuse) = Some(AnchorRefused::Refused("gone".to_owned()));
    let lost = provider.grant();
    assert!(provider.open_with(store.clone(), &lost, OpenOptions::default()).is_err());
    *lock(&provider.refuse) = None;
    let refused = provider.open_with(store, &lost, OpenOptions::default()).err();
    assert!(matches!(refused, Some(VolumeError::StaleOpenNumber { .. })), "{refused:?}");
}

#[test]
fn wrong_keys_and_grants_open_nothing() {
    let (provider, store) = made(AnchorMode::Close);
    let open = |grant: &policy::disk::VolumeGrant, kek: &Kek| {
        let opened =
            Volume::open(store.clone(), grant, kek, OpenOptions::default(), provider.clone(), provider.clone());
        opened.err().unwrap_or_else(|| panic!("opened"))
    };
    let other_key = Kek::new(KeyId(77), Secret::random().expect("room"));
    assert!(matches!(open(&provider.grant(), &other_key), VolumeError::Damaged(_)));
    let other_id = Kek::new(KeyId(78), Secret::random().expect("room"));
    assert!(matches!(open(&provider.grant(), &other_id), VolumeError::Grant(_)));
    let mut grant = provider.grant();
    grant.customer = "other".parse().expect("id");
    assert!(matches!(open(&grant, &provider.kek()), VolumeError::Damaged(_)));
    grant = provider.grant();
    grant.volume = VolumeId::random();
    assert!(matches!(open(&grant, &provider.kek()), VolumeError::Grant(_)), "its anchor is another volume's");
    grant = provider.grant();
    grant.anchor = None;
    assert!(matches!(open(&grant, &provider.kek()), VolumeError::NoAnchor));
    let (other, other_store) = made(AnchorMode::Close);
    let grant = other.grant();
    let opened =
        Volume::open(store.clone(), &grant, &other.kek(), OpenOptions::default(), other.clone(), other.clone());
    assert!(matches!(opened.err(), Some(VolumeError::OtherVolume { .. })));
    drop(other_store);
    let empty = MemoryStore::of(vec![0; 1 << 16]);
    assert!(matches!(provider.open(empty).err(), Some(VolumeError::NotAVolume)));
    provider.open(store.clone()).expect("still opens");
}

#[test]
fn a_new_key_id_seals_new_writes_and_old_blocks_stay_readable() {
    let (provider, store) = made(AnchorMode::Close);
    // More keys than one page of slots holds.
    for round in 2..36 {
        *lock(&provider.key_id) = round;
        let volume = provider.open(store.clone()).expect("opens under a new key");
        assert_eq!(volume.info().key_id, KeyId(round));
        volume.write(round * 4096, &[round as u8; 4096]).expect("written");
        if round % 2 == 0 {
            volume.close().expect("closed");
        } else {
            volume.flush().expect("flushed");
        }
    }
    let volume = provider.open(store.clone()).expect("opens");
    assert_eq!(volume.info().older_keys, 34);
    for round in 1..36 {
        let mut found = [0; 4096];
        volume.read(if round == 1 { 0 } else { round * 4096 }, &mut found).expect("read");
        assert!(found == [round as u8; 4096], "{round}");
    }
    check_good(&volume);
    volume.wipe_keys();
    volume.put_back_keys(&provider.kek()).expect("all of them");
    check_good(&volume);
    volume.close().expect("closed");
    drop(volume);
    *lock(&provider.key_id) = 7;
    assert!(matches!(provider.open(store).err(), Some(VolumeError::Grant(_))), "a key that was replaced");
}

#[test]
fn the_store_shows_its_anchor_to_those_without_a_key() {
    let (provider, store) = made(AnchorMode::Close);
    let shown = inspect(&*store).expect("readable");
    assert_eq!(Some(shown.anchor.clone()), provider.anchor());
    assert!(shown.closed && shown.superblocks >= 2 && shown.volume == provider.volume);
    // A provider that was restored from before the volume's last life takes it over after somebody confirmed it.
    let old = provider.anchor();
    let volume = provider.open(store.clone()).expect("opens");
    volume.write(0, &[6; 4096]).expect("written");
    volume.close().expect("closed");
    drop(volume);
    *lock(&provider.anchor) = old;
    assert!(matches!(provider.open(store.clone()).err(), Some(VolumeError::RolledBack(_))));
    *lock(&provider.anchor) = Some(inspect(&*store).expect("readable").anchor);
    let mut found = [0; 4096];
    provider.open(store.clone()).expect("opens").read(0, &mut found).expect("read");
    assert!(found == [6; 4096]);
    // Also where it was never closed.
    assert!(!inspect(&*store).expect("readable").closed);
    *lock(&provider.anchor) = Some(inspect(&*store).expect("readable").anchor);
    provider.open(store).expect("opens");
}
