//! Signed notes (C2SP signed-note, Ed25519) and the receipts made of them.
//!
//! ```text
//! ORIGIN
//! SEQUENCE
//! base64(SHA-256 of the event's JSON bytes)
//!
//! — ORIGIN base64(key id, 4 bytes || signature, 64 bytes)
//! ```

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use policy::Digest;
use secretmem::Secret;
use subtle::ConstantTimeEq;

/// The longest note, in bytes.
pub const NOTE_LIMIT: usize = 16 * 1024;

const ALG_ED25519: u8 = 1;
const MAX_SIGNATURES: usize = 16;

/// A note that can't be signed or believed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NoteError {
    /// Not a note.
    #[error("a signed note can't be read: {0}")]
    Shape(&'static str),
    /// A key name with a space, a plus or a line break.
    #[error("a note's key name is 1 to 255 characters without spaces, '+' and line breaks")]
    Name,
    /// A public key that is not 32 bytes, or a seed that makes no key.
    #[error("a note's key is an Ed25519 key of 32 bytes")]
    Key,
    /// No signature by this key.
    #[error("the note bears no signature by {0}")]
    Unsigned(String),
    /// A wrong one.
    #[error("the note's signature by {0} is wrong")]
    Signature(String),
    /// Signed, but not what it should say.
    #[error("the receipt is not for {0}")]
    Other(&'static str),
}

/// The public half of an Ed25519 seed: 32 bytes.
pub fn public_key(seed: &Secret<32>) -> Result<[u8; 32], NoteError> {
    pair(seed)?.public_key().as_ref().try_into().map_err(|_| NoteError::Key)
}

/// Signs `text`, which must end with a line break, under the key called `name`: the whole note. The key's expanded form lies in
/// library memory during the call.
pub fn sign(text: &str, name: &str, seed: &Secret<32>) -> Result<String, NoteError> {
    check_name(name)?;
    if !text.ends_with('\n') || text.contains("\n\n\u{2014} ") || text.chars().any(|c| c < ' ' && c != '\n') {
        return Err(NoteError::Shape("the text must end with a line break and hold no control characters"));
    }
    let pair = pair(seed)?;
    let id = key_id(name, pair.public_key().as_ref());
    let signature = pair.sign(text.as_bytes());
    let line = STANDARD.encode([&id[..], signature.as_ref()].concat());
    Ok(format!("{text}\n\u{2014} {name} {line}\n"))
}

/// The text of `note`, if the key called `name` signed it. Signatures by other keys are left alone.
pub fn verify<'a>(note: &'a str, name: &str, public: &[u8]) -> Result<&'a str, NoteError> {
    check_name(name)?;
    if public.len() != 32 {
        return Err(NoteError::Key);
    }
    let (text, signatures) = split(note)?;
    let id = key_id(name, public);
    for line in signatures {
        let (signer, blob) = signature_line(line)?;
        if signer != name || !bool::from(blob[..4].ct_eq(&id)) {
            continue;
        }
        return UnparsedPublicKey::new(&ED25519, public)
            .verify(text.as_bytes(), &blob[4..])
            .map(|()| text)
            .map_err(|_| NoteError::Signature(name.to_owned()));
    }
    Err(NoteError::Unsigned(name.to_owned()))
}

/// What a receipt says: this event stands at this place of this log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Receipt {
    /// The log's origin, which is also the key's name.
    pub origin: String,
    /// The event's place, from 1.
    pub sequence: u64,
    /// SHA-256 of its JSON bytes.
    pub event: Digest,
}

impl Receipt {
    /// Signs it with the audit key.
    pub fn sign(&self, seed: &Secret<32>) -> Result<String, NoteError> {
        let text = format!("{}\n{}\n{}\n", self.origin, self.sequence, STANDARD.encode(self.event.as_bytes()));
        sign(&text, &self.origin, seed)
    }

    /// The receipt in `note`, if the audit key of the log `origin` signed it.
    pub fn verify(note: &str, origin: &str, public: &[u8]) -> Result<Self, NoteError> {
        let shape = || NoteError::Shape("a receipt has an origin, a sequence number and a digest");
        let lines: Vec<&str> = verify(note, origin, public)?.split_terminator('\n').collect();
        let [said, number, digest] = lines[..] else { return Err(shape()) };
        if said != origin {
            return Err(NoteError::Other("this log"));
        }
        // One spelling only, so that a receipt has one text.
        let sequence: u64 =
            number.parse().ok().filter(|n: &u64| *n > 0 && n.to_string() == number).ok_or_else(shape)?;
        let event = STANDARD.decode(digest).ok().and_then(|d| d.try_into().ok()).map(Digest).ok_or_else(shape)?;
        Ok(Self { origin: origin.to_owned(), sequence, event })
    }
}

fn pair(seed: &Secret<32>) -> Result<Ed25519KeyPair, NoteError> {
    Ed25519KeyPair::from_seed_unchecked(seed.expose()).map_err(|_| NoteError::Key)
}

fn check_name(name: &str) -> Result<(), NoteError> {
    let good =
        (1..=255).contains(&name.len()) && !name.chars().any(|c| c.is_whitespace() || c.is_control() || c == '+');
    if good { Ok(()) } else { Err(NoteError::Name) }
}

fn key_id(name: &str, public: &[u8]) -> [u8; 4] {
    let digest = Digest::of(&[name.as_bytes(), b"\n", &[ALG_ED25519], public].concat());
    let mut id = [0; 4];
    id.copy_from_slice(&digest.as_bytes()[..4]);
    id
}

fn split(note: &str) -> Result<(&str, Vec<&str>), NoteError> {
    if note.len() > NOTE_LIMIT {
        return Err(NoteError::Shape("too long"));
    }
    let at = note.rfind("\n\n").ok_or(NoteError::Shape("no empty line before the signatures"))?;
    let (text, rest) = (&note[..=at], &note[at + 2..]);
    let block = rest.strip_suffix('\n').ok_or(NoteError::Shape("no line break at the end"))?;
    let lines: Vec<&str> = block.split('\n').collect();
    if lines.len() > MAX_SIGNATURES {
        return Err(NoteError::Shape("too many signatures"));
    }
    Ok((text, lines))
}

/// Signer, and a blob of more than four bytes.
fn signature_line(line: &str) -> Result<(&str, Vec<u8>), NoteError> {
    let shape = || NoteError::Shape("a signature line is '\u{2014} NAME BASE64'");
    let (signer, blob) = line.strip_prefix("\u{2014} ").and_then(|rest| rest.split_once(' ')).ok_or_else(shape)?;
    let blob = STANDARD.decode(blob).ok().filter(|b| b.len() > 4).ok_or_else(shape)?;
    check_name(signer)?;
    Ok((signer, blob))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seed(byte: u8) -> Secret<32> {
        Secret::copy_of(&[byte; 32]).expect("memory")
    }

    fn receipt() -> Receipt {
        Receipt { origin: "keys.example/acme".into(), sequence: 7, event: Digest::of(b"event") }
    }

    #[test]
    fn a_receipt_reads_back_under_its_key_only() {
        let note = receipt().sign(&seed(1)).expect("signed");
        let (good, other) = (public_key(&seed(1)).expect("key"), public_key(&seed(2)).expect("key"));
        assert_eq!(Receipt::verify(&note, "keys.example/acme", &good), Ok(receipt()));
        let unsigned = Err(NoteError::Unsigned("keys.example/acme".into()));
        assert_eq!(Receipt::verify(&note, "keys.example/acme", &other), unsigned);
        assert!(Receipt::verify(&note, "keys.example/evil", &good).is_err());
    }

    #[test]
    fn the_specifications_example_verifies() {
        // C2SP signed-note: the example note and its key, PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW.
        let key = STANDARD.decode("ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW").expect("base64");
        let note = concat!(
            "If you think cryptography is the answer to your problem,\n",
            "then you don't know what your problem is.\n\n",
            "\u{2014} PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
        );
        assert!(verify(note, "PeterNeumann", &key[1..]).is_ok());
    }

    #[test]
    fn a_changed_receipt_is_refused() {
        let note = receipt().sign(&seed(1)).expect("signed");
        let key = public_key(&seed(1)).expect("key");
        for (from, to) in [("\n7\n", "\n8\n"), ("\n7\n", "\n07\n"), ("\n7\n", "\n7\nx\n"), ("\n\n", "\n")] {
            assert!(Receipt::verify(&note.replacen(from, to, 1), "keys.example/acme", &key).is_err(), "{to}");
        }
    }

    #[test]
    fn names_hold_nothing_that_a_line_would_read() {
        for bad in ["", "a b", "a+b", "a\nb"] {
            assert_eq!(sign("x\n", bad, &seed(1)), Err(NoteError::Name), "{bad}");
        }
        assert!(matches!(sign("x", "a", &seed(1)), Err(NoteError::Shape(_))));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,200}|(.|\n|\u{2014} a ){0,60}") {
            let _ = verify(&text, "a", &[1; 32]);
        }
    }
}
