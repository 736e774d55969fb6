//! (the lead writes attest/src/vmfile.rs right now; attest helper: leave it, see INTERFACES.md)
