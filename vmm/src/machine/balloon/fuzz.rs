//! The balloon's queues as a function of bytes, for fuzzing: guest memory in, whatever the driver wrote there.

use super::counters::Tally;
use super::worker::Balloon;
use crate::machine::virtio::Serve;
use crate::machine::virtio::fuzzing::{Hostile, Place, QUEUE};
use std::sync::Arc;

const QUEUES: [Place; 3] =
    [QUEUE, Place { size: 16, at: [0x300, 0x400, 0x500] }, Place { size: 16, at: [0x600, 0x700, 0x800] }];
/// A queue holds no more at once. Giving back a page with rings in it makes them zero, so that none comes again.
const ROUNDS: usize = 16;

/// Serves the queues in a guest whose memory begins with `data`.
pub fn fuzz_balloon(data: &[u8]) {
    serve(data);
}

/// Pages taken, given back, and bytes reported.
fn serve(data: &[u8]) -> (u64, u64, u64) {
    let Some(hostile) = Hostile::new(data, &QUEUES) else { return (0, 0, 0) };
    let tally = Arc::new(Tally::default());
    let mut balloon = Balloon::new(tally.clone());
    let mut session = hostile.session(0);
    for _ in 0..ROUNDS {
        if !balloon.serve(&mut session).unwrap_or(false) {
            break;
        }
    }
    let counters = tally.snapshot(0);
    (counters.inflated_pages, counters.deflated_pages, counters.reported_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::virtio::fuzzing::{Seed, mutate};
    use crate::machine::virtio::mock::WRITE;

    #[test]
    fn queues_and_their_mutations_are_survived() {
        for mut seed in Seed::both() {
            let [inflate, deflate, report] = &QUEUES;
            seed.put(0x900, &[2, 0, 0, 0, 3, 0, 0, 0]);
            seed.chain(inflate, &[(0x900, 8, 0)]);
            seed.chain(deflate, &[(0x900, 4, 0), (0x904, 4, 0)]);
            seed.chain(report, &[(0x4000, 0x2000, WRITE), (0x6800, 0x1000, WRITE)]);
            assert_eq!(serve(&seed.memory), (2, 2, 0x2000));
            mutate(&seed.memory, 5_000, fuzz_balloon);
        }
    }
}
