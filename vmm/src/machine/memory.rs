//! Guest memory: private anonymous mappings, never a memfd (root can open one through /proc/PID/fd), and the one function
//! that shows host memory to a guest.
#![allow(unsafe_code)]

use super::layout::{HOLE, HOLE_END, HOTPLUG_ALIGNMENT};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    Permissions,
};

/// What KVM maps at once where guest and host addresses are both multiples of it.
const LARGE_PAGE: usize = 2 << 20;

/// RAM as devices see it. Accesses are bounds-checked and volatile; the type parameter is where a dirty bitmap goes.
pub type GuestRam = GuestMemoryMmap<()>;

/// All memory of one machine: its RAM, and the window where more may appear.
pub struct Memory {
    ram: GuestRam,
    window: Option<Window>,
}

/// Address space reserved for memory added later. It is mapped without access, so that a guest that touches it early
/// fails instead of getting memory that nobody gave it.
struct Window {
    start: u64,
    mapping: MmapRegion,
}

/// What pages of the host guest memory lies in.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Pages {
    /// Whatever the host's kernel gives.
    #[default]
    Usual,
    /// Transparent huge pages, asked for.
    Transparent,
    /// The host's pool of huge pages of 2 MiB.
    Huge2M,
    /// Those of 1 GiB.
    Huge1G,
}

/// Why guest memory can't be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host has no address space left, or a limit stands in the way.
    #[error("cannot map {bytes} bytes of guest memory; give the machine less, or raise the limit on address space")]
    Map {
        /// How many were asked for.
        bytes: u64,
        /// What failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The pool of huge pages is too small.
    #[error("the host has not enough free huge pages for {bytes} bytes of guest memory; raise vm.nr_hugepages")]
    Pool {
        /// How many bytes were asked for.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// More than the host has.
    #[error("the VM is to have {asked} bytes of memory, but this host has {has}")]
    Host {
        /// What the VM's configuration says.
        asked: u64,
        /// The host's RAM.
        has: u64,
    },
    /// The kernel would not keep the mapping out of dumps and children.
    #[error("cannot keep guest memory out of core dumps and children of this process")]
    Advise(#[source] std::io::Error),
    /// Memory that holds keys was about to be shown to a guest.
    #[error("refused to show memory that holds keys to the guest at {guest:#x}")]
    Secret {
        /// Where in the guest.
        guest: u64,
    },
    /// KVM refused.
    #[error("KVM refused {bytes} bytes of memory at {guest:#x}")]
    Register {
        /// Where in the guest.
        guest: u64,
        /// How many.
        bytes: u64,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

impl Memory {
    /// Maps `size` bytes of RAM, up to 3 GiB of it below the hole, the rest above, and reserves `hotplug` bytes after it.
    pub fn new(size: u64, hotplug: u64) -> Result<Self, MemoryError> {
        Self::of(Pages::Usual, size, hotplug)
    }

    /// [`new`](Self::new) in pages of this kind. No more than the host has: pages are taken as the guest touches them, so that
    /// the kernel alone would let it start, and kill something later.
    pub fn of(pages: Pages, size: u64, hotplug: u64) -> Result<Self, MemoryError> {
        let has = host_memory();
        if size > has {
            return Err(MemoryError::Host { asked: size, has });
        }
        let low = size.min(HOLE);
        let mut regions = vec![ram_region(0, low, pages)?];
        if size > low {
            regions.push(ram_region(HOLE_END, size - low, pages)?);
        }
        let end = regions.last().map_or(0, |r| r.start_addr().0 + r.len());
        let window = match hotplug {
            0 => None,
            _ => Some(Window { start: window_start(end), mapping: map(hotplug, ProtFlags::empty(), Pages::Usual)? }),
        };
        let ram = GuestRam::from_regions(regions)
            .map_err(|source| MemoryError::Map { bytes: size, source: Box::new(source) })?;
        Ok(Self { ram, window })
    }

    /// Gives all of it to `vm`, in slots 0, 1, …: before the interrupt controller exists, because each slot set after that
    /// costs milliseconds.
    pub fn register(&self, vm: &VmFd) -> Result<(), MemoryError> {
        let ram = self.ram.iter().map(|region| (region.start_addr().0, &**region));
        let window = self.window.iter().map(|window| (window.start, &window.mapping));
        for (slot, (guest, mapping)) in (0..).zip(ram.chain(window)) {
            show_to_guest(vm, slot, guest, mapping)?;
        }
        Ok(())
    }

    /// The RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The end of the RAM below the hole.
    pub fn low_end(&self) -> u64 {
        self.ram.iter().next().map_or(0, |region| region.len())
    }

    /// RAM as (start, length) in bytes, rising.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.ram.iter().map(|region| (region.start_addr().0, region.len()))
    }

    /// The hotplug window as (start, length) in bytes.
    pub fn window(&self) -> Option<(u64, u64)> {
        self.window.as_ref().map(|window| (window.start, window.mapping.size() as u64))
    }
}

/// Gives the host back `length` bytes of RAM from `address` on, whole pages that the guest does not need: they read as zeroes
/// afterwards. The range must lie in RAM.
pub fn discard(ram: &GuestRam, address: GuestAddress, length: u64) -> std::io::Result<()> {
    let length = usize::try_from(length).map_err(std::io::Error::other)?;
    let slices = GuestMemory::get_slices(ram, address, length, Permissions::Write).map_err(std::io::Error::other)?;
    for slice in slices {
        let slice = slice.map_err(std::io::Error::other)?;
        // SAFETY: the slice lies in one live mapping of guest memory, private and anonymous, and the advice leaves it mapped: it
        // reads as zeroes from now on. Nothing but the guest relies on its contents: this process reads and writes guest memory
        // volatilely, and holds no reference into it.
        unsafe { madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), Advice::LinuxDontNeed) }?;
    }
    Ok(())
}

fn window_start(ram_end: u64) -> u64 {
    ram_end.max(HOLE_END).next_multiple_of(HOTPLUG_ALIGNMENT)
}

/// The host's RAM in bytes; without bound where the kernel does not say.
fn host_memory() -> u64 {
    let mut info = std::mem::MaybeUninit::<libc::sysinfo>::zeroed();
    // SAFETY: the pointer is to a writable `sysinfo`, which the kernel fills; all zeros are one too.
    let info = unsafe { (libc::sysinfo(info.as_mut_ptr()) == 0).then(|| info.assume_init()) };
    info.map_or(u64::MAX, |info| info.totalram.saturating_mul(info.mem_unit.into()))
}

fn ram_region(guest: u64, bytes: u64, pages: Pages) -> Result<GuestRegionMmap, MemoryError> {
    let mapping = map(bytes, ProtFlags::READ | ProtFlags::WRITE, pages)?;
    GuestRegionMmap::new(mapping, GuestAddress(guest))
        .ok_or_else(|| MemoryError::Map { bytes, source: "it does not fit in the guest's address space".into() })
}

fn map(bytes: u64, access: ProtFlags, pages: Pages) -> Result<MmapRegion, MemoryError> {
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    // Pages of the pool are reserved at once: a guest that found none later would die of it.
    let (kind, advice) = match pages {
        Pages::Usual => (libc::MAP_NORESERVE, None),
        Pages::Transparent => (libc::MAP_NORESERVE, Some(Advice::LinuxHugepage)),
        Pages::Huge2M => (libc::MAP_HUGETLB | libc::MAP_HUGE_2MB, None),
        Pages::Huge1G => (libc::MAP_HUGETLB | libc::MAP_HUGE_1GB, None),
    };
    let builder = MmapRegionBuilder::new(length)
        .with_mmap_prot(access.bits().cast_signed())
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | kind);
    let fence = Fence::around(length);
    let mapping = builder.build().map_err(|source| unmapped(bytes, pages, source))?;
    drop(fence);
    for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork].into_iter().chain(advice) {
        // SAFETY: the range is exactly the mapping made above, and no advice here changes its contents or validity in this
        // process.
        unsafe { madvise(mapping.as_ptr().cast(), mapping.size(), advice) }
            .map_err(|source| MemoryError::Advise(source.into()))?;
    }
    Ok(mapping)
}

/// Two stretches of unused address space with a hole between them, so that a mapping of the hole's length goes there and begins
/// at a multiple of [`LARGE_PAGE`]: only then can KVM map it by pages of that size, which kernels before 6.7 leave to chance. Where
/// the kernel puts it elsewhere all the same, it works, with small pages.
struct Fence([(usize, usize); 2]);

impl Fence {
    /// A hole of `length` bytes; none where there is no room to look for one.
    fn around(length: usize) -> Option<Self> {
        let whole = length.checked_add(LARGE_PAGE)?;
        // SAFETY: a new mapping, of which nothing is ever read or written.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), whole, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)
        };
        let start = start.ok()?.addr();
        let hole = start.next_multiple_of(LARGE_PAGE);
        let fence = Self([(start, hole - start), (hole + length, start + whole - hole - length)]);
        unmap(hole, length);
        Some(fence)
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        self.0.iter().filter(|(_, length)| *length > 0).for_each(|(start, length)| unmap(*start, *length));
    }
}

/// Gives address space back that a [`Fence`] holds.
fn unmap(start: usize, length: usize) {
    // SAFETY: the range is part of the mapping that the fence made and was not unmapped before; nobody else knows of it. A
    // failure leaves it mapped, which costs address space and nothing else.
    let _ = unsafe { munmap(std::ptr::without_provenance_mut(start), length) };
}

fn unmapped(bytes: u64, pages: Pages, source: MmapRegionError) -> MemoryError {
    match (pages, source) {
        (Pages::Huge2M | Pages::Huge1G, MmapRegionError::Mmap(source)) => MemoryError::Pool { bytes, source },
        (_, source) => MemoryError::Map { bytes, source: Box::new(source) },
    }
}

/// The one function that shows host memory to a guest. It refuses memory that holds keys: memfd_secret alone does not
/// keep a page from the guest.
fn show_to_guest(vm: &VmFd, slot: u32, guest: u64, mapping: &MmapRegion) -> Result<(), MemoryError> {
    if secretmem::overlaps(mapping.as_ptr(), mapping.size()) {
        return Err(MemoryError::Secret { guest });
    }
    let bytes = mapping.size() as u64;
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: guest,
        memory_size: bytes,
        userspace_addr: mapping.as_ptr() as u64,
    };
    // SAFETY: the range is one whole live mapping (an `MmapRegion` unmaps it only when dropped), which holds nothing but guest
    // memory. It outlives every use: each vCPU holds an `Arc` of the `Memory` that owns the mapping, and without a vCPU nothing
    // reads or writes through the slot. This process reads and writes it volatilely only.
    unsafe { vm.set_user_memory_region(region) }.map_err(|source| MemoryError::Register { guest, bytes, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::layout::GIB;

    #[test]
    fn memory_goes_round_the_hole() {
        let ranges = |size| Memory::new(size, 0).map(|m| m.ranges().collect::<Vec<_>>()).unwrap_or_default();
        assert_eq!(ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ranges(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(ranges(3 * GIB + (2 << 20)), [(0, 3 * GIB), (4 * GIB, 2 << 20)]);
        assert_eq!(ranges(8 * GIB), [(0, 3 * GIB), (4 * GIB, 5 * GIB)]);
    }

    #[test]
    fn the_hotplug_window_follows_the_memory() {
        let window = |size, hotplug| Memory::new(size, hotplug).ok().and_then(|m| m.window());
        assert_eq!(window(128 << 20, 0), None);
        assert_eq!(window(128 << 20, GIB), Some((4 * GIB, GIB)));
        assert_eq!(window(4 * GIB + (2 << 20), GIB), Some((6 * GIB, GIB)));
    }

    #[test]
    fn more_than_the_host_has_is_refused() {
        let refused = Memory::new(1 << 50, 0).err();
        assert!(
            matches!(refused, Some(MemoryError::Host { asked, has }) if asked == 1 << 50 && has > 1 << 28),
            "{refused:?}"
        );
    }

    #[test]
    fn huge_pages_come_from_the_pool_or_not_at_all() {
        let pool = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
        let pages: u64 = pool.trim().parse().unwrap_or(0);
        let asked = (pages + 8).max(8) << 21;
        let refused = Memory::of(Pages::Huge2M, asked, 0).err();
        assert!(matches!(refused, Some(MemoryError::Pool { bytes, .. }) if bytes == asked.min(HOLE)), "{refused:?}");
        Memory::of(Pages::Transparent, 16 << 20, 0).expect("a kernel with transparent huge pages");
    }

    #[test]
    fn memory_begins_where_large_pages_do() {
        // Something small below the last mapping, so that the next one would lie askew.
        let askew: Vec<_> = (0..4).map(|_| Memory::new(16 << 20, 4096)).collect();
        for memory in askew.iter().flatten().chain(&[Memory::new(64 << 20, 2 << 20).expect("64 MiB")]) {
            let start = memory.ram().iter().next().map_or(1, |region| region.as_ptr().addr());
            assert!(start.is_multiple_of(LARGE_PAGE), "{start:#x}");
        }
    }

    #[test]
    fn memory_is_private_and_belongs_to_no_file() {
        let memory = Memory::new(16 << 20, 0).expect("16 MiB");
        let start = memory.ram().iter().next().map_or(0, |r| r.as_ptr() as usize);
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        let holds = |line: &&str| {
            let range = line.split(' ').next().and_then(|r| r.split_once('-'));
            let parse = |text: &str| usize::from_str_radix(text, 16).ok();
            range.is_some_and(|(a, b)| parse(a).zip(parse(b)).is_some_and(|(a, b)| (a..b).contains(&start)))
        };
        let mut lines = maps.lines().skip_while(|line| !holds(line));
        let fields: Vec<_> = lines.next().unwrap_or_default().split_whitespace().collect();
        assert_eq!((fields[1], fields[3], fields[4]), ("rw-p", "00:00", "0"), "private, no device, no inode");
        let flags = lines.find(|line| line.starts_with("VmFlags")).unwrap_or_default();
        assert!(flags.contains(" dd") && flags.contains(" dc"), "not dumped, not copied: {flags}");
    }

    #[test]
    fn a_page_with_keys_is_never_shown_to_a_guest() {
        let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm()).expect("this test needs /dev/kvm");
        let secret = secretmem::Secret::<32>::random().expect("memory for keys");
        let page = secret.expose().as_ptr() as usize & !0xfff;
        for (start, pages) in [(page, 1), (page - 0x1000, 2), (page - 0x1000, 3)] {
            let builder = MmapRegionBuilder::new(pages * 0x1000)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: the region is never dereferenced: `show_to_guest` looks at its address and length, and must refuse it. It
            // is not unmapped on drop, because a region over a raw pointer is not owned.
            let builder = unsafe { builder.with_raw_mmap_pointer(start as *mut u8) };
            let mapping = builder.build().expect("a description of a range");
            let answer = show_to_guest(&vm, 0, 0, &mapping);
            assert!(matches!(answer, Err(MemoryError::Secret { guest: 0 })), "{answer:?}");
        }
        let memory = Memory::new(16 << 20, 0).expect("16 MiB");
        memory.register(&vm).expect("memory without keys");
    }
}
