//! The log as its writer sees it: a ring of blocks, a chain of MACs, records that wait.
//!
//! Only the thread that holds `logging` moves the head: it takes records out under the volume's lock, writes them as a [`Batch`]
//! without it, and puts the result back.
//!
//! Records may be handed to the store before a FLUSH asks for them to be durable: so they outlive this process. Those that do not fill a
//! block lie in the one at the head, which is *open*: it is written again, with more, until it is full, or a FLUSH or a checkpoint
//! closes it. A crash of the machine may tear it, and with it only what no FLUSH has acknowledged.

use super::write::LOG_ROOM;
use crate::VolumeError;
use crate::backing::Backing;
use crate::format::log::{LogBlock, MAC_AT, RECORDS, Record};
use crate::format::superblock::Cut;
use crate::format::{BLOCK, MAC};

/// Positions count blocks written since the volume was opened and never wrap; modulo the ring's length they are offsets.
///
/// ```text
///      retained          cut              head
/// ─────┼─────────────────┼────────────────┼───────── pending records
///      older superblock's newest's        next block
/// ```
///
/// Nothing from `retained` on is overwritten. A checkpoint is due when three eighths of the ring lie behind the cut, so two
/// intervals and the requests in hand always fit.
pub(crate) struct Log {
    writer: u32,
    blocks: u64,
    retained: u64,
    cut: u64,
    head: u64,
    /// Before this there may be blocks that continue the chain and that nobody knows of: writing them failed.
    strays: u64,
    /// The next block's sequence number.
    pub(crate) sequence: u64,
    /// The MAC that the next block follows.
    pub(crate) chain: [u8; MAC],
    /// Records that no closed block has.
    pending: Vec<Record>,
    /// How many of these, from the first, the open block has; and its MAC.
    handed: usize,
    open_mac: [u8; MAC],
    /// Where replay will start when the checkpoint under way is durable.
    next_cut: u64,
    /// That checkpoint has records that the log has not, or its cut passes over blocks. Nothing may be written behind the head before it
    /// is durable or given up.
    lent: bool,
    /// Blocks that are being written.
    writing: u64,
    /// Records that requests in hand will append.
    promised: u64,
    /// Records ever appended.
    pub(crate) appended: u64,
    /// Of these, how many the store has, durable or not.
    pub(crate) stored: u64,
    /// Of these, how many are known to be durable.
    pub(crate) durable: u64,
    /// The head behind the last commit marker or cut.
    marked: u64,
}

/// Pending records at which full blocks are written without waiting for a FLUSH: bounds memory.
const PENDING: usize = 16 * RECORDS;

/// Records on their way to the disk.
pub(crate) struct Batch {
    records: Vec<Record>,
    commit: bool,
    writer: u32,
    head: u64,
    sequence: u64,
    /// What the first block follows; then the MAC of the last that is closed.
    chain: [u8; MAC],
    /// The MAC of the last.
    last: [u8; MAC],
    /// How many records the open block had.
    handed: usize,
}

impl Log {
    /// A log whose first block goes to offset `head` of the ring, in which nothing from offset `retained` on may be overwritten.
    pub(crate) fn new(writer: u32, from: &Backing, retained: u64, head: u64) -> Self {
        Self {
            writer,
            blocks: from.geometry().log_blocks,
            retained,
            cut: head,
            head,
            strays: head,
            sequence: 0,
            chain: [0; MAC],
            pending: Vec::new(),
            handed: 0,
            open_mac: [0; MAC],
            next_cut: head,
            lent: false,
            writing: 0,
            promised: 0,
            appended: 0,
            stored: 0,
            durable: 0,
            marked: head,
        }
    }

    pub(crate) fn append(&mut self, record: Record) {
        self.pending.push(record);
        self.appended += 1;
    }

    /// A request in hand will append so many records.
    pub(crate) fn promise(&mut self, records: u64) {
        self.promised += records;
    }

    /// Records that requests in hand will append.
    pub(crate) fn promised(&self) -> u64 {
        self.promised
    }

    /// It has, or will not.
    pub(crate) fn redeem(&mut self, records: u64) {
        self.promised -= records;
    }

    /// Whether it is time for a checkpoint.
    pub(crate) fn wants_checkpoint(&self) -> bool {
        self.head + self.waiting_blocks() - self.cut >= self.blocks * 3 / 8 || self.free() <= self.blocks / 4
    }

    /// Blocks that can still be written.
    pub(crate) fn free(&self) -> u64 {
        (self.blocks - (self.head - self.retained)).saturating_sub(self.waiting_blocks())
    }

    /// Whether the ring has little room only because an older superblock may still need what lies before the cut: one more checkpoint, of
    /// nothing, lets go of it.
    pub(crate) fn is_held_up(&self) -> bool {
        self.retained < self.cut && self.free() < LOG_ROOM
    }

    /// Whether anything was logged since the cut.
    pub(crate) fn is_empty(&self) -> bool {
        self.head == self.cut && self.pending.is_empty()
    }

    /// Whether so many records wait that full blocks should be written, and whether that is urgent.
    pub(crate) fn wants_relief(&self) -> (bool, bool) {
        (self.pending.len() >= PENDING, self.pending.len() >= 4 * PENDING)
    }

    /// What waits, to be written with a commit marker behind it; nothing if there is nothing to mark.
    pub(crate) fn take_all(&mut self) -> Result<Option<Batch>, VolumeError> {
        if self.pending.is_empty() && self.head == self.marked {
            return Ok(None);
        }
        self.take(self.pending.len(), true).map(Some)
    }

    /// What waits, to be written without a marker; nothing if the store has it, or a checkpoint must be waited for.
    pub(crate) fn take_new(&mut self) -> Result<Option<Batch>, VolumeError> {
        if !self.has_new() || self.lent {
            return Ok(None);
        }
        self.take(self.pending.len(), false).map(Some)
    }

    /// Whether records wait that the store does not have.
    pub(crate) fn has_new(&self) -> bool {
        self.pending.len() > self.handed
    }

    /// Full blocks of what waits, to be written without a marker.
    pub(crate) fn take_full(&mut self) -> Result<Option<Batch>, VolumeError> {
        match self.pending.len() / RECORDS * RECORDS {
            0 => Ok(None),
            count => self.take(count, false).map(Some),
        }
    }

    fn take(&mut self, count: usize, commit: bool) -> Result<Batch, VolumeError> {
        let blocks = blocks(count);
        if blocks > self.blocks - (self.head - self.retained) {
            return Err(VolumeError::Full(None));
        }
        self.writing = blocks;
        let Self { writer, head, sequence, chain, .. } = *self;
        let (handed, records) = (std::mem::take(&mut self.handed), self.pending.drain(..count).collect());
        Ok(Batch { records, commit, writer, head, sequence, chain, last: chain, handed })
    }

    /// A batch was written: the head is behind its closed blocks.
    pub(crate) fn written(&mut self, batch: &Batch) {
        let closed = batch.closed();
        self.writing = 0;
        self.chain = batch.chain;
        self.head += closed;
        self.sequence += closed;
        self.stored += (batch.records.len() - batch.handed) as u64;
        if batch.commit {
            self.marked = self.head;
        } else {
            let open = &batch.records[closed as usize * RECORDS..];
            self.pending.splice(0..0, open.iter().copied());
            (self.handed, self.open_mac) = (open.len(), batch.last);
        }
    }

    /// A batch was not written, or only in part; or it was, and nobody said so. Its records wait again, and their next batch takes the
    /// same place.
    pub(crate) fn failed(&mut self, batch: Batch) {
        self.strays = self.strays.max(batch.head + blocks(batch.records.len()));
        self.writing = 0;
        // What the open block holds now is not known.
        self.stored -= batch.handed as u64;
        self.pending.splice(0..0, batch.records);
    }

    /// A checkpoint is given up: the records that it had wait again.
    pub(crate) fn give_up_cut(&mut self, records: Vec<Record>) {
        self.lent = false;
        self.pending.splice(0..0, records);
    }

    /// A checkpoint begins: where replay will start, and the records that wait, for the map has them. The MAC is zero where the chain
    /// has not begun. The open block is closed: replay must not find it behind the cut. Nor must it meet strays, whose records are older
    /// than the map: the cut passes over them.
    pub(crate) fn begin_cut(&mut self) -> (Cut, Vec<Record>) {
        if self.handed > 0 {
            self.pending.drain(..std::mem::take(&mut self.handed));
            self.chain = self.open_mac;
            self.head += 1;
            self.sequence += 1;
        }
        self.next_cut = self.head.max(self.strays);
        let skipped = self.next_cut - self.head;
        self.lent = skipped > 0 || !self.pending.is_empty();
        let cut = Cut { offset: self.next_cut % self.blocks, sequence: self.sequence + skipped, chain: self.chain };
        (cut, std::mem::take(&mut self.pending))
    }

    /// The superblock with the cut that was begun is durable, and with it the first `records` records.
    pub(crate) fn end_cut(&mut self, records: u64) {
        let skipped = self.next_cut.saturating_sub(self.head);
        self.head += skipped;
        self.sequence += skipped;
        self.durable = self.durable.max(records);
        self.stored = self.stored.max(records);
        self.lent = false;
        self.retained = self.cut;
        self.cut = self.next_cut;
        self.marked = self.marked.max(self.cut);
    }

    fn waiting_blocks(&self) -> u64 {
        self.writing + (self.pending.len() as u64 + self.promised).div_ceil(RECORDS as u64)
    }
}

impl Batch {
    /// MACs and writes the blocks; not yet durable.
    pub(crate) fn put(&mut self, from: &Backing) -> Result<(), VolumeError> {
        let (count, closed) = (blocks(self.records.len()), self.closed());
        let mut bytes = Vec::with_capacity(count as usize * BLOCK);
        let (mut chain, mut last) = (self.chain, self.chain);
        from.with_keys(|_, key| {
            for i in 0..count {
                let start = i as usize * RECORDS;
                let records = &self.records[start..self.records.len().min(start + RECORDS)];
                let commit = self.commit && i + 1 == count;
                let mut block = LogBlock::to_block(commit, self.writer, self.sequence + i, key.id, records);
                last = key.log_mac(from.uuid, &last, &block);
                block[MAC_AT..MAC_AT + MAC].copy_from_slice(&last);
                bytes.extend_from_slice(&block[..]);
                if i < closed {
                    chain = last;
                }
            }
            Ok(())
        })?;
        (self.chain, self.last) = (chain, last);
        // Round the ring's end if need be.
        let geometry = from.geometry();
        let offset = self.head % geometry.log_blocks;
        let before_end = ((geometry.log_blocks - offset) as usize * BLOCK).min(bytes.len());
        from.write_blocks(geometry.log_start() + offset, &bytes[..before_end])?;
        if before_end < bytes.len() {
            from.write_blocks(geometry.log_start(), &bytes[before_end..])?;
        }
        Ok(())
    }

    /// Blocks that are not written again: without a marker, those that are full.
    fn closed(&self) -> u64 {
        if self.commit { blocks(self.records.len()) } else { (self.records.len() / RECORDS) as u64 }
    }
}

/// Blocks that hold so many records; a marker alone takes one.
fn blocks(records: usize) -> u64 {
    records.div_ceil(RECORDS).max(1) as u64
}
