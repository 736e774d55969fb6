//! What wakes a card, and what it does then: a bounded number of frames of each pair of queues in turn, so that none starves
//! another.

use super::control::{ACK, Command, ERROR, REQUEST_MAX};
use super::counters::Tally;
use super::feature;
use super::filter::Filter;
use super::port::Port;
use super::receive::Receive;
use super::transmit::Transmit;
use crate::machine::rate::{RateLimiter, RateLimits};
use crate::machine::virtio::{Chain, DeviceConfig, RingError, Serve, Session, Virtqueue};
use policy::device::MacAddress;
use rustix::event::{PollFd, PollFlags};
use std::sync::Arc;
use std::time::Duration;

/// Frames of one queue in one piece of work.
pub(super) const BATCH: usize = 32;
/// Where `status` lies in the configuration, and its bit for a link that is up (5.1.4).
const STATUS_AT: usize = 6;
pub(super) const LINK_UP: u8 = 1;

/// What the device and its thread share.
pub(super) struct Shared {
    pub(super) config: DeviceConfig,
    pub(super) tally: Tally,
}

/// The card, on its thread.
pub(super) struct Card {
    shared: Arc<Shared>,
    address: MacAddress,
    filter: Filter,
    pairs: Vec<Pair>,
    /// Pairs in use: the first ones.
    active: usize,
    chain: Chain,
    /// Limits of each direction, for all pairs together.
    limits: [RateLimiter; 2],
}

struct Pair {
    port: Box<dyn Port>,
    /// Whether the driver set its receive queue up.
    receives: bool,
    transmit: Transmit,
    receive: Receive,
}

impl Card {
    /// A card with a pair of queues for each port.
    pub(super) fn new(shared: Arc<Shared>, address: MacAddress, ports: Vec<Box<dyn Port>>, limits: RateLimits) -> Self {
        let limits = [RateLimiter::new(limits), RateLimiter::new(limits)];
        let pair = |port| Pair { port, receives: false, transmit: Transmit::default(), receive: Receive::default() };
        let pairs = ports.into_iter().map(pair).collect();
        let filter = Filter::new(address.bytes());
        Self { shared, address, filter, pairs, active: 1, chain: Chain::default(), limits }
    }

    /// The control queue's index: behind all pairs that the driver knows of (5.1.2).
    fn control_index(&self, features: u64) -> usize {
        if features & feature::MQ != 0 { 2 * self.pairs.len() } else { 2 }
    }

    /// Serves the next request on the control queue.
    fn control(&mut self, queue: &mut Virtqueue, features: u64) -> Result<bool, RingError> {
        queue.hush()?;
        if !queue.next(&mut self.chain)? {
            return queue.listen();
        }
        let (asked, room) = (self.chain.readable_length(), self.chain.writable_length());
        if asked < 2 || room < 1 {
            return Err(queue.give_up());
        }
        let answer = if self.obey(queue, asked, features) { ACK } else { ERROR };
        if !self.chain.copy_out(queue.memory(), 0, &[answer]) {
            return Err(queue.give_up());
        }
        queue.complete(&self.chain, 1)?;
        queue.signal()?;
        Ok(true)
    }

    /// Does what the request in the chain asks for; false if it can't be done.
    fn obey(&mut self, queue: &Virtqueue, asked: u64, features: u64) -> bool {
        let Some(length) = usize::try_from(asked).ok().filter(|length| *length <= REQUEST_MAX) else { return false };
        let mut request = vec![0; length];
        let pairs = self.pairs.len() as u16;
        let read = self.chain.copy_in(queue.memory(), 0, &mut request);
        let Some(command) = Command::parse(&request, features, pairs).filter(|_| read) else { return false };
        match command {
            Command::Promiscuous(on) => self.filter.promiscuous = on,
            Command::AllMulticast(on) => self.filter.all_multicast = on,
            Command::Tables { unicast, multicast } => {
                (self.filter.unicast, self.filter.multicast) = (unicast, multicast);
            }
            Command::Address(address) => self.set_address(address),
            Command::Pairs(count) => return self.set_active(usize::from(count)),
            Command::Offloads(offloads) => return self.offload(offloads),
        }
        true
    }

    fn set_address(&mut self, address: [u8; 6]) {
        self.filter.address = address;
        self.shared.config.change(|config| config[..6].copy_from_slice(&address));
    }

    /// Uses the first `count` pairs; the host spreads frames over their ports.
    fn set_active(&mut self, count: usize) -> bool {
        let mut done = true;
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            done &= pair.port.set_active(index < count).is_ok();
        }
        if done {
            self.active = count;
        }
        done
    }

    /// Offloads are the TAP's: one port speaks for all, also for those that are detached.
    fn offload(&mut self, features: u64) -> bool {
        self.pairs.first_mut().is_some_and(|pair| pair.port.offload(features).is_ok())
    }
}

impl Serve for Card {
    fn begin(&mut self, session: &mut Session) {
        self.filter = Filter::new(self.address.bytes());
        let address = self.address.bytes();
        self.shared.config.change(|config| config[..6].copy_from_slice(&address));
        self.pairs.iter_mut().for_each(|pair| pair.receive.begin());
        // A port that can't do it gives frames that the driver did not ask for, which `Header::from_host` drops.
        self.offload(session.features & feature::GUEST_OFFLOADS);
        self.set_active(1);
    }

    fn serve(&mut self, session: &mut Session) -> Result<bool, RingError> {
        let features = session.features;
        let control = self.control_index(features);
        let mut more = false;
        if features & feature::CTRL_VQ != 0
            && let Some(Some(queue)) = session.queues.get_mut(control)
        {
            more |= self.control(queue, features)?;
        }
        let tally = &self.shared.tally;
        let [transmitted, received] = &self.limits;
        for (index, pair) in self.pairs.iter_mut().take(self.active).enumerate() {
            let port = pair.port.as_mut();
            if let Some(Some(queue)) = session.queues.get_mut(2 * index + 1) {
                more |= pair.transmit.serve(queue, port, transmitted, features, tally)?;
            }
            pair.receives = false;
            if let Some(Some(queue)) = session.queues.get_mut(2 * index) {
                pair.receives = true;
                more |= pair.receive.serve(queue, port, received, &self.filter, features, tally)?;
            }
        }
        if self.pairs.iter().any(|pair| pair.receive.lost) {
            self.shared.config.change(|config| config[STATUS_AT] &= !LINK_UP);
        }
        Ok(more)
    }

    fn interest<'a>(&'a self, descriptors: &mut Vec<PollFd<'a>>) -> Option<Duration> {
        let mut time: Option<Duration> = None;
        for pair in self.pairs.iter().take(self.active) {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, pair.receives && pair.receive.awaits_frames());
            flags.set(PollFlags::OUT, pair.transmit.stuck);
            if !flags.is_empty() {
                descriptors.push(PollFd::from_borrowed_fd(pair.port.as_fd(), flags));
            }
            let closed = [pair.transmit.closed, pair.receive.closed];
            time = closed.into_iter().flatten().chain(time).min();
        }
        time
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
