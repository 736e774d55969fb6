//! DER SubjectPublicKeyInfo (RFC 5280, 4.1.2.7; RFC 3279 and RFC 5480), as certificates name keys.

use super::public::Curve;

pub(super) fn of_rsa(modulus: &[u8], exponent: u32) -> Vec<u8> {
    const RSA_ENCRYPTION: &[u8] =
        &[0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];
    let numbers = [der_number(modulus), der_number(&exponent.to_be_bytes())].concat();
    let bits = [&[0], &der(0x30, &numbers)[..]].concat();
    der(0x30, &[RSA_ENCRYPTION, &der(0x03, &bits)].concat())
}

pub(super) fn of_ecc(curve: Curve, x: &[u8], y: &[u8]) -> Vec<u8> {
    const EC_PUBLIC_KEY: &[u8] = &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
    const P256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
    const P384: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
    let oid = match curve {
        Curve::P256 => P256,
        Curve::P384 => P384,
    };
    let algorithm = der(0x30, &[EC_PUBLIC_KEY, oid].concat());
    let bits = [&[0, 4], x, y].concat();
    der(0x30, &[algorithm, der(0x03, &bits)].concat())
}

fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len();
    let mut out = vec![tag];
    match length {
        0..=0x7f => out.push(length as u8),
        0x80..=0xff => out.extend([0x81, length as u8]),
        _ => out.extend([0x82, (length >> 8) as u8, length as u8]),
    }
    out.extend_from_slice(content);
    out
}

fn der_number(bytes: &[u8]) -> Vec<u8> {
    let start = bytes.iter().position(|b| *b != 0).unwrap_or(bytes.len().saturating_sub(1));
    let bytes = &bytes[start..];
    let sign: &[u8] = if bytes.first().is_some_and(|b| b & 0x80 != 0) { &[0] } else { &[] };
    der(0x02, &[sign, bytes].concat())
}
