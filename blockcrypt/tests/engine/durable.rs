//! What a FLUSH, a checkpoint, a close and an opening make durable, and in which order.

use crate::common::{MIB, Provider, Random, SimStore, check_good, filled, lock};
use crate::hooked::{Call, Hooked};
use fealty_blockcrypt::{FileStore, OpenOptions, Store, Volume, VolumeError};
use policy::AnchorMode;
use std::sync::{Arc, Mutex};

#[test]
fn after_a_failed_sync_nothing_more_is_acknowledged() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(store.clone(), MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(store.clone()).expect("opens");
    volume.write(0, &[7; 4096]).expect("written");
    volume.flush().expect("flushed");
    volume.write(4096, &[8; 4096]).expect("written");
    store.burn(2);
    assert!(matches!(volume.flush(), Err(VolumeError::Store(..))));
    store.burn(u64::MAX);
    assert!(matches!(volume.flush(), Err(VolumeError::Failed(_))), "a second fdatasync proves nothing");
    assert!(matches!(volume.write(0, &[9; 4096]), Err(VolumeError::Failed(_))));
    assert!(volume.close().is_err());
    let mut found = [0; 4096];
    volume.read(0, &mut found).expect("reads go on");
    assert!(found == [7; 4096] && provider.heard().iter().any(|e| e.contains("no more writes")));
    drop(volume);
    store.crash(&mut Random(2));
    provider.open(store).expect("opens again").read(0, &mut found).expect("read");
    assert!(found == [7; 4096]);
}

#[test]
fn a_volume_at_rest_is_durable_without_its_keys() {
    let provider = Provider::new(AnchorMode::Close);
    let volume = provider.create(SimStore::new(), MIB).expect("a volume");
    volume.write(0, &[1; 4096]).expect("written");
    volume.checkpoint().expect("rests");
    volume.wipe_keys();
    volume.checkpoint().expect("nothing to do");
    volume.put_back_keys(&provider.kek()).expect("the same key again");
    volume.write(0, &[2; 4096]).expect("written");
    volume.wipe_keys();
    assert!(matches!(volume.checkpoint(), Err(VolumeError::NoKeys)));
}

/// A store that notes what is asked of it, and its notes: `r`ead, `w`rite, `s`ync.
fn noting(sim: Arc<SimStore>) -> (Arc<impl Store>, Arc<Mutex<String>>) {
    let seen = Arc::new(Mutex::new(String::new()));
    let notes = seen.clone();
    let note = move |call| {
        match call {
            Call::Read(_) => lock(&notes).push('r'),
            Call::Write(_) => lock(&notes).push('w'),
            Call::Sync => lock(&notes).push('s'),
            _ => {}
        }
        Ok(())
    };
    (Hooked::over(sim, note), seen)
}

/// A killed process's last writes may be the kernel's alone. An opener that believed them, overwrote what they replace, and lost
/// power would have neither.
#[test]
fn an_opener_makes_durable_what_it_is_about_to_believe() {
    let (provider, sim) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(sim.clone(), MIB).expect("a volume").close().expect("closed");
    let volume = provider.open(sim.clone()).expect("opens");
    volume.write(0, &[1; 4096]).expect("written");
    volume.flush().expect("in the log, so that the opener has pages to write");
    drop(volume);
    let (noting, notes) = noting(sim);
    drop(provider.open_read_only(noting.clone()).expect("opens"));
    let seen = std::mem::take(&mut *lock(&notes));
    assert!(seen.chars().all(|c| c == 'r'), "{seen}");
    drop(provider.open(noting.clone()).expect("opens"));
    let seen = std::mem::take(&mut *lock(&notes));
    assert!(seen.trim_start_matches('r').starts_with("sr") && seen.contains("ws"), "{seen}");
    // Pages durable before the superblock that names them, and that before the anchor.
    let before = seen.trim_end_matches('r').strip_suffix("wws").map(|before| before.trim_end_matches('r'));
    assert!(before.is_some_and(|before| before.ends_with('s')), "{seen}");
}

/// What an anchor names is durable: where that is all there is, nothing has to be made so again.
#[test]
fn an_opener_of_what_was_closed_and_anchored_makes_only_its_own_superblock_durable() {
    let (provider, sim) = (Provider::new(AnchorMode::Close), SimStore::new());
    provider.create(sim.clone(), MIB).expect("a volume").close().expect("closed");
    let (noting, notes) = noting(sim);
    let volume = provider.open(noting.clone()).expect("opens");
    let seen = std::mem::take(&mut *lock(&notes));
    let (read, written) = seen.split_at(seen.find('w').expect("a superblock"));
    assert!(read.chars().all(|c| c == 'r') && written.trim_end_matches('r') == "wws", "{seen}");
    // The same state again, but it was not closed.
    drop(volume);
    drop(provider.open(noting.clone()).expect("opens"));
    let seen = std::mem::take(&mut *lock(&notes));
    assert!(seen.find('s') < seen.find('w'), "{seen}");
}

/// Of the two copies of its last superblock one may be there and the other not: whoever looks, and writes nothing, finds no fault with it.
#[test]
fn a_close_that_is_cut_off_leaves_nothing_to_complain_of() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    filled(&provider, &store, MIB).close().expect("closed");
    for at in 1.. {
        let volume = provider.open(store.clone()).expect("opens");
        volume.write(0, &[1; 4096]).expect("written");
        store.burn(at);
        let closed = volume.close().is_ok();
        drop(volume);
        store.repair();
        check_good(&provider.open_read_only(store.clone()).expect("opens"));
        if closed {
            break;
        }
    }
}

/// A checkpoint needs more pages at once than the smallest cache keeps: leaves that changed, each under a page of its own.
#[test]
fn a_checkpoint_of_changes_far_apart_ends_with_the_smallest_cache() {
    let (far, count) = (64 * 64 * 4096, 700);
    let provider = Provider::new(AnchorMode::Close);
    let file = tempfile::NamedTempFile::new().expect("a file");
    let store = || FileStore::exclusive(file.reopen().expect("opens")).expect("a store");
    let volume = provider.create(store(), far * count).expect("a volume");
    let fill = move |volume: &Volume, value: u8| {
        let data = [value; 4096];
        let all: Vec<(u64, &[u8])> = (0..count).map(|i| (i * far, &data[..])).collect();
        assert!(volume.write_many(&all).iter().all(Result::is_ok));
    };
    fill(&volume, 1);
    volume.close().expect("closed");
    drop(volume);
    let options = OpenOptions { map_cache: 0, ..OpenOptions::default() };
    let volume = provider.open_with(store(), &provider.grant(), options).expect("opens");
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        fill(&volume, 2);
        volume.checkpoint().expect("a checkpoint");
        let _ = done.send(volume);
    });
    let volume = ended.recv_timeout(std::time::Duration::from_secs(120)).expect("a checkpoint within 120 s");
    check_good(&volume);
}
