//! Messages through the SHA instructions, several interleaved: one alone waits for its own rounds.
#![allow(unsafe_code)]

use super::message::{Blocks, Message};
use super::{K, States, TAG, outer_block, tag};
use crate::crypto::cpu::ShaNi;
use std::arch::x86_64::*;

/// The tags of `N` messages of one shape.
pub(super) fn tags<const N: usize>(_: ShaNi, states: &States, messages: [&Message; N]) -> [[u8; TAG]; N] {
    let blocks = messages.map(Blocks::new);
    // SAFETY: the token's detection has seen the features.
    unsafe { compute(states, &blocks) }
}

#[target_feature(enable = "sha,ssse3,sse4.1")]
fn compute<const N: usize>(states: &States, blocks: &[Blocks; N]) -> [[u8; TAG]; N] {
    let mut streams = [packed(&states.inner); N];
    for i in 0..blocks[0].first().len() {
        compress(&mut streams, std::array::from_fn(|s| words(&blocks[s].first()[i])));
    }
    for i in 0..blocks[0].middle.len() {
        compress(&mut streams, std::array::from_fn(|s| words(&blocks[s].middle[i])));
    }
    for i in 0..blocks[0].last().len() {
        compress(&mut streams, std::array::from_fn(|s| words(&blocks[s].last()[i])));
    }
    let inner = streams;
    let mut streams = [packed(&states.outer); N];
    compress(
        &mut streams,
        std::array::from_fn(|s| {
            let block = outer_block(unpacked(inner[s]));
            let [a, b, c, d] = block.as_chunks().0 else { unreachable!("16 words are four vectors") };
            [a, b, c, d].map(|words| load(words))
        }),
    );
    std::array::from_fn(|s| tag(unpacked(streams[s])))
}

/// A state as the instructions want it: words a, b, e, f (the highest first) and c, d, g, h.
type Packed = [__m128i; 2];

#[inline]
#[target_feature(enable = "sse4.1")]
fn packed(state: &[u32; 8]) -> Packed {
    let [a, b, c, d, e, f, g, h] = *state;
    [load(&[f, e, b, a]), load(&[h, g, d, c])]
}

#[inline]
#[target_feature(enable = "sse4.1")]
fn unpacked(packed: Packed) -> [u32; 8] {
    let ([f, e, b, a], [h, g, d, c]) = (store(packed[0]), store(packed[1]));
    [a, b, c, d, e, f, g, h]
}

#[inline]
#[target_feature(enable = "sse4.1")]
fn load(words: &[u32; 4]) -> __m128i {
    // SAFETY: 16 readable bytes; the instruction needs no alignment.
    unsafe { _mm_loadu_si128(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "sse4.1")]
fn store(vector: __m128i) -> [u32; 4] {
    let mut out = [0; 4];
    // SAFETY: 16 writable bytes; the instruction needs no alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), vector) };
    out
}

/// A block's words, big-endian.
#[inline]
#[target_feature(enable = "ssse3,sse4.1")]
fn words(block: &[u8; 64]) -> [__m128i; 4] {
    let swap = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
    let mut words = [_mm_setzero_si128(); 4];
    for (vector, bytes) in words.iter_mut().zip(block.as_chunks::<16>().0) {
        // SAFETY: 16 readable bytes; the instruction needs no alignment.
        *vector = _mm_shuffle_epi8(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }, swap);
    }
    words
}

/// The compression function (FIPS 180-4, 6.2.2) of each stream, four rounds of one after four of the other.
#[inline]
#[target_feature(enable = "sha,ssse3,sse4.1")]
fn compress<const N: usize>(streams: &mut [Packed; N], mut w: [[__m128i; 4]; N]) {
    let before = *streams;
    macro_rules! four_rounds {
        ($k:expr, $($i:literal)+) => { $(
            let constants = load(&$k[$i]);
            for ([abef, cdgh], w) in streams.iter_mut().zip(&w) {
                let sum = _mm_add_epi32(w[$i], constants);
                *cdgh = _mm_sha256rnds2_epu32(*cdgh, *abef, sum);
                *abef = _mm_sha256rnds2_epu32(*abef, *cdgh, _mm_shuffle_epi32::<0x0e>(sum));
            }
        )+ };
    }
    macro_rules! schedule {
        ($($i:literal)+) => { $(
            for w in &mut w {
                let newest = w[($i + 3) % 4];
                let sum = _mm_add_epi32(
                    _mm_sha256msg1_epu32(w[$i], w[($i + 1) % 4]), _mm_alignr_epi8::<4>(newest, w[($i + 2) % 4]),
                );
                w[$i] = _mm_sha256msg2_epu32(sum, newest);
            }
        )+ };
    }
    for (i, k) in K.as_chunks::<4>().0.as_chunks::<4>().0.iter().enumerate() {
        four_rounds!(k, 0 1 2 3);
        if i < 3 {
            schedule!(0 1 2 3);
        }
    }
    for (stream, before) in streams.iter_mut().zip(before) {
        *stream = [_mm_add_epi32(stream[0], before[0]), _mm_add_epi32(stream[1], before[1])];
    }
}
