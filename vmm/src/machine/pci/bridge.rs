//! The host bridge in slot 0: it is there because guests look for one.

use super::{ConfigSpace, Identity, PciFunction};
use crate::machine::sync::lock;
use std::ops::Range;
use std::sync::Mutex;

/// A host bridge without registers of its own.
pub struct HostBridge(Mutex<ConfigSpace>);

/// The bridge, by the ids of QEMU's generic PCI Express host.
impl Default for HostBridge {
    fn default() -> Self {
        let identity = Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_0000, revision: 0, subsystem: (0, 0) };
        Self(Mutex::new(ConfigSpace::new(&identity)))
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u8, data: &mut [u8]) {
        lock(&self.0).read(offset, data);
    }

    fn config_write(&self, offset: u8, data: &[u8]) {
        lock(&self.0).write(offset, data);
    }

    fn window(&self) -> Range<u64> {
        0..0
    }

    fn bar_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn bar_write(&self, _offset: u64, _data: &[u8]) {}
}
