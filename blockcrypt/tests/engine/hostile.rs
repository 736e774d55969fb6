//! A store whose owner keeps all that was ever written to it, and shows the engine what he likes: old blocks, moved ones, those of
//! other volumes, or none; before the volume is opened, while it is open, and in the middle of a request.

use crate::common::{Random, lock};
use fealty_blockcrypt::Store;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

pub(crate) const BLOCK: usize = 4096;

type Block = [u8; BLOCK];

/// A store and its owner.
pub(crate) struct HostileStore(Mutex<Owner>);

struct Owner {
    /// Bytes that the store has, as the engine made it, and as it is shown.
    length: u64,
    shown: u64,
    /// Each block's versions, and when each was written; zeroes before the first.
    history: BTreeMap<u64, Vec<(u64, Arc<Block>)>>,
    clock: u64,
    /// What is shown in place of the newest version; for one read only, where that is said.
    lies: BTreeMap<u64, Lie>,
    /// Every block that was lied about.
    touched: BTreeSet<u64>,
    /// Writes that will be acknowledged and come to nothing.
    deaf: u64,
    /// A lie that is told after so many more calls.
    later: Option<(u64, Vec<(u64, Lie)>)>,
}

#[derive(Clone)]
struct Lie {
    block: Arc<Block>,
    once: bool,
}

/// What a block of the store is, by what the store's owner can see: anyone can read metadata.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Kind {
    Superblock,
    Log,
    Page,
    Data,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Superblock, Self::Log, Self::Page, Self::Data];

    pub(crate) fn of(block: &Block) -> Self {
        let zero = |range: std::ops::Range<usize>| block[range].iter().all(|b| *b == 0);
        match block[0] {
            _ if block.starts_with(b"fealty volume") => Self::Superblock,
            4 if block[1] < 2 && zero(24..32) && !zero(32..64) => Self::Log,
            1..=4 if zero(2..4) && zero(48..64) => Self::Page,
            _ => Self::Data,
        }
    }
}

impl HostileStore {
    pub(crate) fn new() -> Arc<Self> {
        let owner = Owner {
            length: 0,
            shown: 0,
            history: BTreeMap::new(),
            clock: 0,
            lies: BTreeMap::new(),
            touched: BTreeSet::new(),
            deaf: 0,
            later: None,
        };
        Arc::new(Self(Mutex::new(owner)))
    }

    /// All that an honest store would show.
    pub(crate) fn blocks(&self) -> BTreeMap<u64, Arc<Block>> {
        lock(&self.0).history.iter().map(|(at, versions)| (*at, newest(versions))).collect()
    }

    /// How often something was written.
    pub(crate) fn time(&self) -> u64 {
        lock(&self.0).clock
    }

    /// The older versions of each block, the zeroes that it held first among them; those alike left out.
    pub(crate) fn older(&self) -> Vec<(u64, Arc<Block>)> {
        let owner = lock(&self.0);
        let (mut all, zeroes) = (Vec::new(), Arc::new([0; BLOCK]));
        for (at, versions) in &owner.history {
            let mut seen = BTreeSet::from([newest(versions)]);
            let old = std::iter::once(&zeroes).chain(versions.iter().map(|(_, old)| old));
            all.extend(old.filter(|old| seen.insert((*old).clone())).map(|old| (*at, old.clone())));
        }
        all
    }

    /// Shows `block` in one place, from now on.
    pub(crate) fn show(&self, at: u64, block: &Arc<Block>) {
        lock(&self.0).tell(vec![(at, Lie { block: block.clone(), once: false })]);
    }

    /// Shows what all blocks of some kinds held at an earlier time.
    pub(crate) fn show_as_of(&self, time: u64, kinds: &[Kind]) {
        let mut owner = lock(&self.0);
        let lies = owner.as_of(time, |_, kind| kinds.contains(&kind));
        owner.tell(lies);
    }

    /// Ends after `bytes`.
    pub(crate) fn cut(&self, bytes: u64) {
        lock(&self.0).shown = bytes;
    }

    /// No lies any more: what was written is shown.
    pub(crate) fn honest(&self) {
        let mut owner = lock(&self.0);
        owner.lies.clear();
        (owner.deaf, owner.later, owner.shown) = (0, None, owner.length);
    }

    /// What is shown is what there is: the engine went on from it.
    pub(crate) fn believe(&self) {
        let mut owner = lock(&self.0);
        owner.clock += 1;
        for (at, lie) in std::mem::take(&mut owner.lies) {
            if !lie.once {
                owner.push(at, lie.block);
            }
        }
        (owner.deaf, owner.later) = (0, None);
    }

    /// Whether anything is, or is about to be, not as it was written.
    pub(crate) fn lies(&self) -> bool {
        let owner = lock(&self.0);
        !owner.lies.is_empty() || owner.deaf > 0 || owner.later.is_some() || owner.shown < owner.length
    }

    /// Whether `block` was ever lied about.
    pub(crate) fn touched(&self, block: u64) -> bool {
        lock(&self.0).touched.contains(&block)
    }

    /// Whether it ends before it should.
    pub(crate) fn cut_short(&self) -> bool {
        let owner = lock(&self.0);
        owner.shown < owner.length
    }

    /// One of the things that an owner can do, at once or in the middle of what comes; says what. `donors` are other volumes.
    pub(crate) fn trick(&self, random: &mut Random, donors: &[BTreeMap<u64, Arc<Block>>]) -> String {
        let mut owner = lock(&self.0);
        let (what, mut lies) = match random.below(100) {
            0..28 => owner.replay_one(random),
            28..43 => owner.replay_many(random),
            43..51 => owner.swap(random),
            51..58 => owner.place_elsewhere(random),
            58..70 => owner.splice(random),
            70..78 => owner.flip(random),
            78..83 => owner.replace(random),
            83..91 => owner.mix(random, donors),
            91..97 => {
                owner.deaf = 1 + random.below(40);
                (format!("{} writes come to nothing", owner.deaf), Vec::new())
            }
            _ => owner.cut(random),
        };
        if lies.len() < 3 && random.chance(12) {
            lies.iter_mut().for_each(|(_, lie)| lie.once = true);
        }
        let once = if lies.first().is_some_and(|(_, lie)| lie.once) { ", once" } else { "" };
        if !lies.is_empty() && random.chance(30) {
            let calls = random.below(25);
            owner.later = Some((calls, lies));
            return format!("{what}{once}, after {calls} calls");
        }
        owner.tell(lies);
        format!("{what}{once}")
    }
}

fn newest(versions: &[(u64, Arc<Block>)]) -> Arc<Block> {
    versions.last().map_or_else(|| Arc::new([0; BLOCK]), |(_, block)| block.clone())
}

fn lie(block: Arc<Block>) -> Lie {
    Lie { block, once: false }
}

type Trick = (String, Vec<(u64, Lie)>);

impl Owner {
    fn tell(&mut self, lies: Vec<(u64, Lie)>) {
        for (at, lie) in lies {
            self.touched.insert(at);
            self.lies.insert(at, lie);
        }
    }

    fn push(&mut self, at: u64, block: Arc<Block>) {
        self.history.entry(at).or_default().push((self.clock, block));
    }

    /// What a block shows, which stays for the next look at it.
    fn visible(&self, at: u64) -> Arc<Block> {
        match self.lies.get(&at) {
            Some(lie) => lie.block.clone(),
            None => self.history.get(&at).map_or_else(|| Arc::new([0; BLOCK]), |versions| newest(versions)),
        }
    }

    /// What was written `time` writes after the beginning, of the blocks that `which` wants by place and kind.
    fn as_of(&self, time: u64, which: impl Fn(u64, Kind) -> bool) -> Vec<(u64, Lie)> {
        let mut lies = Vec::new();
        for (at, versions) in &self.history {
            let count = versions.partition_point(|(written, _)| *written <= time);
            if count < versions.len() && which(*at, Kind::of(&newest(versions))) {
                lies.push((*at, lie(newest(&versions[..count]))));
            }
        }
        lies
    }

    /// A block of a kind, each kind as likely as the others.
    fn pick(&self, random: &mut Random, wanted: impl Fn(&[(u64, Arc<Block>)]) -> bool) -> Option<u64> {
        for _ in 0..8 {
            let kind = Kind::ALL[random.below(4) as usize];
            let of_kind = |(_, versions): &(&u64, &Vec<(u64, Arc<Block>)>)| {
                Kind::of(&newest(versions)) == kind && wanted(versions)
            };
            let all: Vec<u64> = self.history.iter().filter(of_kind).map(|(at, _)| *at).collect();
            if !all.is_empty() {
                return Some(all[random.below(all.len() as u64) as usize]);
            }
        }
        None
    }

    fn replay_one(&mut self, random: &mut Random) -> Trick {
        let Some(at) = self.pick(random, |versions| versions.len() > 1) else { return self.flip(random) };
        let versions = &self.history[&at];
        let back = 1 + random.below(versions.len() as u64 - 1).min(random.below(4)) as usize;
        let old = versions[versions.len() - 1 - back].1.clone();
        let what = format!("block {at}, {:?}, as it was {back} versions before", Kind::of(&newest(versions)));
        (what, vec![(at, lie(old))])
    }

    fn replay_many(&mut self, random: &mut Random) -> Trick {
        // Mostly something not long ago: what is older, the anchor does not allow.
        let back = [8, 64, 512, self.clock][random.below(4) as usize].min(self.clock);
        let time = self.clock - random.below(back + 1);
        let (what, kinds): (&str, &[Kind]) = match random.below(7) {
            0..2 => ("superblocks", &[Kind::Superblock]),
            2 => ("the log", &[Kind::Log]),
            3 => ("map pages", &[Kind::Page]),
            4 => ("superblocks and log", &[Kind::Superblock, Kind::Log]),
            5 => ("data", &[Kind::Data]),
            _ => ("all", &Kind::ALL),
        };
        // One slot of the superblock has a copy at each end.
        let end = self.length / BLOCK as u64;
        let slot = random.below(4);
        let in_slot = |at: u64| slot > 1 || [slot, (end - 2 + slot)].contains(&at);
        let lies = self.as_of(time, |at, kind| kinds.contains(&kind) && (kind != Kind::Superblock || in_slot(at)));
        (format!("{what} (slot {slot}, 2 or more: both) as of {} of {} writes", time, self.clock), lies)
    }

    fn swap(&mut self, random: &mut Random) -> Trick {
        let Some((a, b)) = self.pick(random, |_| true).zip(self.pick(random, |_| true)) else {
            return ("nothing".to_owned(), Vec::new());
        };
        (format!("blocks {a} and {b} swapped"), vec![(a, lie(self.visible(b))), (b, lie(self.visible(a)))])
    }

    /// Another block, or an older version of one, in a block's place; mostly one of its kind.
    fn place_elsewhere(&mut self, random: &mut Random) -> Trick {
        let Some(to) = self.pick(random, |_| true) else { return ("nothing".to_owned(), Vec::new()) };
        let kind = Kind::of(&self.visible(to));
        let same = random.chance(80);
        let from = self.pick(random, |versions| !same || Kind::of(&newest(versions)) == kind).unwrap_or(to);
        let versions = &self.history[&from];
        let version = random.below(versions.len() as u64) as usize;
        (format!("version {version} of block {from} in block {to}"), vec![(to, lie(versions[version].1.clone()))])
    }

    /// A block with records, entries or pointers of another of its kind, or of an older version.
    fn splice(&mut self, random: &mut Random) -> Trick {
        let Some(to) = self.pick(random, |versions| Kind::of(&newest(versions)) != Kind::Data) else {
            return self.flip(random);
        };
        let mut block = *self.visible(to);
        let kind = Kind::of(&block);
        let from = self.pick(random, |versions| Kind::of(&newest(versions)) == kind).unwrap_or(to);
        let versions = &self.history[&from];
        let other = &versions[random.below(versions.len() as u64) as usize].1;
        // Behind the header, which is 64 bytes long: a record, an entry or a pointer.
        let size = if kind == Kind::Log { 64 } else { [56, 48][random.below(2) as usize] };
        let items = [3, (BLOCK as u64 - 64) / size][random.below(2) as usize];
        let mut place = || (64 + size * random.below(items)) as usize;
        let (at, source) = (place(), place());
        block[at..at + size as usize].copy_from_slice(&other[source..source + size as usize]);
        (format!("{size} bytes at {source} of block {from} at {at} of block {to}"), vec![(to, lie(Arc::new(block)))])
    }

    fn flip(&mut self, random: &mut Random) -> Trick {
        let Some(at) = self.pick(random, |_| true) else { return ("nothing".to_owned(), Vec::new()) };
        let mut block = *self.visible(at);
        let bit = random.below(8 * BLOCK as u64) as usize;
        block[bit / 8] ^= 1 << (bit % 8);
        (format!("bit {bit} of block {at} flipped"), vec![(at, lie(Arc::new(block)))])
    }

    fn replace(&mut self, random: &mut Random) -> Trick {
        let Some(at) = self.pick(random, |_| true) else { return ("nothing".to_owned(), Vec::new()) };
        let mut block = [0; BLOCK];
        let noise = random.chance(50);
        if noise {
            random.fill(&mut block);
        }
        (format!("block {at} is {}", if noise { "noise" } else { "zero" }), vec![(at, lie(Arc::new(block)))])
    }

    fn mix(&mut self, random: &mut Random, donors: &[BTreeMap<u64, Arc<Block>>]) -> Trick {
        if donors.is_empty() {
            return self.flip(random);
        }
        let donor = &donors[random.below(donors.len() as u64) as usize];
        let which = random.below(6);
        if which < 5
            && let Some(kind) = Kind::ALL.get(which as usize)
            && random.chance(30)
        {
            let theirs = donor.iter().filter(|(_, block)| Kind::of(block) == *kind);
            return (format!("all {kind:?} of another volume"), theirs.map(|(at, b)| (*at, lie(b.clone()))).collect());
        }
        if which == 5 && random.chance(30) {
            return ("another volume".to_owned(), donor.iter().map(|(at, b)| (*at, lie(b.clone()))).collect());
        }
        let at = *donor.keys().nth(random.below(donor.len() as u64) as usize).expect("one of them");
        let place = if random.chance(70) { at } else { self.pick(random, |_| true).unwrap_or(at) };
        (format!("block {at} of another volume in block {place}"), vec![(place, lie(donor[&at].clone()))])
    }

    fn cut(&mut self, random: &mut Random) -> Trick {
        let blocks = self.length / BLOCK as u64;
        let keep = match random.below(3) {
            0 => random.below(blocks),
            1 => blocks - 1 - random.below(4).min(blocks - 1),
            _ => random.below(80).min(blocks - 1),
        };
        self.shown = keep * BLOCK as u64 + [0, 512, 4095][random.below(3) as usize];
        // Should it grow again, there is nothing.
        let lies = self.history.range(keep..).map(|(at, _)| (*at, lie(Arc::new([0; BLOCK])))).collect();
        (format!("cut to {} bytes", self.shown), lies)
    }

    /// A call: the time may have come.
    fn tick(&mut self) {
        if let Some((calls, lies)) = &mut self.later {
            *calls = calls.saturating_sub(1);
            if *calls == 0 {
                let lies = std::mem::take(lies);
                self.later = None;
                self.tell(lies);
            }
        }
    }

    fn put(&mut self, at: u64, block: Block) {
        let before = self.visible(at);
        self.push(at, Arc::new(block));
        if self.deaf > 0 {
            self.tell(vec![(at, lie(before))]);
        } else {
            self.lies.remove(&at);
        }
    }
}

impl Store for HostileStore {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.0).shown)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut owner = lock(&self.0);
        owner.tick();
        if offset + buffer.len() as u64 > owner.shown {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (blocks, rest) = buffer.as_chunks_mut::<BLOCK>();
        assert!(rest.is_empty() && offset.is_multiple_of(BLOCK as u64), "the engine reads blocks");
        for (at, block) in (offset / BLOCK as u64..).zip(blocks) {
            *block = *owner.visible(at);
            if owner.lies.get(&at).is_some_and(|lie| lie.once) {
                owner.lies.remove(&at);
            }
        }
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut owner = lock(&self.0);
        owner.tick();
        owner.clock += 1;
        let (blocks, rest) = bytes.as_chunks::<BLOCK>();
        assert!(rest.is_empty() && offset.is_multiple_of(BLOCK as u64), "the engine writes blocks");
        for (at, block) in (offset / BLOCK as u64..).zip(blocks) {
            owner.put(at, *block);
        }
        let end = (offset + bytes.len() as u64).min(owner.length);
        owner.shown = owner.shown.max(end);
        owner.deaf = owner.deaf.saturating_sub(1);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        lock(&self.0).tick();
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let mut owner = lock(&self.0);
        (owner.length, owner.shown) = (bytes, bytes);
        Ok(())
    }

    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mut owner = lock(&self.0);
        owner.tick();
        owner.clock += 1;
        for at in offset / BLOCK as u64..(offset + bytes) / BLOCK as u64 {
            owner.put(at, [0; BLOCK]);
        }
        Ok(())
    }
}
