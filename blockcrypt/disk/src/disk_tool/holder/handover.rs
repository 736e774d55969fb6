//! What the holder says first: the volume's grant, and its key.

use super::Holder;
use super::error::HolderError;
use super::talk::ANSWER;
use super::wire::{read_message, read_part};
use blockcrypt::Kek;
use policy::disk::{DiskSession, VolumeGrant};
use secretmem::Secret;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// How long the holder may take to hand over the volume.
pub(super) const HANDOVER: Duration = Duration::from_secs(60);

/// What the holder hands over.
pub(crate) struct Handover {
    pub(crate) grant: VolumeGrant,
    pub(crate) kek: Kek,
    pub(crate) holder: Arc<Holder>,
    /// The volume's size as the provider knows it, in bytes.
    pub(crate) size: Option<u64>,
}

impl Handover {
    /// Takes the hand-over from `stream`; the key goes from the socket straight into locked memory.
    pub(crate) fn receive(stream: UnixStream) -> Result<Self, HolderError> {
        stream.set_read_timeout(Some(HANDOVER)).map_err(HolderError::Io)?;
        stream.set_write_timeout(Some(HANDOVER)).map_err(HolderError::Io)?;
        let (session, key) = read_handover(&mut &stream)?;
        stream.set_read_timeout(Some(ANSWER)).map_err(HolderError::Io)?;
        let kek = Kek::new(session.grant.kek_id, key);
        let holder = Arc::new(Holder::new(stream)?);
        Ok(Self { grant: session.grant, kek, holder, size: session.size })
    }
}

fn read_handover(from: &mut impl Read) -> Result<(DiskSession, Secret<32>), HolderError> {
    let text = read_message(from)?;
    let session = serde_json::from_slice(&text).map_err(HolderError::Message)?;
    let mut key = Secret::<32>::zeroed()?;
    read_part(from, key.expose_mut(), "the key")?;
    Ok((session, key))
}

#[cfg(test)]
mod tests {
    use super::super::testing::framed;
    use super::*;
    use policy::disk::CipherSuite;
    use policy::{AnchorMode, KeyId, OpenNumber, VolumeId};

    fn session() -> DiskSession {
        let grant = VolumeGrant {
            volume: VolumeId([7; 16]),
            customer: "acme".parse().expect("a name"),
            cipher: CipherSuite::Aes256XtsHmacSha256,
            kek_id: KeyId(1),
            key_id: KeyId(2),
            open_number: OpenNumber::try_from(3).expect("a number"),
            anchor: None,
            anchor_mode: AnchorMode::Interval,
        };
        DiskSession { grant, size: Some(1 << 30) }
    }

    fn handover() -> Vec<u8> {
        let mut out = framed(&serde_json::to_vec(&session()).expect("JSON"));
        out.extend([0x5a; 32]);
        out
    }

    #[test]
    fn a_handover_is_read_to_its_last_byte() {
        let bytes = handover();
        let mut rest = &bytes[..];
        let (read, key) = read_handover(&mut rest).expect("good");
        assert!(read == session() && key.expose() == &[0x5a; 32] && rest.is_empty());
    }

    #[test]
    fn a_handover_cut_anywhere_is_refused() {
        let bytes = handover();
        assert!(matches!(read_handover(&mut &bytes[..0]), Err(HolderError::NoHandover)));
        for end in 1..bytes.len() {
            assert!(matches!(read_handover(&mut &bytes[..end]), Err(HolderError::Truncated(_))), "{end}");
        }
    }

    /// Whatever comes: an error or a session, never a panic and never more than the limit. Seeds are a good hand-over and its
    /// relatives; mutations overwrite, cut, double and insert.
    #[test]
    fn no_handover_breaks_the_parser() {
        let unknown = framed(br#"{"grant":{},"more":1}"#);
        let seeds = [handover(), unknown, framed(b"null"), framed(b"[[[[[[[["), vec![0xff; 64]];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below.max(1) as u64) as usize
        };
        let mut good = 0;
        for round in 0..20_000 {
            let mut bytes = seeds[round % seeds.len()].clone();
            for _ in 0..random(4) {
                let at = random(bytes.len());
                match random(4) {
                    0 => bytes[at] = random(256) as u8,
                    1 => bytes.truncate(at.max(1)),
                    2 => bytes.insert(at, random(256) as u8),
                    _ => bytes.extend_from_within(at..),
                }
            }
            good += usize::from(read_handover(&mut &bytes[..]).is_ok());
        }
        assert!(good > 0, "the unmutated seed passes");
    }
}
