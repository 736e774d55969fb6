//! Sizes, as people write and read them.

use std::fmt;
use std::str::FromStr;

/// A number of bytes from the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Size(u64);

impl Size {
    /// Bytes.
    pub(crate) fn bytes(self) -> u64 {
        self.0
    }
}

/// Not a size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a size is a number of bytes, or of K, M, G or T, such as 20G")]
pub(crate) struct SizeError;

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let (digits, shift) = match text.as_bytes().last().ok_or(SizeError)? {
            b'K' | b'k' => (&text[..text.len() - 1], 10),
            b'M' | b'm' => (&text[..text.len() - 1], 20),
            b'G' | b'g' => (&text[..text.len() - 1], 30),
            b'T' | b't' => (&text[..text.len() - 1], 40),
            _ => (text, 0),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(SizeError);
        }
        let number: u64 = digits.parse().map_err(|_| SizeError)?;
        number.checked_mul(1 << shift).map(Self).ok_or(SizeError)
    }
}

/// Room beyond a volume's size, from the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Room {
    Bytes(u64),
    /// Of the volume's size.
    Percent(u32),
}

/// Not a room.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("room is a size, such as 20G, or a share of the volume's, such as 25%")]
pub(crate) struct RoomError;

impl Room {
    /// Bytes, for a volume of `size` bytes.
    pub(crate) fn bytes(self, size: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(share) => u64::try_from(u128::from(size) * u128::from(share) / 100).unwrap_or(u64::MAX),
        }
    }
}

impl FromStr for Room {
    type Err = RoomError;

    fn from_str(text: &str) -> Result<Self, RoomError> {
        match text.strip_suffix('%') {
            Some(share) if share.bytes().all(|b| b.is_ascii_digit()) => {
                share.parse().map(Self::Percent).map_err(|_| RoomError)
            }
            Some(_) => Err(RoomError),
            None => text.parse().map(|size: Size| Self::Bytes(size.bytes())).map_err(|_| RoomError),
        }
    }
}

/// Shows bytes in the unit that people would choose: `512 B`, `1.5 MiB`.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let step = self.0.ilog2() / 10;
        let unit = 1u64 << (10 * step);
        let name = UNITS[step as usize - 1];
        if self.0.is_multiple_of(unit) {
            return write!(f, "{} {name}", self.0 / unit);
        }
        write!(f, "{:.1} {name}", self.0 as f64 / unit as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read() {
        let good = [("0", 0), ("512", 512), ("8K", 8192), ("1m", 1 << 20), ("20G", 20 << 30), ("3T", 3 << 40)];
        for (text, bytes) in good {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "K", "-1", "+1", "1.5G", "1GiB", "1 G", "20P", "16777216T", "99999999999999999999", "ä"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError), "{text}");
        }
    }

    #[test]
    fn room_is_a_size_or_a_share() {
        let of = |text: &str, size| text.parse().map(|room: Room| room.bytes(size));
        assert_eq!((of("8K", 7), of("25%", 1 << 30), of("300%", 512)), (Ok(8192), Ok(1 << 28), Ok(1536)));
        assert_eq!(of("4294967295%", u64::MAX), Ok(u64::MAX));
        for text in ["", "%", "+1%", "-1%", "1.5%", "1K%", "4294967296%", "25 %", "much"] {
            assert_eq!(text.parse::<Room>(), Err(RoomError), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        let shown = [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (20 << 30, "20 GiB")];
        for (bytes, text) in shown {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        assert_eq!(Bytes(u64::MAX).to_string(), "16.0 EiB");
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_parser(text in ".{0,40}") {
            if let Ok(size) = text.parse::<Size>() {
                prop_assert!(text.starts_with(|c: char| c.is_ascii_digit()));
                prop_assert!(size.bytes() == 0 || !Bytes(size.bytes()).to_string().is_empty());
            }
        }
    }
}
