//! One mapping of locked pages between two guard pages.
//!
//! ```text
//! base            start                          start + len      base + len + 2 pages
//!  | guard page   |  secret pages, read and write  |  guard page   |
//!  | PROT_NONE    |  memfd_secret, or mlocked      |  PROT_NONE    |
//! ```
#![allow(unsafe_code)]

use crate::SecretError;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How secrets are kept from the rest of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protection {
    /// `memfd_secret` pages: nobody but this process's own instructions reads them.
    MemfdSecret,
    /// Locked private pages, left out of core dumps, in a process that is not dumpable: root who may trace it reads them.
    Mlock,
}

/// Whether the `len` bytes from `start` meet a page of secrets or one of its guards. Asked by the one function that
/// registers guest memory: `memfd_secret` alone keeps no page from a guest. A range that runs past the end of the address
/// space reaches to its end; an empty range meets nothing.
pub fn overlaps(start: *const u8, len: usize) -> bool {
    let start = start.addr();
    let end = start.saturating_add(len);
    len > 0 && ranges().iter().any(|r| start < r.end && r.base < end)
}

/// Locked pages; unmapped when dropped, whatever lies in them. They are all zero at first.
pub(crate) struct Region {
    range: Range,
    start: NonNull<u8>,
    len: usize,
}

/// What a region takes of the address space, guards included.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Range {
    base: usize,
    end: usize,
}

/// All regions of this process. A range enters before its pages hold anything and leaves after they are wiped.
static RANGES: Mutex<Vec<Range>> = Mutex::new(Vec::new());

fn ranges() -> MutexGuard<'static, Vec<Range>> {
    RANGES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What this kernel offers: [`Protection::Mlock`] only where there is no `memfd_secret`, or a filter above forbids it.
pub(crate) fn best_protection() -> Result<Protection, SecretError> {
    match memfd_secret() {
        Ok(_) => Ok(Protection::MemfdSecret),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(Protection::Mlock),
        Err(source) => Err(SecretError::Map { step: "memfd_secret", source }),
    }
}

impl Region {
    /// Maps at least `bytes` (more than none) of locked memory.
    pub(crate) fn map(bytes: usize, protection: Protection) -> Result<Self, SecretError> {
        let page = page_size();
        let len = bytes.checked_next_multiple_of(page).ok_or(SecretError::Length(bytes))?;
        let region = Self::reserve(len, page)?;
        match protection {
            Protection::MemfdSecret => region.fill_with_memfd_secret()?,
            Protection::Mlock => region.fill_with_locked_pages()?,
        }
        region.advise(libc::MADV_DONTFORK, "madvise(MADV_DONTFORK)")?;
        Ok(region)
    }

    /// The first byte of the secret pages.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Bytes of the secret pages.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Takes the address space, all of it inaccessible, and lists it.
    fn reserve(len: usize, page: usize) -> Result<Self, SecretError> {
        let whole = len.checked_add(2 * page).ok_or(SecretError::Length(len))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing that exists is touched.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(map_error("mmap of address space", whole));
        }
        let range = Range { base: base.addr(), end: base.addr() + whole };
        // SAFETY: base + page lies inside the mapping just made, which has two pages more than `len`.
        let start = unsafe { base.cast::<u8>().add(page) };
        let start = NonNull::new(start).ok_or_else(|| map_error("mmap of address space", whole))?;
        ranges().push(range);
        Ok(Self { range, start, len })
    }

    fn fill_with_memfd_secret(&self) -> Result<(), SecretError> {
        // The descriptor is closed on return: root could take an open one with pidfd_getfd and map it.
        let fd = memfd_secret().map_err(|source| SecretError::Map { step: "memfd_secret", source })?;
        // SAFETY: `fd` is an open descriptor of ours; ftruncate touches no memory.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), self.len as libc::off_t) } != 0 {
            return Err(map_error("ftruncate of memfd_secret", self.len));
        }
        self.replace(libc::MAP_SHARED, fd.as_raw_fd(), "mmap of memfd_secret")
    }

    fn fill_with_locked_pages(&self) -> Result<(), SecretError> {
        crate::process::forbid_dumps_once()?;
        self.replace(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, "mmap")?;
        self.advise(libc::MADV_DONTDUMP, "madvise(MADV_DONTDUMP)")?;
        // SAFETY: start and len name the mapping that this region owns; locking changes no content.
        if unsafe { libc::mlock(self.start.as_ptr().cast(), self.len) } != 0 {
            return Err(map_error("mlock", self.len));
        }
        Ok(())
    }

    /// Puts readable and writable pages in the place of the inaccessible ones between the guards.
    fn replace(&self, flags: i32, fd: i32, step: &'static str) -> Result<(), SecretError> {
        let (address, protection) = (self.start.as_ptr().cast(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: MAP_FIXED replaces exactly start..start + len, which lies inside the address space that `reserve` took for
        // this region alone, one page from either end; no reference into it exists yet.
        let got = unsafe { libc::mmap(address, self.len, protection, flags | libc::MAP_FIXED, fd, 0) };
        if got == libc::MAP_FAILED { Err(map_error(step, self.len)) } else { Ok(()) }
    }

    fn advise(&self, advice: i32, step: &'static str) -> Result<(), SecretError> {
        // SAFETY: start and len name this region's own mapping; the two pieces of advice used here (no fork, no dump) change
        // neither its content nor its validity in this process.
        if unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, advice) } != 0 {
            return Err(map_error(step, self.len));
        }
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        ranges().retain(|r| *r != self.range);
        let Range { base, end } = self.range;
        // SAFETY: the mapping that `reserve` made begins `start - base` bytes (a page) before `start`, is `end - base` long, and
        // only this value owns it; the arena drops a region only when no slot of it is in use.
        unsafe { libc::munmap(self.start.as_ptr().sub(self.start.as_ptr().addr() - base).cast(), end - base) };
    }
}

// SAFETY: a region is address space that only its owner hands out; nothing about it is bound to a thread.
unsafe impl Send for Region {}

fn memfd_secret() -> io::Result<OwnedFd> {
    // SAFETY: the system call takes one flag and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor (descriptors fit i32) and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn map_error(step: &'static str, bytes: usize) -> SecretError {
    let source = io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOMEM | libc::EPERM) => SecretError::Exhausted { bytes, source },
        _ => SecretError::Map { step, source },
    }
}

pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf reads a constant of the system.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each(test: impl Fn(Region)) {
        for protection in crate::attacks::offered() {
            test(Region::map(1, protection).expect("mapped"));
        }
    }

    #[test]
    fn a_region_is_whole_pages_and_starts_at_zero() {
        each(|region| {
            assert_eq!(region.len(), page_size());
            assert_eq!(region.start().as_ptr().addr() % page_size(), 0);
            // SAFETY: the region's pages are mapped and nobody writes them.
            let bytes = unsafe { std::slice::from_raw_parts(region.start().as_ptr(), region.len()) };
            assert!(bytes.iter().all(|b| *b == 0));
        });
    }

    #[test]
    fn overlaps_knows_pages_and_guards_and_nothing_beside_them() {
        each(|region| {
            let page = page_size();
            let (base, end) = (region.range.base, region.range.end);
            let meets = |start: usize, len| overlaps(std::ptr::without_provenance(start), len);
            assert_eq!(end - base, region.len() + 2 * page);
            for inside in [base, base + page, end - page, end - 1] {
                assert!(meets(inside, 1), "{inside:#x}");
            }
            assert!(meets(base - page, page + 1));
            assert!(meets(base - page, 100 * page));
            assert!(meets(end - 1, usize::MAX));
            assert!(meets(0, usize::MAX));
            assert!(!meets(base, 0));
            let ordinary = vec![0_u8; 100 * page];
            assert!(!overlaps(ordinary.as_ptr(), ordinary.len()));
            drop(region);
        });
    }

    #[test]
    fn a_region_that_is_gone_meets_nothing() {
        // Of a length that no other test's region has, which could come to lie in its place.
        let region = Region::map(123 * page_size(), Protection::Mlock).expect("mapped");
        let range = region.range;
        assert!(ranges().contains(&range));
        drop(region);
        assert!(!ranges().contains(&range));
    }
}
