//! Fuzz target: packets from the network.

use crate::{Binding, Offload, Opener, Role, Sealer, sealed_len};
use secretmem::Secret;

const BINDING: Binding = Binding { network: 1, phase: 0, key_id: 1 };

/// Opens `data` as it is, which no key ever sealed; then takes its first byte as an order to damage a packet that one did, at a
/// place and with bytes that the rest names: only an undamaged one may open.
#[doc(hidden)]
pub fn fuzz_open(data: &[u8]) {
    let Ok(session) = Secret::copy_of(&[7; 32]) else { return };
    let ends = (Sealer::new(&session, Role::Initiator, BINDING, 0), Opener::new(&session, Role::Initiator, BINDING));
    let (Ok(sealer), Ok(opener)) = ends else { return };
    assert!(opener.open(&mut data.to_vec()).is_err(), "a packet that nobody sealed");
    let Some(([order, place], bytes)) = data.split_first_chunk::<2>() else { return };
    let mut packet = vec![0; sealed_len(100)];
    assert!(sealer.seal(*order, &Offload::default(), &[1; 100], 0, &mut packet).is_ok());
    let whole = packet.clone();
    match order % 3 {
        0 => packet.truncate(usize::from(*place)),
        1 => packet.extend_from_slice(bytes),
        _ => {
            let reached = packet.iter_mut().skip(usize::from(*place));
            reached.zip(bytes).for_each(|(to, from)| *to ^= from);
        }
    }
    let undamaged = packet == whole;
    assert_eq!(opener.open(&mut packet).is_ok(), undamaged);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// A small xorshift generator: the same mutations each time.
    fn next(state: &mut u64) -> usize {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state as usize
    }

    #[test]
    fn packets_from_anywhere_open_only_as_they_were_sealed() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus");
        let mut files: Vec<_> = std::fs::read_dir(corpus).expect("corpus").map(|f| f.expect("file").path()).collect();
        files.sort();
        let seeds: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(f).expect("readable")).collect();
        assert!(!seeds.is_empty());
        seeds.iter().for_each(|seed| fuzz_open(seed));
        let (mut state, end) = (0x5eed, Instant::now() + Duration::from_secs(1));
        while Instant::now() < end {
            let mut data = seeds[next(&mut state) % seeds.len()].clone();
            for _ in 0..1 + next(&mut state) % 4 {
                match next(&mut state) % 3 {
                    0 if !data.is_empty() => {
                        let at = next(&mut state) % data.len();
                        data[at] = next(&mut state) as u8;
                    }
                    1 => data.truncate(next(&mut state) % (data.len() + 1)),
                    _ => data.extend((0..next(&mut state) % 70).map(|n| (n * 31) as u8)),
                }
            }
            fuzz_open(&data);
        }
    }
}
