//! One request (virtio 1.3, 5.2.6):
//!
//! ```text
//! readable  type u32 LE │ reserved u32 │ sector u64 LE │ data of a write, segments of a discard
//! writable  data of a read │ status u8
//! ```

use super::config::QUEUE_SIZE;
use crate::{Disk, Fault};
use std::io::{Read, Write};
use std::ops::Deref;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::{DescriptorChain, Reader, Writer};
use vm_memory::GuestMemoryMmap;

/// Bytes of a sector, whatever the block size (5.2.6.1).
pub(super) const SECTOR: u64 = 512;
/// Segments of a discard or a write of zeroes.
pub(super) const SEGMENTS: usize = 16;

const HEADER: usize = 16;
const SEGMENT: usize = 16;
const SERIAL: usize = 20;
/// Requests performed together, at most: twice as many as a volume hashes at once.
pub(crate) const BATCH: usize = 32;
/// Descriptors that a request may have: a driver makes no chain longer than the queue, by an indirect table neither (2.7.5.3.1).
pub(crate) const LONGEST_CHAIN: usize = QUEUE_SIZE as usize;
/// Bytes that are copied and encrypted at a time.
const PIECE: usize = 1 << 20;
/// Bytes that a request may move.
const LONGEST: usize = 32 << 20;
/// The segment's room is to be given up.
const UNMAP: u32 = 1;

/// Performs requests, those together that came together, with private memory for their data.
pub(crate) struct Performer {
    buffer: Vec<u8>,
    serial: [u8; SERIAL],
}

/// Why a request is not done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Failed {
    /// What it asks for can't be, or came to nothing.
    Io,
    /// There is no such request.
    Unsupported,
}

/// What a request asks for; where data goes to or comes from, within the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    Read { offset: u64, length: usize },
    Write { offset: u64, length: usize },
    Flush,
    Serial,
    Discard,
    WriteZeroes,
}

impl Ask {
    fn changes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard | Self::WriteZeroes)
    }
}

/// A request in hand.
struct Job<'a> {
    head: u16,
    /// What the guest sends behind the header.
    sent: Reader<'a>,
    /// Where data goes.
    room: Writer<'a>,
    /// Where the status goes.
    status: Writer<'a>,
    /// Bytes up to the status.
    length: usize,
    ask: Result<Ask, Failed>,
    /// How it went, once it is done.
    done: Option<Result<(), Failed>>,
}

impl Performer {
    pub(crate) fn new(serial: &str) -> Self {
        let mut padded = [0; SERIAL];
        padded.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Self { buffer: Vec::new(), serial: padded }
    }

    /// Does what `chains` ask for, their writes together, then their reads, and then what else there is; and says how each went in
    /// its last byte. Gives the head of each, in order, and how many bytes of it were written; a chain without room for a status, or
    /// of more than [`LONGEST_CHAIN`] descriptors, is given back as it is. With `write_through` what they change is durable before that (5.2.6.2).
    pub(crate) fn perform<M>(
        &mut self,
        disk: &dyn Disk,
        write_through: bool,
        chains: Vec<DescriptorChain<M>>,
        memory: &GuestMemoryMmap,
    ) -> Vec<(u16, u32)>
    where
        M: Deref<Target = GuestMemoryMmap> + Clone,
    {
        let heads: Vec<u16> = chains.iter().map(DescriptorChain::head_index).collect();
        let mut jobs: Vec<Job> = chains.into_iter().filter_map(|chain| Job::new(disk, chain, memory)).collect();
        for jobs in jobs.chunks_mut(BATCH) {
            self.write_together(disk, jobs);
            self.read_together(disk, jobs);
            for job in jobs.iter_mut().filter(|job| job.done.is_none()) {
                job.done = Some(job.ask.and_then(|ask| self.perform_alone(disk, ask, job)));
            }
        }
        if write_through {
            make_durable(disk, &mut jobs);
        }
        // In the order in which they came: whoever takes over from a back end that died begins behind the last that is used.
        let mut done = jobs.into_iter().map(Job::finish).peekable();
        heads.into_iter().map(|head| done.next_if(|(of, _)| *of == head).unwrap_or((head, 0))).collect()
    }

    /// The writes that fit the memory for them.
    fn write_together(&mut self, disk: &dyn Disk, jobs: &mut [Job]) {
        let (mut room, mut whose, mut writes) = (self.piece(PIECE), Vec::new(), Vec::new());
        for job in jobs {
            let Ok(Ask::Write { offset, length }) = job.ask else { continue };
            if length > room.len() {
                continue;
            }
            let (data, rest) = std::mem::take(&mut room).split_at_mut(length);
            room = rest;
            match job.sent.read_exact(data) {
                Ok(()) => {
                    writes.push((offset, &*data));
                    whose.push(job);
                }
                Err(_) => job.done = Some(Err(Failed::Io)),
            }
        }
        if !writes.is_empty() {
            for (job, done) in whose.into_iter().zip(disk.write_many(&writes)) {
                job.done = Some(done.map_err(Failed::from));
            }
        }
    }

    /// The reads that fit the memory for them.
    fn read_together(&mut self, disk: &dyn Disk, jobs: &mut [Job]) {
        let (mut room, mut whose, mut reads) = (self.piece(PIECE), Vec::new(), Vec::new());
        for job in jobs {
            let Ok(Ask::Read { offset, length }) = job.ask else { continue };
            if length > room.len() {
                continue;
            }
            let (data, rest) = std::mem::take(&mut room).split_at_mut(length);
            room = rest;
            reads.push((offset, data));
            whose.push(job);
        }
        if !reads.is_empty() {
            let done = disk.read_many(&mut reads);
            for ((job, (_, data)), done) in whose.into_iter().zip(reads).zip(done) {
                let copied = done.map_err(Failed::from);
                job.done = Some(copied.and_then(|()| job.room.write_all(data).map_err(|_| Failed::Io)));
            }
        }
    }

    fn perform_alone(&mut self, disk: &dyn Disk, ask: Ask, job: &mut Job) -> Result<(), Failed> {
        match ask {
            Ask::Read { offset, length } => self.read(disk, offset, length, &mut job.room),
            Ask::Write { offset, length } => self.write(disk, offset, length, &mut job.sent),
            Ask::Flush => Ok(disk.flush()?),
            Ask::Serial => job.room.write_all(&self.serial).map_err(|_| Failed::Io),
            Ask::Discard => segments(disk, &mut job.sent, |disk, offset, length, flags| match flags {
                0 => Ok(disk.discard(offset, length)?),
                _ => Err(Failed::Unsupported),
            }),
            Ask::WriteZeroes => segments(disk, &mut job.sent, |disk, offset, length, flags| match flags {
                0 | UNMAP => Ok(disk.write_zeroes(offset, length, flags == UNMAP)?),
                _ => Err(Failed::Unsupported),
            }),
        }
    }

    fn read(&mut self, disk: &dyn Disk, offset: u64, length: usize, writer: &mut Writer<'_>) -> Result<(), Failed> {
        let mut done = 0;
        while done < length {
            let piece = self.piece(length - done);
            disk.read(offset + done as u64, piece)?;
            writer.write_all(piece).map_err(|_| Failed::Io)?;
            done += piece.len();
        }
        Ok(())
    }

    fn write(&mut self, disk: &dyn Disk, offset: u64, length: usize, reader: &mut Reader<'_>) -> Result<(), Failed> {
        let mut done = 0;
        while done < length {
            let piece = self.piece(length - done);
            reader.read_exact(piece).map_err(|_| Failed::Io)?;
            disk.write(offset + done as u64, piece)?;
            done += piece.len();
        }
        Ok(())
    }

    fn piece(&mut self, rest: usize) -> &mut [u8] {
        let length = rest.min(PIECE);
        if self.buffer.len() < length {
            self.buffer.resize(length, 0);
        }
        &mut self.buffer[..length]
    }
}

impl<'a> Job<'a> {
    /// None where there is no room for a status, or the chain is too long.
    fn new<M>(disk: &dyn Disk, chain: DescriptorChain<M>, memory: &'a GuestMemoryMmap) -> Option<Self>
    where
        M: Deref<Target = GuestMemoryMmap> + Clone,
    {
        let head = chain.head_index();
        // Each descriptor takes memory below; an indirect table has room for 65,535 of them, and those may follow each other in circles.
        if chain.clone().nth(LONGEST_CHAIN).is_some() {
            return None;
        }
        let (mut sent, mut room) = (chain.clone().reader(memory).ok()?, chain.writer(memory).ok()?);
        let length = room.available_bytes().checked_sub(1)?;
        let status = room.split_at(length).ok()?;
        let ask = ask(disk, &mut sent, length);
        Some(Self { head, sent, room, status, length, ask, done: None })
    }

    /// Says how it went.
    fn finish(mut self) -> (u16, u32) {
        let code = match self.done.unwrap_or(Err(Failed::Io)) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failed::Io) => VIRTIO_BLK_S_IOERR,
            Err(Failed::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        };
        if self.status.write_all(&[code as u8]).is_err() {
            return (self.head, 0);
        }
        // After an error less may have been written; what counts is that status lies behind all of it.
        (self.head, u32::try_from(self.length + 1).unwrap_or(u32::MAX))
    }
}

/// What a request asks for, by its header, with `room` for data.
fn ask(disk: &dyn Disk, reader: &mut Reader<'_>, room: usize) -> Result<Ask, Failed> {
    let mut header = [0; HEADER];
    reader.read_exact(&mut header).map_err(|_| Failed::Io)?;
    let [kind, _, low, high] = words(&header);
    let sector = u64::from(high) << 32 | u64::from(low);
    match kind {
        VIRTIO_BLK_T_IN => Ok(Ask::Read { offset: within(disk, sector, room)?, length: room }),
        VIRTIO_BLK_T_OUT => {
            let length = reader.available_bytes();
            let offset = within(disk, sector, length)?;
            if disk.read_only() { Err(Failed::Io) } else { Ok(Ask::Write { offset, length }) }
        }
        VIRTIO_BLK_T_FLUSH => Ok(Ask::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Ask::Serial),
        VIRTIO_BLK_T_DISCARD => Ok(Ask::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => Ok(Ask::WriteZeroes),
        _ => Err(Failed::Unsupported),
    }
}

/// One FLUSH for all that was changed.
fn make_durable(disk: &dyn Disk, jobs: &mut [Job]) {
    let changed = |job: &&mut Job| job.done == Some(Ok(())) && job.ask.is_ok_and(Ask::changes);
    if jobs.iter_mut().any(|job| changed(&job))
        && let Err(fault) = disk.flush()
    {
        jobs.iter_mut().filter(changed).for_each(|job| job.done = Some(Err(fault.into())));
    }
}

/// Reads all segments before the first is done, so that a request that can't be changes nothing.
fn segments(
    disk: &dyn Disk,
    reader: &mut Reader<'_>,
    perform: impl Fn(&dyn Disk, u64, u64, u32) -> Result<(), Failed>,
) -> Result<(), Failed> {
    let length = reader.available_bytes();
    let mut bytes = [0; SEGMENT * SEGMENTS];
    let bytes = bytes.get_mut(..length).ok_or(Failed::Io)?;
    reader.read_exact(bytes).map_err(|_| Failed::Io)?;
    let (segments, rest) = bytes.as_chunks::<SEGMENT>();
    if segments.is_empty() || !rest.is_empty() || disk.read_only() {
        return Err(Failed::Io);
    }
    let ranges = segments.iter().map(|segment| {
        let [low, high, sectors, flags] = words(segment);
        let sector = u64::from(high) << 32 | u64::from(low);
        let length = u64::from(sectors) * SECTOR;
        inside(disk, sector, length).map(|offset| (offset, length, flags))
    });
    let ranges = ranges.collect::<Result<Vec<_>, _>>()?;
    ranges.into_iter().try_for_each(|(offset, length, flags)| perform(disk, offset, length, flags))
}

/// Where data of `length` bytes lies.
fn within(disk: &dyn Disk, sector: u64, length: usize) -> Result<u64, Failed> {
    if length > LONGEST { Err(Failed::Io) } else { inside(disk, sector, length as u64) }
}

/// The offset of `sector`, if `length` bytes from there on are sectors of the disk.
fn inside(disk: &dyn Disk, sector: u64, length: u64) -> Result<u64, Failed> {
    let offset = sector.checked_mul(SECTOR).ok_or(Failed::Io)?;
    let good = length > 0 && length.is_multiple_of(SECTOR);
    let end = offset.checked_add(length).filter(|end| good && *end <= disk.size());
    end.map(|_| offset).ok_or(Failed::Io)
}

fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|i| u32::from_le_bytes(words[i]))
}

impl From<Fault> for Failed {
    fn from(_: Fault) -> Self {
        Self::Io
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestAddress};

    /// Notes what it is asked: `r`ead, `w`rite, `f`lush, `d`iscard, `z`eroes. Flushes fail if told to.
    #[derive(Default)]
    struct Noting {
        heard: Mutex<String>,
        breaks: bool,
    }

    impl Noting {
        fn note(&self, what: char) {
            self.heard.lock().expect("one thread").push(what);
        }
    }

    impl Disk for Noting {
        fn size(&self) -> u64 {
            1 << 20
        }
        fn read_only(&self) -> bool {
            false
        }
        fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Fault> {
            self.note('r');
            Ok(())
        }
        fn write(&self, _: u64, _: &[u8]) -> Result<(), Fault> {
            self.note('w');
            Ok(())
        }
        fn flush(&self) -> Result<(), Fault> {
            self.note('f');
            if self.breaks { Err(Fault::Io) } else { Ok(()) }
        }
        fn discard(&self, _: u64, _: u64) -> Result<(), Fault> {
            self.note('d');
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), Fault> {
            self.note('z');
            Ok(())
        }
    }

    /// Performs one request of `kind` with `data` behind its header, or with room for a sector; its status.
    fn perform(disk: &Noting, write_through: bool, kind: u32, data: Option<&[u8]>) -> u32 {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).expect("memory");
        let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).expect("inside");
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        put(0x1000, &header);
        put(0x2000, data.unwrap_or_default());
        put(0x3000, &[0xff]);
        let (next, writable) = (1_u16, 2_u16);
        let middle = if data.is_some() { next } else { next | writable };
        let length = data.map_or(SECTOR as usize, <[u8]>::len) as u32;
        let chain = [(0x1000_u64, HEADER as u32, next), (0x2000, length, middle), (0x3000, 1, writable)];
        for (i, (address, length, flags)) in chain.into_iter().enumerate() {
            let at = i as u64 * 16;
            put(at, &address.to_le_bytes());
            put(at + 8, &length.to_le_bytes());
            put(at + 12, &flags.to_le_bytes());
            put(at + 14, &(i as u16 + 1).to_le_bytes());
        }
        let used = used(disk, write_through, &memory);
        assert!(matches!(used[..], [(0, 1..)]));
        u32::from(memory.read_obj::<u8>(GuestAddress(0x3000)).expect("inside"))
    }

    /// Performs the one chain that `memory` is given, which begins with descriptor 0.
    fn used(disk: &Noting, write_through: bool, memory: &GuestMemoryMmap) -> Vec<(u16, u32)> {
        memory.write_slice(&1_u16.to_le_bytes(), GuestAddress(0x202)).expect("inside");
        let mut queue = Queue::new(16).expect("a queue");
        queue.try_set_desc_table_address(GuestAddress(0)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(0x200)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(0x300)).expect("aligned");
        queue.set_ready(true);
        let chains = queue.iter(memory).expect("sound").collect();
        Performer::new("test").perform(disk, write_through, chains, memory)
    }

    #[test]
    fn a_chain_has_as_many_descriptors_as_a_queue_and_no_more() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x20000)]).expect("memory");
        let put = |at: u64, (address, length, flags, next): (u64, u32, u16, u16)| {
            let low = u128::from(address) | u128::from(length) << 64;
            let descriptor = low | u128::from(flags) << 96 | u128::from(next) << 112;
            memory.write_slice(&descriptor.to_le_bytes(), GuestAddress(at)).expect("inside");
        };
        let (next, writable, indirect, table) = (1, 2, 4, 0x8000);
        for (count, expected) in [(LONGEST_CHAIN, true), (LONGEST_CHAIN + 1, false)] {
            memory.write_slice(&[0xff], GuestAddress(0x3000)).expect("inside");
            put(0, (table, 16 * count as u32, indirect, 0));
            // A read: the header is zero.
            put(table, (0x1000, HEADER as u32, next, 1));
            for i in 1..count as u16 - 1 {
                put(table + 16 * u64::from(i), (0x2000, SECTOR as u32, next | writable, i + 1));
            }
            put(table + 16 * (count as u64 - 1), (0x3000, 1, writable, 0));
            let written = (count as u32 - 2) * SECTOR as u32 + 1;
            assert_eq!(used(&Noting::default(), false, &memory), [(0, if expected { written } else { 0 })]);
            let status: u8 = memory.read_obj(GuestAddress(0x3000)).expect("inside");
            assert_eq!(u32::from(status), if expected { VIRTIO_BLK_S_OK } else { 0xff });
        }
        // In a circle.
        put(0, (table, 16 * u32::from(u16::MAX), indirect, 0));
        put(table + 16, (0x2000, 1, next | writable, 1));
        assert_eq!(used(&Noting::default(), false, &memory), [(0, 0)]);
    }

    #[test]
    fn without_flush_what_a_request_changes_is_durable_before_its_status() {
        let segment = [0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0];
        let requests = [
            (VIRTIO_BLK_T_IN, None),
            (VIRTIO_BLK_T_OUT, Some(&[7; SECTOR as usize][..])),
            (VIRTIO_BLK_T_DISCARD, Some(&segment[..])),
            (VIRTIO_BLK_T_WRITE_ZEROES, Some(&segment[..])),
        ];
        for (write_through, expected) in [(false, "rwdz"), (true, "rwfdfzf")] {
            let disk = Noting::default();
            for (kind, data) in requests {
                assert_eq!(perform(&disk, write_through, kind, data), VIRTIO_BLK_S_OK, "{kind}");
            }
            assert_eq!(*disk.heard.lock().expect("one thread"), expected);
        }
        let broken = Noting { breaks: true, ..Noting::default() };
        for (kind, data) in &requests[1..] {
            assert_eq!(perform(&broken, true, *kind, *data), VIRTIO_BLK_S_IOERR, "{kind}");
        }
    }
}
