//! TPMT_PUBLIC (part 2, 12.2.4): the public area of a key.

use super::spki;
use super::wire::{Reader, TpmError, Writer};
use aws_lc_rs::digest;
use policy::{Digest, HostId};

const ALG_RSA: u16 = 0x0001;
const ALG_ECC: u16 = 0x0023;
const ALG_NULL: u16 = 0x0010;
const ALG_AES: u16 = 0x0006;
const ALG_CFB: u16 = 0x0043;
const ALG_RSASSA: u16 = 0x0014;
const ALG_RSAES: u16 = 0x0015;
const ALG_RSAPSS: u16 = 0x0016;
const ALG_OAEP: u16 = 0x0017;
const ALG_ECDSA: u16 = 0x0018;
const ALG_ECDH: u16 = 0x0019;

/// Bits of TPMA_OBJECT (part 2, 8.3).
pub mod attribute {
    /// The key never leaves its TPM.
    pub const FIXED_TPM: u32 = 1 << 1;
    /// It dies with a TPM Restart or Reset.
    pub const ST_CLEAR: u32 = 1 << 2;
    /// It never moves to another parent.
    pub const FIXED_PARENT: u32 = 1 << 4;
    /// The TPM itself made the secret part.
    pub const SENSITIVE_DATA_ORIGIN: u32 = 1 << 5;
    /// The authValue suffices for use.
    pub const USER_WITH_AUTH: u32 = 1 << 6;
    /// Administration needs the policy.
    pub const ADMIN_WITH_POLICY: u32 = 1 << 7;
    /// Wrong guesses do not count toward lockout.
    pub const NO_DA: u32 = 1 << 10;
    /// It may be duplicated only encrypted.
    pub const ENCRYPTED_DUPLICATION: u32 = 1 << 11;
    /// It handles only what the TPM made itself.
    pub const RESTRICTED: u32 = 1 << 16;
    /// It decrypts (or agrees on keys).
    pub const DECRYPT: u32 = 1 << 17;
    /// It signs.
    pub const SIGN: u32 = 1 << 18;
}

/// Hash algorithms of names: SHA-1 is not among them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HashAlg {
    /// TPM_ALG_SHA256.
    Sha256,
    /// TPM_ALG_SHA384.
    Sha384,
}

impl HashAlg {
    /// TPM_ALG_ID.
    pub fn id(self) -> u16 {
        match self {
            Self::Sha256 => 0x000b,
            Self::Sha384 => 0x000c,
        }
    }

    /// The algorithm with this TPM_ALG_ID.
    pub fn from_id(id: u16) -> Result<Self, TpmError> {
        match id {
            0x000b => Ok(Self::Sha256),
            0x000c => Ok(Self::Sha384),
            other => Err(TpmError::Unsupported("hash algorithm", other.into())),
        }
    }

    /// Digest length in bytes.
    pub fn length(self) -> usize {
        self.algorithm().output_len()
    }

    pub(super) fn algorithm(self) -> &'static digest::Algorithm {
        match self {
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
        }
    }
}

/// A name (part 1, section 16): algorithm id and digest of the public area.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Name(pub Vec<u8>);

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "name {}", hex::encode(&self.0))
    }
}

/// Permanent handles of hierarchies, as they stand in qualified names.
pub mod hierarchy {
    /// TPM_RH_ENDORSEMENT.
    pub const ENDORSEMENT: u32 = 0x4000_000b;
    /// TPM_RH_NULL.
    pub const NULL: u32 = 0x4000_0007;
}

/// The curves of part 2, 6.4 that hosts use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Curve {
    /// TPM_ECC_NIST_P256.
    P256,
    /// TPM_ECC_NIST_P384.
    P384,
}

impl Curve {
    /// Length of a coordinate in bytes.
    pub fn length(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
        }
    }

    fn id(self) -> u16 {
        match self {
            Self::P256 => 3,
            Self::P384 => 4,
        }
    }

    fn from_id(id: u16) -> Result<Self, TpmError> {
        match id {
            3 => Ok(Self::P256),
            4 => Ok(Self::P384),
            other => Err(TpmError::Unsupported("curve", other.into())),
        }
    }

    fn agreement(self) -> &'static aws_lc_rs::agreement::Algorithm {
        match self {
            Self::P256 => &aws_lc_rs::agreement::ECDH_P256,
            Self::P384 => &aws_lc_rs::agreement::ECDH_P384,
        }
    }
}

/// The key itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PublicKey {
    /// Modulus (big-endian, without leading zeros) and exponent.
    Rsa {
        /// n.
        modulus: Vec<u8>,
        /// e, 65537 where the TPM says 0.
        exponent: u32,
    },
    /// A point, its coordinates padded to the curve's length.
    Ecc {
        /// Which curve.
        curve: Curve,
        /// Affine x.
        x: Vec<u8>,
        /// Affine y.
        y: Vec<u8>,
    },
}

/// The symmetric algorithm that a storage key protects its children with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Symmetric {
    /// TPM_ALG_NULL.
    None,
    /// AES in CFB mode with keys of so many bits.
    AesCfb(u16),
}

/// A scheme that the key is bound to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scheme {
    /// TPM_ALG_NULL: chosen at each use.
    None,
    /// ECDSA with this hash.
    Ecdsa(HashAlg),
    /// ECDH with this hash.
    Ecdh(HashAlg),
    /// RSASSA-PKCS1-v1_5 with this hash.
    RsaSsa(HashAlg),
    /// RSASSA-PSS with this hash.
    RsaPss(HashAlg),
    /// RSAES-OAEP with this hash.
    Oaep(HashAlg),
    /// RSAES-PKCS1-v1_5.
    RsaEs,
}

/// A parsed public area. It is as it was read: the name covers those bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Public {
    /// Algorithm of the name.
    pub name_alg: HashAlg,
    /// TPMA_OBJECT, bits of [`attribute`].
    pub attributes: u32,
    /// The policy, empty or a digest.
    pub auth_policy: Vec<u8>,
    /// For children.
    pub symmetric: Symmetric,
    /// Bound scheme.
    pub scheme: Scheme,
    /// The key.
    pub key: PublicKey,
    raw: Vec<u8>,
}

impl Public {
    /// Reads a TPMT_PUBLIC that fills `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Self, TpmError> {
        let mut reader = Reader::new(bytes);
        let kind = reader.u16("key type")?;
        let name_alg = HashAlg::from_id(reader.u16("name algorithm")?)?;
        let attributes = reader.u32("attributes")?;
        let auth_policy = reader.sized("policy")?.to_vec();
        if ![0, name_alg.length()].contains(&auth_policy.len()) {
            return Err(TpmError::Length("policy"));
        }
        let symmetric = read_symmetric(&mut reader)?;
        let scheme = read_scheme(&mut reader)?;
        let key = match kind {
            ALG_RSA => read_rsa(&mut reader)?,
            ALG_ECC => read_ecc(&mut reader)?,
            other => return Err(TpmError::Unsupported("key type", other.into())),
        };
        reader.end()?;
        Ok(Self { name_alg, attributes, auth_policy, symmetric, scheme, key, raw: bytes.to_vec() })
    }

    /// Reads a TPM2B_PUBLIC that fills `bytes`: the form tools write to files.
    pub fn parse_sized(bytes: &[u8]) -> Result<Self, TpmError> {
        let mut reader = Reader::new(bytes);
        let inner = reader.sized("public area")?;
        reader.end()?;
        Self::parse(inner)
    }

    /// An ECC public area over a P-256 point (uncompressed, 65 bytes): what templates and tests need.
    pub fn ecc(
        attributes: u32,
        auth_policy: &[u8],
        symmetric: Symmetric,
        scheme: Scheme,
        point: &[u8; 65],
    ) -> Result<Self, TpmError> {
        let writer = Writer::new().u16(ALG_ECC).u16(HashAlg::Sha256.id()).u32(attributes).sized(auth_policy);
        let writer = write_scheme(write_symmetric(writer, symmetric), scheme);
        let writer = writer.u16(Curve::P256.id()).u16(ALG_NULL).sized(&point[1..33]).sized(&point[33..]);
        Self::parse(&writer.finish())
    }

    /// The bytes it was read from.
    pub fn as_bytes(&self) -> &[u8] {
        &self.raw
    }

    /// Its name (part 1, section 16).
    pub fn name(&self) -> Name {
        Name(hash_name(self.name_alg, &[&self.raw]))
    }

    /// Its qualified name as a primary key of the hierarchy with this handle (part 1, section 16.3): the digest of the
    /// handle and the name.
    pub fn qualified_name_in(&self, hierarchy: u32) -> Name {
        Name(hash_name(self.name_alg, &[&hierarchy.to_be_bytes(), &self.name().0]))
    }

    /// Whether all of these attribute bits are set.
    pub fn has(&self, bits: u32) -> bool {
        self.attributes & bits == bits
    }

    /// The uncompressed point of an ECC key (SEC 1, 2.3.3).
    pub fn point(&self) -> Option<Vec<u8>> {
        match &self.key {
            PublicKey::Ecc { x, y, .. } => Some([&[4], &x[..], &y[..]].concat()),
            PublicKey::Rsa { .. } => None,
        }
    }

    /// The uncompressed point of a P-256 key, 65 bytes.
    pub fn p256_point(&self) -> Option<[u8; 65]> {
        match &self.key {
            PublicKey::Ecc { curve: Curve::P256, .. } => self.point()?.try_into().ok(),
            _ => None,
        }
    }

    /// DER SubjectPublicKeyInfo (RFC 5280, 4.1.2.7; RFC 3279 and RFC 5480).
    pub fn spki(&self) -> Vec<u8> {
        match &self.key {
            PublicKey::Rsa { modulus, exponent } => spki::of_rsa(modulus, *exponent),
            PublicKey::Ecc { curve, x, y } => spki::of_ecc(*curve, x, y),
        }
    }

    /// The identity of the host whose endorsement key this is.
    pub fn host_id(&self) -> HostId {
        HostId(Digest::of(&self.spki()))
    }
}

/// Whether `point` (uncompressed, 65 bytes) lies on P-256: asked before a TPM or a signature check sees it.
pub fn is_p256_point(point: &[u8]) -> bool {
    is_point(Curve::P256, point)
}

fn is_point(curve: Curve, point: &[u8]) -> bool {
    use aws_lc_rs::agreement::{ParsedPublicKey, UnparsedPublicKey};
    point.len() == 1 + 2 * curve.length()
        && point[0] == 4
        && ParsedPublicKey::try_from(UnparsedPublicKey::new(curve.agreement(), point)).is_ok()
}

fn hash_name(algorithm: HashAlg, parts: &[&[u8]]) -> Vec<u8> {
    let mut context = digest::Context::new(algorithm.algorithm());
    parts.iter().for_each(|part| context.update(part));
    [&algorithm.id().to_be_bytes(), context.finish().as_ref()].concat()
}

fn read_symmetric(reader: &mut Reader<'_>) -> Result<Symmetric, TpmError> {
    match reader.u16("symmetric algorithm")? {
        ALG_NULL => Ok(Symmetric::None),
        ALG_AES => {
            let bits = reader.u16("symmetric key bits")?;
            let mode = reader.u16("symmetric mode")?;
            if ![128, 256].contains(&bits) {
                return Err(TpmError::Unsupported("AES key length", bits.into()));
            }
            if mode != ALG_CFB {
                return Err(TpmError::Unsupported("AES mode", mode.into()));
            }
            Ok(Symmetric::AesCfb(bits))
        }
        other => Err(TpmError::Unsupported("symmetric algorithm", other.into())),
    }
}

fn write_symmetric(writer: Writer, symmetric: Symmetric) -> Writer {
    match symmetric {
        Symmetric::None => writer.u16(ALG_NULL),
        Symmetric::AesCfb(bits) => writer.u16(ALG_AES).u16(bits).u16(ALG_CFB),
    }
}

fn read_scheme(reader: &mut Reader<'_>) -> Result<Scheme, TpmError> {
    let scheme = reader.u16("scheme")?;
    let mut hash = || reader.u16("scheme's hash").and_then(HashAlg::from_id);
    match scheme {
        ALG_NULL => Ok(Scheme::None),
        ALG_RSAES => Ok(Scheme::RsaEs),
        ALG_ECDSA => hash().map(Scheme::Ecdsa),
        ALG_ECDH => hash().map(Scheme::Ecdh),
        ALG_RSASSA => hash().map(Scheme::RsaSsa),
        ALG_RSAPSS => hash().map(Scheme::RsaPss),
        ALG_OAEP => hash().map(Scheme::Oaep),
        other => Err(TpmError::Unsupported("scheme", other.into())),
    }
}

fn write_scheme(writer: Writer, scheme: Scheme) -> Writer {
    match scheme {
        Scheme::None => writer.u16(ALG_NULL),
        Scheme::RsaEs => writer.u16(ALG_RSAES),
        Scheme::Ecdsa(hash) => writer.u16(ALG_ECDSA).u16(hash.id()),
        Scheme::Ecdh(hash) => writer.u16(ALG_ECDH).u16(hash.id()),
        Scheme::RsaSsa(hash) => writer.u16(ALG_RSASSA).u16(hash.id()),
        Scheme::RsaPss(hash) => writer.u16(ALG_RSAPSS).u16(hash.id()),
        Scheme::Oaep(hash) => writer.u16(ALG_OAEP).u16(hash.id()),
    }
}

fn read_rsa(reader: &mut Reader<'_>) -> Result<PublicKey, TpmError> {
    let bits = reader.u16("RSA key bits")?;
    if ![2048, 3072, 4096].contains(&bits) {
        return Err(TpmError::Unsupported("RSA key length", bits.into()));
    }
    let exponent = match reader.u32("RSA exponent")? {
        0 => 65_537,
        other => other,
    };
    let modulus = reader.sized("RSA modulus")?;
    let full = modulus.len() == usize::from(bits) / 8 && modulus[0] & 0x80 != 0 && modulus[modulus.len() - 1] & 1 == 1;
    if !full || exponent < 3 || exponent & 1 == 0 {
        return Err(TpmError::Key("RSA"));
    }
    Ok(PublicKey::Rsa { modulus: modulus.to_vec(), exponent })
}

fn read_ecc(reader: &mut Reader<'_>) -> Result<PublicKey, TpmError> {
    let curve = Curve::from_id(reader.u16("curve")?)?;
    match reader.u16("key derivation scheme")? {
        ALG_NULL => {}
        other => return Err(TpmError::Unsupported("key derivation scheme", other.into())),
    }
    let x = padded(reader.sized("x coordinate")?, curve.length()).ok_or(TpmError::Length("x coordinate"))?;
    let y = padded(reader.sized("y coordinate")?, curve.length()).ok_or(TpmError::Length("y coordinate"))?;
    if !is_point(curve, &[&[4], &x[..], &y[..]].concat()) {
        return Err(TpmError::Key("elliptic curve"));
    }
    Ok(PublicKey::Ecc { curve, x, y })
}

/// `number` with zeros in front, `None` where it is longer than `length`: TPMs may leave leading zeros out.
pub(super) fn padded(number: &[u8], length: usize) -> Option<Vec<u8>> {
    let missing = length.checked_sub(number.len())?;
    Some([&vec![0; missing][..], number].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::encoding::AsDer;
    use aws_lc_rs::rsa::KeySize;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};

    fn point() -> [u8; 65] {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("random");
        pair.public_key().as_ref().try_into().expect("65 bytes")
    }

    #[test]
    fn an_ecc_key_reads_back_and_has_the_spki_that_others_make() {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("random");
        let point: [u8; 65] = pair.public_key().as_ref().try_into().expect("65 bytes");
        let public =
            Public::ecc(attribute::SIGN, &[7; 32], Symmetric::AesCfb(128), Scheme::None, &point).expect("good");
        assert_eq!(Public::parse(public.as_bytes()), Ok(public.clone()));
        assert_eq!(public.spki(), pair.public_key().as_der().expect("spki").as_ref());
        assert_eq!(public.p256_point(), Some(point));
        assert_eq!(public.name().0.len(), 34);
    }

    #[test]
    fn an_rsa_key_has_the_spki_that_others_make() {
        let pair = aws_lc_rs::rsa::PrivateDecryptingKey::generate(KeySize::Rsa2048).expect("random");
        let expected: Vec<u8> = AsDer::<aws_lc_rs::encoding::PublicKeyX509Der<'_>>::as_der(&pair.public_key())
            .expect("spki")
            .as_ref()
            .to_vec();
        // The modulus stands in the SPKI at a fixed place: 33 bytes of headers, the sign byte among them.
        let modulus = &expected[33..33 + 256];
        let bytes = Writer::new()
            .u16(ALG_RSA)
            .u16(0x000b)
            .u32(0)
            .sized(&[])
            .u16(ALG_AES)
            .u16(128)
            .u16(ALG_CFB)
            .u16(ALG_NULL)
            .u16(2048)
            .u32(0)
            .sized(modulus)
            .finish();
        let public = Public::parse(&bytes).expect("good");
        assert_eq!(public.spki(), expected);
        let sized = Writer::new().sized(&bytes).finish();
        assert_eq!(Public::parse_sized(&sized).map(|p| p.host_id()), Ok(public.host_id()));
    }

    #[test]
    fn a_point_beside_the_curve_is_refused() {
        let mut bad = point();
        bad[40] ^= 1;
        assert_eq!(Public::ecc(0, &[], Symmetric::None, Scheme::None, &bad), Err(TpmError::Key("elliptic curve")));
        assert!(!is_p256_point(&bad));
        assert!(!is_p256_point(&point()[1..]));
        assert!(is_p256_point(&point()));
    }

    #[test]
    fn attack_15_weak_hashes_are_not_even_read() {
        let good = Public::ecc(0, &[], Symmetric::None, Scheme::Ecdsa(HashAlg::Sha256), &point()).expect("good");
        let mut bad = good.as_bytes().to_vec();
        bad[3] = 4; // nameAlg SHA-1
        assert_eq!(Public::parse(&bad), Err(TpmError::Unsupported("hash algorithm", 4)));
        let mut bad = good.as_bytes().to_vec();
        bad[15] = 4; // ECDSA with SHA-1
        assert_eq!(Public::parse(&bad), Err(TpmError::Unsupported("hash algorithm", 4)));
    }
}
