//! Superblocks that the store's owner edited. Whoever opens a volume reads them before any key says whose they are: where one sound copy
//! of the newest is left, everything is there and nothing is overwritten on the say of the others; where none is, an error. Never other
//! data, never more work or memory than the volume is worth.

use crate::common::{Provider, Random, Replay, SimStore, check_good, lock, seeds};
use crate::three_keys;
use fealty_blockcrypt::{OpenOptions, Store, Volume, VolumeError, erase, inspect, make_room};
use policy::{AnchorMode, VolumeAnchor};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const BLOCK: usize = 4096;
type Block = [u8; BLOCK];

/// Where each field begins, and its length in bytes: as drawn at `format::superblock`, pointers and the slot in their parts.
const FIELDS: [(&str, usize, usize); 55] = [
    ("magic", 0, 16),
    ("version", 16, 4),
    ("features", 20, 4),
    ("block size", 24, 4),
    ("sector size", 28, 4),
    ("UUID", 32, 16),
    ("cipher", 48, 2),
    ("MAC's kind", 50, 2),
    ("tag length", 52, 2),
    ("zero", 54, 2),
    ("size", 56, 8),
    ("total", 64, 8),
    ("log start", 72, 8),
    ("log length", 80, 8),
    ("map levels", 88, 1),
    ("free levels", 89, 1),
    ("entries", 90, 2),
    ("children", 92, 2),
    ("zero", 94, 2),
    ("epoch", 96, 8),
    ("writer", 104, 4),
    ("flags", 108, 4),
    ("map root's block", 112, 8),
    ("map root's birth", 120, 8),
    ("map root's MAC", 128, 32),
    ("map root", 112, 48),
    ("free root's block", 160, 8),
    ("free root's birth", 168, 8),
    ("free root's MAC", 176, 32),
    ("cut's offset", 208, 8),
    ("cut's sequence", 216, 8),
    ("cut's MAC", 224, 32),
    ("mapped", 256, 8),
    ("key id", 264, 8),
    ("older slots' block", 272, 8),
    ("older slots' birth", 280, 8),
    ("older slots' MAC", 288, 32),
    ("older slots", 272, 48),
    ("snapshots' block", 320, 8),
    ("snapshots' birth", 328, 8),
    ("snapshots' MAC", 336, 32),
    ("used", 368, 8),
    ("taken", 376, 8),
    ("slot's key id", 384, 8),
    ("slot's key-encryption key", 392, 8),
    ("slot's origin", 400, 16),
    ("slot's nonce", 416, 12),
    ("slot's master", 428, 32),
    ("slot's tag", 460, 16),
    ("slot's count", 476, 8),
    ("slot", 384, 128),
    ("rotation", 512, 12),
    ("padding", 2000, 8),
    ("MAC", 4064, 32),
    ("all", 0, BLOCK),
];

/// Which of the four copies are edited, a bit for each: from the right slots 0 and 1 at the front, then those at the end.
const SETS: [u8; 13] =
    [0b0001, 0b0010, 0b0100, 0b1000, 0b0101, 0b1010, 0b0011, 0b1100, 0b1110, 0b1101, 0b1011, 0b0111, 0b1111];

/// A store of which a few blocks were edited. Thousands of them cost little.
struct Edited {
    whole: Arc<Vec<u8>>,
    changed: Mutex<BTreeMap<u64, Block>>,
    /// Blocks read, and calls that change something.
    counts: Mutex<(u64, u64)>,
}

impl Edited {
    fn new(whole: &Arc<Vec<u8>>, edits: &[(u64, Block)]) -> Arc<Self> {
        let changed = Mutex::new(edits.iter().copied().collect());
        Arc::new(Self { whole: whole.clone(), changed, counts: Mutex::default() })
    }

    fn read(&self) -> u64 {
        lock(&self.counts).0
    }

    fn writes(&self) -> u64 {
        lock(&self.counts).1
    }

    fn block(&self, at: u64) -> Block {
        let mut block = [0; BLOCK];
        self.read_at(&mut block, at * BLOCK as u64).expect("there");
        block
    }
}

impl Store for Edited {
    fn len(&self) -> io::Result<u64> {
        Ok(self.whole.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let end = start.saturating_add(buffer.len());
        buffer.copy_from_slice(self.whole.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        let first = offset / BLOCK as u64;
        lock(&self.counts).0 += (buffer.len() / BLOCK) as u64;
        for (at, block) in lock(&self.changed).range(first..first + (buffer.len() / BLOCK) as u64) {
            buffer[(at - first) as usize * BLOCK..][..BLOCK].copy_from_slice(block);
        }
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert!(offset + bytes.len() as u64 <= self.whole.len() as u64, "behind the store's end");
        lock(&self.counts).1 += 1;
        lock(&self.changed).extend((offset / BLOCK as u64..).zip(bytes.as_chunks().0.iter().copied()));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        lock(&self.counts).1 += 1;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A volume with data under three keys and a snapshot, and everything that its owner has to make superblocks of.
struct Scene {
    provider: Arc<Provider>,
    anchor: VolumeAnchor,
    whole: Arc<Vec<u8>>,
    /// Blocks of the volume; its store may have more.
    total: u64,
    newest: Block,
    /// Superblocks of the other slot, of earlier times, and of another volume under the same key-encryption key.
    others: Vec<Block>,
    /// Numbers that mean something here.
    numbers: Vec<u64>,
    /// Blocks that hold the newest state's older slots.
    slots: Vec<u64>,
}

fn number(block: &[u8], at: usize) -> u64 {
    block[at..at + 8].try_into().map(u64::from_le_bytes).expect("eight bytes")
}

fn is_superblock(block: &&Block) -> bool {
    block.starts_with(b"fealty volume")
}

impl Scene {
    /// Closed, or killed behind a FLUSH that its anchor knows of; in a store with `beyond` more blocks than it uses.
    fn new(closed: bool, beyond: usize) -> Self {
        let (provider, store) = three_keys::made_with(if closed { AnchorMode::Close } else { AnchorMode::Flush });
        let mut others = superblocks(&store);
        let volume = provider.open(store.clone()).expect("opens");
        volume.take_snapshot("then").expect("taken");
        others.extend(superblocks(&store));
        for lba in 0..three_keys::BLOCKS / 2 {
            volume.write(lba * BLOCK as u64, &three_keys::content(lba)).expect("written");
        }
        volume.flush().expect("flushed");
        if closed {
            volume.close().expect("closed");
        }
        drop(volume);
        others.extend(superblocks(&store));
        let (_, foreign) = three_keys::made_with(AnchorMode::Close);
        let newest = *superblocks(&store).iter().max_by_key(|block| number(&block[..], 96)).expect("one");
        others.extend(superblocks(&foreign));
        others.sort_unstable();
        others.dedup();
        others.retain(|block| *block != newest);
        let mut whole = store.bytes();
        let total = number(&newest, 64);
        assert_eq!(whole.len() as u64, total * BLOCK as u64);
        whole.resize(whole.len() + beyond * BLOCK, 0x5a);
        let mut slots = Vec::new();
        let mut next = number(&newest, 272);
        while next != 0 {
            slots.push(next);
            next = number(&whole[next as usize * BLOCK..], 64);
        }
        assert!(!slots.is_empty(), "older keys");
        let mut numbers = vec![2, 3, 4, 5, 66, total / 2, total - 4, total - 3, total - 2, total - 1, total + 1];
        numbers.extend([total + 2, whole.len() as u64 / BLOCK as u64, 1 << 28, 1 << 38, 1 << 39, 1 << 50, 1 << 63]);
        // What lies where: pages of every kind, and data.
        for kind in 1..=4 {
            let pages = whole.as_chunks::<BLOCK>().0.iter().zip(0..);
            numbers.extend(pages.filter(|(b, _)| b[0] == kind && b[48..64] == [0; 16]).map(|(_, at)| at).take(3));
        }
        let anchor = provider.anchor().expect("an anchor");
        provider.heard();
        Self { provider, anchor, whole: Arc::new(whole), total, newest, others, numbers, slots }
    }

    fn places(&self) -> [u64; 4] {
        [0, 1, self.total - 2, self.total - 1]
    }

    fn copies(&self) -> [Block; 4] {
        self.places().map(|at| self.whole.as_chunks().0[at as usize])
    }

    /// What a field's bytes may become.
    fn values(&self, (name, at, length): (&str, usize, usize), random: &mut Random) -> Vec<Vec<u8>> {
        let own = &self.newest[at..at + length];
        let mut values = vec![vec![0; length], vec![0xff; length]];
        let mut one = vec![0; length];
        one[0] = 1;
        let mut top = vec![0; length];
        top[length - 1] = 0x80;
        let mut noise = vec![0; length];
        random.fill(&mut noise);
        values.extend([one, top, noise]);
        values.extend([own[0].wrapping_add(1), own[0].wrapping_sub(1)].map(|byte| {
            let mut value = own.to_vec();
            value[0] = byte;
            value
        }));
        if length == 8 {
            values.extend(self.numbers.iter().map(|number| number.to_le_bytes().to_vec()));
            values.extend(
                [number(own, 0).wrapping_sub(1), number(own, 0).wrapping_add(1)].map(|n| n.to_le_bytes().to_vec()),
            );
        }
        let all = name == "all";
        let few = if all { self.others.len() } else { 4 };
        for _ in 0..few {
            let other = &self.others[random.below(self.others.len() as u64) as usize];
            values.push(other[at..at + length].to_vec());
        }
        values.sort_unstable();
        values.dedup();
        values
    }

    /// The store with other bytes in its copies.
    fn edit(&self, set: u8, changes: &[(usize, Vec<u8>)]) -> Vec<(u64, Block)> {
        let (places, copies) = (self.places(), self.copies());
        let edited = (0..4).filter(|copy| set >> copy & 1 == 1).map(|copy| {
            let mut block = copies[copy];
            for (at, value) in changes {
                block[*at..at + value.len()].copy_from_slice(value);
            }
            (places[copy], block)
        });
        edited.collect()
    }

    /// Whether a copy of the newest superblock is where one is looked for: at the front, at the store's end, and at the ends that the front
    /// names, where the store is longer than the volume.
    fn is_sound(&self, store: &Edited) -> bool {
        let named = [0, 1].map(|at| store.block(at));
        let ends = named.iter().filter(is_superblock).map(|block| number(block, 64));
        let ends = ends
            .chain([self.whole.len() as u64 / BLOCK as u64])
            .flat_map(|end| [end.wrapping_sub(2), end.wrapping_sub(1)]);
        let looked: Vec<u64> = ends.chain([0, 1]).collect();
        self.places().iter().any(|at| looked.contains(at) && store.block(*at) == self.newest)
    }

    fn open(&self, store: &Arc<Edited>, options: OpenOptions) -> Result<Volume, VolumeError> {
        *lock(&self.provider.anchor) = Some(self.anchor.clone());
        self.provider.open_with(store.clone(), &self.provider.grant(), options)
    }

    /// Looks at the store without a key, and opens it for reading.
    fn look(&self, edits: &[(u64, Block)], what: &dyn Fn() -> String) {
        let store = Edited::new(&self.whole, edits);
        let sound = self.is_sound(&store);
        match inspect(&*store) {
            Ok(info) => assert!(info.superblocks <= 4, "{}: {info:?}", what()),
            Err(error) => assert!(!sound && is_refusal(&error), "{}: {error}", what()),
        }
        make_room(&*store, 512, 0).unwrap_or_else(|e| panic!("{}: {e}", what()));
        let opened = self.open(&store, OpenOptions { read_only: true, ..Default::default() });
        self.judge(opened, sound, what);
        assert!(store.writes() == 0 && store.read() < 4000, "{}: {} read", what(), store.read());
    }

    fn judge(&self, opened: Result<Volume, VolumeError>, sound: bool, what: &dyn Fn() -> String) {
        let heard = self.provider.heard();
        match opened {
            Ok(volume) => {
                assert!(sound, "{}: it opens", what());
                let mut all = vec![0xee; three_keys::BLOCKS as usize * BLOCK];
                volume.read(0, &mut all).unwrap_or_else(|e| panic!("{}: {e}", what()));
                for (lba, found) in (0..).zip(all.chunks(BLOCK)) {
                    assert!(found == three_keys::content(lba), "{}: block {lba}", what());
                }
            }
            Err(error) => {
                assert!(!sound && is_refusal(&error), "{}: {error:?}", what());
                assert!(heard.iter().any(|event| event.starts_with("integrity")), "{}: {heard:?}", what());
            }
        }
    }

    /// Opens it for writing, closes it, and opens it again; then destroys another like it.
    fn change(&self, edits: &[(u64, Block)], what: &dyn Fn() -> String) {
        let store = Edited::new(&self.whole, edits);
        let sound = self.is_sound(&store);
        let opened = self.open(&store, OpenOptions::default());
        match opened {
            Err(_) => assert_eq!(store.writes(), 0, "{}: what does not open stays as it is", what()),
            Ok(ref volume) => {
                check_good(volume);
                let snapshots = volume.snapshots().expect("a list");
                assert!(snapshots.len() == 1 && volume.info().older_keys > 0, "{}", what());
                volume.close().unwrap_or_else(|e| panic!("{}: {e}", what()));
                let again = self.provider.open_read_only(store.clone()).unwrap_or_else(|e| panic!("{}: {e}", what()));
                self.judge(Ok(again), sound, what);
            }
        }
        self.provider.heard();
        if let Err(error) = &opened {
            assert!(!sound && is_refusal(error), "{}: {error}", what());
        }
        assert!(store.read() < 10_000, "{}: {} read", what(), store.read());

        let store = Edited::new(&self.whole, edits);
        match erase(&*store) {
            Ok(_) => {
                let slots = self.slots.iter().filter(|_| sound);
                for at in self.places().iter().filter(|at| sound || **at < 2).chain(slots) {
                    assert!(store.block(*at) == [0; BLOCK], "{}: block {at} is left", what());
                }
                assert!(self.open(&store, OpenOptions::default()).is_err(), "{}", what());
                self.provider.heard();
            }
            Err(error) => {
                assert!(!sound && is_refusal(&error) && store.writes() == 0, "{}: {error}", what());
            }
        }
        assert!(store.read() < 2000 && store.writes() < 400, "{}", what());
    }
}

/// The superblocks that a store holds.
fn superblocks(store: &SimStore) -> Vec<Block> {
    store.bytes().as_chunks::<BLOCK>().0.iter().filter(is_superblock).copied().collect()
}

/// What an opener may say of a volume that somebody edited.
fn is_refusal(error: &VolumeError) -> bool {
    error.is_integrity() || matches!(error, VolumeError::Unsupported(_))
}

/// The most address space that this process ever had, in bytes.
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("there");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).expect("a line");
    line.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
}

/// The time that this thread computed. One that somebody stops for a while was not slow.
fn computed() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().expect("not negative")
}

/// Runs it over volumes that were closed, that were killed, and whose store is longer than they.
fn scenes(mut cases: impl FnMut(&Scene) -> u64) {
    let (before, begun) = (most_memory(), computed());
    let mut count = 0;
    for (closed, beyond) in [(true, 0), (false, 0), (true, 40)] {
        count += cases(&Scene::new(closed, beyond));
    }
    let took = computed() - begun;
    println!("{count} cases in {took:?}");
    // Other tests run meanwhile, and threads have room of their own.
    assert!(most_memory() - before < 4 << 30, "{} bytes", most_memory() - before);
    assert!(took < Duration::from_millis(2000 + 10 * count), "{count} cases in {took:?}");
}

#[test]
fn each_field_of_each_copy_may_say_anything() {
    scenes(|scene| {
        let (mut random, mut count) = (Random(1), 0);
        for field in FIELDS {
            for value in scene.values(field, &mut random) {
                let changes = [(field.1, value)];
                let first = random.below(SETS.len() as u64) as usize;
                for (nth, &set) in SETS.iter().cycle().skip(first).step_by(5).take(2).enumerate() {
                    let what = || format!("{} of copies {set:04b} is {:x?}", field.0, &changes[0].1[..field.2.min(48)]);
                    let edits = scene.edit(set, &changes);
                    scene.look(&edits, &what);
                    if nth == 0 && random.chance(40) {
                        scene.change(&edits, &what);
                    }
                    count += 1;
                }
            }
        }
        count
    });
}

/// Fields that agree with each other, of volumes as large as can be; superblocks at ends that are none; lists of key slots that lead
/// anywhere, round and round.
#[test]
fn superblocks_may_agree_with_each_other() {
    let seeds = seeds(1, 800);
    scenes(|scene| {
        for seed in seeds.clone() {
            let _replay = Replay { test: "superblocks::superblocks_may_agree".to_owned(), seed };
            let random = &mut Random(seed);
            let mut edits = scene.plant(random);
            let planted: Vec<u64> = edits.iter().map(|(at, _)| *at).collect();
            for set in [SETS[random.below(13) as usize], SETS[random.below(4) as usize]] {
                let mut changes = Vec::new();
                if random.chance(30) {
                    changes.push((0, scene.others[random.below(scene.others.len() as u64) as usize].to_vec()));
                }
                if random.chance(60) {
                    changes.extend(scene.geometry(random));
                }
                for _ in 0..random.below(3) {
                    let field = FIELDS[random.below(FIELDS.len() as u64 - 1) as usize];
                    let values = scene.values(field, random);
                    changes.push((field.1, values[random.below(values.len() as u64) as usize].clone()));
                }
                if random.chance(60) {
                    changes.push((272, scene.somewhere(&planted, random).to_le_bytes().to_vec()));
                }
                edits.extend(scene.edit(set, &changes));
            }
            let what = || format!("seed {seed}");
            scene.look(&edits, &what);
            scene.change(&edits, &what);
        }
        seeds.count_of_all()
    });
}

/// What is planted where nothing lies, and where a list may be said to begin or go on.
impl Scene {
    /// Pages like those of key slots, each leading to another, or to what is none of them; and superblocks.
    fn plant(&self, random: &mut Random) -> Vec<(u64, Block)> {
        let blank = |at: &u64| self.whole.as_chunks::<BLOCK>().0[*at as usize] == [0; BLOCK];
        let free: Vec<u64> = (2..self.total - 2).filter(blank).filter(|at| *at > self.slots[0]).collect();
        let places: Vec<u64> = (0..random.below(6)).map(|_| free[random.below(free.len() as u64) as usize]).collect();
        let plant = |at: &u64| {
            if random.chance(20) {
                return (*at, self.others[random.below(self.others.len() as u64) as usize]);
            }
            let mut page = self.whole.as_chunks::<BLOCK>().0[self.slots[0] as usize];
            page[64..72].copy_from_slice(&self.somewhere(&places, random).to_le_bytes());
            (*at, page)
        };
        places.iter().map(plant).collect()
    }

    /// Where something was planted, the volume's own lists, or a number of another meaning.
    fn somewhere(&self, planted: &[u64], random: &mut Random) -> u64 {
        match planted.len() as u64 {
            some if some > 0 && random.chance(70) => planted[random.below(some) as usize],
            _ if random.chance(50) => self.slots[random.below(self.slots.len() as u64) as usize],
            _ => self.numbers[random.below(self.numbers.len() as u64) as usize],
        }
    }

    /// Size, total, log and levels of another volume.
    fn geometry(&self, random: &mut Random) -> Vec<(usize, Vec<u8>)> {
        let levels = |leaves: u64| 1 + (1..).take_while(|level| 84_u64.pow(level - 1) < leaves).count() as u8;
        let store = self.whole.len() as u64 / BLOCK as u64;
        let size = [512, number(&self.newest, 56), 1 << 40, 1 << 50, (1 + random.below(1 << 41)) * 512];
        let size = size[random.below(5) as usize];
        let total = [self.total, store, 2 * size / 4096 + 5000, 1 << 39, 600 + random.below(200)];
        let total = total[random.below(5) as usize];
        let log = [number(&self.newest, 80), 32, 4096, 100][random.below(4) as usize];
        let numbers = [(56, size), (64, total), (72, 2), (80, log)];
        let mut changes: Vec<_> = numbers.iter().map(|(at, number)| (*at, number.to_le_bytes().to_vec())).collect();
        changes.push((88, vec![levels(size.div_ceil(4096).div_ceil(72)), levels(total.div_ceil(32_256))]));
        changes
    }
}
