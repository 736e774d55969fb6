//! The log as its writer sees it: a ring of blocks, a chain of MACs, records that wait.
//!
//! Only the thread that holds `flushing` moves the head: it takes records out under the volume's lock, writes them as a [`Batch`]
//! without it, and puts the result back.

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
    pending: Vec<Record>,
    /// Blocks that are being written.
    writing: u64,
    /// Records that requests in hand will append.
    promised: u64,
    /// Records ever appended.
    pub(crate) appended: u64,
    /// Of these, how many are known to be durable.
    pub(crate) durable: u64,
    /// Blocks were written since the last commit marker.
    unmarked: bool,
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
    /// What the first block follows; then the MAC of the last.
    chain: [u8; MAC],
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
            writing: 0,
            promised: 0,
            appended: 0,
            durable: 0,
            unmarked: false,
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
        if self.pending.is_empty() && !self.unmarked {
            return Ok(None);
        }
        self.take(self.pending.len(), true).map(Some)
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
        Ok(Batch { records: self.pending.drain(..count).collect(), commit, writer, head, sequence, chain })
    }

    /// A batch was written: the head is behind it.
    pub(crate) fn written(&mut self, batch: &Batch) {
        let blocks = blocks(batch.records.len());
        self.writing = 0;
        self.chain = batch.chain;
        self.head += blocks;
        self.sequence += blocks;
        self.unmarked = !batch.commit;
    }

    /// A batch was not written, or only in part; or it was, and nobody said so. Its records wait again, and their next batch takes the
    /// same place.
    pub(crate) fn failed(&mut self, batch: Batch) {
        self.strays = self.strays.max(batch.head + blocks(batch.records.len()));
        self.put_back(batch.records);
    }

    /// Records that were taken and not written wait again.
    pub(crate) fn put_back(&mut self, records: Vec<Record>) {
        self.writing = 0;
        self.pending.splice(0..0, records);
    }

    /// A checkpoint begins: where replay will start, and the records that wait, for the map has them. The MAC is zero where the chain
    /// has not begun. Strays hold records that are older than the map: replay must not meet them.
    pub(crate) fn begin_cut(&mut self) -> (Cut, Vec<Record>) {
        let skipped = self.strays.saturating_sub(self.head);
        let cut =
            Cut { offset: (self.head + skipped) % self.blocks, sequence: self.sequence + skipped, chain: self.chain };
        (cut, std::mem::take(&mut self.pending))
    }

    /// A superblock with the cut that was begun is durable, and with it the first `records` records.
    pub(crate) fn cut_here(&mut self, records: u64) {
        let skipped = self.strays.saturating_sub(self.head);
        self.head += skipped;
        self.sequence += skipped;
        self.durable = self.durable.max(records);
        self.unmarked = false;
        self.retained = self.cut;
        self.cut = self.head;
    }

    fn waiting_blocks(&self) -> u64 {
        self.writing + (self.pending.len() as u64 + self.promised).div_ceil(RECORDS as u64)
    }
}

impl Batch {
    /// MACs and writes the blocks; not yet durable.
    pub(crate) fn put(&mut self, from: &Backing) -> Result<(), VolumeError> {
        let count = blocks(self.records.len());
        let mut bytes = Vec::with_capacity(count as usize * BLOCK);
        let mut chain = self.chain;
        from.with_keys(|_, key| {
            for i in 0..count {
                let start = i as usize * RECORDS;
                let records = &self.records[start..self.records.len().min(start + RECORDS)];
                let commit = self.commit && i + 1 == count;
                let mut block = LogBlock::to_block(commit, self.writer, self.sequence + i, key.id, records);
                chain = key.log_mac(from.uuid, &chain, &block);
                block[MAC_AT..MAC_AT + MAC].copy_from_slice(&chain);
                bytes.extend_from_slice(&block[..]);
            }
            Ok(())
        })?;
        self.chain = chain;
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
}

/// Blocks that hold so many records; a marker alone takes one.
fn blocks(records: usize) -> u64 {
    records.div_ceil(RECORDS).max(1) as u64
}
