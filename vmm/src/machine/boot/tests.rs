//! Good and bad kernels.

use super::*;
use proptest::prelude::*;
use std::io::Write;

const MEMORY: u64 = 64 << 20;
const ENTRY: u64 = 0x20_0000;
const PVH_ENTRY: u32 = 0x20_0010;

/// Breaks an image.
type Change = fn(&mut Vec<u8>);

fn memory() -> Memory {
    Memory::new(MEMORY, 0).expect("64 MiB")
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("written");
    file
}

fn segment(kind: u32, from: u64, to: u64, file_size: u64, memory_size: u64) -> Vec<u8> {
    let words = [from, to, to, file_size, memory_size, 4096];
    let head = [kind, 7].into_iter().flat_map(u32::to_le_bytes);
    head.chain(words.into_iter().flat_map(u64::to_le_bytes)).collect()
}

fn elf(segments: &[Vec<u8>], content: &[u8]) -> Vec<u8> {
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    out.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    out.extend([ENTRY, 64, 0].into_iter().flat_map(u64::to_le_bytes));
    out.extend([0, 0, 0, 0, 64, 0, 56, 0, segments.len() as u8, 0, 64, 0, 0, 0, 0, 0]);
    segments.iter().for_each(|s| out.extend(s));
    out.resize(4096, 0);
    out.extend(content);
    out
}

fn note(kind: u32, name: &[u8], content: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> =
        [name.len() as u32, content.len() as u32, kind].into_iter().flat_map(u32::to_le_bytes).collect();
    for part in [name, content] {
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// Two segments, the first followed by zeros, and a note segment.
fn good_elf() -> Vec<u8> {
    let content: Vec<u8> = (0..200_000_u32).map(|i| i as u8).collect();
    let notes = [note(3, b"GNU\0", &[1; 20]), note(18, b"Xen\0", &PVH_ENTRY.to_le_bytes())].concat();
    let segments = [
        segment(1, 4096, ENTRY, 150_000, 160_000),
        segment(1, 4096 + 150_000, 0x30_0000, 50_000, 50_000),
        segment(4, 4096 + 200_000, 0, notes.len() as u64, notes.len() as u64),
    ];
    elf(&segments, &[content, notes].concat())
}

fn good_bzimage() -> Vec<u8> {
    let mut out = vec![0; 1024];
    out[0x1f1] = 1;
    out[0x201] = 0x6a;
    out[0x202..0x206].copy_from_slice(b"HdrS");
    out[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    out[0x211] = 1;
    out[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    out[0x236] = 1;
    out[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
    out[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    out[0x260..0x264].copy_from_slice(&0x100_0000_u32.to_le_bytes());
    out.extend((0..100_000_u32).map(|i| i as u8));
    out
}

fn load(kernel: &[u8]) -> Result<Digest, BootError> {
    Loader::default().load_kernel(&memory(), &file(kernel))
}

fn read<const N: usize>(memory: &Memory, at: u64) -> [u8; N] {
    let mut out = [0; N];
    memory.ram().read_slice(&mut out, GuestAddress(at)).expect("RAM");
    out
}

#[test]
fn an_elf_kernel_with_note_is_entered_by_pvh() {
    let (memory, image) = (memory(), good_elf());
    let mut loader = Loader::default();
    let digest = loader.load_kernel(&memory, &file(&image)).expect("a good kernel");
    assert_eq!(digest, Digest::of(&image));
    assert_eq!(read::<50_000>(&memory, 0x30_0000)[..], image[4096 + 150_000..][..50_000]);
    assert_eq!(read::<4>(&memory, ENTRY + 149_998), [image[4096 + 149_998], image[4096 + 149_999], 0, 0]);
    assert_eq!(loader.load_initrd(&memory, &file(b"initrd")).ok(), Some(Digest::of(b"initrd")));
    assert_eq!(loader.finish(&memory, "a=b").ok(), Some(Entry::Pvh(PVH_ENTRY)));
    assert_eq!(read(&memory, COMMAND_LINE), *b"a=b\0");
    assert_eq!(read(&memory, 0x6000), 0x336e_c578_u32.to_le_bytes());
    assert_eq!(read(&memory, 0x800), (MEMORY - 4096).to_le_bytes());
    assert_eq!(read(&memory, MEMORY - 4096), *b"initrd\0");
    assert!(matches!(loader.load_kernel(&memory, &file(&image)), Err(BootError::Twice)));
}

#[test]
fn an_elf_kernel_without_note_is_entered_in_long_mode() {
    let (memory, mut image) = (memory(), good_elf());
    image[64 + 2 * 56] = 0;
    let mut loader = Loader::default();
    loader.load_kernel(&memory, &file(&image)).expect("a good kernel");
    assert_eq!(loader.finish(&memory, "").ok(), Some(Entry::Linux64(ENTRY)));
    assert_eq!(read(&memory, 0x7000 + 0x70), 0xe_0000_u64.to_le_bytes(), "RSDP");
    assert_eq!(read(&memory, 0x7000 + 0x228), 0x2_0000_u32.to_le_bytes(), "command line");
    assert_eq!(read(&memory, 0x9000), 0xa003_u64.to_le_bytes());
    assert_eq!(read(&memory, 0xa018), 0xe003_u64.to_le_bytes());
    assert_eq!(read(&memory, 0xe000 + 8 * 511), 0xffe0_0083_u64.to_le_bytes());
}

#[test]
fn a_bzimage_is_entered_in_long_mode() {
    let (memory, image) = (memory(), good_bzimage());
    let mut loader = Loader::default();
    assert_eq!(loader.load_kernel(&memory, &file(&image)).ok(), Some(Digest::of(&image)));
    loader.load_initrd(&memory, &file(&[7; 5000])).expect("room");
    assert_eq!(loader.finish(&memory, &"x".repeat(2047)).ok(), Some(Entry::Linux64(0x10_0200)));
    assert_eq!(read::<100_000>(&memory, 0x10_0000)[..], image[1024..]);
    assert_eq!(read(&memory, 0x7000 + 0x202), *b"HdrS");
    let initrd = [((MEMORY - 8192) as u32).to_le_bytes(), 5000_u32.to_le_bytes()].concat();
    assert_eq!(read::<8>(&memory, 0x7000 + 0x218)[..], initrd);
    assert_eq!(read(&memory, 0x7000 + 0x210), [0xff]);
    let e820: [u8; 20] = read(&memory, 0x7000 + 0x2d0 + 40);
    assert_eq!(e820[..8], 0x10_0000_u64.to_le_bytes());
    assert_eq!(e820[8..16], (MEMORY - 0x10_0000).to_le_bytes());
    assert!(matches!(loader.finish(&memory, &"x".repeat(2048)), Err(BootError::CommandLine(2047))));
    assert!(matches!(loader.finish(&memory, "a\0b"), Err(BootError::CommandLine(2047))));
}

#[test]
fn a_wrong_digest_is_refused() {
    let (kernel, initrd) = (file(&good_bzimage()), file(b"initrd"));
    let right = |bytes: &[u8]| Some(Digest::of(bytes));
    let attempt = |kernel_digest, initrd_digest| {
        let boot = Boot {
            kernel: Image { file: &kernel, digest: kernel_digest },
            initrd: Some(Image { file: &initrd, digest: initrd_digest }),
            cmdline: "",
        };
        Loader::default().load(&memory(), &boot)
    };
    assert!(attempt(right(&good_bzimage()), right(b"initrd")).is_ok());
    assert!(matches!(attempt(right(b"other"), None), Err(BootError::Digest { what: "kernel", .. })));
    assert!(matches!(attempt(None, right(b"other")), Err(BootError::Digest { what: "initrd", .. })));
}

#[test]
fn bad_elf_kernels_are_refused() {
    let with = |change: Change| {
        let mut image = good_elf();
        change(&mut image);
        load(&image).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let cases: [(Change, &str); 12] = [
        (|i| i[4] = 1, "no 64-bit"),
        (|i| i[18] = 3, "no 64-bit"),
        (|i| i[56] = 0, "program headers"),
        (|i| i[56] = 65, "program headers"),
        (|i| i[32..40].fill(0xff), "program headers"),
        (|i| i[64 + 24 + 7] = 0xff, "outside"),
        (|i| i[64 + 24..64 + 32].fill(0), "outside"),
        (|i| i[64 + 40 + 7] = 0xff, "outside"),
        (|i| i[64 + 32 + 7] = 0xff, "makes no sense"),
        (|i| i[64 + 56 + 26] = 0x20, "overlaps"),
        (|i| i[24 + 7] = 1, "lies in no loaded segment"),
        (|i| i.truncate(100_000), "cut short"),
    ];
    for (index, (change, expected)) in cases.into_iter().enumerate() {
        let error = with(change);
        assert!(error.contains(expected), "{index}: {error:?} should say {expected:?}");
    }
}

#[test]
fn bad_bzimages_are_refused() {
    let with = |change: Change| {
        let mut image = good_bzimage();
        change(&mut image);
        load(&image).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let cases: [(Change, &str); 8] = [
        (|i| i[0x207] = 1, "older than"),
        (|i| i[0x211] = 0, "no 64-bit entry"),
        (|i| i[0x236] = 0, "no 64-bit entry"),
        (|i| i[0x1f1] = 255, "cut short"),
        (|i| i.truncate(1024), "cut short"),
        (|i| i.truncate(0x220), "cut short"),
        (|i| i[0x25f] = 0xff, "does not fit"),
        (|i| i[0x263] = 0xff, "does not fit"),
    ];
    for (index, (change, expected)) in cases.into_iter().enumerate() {
        let error = with(change);
        assert!(error.contains(expected), "{index}: {error:?} should say {expected:?}");
    }
    assert!(matches!(load(b""), Err(BootError::Format)));
    assert!(matches!(load(&[0; 5000]), Err(BootError::Format)));
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let memory = memory();
    let large = tempfile::tempfile().expect("a file");
    large.set_len(60 << 20).expect("sparse");
    let mut loader = Loader::default();
    assert!(matches!(loader.load_initrd(&memory, &large), Err(BootError::NoKernel)));
    loader.load_kernel(&memory, &file(&good_bzimage())).expect("a good kernel");
    assert!(matches!(loader.load_initrd(&memory, &large), Err(BootError::Memory { what: "initrd", .. })));
    large.set_len(2 << 30).expect("sparse");
    assert!(matches!(loader.load_initrd(&memory, &large), Err(BootError::Huge { what: "initrd" })));
}

#[test]
fn damaged_notes_are_refused() {
    let good = note(18, b"Xen\0", &[1, 2, 3, 4]);
    assert_eq!(elf::pvh_entry(&good), Ok(Some(0x0403_0201)));
    assert_eq!(elf::pvh_entry(&note(18, b"Xen\0", &[1, 0, 0, 0, 0, 0, 0, 0])), Ok(Some(1)));
    assert_eq!(elf::pvh_entry(&note(18, b"Xen\0", &[1, 0, 0, 0, 1, 0, 0, 0])), Err(ElfError::Notes));
    assert_eq!(elf::pvh_entry(&note(18, b"Xen\0", &[1, 0])), Err(ElfError::Notes));
    assert_eq!(elf::pvh_entry(&note(17, b"Xen\0", &[1, 0])), Ok(None));
    assert_eq!(elf::pvh_entry(&good[..15]), Err(ElfError::Notes));
    assert_eq!(elf::pvh_entry(&[0xff; 64]), Err(ElfError::Notes));
}

#[test]
fn a_corpus_and_its_mutations_are_survived() {
    let corpus = [good_elf(), good_bzimage(), note(18, b"Xen\0", &[1, 2, 3, 4])];
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for seed in &corpus {
        fuzz_kernel(seed);
        // Headers and notes are where the parsers look.
        let mut short = seed.clone();
        short.truncate(4200);
        for _ in 0..20_000 {
            let mut bytes = short.clone();
            for _ in 0..1 + next() % 8 {
                let window = if next() % 4 == 0 { bytes.len() } else { bytes.len().min(0x280) };
                let at = next() as usize % window;
                bytes[at] = match next() % 4 {
                    0 => 0xff,
                    1 => 0,
                    _ => next() as u8,
                };
            }
            bytes.truncate(bytes.len().saturating_sub((next() % 64) as usize * usize::from(next() % 8 == 0)));
            fuzz_kernel(&bytes);
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        fuzz_kernel(&bytes);
    }
}
