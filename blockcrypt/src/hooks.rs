//! What a volume asks of its surroundings: somebody who keeps its anchors, and somebody who hears what it noticed.

use crate::AnchorRefused;
use policy::VolumeAnchor;

/// Keeps anchors at the key provider.
///
/// Called from the volume's own thread, from FLUSH in mode `flush`, from `open`, `rewrap` and `close`, one call at a time and in
/// order; never while the volume holds a lock that [`wipe_keys`](crate::Volume::wipe_keys) needs.
pub trait Anchors: Send + Sync {
    /// Returns when the provider has `anchor` durably. May block for as long as it takes.
    fn keep(&self, anchor: &VolumeAnchor) -> Result<(), AnchorRefused>;
}

/// Hears what the audit log should know. Called with locks held: an implementation must not call the volume, nor wait for anybody else.
pub trait Events: Send + Sync {
    /// Something in the store is not what was written there: the guest's block and the store's block (4096 bytes each), as far
    /// as known. Where a page of the map is bad, the guest's block is the first that it describes, and `reason` names the last.
    fn integrity(&self, lba: Option<u64>, physical: Option<u64>, reason: &str);
    /// Something worth knowing, one line: what a recovery dropped, an anchor that is late.
    fn note(&self, text: &str);
}

/// Anchors that nobody keeps and events that nobody hears: for tests of other things and for reading without a holder.
pub struct Nobody;

impl Anchors for Nobody {
    fn keep(&self, _: &VolumeAnchor) -> Result<(), AnchorRefused> {
        Err(AnchorRefused::Refused("nobody keeps anchors here".to_owned()))
    }
}

impl Events for Nobody {
    fn integrity(&self, _: Option<u64>, _: Option<u64>, _: &str) {}
    fn note(&self, _: &str) {}
}
