//! What tests of a store that lies share: a volume that lived twice, and what each of its blocks may hold.

use crate::common::{MIB, Provider, SimStore, lock};
use fealty_blockcrypt::{OpenOptions, Volume, VolumeError};
use policy::AnchorMode;
use std::sync::Arc;

pub(crate) const BLOCK: usize = 4096;
pub(crate) const SIZE: u64 = MIB;

/// A volume with data in its map and, if not closed, more in its log; and what each block may hold.
pub(crate) struct Scene {
    pub(crate) provider: Arc<Provider>,
    pub(crate) store: Arc<SimStore>,
    pub(crate) bytes: Vec<u8>,
    /// Each block's acknowledged content, then what is older but not older than the anchor.
    allowed: Vec<Vec<u8>>,
    /// Holds what the first life left.
    pub(crate) snapshot: u64,
}

pub(crate) fn fill(lba: u64, round: u8) -> Vec<u8> {
    let mut block = vec![round; BLOCK];
    block[..8].copy_from_slice(&lba.to_le_bytes());
    block
}

/// Two lives: the first fills every other block and closes, the second overwrites some and discards others, with FLUSHes, and
/// dies.
pub(crate) fn scene(mode: AnchorMode) -> Scene {
    let (provider, store) = (Provider::new(mode), SimStore::new());
    let volume = provider.create(store.clone(), SIZE).expect("a volume");
    let mut allowed = vec![vec![0]; (SIZE as usize) / BLOCK];
    for lba in (0..SIZE / BLOCK as u64).step_by(2) {
        volume.write(lba * BLOCK as u64, &fill(lba, 1)).expect("written");
        allowed[lba as usize] = vec![1];
    }
    volume.close().expect("closed");
    drop(volume);
    let volume = provider.open(store.clone()).expect("opens");
    let snapshot = volume.take_snapshot("first").expect("taken");
    for round in 2..8 {
        for lba in (0..40).map(|i| (i * 7 + u64::from(round)) % 200) {
            volume.write(lba * BLOCK as u64, &fill(lba, round)).expect("written");
            if mode == AnchorMode::Flush {
                allowed[lba as usize] = vec![round];
            } else {
                allowed[lba as usize].push(round);
            }
        }
        let gone = u64::from(round) * 30..u64::from(round) * 30 + 5;
        volume.discard(gone.start * BLOCK as u64, 5 * BLOCK as u64).expect("discarded");
        for lba in gone {
            if mode == AnchorMode::Flush {
                allowed[lba as usize] = vec![0];
            } else {
                allowed[lba as usize].push(0);
            }
        }
        volume.flush().expect("flushed");
    }
    drop(volume);
    let bytes = store.bytes();
    Scene { provider, store, bytes, allowed, snapshot }
}

impl Scene {
    /// Opens over `bytes`; every block that can be read must be one that is allowed. Says how it went.
    #[track_caller]
    pub(crate) fn judge(&self, bytes: Vec<u8>, what: &str) -> Outcome {
        self.store.set(bytes);
        let anchor = self.provider.anchor();
        let opened = self.provider.open_read_only(self.store.clone());
        let outcome = match opened {
            Err(error) => {
                assert!(error.is_integrity(), "{what}: {error}");
                Outcome::Refused(error)
            }
            Ok(volume) => self.read_all(&volume, what),
        };
        *lock(&self.provider.anchor) = anchor;
        outcome
    }

    /// The same for the snapshot, whose blocks may hold one thing only.
    #[track_caller]
    pub(crate) fn judge_snapshot(&self, bytes: Vec<u8>, what: &str) -> Outcome {
        self.store.set(bytes);
        let options = OpenOptions { snapshot: Some(self.snapshot), ..OpenOptions::default() };
        let opened = self.provider.open_with(self.store.clone(), &self.provider.grant(), options);
        let volume = match opened {
            Err(error) => {
                assert!(error.is_integrity(), "{what}: {error}");
                return Outcome::Refused(error);
            }
            Ok(volume) => volume,
        };
        let mut bad = 0;
        for lba in 0..SIZE / BLOCK as u64 {
            let mut found = vec![0xee; BLOCK];
            match volume.read(lba * BLOCK as u64, &mut found) {
                Ok(()) if lba % 2 == 0 => assert!(found == fill(lba, 1), "{what}: block {lba}"),
                Ok(()) => assert!(found == [0; BLOCK], "{what}: block {lba}"),
                Err(error) => {
                    assert!(error.is_integrity(), "{what}: {error}");
                    bad += 1;
                }
            }
        }
        if bad == 0 { Outcome::Whole } else { Outcome::Bad }
    }

    /// Reads each block alone, and then all together: what one of them is, is the same.
    fn read_all(&self, volume: &Volume, what: &str) -> Outcome {
        let mut alone = vec![vec![0xee; BLOCK]; self.allowed.len()];
        let at = |lba: usize| (lba * BLOCK) as u64;
        let each: Vec<_> = alone.iter_mut().enumerate().map(|(lba, found)| volume.read(at(lba), found)).collect();
        let mut together = vec![vec![0xee; BLOCK]; self.allowed.len()];
        let mut asked: Vec<(u64, &mut [u8])> =
            together.iter_mut().enumerate().map(|(lba, found)| (at(lba), found.as_mut_slice())).collect();
        let all = volume.read_many(&mut asked);
        for ((lba, one), many) in each.iter().enumerate().zip(&all) {
            let same = match (one, many) {
                (Ok(()), Ok(())) => true,
                (Err(VolumeError::Integrity { lba: one }), Err(VolumeError::Integrity { lba: many })) => {
                    (*one, *many) == (lba as u64, lba as u64)
                }
                (Err(one), Err(many)) => one.to_string() == many.to_string(),
                _ => false,
            };
            assert!(same && alone[lba] == together[lba], "{what}: block {lba}: {one:?}, with others {many:?}");
        }
        let mut bad = 0;
        for ((lba, allowed), (done, found)) in self.allowed.iter().enumerate().zip(all.into_iter().zip(together)) {
            match done {
                Ok(()) => {
                    let round = found[BLOCK - 1];
                    let right = if round == 0 { vec![0; BLOCK] } else { fill(lba as u64, round) };
                    assert!(found == right && allowed.contains(&round), "{what}: block {lba} holds {round}");
                }
                Err(error) => {
                    assert!(error.is_integrity(), "{what}: {error}");
                    assert!(found.iter().all(|b| *b == 0), "{what}: an error leaves no bytes");
                    bad += 1;
                }
            }
        }
        if bad == 0 { Outcome::Whole } else { Outcome::Bad }
    }
}

#[derive(Debug)]
pub(crate) enum Outcome {
    Refused(VolumeError),
    Bad,
    Whole,
}
