//! AES-256-XTS with AES instructions: over 512, 256 or 128 bits at once.
//!
//! A vector holds 4, 2 or 1 AES blocks; enough vectors are in flight to hide the latency of an AES round. Tweaks go from one
//! group of blocks to the next by a multiplication with x^16 or x^8 in GF(2^128) (IEEE 1619, 5.2): a shift, and a
//! carry-less product of what was shifted out with 0x87. No table, no branch depends on data.
#![allow(unsafe_code)]

use super::{TWEAKS, double};
use crate::crypto::cpu::{AesNi, Vaes256, Vaes512};
use std::arch::x86_64::*;

/// Round keys of AES-256 (FIPS 197, 5.2).
type Rounds = [[u8; 16]; 15];

/// Which of the three.
#[derive(Clone, Copy)]
pub(crate) enum Width {
    /// VAES over 512 bits.
    Vaes512(Vaes512, AesNi),
    /// VAES over 256 bits.
    Vaes256(Vaes256, AesNi),
    /// AES-NI.
    AesNi(AesNi),
}

/// Both keys of XTS, expanded. Lives in secret memory only.
pub(crate) struct Schedule {
    encrypt: Rounds,
    decrypt: Rounds,
    tweak: Rounds,
    width: Width,
}

impl Schedule {
    /// Expands the data key and the tweak key.
    pub(crate) fn new(width: Width, data: &[u8; 32], tweak: &[u8; 32]) -> Self {
        // SAFETY: every width carries the token of AES-NI, whose detection has seen `aes` and `sse4.1` (hence `sse2`).
        let (encrypt, tweak) = unsafe { (expand(data), expand(tweak)) };
        // SAFETY: as above.
        let decrypt = unsafe { invert(&encrypt) };
        Self { encrypt, decrypt, tweak, width }
    }

    /// The first tweak of each unit: its number, encrypted.
    pub(crate) fn tweaks(&self, numbers: &[u128; TWEAKS]) -> [u128; TWEAKS] {
        // SAFETY: each variant carries the token of the detection that has seen the features of the function it calls.
        unsafe {
            match self.width {
                Width::Vaes512(..) => vaes512::tweaks(&self.tweak, numbers),
                Width::Vaes256(..) => vaes256::tweaks(&self.tweak, numbers),
                Width::AesNi(_) => aesni::tweaks(&self.tweak, numbers),
            }
        }
    }

    /// Encrypts `from`, which is as long as `data`, into `data`; without `from` in place.
    pub(crate) fn encrypt(&self, tweak: u128, from: Option<&[[u8; 256]]>, data: &mut [[u8; 256]]) {
        // SAFETY: each variant carries the token of the detection that has seen the features of the function it calls.
        unsafe {
            match self.width {
                Width::Vaes512(..) => vaes512::encrypt(&self.encrypt, tweak, from, data),
                Width::Vaes256(..) => vaes256::encrypt(&self.encrypt, tweak, from, data),
                Width::AesNi(_) => aesni::encrypt(&self.encrypt, tweak, from, data),
            }
        }
    }

    /// Decrypts in place.
    pub(crate) fn decrypt(&self, tweak: u128, data: &mut [[u8; 256]]) {
        // SAFETY: each variant carries the token of the detection that has seen the features of the function it calls.
        unsafe {
            match self.width {
                Width::Vaes512(..) => vaes512::decrypt(&self.decrypt, tweak, None, data),
                Width::Vaes256(..) => vaes256::decrypt(&self.decrypt, tweak, None, data),
                Width::AesNi(_) => aesni::decrypt(&self.decrypt, tweak, None, data),
            }
        }
    }
}

/// The key expansion of AES-256.
#[target_feature(enable = "aes,sse2")]
fn expand(key: &[u8; 32]) -> Rounds {
    let [first, second] = key.as_chunks::<16>().0 else { unreachable!("32 bytes are two halves") };
    let (mut even, mut odd) = (load(first), load(second));
    let mut rounds = [[0; 16]; 15];
    (rounds[0], rounds[1]) = (*first, *second);
    macro_rules! step {
        ($i:literal, $rcon:literal) => {
            even = mixed(even, _mm_shuffle_epi32::<0xff>(_mm_aeskeygenassist_si128::<$rcon>(odd)));
            rounds[$i] = bytes(even);
            if $i < 14 {
                odd = mixed(odd, _mm_shuffle_epi32::<0xaa>(_mm_aeskeygenassist_si128::<0>(even)));
                rounds[$i + 1 - $i / 14] = bytes(odd);
            }
        };
    }
    step!(2, 0x01);
    step!(4, 0x02);
    step!(6, 0x04);
    step!(8, 0x08);
    step!(10, 0x10);
    step!(12, 0x20);
    step!(14, 0x40);
    rounds
}

/// Each word of the key xored with those before it, and with `with`.
#[target_feature(enable = "sse2")]
fn mixed(key: __m128i, with: __m128i) -> __m128i {
    let key = _mm_xor_si128(key, _mm_slli_si128::<4>(key));
    let key = _mm_xor_si128(key, _mm_slli_si128::<8>(key));
    _mm_xor_si128(key, with)
}

/// Round keys of the equivalent inverse cipher (FIPS 197, 5.3.5).
#[target_feature(enable = "aes,sse2")]
fn invert(rounds: &Rounds) -> Rounds {
    let mut inverse = *rounds;
    inverse.reverse();
    for key in &mut inverse[1..14] {
        *key = bytes(_mm_aesimc_si128(load(key)));
    }
    inverse
}

/// A vector's tweaks. Not inlined: the compiler would keep them in pieces.
#[inline(never)]
fn consecutive<const N: usize>(mut tweak: u128) -> [u8; N] {
    let mut lanes = [0; N];
    for lane in lanes.as_chunks_mut::<16>().0 {
        *lane = tweak.to_le_bytes();
        tweak = double(tweak);
    }
    lanes
}

#[target_feature(enable = "sse2")]
fn load(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: 16 readable bytes; the instruction needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "sse2")]
fn bytes(vector: __m128i) -> [u8; 16] {
    let mut out = [0; 16];
    // SAFETY: 16 writable bytes; the instruction needs no alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), vector) };
    out
}

/// One width. `$bytes` is a vector's, `$flight` how many vectors are in flight; `$lanes` are a vector's AES blocks, with what
/// they lack to 64; `$group` is an eighth of those in flight, with what it lacks to 16.
macro_rules! width {
    (
        $module:ident, $features:literal, $vector:ty, $bytes:literal, $flight:literal,
        lanes $lanes:literal $lanes_rest:literal, group $group:literal $group_rest:literal,
        $loadu:ident, $storeu:ident, $widen:expr, $set:ident, $xor:ident, $left:ident, $right:ident, $up:ident, $down:ident,
        $multiply:ident, $enc:ident, $enc_last:ident, $dec:ident, $dec_last:ident
    ) => {
        mod $module {
            use super::*;

            /// Bytes in flight.
            const UNIT: usize = $bytes * $flight;

            #[inline]
            #[target_feature(enable = $features)]
            fn load(bytes: &[u8; $bytes]) -> $vector {
                // SAFETY: as many readable bytes as a vector has; the instruction needs no alignment.
                unsafe { $loadu(bytes.as_ptr().cast()) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn store(bytes: &mut [u8; $bytes], vector: $vector) {
                // SAFETY: as many writable bytes as a vector has; the instruction needs no alignment.
                unsafe { $storeu(bytes.as_mut_ptr().cast(), vector) }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn widened(rounds: &Rounds) -> [$vector; 15] {
                let mut wide = [$set(0); 15];
                for (wide, key) in wide.iter_mut().zip(rounds) {
                    *wide = $widen(super::load(key));
                }
                wide
            }

            /// Each tweak times x to the number of a vector's blocks.
            #[inline]
            #[target_feature(enable = $features)]
            fn next_vector(tweak: $vector) -> $vector {
                let out = $right::<$lanes_rest>(tweak);
                let kept = $xor($left::<$lanes>(tweak), $up::<8>(out));
                $xor(kept, $multiply::<0x01>(out, $set(0x87)))
            }

            /// Each tweak times x to the number of blocks in flight, by whole bytes: other ports than AES needs.
            #[inline]
            #[target_feature(enable = $features)]
            fn next_group(tweak: $vector) -> $vector {
                let out = $multiply::<0x00>($down::<$group_rest>(tweak), $set(0x87));
                $xor($up::<$group>(tweak), out)
            }

            /// The tweaks of the first blocks in flight.
            #[inline]
            #[target_feature(enable = $features)]
            fn first_tweaks(tweak: u128) -> [$vector; $flight] {
                let mut tweaks = [load(&consecutive(tweak)); $flight];
                for i in 1..$flight {
                    tweaks[i] = next_vector(tweaks[i - 1]);
                }
                tweaks
            }

            width!(@direction encrypt, $features, $vector, $bytes, $flight, $xor, $enc, $enc_last);
            width!(@direction decrypt, $features, $vector, $bytes, $flight, $xor, $dec, $dec_last);

            /// The numbers, encrypted each for itself.
            #[target_feature(enable = $features)]
            pub(super) fn tweaks(rounds: &Rounds, numbers: &[u128; TWEAKS]) -> [u128; TWEAKS] {
                let keys = widened(rounds);
                let mut bytes = [0; TWEAKS * 16];
                for (bytes, number) in bytes.as_chunks_mut::<16>().0.iter_mut().zip(numbers) {
                    *bytes = number.to_le_bytes();
                }
                for unit in bytes.as_chunks_mut::<UNIT>().0 {
                    let places = unit.as_chunks_mut::<$bytes>().0;
                    let mut states = [keys[0]; $flight];
                    for (state, place) in states.iter_mut().zip(places.iter()) {
                        *state = $xor(*state, load(place));
                    }
                    for key in &keys[1..14] {
                        for state in &mut states {
                            *state = $enc(*state, *key);
                        }
                    }
                    for (state, place) in states.iter().zip(places) {
                        store(place, $enc_last(*state, keys[14]));
                    }
                }
                let mut out = [0; TWEAKS];
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<16>().0) {
                    *out = u128::from_le_bytes(*bytes);
                }
                out
            }
        }
    };
    (
        @direction $name:ident, $features:literal, $vector:ty, $bytes:literal, $flight:literal, $xor:ident, $round:ident,
        $last:ident
    ) => {
        /// From `from`, or in place.
        #[target_feature(enable = $features)]
        pub(super) fn $name(rounds: &Rounds, tweak: u128, from: Option<&[[u8; 256]]>, data: &mut [[u8; 256]]) {
            let keys = widened(rounds);
            let mut tweaks = first_tweaks(tweak);
            let from = from.map(|from| from.as_flattened().as_chunks::<UNIT>().0);
            for (i, unit) in data.as_flattened_mut().as_chunks_mut::<UNIT>().0.iter_mut().enumerate() {
                let mut states: [$vector; $flight] = tweaks;
                let sources = from.map_or(&*unit, |from| &from[i]).as_chunks::<$bytes>().0;
                for (state, source) in states.iter_mut().zip(sources) {
                    *state = $xor($xor(*state, keys[0]), load(source));
                }
                for key in &keys[1..14] {
                    for state in &mut states {
                        *state = $round(*state, *key);
                    }
                }
                for ((state, tweak), place) in states.iter().zip(&mut tweaks).zip(unit.as_chunks_mut::<$bytes>().0) {
                    // The last round ends with an addition of its key: the tweak is added with it.
                    store(place, $last(*state, $xor(keys[14], *tweak)));
                    *tweak = next_group(*tweak);
                }
            }
        }
    };
}

width!(
    vaes512, "avx512f,avx512bw,vaes,vpclmulqdq,aes", __m512i, 64, 4, lanes 4 60, group 2 14,
    _mm512_loadu_si512, _mm512_storeu_si512, _mm512_broadcast_i32x4, _mm512_set1_epi64, _mm512_xor_si512,
    _mm512_slli_epi64, _mm512_srli_epi64, _mm512_bslli_epi128, _mm512_bsrli_epi128, _mm512_clmulepi64_epi128,
    _mm512_aesenc_epi128, _mm512_aesenclast_epi128, _mm512_aesdec_epi128, _mm512_aesdeclast_epi128
);

width!(
    vaes256, "avx2,vaes,vpclmulqdq,aes", __m256i, 32, 8, lanes 2 62, group 2 14,
    _mm256_loadu_si256, _mm256_storeu_si256, _mm256_broadcastsi128_si256, _mm256_set1_epi64x, _mm256_xor_si256,
    _mm256_slli_epi64, _mm256_srli_epi64, _mm256_bslli_epi128, _mm256_bsrli_epi128, _mm256_clmulepi64_epi128,
    _mm256_aesenc_epi128, _mm256_aesenclast_epi128, _mm256_aesdec_epi128, _mm256_aesdeclast_epi128
);

width!(
    aesni, "aes,pclmulqdq,sse4.1", __m128i, 16, 8, lanes 1 63, group 1 15,
    _mm_loadu_si128, _mm_storeu_si128, std::convert::identity, _mm_set1_epi64x, _mm_xor_si128,
    _mm_slli_epi64, _mm_srli_epi64, _mm_bslli_si128, _mm_bsrli_si128, _mm_clmulepi64_si128,
    _mm_aesenc_si128, _mm_aesenclast_si128, _mm_aesdec_si128, _mm_aesdeclast_si128
);
