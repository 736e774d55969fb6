//! Frames into packets.

use crate::key::{Binding, DirectionKey, KeyError, Role};
use crate::packet::{HEADER, MAX_FRAME, MIN_FRAME, OFFLOAD, Offload, PacketNumber, sealed_len};
use secretmem::Secret;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Packets that one key seals at most.
pub const PACKETS: u64 = 1 << 32;

/// Bytes (frames with their offload fields) that one key seals at most.
pub const BYTES: u64 = 1 << 38;

/// Milliseconds that a key seals for: 1 h.
pub const AGE_MS: u64 = 3_600_000;

/// The sending end of one direction of a session, under one key. Shared by the sender's queues: each has its own counter, and
/// no number is given twice, whatever fails.
pub struct Sealer {
    key: DirectionKey,
    born_ms: u64,
    packets: AtomicU64,
    bytes: AtomicU64,
    counters: Box<[AtomicU64; 256]>,
}

/// Why a frame was not sealed. No packet may leave then, and none in plain.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SealError {
    /// No Ethernet frame, or one that fits no packet.
    #[error("a frame is {MIN_FRAME} to {MAX_FRAME} bytes, not {0}")]
    Frame(usize),
    /// Offload fields that can't be true.
    #[error("a frame's offload fields contradict each other or its length")]
    Offload,
    /// Room of another length than [`sealed_len`] says.
    #[error("the room for a packet has {0} bytes and not what its frame needs")]
    Room(usize),
    /// The key has reached a limit.
    #[error("the network key is used up; the session needs a new one")]
    UsedUp,
}

impl Sealer {
    /// The sending end of `own`, whose key begins its life at `now_ms` (milliseconds of the boot-time clock). The caller makes
    /// one sealer for a session secret, role and binding, ever: a second one would repeat numbers.
    pub fn new(session: &Secret<32>, own: Role, binding: Binding, now_ms: u64) -> Result<Self, KeyError> {
        Ok(Self {
            key: DirectionKey::derive(session, own, binding)?,
            born_ms: now_ms,
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            counters: Box::new([const { AtomicU64::new(0) }; 256]),
        })
    }

    /// Whether the session should agree on the next key: 15/16 of a limit are reached.
    pub fn wants_new_key(&self, now_ms: u64) -> bool {
        let near = |used: u64, limit: u64| used >= limit / 16 * 15;
        near(self.packets.load(Relaxed), PACKETS)
            || near(self.bytes.load(Relaxed), BYTES)
            || near(now_ms.saturating_sub(self.born_ms), AGE_MS)
    }

    /// Seals `frame` of `queue` into `packet`, which has exactly [`sealed_len`] bytes; at `now_ms`.
    pub fn seal(
        &self,
        queue: u8,
        offload: &Offload,
        frame: &[u8],
        now_ms: u64,
        packet: &mut [u8],
    ) -> Result<(), SealError> {
        if !(MIN_FRAME..=MAX_FRAME).contains(&frame.len()) {
            return Err(SealError::Frame(frame.len()));
        }
        if !offload.fits(frame.len()) {
            return Err(SealError::Offload);
        }
        if packet.len() != sealed_len(frame.len()) {
            return Err(SealError::Room(packet.len()));
        }
        let number = self.spend(queue, (OFFLOAD + frame.len()) as u64, now_ms)?;
        let (header, rest) = packet.split_at_mut(HEADER);
        let (text, tag) = rest.split_at_mut(OFFLOAD + frame.len());
        header.copy_from_slice(&self.key.binding().header(number).to_bytes());
        text[..OFFLOAD].copy_from_slice(&offload.to_bytes());
        text[OFFLOAD..].copy_from_slice(frame);
        match self.key.encrypt(number, header, text) {
            Some(sealed) => tag.copy_from_slice(&sealed),
            None => {
                packet.fill(0);
                return Err(SealError::UsedUp);
            }
        }
        Ok(())
    }

    /// The next number of `queue`. What the limits count is counted first, so a number is never beyond them.
    fn spend(&self, queue: u8, bytes: u64, now_ms: u64) -> Result<PacketNumber, SealError> {
        let packets_before = self.packets.fetch_add(1, Relaxed);
        let bytes_after = self.bytes.fetch_add(bytes, Relaxed).saturating_add(bytes);
        let age = now_ms.saturating_sub(self.born_ms);
        if packets_before >= PACKETS || bytes_after > BYTES || age >= AGE_MS {
            return Err(SealError::UsedUp);
        }
        PacketNumber::new(queue, self.counters[usize::from(queue)].fetch_add(1, Relaxed)).ok_or(SealError::UsedUp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Header, Opener};
    use std::collections::HashSet;

    const BINDING: Binding = Binding { network: 7, phase: 1, key_id: 9 };

    fn sealer() -> Sealer {
        Sealer::new(&Secret::random().expect("room"), Role::Initiator, BINDING, 1_000).expect("a key")
    }

    fn seal(sealer: &Sealer, queue: u8, now_ms: u64) -> Result<Vec<u8>, SealError> {
        let mut packet = vec![0; sealed_len(60)];
        sealer.seal(queue, &Offload::default(), &[0; 60], now_ms, &mut packet).map(|()| packet)
    }

    #[test]
    fn numbers_never_repeat_also_among_threads() {
        let sealer = sealer();
        let numbers = |queue| {
            let of = |_| Header::parse(&seal(&sealer, queue, 1_000).expect("sealed")).expect("a packet").number;
            (0..200).map(of).collect::<Vec<_>>()
        };
        let all: Vec<PacketNumber> = std::thread::scope(|scope| {
            let threads: Vec<_> = [0, 0, 1, 255].map(|q| scope.spawn(move || numbers(q))).into();
            threads.into_iter().flat_map(|t| t.join().expect("ran")).collect()
        });
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        let highest = |queue| all.iter().filter(|n| n.queue() == queue).map(|n| n.counter()).max();
        assert_eq!((highest(0), highest(1), highest(255)), (Some(399), Some(199), Some(199)));
    }

    #[test]
    fn a_key_ends_after_its_packets() {
        let sealer = sealer();
        sealer.packets.store(PACKETS / 16 * 15 - 1, Relaxed);
        assert!(!sealer.wants_new_key(1_000));
        seal(&sealer, 0, 1_000).expect("sealed");
        assert!(sealer.wants_new_key(1_000));
        sealer.packets.store(PACKETS - 1, Relaxed);
        seal(&sealer, 0, 1_000).expect("the last one");
        for queue in [0, 1, 255] {
            assert_eq!(seal(&sealer, queue, 1_000), Err(SealError::UsedUp));
        }
    }

    #[test]
    fn a_key_ends_after_its_bytes() {
        let sealer = sealer();
        sealer.bytes.store(BYTES - 68, Relaxed);
        assert!(sealer.wants_new_key(1_000));
        seal(&sealer, 0, 1_000).expect("the last one");
        assert_eq!(seal(&sealer, 0, 1_000), Err(SealError::UsedUp));
    }

    #[test]
    fn a_key_ends_after_an_hour() {
        let sealer = sealer();
        assert!(!sealer.wants_new_key(1_000 + 56 * 60_000));
        assert!(sealer.wants_new_key(1_000 + 57 * 60_000));
        seal(&sealer, 0, 1_000 + AGE_MS - 1).expect("sealed");
        assert_eq!(seal(&sealer, 0, 1_000 + AGE_MS), Err(SealError::UsedUp));
    }

    #[test]
    fn what_fits_no_packet_is_refused_and_spends_no_number() {
        let sealer = sealer();
        let mut room = vec![0; sealed_len(MAX_FRAME) + 1];
        let plain = Offload::default();
        for len in [0, MIN_FRAME - 1, MAX_FRAME + 1] {
            let packet = &mut room[..sealed_len(len)];
            assert_eq!(sealer.seal(0, &plain, &vec![0; len], 1_000, packet), Err(SealError::Frame(len)));
        }
        assert_eq!(sealer.seal(0, &plain, &[0; 60], 1_000, &mut room[..60]), Err(SealError::Room(60)));
        let valid = Offload { checksum: Some(crate::packet::Checksum { start: 60, offset: 0 }), ..plain };
        assert_eq!(sealer.seal(0, &valid, &[0; 60], 1_000, &mut room[..100]), Err(SealError::Offload));
        assert_eq!(sealer.packets.load(Relaxed), 0);
        sealer.seal(0, &plain, &vec![0; MAX_FRAME], 1_000, &mut room[..sealed_len(MAX_FRAME)]).expect("the largest");
    }

    /// The format as the documents of `packet` and `key` draw it, opened by another implementation of HKDF and AES-GCM.
    #[test]
    fn the_format_is_as_it_is_drawn() {
        use aws_lc_rs::{aead, hkdf};
        let session = Secret::copy_of(&[0x11; 32]).expect("room");
        let binding = Binding { network: 0x0102, phase: 3, key_id: 0x0405_0607 };
        let sealer = Sealer::new(&session, Role::Responder, binding, 0).expect("a key");
        let cut = crate::packet::Cut { kind: crate::packet::CutKind::Tcp6, segment: 0x0578 };
        let checksum = Some(crate::packet::Checksum { start: 0x22, offset: 0x10 });
        let offload = Offload { checksum, checksum_valid: false, cut: Some(cut) };
        let mut packet = vec![0; sealed_len(60)];
        for _ in 0..2 {
            sealer.seal(0xfe, &offload, &[0xaa; 60], 0, &mut packet).expect("sealed");
        }
        let header = [0x10, 3, 1, 2, 4, 5, 6, 7, 0xfe, 0, 0, 0, 0, 0, 0, 1];
        assert_eq!(packet[..16], header);

        let info: [&[u8]; 2] = [b"fealty net v1 key", &[2, 3, 1, 2, 4, 5, 6, 7]];
        let mut material = [0; 36];
        let prk = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &[0x11; 32]);
        struct Length;
        impl hkdf::KeyType for Length {
            fn len(&self) -> usize {
                36
            }
        }
        prk.expand(&info, Length).expect("expanded").fill(&mut material).expect("filled");
        let key = aead::LessSafeKey::new(aead::UnboundKey::new(&aead::AES_256_GCM, &material[..32]).expect("a key"));
        let nonce: Vec<u8> = material[32..].iter().chain(&header[8..]).copied().collect();
        let nonce = aead::Nonce::try_assume_unique_for_key(&nonce).expect("12 bytes");
        let text = key.open_in_place(nonce, aead::Aad::from(header), &mut packet[16..]).expect("opened");
        assert_eq!(text[..8], [1, 4, 0x05, 0x78, 0, 0x22, 0, 0x10]);
        assert_eq!(text[8..], [0xaa; 60]);
    }

    #[test]
    fn the_binding_is_part_of_the_key() {
        let session = Secret::random().expect("room");
        let mut packet = vec![0; sealed_len(60)];
        let sealer = Sealer::new(&session, Role::Initiator, BINDING, 0).expect("a key");
        sealer.seal(0, &Offload::default(), &[0; 60], 0, &mut packet).expect("sealed");
        for other in
            [Binding { network: 8, ..BINDING }, Binding { phase: 2, ..BINDING }, Binding { key_id: 1, ..BINDING }]
        {
            let opener = Opener::new(&session, Role::Initiator, other).expect("a key");
            let mut altered = packet.clone();
            assert!(opener.open(&mut altered.clone()).is_err());
            let number = Header::parse(&altered).expect("a packet").number;
            altered[..HEADER].copy_from_slice(&other.header(number).to_bytes());
            assert!(opener.open(&mut altered).is_err(), "the header is authenticated and the key another");
        }
    }
}
