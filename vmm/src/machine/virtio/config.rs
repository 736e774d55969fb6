//! A device's configuration structure (virtio 1.3, 2.5), which the device may change under a running driver.

use super::link::Link;
use crate::machine::sync::lock;
use std::sync::{Arc, Mutex, OnceLock};

/// The structure, little-endian, and its generation. What lies beyond its end reads as zero.
pub struct DeviceConfig {
    state: Mutex<State>,
    link: OnceLock<Arc<Link>>,
}

struct State {
    bytes: Vec<u8>,
    generation: u8,
}

impl DeviceConfig {
    /// A structure that begins as `bytes`; its length stays.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { state: Mutex::new(State { bytes, generation: 0 }), link: OnceLock::new() }
    }

    /// Bytes.
    pub fn length(&self) -> usize {
        lock(&self.state).bytes.len()
    }

    /// Reads from `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let from = state.bytes.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    /// Changes it from the device's side: where it is different afterwards, the driver reads another generation and gets a
    /// configuration change interrupt (2.5.1, 4.1.4.3).
    pub fn change(&self, change: impl FnOnce(&mut [u8])) {
        let changed = {
            let mut state = lock(&self.state);
            let before = state.bytes.clone();
            change(&mut state.bytes);
            let changed = state.bytes != before;
            if changed {
                state.generation = state.generation.wrapping_add(1);
            }
            changed
        };
        if let Some(link) = self.link.get().filter(|_| changed) {
            link.config_changed();
        }
    }

    /// Takes what the driver wrote at `offset` into the bytes that it may write, `writable` (start, end): a helper for
    /// [`config_written`](super::VirtioDevice::config_written). It is no change in the sense of [`change`](Self::change).
    pub fn accept(&self, offset: u64, data: &[u8], writable: std::ops::Range<usize>) {
        let mut state = lock(&self.state);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let places = state.bytes.iter_mut().enumerate().skip(start);
        for ((_, to), from) in places.zip(data).filter(|((at, _), _)| writable.contains(at)) {
            *to = *from;
        }
    }

    /// How often the driver broke the rules and the device needed a reset.
    pub fn breaks(&self) -> u64 {
        self.link.get().map_or(0, |link| link.breaks())
    }

    pub(super) fn generation(&self) -> u8 {
        lock(&self.state).generation
    }

    /// From now on, changes interrupt the driver behind `link`.
    pub(super) fn attach(&self, link: Arc<Link>) {
        // A device sits in one slot for good.
        let _ = self.link.set(link);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_stay_inside() {
        let config = DeviceConfig::new(vec![1, 2, 3, 4]);
        let mut data = [0; 4];
        config.read(2, &mut data);
        assert_eq!(data, [3, 4, 0, 0]);
        config.read(u64::MAX, &mut data);
        config.accept(1, &[9, 9, 9, 9], 2..3);
        config.accept(u64::MAX, &[9], 0..4);
        config.read(0, &mut data);
        assert_eq!((data, config.generation()), ([1, 2, 9, 4], 0));
        config.change(|bytes| bytes[0] = 7);
        config.change(|bytes| bytes[0] = 7);
        assert_eq!(config.generation(), 1);
    }
}
