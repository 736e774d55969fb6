//! Sealed streams: what leaves a VM process for its customer (a core dump; later snapshots and migration).
//!
//! ```text
//! offset 0         8        40
//!        magic     random   chunk 0   chunk 1   ...   last chunk
//!        8 bytes   32       each but the last: 65536 bytes of ciphertext and a 16-byte tag; the last: 0 to 65536 and 16
//! ```
//!
//! AES-256-GCM; key = HKDF-SHA256(salt = the 32 random bytes, released key, info = what the stream is for); nonce = three zero
//! bytes, the chunk's number (big-endian u64), and one byte that is 1 for the last chunk alone. So chunks can be neither
//! reordered nor dropped, the end can't be cut off, and a retry is a new stream under a new key.

use crate::aead::{self, Cipher, TAG};
use policy::{CustomerId, Digest, KeyId, VmId};
use secretmem::{Secret, SecretError};
use std::io::{self, Read, Write};

/// First bytes of every sealed stream.
const MAGIC: [u8; 8] = *b"fealtyS1";

/// Plain bytes of every chunk but the last.
pub const CHUNK: usize = 64 * 1024;

/// What a stream carries, and which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// A core dump, from the VM process to the customer's tool.
    CoreDump,
}

impl Direction {
    fn name(self) -> &'static [u8] {
        match self {
            Self::CoreDump => b"core dump",
        }
    }
}

/// What a stream's key is bound to.
#[derive(Debug, Clone, Copy)]
pub struct StreamInfo<'a> {
    /// Whose VM.
    pub customer: &'a CustomerId,
    /// Which VM.
    pub vm: &'a VmId,
    /// Id of the released key.
    pub key_id: KeyId,
    /// What it carries.
    pub direction: Direction,
    /// Which of several connections under one key; 0 where there is one.
    pub connection: u64,
}

impl StreamInfo<'_> {
    fn cipher(&self, key: &Secret<32>, random: &[u8; 32]) -> Result<Cipher, SecretError> {
        let info = Digest::of_fields(
            "fealty stream v1",
            &[
                self.customer.as_str().as_bytes(),
                self.vm.as_str().as_bytes(),
                &self.key_id.0.to_be_bytes(),
                self.direction.name(),
                &self.connection.to_be_bytes(),
            ],
        );
        let extracted = aead::extract(random, &[key.expose()])?;
        Cipher::new(aead::expand(&extracted, &[info.as_bytes()])?.expose())
    }
}

/// Why a stream can't be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Not a sealed stream of this version.
    #[error("this is not a sealed stream of version 1")]
    Magic,
    /// Changed, cut off, or under another key.
    #[error("the sealed stream was changed or cut off, or the key is another one's")]
    Tampered,
    /// What carries it failed.
    #[error("the sealed stream can't be read or written: {0}")]
    Io(#[from] io::Error),
    /// No locked memory, or no random bytes.
    #[error("the sealed stream can't be worked on: {0}")]
    Memory(#[from] SecretError),
}

fn nonce(chunk: u64, last: bool) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[3..11].copy_from_slice(&chunk.to_be_bytes());
    nonce[11] = u8::from(last);
    nonce
}

/// Seals what is written to it. Nothing of it is accepted by an [`Opener`] before [`Sealer::finish`].
pub struct Sealer<W: Write> {
    to: W,
    cipher: Cipher,
    chunk: u64,
    buffer: Vec<u8>,
}

impl<W: Write> Sealer<W> {
    /// Writes the head.
    ///
    /// # Errors
    /// `Io`, `Memory`.
    pub fn new(mut to: W, key: &Secret<32>, info: &StreamInfo<'_>) -> Result<Self, StreamError> {
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(SecretError::Random)?;
        let cipher = info.cipher(key, &random)?;
        to.write_all(&MAGIC)?;
        to.write_all(&random)?;
        Ok(Self { to, cipher, chunk: 0, buffer: Vec::with_capacity(CHUNK) })
    }

    /// Writes the last chunk; returns what was written to, and the last chunk's tag, which names the whole stream.
    ///
    /// # Errors
    /// `Io`.
    pub fn finish(mut self) -> Result<(W, [u8; TAG]), StreamError> {
        let tag = self.emit(true)?;
        self.to.flush()?;
        Ok((self.to, tag))
    }

    fn emit(&mut self, last: bool) -> io::Result<[u8; TAG]> {
        let sealed = self.cipher.seal(&nonce(self.chunk, last), &[], &mut self.buffer);
        let tag = sealed.map_err(|_| io::Error::other("a chunk could not be sealed"))?;
        self.chunk += 1;
        self.to.write_all(&self.buffer)?;
        self.to.write_all(&tag)?;
        self.buffer.clear();
        Ok(tag)
    }
}

impl<W: Write> Write for Sealer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full chunk waits until more comes: the last one may be full too.
        if self.buffer.len() == CHUNK && !bytes.is_empty() {
            self.emit(false)?;
        }
        let count = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Opens a sealed stream, chunk by chunk: each is checked before a byte of it is given out. The end of the stream is reported
/// only behind the last chunk; whatever was read before an error must not be used.
pub struct Opener<R: Read> {
    from: R,
    cipher: Cipher,
    chunk: u64,
    /// Sealed bytes read ahead: a chunk, its tag, and one byte that shows whether another follows.
    ahead: Vec<u8>,
    plain: Vec<u8>,
    given: usize,
    ended: bool,
}

impl<R: Read> Opener<R> {
    /// Reads the head.
    ///
    /// # Errors
    /// `Magic`, `Io`, `Memory`.
    pub fn new(mut from: R, key: &Secret<32>, info: &StreamInfo<'_>) -> Result<Self, StreamError> {
        let mut head = [0; 40];
        from.read_exact(&mut head).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => StreamError::Magic,
            _ => StreamError::Io(e),
        })?;
        let (magic, random) = head.split_at(8);
        let random: &[u8; 32] = random.try_into().map_err(|_| StreamError::Magic)?;
        if magic != MAGIC {
            return Err(StreamError::Magic);
        }
        let cipher = info.cipher(key, random)?;
        Ok(Self { from, cipher, chunk: 0, ahead: Vec::new(), plain: Vec::new(), given: 0, ended: false })
    }

    /// Opens all of it into `to`; returns the plain length and the last chunk's tag.
    ///
    /// # Errors
    /// `Tampered`, `Io`.
    pub fn copy_to(mut self, to: &mut impl Write) -> Result<(u64, [u8; TAG]), StreamError> {
        let mut length = 0;
        loop {
            let tag = self.next_chunk()?;
            to.write_all(&self.plain)?;
            length += self.plain.len() as u64;
            if self.ended {
                to.flush()?;
                return Ok((length, tag));
            }
        }
    }

    fn next_chunk(&mut self) -> Result<[u8; TAG], StreamError> {
        if self.chunk == u64::MAX {
            return Err(StreamError::Tampered);
        }
        let full = CHUNK + TAG;
        let missing = (full + 1).saturating_sub(self.ahead.len());
        (&mut self.from).take(missing as u64).read_to_end(&mut self.ahead)?;
        let last = self.ahead.len() <= full;
        let rest = if last { Vec::new() } else { self.ahead.split_off(full) };
        let (text, tag) = self.ahead.split_last_chunk::<TAG>().ok_or(StreamError::Tampered)?;
        let tag = *tag;
        self.plain.clear();
        self.plain.extend_from_slice(text);
        let opened = self.cipher.open(&nonce(self.chunk, last), &[], &mut self.plain, &tag);
        if opened.is_err() {
            // Nothing more is given out, whatever follows: the next read finds no chunk either.
            self.plain.clear();
            self.ahead.clear();
            self.given = 0;
            self.chunk = u64::MAX;
            return Err(StreamError::Tampered);
        }
        self.ahead = rest;
        self.chunk += 1;
        self.given = 0;
        self.ended = last;
        Ok(tag)
    }
}

impl<R: Read> Read for Opener<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.given == self.plain.len() && !self.ended {
            self.next_chunk().map_err(|e| match e {
                StreamError::Io(e) => e,
                other => io::Error::new(io::ErrorKind::InvalidData, other),
            })?;
        }
        let count = out.len().min(self.plain.len() - self.given);
        out[..count].copy_from_slice(&self.plain[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with<T>(work: impl FnOnce(&Secret<32>, &StreamInfo<'_>) -> T) -> T {
        let (customer, vm) = ("acme".parse().expect("label"), "payroll".parse().expect("label"));
        let info = StreamInfo {
            customer: &customer,
            vm: &vm,
            key_id: KeyId(7),
            direction: Direction::CoreDump,
            connection: 0,
        };
        work(&Secret::copy_of(&[3; 32]).expect("memory"), &info)
    }

    fn seal(plain: &[u8]) -> Vec<u8> {
        with(|key, info| {
            let mut sealer = Sealer::new(Vec::new(), key, info).expect("head");
            sealer.write_all(plain).expect("written");
            sealer.finish().expect("finished").0
        })
    }

    fn open(sealed: &[u8]) -> Result<Vec<u8>, StreamError> {
        with(|key, info| {
            let mut out = Vec::new();
            Opener::new(sealed, key, info)?.copy_to(&mut out).map(|_| out)
        })
    }

    fn plain(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i / 251) as u8 ^ i as u8).collect()
    }

    #[test]
    fn streams_of_every_length_come_back() {
        for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5] {
            let sealed = seal(&plain(length));
            assert!(open(&sealed).expect("opens") == plain(length), "{length}");
            let read = with(|key, info| {
                let mut out = Vec::new();
                Opener::new(&sealed[..], key, info).expect("head").read_to_end(&mut out).map(|_| out)
            });
            assert!(read.expect("reads") == plain(length), "{length}");
        }
    }

    #[test]
    fn a_stream_that_is_cut_off_anywhere_is_refused() {
        let sealed = seal(&plain(2 * CHUNK));
        for end in [0, 7, 39, 40, 41, 56, 40 + CHUNK, 40 + CHUNK + 16, sealed.len() - 1] {
            assert!(open(&sealed[..end]).is_err(), "{end}");
        }
        assert!(open(&[&sealed[..], &[0]].concat()).is_err(), "nor may anything follow it");
    }

    #[test]
    fn chunks_can_be_neither_swapped_nor_repeated_nor_taken_from_another_stream() {
        let sealed = seal(&plain(3 * CHUNK));
        let other = seal(&plain(3 * CHUNK));
        let chunk = |from: &[u8], n: usize| from[40 + n * (CHUNK + 16)..40 + (n + 1) * (CHUNK + 16)].to_vec();
        let (head, a, b, c) = (&sealed[..40], chunk(&sealed, 0), chunk(&sealed, 1), chunk(&sealed, 2));
        assert!(open(&[head, &a, &b, &c].concat()).is_ok());
        assert!(open(&[head, &b, &a, &c].concat()).is_err());
        assert!(open(&[head, &a, &a, &c].concat()).is_err());
        assert!(open(&[head, &a, &c].concat()).is_err());
        assert!(open(&[head, &a, &chunk(&other, 1), &c].concat()).is_err());
    }

    #[test]
    fn a_stream_opens_for_its_purpose_only() {
        let sealed = seal(b"text");
        with(|key, info| {
            let opens = |key: &Secret<32>, info: StreamInfo<'_>| {
                Opener::new(&sealed[..], key, &info).expect("head").copy_to(&mut Vec::new()).is_ok()
            };
            assert!(opens(key, *info));
            assert!(!opens(key, StreamInfo { key_id: KeyId(8), ..*info }));
            assert!(!opens(key, StreamInfo { connection: 1, ..*info }));
            let vm = "other".parse().expect("label");
            assert!(!opens(key, StreamInfo { vm: &vm, ..*info }));
            assert!(!opens(&Secret::copy_of(&[4; 32]).expect("memory"), *info));
        });
    }

    #[test]
    fn after_a_tampered_chunk_nothing_is_given_out() {
        let mut sealed = seal(&[5; 3 * CHUNK]);
        sealed[40 + CHUNK + TAG] ^= 1;
        with(|key, info| {
            let mut opener = Opener::new(&sealed[..], key, info).expect("begun");
            let mut out = vec![0; CHUNK];
            opener.read_exact(&mut out).expect("the first chunk is good");
            for _ in 0..3 {
                assert!(opener.read(&mut out).is_err());
            }
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_changed_bit_is_noticed(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut sealed = seal(&plain(CHUNK + 100));
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            prop_assert!(open(&sealed).is_err());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(open(&bytes).is_err());
        }
    }
}
