//! The log: what was written since the last checkpoint.

use super::page::Entry;
use super::{BLOCK, Block, FormatError, MAC, array_at, key_at, put, u16_at, u32_at, u64_at, zero, zero_block};
use policy::KeyId;

/// A log block.
///
/// ```text
/// 0        1       2       4        8          16       24     32    64
/// type 4   flags   count   writer   sequence   key id   zero   MAC   records, 64 bytes each
/// 1        1       2       4        8          8        8      32    at most 63
/// ```
///
/// Flag 1 is a commit marker: the blocks up to this one were written for one fdatasync, and the fdatasync of the marker before
/// had returned. A block without it, if it is the last and not full, may be written again with more records: then what a crash leaves
/// of it is one of both, or nothing that verifies, and either way nothing is lost that a FLUSH acknowledged. The MAC, under the log key of `key id`, covers a type byte, the volume's UUID, the MAC of the block before, and
/// this block without its MAC. The first block of a writer follows the *seed* instead: HMAC over UUID, open number and the MAC of
/// the superblock with which that writer opened the volume. So blocks of another volume, writer or branch of history never
/// continue a chain.
///
/// Numbers rise by one from block to block. A superblock's cut may pass over some: blocks that could not be written, as far as their writer
/// heard, and that may be there all the same, with records older than that superblock's map. What follows such a cut is found from that
/// superblock on only, not from the one before it.
pub(crate) struct LogBlock {
    pub(crate) commit: bool,
    pub(crate) writer: u32,
    pub(crate) sequence: u64,
    pub(crate) key: KeyId,
    pub(crate) mac: [u8; MAC],
    pub(crate) records: Vec<Record>,
}

/// A record, 64 bytes: logical block, then its entry (56 bytes).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) lba: u64,
    pub(crate) entry: Entry,
}

/// Records in one log block.
pub(crate) const RECORDS: usize = (BLOCK - HEADER) / Record::SIZE;
/// Where the records begin.
pub(crate) const HEADER: usize = 64;
/// Where the MAC stands.
pub(crate) const MAC_AT: usize = 32;
const TYPE: u8 = 4;
const COMMIT: u8 = 1;

impl LogBlock {
    /// The block, its MAC not verified.
    pub(crate) fn parse(block: &Block) -> Result<Self, FormatError> {
        if block[0] != TYPE || block[1] & !COMMIT != 0 {
            return Err(FormatError("not a log block"));
        }
        zero(&block[24..32])?;
        let count = usize::from(u16_at(block, 2));
        if count > RECORDS {
            return Err(FormatError("a log block with too many records"));
        }
        let end = HEADER + count * Record::SIZE;
        zero(&block[end..])?;
        let (records, _) = block[HEADER..end].as_chunks::<{ Record::SIZE }>();
        Ok(Self {
            commit: block[1] == COMMIT,
            writer: u32_at(block, 4),
            sequence: u64_at(block, 8),
            key: key_at(block, 16),
            mac: array_at(block, MAC_AT),
            records: records.iter().map(Record::parse).collect(),
        })
    }

    /// The block; the MAC's place is zero, to be filled by whoever holds the key.
    pub(crate) fn to_block(commit: bool, writer: u32, sequence: u64, key: KeyId, records: &[Record]) -> Box<Block> {
        let mut out = zero_block();
        out[0] = TYPE;
        out[1] = if commit { COMMIT } else { 0 };
        put(&mut out[..], 2, &(records.len() as u16).to_le_bytes());
        put(&mut out[..], 4, &writer.to_le_bytes());
        put(&mut out[..], 8, &sequence.to_le_bytes());
        put(&mut out[..], 16, &key.0.to_le_bytes());
        for (i, record) in records.iter().take(RECORDS).enumerate() {
            put(&mut out[..], HEADER + i * Record::SIZE, &record.to_bytes());
        }
        out
    }
}

impl Record {
    pub(crate) const SIZE: usize = 64;

    fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        Self { lba: u64_at(bytes, 0), entry: Entry::parse(&array_at(bytes, 8)) }
    }

    fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        put(&mut out, 0, &self.lba.to_le_bytes());
        put(&mut out, 8, &self.entry.to_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let entry = Entry { physical: 9, generation: 8, key: KeyId(7), tag: [6; 32] };
        let records: Vec<_> = (0..RECORDS as u64).map(|lba| Record { lba, entry }).collect();
        let block = LogBlock::to_block(true, 3, 1 << 50, KeyId(7), &records);
        let read = LogBlock::parse(&block).expect("good");
        assert!(read.commit && read.writer == 3 && read.sequence == 1 << 50 && read.key == KeyId(7));
        assert!(read.records == records && RECORDS == 63);
    }

    #[test]
    fn what_is_no_log_block_is_refused() {
        let good = LogBlock::to_block(false, 3, 4, KeyId(7), &[]);
        for (at, value) in [(0, 5), (1, 2), (2, 64), (3, 1), (30, 1), (64, 1), (4095, 1)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(LogBlock::parse(&bad).is_err(), "{at}");
        }
    }
}
