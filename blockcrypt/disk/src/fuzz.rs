//! Targets for fuzzing: every parser of bytes that a client supplies. None may panic, loop or allocate without bound, whatever the
//! bytes.

use crate::nbd::{Export, parsing};

/// A client's side of an NBD handshake.
pub fn fuzz_nbd_handshake(data: &[u8]) {
    parsing::handshake(data, &export(data));
}

/// A client's requests after its handshake, as they come in pieces.
pub fn fuzz_nbd_requests(data: &[u8]) {
    parsing::requests(data, &export(data));
}

/// Some of all exports.
fn export(data: &[u8]) -> Export {
    let odd = !data.len().is_multiple_of(2);
    Export {
        size: if odd { 1 << 20 } else { 1 << 62 },
        read_only: data.len().is_multiple_of(5),
        description: "a disk".into(),
    }
}
