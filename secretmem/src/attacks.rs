//! Attacks on secrets, as root.
