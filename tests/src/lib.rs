//! What the tests that cross packages share: software TPMs, firmware played on them, the small guest, a whole laboratory, a provider with
//! volumes.

pub mod bench;
pub mod firmware;
pub mod guest;
pub mod keys;
pub mod lab;
pub mod process;
pub mod swtpm;
