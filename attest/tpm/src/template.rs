//! Public templates of the keys that the TPM service uses.
//!
//! | key | hierarchy | template |
//! | --- | --- | --- |
//! | EK | endorsement | TCG EK Credential Profile 2.5, L-1 (RSA-2048), L-2 (P-256), H-3 (P-384) |
//! | AK | endorsement | ECDSA P-256 with SHA-256, restricted signing, noDA: the same key after each start |
//! | wrap key | NULL | ECDH P-256, decrypt only, bound to PCR values, noDA: dies at each reset |

use crate::ek::EkKind;
use crate::error::TpmError;
use policy::Digest;
use tss_esapi::abstraction::{AsymmetricAlgorithmSelection, ek::create_ek_public_from_default_template_2};
use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::{ecc::EccCurve, key_bits::RsaKeyBits};
use tss_esapi::structures::{
    EccPoint, EccScheme, HashScheme, KeyDerivationFunctionScheme, Public, PublicBuilder, PublicEccParametersBuilder,
    SymmetricDefinitionObject,
};

/// The default template of an endorsement key.
pub(crate) fn ek(kind: EkKind) -> Result<Public, TpmError> {
    let algorithm = match kind {
        EkKind::Rsa2048 => AsymmetricAlgorithmSelection::Rsa(RsaKeyBits::Rsa2048),
        EkKind::P256 => AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP256),
        EkKind::P384 => AsymmetricAlgorithmSelection::Ecc(EccCurve::NistP384),
    };
    create_ek_public_from_default_template_2(algorithm, None).map_err(|e| TpmError::of("EK template", e))
}

/// The attestation key.
pub(crate) fn ak() -> Result<Public, TpmError> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_restricted(true)
        .with_sign_encrypt(true);
    p256(attributes, EccScheme::EcDsa(HashScheme::new(HashingAlgorithm::Sha256)), None)
        .map_err(|e| TpmError::of("AK template", e))
}

/// The wrap key under `auth_policy`.
pub(crate) fn wrap_key(auth_policy: &Digest) -> Result<Public, TpmError> {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(false)
        .with_admin_with_policy(false)
        .with_no_da(true)
        .with_decrypt(true);
    p256(attributes, EccScheme::EcDh(HashScheme::new(HashingAlgorithm::Sha256)), Some(auth_policy))
        .map_err(|e| TpmError::of("wrap key template", e))
}

fn p256(attributes: ObjectAttributesBuilder, scheme: EccScheme, policy: Option<&Digest>) -> tss_esapi::Result<Public> {
    let attributes = attributes.build()?;
    let parameters = PublicEccParametersBuilder::new()
        .with_ecc_scheme(scheme)
        .with_curve(EccCurve::NistP256)
        .with_symmetric(SymmetricDefinitionObject::Null)
        .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
        .with_is_signing_key(attributes.sign_encrypt())
        .with_is_decryption_key(attributes.decrypt())
        .with_restricted(attributes.restricted())
        .build()?;
    let builder = PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::default());
    match policy {
        Some(digest) => builder.with_auth_policy(digest.as_bytes().to_vec().try_into()?),
        None => builder,
    }
    .build()
}
