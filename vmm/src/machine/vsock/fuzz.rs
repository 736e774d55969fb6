//! The queues of the sockets as a function of bytes, for fuzzing: guest memory in, whatever the driver wrote there.

use super::counters::Tally;
use super::worker::Switchboard;
use crate::machine::virtio::Serve;
use crate::machine::virtio::fuzzing::{Hostile, Place, QUEUE};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::sync::Arc;

const QUEUES: [Place; 2] = [QUEUE, Place { size: 16, at: [0x300, 0x400, 0x500] }];
const ROUNDS: usize = 16;
const CID: u64 = 3;
/// A client waits for connections to this port.
const PORT: u32 = 5;

/// Serves the queues in a guest whose memory begins with `data`.
pub fn fuzz_vsock(data: &[u8]) {
    serve(data);
}

/// Connections made, and bytes from the guest.
fn serve(data: &[u8]) -> (u64, u64) {
    let Some(hostile) = Hostile::new(data, &QUEUES) else { return (0, 0) };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let Ok((_client, ours)) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None) else { return (0, 0) };
    let tally = Arc::new(Tally::default());
    let mut board = Switchboard::new(tally.clone(), CID, None);
    board.let_wait(PORT, ours);
    let mut session = hostile.session(0);
    board.begin(&mut session);
    for _ in 0..ROUNDS {
        if !board.serve(&mut session).unwrap_or(false) {
            break;
        }
    }
    let counters = tally.snapshot(0);
    (counters.connections, counters.output_bytes)
}

#[cfg(test)]
mod tests {
    use super::super::packet::{HOST_CID, Header, Op, STREAM};
    use super::*;
    use crate::machine::virtio::fuzzing::{Seed, mutate};
    use crate::machine::virtio::mock::WRITE;

    #[test]
    fn queues_and_their_mutations_are_survived() {
        for mut seed in Seed::both() {
            let [receive, transmit] = &QUEUES;
            seed.chain(receive, &[(0x2000, 200, WRITE)]);
            seed.chain(receive, &[(0x2800, 44, WRITE), (0x2900, 100, WRITE)]);
            let packets = [(Op::Request, 0), (Op::Data, 20), (Op::CreditRequest, 0), (Op::Shutdown, 0)];
            for ((op, len), at) in packets.into_iter().zip((0x600..).step_by(0x80)) {
                let header = Header {
                    src_cid: CID,
                    dst_cid: HOST_CID,
                    src_port: 9,
                    dst_port: PORT,
                    len,
                    kind: STREAM,
                    op: Some(op),
                    flags: 3,
                    buf_alloc: 4096,
                    fwd_cnt: 0,
                };
                seed.put(at, &header.bytes());
                seed.chain(transmit, &[(at, 44, 0), (0x1000, len, 0)]);
            }
            assert_eq!(serve(&seed.memory), (1, 20));
            mutate(&seed.memory, 5_000, fuzz_vsock);
        }
    }
}
