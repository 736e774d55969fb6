//! Why a request to a volume, or opening one, came to nothing.

use policy::KeyId;
use std::io;

/// What can go wrong with a volume. Each message is one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The store failed.
    #[error("the volume's store failed to {0}")]
    Store(&'static str, #[source] io::Error),
    /// Somebody else has it open.
    #[error("the volume is in use by another process; stop that one first")]
    Busy,
    /// No superblock at either end.
    #[error("this is no fealty volume (no superblock at either end); check the path")]
    NotAVolume,
    /// The file is shorter than its superblock says.
    #[error("the volume is truncated: {found} of {expected} bytes are there; restore the rest")]
    Truncated {
        /// Bytes in the store.
        found: u64,
        /// Bytes that the superblock names.
        expected: u64,
    },
    /// A device that is too short for what was asked for.
    #[error("the store has {found} bytes, and this takes {needed}; take a longer one, or ask for less")]
    TooShort {
        /// Bytes in the store.
        found: u64,
        /// Bytes that it would need.
        needed: u64,
    },
    /// Another volume than the one that the keys are for.
    #[error("this is volume {found}, but the keys are for volume {expected}; check the path")]
    OtherVolume {
        /// The UUID in the store.
        found: policy::VolumeId,
        /// The UUID in the grant.
        expected: policy::VolumeId,
    },
    /// A format, cipher or feature that this version does not know.
    #[error("the volume uses {0}, which this version does not know; use a newer fealty")]
    Unsupported(String),
    /// The key slots name another key-encryption key.
    #[error("the key does not open the volume's key slots; ask the provider for this volume's key")]
    WrongKey,
    /// Something that the writer never wrote.
    #[error("the volume is damaged or was tampered with: {0}; restore it from a copy")]
    Damaged(String),
    /// Older than the state that the provider knows.
    #[error("the volume is older than its anchor at the provider: {0}; bring back the newest copy")]
    RolledBack(String),
    /// Opened without an anchor.
    #[error("the volume has no anchor yet; create or import it first")]
    NoAnchor,
    /// Created with an anchor.
    #[error("the provider has an anchor of this volume, so it exists already; create another volume")]
    Exists,
    /// An open number that was issued before.
    #[error("open number {issued} is not above {highest}, which wrote this volume; ask the provider for a new one")]
    StaleOpenNumber {
        /// The number in the grant.
        issued: u32,
        /// The highest in anchor and superblocks.
        highest: u32,
    },
    /// A key that takes no new writes, or none of a rotation.
    #[error(
        "key {0} of this volume has sealed as much as one key may; rekey the volume (a rekey that this ends goes on under the next key)"
    )]
    KeyExhausted(KeyId),
    /// The grant and the key do not belong together, or name something impossible.
    #[error("the volume's grant can't be used: {0}")]
    Grant(&'static str),
    /// A size that no volume has.
    #[error("a volume has {min} to {max} bytes, a multiple of 512; not {size}")]
    Size {
        /// The size asked for.
        size: u64,
        /// The smallest.
        min: u64,
        /// The largest.
        max: u64,
    },
    /// Data would be lost by a smaller size.
    #[error(
        "{bytes} bytes of data lie behind the first {size} of the volume; discard them first, or allow that they are lost"
    )]
    DataBeyond {
        /// The size asked for.
        size: u64,
        /// Bytes of data that it leaves out.
        bytes: u64,
    },
    /// A request outside the volume, or one that is not made of sectors.
    #[error("a request for {length} bytes at {offset} is not made of this volume's 512-byte sectors")]
    Request {
        /// Its first byte.
        offset: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// The block's tag does not verify.
    #[error("block {lba} of the volume fails its integrity check; it can be written anew, or the volume restored")]
    Integrity {
        /// The 4096-byte block, as the guest counts.
        lba: u64,
    },
    /// A write to a volume that was opened for reading.
    #[error("the volume is open for reading only")]
    ReadOnly,
    /// More room beyond its size than a volume has.
    #[error("room for {room} bytes beyond the volume's size is too much; it has {most} at most")]
    Room {
        /// What was asked for, in bytes.
        room: u64,
        /// The most.
        most: u64,
    },
    /// No room for data, or for the metadata that would make it durable: in the store, with its error; or, without one, in what the volume
    /// uses of it, which its snapshots take up.
    #[error("{}", no_room(.0.is_some()))]
    Full(#[source] Option<io::Error>),
    /// No snapshot with that number.
    #[error("the volume has no snapshot {0}")]
    NoSnapshot(u64),
    /// Something newer would be lost.
    #[error("snapshot {0} is newer; delete it first")]
    NewerSnapshot(u64),
    /// One that the volume has no room for.
    #[error("snapshot {id} has {size} bytes, more than the volume; resize the volume to as many first")]
    LargerSnapshot {
        /// The snapshot.
        id: u64,
        /// Its size.
        size: u64,
    },
    /// A name that no snapshot has.
    #[error("a snapshot's name has 1 to 64 bytes, without control characters")]
    SnapshotName,
    /// As many as there is room for.
    #[error("the volume has {0} snapshots, and room for no more; delete one first")]
    TooManySnapshots(usize),
    /// The keys were wiped.
    #[error("the volume's keys are wiped; it goes on when they are put back")]
    NoKeys,
    /// It was closed.
    #[error("the volume is closed")]
    Closed,
    /// An earlier failure left it unknown what is durable.
    #[error("the volume takes no more writes since an earlier failure: {0}; open it again")]
    Failed(String),
    /// The provider does not keep the anchor.
    #[error("the volume's anchor is not kept")]
    Anchor(#[from] AnchorRefused),
    /// No locked memory for keys.
    #[error("no memory for the volume's keys")]
    Secret(#[from] secretmem::SecretError),
    /// A thread or random bytes.
    #[error("the system gave no {0}")]
    System(&'static str),
}

impl VolumeError {
    /// Whether the volume's content, or its age, is not what it should be: for the audit log, and for tools that tell
    /// tampering from mishap.
    pub fn is_integrity(&self) -> bool {
        matches!(
            self,
            Self::NotAVolume
                | Self::Truncated { .. }
                | Self::OtherVolume { .. }
                | Self::Damaged(_)
                | Self::RolledBack(_)
                | Self::Integrity { .. }
        )
    }

    pub(crate) fn store(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full(Some(source)),
            _ => Self::Store(doing, source),
        }
    }
}

fn no_room(in_store: bool) -> &'static str {
    match in_store {
        true => "the volume's store is full; make room, then write again (nothing acknowledged is lost)",
        false => {
            "the volume's room is used up by what its snapshots hold; delete one, or give the volume more room (fealty-disk resize --room), \
             then write again (nothing acknowledged is lost)"
        }
    }
}

/// Why an anchor was not kept.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AnchorRefused {
    /// No answer so far: the engine asks again.
    #[error("the key provider does not answer: {0}")]
    Away(String),
    /// It will not be kept: another holder has the volume, or it went backward. The engine takes no more writes.
    #[error("the key provider refused the anchor: {0}")]
    Refused(String),
    /// Whoever asked waits no longer, and does not know what the provider keeps. The engine gives up what it wanted the anchor for.
    #[error("the key provider did not answer in time: {0}")]
    GivenUp(String),
}
