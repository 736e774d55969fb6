//! The configuration of an unprotected VM.

use policy::config::PlainConfig;

/// The longest plain configuration, in bytes.
pub const CONFIG_LIMIT: u64 = 256 * 1024;

/// Why a plain configuration is none.
#[derive(Debug, thiserror::Error)]
pub enum PlainError {
    /// It can't be read, or has a field that no unprotected VM has.
    #[error("this is no configuration of an unprotected VM (a VM file is run without --unprotected)")]
    Shape(#[source] serde_json::Error),
    /// A value that no machine has.
    #[error("this configuration fits no machine")]
    Value(#[source] policy::config::ConfigError),
}

/// The configuration in `bytes`, checked.
pub fn parse(bytes: &[u8]) -> Result<PlainConfig, PlainError> {
    let config: PlainConfig = serde_json::from_slice(bytes).map_err(PlainError::Shape)?;
    config.check().map_err(PlainError::Value)?;
    Ok(config)
}
