//! Memory of a process, from `/proc/PID/smaps`.

use super::BenchError;
use std::fs;
use std::path::{Path, PathBuf};

/// KiB in memory, and of those the ones that are private and were written.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Memory {
    /// Rss.
    pub(super) resident: u64,
    /// Private_Dirty.
    pub(super) dirty: u64,
}

/// Mappings at least this large are the guest's memory, KiB.
const GUEST: u64 = 64 << 10;

/// The process's memory less its guest's, with what its children have written: all else of theirs is its own pages.
pub(super) fn without_guest(pid: u32) -> Result<Memory, BenchError> {
    let path = PathBuf::from(format!("/proc/{pid}/smaps"));
    let (guest, mut rest) = split(&read(&path)?);
    if guest.resident == 0 {
        return Err(BenchError::Memory(path));
    }
    for child in read(Path::new(&format!("/proc/{pid}/task/{pid}/children")))?.split_whitespace() {
        let written = of(child.parse().map_err(|_| BenchError::Memory(path.clone()))?)?.dirty;
        rest = Memory { resident: rest.resident + written, dirty: rest.dirty + written };
    }
    Ok(rest)
}

/// The whole process's memory.
pub(super) fn of(pid: u32) -> Result<Memory, BenchError> {
    let (large, rest) = split(&read(Path::new(&format!("/proc/{pid}/smaps_rollup")))?);
    Ok(Memory { resident: large.resident + rest.resident, dirty: large.dirty + rest.dirty })
}

/// The process whose command line holds all of `words`.
pub(super) fn find(words: &[&str]) -> Option<u32> {
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.into_iter().find(|pid: &u32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.iter().all(|word| line.split('\0').any(|argument| argument.ends_with(word)))
    })
}

fn read(path: &Path) -> Result<String, BenchError> {
    fs::read_to_string(path).map_err(|error| BenchError::Io(path.into(), error))
}

/// Sums of the large mappings and of the others.
fn split(smaps: &str) -> (Memory, Memory) {
    let (mut guest, mut rest, mut large) = (Memory::default(), Memory::default(), false);
    for line in smaps.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let Some(kib) = value.trim().strip_suffix(" kB").and_then(|number| number.trim().parse::<u64>().ok()) else {
            continue;
        };
        let sum = if large { &mut guest } else { &mut rest };
        match name {
            // The first field of a mapping.
            "Size" => large = kib >= GUEST,
            "Rss" => sum.resident += kib,
            "Private_Dirty" => sum.dirty += kib,
            _ => {}
        }
    }
    (guest, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_told_from_the_rest() {
        let smaps = "7f0000000000-7f0008000000 rw-p 00000000 00:00 0 \nSize:             131072 kB\nRss:                 508 kB\n\
                     Private_Dirty:       500 kB\n\
                     55aa00000000-55aa00001000 r-xp 00000000 fe:00 123 /bin/x\nSize:                  8 kB\nRss:                   4 kB\n\
                     Private_Dirty:         0 kB\n";
        let (guest, rest) = split(smaps);
        assert_eq!(guest, Memory { resident: 508, dirty: 500 });
        assert_eq!(rest, Memory { resident: 4, dirty: 0 });
    }

    #[test]
    fn this_process_has_memory() {
        let memory = of(std::process::id()).expect("its own");
        assert!(memory.resident > memory.dirty && memory.dirty > 0, "{memory:?}");
    }
}
