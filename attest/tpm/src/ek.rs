//! The endorsement key: which one this TPM is known by, its certificate and its template in NV.

use crate::connection::Tpm;
use crate::error::TpmError;
use crate::template;
use std::fmt;
use std::str::FromStr;
use tss_esapi::constants::PropertyTag;
use tss_esapi::handles::{NvIndexHandle, NvIndexTpmHandle, TpmHandle};
use tss_esapi::interface_types::resource_handles::NvAuth;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{EccParameter, EccPoint, Public, PublicKeyRsa};
use tss_esapi::traits::UnMarshall;

/// A kind of endorsement key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EkKind {
    /// RSA-2048, low range.
    Rsa2048,
    /// NIST P-256, low range.
    P256,
    /// NIST P-384, high range.
    P384,
}

/// Which endorsement key to be known by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EkChoice {
    /// The first of P-384, P-256, RSA-2048 that has a certificate; where none has one, RSA-2048, which every TPM can make.
    #[default]
    Certified,
    /// This one, with or without a certificate.
    Kind(EkKind),
}

/// A kind of endorsement key that is not known.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an endorsement key is rsa-2048, p-256 or p-384")]
pub struct EkKindError;

/// What NV says about the endorsement key.
#[derive(Debug)]
pub(crate) struct EkRecord {
    pub(crate) kind: EkKind,
    pub(crate) certificate: Option<Vec<u8>>,
    pub(crate) template: Public,
}

impl EkKind {
    /// In the order in which they are looked for.
    pub const ALL: [Self; 3] = [Self::P384, Self::P256, Self::Rsa2048];

    /// NV indices of certificate, nonce and template (TCG EK Credential Profile 2.5, 2.2.1.4 and 2.2.1.5).
    fn indices(self) -> (u32, Option<u32>, u32) {
        match self {
            Self::Rsa2048 => (0x01c0_0002, Some(0x01c0_0003), 0x01c0_0004),
            Self::P256 => (0x01c0_000a, Some(0x01c0_000b), 0x01c0_000c),
            Self::P384 => (0x01c0_0016, None, 0x01c0_0017),
        }
    }
}

impl fmt::Display for EkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rsa2048 => "rsa-2048",
            Self::P256 => "p-256",
            Self::P384 => "p-384",
        })
    }
}

impl FromStr for EkKind {
    type Err = EkKindError;
    fn from_str(text: &str) -> Result<Self, EkKindError> {
        Self::ALL.into_iter().find(|k| k.to_string() == text).ok_or(EkKindError)
    }
}

/// Finds the endorsement key to be known by.
pub(crate) fn find(tpm: &mut Tpm, choice: EkChoice) -> Result<EkRecord, TpmError> {
    match choice {
        EkChoice::Kind(kind) => {
            let certificate = certificate(tpm, kind)?;
            record(tpm, kind, certificate)
        }
        EkChoice::Certified => {
            for kind in EkKind::ALL {
                if let Some(certificate) = certificate(tpm, kind)? {
                    return record(tpm, kind, Some(certificate));
                }
            }
            record(tpm, EkKind::Rsa2048, None)
        }
    }
}

fn record(tpm: &mut Tpm, kind: EkKind, certificate: Option<Vec<u8>>) -> Result<EkRecord, TpmError> {
    let (_, nonce, template) = kind.indices();
    let template = match read(tpm, template)? {
        Some(bytes) => {
            let public = Public::unmarshall(&bytes).map_err(|_| TpmError::Answer("TPM2_NV_Read of the EK template"))?;
            match nonce {
                Some(nonce) => with_nonce(public, read(tpm, nonce)?)?,
                None => public,
            }
        }
        None => template::ek(kind)?,
    };
    Ok(EkRecord { kind, certificate, template })
}

/// Puts the nonce into the template's unique field, filled up with zeroes (EK Credential Profile, 2.2.1.3).
fn with_nonce(public: Public, nonce: Option<Vec<u8>>) -> Result<Public, TpmError> {
    let Some(nonce) = nonce else { return Ok(public) };
    let padded = |length: usize| {
        let mut bytes = nonce.clone();
        bytes.resize(length, 0);
        bytes
    };
    let unusable = |_| TpmError::Answer("TPM2_NV_Read of the EK nonce");
    Ok(match public {
        Public::Rsa { object_attributes, name_hashing_algorithm, auth_policy, parameters, .. } => Public::Rsa {
            object_attributes,
            name_hashing_algorithm,
            auth_policy,
            parameters,
            unique: PublicKeyRsa::try_from(padded(256)).map_err(unusable)?,
        },
        Public::Ecc { object_attributes, name_hashing_algorithm, auth_policy, parameters, .. } => Public::Ecc {
            object_attributes,
            name_hashing_algorithm,
            auth_policy,
            parameters,
            unique: EccPoint::new(
                EccParameter::try_from(padded(32)).map_err(unusable)?,
                EccParameter::try_from(vec![0; 32]).map_err(unusable)?,
            ),
        },
        other => other,
    })
}

fn certificate(tpm: &mut Tpm, kind: EkKind) -> Result<Option<Vec<u8>>, TpmError> {
    let Some(mut bytes) = read(tpm, kind.indices().0)? else { return Ok(None) };
    let length = der_length(&bytes).ok_or(TpmError::Answer("TPM2_NV_Read of the EK certificate"))?;
    // Some makers fill the index up.
    bytes.truncate(length);
    Ok(Some(bytes))
}

/// Length of the DER SEQUENCE at the start of `bytes`, with its header, where it fits.
pub(crate) fn der_length(bytes: &[u8]) -> Option<usize> {
    let length = match *bytes {
        [0x30, 0x81, a, ..] => 3 + usize::from(a),
        [0x30, 0x82, a, b, ..] => 4 + usize::from(u16::from_be_bytes([a, b])),
        [0x30, a, ..] if a < 0x80 => 2 + usize::from(a),
        _ => return None,
    };
    (length <= bytes.len()).then_some(length)
}

/// The content of an NV index; `None` where there is no such index, or nothing was written to it.
fn read(tpm: &mut Tpm, index: u32) -> Result<Option<Vec<u8>>, TpmError> {
    let name = "TPM2_NV_Read";
    if !tpm.has_nv_index(index)? {
        return Ok(None);
    }
    let fail = |e| TpmError::of(name, e);
    let handle = TpmHandle::NvIndex(NvIndexTpmHandle::new(index).map_err(fail)?);
    let mut object = tpm.without_sessions(|c| c.tr_from_tpm_public(handle)).map_err(fail)?;
    let content = read_all(tpm, NvIndexHandle::from(object));
    tpm.context.tr_close(&mut object).map_err(fail)?;
    content
}

fn read_all(tpm: &mut Tpm, index: NvIndexHandle) -> Result<Option<Vec<u8>>, TpmError> {
    let fail = |e| TpmError::of("TPM2_NV_Read", e);
    let (public, _) = tpm.without_sessions(|c| c.nv_read_public(index)).map_err(fail)?;
    if !public.attributes().written() {
        return Ok(None);
    }
    let chunk = tpm.property(PropertyTag::NvBufferMax).unwrap_or(SMALLEST_NV_BUFFER).clamp(64, 1024);
    let size = public.data_size();
    let mut content = Vec::with_capacity(size);
    while content.len() < size {
        let offset = u16::try_from(content.len()).map_err(|_| TpmError::Answer("TPM2_NV_ReadPublic"))?;
        let length = (size - content.len()).min(chunk as usize) as u16;
        let part = tpm
            .context
            .execute_with_session(Some(AuthSession::Password), |c| {
                c.nv_read(NvAuth::NvIndex(index), index, length, offset)
            })
            .map_err(fail)?;
        if part.is_empty() {
            return Err(TpmError::Answer("TPM2_NV_Read"));
        }
        content.extend_from_slice(&part);
    }
    Ok(Some(content))
}

/// Every TPM of a PC reads this many bytes at once.
const SMALLEST_NV_BUFFER: u32 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_after_a_certificate_is_cut_off() {
        assert_eq!(der_length(&[0x30, 2, 1, 1, 0xff]), Some(4));
        assert_eq!(der_length(&[0x30, 0x82, 0, 1, 9]), Some(5));
        assert_eq!(der_length(&[0x30, 0x82, 1, 0, 9]), None);
        assert_eq!(der_length(&[0x31, 0]), None);
        assert_eq!(der_length(&[]), None);
    }

    #[test]
    fn kinds_are_named() {
        for kind in EkKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("rsa".parse::<EkKind>().is_err());
    }
}
