//! The same keys wrapped under another key-encryption key.

use crate::common::{Random, lock};
use crate::hooked::{Call, Hooked};
use crate::three_keys::{BLOCKS, check, content, holds, made, wrapped};
use fealty_blockcrypt::{AnchorRefused, Kek, VolumeError, inspect};
use policy::KeyId;
use secretmem::Secret;
use std::sync::{Mutex, mpsc};

#[test]
fn after_a_rewrap_only_the_new_key_opens() {
    let (provider, store) = made();
    let before = wrapped(&store.bytes());
    assert!(before.len() >= 4);
    let volume = provider.open(store.clone()).expect("opens");
    let old = provider.kek();
    provider.set_kek(78, 10);
    volume.rewrap(&old, &provider.kek()).expect("rewrapped");
    check(&volume);
    volume.wipe_keys();
    assert!(volume.put_back_keys(&old).is_err());
    volume.put_back_keys(&provider.kek()).expect("the new key");
    volume.close().expect("closed");
    drop(volume);
    assert_eq!(inspect(&*store).expect("readable").kek_id, KeyId(78));
    assert_eq!(holds(&store.bytes(), &before), 0, "nothing is left that the old key opens");
    check(&provider.open(store.clone()).expect("opens"));
    provider.set_kek(77, 9);
    assert!(matches!(provider.open(store).err(), Some(VolumeError::WrongKey)));
}

#[test]
fn a_rewrap_that_a_crash_interrupts_leaves_a_volume_that_the_anchors_key_opens() {
    let mut news = 0;
    for n in 1..24 {
        let (provider, store) = made();
        let volume = provider.open(store.clone()).expect("opens");
        // Of these only the log knows.
        for lba in 0..BLOCKS {
            volume.write(lba * 4096, &content(lba)).expect("written");
        }
        volume.flush().expect("durable");
        let old = provider.kek();
        provider.set_kek(78, 10);
        let new = provider.kek();
        store.burn(n);
        let done = volume.rewrap(&old, &new);
        drop(volume);
        store.crash(&mut Random(n));
        let id = provider.anchor().expect("an anchor").kek_id().expect("it names a key");
        assert!(done.is_err() || id == KeyId(78));
        if id == KeyId(77) {
            provider.set_kek(77, 9);
        } else {
            news += 1;
        }
        check(&provider.open(store).expect("opens"));
    }
    assert!(news > 0 && news < 23, "{news}");
}

#[test]
fn a_rewrap_whose_anchor_is_refused_changes_nothing_more() {
    let (provider, store) = made();
    let volume = provider.open(store.clone()).expect("opens");
    let old = provider.kek();
    let new = Kek::new(KeyId(78), Secret::copy_of(&[10; 32]).expect("room"));
    *lock(&provider.refuse) = Some(AnchorRefused::Refused("another holder has it".into()));
    assert!(matches!(volume.rewrap(&old, &new), Err(VolumeError::Anchor(_))));
    *lock(&provider.refuse) = None;
    assert!(volume.write(0, &[1; 4096]).is_err() && volume.close().is_err());
    drop(volume);
    // The provider heard of no anchor under the new key: it gives the old one.
    check(&provider.open(store).expect("opens"));
}

/// In a store that says when it is to give room back, and does so when it is told.
#[test]
fn a_rewrap_leaves_alone_what_is_being_given_back() {
    let (provider, store) = made();
    let ((asked, hear), (tell, told)) = (mpsc::channel(), mpsc::channel::<()>());
    let told = Mutex::new(told);
    let slow = Hooked::over(store, move |call| {
        if matches!(call, Call::Punch) {
            let _ = asked.send(());
            let _ = lock(&told).recv();
        }
        Ok(())
    });
    let volume = provider.open(slow).expect("opens");
    volume.discard(0, 100 * 4096).expect("discarded");
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| volume.flush());
        hear.recv().expect("it gives room back");
        let old = provider.kek();
        provider.set_kek(78, 10);
        volume.rewrap(&old, &provider.kek()).expect("rewrapped");
        // This would go where it was before.
        for lba in 0..50 {
            volume.write(lba * 4096, &content(lba)).expect("written");
        }
        volume.checkpoint().expect("durable");
        drop(tell);
        flush.join().expect("joined").expect("flushed");
    });
    for lba in 50..100 {
        volume.write(lba * 4096, &content(lba)).expect("written");
    }
    check(&volume);
}
