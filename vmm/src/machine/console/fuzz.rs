//! The console's queues as a function of bytes, for fuzzing: guest memory in, whatever the driver wrote there.

use super::counters::Tally;
use super::line::Line;
use super::worker::Carrier;
use crate::machine::ConsoleBackend;
use crate::machine::virtio::Serve;
use crate::machine::virtio::fuzzing::{Hostile, Place, QUEUE};
use std::sync::Arc;

const QUEUES: [Place; 2] = [QUEUE, Place { size: 16, at: [0x300, 0x400, 0x500] }];
/// A piece of 256 bytes each: all that is sent in the seed, and of longer chains the beginning.
const ROUNDS: usize = 512;

/// Serves the queues in a guest whose memory begins with `data`.
pub fn fuzz_console(data: &[u8]) {
    serve(data);
}

/// Bytes that the guest sent.
fn serve(data: &[u8]) -> u64 {
    let Some(hostile) = Hostile::new(data, &QUEUES) else { return 0 };
    let tally = Arc::new(Tally::default());
    let backend = ConsoleBackend { input: None, output: Box::new(std::io::sink()) };
    let mut carrier = Carrier::new(tally.clone(), Line::Backend(backend));
    let mut session = hostile.session(0);
    carrier.begin(&mut session);
    for _ in 0..ROUNDS {
        if !carrier.serve(&mut session).unwrap_or(false) {
            break;
        }
    }
    tally.snapshot(0).output_bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::virtio::fuzzing::{Seed, mutate};
    use crate::machine::virtio::mock::WRITE;

    #[test]
    fn queues_and_their_mutations_are_survived() {
        for mut seed in Seed::both() {
            let [receive, transmit] = &QUEUES;
            seed.chain(receive, &[(0x1000, 64, WRITE)]);
            seed.chain(transmit, &[(0x1000, 64, 0), (0x2000, 5000, 0)]);
            seed.chain(transmit, &[(0x1000, 1, 0)]);
            assert_eq!(serve(&seed.memory), 5065);
            mutate(&seed.memory, 5_000, fuzz_console);
        }
    }
}
