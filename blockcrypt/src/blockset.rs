//! A set of blocks of the store, as bits that lie beside those of the bitmap pages: searched a word at a time with them.

use crate::format::page::BITS;

/// Words of 64 blocks that belong to a bitmap page.
pub(crate) const WORDS: usize = BITS / 64;
const _: () = assert!(BITS.is_multiple_of(64));

/// Takes memory only for bitmap pages some of whose blocks are in it.
#[derive(Clone)]
pub(crate) struct BlockSet {
    pages: Vec<Option<Box<Bits>>>,
    len: usize,
}

#[derive(Clone)]
struct Bits {
    words: [u64; WORDS],
    len: usize,
}

impl BlockSet {
    /// An empty set of blocks of `pages` bitmap pages.
    pub(crate) fn new(pages: usize) -> Self {
        Self { pages: std::iter::repeat_with(|| None).take(pages).collect(), len: 0 }
    }

    /// Blocks of `pages` bitmap pages, not fewer than so far, may be in it from now on.
    pub(crate) fn lengthen(&mut self, pages: usize) {
        self.pages.resize_with(pages.max(self.pages.len()), || None);
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn contains(&self, block: u64) -> bool {
        let (page, word, bit) = place(block);
        self.word(page, word) & bit != 0
    }

    pub(crate) fn insert(&mut self, block: u64) {
        let (page, word, bit) = place(block);
        // What is not remembered would be handed out twice: a set that is too short grows.
        self.lengthen(page as usize + 1);
        let slot = &mut self.pages[page as usize];
        let bits = slot.get_or_insert_with(|| Box::new(Bits { words: [0; WORDS], len: 0 }));
        if bits.words[word] & bit == 0 {
            bits.words[word] |= bit;
            bits.len += 1;
            self.len += 1;
        }
    }

    /// Whether it was there.
    pub(crate) fn remove(&mut self, block: u64) -> bool {
        let (page, word, bit) = place(block);
        let Some(slot) = self.pages.get_mut(page as usize) else { return false };
        let Some(bits) = slot.as_mut().filter(|bits| bits.words[word] & bit != 0) else { return false };
        bits.words[word] &= !bit;
        bits.len -= 1;
        self.len -= 1;
        if bits.len == 0 {
            *slot = None;
        }
        true
    }

    /// Word `word` of those that belong to bitmap page `page`: the lowest bit is the first block's.
    pub(crate) fn word(&self, page: u64, word: usize) -> u64 {
        self.pages.get(page as usize).and_then(Option::as_ref).map_or(0, |bits| bits.words[word])
    }
}

/// Bitmap page, word, and the bit in it.
fn place(block: u64) -> (u64, usize, u64) {
    let bit = (block % BITS as u64) as usize;
    (block / BITS as u64, bit / 64, 1 << (bit % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    proptest! {
        #[test]
        fn it_is_a_set_and_grows(steps in prop::collection::vec((0_u8..8, 0..3 * BITS as u64 + 5), 1..200)) {
            let (mut set, mut model) = (BlockSet::new(2), HashSet::new());
            for (step, block) in steps {
                let block = if step % 2 == 0 { block } else { block % 70 };
                match step {
                    0..4 => {
                        set.insert(block);
                        model.insert(block);
                    }
                    _ => prop_assert_eq!(set.remove(block), model.remove(&block)),
                }
                prop_assert_eq!((set.len(), set.contains(block)), (model.len(), model.contains(&block)));
            }
            for page in 0..4 {
                for word in 0..WORDS {
                    let first = page * BITS as u64 + word as u64 * 64;
                    let expected = (0..64).filter(|i| model.contains(&(first + i))).fold(0, |bits, i| bits | 1_u64 << i);
                    prop_assert_eq!(set.word(page, word), expected);
                }
            }
            prop_assert!(set.len() > 0 || set.pages.iter().all(Option::is_none));
        }
    }
}
