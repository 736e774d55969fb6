//! Superblocks: where they are, which verify, and which one counts.

use crate::crypto::wipe_registers;
use crate::format::anchor::AnchorFields;
use crate::format::superblock::{Superblock, claimed_total, claimed_version, has_magic};
use crate::format::{BLOCK, Block, VERSION, zero_block};
use crate::keys::{VolumeKey, same};
use crate::{Kek, Store, VolumeError};
use policy::disk::VolumeGrant;
use secretmem::wiping_stack;

/// The superblock that counts, among those that were found.
pub(super) struct State {
    pub(super) chosen: Found,
    /// The highest epoch of all.
    pub(super) epoch: u64,
    /// Block and epoch of each that verifies.
    pub(super) good: Vec<(u64, u64)>,
    pub(super) unreadable: Vec<u64>,
}

/// The newest state that the anchor allows, as far as superblocks say.
pub(super) fn find_state(
    store: &dyn Store,
    anchor: &AnchorFields,
    grant: &VolumeGrant,
    kek: &Kek,
) -> Result<State, VolumeError> {
    let Superblocks { found, unreadable, missed } = find_superblocks(store)?;
    missed.map_or(Ok(()), Err)?;
    let (verified, damaged) = verify_superblocks(found, anchor, grant, kek)?;
    let good = verified.iter().map(|found| (found.at, found.superblock.epoch)).collect();
    let (chosen, epoch) = choose(verified, damaged, anchor, grant)?;
    Ok(State { chosen, epoch, good, unreadable })
}

/// What stands where superblocks may be.
pub(super) struct Superblocks {
    pub(super) found: Vec<Found>,
    /// Blocks that can't be read.
    pub(super) unreadable: Vec<u64>,
    /// The error of one whose twin was not found either: it may be the newest of all.
    pub(super) missed: Option<VolumeError>,
}

/// A superblock as found.
pub(super) struct Found {
    /// The block in which it lies.
    pub(super) at: u64,
    pub(super) place: usize,
    pub(super) superblock: Superblock,
    pub(super) block: Box<Block>,
}

/// Every superblock that can be parsed, at both ends.
pub(super) fn find_superblocks(store: &dyn Store) -> Result<Superblocks, VolumeError> {
    let blocks = store.len().map_err(VolumeError::store("say its length"))? / BLOCK as u64;
    // Where a copy may be, and of which slot.
    let mut places = vec![(0, 0), (1, 1)];
    let mut ends = vec![blocks];
    let (mut found, mut unreadable) = (Vec::<Found>::new(), Vec::new());
    let mut problem = VolumeError::NotAVolume;
    let mut next = 0;
    while next < places.len() {
        let (at, slot) = places[next];
        next += 1;
        // Ends that are one block apart name one block twice.
        if at >= blocks || found.iter().any(|found| found.at == at) {
            continue;
        }
        let mut block = zero_block();
        if let Err(error) = store.read_at(&mut block[..], at * BLOCK as u64) {
            unreadable.push((at, slot, error));
        } else if has_magic(&block) {
            ends.push(claimed_total(&block));
            match Superblock::parse(&block) {
                // Only it says where its end is: a store may be longer, and what is guessed from that belongs to the other slot.
                Ok(superblock) => {
                    match [0, 1].into_iter().find(|s| superblock.geometry.superblocks(*s).contains(&at)) {
                        Some(place) => found.push(Found { at, place, superblock, block }),
                        None => {
                            problem = VolumeError::Damaged(format!("a superblock in block {at}, where none belongs"))
                        }
                    }
                }
                Err(e) => {
                    problem = match claimed_version(&block) {
                        version if version > VERSION => VolumeError::Unsupported(format!("format version {version}")),
                        _ => VolumeError::Damaged(format!("superblock in block {at}: {e}")),
                    }
                }
            }
        }
        if next == 2 {
            // Both at the front are known: the others lie at the end, wherever that may be.
            ends.sort_unstable();
            ends.dedup();
            places.extend(ends.iter().filter(|e| (4..=blocks).contains(*e)).flat_map(|e| [(e - 2, 0), (e - 1, 1)]));
        }
    }
    let missed = unreadable.iter().position(|(_, slot, _)| found.iter().all(|found| found.place != *slot));
    let missed = missed.map(|missed| VolumeError::store("read")(unreadable.swap_remove(missed).2));
    if found.is_empty() {
        return Err(missed.unwrap_or(problem));
    }
    Ok(Superblocks { found, unreadable: unreadable.into_iter().map(|(at, ..)| at).collect(), missed })
}

/// Those that are of this volume and verify under its keys, and how many are this volume's but don't verify.
fn verify_superblocks(
    found: Vec<Found>,
    anchor: &AnchorFields,
    grant: &VolumeGrant,
    kek: &Kek,
) -> Result<(Vec<Found>, usize), VolumeError> {
    let mut problem = VolumeError::NotAVolume;
    let mut damaged = 0;
    let mut verified = Vec::new();
    for candidate in found {
        let superblock = &candidate.superblock;
        if superblock.uuid != grant.volume {
            problem = VolumeError::OtherVolume { found: superblock.uuid, expected: grant.volume };
            continue;
        }
        match kek.open(&superblock.slot, &grant.customer) {
            // The anchor says which key-encryption key opens what it names.
            Err(VolumeError::WrongKey) if anchor.kek != kek.id() => {
                if !matches!(problem, VolumeError::Damaged(_)) {
                    problem = VolumeError::WrongKey;
                }
                damaged += 1;
            }
            Err(VolumeError::WrongKey) => {
                let named = superblock.slot.kek;
                problem =
                    VolumeError::Damaged(format!("its key slot names key {named}, and its anchor {}", anchor.kek));
                damaged += 1;
            }
            Err(error @ VolumeError::Damaged(_)) => {
                problem = error;
                damaged += 1;
            }
            Err(other) => return Err(other),
            Ok(key) if superblock_verifies(&key, &candidate) => verified.push(candidate),
            Ok(_) => {
                problem = VolumeError::Damaged("its superblock does not verify".to_owned());
                damaged += 1;
            }
        }
    }
    if verified.is_empty() { Err(problem) } else { Ok((verified, damaged)) }
}

/// Leaves nothing of the key on the stack or in vector registers.
fn superblock_verifies(key: &VolumeKey, candidate: &Found) -> bool {
    let verifies = wiping_stack(|| same(&key.superblock_mac(&candidate.block), &candidate.superblock.mac));
    wipe_registers();
    verifies
}

/// The newest superblock that the anchor allows, and the highest epoch of all.
fn choose(
    verified: Vec<Found>,
    damaged: usize,
    anchor: &AnchorFields,
    grant: &VolumeGrant,
) -> Result<(Found, u64), VolumeError> {
    let writers = verified.iter().map(|f| f.superblock.writer).chain([anchor.writer]);
    let highest = writers.max().unwrap_or(anchor.writer);
    if grant.open_number <= highest {
        return Err(VolumeError::StaleOpenNumber { issued: grant.open_number.get(), highest: highest.get() });
    }
    let epoch = verified.iter().map(|f| f.superblock.epoch).max().unwrap_or(0);
    let newest = verified.iter().map(|f| (f.superblock.writer.get(), f.superblock.epoch)).max();
    let allowed = |f: &Found| {
        let s = &f.superblock;
        s.writer == anchor.writer && (s.epoch > anchor.epoch || s.is_named_by(anchor))
    };
    let chosen = verified.into_iter().filter(allowed).max_by_key(|f| f.superblock.epoch);
    let missing = || {
        let (writer, found) = newest.unwrap_or_default();
        VolumeError::RolledBack(format!(
            "its newest superblock is epoch {found} of writer {writer}, the anchor names epoch {} of writer {}{}",
            anchor.epoch,
            anchor.writer,
            if damaged > 0 { "; some of its superblocks are damaged" } else { "" },
        ))
    };
    chosen.map(|found| (found, epoch)).ok_or_else(missing)
}
