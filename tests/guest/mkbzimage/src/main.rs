//! `mkbzimage GUEST.elf GUEST.bzimage`: wraps a static ELF image, linked as `guest.ld` says, with the setup header of Linux' boot
//! protocol 2.15. There is no real-mode part: the image is for loaders that enter at 32 or 64 bits, as VMMs do.

use std::path::Path;
use std::process::ExitCode;
use std::{env, error::Error, fs};

/// A boot sector and one sector of setup, as few as there can be.
const SETUP: usize = 1024;
/// The 64-bit entry of a bzImage, from the start of its protected-mode part.
const ENTRY64: u64 = 0x200;
const PAGE: u64 = 4096;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let [from, to] = arguments.as_slice() else {
        eprintln!("usage: mkbzimage GUEST.elf GUEST.bzimage");
        return ExitCode::from(2);
    };
    match wrap(Path::new(from), Path::new(to)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mkbzimage: {}: {error}", Path::new(from).display());
            ExitCode::FAILURE
        }
    }
}

fn wrap(from: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    let payload = Payload::from_elf(&fs::read(from)?)?;
    let mut image = header(&payload).to_vec();
    image.extend_from_slice(&payload.bytes);
    Ok(fs::write(to, image)?)
}

/// The protected-mode part.
struct Payload {
    /// Physical address of the first byte.
    address: u64,
    /// What is loaded; a whole number of 16-byte paragraphs.
    bytes: Vec<u8>,
    /// Memory from `address` on that it needs, zeroed data included.
    memory: u64,
}

impl Payload {
    /// Lays the loadable segments out as they will lie in memory.
    fn from_elf(elf: &[u8]) -> Result<Self, &'static str> {
        if !elf.starts_with(b"\x7fELF\x02\x01") || number::<2>(elf, 18)? != 62 {
            return Err("not an x86-64 ELF file");
        }
        let (table, count) = (number::<8>(elf, 32)? as usize, number::<2>(elf, 56)? as usize);
        let segments: Vec<Segment> = (0..count)
            .map(|n| Segment::parse(elf, table + n * 56))
            .filter_map(Result::transpose)
            .collect::<Result<_, _>>()?;
        let address = segments.iter().map(|segment| segment.address).min().ok_or("nothing to load")?;
        if number::<8>(elf, 24)? != address + ENTRY64 {
            return Err("the entry does not lie 0x200 after the image's start");
        }
        let mut bytes = Vec::new();
        let mut memory = 0;
        for segment in &segments {
            let at = (segment.address - address) as usize;
            bytes.resize(bytes.len().max(at + segment.bytes.len()), 0);
            bytes[at..at + segment.bytes.len()].copy_from_slice(segment.bytes);
            memory = memory.max(segment.address - address + segment.memory);
        }
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        Ok(Self { address, bytes, memory: memory.next_multiple_of(PAGE) })
    }
}

struct Segment<'a> {
    address: u64,
    bytes: &'a [u8],
    memory: u64,
}

impl<'a> Segment<'a> {
    /// The program header at `at`, if it is of a loadable segment.
    fn parse(elf: &'a [u8], at: usize) -> Result<Option<Self>, &'static str> {
        const PT_LOAD: u64 = 1;
        if number::<4>(elf, at)? != PT_LOAD {
            return Ok(None);
        }
        let (start, length) = (number::<8>(elf, at + 8)? as usize, number::<8>(elf, at + 32)? as usize);
        let bytes = elf.get(start..).and_then(|rest| rest.get(..length)).ok_or("a segment reaches beyond the file")?;
        Ok(Some(Self { address: number::<8>(elf, at + 24)?, bytes, memory: number::<8>(elf, at + 40)? }))
    }
}

/// The setup header (Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").
fn header(payload: &Payload) -> [u8; SETUP] {
    let mut setup = [0; SETUP];
    let mut put = |at: usize, bytes: &[u8]| setup[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[(SETUP / 512 - 1) as u8]); // setup_sects, the boot sector not counted
    put(0x1f4, &((payload.bytes.len() / 16) as u32).to_le_bytes()); // syssize
    put(0x1fa, &0xffff_u16.to_le_bytes()); // vid_mode: normal
    put(0x1fe, &0xaa55_u16.to_le_bytes()); // boot_flag
    put(0x200, &[0xeb, 0x66]); // jump over the header, which so says its length
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes()); // version
    put(0x20e, &(VERSION_AT as u16 - 0x200).to_le_bytes()); // kernel_version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &(payload.address as u32).to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &(PAGE as u32).to_le_bytes()); // kernel_alignment
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: a 64-bit entry at 0x200
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x258, &payload.address.to_le_bytes()); // pref_address
    put(0x260, &(payload.memory as u32).to_le_bytes()); // init_size
    put(0x268, &[0xfa, 0xf4, 0xeb, 0xfd]); // real mode: cli; hlt; again
    put(VERSION_AT, b"fealty-guest\0");
    setup
}

/// Where in the setup the version's text lies.
const VERSION_AT: usize = 0x280;

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<u64, &'static str> {
    let part = bytes.get(at..).and_then(|rest| rest.get(..N)).ok_or("the file is cut off")?;
    let mut value = [0; 8];
    value[..N].copy_from_slice(part);
    Ok(u64::from_le_bytes(value))
}
