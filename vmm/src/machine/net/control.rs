//! The control queue (virtio 1.3, 5.1.6.5): class u8, command u8, data; and one byte for the answer.

use super::feature;
use super::filter::Address;
use std::collections::BTreeSet;

/// The longest request that is read; more addresses than fit into it nobody sets.
pub(super) const REQUEST_MAX: usize = 4096;
pub(super) const ACK: u8 = 0;
pub(super) const ERROR: u8 = 1;

const CLASS_RX: u8 = 0;
const RX_PROMISC: u8 = 0;
const RX_ALLMULTI: u8 = 1;
const CLASS_MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const CLASS_MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;
const CLASS_OFFLOADS: u8 = 5;
const OFFLOADS_SET: u8 = 0;

/// What the driver wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Command {
    Promiscuous(bool),
    AllMulticast(bool),
    Tables {
        unicast: BTreeSet<Address>,
        multicast: BTreeSet<Address>,
    },
    Address(Address),
    /// So many pairs of queues, from 1 up to what the device has.
    Pairs(u16),
    /// These of the negotiated guest offloads.
    Offloads(u64),
}

impl Command {
    /// The command in `request`; none if it is none, or not one that was negotiated by a device of `pairs` pairs.
    pub(super) fn parse(request: &[u8], features: u64, pairs: u16) -> Option<Self> {
        let has = |bit: u64| features & bit != 0;
        let [class, command, data @ ..] = request else { return None };
        match (*class, *command) {
            (CLASS_RX, RX_PROMISC) if has(feature::CTRL_RX) => flag(data).map(Self::Promiscuous),
            (CLASS_RX, RX_ALLMULTI) if has(feature::CTRL_RX) => flag(data).map(Self::AllMulticast),
            (CLASS_MAC, MAC_TABLE_SET) if has(feature::CTRL_RX) => {
                let (unicast, rest) = table(data)?;
                let (multicast, rest) = table(rest)?;
                rest.is_empty().then_some(Self::Tables { unicast, multicast })
            }
            (CLASS_MAC, MAC_ADDR_SET) if has(feature::CTRL_MAC_ADDR) => {
                let address: Address = data.try_into().ok()?;
                (address[0] & 1 == 0).then_some(Self::Address(address))
            }
            (CLASS_MQ, MQ_PAIRS_SET) if has(feature::MQ) => {
                let wanted = u16::from_le_bytes(data.try_into().ok()?);
                (1..=pairs).contains(&wanted).then_some(Self::Pairs(wanted))
            }
            (CLASS_OFFLOADS, OFFLOADS_SET) if has(feature::CTRL_GUEST_OFFLOADS) => {
                let wanted = u64::from_le_bytes(data.try_into().ok()?);
                let known = features & feature::GUEST_OFFLOADS;
                (wanted & !known == 0).then_some(Self::Offloads(wanted))
            }
            _ => None,
        }
    }
}

fn flag(data: &[u8]) -> Option<bool> {
    match data {
        [0] => Some(false),
        [1] => Some(true),
        _ => None,
    }
}

/// A table of addresses, and what follows it: their number u32, then each.
fn table(data: &[u8]) -> Option<(BTreeSet<Address>, &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let length = usize::try_from(u32::from_le_bytes(*count)).ok()?.checked_mul(6)?;
    let (addresses, rest) = rest.split_at_checked(length)?;
    let (addresses, _) = addresses.as_chunks();
    Some((addresses.iter().copied().collect(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: u64 = u64::MAX;

    #[test]
    fn commands_are_what_they_say() {
        let parse = |request: &[u8]| Command::parse(request, ALL, 4);
        assert_eq!(parse(&[0, 0, 1]), Some(Command::Promiscuous(true)));
        assert_eq!(parse(&[0, 1, 0]), Some(Command::AllMulticast(false)));
        assert_eq!(parse(&[1, 1, 2, 0, 0, 0, 0, 9]), Some(Command::Address([2, 0, 0, 0, 0, 9])));
        assert_eq!(parse(&[4, 0, 4, 0]), Some(Command::Pairs(4)));
        assert_eq!(parse(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), Some(Command::Offloads(feature::GUEST_CSUM)));
        let tables = [&[1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 1, 1, 0, 0, 0][..], &[0x33, 0x33, 0, 0, 0, 1]].concat();
        let set = |address| BTreeSet::from([address]);
        let (unicast, multicast) = (set([2, 0, 0, 0, 0, 1]), set([0x33, 0x33, 0, 0, 0, 1]));
        assert_eq!(parse(&tables), Some(Command::Tables { unicast, multicast }));
        let bad: [&[u8]; 14] = [
            &[],
            &[0],
            &[0, 0],
            &[0, 0, 2],
            &[0, 0, 1, 1],
            &[0, 9, 1],
            &[1, 1, 3, 0, 0, 0, 0, 9],
            &[1, 1, 2, 0, 0, 0, 0],
            &[1, 0, 255, 255, 255, 255],
            &[1, 0, 0, 0, 0, 0],
            &[4, 0, 0, 0],
            &[4, 0, 5, 0],
            &[5, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[9, 0],
        ];
        for request in bad {
            assert_eq!(parse(request), None, "{request:?}");
        }
        for request in [&[0, 0, 1][..], &[1, 1, 2, 0, 0, 0, 0, 9], &[4, 0, 1, 0], &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(Command::parse(request, 0, 4), None, "not negotiated: {request:?}");
        }
    }

    proptest! {
        #[test]
        fn any_request_is_judged(request in prop::collection::vec(any::<u8>(), 0..64), features: u64, pairs: u16) {
            if let Some(Command::Pairs(wanted)) = Command::parse(&request, features, pairs) {
                prop_assert!(wanted > 0 && wanted <= pairs);
            }
        }
    }
}
