//! One function per parser of outside bytes, for any bytes: each must return, without a panic. The tests run them over a
//! corpus and seeded mutations of it; `cargo fuzz` targets call these. Requests themselves are parsed by
//! [`attest::service`], which has targets of its own.

use crate::measure::LayerArg;
use crate::runtime::{IdentityFile, State};

/// A layer on the command line.
pub fn layer_arg(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(layer) = text.parse::<LayerArg>()
    {
        assert!((1..=255).contains(&layer.name.len()) && layer.version.len() <= 255);
        assert!(!layer.path.as_os_str().is_empty() && !layer.version.contains('/'));
    }
}

/// The files that one service leaves for the next.
pub fn state(data: &[u8]) {
    if let Ok(state) = serde_json::from_slice::<State>(data) {
        let again = serde_json::to_vec(&state).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        assert_eq!(Some(state), again);
    }
    let _ = serde_json::from_slice::<IdentityFile>(data);
}

/// A connection's bytes: frames come out whole, or the connection ends.
pub fn frames(data: &[u8]) {
    crate::service::fuzz_frames(data);
}
