//! Reading and writing the TPM's big-endian structures. Every read is bounded by what is there; nothing is allocated
//! before its length was seen to fit.

/// Bytes that are not the structure they should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TpmError {
    /// Fewer bytes than the structure has.
    #[error("a TPM structure ends inside its {0}")]
    Truncated(&'static str),
    /// More bytes than the structure has.
    #[error("a TPM structure is followed by {0} bytes that don't belong to it")]
    Trailing(usize),
    /// A value that no host of ours uses.
    #[error("a TPM structure has the {0} 0x{1:04x}, which is not supported")]
    Unsupported(&'static str, u32),
    /// Not made by a TPM.
    #[error("an attestation does not begin with TPM_GENERATED (0xff544347)")]
    Magic,
    /// A field of the wrong size.
    #[error("a TPM structure's {0} has the wrong length")]
    Length(&'static str),
    /// A public key that is none.
    #[error("a TPM public key is not a valid {0} key")]
    Key(&'static str),
    /// A signature that does not verify.
    #[error("the signature over {0} is wrong")]
    Signature(&'static str),
    /// The kernel or the library gave nothing.
    #[error("a credential could not be made: {0} failed")]
    Crypto(&'static str),
}

/// A cursor over a structure.
#[derive(Debug, Clone)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// A reader of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], TpmError> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(TpmError::Truncated(what))?;
        self.0 = rest;
        Ok(head)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], TpmError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(TpmError::Truncated(what))?;
        self.0 = rest;
        Ok(*head)
    }

    /// One byte.
    pub fn u8(&mut self, what: &'static str) -> Result<u8, TpmError> {
        self.array::<1>(what).map(|b| b[0])
    }

    /// A big-endian number.
    pub fn u16(&mut self, what: &'static str) -> Result<u16, TpmError> {
        self.array(what).map(u16::from_be_bytes)
    }

    /// A big-endian number.
    pub fn u32(&mut self, what: &'static str) -> Result<u32, TpmError> {
        self.array(what).map(u32::from_be_bytes)
    }

    /// A big-endian number.
    pub fn u64(&mut self, what: &'static str) -> Result<u64, TpmError> {
        self.array(what).map(u64::from_be_bytes)
    }

    /// A TPM2B: a 16-bit size and that many bytes.
    pub fn sized(&mut self, what: &'static str) -> Result<&'a [u8], TpmError> {
        let size = self.u16(what)?;
        self.take(usize::from(size), what)
    }

    /// Nothing may be left.
    pub fn end(self) -> Result<(), TpmError> {
        if self.0.is_empty() { Ok(()) } else { Err(TpmError::Trailing(self.0.len())) }
    }
}

/// A structure being written.
#[derive(Debug, Default, Clone)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes as they are.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// One byte.
    pub fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    /// A big-endian number.
    pub fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_be_bytes())
    }

    /// A big-endian number.
    pub fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_be_bytes())
    }

    /// A big-endian number.
    pub fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_be_bytes())
    }

    /// A TPM2B. What is longer than its size field can say is cut there; no structure of ours comes near it.
    pub fn sized(self, bytes: &[u8]) -> Self {
        let size = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        self.u16(size).bytes(&bytes[..usize::from(size)])
    }

    /// What was written.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_the_end() {
        let mut reader = Reader::new(&[0, 2, 7]);
        assert_eq!(reader.clone().sized("x"), Err(TpmError::Truncated("x")));
        assert_eq!(reader.u16("x"), Ok(2));
        assert_eq!(reader.clone().end(), Err(TpmError::Trailing(1)));
        assert_eq!(reader.u8("x"), Ok(7));
        assert_eq!(reader.end(), Ok(()));
    }

    #[test]
    fn what_is_written_reads_back() {
        let bytes = Writer::new().u8(1).u16(2).u32(3).u64(4).sized(b"five").finish();
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.u8("").and(reader.u16("")).and(reader.u32("")).and(reader.u64("")), Ok(4));
        assert_eq!(reader.sized(""), Ok(&b"five"[..]));
    }
}
