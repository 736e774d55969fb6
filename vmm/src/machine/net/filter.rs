//! Which frames the guest wants (virtio 1.3, 5.1.6.5.1 and 5.1.6.5.2).

use std::collections::BTreeSet;

/// An Ethernet address, of a card or of a group.
pub(super) type Address = [u8; 6];

const BROADCAST: Address = [0xff; 6];

/// The receive filter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Filter {
    pub(super) address: Address,
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) unicast: BTreeSet<Address>,
    pub(super) multicast: BTreeSet<Address>,
}

impl Filter {
    /// The filter of a card with this address: everything passes until a driver says otherwise.
    pub(super) fn new(address: Address) -> Self {
        let (unicast, multicast) = Default::default();
        Self { address, promiscuous: true, all_multicast: false, unicast, multicast }
    }

    /// Whether a frame to `destination` passes.
    pub(super) fn passes(&self, destination: Address) -> bool {
        let group = destination[0] & 1 != 0;
        match group {
            _ if self.promiscuous || destination == BROADCAST => true,
            true => self.all_multicast || self.multicast.contains(&destination),
            false => destination == self.address || self.unicast.contains(&destination),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_passes() {
        let own = [2, 0, 0, 0, 0, 1];
        let (other, group) = ([2, 0, 0, 0, 0, 2], [0x33, 0x33, 0, 0, 0, 1]);
        let mut filter = Filter::new(own);
        assert!([own, other, group, BROADCAST].into_iter().all(|to| filter.passes(to)));
        filter.promiscuous = false;
        assert!(filter.passes(own) && filter.passes(BROADCAST) && !filter.passes(other) && !filter.passes(group));
        filter.unicast.insert(other);
        filter.multicast.insert(group);
        assert!(filter.passes(other) && filter.passes(group));
        filter.multicast.clear();
        filter.all_multicast = true;
        assert!(filter.passes(group));
    }
}
