//! One instance at most: when a VM may start again.

use crate::id::{HostId, InstanceNumber};
use serde::{Deserialize, Serialize};

/// What the TPM service says, inside the quote, of earlier VM processes of the same VM on this host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EarlierPeer {
    /// None lives.
    None,
    /// One lives.
    Lives,
    /// The service was started anew since the boot and can't know.
    Unknown,
}

/// The last instance, as the provider recorded it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LastInstance {
    /// Its number.
    pub number: InstanceNumber,
    /// Whether its authenticated end report came.
    pub ended: bool,
    /// The host it ran on (which has one AK).
    pub host: HostId,
    /// The TPM's resetCount when it started.
    pub reset_count: u32,
    /// Whether its lease and the margin after it are past.
    pub lease_past: bool,
}

/// Where the new instance would start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// The host, by its quote.
    pub host: HostId,
    /// The quote's resetCount.
    pub reset_count: u32,
    /// The service's word on earlier peers, by the quote.
    pub earlier_peer: EarlierPeer,
}

/// Another instance may still live.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("instance {0} of this VM may still run; end it, or wait until its lease is past")]
pub struct StillRuns(pub InstanceNumber);

/// Whether a new instance may be given, and its number: above the last one's and at least `floor` (which a restored
/// provider raises).
pub fn next(
    last: Option<&LastInstance>,
    candidate: &Candidate,
    floor: InstanceNumber,
) -> Result<InstanceNumber, StillRuns> {
    let Some(last) = last else { return Ok(floor) };
    let same_host = last.host == candidate.host;
    let proved_dead =
        (same_host && last.reset_count == candidate.reset_count && candidate.earlier_peer == EarlierPeer::None)
            || (same_host && candidate.reset_count > last.reset_count);
    if !(last.ended || proved_dead || last.lease_past) {
        return Err(StillRuns(last.number));
    }
    let next = InstanceNumber::try_from(last.number.get() + 1).map_err(|_| StillRuns(last.number))?;
    Ok(next.max(floor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::Digest;

    fn number(n: u64) -> InstanceNumber {
        InstanceNumber::try_from(n).expect("in range")
    }

    fn last() -> LastInstance {
        LastInstance {
            number: number(4),
            ended: false,
            host: HostId(Digest([1; 32])),
            reset_count: 7,
            lease_past: false,
        }
    }

    fn candidate(host: u8, reset_count: u32, earlier_peer: EarlierPeer) -> Candidate {
        Candidate { host: HostId(Digest([host; 32])), reset_count, earlier_peer }
    }

    #[test]
    fn a_second_instance_waits_until_the_first_is_surely_gone() {
        use EarlierPeer::*;
        let judge = |c| next(Some(&last()), &c, number(1));
        assert_eq!(judge(candidate(1, 7, Lives)), Err(StillRuns(number(4))));
        assert_eq!(judge(candidate(1, 7, Unknown)), Err(StillRuns(number(4))));
        assert_eq!(judge(candidate(2, 7, None)), Err(StillRuns(number(4))));
        assert_eq!(judge(candidate(2, 8, None)), Err(StillRuns(number(4))));
        assert_eq!(judge(candidate(1, 6, Unknown)), Err(StillRuns(number(4))));
        assert_eq!(judge(candidate(1, 7, None)), Ok(number(5)));
        assert_eq!(judge(candidate(1, 8, Unknown)), Ok(number(5)));
    }

    #[test]
    fn an_end_report_or_a_past_lease_frees_the_vm() {
        let elsewhere = candidate(2, 1, EarlierPeer::Unknown);
        assert_eq!(next(Some(&LastInstance { ended: true, ..last() }), &elsewhere, number(1)), Ok(number(5)));
        assert_eq!(next(Some(&LastInstance { lease_past: true, ..last() }), &elsewhere, number(1)), Ok(number(5)));
        assert_eq!(next(None, &elsewhere, number(9)), Ok(number(9)));
    }

    #[test]
    fn numbers_never_fall_below_the_floor() {
        assert_eq!(
            next(Some(&LastInstance { ended: true, ..last() }), &candidate(1, 7, EarlierPeer::None), number(99)),
            Ok(number(99))
        );
    }
}
