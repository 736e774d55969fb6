//! The source's queue as a function of bytes, for fuzzing: guest memory in, whatever the driver wrote there.

use super::counters::Tally;
use super::worker::{LIMIT, Source};
use crate::machine::virtio::fuzzing::{Hostile, QUEUE};
use std::sync::Arc;

/// Serves the queue in a guest whose memory begins with `data`.
pub fn fuzz_rng(data: &[u8]) {
    serve(data);
}

/// How many requests were answered.
fn serve(data: &[u8]) -> usize {
    let Some(mut hostile) = Hostile::new(data, &[QUEUE]) else { return 0 };
    let mut source = Source::new(Arc::new(Tally::default()), LIMIT);
    let queue = &mut hostile.queues[0];
    // A queue holds no more at once, and nobody adds any.
    (0..QUEUE.size).take_while(|_| matches!(source.serve_next(queue), Ok(true))).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::virtio::fuzzing::{Seed, mutate};
    use crate::machine::virtio::mock::WRITE;

    #[test]
    fn requests_and_their_mutations_are_survived() {
        for mut seed in Seed::both() {
            seed.chain(&QUEUE, &[(0x1000, 64, WRITE)]);
            seed.chain(&QUEUE, &[(0x1000, 5000, WRITE), (0x3000, 1, WRITE)]);
            assert_eq!(serve(&seed.memory), 2);
            mutate(&seed.memory, 10_000, fuzz_rng);
        }
    }
}
