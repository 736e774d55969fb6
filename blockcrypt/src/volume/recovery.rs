//! Replaying the log after a crash.
//!
//! Which records count? Those up to the last commit marker but one are *mandatory*: their fdatasync had returned, or a later
//! marker would not have been written. So are those up to the anchored head. Each later one is *optional*: it counts if the data
//! that it names is there. For each logical block the newest record is looked at first; what is older than one that counts
//! is not looked at, for its data may have been overwritten since.

use super::{Core, leaf};
use crate::VolumeError;
use crate::backing::Backing;
use crate::format::anchor::AnchorFields;
use crate::format::log::{LogBlock, Record};
use crate::format::page::{BITS, Entry, set_entry};
use crate::format::superblock::Superblock;
use crate::format::{MAC, zero_block};
use crate::keys::same;
use crate::space::bitmap;
use std::collections::{BTreeMap, HashSet};

/// What a log holds.
pub(super) struct Recovered {
    records: Vec<Record>,
    /// How many of them, from the first, are mandatory.
    mandatory: usize,
    /// Blocks of the log.
    pub(super) blocks: u64,
}

/// Reads the log of the superblock that was chosen.
pub(super) fn replay(superblock: &Superblock, anchor: &AnchorFields, from: &Backing) -> Result<Recovered, VolumeError> {
    let anchored = (anchor.epoch == superblock.epoch).then_some(anchor);
    let writer = superblock.writer.get();
    let mut chain = superblock.cut.chain;
    if chain == [0; MAC] {
        chain = from.with_keys(|_, key| Ok(key.log_seed(from.uuid, writer, &superblock.mac)))?;
    }
    let mut found = Recovered { records: Vec::new(), mandatory: 0, blocks: 0 };
    let mut commits = Vec::new();
    let mut anchored_records = None;
    loop {
        let sequence = superblock.cut.sequence + found.blocks;
        if let Some(anchor) = anchored.filter(|a| a.sequence == sequence) {
            // At the cut itself there is nothing to compare: the superblock's MAC, which the anchor names, covers it.
            if found.blocks > 0 && !same(&anchor.chain, &chain) {
                return Err(VolumeError::RolledBack("its log is not the one that the anchor names".to_owned()));
            }
            anchored_records = Some(found.records.len());
        }
        let Some(block) = next_block(superblock, found.blocks, &chain, from)? else { break };
        chain = block.mac;
        found.records.extend(block.records);
        found.blocks += 1;
        if block.commit {
            commits.push(found.records.len());
        }
    }
    if anchored.is_some() && anchored_records.is_none() {
        return Err(VolumeError::RolledBack("its log ends before the head that the anchor names".to_owned()));
    }
    let by_marker = commits.len().checked_sub(2).map_or(0, |i| commits[i]);
    found.mandatory = by_marker.max(anchored_records.unwrap_or(0));
    check_records(&found.records, from)?;
    Ok(found)
}

/// The block that continues the chain, if one does.
fn next_block(
    superblock: &Superblock,
    done: u64,
    chain: &[u8; MAC],
    from: &Backing,
) -> Result<Option<LogBlock>, VolumeError> {
    let ring = from.geometry().log_blocks;
    if done >= ring {
        return Ok(None);
    }
    let (at, sequence) = ((superblock.cut.offset + done) % ring, superblock.cut.sequence + done);
    let mut bytes = zero_block();
    // Read twice before it is taken for the log's end: what follows would be lost for good.
    for _ in 0..2 {
        from.read_blocks(from.geometry().log_start() + at, &mut bytes[..]).map_err(|error| match error {
            VolumeError::Store(_, why) => VolumeError::Store("read its log", why),
            other => other,
        })?;
        let Ok(block) = LogBlock::parse(&bytes) else { continue };
        if block.writer != superblock.writer.get() || block.sequence != sequence || block.key != superblock.key() {
            continue;
        }
        if from.with_keys(|_, key| Ok(same(&key.log_mac(from.uuid, chain, &bytes), &block.mac)))? {
            return Ok(Some(block));
        }
    }
    Ok(None)
}

/// Records were written by a holder of the key; one that is impossible all the same must not become a panic.
fn check_records(records: &[Record], from: &Backing) -> Result<(), VolumeError> {
    let possible = |r: &Record| r.lba < from.geometry().blocks() && r.entry.data().is_none_or(|b| from.in_pool(b));
    if records.iter().all(possible) {
        Ok(())
    } else {
        Err(VolumeError::Damaged("its log names blocks that do not exist".to_owned()))
    }
}

/// Brings map and free space to the recovered state, in memory. Data that it leaves out may be overwritten at once: what was
/// verified is durable (the store was synced before it was read), so a recovery after this one finds the same.
pub(super) fn apply(core: &mut Core, found: &Recovered, from: &Backing) -> Result<(), VolumeError> {
    let (verdicts, dropped) = judge(found, from)?;
    let mut taken: HashSet<u64> = HashSet::new();
    // What verified is certainly where it says; then mandatory records, newest first.
    let mut order: Vec<&Verdict> = verdicts.iter().filter(|v| v.record.is_some()).collect();
    order.sort_by_key(|v| std::cmp::Reverse((v.verified, v.number)));
    let mut settled: BTreeMap<u64, Entry> = BTreeMap::new();
    for verdict in order {
        let Some(entry) = verdict.record else { continue };
        let free = entry.data().is_none_or(|block| taken.insert(block));
        settled.insert(verdict.lba, if free { entry } else { lost(entry) });
    }
    for verdict in verdicts.iter().filter(|v| v.record.is_none()) {
        let mut old = [Entry::UNMAPPED];
        core.run(from, |core| core.lookup(verdict.lba, &mut old))?;
        if old[0].data().is_some_and(|block| taken.contains(&block)) {
            settled.insert(verdict.lba, lost(old[0]));
        }
    }
    settle(core, &settled, from)?;
    core.dropped = dropped;
    if dropped > 0 {
        let text = format!("recovery dropped {dropped} writes that no FLUSH had acknowledged");
        from.events.note(&text);
    }
    let gone: Vec<u64> = settled.iter().filter(|(_, e)| e.physical == Entry::LOST).map(|(lba, _)| *lba).collect();
    for lba in gone {
        from.events.integrity(Some(lba), None, "recovery found its data overwritten");
    }
    Ok(())
}

/// What the log says about one logical block.
struct Verdict {
    lba: u64,
    /// The record that counts; none where the map's entry does.
    record: Option<Entry>,
    /// The record's place in the log.
    number: usize,
    /// Its data was found.
    verified: bool,
}

/// Judges each logical block that the log names; also counts the records dropped. By rounds, for the store does many reads at once in
/// little more time than one: each looks at the newest record that is left of every block that is not settled.
fn judge(found: &Recovered, from: &Backing) -> Result<(Vec<Verdict>, u64), VolumeError> {
    let mut by_block: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (number, record) in found.records.iter().enumerate() {
        by_block.entry(record.lba).or_default().push(number);
    }
    let mut left: Vec<(u64, Vec<usize>)> = by_block.into_iter().collect();
    let (mut verdicts, mut dropped) = (Vec::with_capacity(left.len()), 0);
    while !left.is_empty() {
        let mut optional = Vec::new();
        for (lba, mut numbers) in std::mem::take(&mut left) {
            let Some(number) = numbers.pop() else {
                verdicts.push(Verdict { lba, record: None, number: 0, verified: false });
                continue;
            };
            let entry = found.records[number].entry;
            if number < found.mandatory {
                verdicts.push(Verdict { lba, record: Some(entry), number, verified: false });
            } else {
                optional.push((lba, entry, number, numbers));
            }
        }
        let asked: Vec<(u64, Entry)> = optional.iter().map(|(lba, entry, ..)| (*lba, *entry)).collect();
        for ((lba, entry, number, older), held) in optional.into_iter().zip(from.held(&asked)?) {
            if held {
                verdicts.push(Verdict { lba, record: Some(entry), number, verified: true });
            } else {
                dropped += 1;
                left.push((lba, older));
            }
        }
    }
    Ok((verdicts, dropped))
}

/// An entry whose data is gone.
fn lost(entry: Entry) -> Entry {
    Entry { physical: Entry::LOST, ..entry }
}

/// Enters the settled entries: first frees what they replace, then takes what they name, for one's old block may be another's
/// new one.
fn settle(core: &mut Core, settled: &BTreeMap<u64, Entry>, from: &Backing) -> Result<(), VolumeError> {
    for (lba, new) in settled {
        core.run(from, |core| {
            let mut old = [Entry::UNMAPPED];
            core.lookup(*lba, &mut old)?;
            if let Some(block) = old[0].data().filter(|b| from.in_pool(*b)) {
                core.forest.page(bitmap(block / BITS as u64))?;
                core.mapped = core.mapped.saturating_sub(1);
                if !core.data_is_retained(*lba, &old[0]) {
                    core.space.untake(block, &mut core.forest)?;
                }
            }
            let (id, place) = leaf(*lba);
            set_entry(core.forest.page_mut(id)?, place, *new);
            Ok(())
        })?;
    }
    for block in settled.values().filter_map(Entry::data) {
        core.run(from, |core| core.space.take(block..block + 1, &mut core.forest))?;
        core.mapped += 1;
    }
    Ok(())
}
