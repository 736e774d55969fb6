//! AES-256-XTS (IEEE 1619) over whole multiples of 256 bytes, so that no ciphertext is ever stolen.
//!
//! | path | blocks of AES in flight |
//! | --- | --- |
//! | VAES over 512 bits | 16 |
//! | VAES over 256 bits | 16 |
//! | AES-NI | 8 |
//! | `aes` crate | what it chooses |

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Width;

use crate::format::Block;

/// Data units whose tweaks are encrypted together.
pub(crate) const TWEAKS: usize = 16;

/// How AES is computed.
#[derive(Clone, Copy)]
pub(crate) enum AesEngine {
    /// With the processor's AES instructions.
    #[cfg(target_arch = "x86_64")]
    X86(Width),
    /// With the `aes` crate.
    Portable,
}

impl AesEngine {
    /// All that run here, the fastest first.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use super::cpu::{AesNi, Vaes256, Vaes512};
            let ni = AesNi::detect();
            all.extend(Vaes512::detect().zip(ni).map(|(wide, ni)| Self::X86(Width::Vaes512(wide, ni))));
            all.extend(Vaes256::detect().zip(ni).map(|(wide, ni)| Self::X86(Width::Vaes256(wide, ni))));
            all.extend(ni.map(|ni| Self::X86(Width::AesNi(ni))));
        }
        all.push(Self::Portable);
        all
    }

    /// What a person calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::X86(Width::Vaes512(..)) => "VAES-512",
            #[cfg(target_arch = "x86_64")]
            Self::X86(Width::Vaes256(..)) => "VAES-256",
            #[cfg(target_arch = "x86_64")]
            Self::X86(Width::AesNi(_)) => "AES-NI",
            Self::Portable => "aes crate",
        }
    }
}

/// The pair of keys, expanded. Lives in secret memory only.
#[allow(clippy::large_enum_variant, reason = "no box: a heap is no place for keys")]
pub(crate) enum Xts {
    #[cfg(target_arch = "x86_64")]
    X86(x86::Schedule),
    Portable(portable::Schedule),
}

impl Xts {
    /// Expands the data key and the tweak key. To be called where the stack is wiped after.
    pub(crate) fn new(engine: AesEngine, data: &[u8; 32], tweak: &[u8; 32]) -> Self {
        match engine {
            #[cfg(target_arch = "x86_64")]
            AesEngine::X86(width) => Self::X86(x86::Schedule::new(width, data, tweak)),
            AesEngine::Portable => Self::Portable(portable::Schedule::new(data, tweak)),
        }
    }

    /// The first tweak of each data unit: its number, encrypted (IEEE 1619, 5.3.1).
    pub(crate) fn tweaks(&self, numbers: &[u128; TWEAKS]) -> [u128; TWEAKS] {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::X86(schedule) => schedule.tweaks(numbers),
            Self::Portable(schedule) => schedule.tweaks(numbers),
        }
    }

    /// Encrypts a block whose first tweak is `tweak`: `from` into `block`, or `block` in place.
    pub(crate) fn encrypt(&self, tweak: u128, from: Option<&Block>, block: &mut Block) {
        self.encrypt_parts(tweak, from.map(|from| from.as_chunks().0), block.as_chunks_mut().0);
    }

    /// Decrypts a block whose first tweak is `tweak` in place.
    pub(crate) fn decrypt(&self, tweak: u128, block: &mut Block) {
        self.decrypt_parts(tweak, block.as_chunks_mut().0);
    }

    fn encrypt_parts(&self, tweak: u128, from: Option<&[[u8; 256]]>, data: &mut [[u8; 256]]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::X86(schedule) => schedule.encrypt(tweak, from, data),
            Self::Portable(schedule) => schedule.encrypt(tweak, from, data),
        }
    }

    fn decrypt_parts(&self, tweak: u128, data: &mut [[u8; 256]]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::X86(schedule) => schedule.decrypt(tweak, data),
            Self::Portable(schedule) => schedule.decrypt(tweak, data),
        }
    }
}

/// A tweak times x (IEEE 1619, 5.2), without a branch.
fn double(tweak: u128) -> u128 {
    (tweak << 1) ^ (0_u128.wrapping_sub(tweak >> 127) & 0x87)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aes::Aes256;
    use aes::cipher::KeyInit as _;
    use proptest::prelude::*;
    use xts_mode::Xts128;

    fn oracle(data: &[u8; 32], tweak: &[u8; 32]) -> Xts128<Aes256> {
        Xts128::new(Aes256::new(data.into()), Aes256::new(tweak.into()))
    }

    fn first_tweak(xts: &Xts, number: u128) -> u128 {
        let mut numbers = [7; TWEAKS];
        numbers[13] = number;
        xts.tweaks(&numbers)[13]
    }

    /// IEEE 1619, annex B, XTS-AES-256 vectors 10 to 14: keys and plain text are the same but for the number; first and last 16
    /// bytes of the ciphertext.
    const VECTORS: [(u128, &str, &str); 5] = [
        (0xff, "1c3b3a102f770386e4836c99e370cf9b", "c4f36ffda9fcea70b9c6e693e148c151"),
        (0xffff, "77a31251618a15e6b92d1d66dffe7b50", "a4f9e27b42af8100cb9d59cef9645803"),
        (0xff_ffff, "e387aaa58ba483afa7e8eb469778317e", "2263a1eef52dd6888c309f5a7d712826"),
        (0xffff_ffff, "bf53d2dade78e822a4d949a9bc6766b0", "4c82f335abb152c4a93411373aaa8220"),
        (0xff_ffff_ffff, "64497e5a831e4a932c09be3e5393376d", "d609d273ad5b0d59631c531f6a0a57b9"),
    ];

    #[test]
    fn ieee_1619_vectors_on_every_path() {
        let key = |text: &str| -> [u8; 32] { hex::decode(text).expect("hex").try_into().expect("32 bytes") };
        let data = key("2718281828459045235360287471352662497757247093699959574966967627");
        let tweak = key("3141592653589793238462643383279502884197169399375105820974944592");
        for engine in AesEngine::all() {
            let xts = Xts::new(engine, &data, &tweak);
            for (number, first, last) in VECTORS {
                let plain: [u8; 512] = std::array::from_fn(|i| i as u8);
                let mut unit = plain;
                let tweak = first_tweak(&xts, number);
                xts.encrypt_parts(tweak, None, unit.as_chunks_mut().0);
                assert_eq!(hex::encode(&unit[..16]), first, "{} {number:x}", engine.name());
                assert_eq!(hex::encode(&unit[496..]), last, "{} {number:x}", engine.name());
                xts.decrypt_parts(tweak, unit.as_chunks_mut().0);
                assert_eq!(unit, plain, "{}", engine.name());
            }
        }
    }

    /// NIST's XTSVS, XTSGenAES256: both keys, tweak, plain text, ciphertext; whole blocks, so that what follows them in a longer data unit
    /// changes nothing.
    const XTSVS: [[&str; 5]; 3] = [
        [
            "1ea661c58d943a0e4801e42f4b0947149e7f9f8e3e68d0c7505210bd311a0e7c",
            "d6e13ffdf2418d8d1911c004cda58da3d619b7e2b9141e58318eea392cf41b08",
            "adf8d92627464ad2f0428e84a9f87564",
            "2eedea52cd8215e1acc647e810bbc3642e87287f8d2e57e36c0a24fbc12a202e",
            "cbaad0e2f6cea3f50b37f934d46a9b130b9d54f07e34f36af793e86f73c6d7db",
        ],
        [
            "e149be00177d76b7c1d85bcbb6b5054ee10b9f51cd73f59e0840628b9e7d854e",
            "2e1c0ab0537186a2a7c314bbc5eb23b6876a26bcdbf9e6b758d1cae053c2f278",
            "0ea18818fab95289b1caab4e61349501",
            "f5f101d8e3a7681b1ddb21bd2826b24e32990bca49b39291b5369a9bca277d75",
            "5bf2479393cc673306fbb15e72600598e33d4d8a470727ce098730fd80afa959",
        ],
        [
            "266c336b3b01489f3267f52835fd92f674374b88b4e1ebd2d36a5f457581d9d0",
            "42c3eef7b0b7e5137b086496b4d9e6ac658d7196a23f23f036172fdb8faee527",
            "06b209a7a22f486ecbfadb0f3137ba42",
            "ca7d65ef8d3dfad345b61ccddca1ad81de830b9e86c7b426d76cb7db766852d981c6b21409399d78f42cc0b33a7bbb06",
            "c73256870cc2f4dd57acc74b5456dbd776912a128bc1f77d72cdebbf270044b7a43ceed29025e1e8be211fa3c3ed002d",
        ],
    ];

    #[test]
    fn xtsvs_vectors_on_every_path() {
        for vector in XTSVS {
            let [data, tweak, number, plain, sealed] = vector.map(|text| hex::decode(text).expect("hex"));
            let key = |bytes: &[u8]| -> [u8; 32] { bytes.try_into().expect("32 bytes") };
            let number = u128::from_le_bytes(number.try_into().expect("16 bytes"));
            for engine in AesEngine::all() {
                let xts = Xts::new(engine, &key(&data), &key(&tweak));
                let mut unit = [0x5a; 512];
                unit[..plain.len()].copy_from_slice(&plain);
                xts.encrypt_parts(first_tweak(&xts, number), None, unit.as_chunks_mut().0);
                assert_eq!(hex::encode(&unit[..sealed.len()]), hex::encode(&sealed), "{}", engine.name());
                xts.decrypt_parts(first_tweak(&xts, number), unit.as_chunks_mut().0);
                assert!(unit[..plain.len()] == plain && unit[plain.len()..].iter().all(|b| *b == 0x5a));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_path_is_xts(
            keys in any::<[[u8; 32]; 2]>(), number: u128, parts in 0_usize..20, shift in 0_usize..64, seed: u64, apart: bool
        ) {
            let plain: Vec<u8> =
                (0..parts * 256).map(|i| (seed.wrapping_mul(i as u64 + 1).wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
            let mut expected = plain.clone();
            if parts > 0 {
                oracle(&keys[0], &keys[1]).encrypt_sector(&mut expected, number.to_le_bytes().into());
            }
            for engine in AesEngine::all() {
                let xts = Xts::new(engine, &keys[0], &keys[1]);
                let tweak = first_tweak(&xts, number);
                // Bytes beside the data must stay; the data begins at any alignment.
                let mut space = vec![0xee; shift + plain.len() + 64];
                let mut source = vec![0xdd; plain.len() + 64];
                let other = 63 - shift;
                source[other..other + plain.len()].copy_from_slice(&plain);
                if !apart {
                    space[shift..shift + plain.len()].copy_from_slice(&plain);
                }
                let from = apart.then_some(source[other..other + plain.len()].as_chunks().0);
                xts.encrypt_parts(tweak, from, space[shift..shift + plain.len()].as_chunks_mut().0);
                prop_assert_eq!(&space[shift..shift + plain.len()], &expected[..], "{}", engine.name());
                xts.decrypt_parts(tweak, space[shift..shift + plain.len()].as_chunks_mut().0);
                prop_assert_eq!(&space[shift..shift + plain.len()], &plain[..], "{}", engine.name());
                prop_assert!(space[..shift].iter().chain(&space[shift + plain.len()..]).all(|b| *b == 0xee));
            }
        }

        #[test]
        fn every_path_encrypts_tweaks_alike(keys in any::<[[u8; 32]; 2]>(), numbers: [u128; TWEAKS]) {
            let expected = Xts::new(AesEngine::Portable, &keys[0], &keys[1]).tweaks(&numbers);
            for engine in AesEngine::all() {
                prop_assert_eq!(Xts::new(engine, &keys[0], &keys[1]).tweaks(&numbers), expected, "{}", engine.name());
            }
        }
    }
}
