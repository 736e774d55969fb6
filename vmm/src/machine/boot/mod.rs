//! From files to a guest that can be entered: kernel and initrd go into guest memory in one pass, which also hashes
//! them, so that the bytes that were hashed are the bytes that run, whatever the store does meanwhile.

mod bzimage;
mod elf;
mod feed;
mod linux;
mod map;
mod pvh;

use super::layout::{COMMAND_LINE, COMMAND_LINE_MAX, GIB, KERNEL};
use super::memory::{GuestRam, Memory};
use super::vcpu::{Entry, boot_gdt};
use feed::{Feed, HEAD_MAX};
use policy::encoding::Digest;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use vm_memory::{Bytes, GuestAddress};

pub use elf::ElfError;

/// No kernel or initrd is larger.
const IMAGE_MAX: u64 = GIB;
const PAGE: u64 = 4096;

/// A file to load, and what its content must be.
#[derive(Clone, Copy)]
pub struct Image<'a> {
    /// The file, read from its beginning.
    pub file: &'a File,
    /// SHA-256 of its content; none only for an unprotected machine.
    pub digest: Option<Digest>,
}

/// What to boot.
pub struct Boot<'a> {
    /// bzImage or ELF.
    pub kernel: Image<'a>,
    /// The initial RAM file system.
    pub initrd: Option<Image<'a>>,
    /// The kernel's command line.
    pub cmdline: &'a str,
}

/// Why a guest can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("cannot read the {what}")]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Too large for any machine.
    #[error("the {what} is larger than 1 GiB")]
    Huge {
        /// Kernel or initrd.
        what: &'static str,
    },
    /// Other content than the configuration says.
    #[error("the {what} has SHA-256 {found}, but the configuration says {expected}")]
    Digest {
        /// Kernel or initrd.
        what: &'static str,
        /// Of the file.
        found: Digest,
        /// Of the configuration.
        expected: Digest,
    },
    /// Neither format.
    #[error("the kernel is neither a bzImage nor a 64-bit x86 ELF executable")]
    Format,
    /// A bzImage that this boot protocol does not cover.
    #[error("the bzImage can't be booted: {0}")]
    BzImage(&'static str),
    /// An ELF file that makes no sense.
    #[error("the ELF kernel can't be booted: {0}")]
    Elf(#[from] ElfError),
    /// The file is shorter than its headers say.
    #[error("the kernel is cut short")]
    Short,
    /// It does not fit.
    #[error("the {what} does not fit in {memory} bytes of guest memory")]
    Memory {
        /// Kernel or initrd.
        what: &'static str,
        /// Memory below the hole.
        memory: u64,
    },
    /// The command line is too long for the kernel, or holds a NUL.
    #[error("the command line holds a NUL or is longer than the {0} bytes that this kernel takes")]
    CommandLine(usize),
    /// Called twice.
    #[error("a kernel is already loaded")]
    Twice,
    /// Called in the wrong order.
    #[error("no kernel is loaded")]
    NoKernel,
}

/// What was found in a kernel's headers.
#[derive(Clone, Debug)]
struct Kernel {
    entry: Entry,
    /// End of the memory that it takes while it starts.
    end: u64,
    /// The last address that its initrd may touch.
    initrd_max: u64,
    /// The longest command line it takes.
    cmdline_max: usize,
    /// The setup header of a bzImage, as in the file.
    setup: Option<linux::SetupHeader>,
}

/// What has been loaded so far.
#[derive(Default)]
pub struct Loader {
    kernel: Option<Kernel>,
    initrd: Option<(u64, u64)>,
}

impl Loader {
    /// Loads a kernel and gives the SHA-256 of its content. The caller compares it before anything runs.
    pub fn load_kernel(&mut self, memory: &Memory, file: &File) -> Result<Digest, BootError> {
        let mut hash = Sha256::new();
        self.put_kernel(memory, file, |bytes| hash.update(bytes))?;
        Ok(Digest(hash.finalize().into()))
    }

    fn put_kernel(&mut self, memory: &Memory, file: &File, see: impl FnMut(&[u8])) -> Result<(), BootError> {
        if self.kernel.is_some() {
            return Err(BootError::Twice);
        }
        let mut feed = Feed::open("kernel", file)?;
        let length = feed.length();
        let head = feed.head(HEAD_MAX)?;
        let plan = if head.starts_with(&elf::MAGIC) {
            elf::plan(head, memory.low_end())?
        } else if bzimage::is_one(head) {
            bzimage::plan(head, length, memory.low_end())?
        } else {
            return Err(BootError::Format);
        };
        let notes = feed.pour(&plan.pieces, &plan.notes, memory.ram(), see)?;
        self.kernel = Some(plan.finish(&notes)?);
        Ok(())
    }

    /// Loads an initrd for the kernel loaded before, as high as kernel and memory allow.
    pub fn load_initrd(&mut self, memory: &Memory, file: &File) -> Result<Digest, BootError> {
        let mut hash = Sha256::new();
        self.put_initrd(memory, file, |bytes| hash.update(bytes))?;
        Ok(Digest(hash.finalize().into()))
    }

    fn put_initrd(&mut self, memory: &Memory, file: &File, see: impl FnMut(&[u8])) -> Result<(), BootError> {
        let kernel = self.kernel.as_ref().ok_or(BootError::NoKernel)?;
        let feed = Feed::open("initrd", file)?;
        let length = feed.length();
        let too_small = || BootError::Memory { what: "initrd", memory: memory.low_end() };
        let top = memory.low_end().min(kernel.initrd_max.saturating_add(1));
        let start = top.checked_sub(length).ok_or_else(too_small)? / PAGE * PAGE;
        if start < kernel.end.next_multiple_of(PAGE) {
            return Err(too_small());
        }
        let piece = feed::Piece { from: 0, length, to: start };
        feed.pour(&[piece], &[], memory.ram(), see)?;
        self.initrd = Some((start, length));
        Ok(())
    }

    /// Writes what the kernel reads first (zero page or start info, command line, GDT, page tables) and says how to enter it.
    pub fn finish(&self, memory: &Memory, cmdline: &str) -> Result<Entry, BootError> {
        let kernel = self.kernel.as_ref().ok_or(BootError::NoKernel)?;
        let longest = kernel.cmdline_max.min(COMMAND_LINE_MAX);
        if cmdline.len() > longest || cmdline.contains('\0') {
            return Err(BootError::CommandLine(longest));
        }
        // Everything written here lies below 640 KiB, and the smallest machine has 16 MiB.
        let ram = memory.ram();
        put(ram, COMMAND_LINE, cmdline.as_bytes())?;
        put(ram, COMMAND_LINE + cmdline.len() as u64, &[0])?;
        for (at, entry) in (super::layout::BOOT_GDT..).step_by(8).zip(boot_gdt(kernel.entry)) {
            put(ram, at, &entry.to_le_bytes())?;
        }
        match kernel.entry {
            Entry::Linux64(_) => linux::write(memory, kernel.setup.as_ref(), self.initrd, cmdline.len())?,
            Entry::Pvh(_) => pvh::write(memory, self.initrd)?,
        }
        Ok(kernel.entry)
    }

    /// All of `boot`, digests compared; what is compared with nothing is not hashed, which takes longer than the copy.
    pub fn load(&mut self, memory: &Memory, boot: &Boot<'_>) -> Result<Entry, BootError> {
        let Image { file, digest } = boot.kernel;
        match digest {
            Some(expected) => compare("kernel", self.load_kernel(memory, file)?, expected)?,
            None => self.put_kernel(memory, file, |_| ())?,
        }
        match boot.initrd {
            Some(Image { file, digest: Some(expected) }) => {
                compare("initrd", self.load_initrd(memory, file)?, expected)?;
            }
            Some(Image { file, digest: None }) => self.put_initrd(memory, file, |_| ())?,
            None => {}
        }
        self.finish(memory, boot.cmdline)
    }
}

fn compare(what: &'static str, found: Digest, expected: Digest) -> Result<(), BootError> {
    if found == expected { Ok(()) } else { Err(BootError::Digest { what, found, expected }) }
}

/// Writes where there is RAM in every machine.
fn put(ram: &GuestRam, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    ram.write_slice(bytes, GuestAddress(at)).map_err(|_| BootError::Memory { what: "kernel", memory: KERNEL })
}

/// Where a kernel's bytes go, before its content is read.
struct Plan {
    pieces: Vec<feed::Piece>,
    /// Parts of the file that `finish` wants to see: offset and length.
    notes: Vec<(u64, usize)>,
    kernel: Kernel,
}

impl Plan {
    fn finish(self, notes: &[Vec<u8>]) -> Result<Kernel, BootError> {
        let mut kernel = self.kernel;
        for notes in notes {
            let Some(entry) = elf::pvh_entry(notes)? else { continue };
            if !self.pieces.iter().any(|piece| piece.holds(entry.into())) {
                return Err(ElfError::Entry(entry.into()).into());
            }
            kernel.entry = Entry::Pvh(entry);
        }
        Ok(kernel)
    }
}

/// Parses a kernel's headers as a loader for a machine of 64 MiB would.
#[doc(hidden)]
pub fn fuzz_kernel(data: &[u8]) {
    const LOW: u64 = 64 << 20;
    let head = &data[..data.len().min(HEAD_MAX)];
    let plan = match elf::plan(head, LOW) {
        Ok(plan) => Ok(plan),
        Err(_) => bzimage::plan(head, data.len() as u64, LOW),
    };
    if let Ok(plan) = plan {
        let part = |(at, length): &(u64, usize)| data.get(usize::try_from(*at).ok()?..)?.get(..*length).map(Vec::from);
        let notes: Vec<_> = plan.notes.iter().filter_map(part).collect();
        for piece in &plan.pieces {
            assert!(piece.to >= KERNEL && piece.to.checked_add(piece.length).is_some_and(|end| end <= LOW));
        }
        let _ = plan.finish(&notes);
    }
    let _ = elf::pvh_entry(data);
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
