//! Which blocks of a piece of data hold something.

/// Bytes of a volume's block.
pub(crate) const BLOCK: usize = 4096;
/// Bytes that are moved at a time: whole blocks.
pub(crate) const PIECE: usize = 1 << 20;

/// The runs of blocks in `piece` that are not all zero, as offset and bytes. `piece` begins at a block; its last block may be
/// cut short.
pub(crate) fn filled(piece: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + run(&piece[at..], true);
        let length = run(piece.get(start..)?, false);
        at = start + length;
        (length > 0).then(|| (start, &piece[start..at]))
    })
}

/// How many bytes from the front are blocks that are zero, or are not.
fn run(piece: &[u8], zero: bool) -> usize {
    piece.chunks(BLOCK).take_while(|block| is_zero(block) == zero).map(<[u8]>::len).sum()
}

fn is_zero(block: &[u8]) -> bool {
    static ZERO: [u8; BLOCK] = [0; BLOCK];
    block == &ZERO[..block.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_is_in_zeroes() {
        assert_eq!(filled(&[]).count(), 0);
        assert_eq!(filled(&[0; 3 * BLOCK + 512]).count(), 0);
    }

    proptest! {
        #[test]
        fn runs_put_back_together_are_the_piece(
            blocks in proptest::collection::vec(any::<bool>(), 0..12),
            tail in 0_usize..BLOCK,
        ) {
            let mut piece = vec![0; blocks.len() * BLOCK + tail];
            for (i, full) in blocks.iter().enumerate() {
                piece[i * BLOCK + i * 97] = u8::from(*full);
            }
            if tail > 0 {
                let last = piece.len() - 1;
                piece[last] = 1;
            }
            let mut rebuilt = vec![0; piece.len()];
            let mut blocks_seen = 0;
            for (at, run) in filled(&piece) {
                prop_assert!(at.is_multiple_of(BLOCK) && !run.is_empty());
                rebuilt[at..at + run.len()].copy_from_slice(run);
                blocks_seen += run.len().div_ceil(BLOCK);
            }
            prop_assert_eq!(blocks_seen, blocks.iter().filter(|b| **b).count() + usize::from(tail > 0));
            prop_assert_eq!(rebuilt, piece);
        }
    }
}
