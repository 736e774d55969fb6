//! What the tests of the engine share: a key provider in memory, a store that loses power, random numbers from a seed.

use fealty_blockcrypt as blockcrypt;

use blockcrypt::{AnchorRefused, Anchors, Events, Kek, Next, OpenOptions, Store, Volume, VolumeError};
use policy::disk::{CipherSuite, VolumeGrant};
use policy::{AnchorMode, KeyId, OpenNumber, VolumeAnchor, VolumeId};
use secretmem::Secret;
use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

pub(crate) const MIB: u64 = 1 << 20;

/// What the audit log hears of something that is not what it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Noticed {
    pub(crate) lba: Option<u64>,
    pub(crate) physical: Option<u64>,
    pub(crate) reason: String,
}

/// The provider's side: anchors kept, events heard, open numbers issued.
pub(crate) struct Provider {
    pub(crate) volume: VolumeId,
    pub(crate) mode: AnchorMode,
    pub(crate) key_id: Mutex<u64>,
    kek: Mutex<(u64, [u8; 32])>,
    open_number: Mutex<u32>,
    pub(crate) anchor: Mutex<Option<VolumeAnchor>>,
    pub(crate) kept: Mutex<u64>,
    pub(crate) events: Mutex<Vec<String>>,
    noticed: Mutex<Vec<Noticed>>,
    pub(crate) refuse: Mutex<Option<AnchorRefused>>,
}

/// Those of a volume that does the same again with the same seed.
pub(crate) fn options() -> OpenOptions {
    OpenOptions { background: false, ..OpenOptions::default() }
}

impl Provider {
    pub(crate) fn new(mode: AnchorMode) -> Arc<Self> {
        Arc::new(Self {
            volume: VolumeId::random(),
            mode,
            key_id: Mutex::new(1),
            kek: Mutex::new((77, [9; 32])),
            open_number: Mutex::new(0),
            anchor: Mutex::default(),
            kept: Mutex::new(0),
            events: Mutex::default(),
            noticed: Mutex::default(),
            refuse: Mutex::default(),
        })
    }

    pub(crate) fn kek(&self) -> Kek {
        let (id, key) = *lock(&self.kek);
        Kek::new(KeyId(id), Secret::copy_of(&key).expect("room"))
    }

    /// Another key-encryption key from now on.
    pub(crate) fn set_kek(&self, id: u64, byte: u8) {
        *lock(&self.kek) = (id, [byte; 32]);
    }

    /// The next grant.
    pub(crate) fn grant(&self) -> VolumeGrant {
        let mut number = lock(&self.open_number);
        *number += 1;
        VolumeGrant {
            volume: self.volume,
            customer: "acme".parse().expect("id"),
            cipher: CipherSuite::Aes256XtsHmacSha256,
            kek_id: KeyId(lock(&self.kek).0),
            key_id: KeyId(*lock(&self.key_id)),
            open_number: OpenNumber::try_from(u64::from(*number)).expect("number"),
            anchor: lock(&self.anchor).clone(),
            anchor_mode: self.mode,
        }
    }

    pub(crate) fn create(self: &Arc<Self>, store: impl Store + 'static, size: u64) -> Result<Volume, VolumeError> {
        Volume::create(store, size, &self.grant(), &self.kek(), self.clone(), self.clone())
    }

    pub(crate) fn open(self: &Arc<Self>, store: impl Store + 'static) -> Result<Volume, VolumeError> {
        self.open_with(store, &self.grant(), options())
    }

    pub(crate) fn open_read_only(self: &Arc<Self>, store: impl Store + 'static) -> Result<Volume, VolumeError> {
        self.open_with(store, &self.grant(), OpenOptions { read_only: true, ..Default::default() })
    }

    pub(crate) fn open_with(
        self: &Arc<Self>,
        store: impl Store + 'static,
        grant: &VolumeGrant,
        options: OpenOptions,
    ) -> Result<Volume, VolumeError> {
        Volume::open(store, grant, &self.kek(), options, self.clone(), self.clone())
    }

    pub(crate) fn anchor(&self) -> Option<VolumeAnchor> {
        lock(&self.anchor).clone()
    }

    pub(crate) fn heard(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.events))
    }

    /// No anchor is kept from now on but where the engine waits for one; or they are again.
    pub(crate) fn keep_none(&self, none: bool) {
        *lock(&self.refuse) = none.then(|| AnchorRefused::Away("not now".to_owned()));
    }

    /// What was heard since the last time.
    pub(crate) fn noticed(&self) -> Vec<Noticed> {
        std::mem::take(&mut *lock(&self.noticed))
    }
}

impl Anchors for Provider {
    fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused> {
        if let Some(why) = &*lock(&self.refuse) {
            return Err(why.clone());
        }
        let mut kept = lock(&self.anchor);
        if let Some(old) = &*kept {
            use policy::anchor::AnchorStep::{Forward, Same};
            assert!(matches!(old.step(anchor), Forward | Same), "anchors go forward");
        }
        *kept = Some(anchor.clone());
        *lock(&self.kept) += 1;
        Ok(())
    }
}

impl Events for Provider {
    fn integrity(&self, lba: Option<u64>, physical: Option<u64>, reason: &str) {
        lock(&self.events).push(format!("integrity {lba:?} {physical:?} {reason}"));
        lock(&self.noticed).push(Noticed { lba, physical, reason: reason.to_owned() });
    }
    fn note(&self, text: &str) {
        lock(&self.events).push(format!("note {text}"));
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no test thread panicked")
}

/// Random numbers from a seed (SplitMix64).
#[derive(Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.number().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Seeds of random histories, in order.
#[derive(Clone)]
pub(crate) struct Seeds {
    all: std::ops::Range<u64>,
    next: u64,
    /// Whose they are, and when a long run says next how far it is.
    test: String,
    tell: Option<Instant>,
}

/// Seeds: so many from `first` on, and two hundred times as many with FEALTY_LONG=1. FEALTY_SEED=N is that one alone: what a failure
/// names, again.
pub(crate) fn seeds(first: u64, count: u64) -> Seeds {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    if let Ok(seed) = std::env::var("FEALTY_SEED") {
        let seed = seed.parse().expect("FEALTY_SEED is a number");
        return Seeds { all: seed..seed + 1, next: seed, test, tell: None };
    }
    let long = std::env::var_os("FEALTY_LONG").is_some_and(|long| long == "1");
    let all = first..first + if long { 200 * count } else { count };
    println!("random histories of the seeds {first} to {}; FEALTY_SEED=N runs one alone", all.end - 1);
    Seeds { all, next: first, test, tell: long.then(|| Instant::now() + A_MINUTE) }
}

const A_MINUTE: Duration = Duration::from_secs(60);

impl Iterator for Seeds {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let seed = self.next;
        if seed == self.all.end {
            return None;
        }
        self.next += 1;
        if self.tell.is_some_and(|at| at < Instant::now()) {
            self.tell = Some(Instant::now() + A_MINUTE);
            let (test, done, all) = (&self.test, seed - self.all.start, self.count_of_all());
            // Not by `eprintln`, which is kept back until the test has failed.
            let _ = writeln!(std::io::stderr(), "{test}: {done} of {all} histories, seed {seed} is next");
        }
        Some(seed)
    }
}

impl Seeds {
    /// As many as it was made for.
    pub(crate) fn count_of_all(&self) -> u64 {
        self.all.end - self.all.start
    }
}

/// Says how to replay a history that failed. What a failed assertion says is not always the history's own.
pub(crate) struct Replay {
    pub(crate) test: String,
    pub(crate) seed: u64,
}

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { test, seed } = self;
            eprintln!("replay it: FEALTY_SEED={seed} cargo test -p fealty-blockcrypt --test engine {test}");
        }
    }
}

const SECTOR: usize = 512;

/// A store that loses power. What was not synced survives sector by sector, in any of the versions written, or not at all: so
/// writes are lost, torn and reordered.
#[derive(Default)]
pub(crate) struct SimStore(Mutex<Sim>);

#[derive(Default)]
struct Sim {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: BTreeMap<usize, Vec<[u8; SECTOR]>>,
    /// What a sync that failed gave up: it can be read, no later sync makes it durable, and who drops what is cached reads what is
    /// durable.
    given_up: BTreeMap<usize, Vec<[u8; SECTOR]>>,
    /// Operations until the power fails.
    fuse: Option<u64>,
    /// New blocks that the store has room for.
    room: Option<u64>,
    touched: std::collections::HashSet<u64>,
    overlaps: bool,
}

impl SimStore {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        lock(&self.0).now.clone()
    }

    /// Replaces the content, durably: what a tamperer does.
    pub(crate) fn set(&self, bytes: Vec<u8>) {
        let mut sim = lock(&self.0);
        sim.durable = bytes.clone();
        sim.now = bytes;
        sim.unsynced.clear();
        sim.given_up.clear();
    }

    /// A sync fails: some of what was written may never be durable, whatever comes after, as Linux has it.
    pub(crate) fn fail_sync(&self, random: &mut Random) {
        let mut sim = lock(&self.0);
        for (sector, versions) in std::mem::take(&mut sim.unsynced) {
            if random.chance(30) {
                sim.durable[sector * SECTOR..][..SECTOR].copy_from_slice(versions.last().expect("one at least"));
            } else if random.chance(80) {
                sim.given_up.entry(sector).or_default().extend(versions);
            } else {
                sim.unsynced.insert(sector, versions);
            }
        }
    }

    /// Takes lots while later ones are sealed, from now on.
    pub(crate) fn overlap(&self) {
        lock(&self.0).overlaps = true;
    }

    /// Power fails at the `n`th write or sync from now on.
    pub(crate) fn burn(&self, n: u64) {
        lock(&self.0).fuse = Some(n);
    }

    /// Only so many more blocks that were never written find room.
    pub(crate) fn limit(&self, blocks: Option<u64>) {
        lock(&self.0).room = blocks;
    }

    /// How many blocks take room.
    pub(crate) fn blocks_held(&self) -> usize {
        lock(&self.0).touched.len()
    }

    /// Works again, with what was written.
    pub(crate) fn repair(&self) {
        lock(&self.0).fuse = None;
    }

    /// Power fails and comes back.
    pub(crate) fn crash(&self, random: &mut Random) {
        let sim = &mut *lock(&self.0);
        let style = random.below(4);
        let mut lost = std::mem::take(&mut sim.given_up);
        for (sector, versions) in std::mem::take(&mut sim.unsynced) {
            lost.entry(sector).or_default().extend(versions);
        }
        for (sector, versions) in lost {
            let pick = match style {
                0 => 0,
                1 => versions.len() as u64,
                _ => random.below(versions.len() as u64 + 1),
            };
            let durable = &mut sim.durable[sector * SECTOR..][..SECTOR];
            if pick > 0 {
                durable.copy_from_slice(&versions[pick as usize - 1]);
            }
            sim.now[sector * SECTOR..][..SECTOR].copy_from_slice(durable);
        }
        sim.fuse = None;
    }
}

impl Sim {
    fn power(&mut self) -> io::Result<()> {
        if let Some(fuse) = &mut self.fuse {
            *fuse = fuse.saturating_sub(1);
            if *fuse == 0 {
                return Err(io::Error::other("no power"));
            }
        }
        Ok(())
    }

    fn room(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        for block in offset / 4096..(offset + bytes).div_ceil(4096) {
            if !self.touched.contains(&block) {
                if let Some(room) = &mut self.room {
                    *room = room.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
                }
                self.touched.insert(block);
            }
        }
        Ok(())
    }
}

/// All lots are under way before the first is done, the last one is done first, and one that fails holds no other up.
pub(crate) fn write_out_of_order<'a>(store: &impl Store, next: &mut Next<'a, '_>) -> io::Result<()> {
    let mut parts: Vec<(u64, &[u8])> = Vec::new();
    while let Some(lot) = next() {
        parts.extend(lot);
    }
    let mut done = Ok(());
    for (offset, bytes) in parts.iter().rev() {
        done = done.and(store.write_at(bytes, *offset));
    }
    done
}

impl Store for SimStore {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.0).now.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let sim = lock(&self.0);
        let start = offset as usize;
        buffer.copy_from_slice(sim.now.get(start..start + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut sim = lock(&self.0);
        sim.power()?;
        sim.room(offset, bytes.len() as u64)?;
        let start = offset as usize;
        sim.now.get_mut(start..start + bytes.len()).ok_or(io::ErrorKind::StorageFull)?.copy_from_slice(bytes);
        for (i, sector) in bytes.as_chunks::<SECTOR>().0.iter().enumerate() {
            sim.unsynced.entry(start / SECTOR + i).or_default().push(*sector);
        }
        Ok(())
    }

    fn overlaps(&self) -> bool {
        lock(&self.0).overlaps
    }

    fn write_lots_at<'a>(&self, next: &mut Next<'a, '_>) -> io::Result<()> {
        write_out_of_order(self, next)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut sim = lock(&self.0);
        sim.power()?;
        for (sector, versions) in std::mem::take(&mut sim.unsynced) {
            if let Some(last) = versions.last() {
                sim.durable[sector * SECTOR..][..SECTOR].copy_from_slice(last);
            }
            sim.given_up.remove(&sector);
        }
        Ok(())
    }

    fn drop_cached(&self) -> io::Result<()> {
        let sim = &mut *lock(&self.0);
        for sector in std::mem::take(&mut sim.given_up).into_keys() {
            let versions = sim.unsynced.get(&sector);
            let newest = versions
                .and_then(|versions| versions.last())
                .map_or_else(|| sim.durable[sector * SECTOR..][..SECTOR].to_vec(), |newest| newest.to_vec());
            sim.now[sector * SECTOR..][..SECTOR].copy_from_slice(&newest);
        }
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let mut sim = lock(&self.0);
        sim.now.resize(bytes as usize, 0);
        sim.durable.resize(bytes as usize, 0);
        Ok(())
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        lock(&self.0).room(offset, bytes)
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mut sim = lock(&self.0);
        sim.power()?;
        let (start, end) = (offset as usize, (offset + bytes) as usize);
        sim.now.get_mut(start..end).ok_or(io::ErrorKind::InvalidInput)?.fill(0);
        for sector in start / SECTOR..end / SECTOR {
            sim.unsynced.entry(sector).or_default().push([0; SECTOR]);
        }
        for block in offset / 4096..(offset + bytes) / 4096 {
            if sim.touched.remove(&block)
                && let Some(room) = &mut sim.room
            {
                *room += 1;
            }
        }
        Ok(())
    }
}

/// A new volume that is full of data.
pub(crate) fn filled(provider: &Arc<Provider>, store: &Arc<SimStore>, size: u64) -> Volume {
    let volume = provider.create(store.clone(), size).expect("a volume");
    for at in (0..size).step_by(64 * 4096) {
        volume.write(at, &vec![7; (size - at).min(64 * 4096) as usize]).expect("written");
    }
    volume.flush().expect("flushed");
    volume
}

/// A whole check that finds nothing wrong.
#[track_caller]
pub(crate) fn check_good(volume: &Volume) {
    let mut said = Vec::new();
    let report = volume.check(&mut |step| {
        if !matches!(step, blockcrypt::CheckStep::Progress { .. }) {
            said.push(format!("{step:?}"));
        }
    });
    let report = report.expect("a check");
    assert!(report.good() && report.leaked_blocks == 0, "{report:?} {said:?}");
}
