//! What the tests that cross packages share: software TPMs, firmware played on them, the small guest, a whole laboratory.

pub mod bench;
pub mod firmware;
pub mod guest;
pub mod lab;
pub mod process;
pub mod swtpm;
