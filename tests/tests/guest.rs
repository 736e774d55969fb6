//! The small guest by itself, on the least program that can boot it.

use fealty_tests::guest::images;
use fealty_tests::lab::LIMIT;
use fealty_tests::process::{Ended, run};
use std::process::Command;

/// Boots the guest by the way `way` (none: Linux' 64-bit entry) and lets it do `words`.
fn boot(way: Option<&str>, words: &str) -> Ended {
    let line = format!("console=ttyS0 fealty.do={words} quiet");
    run(Command::new(&images().bare).args(way).arg(&images().elf).arg(line), LIMIT)
}

#[test]
fn it_boots_through_each_of_its_entries() {
    for (way, name) in [(None, "linux64"), (Some("--linux32"), "linux32"), (Some("--pvh"), "pvh")] {
        let ended = boot(way, "hello,tick:1,poweroff").good();
        let lines: Vec<&str> = ended.out.lines().collect();
        let banner = format!("fealty-guest {name}");
        assert_eq!(lines[..4], [&banner, "hello", "tick 1", "powering off"], "{}", ended.out);
    }
}

#[test]
fn it_says_what_it_can_not_do_and_goes_on() {
    let ended = boot(None, "hello,frobnicate,hello,poweroff").good();
    assert_eq!(ended.out.matches("hello").count(), 2, "{}", ended.out);
    assert!(ended.out.contains("failed frobnicate: no such word"), "{}", ended.out);
    let ended = boot(None, "write:1:256,poweroff").good();
    assert!(ended.out.contains("failed write:1:256: not a number that fits"), "{}", ended.out);
}

#[test]
fn its_panic_is_a_triple_fault() {
    let ended = boot(None, "panic").refused();
    assert!(ended.err.contains("Shutdown"), "{}", ended.err);
}

#[test]
fn its_bzimage_holds_what_the_elf_image_loads() {
    let (elf, image) = (read(&images().elf), read(&images().bzimage));
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().expect("four bytes"));
    assert_eq!(&image[0x202..0x206], b"HdrS");
    assert_eq!(image[0x1fe..0x200], [0x55, 0xaa]);
    assert_eq!(image[0x236] & 1, 1, "it has a 64-bit entry");
    let setup = (usize::from(image[0x1f1]) + 1) * 512;
    assert_eq!((image.len() - setup) / 16, word(0x1f4) as usize, "syssize");
    assert!(word(0x260) as usize >= image.len() - setup, "init_size");

    let entry = u64::from_le_bytes(elf[24..32].try_into().expect("eight bytes"));
    assert_eq!(entry, u64::from(word(0x214)) + 0x200);
    // The first loadable segment begins with the 32-bit entry and so holds the 64-bit one.
    let first = u64::from_le_bytes(elf[64 + 8..64 + 16].try_into().expect("eight bytes")) as usize;
    assert_eq!(image[setup..setup + 0x400], elf[first..first + 0x400]);
}

fn read(path: &std::path::Path) -> Vec<u8> {
    std::fs::read(path).expect("an image that was built")
}
