//! (the lead writes attest/src/flow.rs right now; attest helper: leave it, see INTERFACES.md)
