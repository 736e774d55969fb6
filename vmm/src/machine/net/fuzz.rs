//! The card's queues as a function of bytes, for fuzzing: guest memory in, whatever the driver wrote there.

use super::counters::Tally;
use super::feature;
use super::header::{ETHERNET, HEADER, LONGEST};
use super::port::Port;
use super::worker::{Card, Shared};
use crate::machine::rate::RateLimits;
use crate::machine::virtio::fuzzing::{Hostile, Place, QUEUE};
use crate::machine::virtio::{DeviceConfig, Serve};
use policy::device::MacAddress;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Receive, transmit and control queue.
const QUEUES: [Place; 3] =
    [QUEUE, Place { size: 16, at: [0x300, 0x400, 0x500] }, Place { size: 16, at: [0x600, 0x700, 0x800] }];
/// Each serves a batch of each queue; nobody makes more available but the device itself, by writing into its rings.
const ROUNDS: usize = 8;

/// A port that gives a few frames, and panics at one that no card sends, so that such a one shows.
struct Judge {
    frames: usize,
}

impl Port for Judge {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        assert!((HEADER + ETHERNET..=LONGEST).contains(&frame.len()), "{}", frame.len());
        assert!(frame[0] & !1 == 0 && frame[10..HEADER] == [0, 0], "{:?}", &frame[..HEADER]);
        Ok(())
    }
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.frames = self.frames.checked_sub(1).ok_or(io::ErrorKind::WouldBlock)?;
        let length = HEADER + [60, 1514, 9000][self.frames % 3];
        buffer[..length].fill(0);
        Ok(length)
    }
    fn offload(&mut self, features: u64) -> io::Result<()> {
        assert_eq!(features & !feature::GUEST_OFFLOADS, 0);
        Ok(())
    }
    fn set_active(&mut self, _active: bool) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Judge {
    fn as_fd(&self) -> BorrowedFd<'_> {
        rustix::stdio::stderr()
    }
}

/// Serves the queues in a guest whose memory begins with `data`.
pub fn fuzz_net(data: &[u8]) {
    serve(data);
}

/// Frames sent and received.
fn serve(data: &[u8]) -> (u64, u64) {
    let Some(hostile) = Hostile::new(data, &QUEUES) else { return (0, 0) };
    let shared = Arc::new(Shared { config: DeviceConfig::new(vec![0; 12]), tally: Tally::default() });
    let ports: Vec<Box<dyn Port>> = vec![Box::new(Judge { frames: 5 })];
    let mac = MacAddress::local([0; 6]);
    let mut card = Card::new(shared.clone(), mac, ports, RateLimits::default());
    let mut session = hostile.session(!feature::MQ);
    card.begin(&mut session);
    for _ in 0..ROUNDS {
        if !card.serve(&mut session).unwrap_or(false) {
            break;
        }
    }
    let counters = shared.tally.snapshot(0);
    (counters.tx_frames, counters.rx_frames)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::virtio::fuzzing::{Seed, mutate};
    use crate::machine::virtio::mock::WRITE;

    #[test]
    fn queues_and_their_mutations_are_survived() {
        for mut seed in Seed::both() {
            let [receive, transmit, control] = &QUEUES;
            for n in 0..4 {
                seed.chain(receive, &[(0x1000 + 0x800 * n, 0x800, WRITE)]);
            }
            // A frame that is sent as it is, and one to be cut.
            seed.put(0x900, &[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
            seed.chain(transmit, &[(0x3000, 12, 0), (0x3010, 60, 0)]);
            seed.chain(transmit, &[(0x900, 12, 0), (0x3010, 3000, 0)]);
            seed.put(0x980, &[1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
            seed.chain(control, &[(0x980, 2, 0), (0x982, 14, 0), (0x9c0, 1, WRITE)]);
            seed.put(0x9a0, &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
            seed.chain(control, &[(0x9a0, 10, 0), (0x9c1, 1, WRITE)]);
            assert_eq!(serve(&seed.memory), (2, 2));
            mutate(&seed.memory, 5_000, fuzz_net);
        }
    }
}
