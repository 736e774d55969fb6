//! Growth that fails on its way, at each call of the store: the volume goes on at its old size, and grows the next time.

use crate::common::{MIB, Provider, SimStore, check_good, filled, lock};
use crate::hooked::{Call, Hook, Hooked};
use fealty_blockcrypt::{FileStore, MemoryStore, Store, Volume, VolumeError};
use policy::AnchorMode;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What happens at a call of the store.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Mishap {
    /// It fails, and the next one works again.
    Broken,
    /// So, for want of room.
    Full,
    /// The lease is over.
    Wipe,
}

/// One call of a store meets a mishap: of this many from now on the last.
#[derive(Default)]
struct Trap {
    set: Mutex<Option<(u64, Mishap)>>,
    sprung: Mutex<Option<Call>>,
    volume: Mutex<Option<Arc<Volume>>>,
}

impl Hook for Trap {
    fn before(&self, call: Call) -> io::Result<()> {
        let mishap = match &mut *lock(&self.set) {
            set @ Some((1, _)) => set.take().map(|(_, mishap)| mishap),
            Some((left, _)) => {
                *left -= 1;
                None
            }
            None => None,
        };
        let Some(mishap) = mishap else { return Ok(()) };
        *lock(&self.sprung) = Some(call);
        match mishap {
            Mishap::Broken => Err(io::Error::other("no device")),
            Mishap::Full => Err(io::ErrorKind::StorageFull.into()),
            Mishap::Wipe => {
                lock(&self.volume).as_ref().expect("it is set").wipe_keys();
                Ok(())
            }
        }
    }
}

/// The volume holds this in each of its blocks that was ever written.
fn holds(volume: &Volume, at: u64, value: u8) {
    let mut found = [0; 4096];
    volume.read(at, &mut found).expect("read");
    assert!(found == [value; 4096], "at {at}");
}

/// Whoever rewrites all of it under a new key is passed by: nothing waits, and what was rewritten stays so.
#[test]
fn a_volume_grows_while_it_is_rekeyed() {
    let (provider, store) = (Provider::new(AnchorMode::Close), SimStore::new());
    filled(&provider, &store, 2 * MIB).close().expect("closed");
    *lock(&provider.key_id) = 2;
    let volume = provider.open(store.clone()).expect("opens");
    let mut size = 2 * MIB;
    let rotated = volume.rotate(&mut |_, _| {
        // Each time there is more to look at: not for ever.
        if size < 8 * MIB {
            size += MIB;
            volume.grow(size).expect("grown");
            volume.write(size - 4096, &[8; 4096]).expect("written");
        }
        true
    });
    assert!(rotated.expect("rotated") && size == 8 * MIB);
    assert_eq!((volume.size(), volume.info().older_keys), (size, 0));
    check_good(&volume);
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store).expect("opens");
    for at in (0..2 * MIB).step_by(4096) {
        holds(&volume, at, 7);
    }
    for end in (3 * MIB..=size).step_by(MIB as usize) {
        holds(&volume, end - 4096, 8);
    }
    check_good(&volume);
}

/// Grows from one size to another, with a mishap at the `n`th call. Whether it came to that, and whether the volume took writes after.
fn try_growth((from, to): (u64, u64), n: u64, mishap: Mishap, reopen: bool) -> (bool, bool) {
    let context = format!("{from} to {to}, {mishap:?} at call {n}");
    let provider = Provider::new(AnchorMode::Close);
    let file = tempfile::NamedTempFile::new().expect("a file");
    let store = || {
        let file = FileStore::exclusive(file.reopen().expect("opens")).expect("a store");
        Hooked::over(file, Trap::default())
    };
    let volume = provider.create(store(), from).expect("a volume");
    volume.write(0, &[1; 65536]).expect("written");
    volume.close().expect("closed");
    drop(volume);

    let trapped = store();
    let trap = &trapped.hook;
    let volume = Arc::new(provider.open(trapped.clone()).expect("opens"));
    volume.write(4096, &[2; 4096]).and_then(|()| volume.flush()).expect("durable");
    *lock(&trap.volume) = Some(volume.clone());
    *lock(&trap.set) = Some((n, mishap));
    let grown = volume.grow(to);
    let sprung = lock(&trap.sprung).take();
    *lock(&trap.set) = None;
    *lock(&trap.volume) = None;
    volume.put_back_keys(&provider.kek()).expect("the same key");
    let Some(call) = sprung else {
        grown.expect("nothing failed");
        return (false, true);
    };
    assert_eq!(volume.size(), if grown.is_ok() { to } else { from }, "{context}");
    holds(&volume, 0, 1);
    holds(&volume, 4096, 2);
    let written = volume.write(8192, &[3; 4096]).and_then(|()| volume.flush());
    let takes_writes = written.is_ok();
    if let Err(error) = written {
        // Whether a superblock is durable is not known.
        let end = trapped.len().expect("a length") - 8192;
        let superblock =
            matches!(call, Call::Sync) || matches!(&call, Call::Write(at) if at.start < 8192 || at.start >= end);
        assert!(superblock && matches!(error, VolumeError::Failed(_)), "{context}: {call:?}: {error}");
    } else {
        check_good(&volume);
        if !reopen {
            volume.grow(to).unwrap_or_else(|e| panic!("{context}: {e}"));
            volume.write(to - 4096, &[4; 4096]).expect("written");
            check_good(&volume);
            volume.close().expect("closed");
        }
    }
    drop((trapped, volume));

    let volume = provider.open(store()).unwrap_or_else(|e| panic!("{context}: {e}"));
    let sizes =
        if grown.is_ok() || (takes_writes && !reopen) { [to; 2] } else { [from, if takes_writes { from } else { to }] };
    assert!(sizes.contains(&volume.size()), "{context}: {}", volume.size());
    holds(&volume, 0, 1);
    holds(&volume, 4096, 2);
    if takes_writes {
        holds(&volume, 8192, 3);
    }
    volume.grow(to).expect("grown");
    holds(&volume, to - 4096, if takes_writes && !reopen { 4 } else { 0 });
    check_good(&volume);
    volume.close().expect("closed");
    (true, takes_writes)
}

/// To a map of more levels; and with a bitmap page that memory does not have.
#[test]
fn growth_that_fails_leaves_a_volume_that_works_and_grows_the_next_time() {
    for sizes in [(2 * MIB, 40 * MIB), (150 * MIB, 300 * MIB)] {
        for mishap in [Mishap::Broken, Mishap::Full, Mishap::Wipe] {
            let (mut survived, mut dead) = (0, 0);
            for n in 1.. {
                let (sprung, takes_writes) = try_growth(sizes, n, mishap, n % 2 == 0);
                if !sprung {
                    break;
                }
                (survived, dead) = (survived + u64::from(takes_writes), dead + u64::from(!takes_writes));
            }
            assert!(survived > 6 && (dead == 0) == (mishap == Mishap::Wipe), "{sizes:?} {mishap:?}: {survived} {dead}");
        }
    }
}

/// A store in which growth begins while a rotation reads, and fails.
struct Meeting {
    inner: MemoryStore,
    /// What the rotation does at its first read, and growth when the store is longer.
    reads: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    grows: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// It takes no writes but the rotation's.
    fails: AtomicBool,
}

fn is_rotation() -> bool {
    thread::current().name() == Some("rotation")
}

impl Store for Meeting {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if is_rotation()
            && let Some(does) = lock(&self.reads).take()
        {
            does();
        }
        self.inner.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) && !is_rotation() {
            Err(rustix::io::Errno::IO.into())
        } else {
            self.inner.write_at(bytes, offset)
        }
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.inner.set_len(bytes)?;
        if let Some(does) = lock(&self.grows).take() {
            does();
        }
        Ok(())
    }
}

/// What the rotation has touched is not forgotten with what growth had changed: it is under the key that goes.
#[test]
fn growth_that_fails_takes_nothing_from_a_rotation() {
    let provider = Provider::new(AnchorMode::Close);
    let (reads, grows, fails) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
    let store = Arc::new(Meeting { inner: MemoryStore::default(), reads, grows, fails });
    // Two pages of the bitmap, which the opener does not need.
    let size = 60_000 * 4096;
    provider.create(store.clone(), size).expect("a volume").close().expect("closed");
    *lock(&provider.key_id) = 2;
    let volume = provider.open(store.clone()).expect("opens");
    let (begin, begun) = channel();
    let (arrive, arrived) = channel();
    *lock(&store.reads) = Some(Box::new(move || {
        begin.send(()).expect("heard");
        // Where it waits for the rotation it does not come.
        let _ = arrived.recv_timeout(Duration::from_millis(500));
    }));
    let fails = store.clone();
    *lock(&store.grows) = Some(Box::new(move || {
        arrive.send(()).unwrap_or(());
        thread::sleep(Duration::from_millis(300));
        fails.fails.store(true, Ordering::SeqCst);
    }));
    thread::scope(|scope| {
        let rotation = thread::Builder::new().name("rotation".to_owned());
        let rotation = rotation.spawn_scoped(scope, || volume.rotate(&mut |_, _| true)).expect("a thread");
        begun.recv().expect("it reads");
        volume.grow(size + 64 * MIB).expect_err("the store fails");
        store.fails.store(false, Ordering::SeqCst);
        rotation.join().expect("no panic").expect("rotated");
    });
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store).expect("opens");
    check_good(&volume);
    volume.grow(size + 64 * MIB).expect("grown");
    check_good(&volume);
}
