//! Reading a volume, and going on past what can't be read of it.

use super::blocks::BLOCK;
use super::check::{Finding, Findings};
use super::error::ToolError;
use super::report::{self, Reporter};
use blockcrypt::{Volume, VolumeError};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Reads a volume, from several threads.
pub(crate) struct Reader<'a> {
    pub(crate) volume: &'a Volume,
    /// What can't be read, if that is no reason to stop.
    lost: Option<Mutex<Lost>>,
}

struct Lost {
    findings: Findings,
    blocks: u64,
}

impl<'a> Reader<'a> {
    /// One that stops at the first block that can't be read.
    pub(crate) fn strict(volume: &'a Volume) -> Self {
        Self { volume, lost: None }
    }

    /// One that gives zeroes for such blocks, and names them on standard error.
    pub(crate) fn salvaging(volume: &'a Volume, report: Reporter) -> Self {
        Self { volume, lost: Some(Mutex::new(Lost { findings: Findings::aside(report), blocks: 0 })) }
    }

    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), VolumeError> {
        self.read_many(&mut [(offset, buffer)]).pop().unwrap_or(Ok(()))
    }

    /// Several reads at once, as [`Volume::read_many`].
    pub(crate) fn read_many(&self, requests: &mut [(u64, &mut [u8])]) -> Vec<Result<(), VolumeError>> {
        let done = self.volume.read_many(requests);
        let Some(lost) = &self.lost else { return done };
        let again = |(done, (offset, buffer)): (Result<(), VolumeError>, &mut (u64, &mut [u8]))| match done {
            Err(error) if is_loss(&error) => self.read_block_by_block(*offset, buffer, lost),
            done => done,
        };
        done.into_iter().zip(requests).map(again).collect()
    }

    fn read_block_by_block(&self, offset: u64, buffer: &mut [u8], lost: &Mutex<Lost>) -> Result<(), VolumeError> {
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let within = BLOCK - (at % BLOCK as u64) as usize;
            let (piece, behind) = rest.split_at_mut(within.min(rest.len()));
            match self.volume.read(at, piece) {
                Err(error) if is_loss(&error) => {
                    piece.fill(0);
                    lock(lost).add(at / BLOCK as u64, &error);
                }
                done => done?,
            }
            at += piece.len() as u64;
            rest = behind;
        }
        Ok(())
    }

    /// How many blocks could not be read, all of them named now.
    pub(crate) fn finish(self) -> Result<u64, ToolError> {
        let Some(lost) = self.lost else { return Ok(0) };
        let Lost { findings, blocks } = lost.into_inner().unwrap_or_else(PoisonError::into_inner);
        findings.end().map(|()| blocks)
    }
}

impl Lost {
    fn add(&mut self, block: u64, error: &VolumeError) {
        self.blocks += 1;
        self.findings.add(Finding::bad(block, None, reason(error)));
    }
}

fn lock(lost: &Mutex<Lost>) -> MutexGuard<'_, Lost> {
    lost.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether only what was asked for is lost, and not the volume.
fn is_loss(error: &VolumeError) -> bool {
    matches!(error, VolumeError::Integrity { .. } | VolumeError::Damaged(_) | VolumeError::Store(..))
}

/// The same for each block, so that neighbours are told of together.
fn reason(error: &VolumeError) -> String {
    match error {
        VolumeError::Integrity { .. } => "fails its integrity check".to_owned(),
        VolumeError::Damaged(_) => "what leads to it in the map is damaged".to_owned(),
        other => report::chain(other),
    }
}
