//! Sixteen messages at once: word `i` of each lies in lane of vector `i`.
#![allow(unsafe_code)]

use super::message::{Blocks, Message};
use super::{BATCH, K, States, TAG, outer_block};
use crate::crypto::cpu::Avx512;
use std::arch::x86_64::*;

/// Messages from which on all lanes are worth their time, used or not: they take as long as 9 messages through the SHA-NI of
/// Intel's Sapphire Rapids, and 13 through that of AMD's Zen 5.
pub(super) fn worth(streams: bool) -> usize {
    if streams { 11 } else { 3 }
}

/// The tags of 1 to 16 messages of one shape.
pub(super) fn tags(_: Avx512, states: &States, messages: &[Message], tags: &mut [[u8; TAG]]) {
    // Lanes without a message repeat the first.
    let blocks: [Blocks; BATCH] = std::array::from_fn(|i| Blocks::new(messages.get(i).unwrap_or(&messages[0])));
    let mut made = [[0; TAG]; BATCH];
    // SAFETY: the token's detection has seen both features.
    unsafe { compute(states, &blocks, &mut made) };
    let count = messages.len();
    tags[..count].copy_from_slice(&made[..count]);
}

#[target_feature(enable = "avx512f,avx512bw")]
fn compute(states: &States, blocks: &[Blocks; BATCH], tags: &mut [[u8; TAG]; BATCH]) {
    let mut state = splat(&states.inner);
    for i in 0..blocks[0].first().len() {
        compress(&mut state, words(std::array::from_fn(|lane| &blocks[lane].first()[i])));
    }
    for i in 0..blocks[0].middle.len() {
        compress(&mut state, words(std::array::from_fn(|lane| &blocks[lane].middle[i])));
    }
    for i in 0..blocks[0].last().len() {
        compress(&mut state, words(std::array::from_fn(|lane| &blocks[lane].last()[i])));
    }
    let mut block = splat(&outer_block([0; 8]));
    block[..8].copy_from_slice(&state);
    let mut state = splat(&states.outer);
    compress(&mut state, block);
    for (word, vector) in state.into_iter().enumerate() {
        for (tag, value) in tags.iter_mut().zip(lanes(vector)) {
            tag[word * 4..][..4].copy_from_slice(&value.to_be_bytes());
        }
    }
}

/// The same words in each lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn splat<const N: usize>(words: &[u32; N]) -> [__m512i; N] {
    let mut vectors = [_mm512_setzero_si512(); N];
    for (vector, word) in vectors.iter_mut().zip(words) {
        *vector = _mm512_set1_epi32(word.cast_signed());
    }
    vectors
}

#[inline]
#[target_feature(enable = "avx512f")]
fn lanes(vector: __m512i) -> [u32; 16] {
    let mut out = [0; 16];
    // SAFETY: 64 writable bytes; the instruction needs no alignment.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), vector) };
    out
}

/// A block of each message, big-endian words, transposed.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn words(rows: [&[u8; 64]; 16]) -> [__m512i; 16] {
    let swap = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203));
    let mut m = [_mm512_setzero_si512(); 16];
    for (vector, row) in m.iter_mut().zip(rows) {
        // SAFETY: 64 readable bytes; the instruction needs no alignment.
        *vector = unsafe { _mm512_loadu_si512(row.as_ptr().cast()) };
    }
    // Four 4x4 transpositions in each four rows, in 128-bit lanes.
    let mut t = m;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(m[2 * i], m[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(m[2 * i], m[2 * i + 1]);
    }
    for i in 0..4 {
        let i = 4 * i;
        m[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        m[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        m[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        m[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Then a 4x4 transposition of the 128-bit lanes themselves.
    for i in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(m[i], m[i + 4]);
        let high = _mm512_shuffle_i32x4::<0xdd>(m[i], m[i + 4]);
        let low_after = _mm512_shuffle_i32x4::<0x88>(m[i + 8], m[i + 12]);
        let high_after = _mm512_shuffle_i32x4::<0xdd>(m[i + 8], m[i + 12]);
        t[i] = _mm512_shuffle_i32x4::<0x88>(low, low_after);
        t[i + 8] = _mm512_shuffle_i32x4::<0xdd>(low, low_after);
        t[i + 4] = _mm512_shuffle_i32x4::<0x88>(high, high_after);
        t[i + 12] = _mm512_shuffle_i32x4::<0xdd>(high, high_after);
    }
    for vector in &mut t {
        *vector = _mm512_shuffle_epi8(*vector, swap);
    }
    t
}

/// The compression function (FIPS 180-4, 6.2.2) in each lane.
#[target_feature(enable = "avx512f")]
fn compress(state: &mut [__m512i; 8], mut w: [__m512i; 16]) {
    macro_rules! sigma {
        ($x:expr, $a:literal, $b:literal, $c:literal) => {
            _mm512_ternarylogic_epi32::<0x96>(
                _mm512_ror_epi32::<$a>($x),
                _mm512_ror_epi32::<$b>($x),
                _mm512_ror_epi32::<$c>($x),
            )
        };
        ($x:expr, $a:literal, $b:literal, shift $c:literal) => {
            _mm512_ternarylogic_epi32::<0x96>(
                _mm512_ror_epi32::<$a>($x),
                _mm512_ror_epi32::<$b>($x),
                _mm512_srli_epi32::<$c>($x),
            )
        };
    }
    macro_rules! add {
        ($a:expr, $b:expr) => {
            _mm512_add_epi32($a, $b)
        };
    }
    macro_rules! round {
        ($a:ident, $b:ident, $c:ident, $d:ident, $e:ident, $f:ident, $g:ident, $h:ident, $k:expr, $i:expr) => {
            let constant = _mm512_set1_epi32($k[$i].cast_signed());
            let choice = _mm512_ternarylogic_epi32::<0xca>($e, $f, $g);
            let majority = _mm512_ternarylogic_epi32::<0xe8>($a, $b, $c);
            $h = add!(add!($h, add!(w[$i], constant)), add!(choice, sigma!($e, 6, 11, 25)));
            $d = add!($d, $h);
            $h = add!($h, add!(majority, sigma!($a, 2, 13, 22)));
        };
    }
    macro_rules! schedule {
        ($($i:literal)+) => { $(
            let before = add!(w[$i], w[($i + 9) % 16]);
            let around = add!(sigma!(w[($i + 1) % 16], 7, 18, shift 3), sigma!(w[($i + 14) % 16], 17, 19, shift 10));
            w[$i] = add!(before, around);
        )+ };
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (i, k) in K.as_chunks::<16>().0.iter().enumerate() {
        if i > 0 {
            schedule!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        }
        round!(a, b, c, d, e, f, g, h, k, 0);
        round!(h, a, b, c, d, e, f, g, k, 1);
        round!(g, h, a, b, c, d, e, f, k, 2);
        round!(f, g, h, a, b, c, d, e, k, 3);
        round!(e, f, g, h, a, b, c, d, k, 4);
        round!(d, e, f, g, h, a, b, c, k, 5);
        round!(c, d, e, f, g, h, a, b, k, 6);
        round!(b, c, d, e, f, g, h, a, k, 7);
        round!(a, b, c, d, e, f, g, h, k, 8);
        round!(h, a, b, c, d, e, f, g, k, 9);
        round!(g, h, a, b, c, d, e, f, k, 10);
        round!(f, g, h, a, b, c, d, e, k, 11);
        round!(e, f, g, h, a, b, c, d, k, 12);
        round!(d, e, f, g, h, a, b, c, k, 13);
        round!(c, d, e, f, g, h, a, b, k, 14);
        round!(b, c, d, e, f, g, h, a, k, 15);
    }
    for (state, value) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *state = add!(*state, value);
    }
}
