//! One function per parser of outside bytes, for any bytes: each must return, without a panic. The tests run them over a corpus and
//! seeded mutations of it; `cargo fuzz` targets call these.

use crate::connection::library_name;
use crate::ek::der_length;
use crate::host::sized;
use attest::tcti::Tcti;

/// A TCTI string: what is accepted is written as it was read.
pub fn tcti(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(tcti) = text.parse::<Tcti>()
    {
        assert!(text.starts_with("device:/") || text.starts_with("swtpm:host="));
        assert!(library_name(&tcti).is_ok());
    }
}

/// What an NV index holds where a certificate should be.
pub fn certificate(data: &[u8]) {
    if let Some(length) = der_length(data) {
        assert!((2..=data.len()).contains(&length));
    }
}

/// A TPM2B from a provider.
pub fn credential(data: &[u8]) {
    if let Some(content) = sized(data) {
        assert_eq!(content, data[2..]);
    }
}
