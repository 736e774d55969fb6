//! The log as its writer sees it: a ring of blocks, a chain of MACs, records that wait.

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
    /// The next block's sequence number.
    pub(crate) sequence: u64,
    /// The MAC that the next block follows.
    pub(crate) chain: [u8; MAC],
    pending: Vec<Record>,
    /// Records ever appended.
    pub(crate) appended: u64,
    /// Of these, how many are known to be durable.
    pub(crate) durable: u64,
    /// Blocks were written since the last commit marker.
    unmarked: bool,
}

/// Pending blocks at which full ones are written without waiting for a FLUSH: bounds memory.
const PENDING: usize = 16;

impl Log {
    /// A log whose first block goes to offset `head` of the ring, in which nothing from offset `retained` on may be overwritten.
    pub(crate) fn new(writer: u32, from: &Backing, retained: u64, head: u64) -> Self {
        Self {
            writer,
            blocks: from.geometry.log_blocks,
            retained,
            cut: head,
            head,
            sequence: 0,
            chain: [0; MAC],
            pending: Vec::new(),
            appended: 0,
            durable: 0,
            unmarked: false,
        }
    }

    pub(crate) fn append(&mut self, record: Record) {
        self.pending.push(record);
        self.appended += 1;
    }

    /// Whether it is time for a checkpoint.
    pub(crate) fn wants_checkpoint(&self) -> bool {
        self.head + self.pending_blocks() - self.cut >= self.blocks * 3 / 8 || self.free() <= self.blocks / 4
    }

    /// Blocks that can still be written.
    pub(crate) fn free(&self) -> u64 {
        (self.blocks - (self.head - self.retained)).saturating_sub(self.pending_blocks())
    }

    /// Whether anything was logged since the cut.
    pub(crate) fn is_empty(&self) -> bool {
        self.head == self.cut && self.pending.is_empty()
    }

    /// Where replay starts if it starts here. The MAC is zero where the chain has not begun.
    pub(crate) fn head(&self) -> Cut {
        Cut { offset: self.head % self.blocks, sequence: self.sequence, chain: self.chain }
    }

    /// A superblock with its cut at [`head`](Self::head) is durable: what waited stands in the map.
    pub(crate) fn cut_here(&mut self) {
        self.pending.clear();
        self.durable = self.appended;
        self.unmarked = false;
        self.retained = self.cut;
        self.cut = self.head;
    }

    /// Writes full blocks if many wait.
    pub(crate) fn relieve(&mut self, from: &Backing) -> Result<(), VolumeError> {
        if self.pending.len() < PENDING * RECORDS {
            return Ok(());
        }
        self.write(self.pending.len() / RECORDS * RECORDS, false, from)
    }

    /// Writes what waits, the last block with a commit marker; not yet durable.
    pub(crate) fn commit(&mut self, from: &Backing) -> Result<(), VolumeError> {
        if self.pending.is_empty() && !self.unmarked {
            return Ok(());
        }
        self.write(self.pending.len(), true, from)
    }

    /// Writes the first `count` records; advances only if all went well.
    fn write(&mut self, count: usize, commit: bool, from: &Backing) -> Result<(), VolumeError> {
        let blocks = count.div_ceil(RECORDS).max(1);
        if blocks as u64 > self.blocks - (self.head - self.retained) {
            return Err(VolumeError::Full(None));
        }
        let mut bytes = Vec::with_capacity(blocks * BLOCK);
        let mut chain = self.chain;
        from.with_keys(|_, key| {
            for i in 0..blocks {
                let records = &self.pending[i * RECORDS..count.min((i + 1) * RECORDS)];
                let sequence = self.sequence + i as u64;
                let mut block = LogBlock::to_block(commit && i + 1 == blocks, self.writer, sequence, key.id, records);
                chain = key.log_mac(from.uuid, &chain, &block);
                block[MAC_AT..MAC_AT + MAC].copy_from_slice(&chain);
                bytes.extend_from_slice(&block[..]);
            }
            Ok(())
        })?;
        self.put(&bytes, from)?;
        self.chain = chain;
        self.head += blocks as u64;
        self.sequence += blocks as u64;
        self.pending.drain(..count);
        self.unmarked = !commit;
        Ok(())
    }

    /// Writes blocks at the head, round the ring's end if need be.
    fn put(&self, bytes: &[u8], from: &Backing) -> Result<(), VolumeError> {
        let offset = self.head % self.blocks;
        let before_end = ((self.blocks - offset) as usize * BLOCK).min(bytes.len());
        from.write_blocks(from.geometry.log_start() + offset, &bytes[..before_end])?;
        if before_end < bytes.len() {
            from.write_blocks(from.geometry.log_start(), &bytes[before_end..])?;
        }
        Ok(())
    }

    fn pending_blocks(&self) -> u64 {
        self.pending.len().div_ceil(RECORDS) as u64
    }
}
