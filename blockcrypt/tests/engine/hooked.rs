//! A store over another one that does something before its calls; the test says what.

use crate::common::{SimStore, write_out_of_order};
use fealty_blockcrypt::{Next, Store};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// A call of a store, and the bytes that it reads or writes.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    Read(Range<u64>),
    Write(Range<u64>),
    Sync,
    Resize,
    Reserve,
    Punch,
}

/// What happens before a call. After an error the call is not made.
pub(crate) trait Hook: Send + Sync {
    fn before(&self, call: Call) -> io::Result<()>;
}

impl<F: Fn(Call) -> io::Result<()> + Send + Sync> Hook for F {
    fn before(&self, call: Call) -> io::Result<()> {
        self(call)
    }
}

/// The store `inner` with a hook before its calls.
pub(crate) struct Hooked<H, S = Arc<SimStore>> {
    pub(crate) inner: S,
    pub(crate) hook: H,
}

impl<H: Hook, S: Store> Hooked<H, S> {
    pub(crate) fn over(inner: S, hook: H) -> Arc<Self> {
        Arc::new(Self { inner, hook })
    }
}

fn bytes(offset: u64, length: usize) -> Range<u64> {
    offset..offset + length as u64
}

impl<H: Hook, S: Store> Store for Hooked<H, S> {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.hook.before(Call::Read(bytes(offset, buffer.len())))?;
        self.inner.read_at(buffer, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.hook.before(Call::Write(bytes(offset, data.len())))?;
        self.inner.write_at(data, offset)
    }
    fn overlaps(&self) -> bool {
        self.inner.overlaps()
    }
    fn write_lots_at<'a>(&self, next: &mut Next<'a, '_>) -> io::Result<()> {
        write_out_of_order(self, next)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.hook.before(Call::Sync)?;
        self.inner.sync_data()
    }
    fn drop_cached(&self) -> io::Result<()> {
        self.inner.drop_cached()
    }
    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.hook.before(Call::Resize)?;
        self.inner.set_len(bytes)
    }
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.hook.before(Call::Reserve)?;
        self.inner.reserve(offset, bytes)
    }
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.hook.before(Call::Punch)?;
        self.inner.punch(offset, bytes)
    }
}
