//! HMAC-SHA256 (FIPS 198-1) of many messages at once, under one key.
//!
//! | path | messages at once |
//! | --- | --- |
//! | AVX-512, one message in each 32-bit lane | 16 |
//! | SHA-NI, interleaved | 4, 2, 1 |
//! | `sha2` crate | 1 |
//!
//! A message is a short head, which is the caller's, and a body: together they are cut into blocks of SHA-256 without a copy
//! of the body. Messages of one batch that have the same lengths go side by side, others one by one.

#[cfg(target_arch = "x86_64")]
mod lanes;
mod message;
#[cfg(target_arch = "x86_64")]
mod streams;

pub(crate) use message::Message;

#[cfg(target_arch = "x86_64")]
use super::cpu::{Avx512, ShaNi};
use message::Blocks;
use sha2::block_api::compress256;

/// Messages that are worked on together at most.
pub(crate) const BATCH: usize = 16;
/// A tag's bytes.
pub(crate) const TAG: usize = 32;

/// FIPS 180-4, 5.3.3.
const INITIAL: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// FIPS 180-4, 4.2.2.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const K: [u32; 64] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
];

/// How SHA-256 is computed.
#[derive(Clone, Copy)]
pub(crate) enum ShaEngine {
    /// What is the fastest for a number of messages, of what the processor has.
    #[cfg(target_arch = "x86_64")]
    X86(Option<Avx512>, Option<ShaNi>),
    /// With the `sha2` crate.
    Portable,
}

impl ShaEngine {
    /// All that run here, the fastest first.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let (lanes, streams) = (Avx512::detect(), ShaNi::detect());
            all.push(Self::X86(lanes, streams));
            all.push(Self::X86(lanes, None));
            all.push(Self::X86(None, streams));
        }
        all.push(Self::Portable);
        all
    }

    /// What a person calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::X86(Some(_), Some(_)) => "16 lanes AVX-512 and SHA-NI",
            #[cfg(target_arch = "x86_64")]
            Self::X86(Some(_), None) => "16 lanes AVX-512",
            #[cfg(target_arch = "x86_64")]
            Self::X86(None, Some(_)) => "SHA-NI",
            _ => "sha2 crate",
        }
    }
}

/// A key: the states of both hashes after their first block. Lives in secret memory only.
pub(crate) struct MacKey {
    states: States,
    engine: ShaEngine,
}

/// Hash states that stand for a key.
#[derive(Clone, Copy)]
struct States {
    inner: [u32; 8],
    outer: [u32; 8],
}

impl MacKey {
    /// The key `key`, 32 bytes as all of ours are. To be called where the stack is wiped after.
    pub(crate) fn new(engine: ShaEngine, key: &[u8; 32]) -> Self {
        let state = |pad: u8| {
            let mut block = [pad; 64];
            for (byte, key) in block.iter_mut().zip(key) {
                *byte ^= key;
            }
            let mut state = INITIAL;
            compress256(&mut state, &[block]);
            state
        };
        Self { states: States { inner: state(0x36), outer: state(0x5c) }, engine }
    }

    /// The tags of `messages`, as many as `tags` has.
    pub(crate) fn tags(&self, messages: &[Message], tags: &mut [[u8; TAG]]) {
        debug_assert_eq!(messages.len(), tags.len());
        for (mut messages, mut tags) in messages.chunks(BATCH).zip(tags.chunks_mut(BATCH)) {
            let alike = messages.windows(2).all(|pair| pair[0].shape() == pair[1].shape());
            while !messages.is_empty() {
                let done = self.some(if alike { messages } else { &messages[..1] }, tags);
                messages = &messages[done..];
                tags = &mut tags[done..];
            }
        }
    }

    /// The tags of the first messages, of 1 to [`BATCH`] that are alike: as many as go well together.
    fn some(&self, messages: &[Message], tags: &mut [[u8; TAG]]) -> usize {
        match self.engine {
            #[cfg(target_arch = "x86_64")]
            ShaEngine::X86(Some(token), streams) if messages.len() >= lanes::worth(streams.is_some()) => {
                lanes::tags(token, &self.states, messages, tags);
                messages.len()
            }
            #[cfg(target_arch = "x86_64")]
            ShaEngine::X86(_, Some(token)) => match messages {
                [a, b, c, d, ..] => put(tags, streams::tags(token, &self.states, [a, b, c, d])),
                [a, b, ..] => put(tags, streams::tags(token, &self.states, [a, b])),
                [a] => put(tags, streams::tags(token, &self.states, [a])),
                [] => 0,
            },
            _ => put(tags, [self.portable(&messages[0])]),
        }
    }

    fn portable(&self, message: &Message) -> [u8; TAG] {
        let blocks = Blocks::new(message);
        let mut inner = self.states.inner;
        compress256(&mut inner, blocks.first());
        compress256(&mut inner, blocks.middle);
        compress256(&mut inner, blocks.last());
        let mut block = [0; 64];
        for (bytes, word) in block.as_chunks_mut().0.iter_mut().zip(outer_block(inner)) {
            *bytes = word.to_be_bytes();
        }
        let mut outer = self.states.outer;
        compress256(&mut outer, &[block]);
        tag(outer)
    }
}

fn put<const N: usize>(tags: &mut [[u8; TAG]], made: [[u8; TAG]; N]) -> usize {
    tags[..N].copy_from_slice(&made);
    N
}

/// The only block of the outer hash after its key's: the inner hash, padded.
fn outer_block(inner: [u32; 8]) -> [u32; 16] {
    let [a, b, c, d, e, f, g, h] = inner;
    [a, b, c, d, e, f, g, h, 0x8000_0000, 0, 0, 0, 0, 0, 0, (64 + TAG as u32) * 8]
}

fn tag(state: [u32; 8]) -> [u8; TAG] {
    let mut tag = [0; TAG];
    for (bytes, word) in tag.as_chunks_mut().0.iter_mut().zip(state) {
        *bytes = word.to_be_bytes();
    }
    tag
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmac::{Hmac, KeyInit as _, Mac as _};
    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256};

    fn oracle(key: &[u8; 32], message: &Message) -> [u8; TAG] {
        let mac = Hmac::<Sha256>::new_from_slice(key).expect("any length");
        mac.chain_update(message.head).chain_update(message.body).finalize().into_bytes().into()
    }

    /// RFC 4231, 4.2 to 4.8 without 4.6 (truncated): key, data, tag.
    fn rfc_4231() -> Vec<(Vec<u8>, Vec<u8>, &'static str)> {
        let counted: Vec<u8> = (1..=25).collect();
        let larger = b"This is a test using a larger than block-size key and a larger than block-size data. The key needs to be \
            hashed before being used by the HMAC algorithm.";
        vec![
            (vec![0x0b; 20], b"Hi There".to_vec(), "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
            (
                b"Jefe".to_vec(),
                b"what do ya want for nothing?".to_vec(),
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (vec![0xaa; 20], vec![0xdd; 50], "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
            (counted, vec![0xcd; 50], "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"),
            (
                vec![0xaa; 131],
                b"Test Using Larger Than Block-Size Key - Hash Key First".to_vec(),
                "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
            ),
            (vec![0xaa; 131], larger.to_vec(), "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"),
        ]
    }

    /// NIST's CAVP, HMAC.rsp, L = 32, keys longer than a block: the first of 70 bytes, whose tags are cut to 16, and the last of all.
    fn cavp() -> Vec<(Vec<u8>, Vec<u8>, &'static str)> {
        let bytes = |text: &str| hex::decode(text).expect("hex");
        vec![
            (
                bytes(
                    "07c358ed1df3b06d47b5ec763afa07a6677ca3a722524e6103c1056d8c56f6cd0d318adbc5a4a3804afd23a62b9fadf0\
                    d358afa8b0eea0f995fb865e5dfbbc5ad2a4f26acd76",
                ),
                bytes(
                    "2aa1d94ec83ce7c3c75c6bc847759b085234fd44b407d8f80ddfe93c243556e87e4be8fb30b4743ef1169a24732fb2f5\
                    f416042b10c3371dd9d20dda29844d58370700ce69f7df5e69240df77b96027a0ecec71b904f690b875da854de05ef04\
                    7c5d898d1c0d116c580e2a0906b271dec8e5b0dcdfb2550a40092270eabf2533",
                ),
                "b3a189a17e8d9e986cd31bbe01b49fb3",
            ),
            (
                bytes(
                    "4b7ab133efe99e02fc89a28409ee187d579e774f4cba6fc223e13504e3511bef8d4f638b9aca55d4a43b8fbd64cf9d74\
                    dcc8c9e8d52034898c70264ea911a3fd70813fa73b083371289b",
                ),
                bytes(
                    "138efc832c64513d11b9873c6fd4d8a65dbf367092a826ddd587d141b401580b798c69025ad510cff05fcfbceb6cf0bb\
                    03201aaa32e423d5200925bddfadd418d8e30e18050eb4f0618eb9959d9f78c1157d4b3e02cd5961f138afd574599399\
                    17d9144c95d8e6a94c8f6d4eef3418c17b1ef0b46c2a7188305d9811dccb3d99",
                ),
                "4f1ee7cb36c58803a8721d4ac8c4cf8cae5d8832392eed2a96dc59694252801b",
            ),
        ]
    }

    #[test]
    fn rfc_4231_and_cavp_vectors_on_every_path() {
        for (key, data, expected) in rfc_4231().into_iter().chain(cavp()) {
            // A key is filled up with zeroes, or hashed where it is longer than a block: the same function of 32 bytes.
            let mut whole = [0; 32];
            match key.len() {
                ..=32 => whole[..key.len()].copy_from_slice(&key),
                _ => whole = Sha256::digest(&key).into(),
            }
            for engine in ShaEngine::all() {
                for (count, cut) in (1..=BATCH).flat_map(|count| [(count, 0), (count, data.len().min(Message::HEAD))]) {
                    let (head, body) = data.split_at(cut);
                    let mut tags = vec![[0; TAG]; count];
                    MacKey::new(engine, &whole).tags(&vec![Message { head, body }; count], &mut tags);
                    for tag in tags {
                        let tag = hex::encode(&tag[..expected.len() / 2]);
                        assert_eq!(tag, expected, "{} x{count} cut at {cut}", engine.name());
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_path_is_hmac(
            key: [u8; 32], head in 0..=Message::HEAD, bodies in prop::collection::vec(0_usize..64, 1..40),
            length in prop_oneof![Just(4096_usize), Just(0), 0_usize..700], ragged: bool, bytes in prop::collection::vec(any::<u8>(), 4096)
        ) {
            // Neighbouring bodies begin at any alignment and differ.
            let space: Vec<Vec<u8>> =
                bodies.iter().enumerate().map(|(i, shift)| [&vec![i as u8; *shift][..], &bytes, &[i as u8; 64]].concat()).collect();
            let messages: Vec<Message> = space.iter().zip(&bodies).enumerate().map(|(i, (space, shift))| {
                let longer = if ragged { i % 3 } else { 0 };
                Message { head: &bytes[i..i + head], body: &space[*shift..][..length + longer] }
            }).collect();
            for engine in ShaEngine::all() {
                let mut tags = vec![[0; TAG]; messages.len()];
                MacKey::new(engine, &key).tags(&messages, &mut tags);
                for (i, (message, tag)) in messages.iter().zip(tags).enumerate() {
                    prop_assert_eq!(tag, oracle(&key, message), "{} message {}", engine.name(), i);
                }
            }
        }
    }
}
