//! The keys that speak to the VM process instead of the guest: Ctrl-A, then x (end), c (status), h (help) or Ctrl-A
//! (itself, to the guest).

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What a key asks of the VM process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Key {
    /// End the VM.
    End,
    /// Say how it stands.
    Status,
    /// Say which keys there are.
    Help,
}

/// What the keys do, for `Ctrl-A h`.
pub const HELP: &str = "Ctrl-A x ends the VM, Ctrl-A c shows its status, Ctrl-A Ctrl-A types Ctrl-A";

/// Tells the guest's bytes from the process's, also where an escape is split between two reads.
#[derive(Default)]
pub struct Keys {
    escaped: bool,
}

impl Keys {
    /// Goes through `bytes`: appends the guest's to `guest`, returns the process's in order.
    pub fn sort(&mut self, bytes: &[u8], guest: &mut Vec<u8>) -> Vec<Key> {
        let mut keys = Vec::new();
        for &byte in bytes {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (false, _) => guest.push(byte),
                (true, ESCAPE) => guest.push(ESCAPE),
                (true, b'x' | b'X') => keys.push(Key::End),
                (true, b'c' | b'C') => keys.push(Key::Status),
                (true, _) => keys.push(Key::Help),
            }
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_found_also_when_split() {
        let mut keys = Keys::default();
        let mut guest = Vec::new();
        assert_eq!(keys.sort(b"ls\r\x01", &mut guest), []);
        assert_eq!(keys.sort(b"cmore\x01\x01\x01?\x01x", &mut guest), [Key::Status, Key::Help, Key::End]);
        assert_eq!(guest, b"ls\rmore\x01");
    }
}
