//! A message, cut into blocks of SHA-256.

/// What a tag is made of: a head and a body behind it.
#[derive(Clone, Copy)]
pub(crate) struct Message<'a> {
    /// [`Self::HEAD`] bytes at most.
    pub(crate) head: &'a [u8],
    pub(crate) body: &'a [u8],
}

impl Message<'_> {
    /// The most bytes of a head: less than a block of SHA-256.
    pub(crate) const HEAD: usize = 63;

    /// Messages of the same shape are cut alike.
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.head.len(), self.body.len())
    }
}

/// Blocks of the inner hash behind the key's. The middle ones are the body's own bytes.
///
/// ```text
/// | head, body | body | body | … | body, 0x80, zeroes | (zeroes,) length in bits |
///   first        middle            last: one or two blocks
/// ```
pub(super) struct Blocks<'a> {
    first: [u8; 64],
    pub(super) middle: &'a [[u8; 64]],
    last: [[u8; 64]; 2],
    has_first: bool,
    long: bool,
}

impl<'a> Blocks<'a> {
    pub(super) fn new(message: &Message<'a>) -> Self {
        let (head, body) = (message.head, message.body);
        let mut blocks = Self { first: [0; 64], middle: &[], last: [[0; 64]; 2], has_first: false, long: false };
        let last = blocks.last.as_flattened_mut();
        let end = if head.len() + body.len() < 64 {
            last[..head.len()].copy_from_slice(head);
            last[head.len()..][..body.len()].copy_from_slice(body);
            head.len() + body.len()
        } else {
            let (start, body) = body.split_at(64 - head.len());
            blocks.first[..head.len()].copy_from_slice(head);
            blocks.first[head.len()..].copy_from_slice(start);
            blocks.has_first = true;
            let (middle, rest) = body.as_chunks();
            blocks.middle = middle;
            last[..rest.len()].copy_from_slice(rest);
            rest.len()
        };
        last[end] = 0x80;
        blocks.long = end + 9 > 64;
        // The key's block counts.
        let bits = (64 + head.len() as u64 + body.len() as u64) * 8;
        blocks.last[usize::from(blocks.long)][56..].copy_from_slice(&bits.to_be_bytes());
        blocks
    }

    pub(super) fn first(&self) -> &[[u8; 64]] {
        &std::slice::from_ref(&self.first)[..usize::from(self.has_first)]
    }

    pub(super) fn last(&self) -> &[[u8; 64]] {
        &self.last[..1 + usize::from(self.long)]
    }
}
