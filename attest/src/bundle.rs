//! The key bundle: keys for one VM process on one host, in two HPKE layers. The outer one is to the process's one-time
//! X25519 key; the inner one to the host's wrap key, whose Diffie-Hellman only the TPM does, and only while its PCRs are as
//! they were quoted. So neither the process alone nor the TPM service alone holds anything.
//!
//! ```text
//! sealed = enc(32) || AES-256-GCM( enc(65) || AES-256-GCM( 32-byte keys, in the order of Release::keys ) )
//! AAD of both layers = the release's JSON bytes
//! info of both       = SHA-256 over customer, VM, instance, host, operation, lease (length-prefixed)
//! ```

use crate::hpke::{self, HpkeError, P256_ENC, Sender, X25519Key};
use crate::protocol::Release;
use crate::tpm::Public;
use policy::Digest;
use policy::lease::OnExpiry;
use secretmem::{Secret, SecretBuf, SecretError, wipe};

/// The most keys in a bundle.
pub const MAX_KEYS: usize = 64;

/// A bundle that can't be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The readable part is no release.
    #[error("a release can't be read")]
    Json(#[source] serde_json::Error),
    /// Not as many keys as it names, none, or too many.
    #[error("a key bundle holds 1 to {MAX_KEYS} keys, as many as its release names")]
    Count,
    /// A wrap key that is not on P-256.
    #[error("the wrap key is not a P-256 key")]
    WrapKey,
    /// A layer that does not open.
    #[error("the key bundle's {layer} layer does not open")]
    Layer {
        /// Which layer.
        layer: &'static str,
        /// Why.
        #[source]
        source: HpkeError,
    },
    /// No locked memory.
    #[error(transparent)]
    Memory(#[from] SecretError),
}

/// The VM process's one-time bundle key.
pub struct BundleKey(X25519Key);

impl BundleKey {
    /// A fresh one, for one attestation.
    pub fn generate() -> Result<Self, SecretError> {
        X25519Key::generate().map(Self)
    }

    /// The public half: X25519, 32 bytes.
    pub fn public(&self) -> &[u8; 32] {
        self.0.public()
    }
}

/// What seals one bundle: secrets shared with both recipients, made before anybody knows what is sealed.
pub struct Sealer {
    inner: Sender,
    outer: Sender,
}

impl Sealer {
    /// For the process's bundle key and the host's wrap key.
    pub fn new(bundle_key: &[u8; 32], wrap_public: &Public) -> Result<Self, BundleError> {
        let wrap_point = wrap_public.p256_point().ok_or(BundleError::WrapKey)?;
        let inner = Sender::p256(&wrap_point).map_err(layer("inner"))?;
        Ok(Self { inner, outer: Sender::x25519(bundle_key).map_err(layer("outer"))? })
    }

    /// Seals `keys`, which `release_json` (the JSON bytes of a [`Release`]) names in this order.
    pub fn seal(self, release_json: &[u8], keys: &[&Secret<32>]) -> Result<Vec<u8>, BundleError> {
        let release = parse(release_json)?;
        if keys.len() != release.keys.len() {
            return Err(BundleError::Count);
        }
        let info = info(&release);
        let mut plain = SecretBuf::with_len(32 * keys.len())?;
        for (place, key) in plain.expose_mut().chunks_exact_mut(32).zip(keys) {
            place.copy_from_slice(key.expose());
        }
        let inner = self.inner.seal(info.as_bytes(), release_json, plain.expose()).map_err(layer("inner"))?;
        self.outer.seal(info.as_bytes(), release_json, &inner).map_err(layer("outer"))
    }
}

/// Opens the outer layer of `sealed`. What is inside opens only with the TPM's help: see [`OuterOpened`].
pub fn open(
    release_json: &[u8],
    sealed: &[u8],
    bundle_key: &BundleKey,
    wrap_public: &Public,
) -> Result<OuterOpened, BundleError> {
    let release = parse(release_json)?;
    let info = info(&release);
    let wrap_point = wrap_public.p256_point().ok_or(BundleError::WrapKey)?;
    let inner = hpke::open_x25519(&bundle_key.0, info.as_bytes(), release_json, sealed).map_err(layer("outer"))?;
    let point = *hpke::p256_encapsulation(inner.expose()).map_err(layer("inner"))?;
    Ok(OuterOpened { release, release_json: release_json.to_vec(), info, wrap_point, inner, point })
}

/// A bundle whose outer layer is open.
pub struct OuterOpened {
    release: Release,
    release_json: Vec<u8>,
    info: Digest,
    wrap_point: [u8; P256_ENC],
    inner: SecretBuf,
    point: [u8; P256_ENC],
}

impl OuterOpened {
    /// The release: authentic only once [`Self::finish`] succeeds, for anyone can seal to a public key. Its origin is
    /// proved by the receipt.
    pub fn release(&self) -> &Release {
        &self.release
    }

    /// The point (uncompressed, on P-256) that the TPM service multiplies with the wrap key.
    pub fn point(&self) -> &[u8; P256_ENC] {
        &self.point
    }

    /// Opens the inner layer with the shared point that the TPM service returned; wipes it.
    pub fn finish(&self, shared_point: &mut [u8; P256_ENC]) -> Result<Vec<Secret<32>>, BundleError> {
        let shared_x = take_x(shared_point)?;
        let inner = self.inner.expose();
        let plain = hpke::open_p256(&shared_x, &self.wrap_point, self.info.as_bytes(), &self.release_json, inner);
        let plain = plain.map_err(layer("inner"))?;
        if plain.len() != 32 * self.release.keys.len() {
            return Err(BundleError::Count);
        }
        let (keys, _) = plain.expose().as_chunks::<32>();
        Ok(keys.iter().map(Secret::copy_of).collect::<Result<_, _>>()?)
    }
}

fn take_x(shared_point: &mut [u8; P256_ENC]) -> Result<Secret<32>, SecretError> {
    let mut shared_x = Secret::zeroed();
    if let Ok(secret) = &mut shared_x {
        secret.expose_mut().copy_from_slice(&shared_point[1..33]);
    }
    wipe(shared_point);
    shared_x
}

/// Reads a release as it stands: nothing vouches for it yet.
pub(crate) fn parse(release_json: &[u8]) -> Result<Release, BundleError> {
    let release: Release = serde_json::from_slice(release_json).map_err(BundleError::Json)?;
    if (1..=MAX_KEYS).contains(&release.keys.len()) { Ok(release) } else { Err(BundleError::Count) }
}

fn info(release: &Release) -> Digest {
    let lease = &release.lease;
    let on_expiry = match lease.on_expiry {
        OnExpiry::Pause => 0,
        OnExpiry::PowerOff => 1,
    };
    Digest::of_fields(
        "fealty key bundle v1",
        &[
            release.customer.as_str().as_bytes(),
            release.vm.as_str().as_bytes(),
            &release.instance.get().to_be_bytes(),
            release.host.0.as_bytes(),
            release.operation.digest().as_bytes(),
            &lease.seconds.to_be_bytes(),
            &lease.quiesce_seconds.to_be_bytes(),
            &[on_expiry],
        ],
    )
}

fn layer(layer: &'static str) -> impl Fn(HpkeError) -> BundleError {
    move |source| BundleError::Layer { layer, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::KeyName;
    use crate::testing;
    use crate::testing::SoftKey;

    fn keys() -> [Secret<32>; 2] {
        [Secret::copy_of(&[1; 32]).expect("memory"), Secret::copy_of(&[2; 32]).expect("memory")]
    }

    fn release() -> Release {
        Release { keys: vec![KeyName::VmFile(policy::KeyId(1)), KeyName::Volume(0)], ..testing::release() }
    }

    fn seal(json: &[u8], keys: &[&Secret<32>], bundle_key: &[u8; 32], wrap: &Public) -> Result<Vec<u8>, BundleError> {
        Sealer::new(bundle_key, wrap)?.seal(json, keys)
    }

    fn json(release: &Release) -> Vec<u8> {
        serde_json::to_vec(release).expect("serializes")
    }

    #[test]
    fn a_bundle_opens_with_both_keys() {
        let (wrap, bundle) = (SoftKey::wrap(), BundleKey::generate().expect("memory"));
        let [a, b] = keys();
        let json = json(&release());
        let sealed = seal(&json, &[&a, &b], bundle.public(), wrap.public()).expect("sealed");
        let outer = open(&json, &sealed, &bundle, wrap.public()).expect("outer opens");
        assert_eq!(outer.release(), &release());
        let mut shared = wrap.ecdh(outer.point());
        let opened = outer.finish(&mut shared).expect("inner opens");
        assert!(opened[0].ct_eq(&a) && opened[1].ct_eq(&b) && opened.len() == 2);
        assert_eq!(shared, [0; 65], "the shared point is wiped");
    }

    #[test]
    fn attack_27_28_a_bundle_opens_for_its_host_process_and_lease_only() {
        let (wrap, bundle) = (SoftKey::wrap(), BundleKey::generate().expect("memory"));
        let [a, b] = keys();
        let good = json(&release());
        let sealed = seal(&good, &[&a, &b], bundle.public(), wrap.public()).expect("sealed");
        // Another host's TPM.
        let other = SoftKey::wrap();
        let outer = open(&good, &sealed, &bundle, wrap.public()).expect("outer opens");
        assert!(outer.finish(&mut other.ecdh(outer.point())).is_err());
        // Another process.
        assert!(open(&good, &sealed, &BundleKey::generate().expect("memory"), wrap.public()).is_err());
        // A longer lease, another VM, another operation, the same fields written differently.
        let mut changed = release();
        changed.lease.seconds += 1;
        assert!(open(&json(&changed), &sealed, &bundle, wrap.public()).is_err());
        let mut changed = release();
        changed.vm = "other".parse().expect("label");
        assert!(open(&json(&changed), &sealed, &bundle, wrap.public()).is_err());
        let spaced = [&good[..], b" "].concat();
        assert!(open(&spaced, &sealed, &bundle, wrap.public()).is_err());
    }

    #[test]
    fn a_bundle_has_the_keys_it_names() {
        let (wrap, bundle) = (SoftKey::wrap(), BundleKey::generate().expect("memory"));
        let [a, _] = keys();
        let sealed = seal(&json(&release()), &[&a], bundle.public(), wrap.public());
        assert!(matches!(sealed, Err(BundleError::Count)));
        let none = Release { keys: vec![], ..release() };
        assert!(matches!(seal(&json(&none), &[], bundle.public(), wrap.public()), Err(BundleError::Count)));
    }
}
