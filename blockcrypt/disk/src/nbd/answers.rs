//! Replies that go out together, with one system call: headers in one place, data in another, where it lies well in memory.

use std::io::{self, IoSlice, Write};
use std::ops::Range;

/// Where data begins, at best, in memory: no vector of a cipher's lies in two lines of the cache, and the kernel copies pages.
const ALIGN: usize = 4096;

/// The buffers are used again and again.
#[derive(Default)]
pub(super) struct Answers {
    heads: Vec<u8>,
    data: Vec<u8>,
    /// A header's bytes, and those of the data behind it.
    parts: Vec<(usize, Range<usize>)>,
}

impl Answers {
    /// Room for data of `bytes`; what was there is gone.
    pub(super) fn room(&mut self, bytes: usize) -> &mut [u8] {
        if self.data.len() < bytes + ALIGN {
            self.data.resize(bytes + ALIGN, 0);
        }
        let start = self.start();
        &mut self.data[start..start + bytes]
    }

    fn start(&self) -> usize {
        self.data.as_ptr().align_offset(ALIGN).min(ALIGN)
    }

    /// A reply of a header alone.
    pub(super) fn add(&mut self, head: &[u8]) {
        self.add_data(head, 0..0);
    }

    /// A reply with data that lies in the [`room`](Self::room).
    pub(super) fn add_data(&mut self, head: &[u8], data: Range<usize>) {
        self.heads.extend_from_slice(head);
        match self.parts.last_mut() {
            // Headers without data follow each other.
            Some((before, none)) if none.start == none.end => (*before, *none) = (*before + head.len(), data),
            _ => self.parts.push((head.len(), data)),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Sends all of them, and forgets them.
    pub(super) fn send(&mut self, to: &mut impl Write) -> io::Result<()> {
        let (start, mut head) = (self.start(), 0);
        let mut slices = Vec::with_capacity(2 * self.parts.len());
        for (length, data) in &self.parts {
            slices.push(IoSlice::new(&self.heads[head..head + length]));
            if !data.is_empty() {
                slices.push(IoSlice::new(&self.data[start + data.start..start + data.end]));
            }
            head += length;
        }
        let sent = write_all(to, &mut slices);
        self.heads.clear();
        self.parts.clear();
        sent
    }

    /// Gives memory back.
    pub(super) fn shrink(&mut self) {
        self.data = Vec::new();
    }
}

fn write_all(to: &mut impl Write, mut slices: &mut [IoSlice]) -> io::Result<()> {
    // Those that are empty at the front are dropped.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match to.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => IoSlice::advance_slices(&mut slices, sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a few bytes at a time.
    struct Slow(Vec<u8>, usize);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.write_vectored(&[IoSlice::new(bytes)])
        }
        fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
            let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).take(self.1).collect();
            self.0.extend(&all);
            Ok(all.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn all_of_it_goes_out_in_order_however_little_is_taken_at_a_time() {
        let mut answers = Answers::default();
        for most in [1, 3, 7, 100, 100_000] {
            let room = answers.room(9000);
            room.iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8);
            let data = room.to_vec();
            answers.add(b"one");
            answers.add(b"two");
            answers.add_data(b"three", 0..5000);
            answers.add_data(b"four", 5000..9000);
            answers.add(b"five");
            let mut slow = Slow(Vec::new(), most);
            answers.send(&mut slow).expect("taken");
            let expected = [&b"onetwothree"[..], &data[..5000], b"four", &data[5000..], b"five"].concat();
            assert!(slow.0 == expected && answers.is_empty(), "{most} at a time");
        }
        answers.shrink();
        answers.add(b"x");
        let mut slow = Slow(Vec::new(), 9);
        answers.send(&mut slow).expect("taken");
        assert!(slow.0 == b"x");
        answers.add(b"x");
        assert!(answers.send(&mut Slow(Vec::new(), 0)).is_err());
    }
}
