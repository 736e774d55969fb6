//! The other commands: `fealty attest` and `fealty ctl`.

pub mod attest;
pub mod ctl;
