//! Packets into frames, each at most once.

use crate::key::{Binding, DirectionKey, Forged, KeyError, Role};
use crate::packet::{HEADER, Header, OFFLOAD, Offload, PacketError, TAG};
use crate::window::{ReplayWindow, Seen};
use secretmem::Secret;
use std::sync::{Mutex, PoisonError};

/// The receiving end of one direction of a session, under one key. Shared by the receiver's threads.
pub struct Opener {
    key: DirectionKey,
    /// A window for each of the sender's queues from which a packet has verified.
    windows: Box<[Mutex<Option<Box<ReplayWindow>>>; 256]>,
}

/// A frame as it was sealed, decrypted in the packet's own bytes.
#[derive(PartialEq, Eq, Debug)]
pub struct Opened<'a> {
    /// The sender's queue.
    pub queue: u8,
    /// Its number there: frames of one queue were sealed in this order.
    pub counter: u64,
    /// What is left to do.
    pub offload: Offload,
    /// The Ethernet frame.
    pub frame: &'a mut [u8],
}

/// Why a packet was dropped. None of it gets an answer on the network.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OpenError {
    /// Not of this format.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// For another network, phase or key id.
    #[error("a packet under another key")]
    OtherKey,
    /// Its tag does not verify.
    #[error("a forged or damaged packet")]
    Forged,
    /// It came before, or lies behind the window.
    #[error("a packet that was replayed, or is too old to tell")]
    Replayed,
}

impl Opener {
    /// The receiving end of what `sender` sends.
    pub fn new(session: &Secret<32>, sender: Role, binding: Binding) -> Result<Self, KeyError> {
        let key = DirectionKey::derive(session, sender, binding)?;
        Ok(Self { key, windows: Box::new([const { Mutex::new(None) }; 256]) })
    }

    /// Opens a packet in its place. On an error its bytes are as they came, but for a frame whose tag verified and whose
    /// offload fields or number are then refused.
    pub fn open<'a>(&self, packet: &'a mut [u8]) -> Result<Opened<'a>, OpenError> {
        let header = Header::parse(packet)?;
        let Header { number, .. } = header;
        if self.key.binding().header(number) != header {
            return Err(OpenError::OtherKey);
        }
        self.look(header)?;
        let length = PacketError::Length(packet.len());
        let (head, rest) = packet.split_at_mut(HEADER);
        let (text, tag) = rest.split_last_chunk_mut::<TAG>().ok_or(length)?;
        self.key.decrypt(number, head, text, tag).map_err(|Forged| OpenError::Forged)?;
        self.accept(header)?;
        let (offload, frame) = text.split_first_chunk_mut::<OFFLOAD>().ok_or(PacketError::Offload)?;
        let offload = Offload::parse(offload, frame.len())?;
        Ok(Opened { queue: number.queue(), counter: number.counter(), offload, frame })
    }

    /// Drops what was seen before any work is spent on it. Changes nothing: the number is not authentic yet.
    fn look(&self, header: Header) -> Result<(), OpenError> {
        let window = self.windows[usize::from(header.number.queue())].lock().unwrap_or_else(PoisonError::into_inner);
        let seen = window.as_ref().map_or(Seen::No, |w| w.look(header.number.counter()));
        if seen == Seen::No { Ok(()) } else { Err(OpenError::Replayed) }
    }

    /// Takes the number of a packet that verified; of several threads with the same packet, one succeeds.
    fn accept(&self, header: Header) -> Result<(), OpenError> {
        let mut window =
            self.windows[usize::from(header.number.queue())].lock().unwrap_or_else(PoisonError::into_inner);
        match window.get_or_insert_with(Box::default).accept(header.number.counter()) {
            Seen::No => Ok(()),
            Seen::Yes | Seen::TooOld => Err(OpenError::Replayed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{PacketNumber, sealed_len};
    use crate::seal::Sealer;
    use crate::window::WINDOW;
    use proptest::prelude::*;

    const BINDING: Binding = Binding { network: 0x0708, phase: 3, key_id: 0x0102_0304 };

    fn ends() -> (Sealer, Opener) {
        let session = Secret::random().expect("room");
        let sealer = Sealer::new(&session, Role::Initiator, BINDING, 0).expect("a key");
        (sealer, Opener::new(&session, Role::Initiator, BINDING).expect("a key"))
    }

    fn seal(sealer: &Sealer, queue: u8, frame: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; sealed_len(frame.len())];
        sealer.seal(queue, &Offload::default(), frame, 0, &mut packet).expect("sealed");
        packet
    }

    proptest! {
        #[test]
        fn frames_come_back(
            frame in prop::collection::vec(any::<u8>(), 64..3000),
            queue: u8,
            offload in crate::packet::tests::any_offload(),
        ) {
            let (sealer, opener) = ends();
            let mut packet = vec![0; sealed_len(frame.len())];
            sealer.seal(queue, &offload, &frame, 0, &mut packet).expect("sealed");
            prop_assert!(packet.windows(16).all(|w| w != &frame[..16]));
            let opened = opener.open(&mut packet).expect("opened");
            prop_assert_eq!((opened.queue, opened.counter, opened.offload), (queue, 0, offload));
            prop_assert_eq!(&*opened.frame, &frame[..]);
        }

        #[test]
        fn any_flipped_bit_is_refused_and_moves_no_window(bit in 0..8 * sealed_len(64)) {
            let (sealer, opener) = ends();
            let good = seal(&sealer, 0, &[5; 64]);
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let as_it_came = bad.clone();
            prop_assert!(opener.open(&mut bad).is_err());
            prop_assert_eq!(bad, as_it_came);
            prop_assert!(opener.windows.iter().all(|w| w.lock().expect("sound").is_none()));
            prop_assert!(opener.open(&mut good.clone()).is_ok());
        }

        #[test]
        fn what_is_cut_or_lengthened_is_refused(len in 0..200_usize) {
            let (sealer, opener) = ends();
            let mut packet = seal(&sealer, 0, &[5; 64]);
            prop_assume!(len != packet.len());
            packet.resize(len, 0);
            prop_assert!(opener.open(&mut packet).is_err());
        }

        #[test]
        fn in_any_order_each_opens_once(mut order in prop::collection::vec((0_u8..3, 0_usize..40), 1..200)) {
            let (sealer, opener) = ends();
            let sealed: Vec<Vec<Vec<u8>>> =
                (0..3).map(|queue| (0..40).map(|n| seal(&sealer, queue, &[n; 20])).collect()).collect();
            let mut opened = std::collections::HashSet::new();
            for (queue, n) in order.drain(..) {
                let mut packet = sealed[usize::from(queue)][n].clone();
                let result = opener.open(&mut packet).map(|o| (o.queue, o.counter, o.frame[0]));
                let fresh = opened.insert((queue, n));
                let expected = if fresh { Ok((queue, n as u64, n as u8)) } else { Err(OpenError::Replayed) };
                prop_assert_eq!(result, expected);
            }
        }
    }

    #[test]
    fn a_forged_number_far_ahead_shuts_nobody_out() {
        let (sealer, opener) = ends();
        let good = seal(&sealer, 0, &[5; 64]);
        let mut forged = good.clone();
        let ahead = PacketNumber::new(0, 1 << 40).expect("in range");
        forged[8..16].copy_from_slice(&ahead.to_bytes());
        assert_eq!(opener.open(&mut forged), Err(OpenError::Forged));
        assert!(opener.open(&mut good.clone()).is_ok());
    }

    #[test]
    fn what_lies_behind_the_window_is_refused() {
        let (sealer, opener) = ends();
        let mut first = seal(&sealer, 0, &[5; 64]);
        let mut second = seal(&sealer, 0, &[5; 64]);
        (3..WINDOW + 1).for_each(|_| drop(seal(&sealer, 0, &[5; 64])));
        let mut last = seal(&sealer, 0, &[5; 64]);
        assert_eq!(opener.open(&mut last).map(|o| o.counter), Ok(WINDOW));
        assert_eq!(opener.open(&mut first), Err(OpenError::Replayed));
        assert_eq!(opener.open(&mut second).map(|o| o.counter), Ok(1));
    }

    #[test]
    fn a_packet_sent_back_does_not_open() {
        let session = Secret::random().expect("room");
        let sealer = Sealer::new(&session, Role::Initiator, BINDING, 0).expect("a key");
        let own = Opener::new(&session, Role::Responder, BINDING).expect("a key");
        assert_eq!(own.open(&mut seal(&sealer, 0, &[5; 64])), Err(OpenError::Forged));
    }

    #[test]
    fn another_session_does_not_open() {
        let (sealer, _) = ends();
        let (_, other) = ends();
        assert_eq!(other.open(&mut seal(&sealer, 0, &[5; 64])), Err(OpenError::Forged));
    }

    #[test]
    fn of_many_threads_one_gets_the_frame() {
        let (sealer, opener) = ends();
        for n in 0..50 {
            let packet = seal(&sealer, 0, &[n; 64]);
            let opened = std::thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..4).map(|_| scope.spawn(|| opener.open(&mut packet.clone()).is_ok())).collect();
                threads.into_iter().map(|t| t.join().expect("ran")).filter(|ok| *ok).count()
            });
            assert_eq!(opened, 1);
        }
    }
}
