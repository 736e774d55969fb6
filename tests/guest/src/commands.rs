//! What the command line may ask for: `fealty.do=word,word,...`, carried out in order, each reported in one line.
//!
//! | word | does | reports |
//! | --- | --- | --- |
//! | `hello` | | `hello` |
//! | `info` | | `info entry=linux64 memory=134086656 disks=1 bytes=16777216` |
//! | `initrd` | hashes the initial ramdisk | `initrd sha256 HEX` |
//! | `disk:N` | the following words are about disk N (0 at first) | `disk 1 bytes=4194304` |
//! | `hash` | reads the whole disk | `sha256 HEX` |
//! | `read:BLOCK` | reads 4 KiB | `read 5 HEX`, the block's SHA-256 |
//! | `write:BLOCK:BYTE` | fills 4 KiB | `write 5 ok` |
//! | `verify:BLOCK:BYTE` | reads and compares | `verify 5 ok`, `verify 5 wrong: byte 0 is 0x00, not 0xab` |
//! | `flush` | | `flush ok` |
//! | `discard:BLOCK:COUNT` | tells the disk that blocks are of no use | `discard 5 ok` |
//! | `zeroes:BLOCK:COUNT`, `unmap:BLOCK:COUNT` | makes blocks zeroes; `unmap` allows a hole | `zeroes 5 ok` |
//! | `serial` | asks the disk for its serial number | `serial root` |
//! | `wait-resize` | waits until the disk has another size | `waiting for another size`, `disk 0 bytes=8388608` |
//! | `simple-rings` | disks begun after this: one queue, no indirect descriptors, no event indices | |
//! | `queues` | | `queues 4` |
//! | `reads:DEPTH:COUNT`, `writes:DEPTH:COUNT` | so many random requests of 4 KiB, up to 32 of them at once | `reads started`, `reads done 100000` |
//! | `storm:COUNT` | so many random writes, 32 at once, then a flush and a check of all | `storm ok 512` (blocks compared) |
//! | `load:SECONDS` | random writes, flushes and checks for so long | `load started`, `load ok 9000` (blocks compared) |
//! | `rng` | asks for 32 random bytes | `rng HEX` |
//! | `net:COUNT` | sends COUNT frames back to where they came from | `net up MAC`, then `net echoed BYTES` for each |
//! | `hvc` | says `hvc ready` on the virtio console and repeats what it reads there, until that begins with `quit` | `hvc done` |
//! | `hvc-pour` | says a lot on the virtio console, in many buffers, `last words` in the last, and waits for none | `hvc poured` |
//! | `balloon` | gives a page to the balloon, and reports one as free | `balloon target=PAGES`, `balloon kept 0 0`, bytes still there |
//! | `vsock` | takes one connection and sends back what comes | `vsock cid=3`, `vsock echoed BYTES` |
//! | `hostile:COUNT:SEED` | so many random accesses to all virtio devices but the first | `hostile to 5`, `hostile done` |
//! | `tick`, `tick:COUNT` | a line each second, for ever or so many | `tick 1` |
//! | `spin` | computes for ever, without a pause | `spinning` |
//! | `sleep` | sleeps for ever, taking interrupts | |
//! | `echo` | repeats each line it reads until `quit` | `echoing`, `echo LINE` |
//! | `wait-button` | waits for the power button | `waiting for the button`, `button pressed` |
//! | `generation` | | `generation HEX`, the VM generation id |
//! | `wait-generation` | waits until it is told of another one | `waiting for a generation`, `generation changed` |
//! | `wait-slots` | waits until PCI slots were filled or are to be emptied | `waiting for slots`, `slots filled=1 asked=0`, a bit each |
//! | `let-go` | resets the disk and forgets it: another may come in its place | `disk 1 let go` |
//! | `eject:SLOTS` | ejects these slots, a bit each | `ejected 1, disks=1` |
//! | `say-panic` | tells the panic device, and sleeps | `saying panic` |
//! | `touch:ADDRESS` | reads a byte of physical memory | `touched 0xff` |
//! | `ring0-cmpxchg16b`, `ring0-xrstor`, `ring0-int3` | has ring 0 do that | `fault vector=...`, and ends, where it can be done |
//! | `ring0-nowhere` | has ring 0 jump to where no memory is | |
//! | `poweroff`, `reset`, `panic` | ends; `panic` by a triple fault | `powering off`, `resetting`, `panicking` |
//!
//! Numbers are decimal or, after `0x`, hexadecimal. A word that fails says `disk error WORD: why` or `failed WORD: why`, and the next
//! one follows. After the last word the guest prints `done` and sleeps.

mod devices;
mod hostile;
mod load;
mod rate;

use core::fmt;

use sha2::{Digest, Sha256};

use crate::acpi::{Acpi, AcpiError};
use crate::apic::{self, TICKS_PER_SECOND};
use crate::boot::BootInfo;
use crate::interrupts::{DISKS, Source, sleep_forever};
use crate::memory::{Registers, left_by_firmware};
use crate::power::Power;
use crate::serial::{self, line};
use crate::tables::{Privileged, in_ring0, triple_fault};
use crate::virtio::block::{BLOCK, Disk, DiskError, Rings};
use crate::virtio::console::Console;
use crate::virtio::rng::Rng;
use crate::virtio::transport::TransportError;

/// Longest line that `echo` repeats.
const LONGEST_LINE: usize = 128;

/// Carries out what the command line asks for.
pub fn run(boot: &BootInfo) {
    let prefix = b"fealty.do=";
    let list = boot.command_line.split(|byte| *byte == b' ').find_map(|word| word.strip_prefix(prefix));
    let Ok(list) = core::str::from_utf8(list.unwrap_or_default()) else {
        return line(format_args!("failed: the command line is not text"));
    };
    let mut guest =
        Guest { boot, disks: [const { None }; DISKS], chosen: 0, rings: Rings::Full, rng: None, console: None };
    for word in list.split(',').filter(|word| !word.is_empty()) {
        match guest.carry_out(word) {
            Ok(()) => {}
            Err(CommandError::Disk(error)) => line(format_args!("disk error {word}: {error}")),
            Err(error) => line(format_args!("failed {word}: {error}")),
        }
    }
    line(format_args!("done"));
}

struct Guest<'a> {
    boot: &'a BootInfo,
    /// Those that were started.
    disks: [Option<Disk>; DISKS],
    chosen: usize,
    /// How disks are begun.
    rings: Rings,
    rng: Option<Rng>,
    console: Option<Console>,
}

enum CommandError {
    Unknown,
    Number,
    NoInitrd,
    Acpi(AcpiError),
    Disk(DiskError),
    NoDevice,
    Device(TransportError),
}

impl Guest<'_> {
    fn carry_out(&mut self, word: &str) -> Result<(), CommandError> {
        let mut parts = word.split(':');
        let name = parts.next().unwrap_or_default();
        let mut next = || parts.next().map(parse).transpose();
        let numbers = [next()?, next()?];
        if parts.next().is_some() {
            return Err(CommandError::Unknown);
        }
        match (name, numbers) {
            ("hello", [None, _]) => line(format_args!("hello")),
            ("info", [None, _]) => self.info(),
            ("initrd", [None, _]) => self.initrd()?,
            ("disk", [Some(number), None]) => self.choose(number as usize)?,
            ("hash", [None, _]) => self.hash()?,
            ("read", [Some(block), None]) => self.read(block)?,
            ("write", [Some(block), Some(byte)]) => self.write(block, narrow(byte)?)?,
            ("verify", [Some(block), Some(byte)]) => self.verify(block, narrow(byte)?)?,
            ("flush", [None, _]) => self.flush()?,
            ("discard", [Some(block), Some(count)]) => {
                self.disk()?.discard(block, count)?;
                line(format_args!("discard {block} ok"));
            }
            ("zeroes" | "unmap", [Some(block), Some(count)]) => {
                self.disk()?.zero(block, count, name == "unmap")?;
                line(format_args!("{name} {block} ok"));
            }
            ("serial", [None, _]) => self.serial()?,
            ("wait-resize", [None, _]) => self.wait_for_resize()?,
            ("simple-rings", [None, _]) => self.rings = Rings::Simple,
            ("queues", [None, _]) => {
                let queues = self.disk()?.queues();
                line(format_args!("queues {queues}"));
            }
            ("reads" | "writes", [Some(depth), Some(count)]) => rate::run(self.disk()?, name, depth as usize, count)?,
            ("storm", [Some(count), None]) => rate::storm(self.disk()?, count)?,
            ("load", [Some(seconds), None]) => load::run(self.disk()?, seconds)?,
            ("rng", [None, _]) => self.random()?,
            ("net", [Some(count), None]) => self.echo_frames(count)?,
            ("balloon", [None, _]) => self.use_balloon()?,
            ("vsock", [None, _]) => self.echo_on_vsock()?,
            ("hvc", [None, _]) => self.echo_on_console()?,
            ("hvc-pour", [None, _]) => self.pour_on_console()?,
            ("hostile", [Some(rounds), Some(seed)]) => hostile::run(self.ecam()?, rounds, seed),
            ("touch", [Some(address), None]) => {
                let byte = Registers::map(address, 1).read8(0);
                line(format_args!("touched {byte:#04x}"));
            }
            ("tick", [count, None]) => tick(count.unwrap_or(u64::MAX)),
            ("spin", [None, _]) => spin(),
            ("sleep", [None, _]) => sleep_forever(),
            ("echo", [None, _]) => echo(),
            ("wait-button", [None, _]) => self.wait_for_button()?,
            ("generation", [None, _]) => {
                line(format_args!("generation {}", Hex(&Acpi::find(self.boot.rsdp)?.generation_id()?)));
            }
            ("wait-generation", [None, _]) => {
                line(format_args!("waiting for a generation"));
                Power::wait_for_generation();
                line(format_args!("generation changed"));
            }
            ("wait-slots", [None, _]) => {
                line(format_args!("waiting for slots"));
                let (filled, asked) = Power::wait_for_slots();
                line(format_args!("slots filled={filled} asked={asked}"));
            }
            ("let-go", [None, _]) => self.let_go()?,
            ("eject", [Some(slots), None]) => {
                Power::eject(narrow(slots)?);
                line(format_args!("ejected {slots}, disks={}", Disk::count(self.ecam()?)));
            }
            ("say-panic", [None, _]) => self.say_panic()?,
            ("poweroff", [None, _]) => {
                line(format_args!("powering off"));
                self.power_off()
            }
            ("reset", [None, _]) => {
                let power = self.power()?;
                line(format_args!("resetting"));
                power.reset()
            }
            ("panic", [None, _]) => {
                line(format_args!("panicking"));
                triple_fault()
            }
            ("ring0-cmpxchg16b", [None, _]) => in_ring0(Privileged::Cmpxchg16b),
            ("ring0-xrstor", [None, _]) => in_ring0(Privileged::Xrstor),
            ("ring0-int3", [None, _]) => in_ring0(Privileged::Int3),
            ("ring0-nowhere", [None, _]) => in_ring0(Privileged::Nowhere),
            _ => return Err(CommandError::Unknown),
        }
        Ok(())
    }

    fn info(&mut self) {
        let (entry, memory) = (self.boot.entry.name(), self.boot.memory);
        let disks = (0..DISKS).take_while(|number| self.disk_at(*number).is_ok()).count();
        let bytes = self.disk_at(0).map_or(0, |disk| disk.length);
        line(format_args!("info entry={entry} memory={memory} disks={disks} bytes={bytes}"));
    }

    fn initrd(&self) -> Result<(), CommandError> {
        let (address, length) = self.boot.initrd.ok_or(CommandError::NoInitrd)?;
        let digest = Sha256::digest(left_by_firmware(address, length));
        line(format_args!("initrd sha256 {}", Hex(&digest)));
        Ok(())
    }

    fn choose(&mut self, number: usize) -> Result<(), CommandError> {
        let bytes = self.disk_at(number)?.length;
        self.chosen = number;
        line(format_args!("disk {number} bytes={bytes}"));
        Ok(())
    }

    fn hash(&mut self) -> Result<(), CommandError> {
        let mut hasher = Sha256::new();
        self.disk()?.read_all(|bytes| hasher.update(bytes))?;
        line(format_args!("sha256 {}", Hex(&hasher.finalize())));
        Ok(())
    }

    fn read(&mut self, block: u64) -> Result<(), CommandError> {
        let mut bytes = [0; BLOCK];
        self.disk()?.read(block, &mut bytes)?;
        line(format_args!("read {block} {}", Hex(&Sha256::digest(bytes))));
        Ok(())
    }

    fn write(&mut self, block: u64, byte: u8) -> Result<(), CommandError> {
        self.disk()?.write(block, &[byte; BLOCK])?;
        line(format_args!("write {block} ok"));
        Ok(())
    }

    fn verify(&mut self, block: u64, byte: u8) -> Result<(), CommandError> {
        if is_as_written(self.disk()?, block, &[byte; BLOCK])? {
            line(format_args!("verify {block} ok"));
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), CommandError> {
        self.disk()?.flush()?;
        line(format_args!("flush ok"));
        Ok(())
    }

    fn serial(&mut self) -> Result<(), CommandError> {
        let serial = self.disk()?.serial()?;
        let length = serial.iter().position(|byte| *byte == 0).unwrap_or(serial.len());
        line(format_args!("serial {}", serial[..length].escape_ascii()));
        Ok(())
    }

    fn wait_for_resize(&mut self) -> Result<(), CommandError> {
        let number = self.chosen;
        let before = self.disk()?.length;
        line(format_args!("waiting for another size"));
        let Some(Some(disk)) = self.disks.get_mut(number) else { return Ok(()) };
        while disk.measure() == before {
            disk.sleep();
        }
        line(format_args!("disk {number} bytes={}", disk.length));
        Ok(())
    }

    fn let_go(&mut self) -> Result<(), CommandError> {
        let (number, ecam) = (self.chosen, self.ecam()?);
        Disk::stop(ecam, number)?;
        self.disks[number] = None;
        line(format_args!("disk {number} let go"));
        Ok(())
    }

    fn wait_for_button(&self) -> Result<(), CommandError> {
        let power = self.power()?;
        line(format_args!("waiting for the button"));
        power.wait_for_button();
        line(format_args!("button pressed"));
        Ok(())
    }

    fn power(&self) -> Result<Power, CommandError> {
        Ok(Power::find(Acpi::find(self.boot.rsdp)?)?)
    }

    fn power_off(&self) -> ! {
        match self.power() {
            Ok(power) => power.off(),
            Err(error) => {
                line(format_args!("failed poweroff: {error}"));
                Power::last_resort()
            }
        }
    }

    /// The disk that the words are about.
    fn disk(&mut self) -> Result<&Disk, CommandError> {
        self.disk_at(self.chosen)
    }

    fn disk_at(&mut self, number: usize) -> Result<&Disk, CommandError> {
        let place = self.disks.get_mut(number).ok_or(DiskError::NoDisk(number))?;
        match place {
            Some(disk) => Ok(disk),
            None => {
                let ecam = Acpi::find(self.boot.rsdp)?.ecam()?;
                Ok(place.insert(Disk::start(ecam, number, self.rings)?))
            }
        }
    }
}

impl From<AcpiError> for CommandError {
    fn from(error: AcpiError) -> Self {
        Self::Acpi(error)
    }
}

impl From<TransportError> for CommandError {
    fn from(error: TransportError) -> Self {
        Self::Device(error)
    }
}

impl From<DiskError> for CommandError {
    fn from(error: DiskError) -> Self {
        Self::Disk(error)
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Unknown => write!(f, "no such word"),
            Self::Number => write!(f, "not a number that fits"),
            Self::NoInitrd => write!(f, "the loader gave no initial ramdisk"),
            Self::Acpi(error) => error.fmt(f),
            Self::Disk(error) => error.fmt(f),
            Self::NoDevice => write!(f, "there is no such device"),
            Self::Device(error) => error.fmt(f),
        }
    }
}

/// Prints bytes in hexadecimal.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn parse(text: &str) -> Result<u64, CommandError> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| CommandError::Number)
}

fn narrow(number: u64) -> Result<u8, CommandError> {
    u8::try_from(number).map_err(|_| CommandError::Number)
}

/// Whether the block holds what was written; says so where it does not.
fn is_as_written(disk: &Disk, block: u64, wanted: &[u8; BLOCK]) -> Result<bool, DiskError> {
    let mut found = [0; BLOCK];
    disk.read(block, &mut found)?;
    let wrong = (0..BLOCK).find(|at| found[*at] != wanted[*at]);
    if let Some(at) = wrong {
        line(format_args!("verify {block} wrong: byte {at} is {:#04x}, not {:#04x}", found[at], wanted[at]));
    }
    Ok(wrong.is_none())
}

fn tick(count: u64) {
    apic::start_timer();
    for n in 1..=count {
        while apic::ticks() < n * TICKS_PER_SECOND {
            Source::Timer.sleep();
        }
        line(format_args!("tick {n}"));
    }
    apic::stop_timer();
}

fn spin() -> ! {
    line(format_args!("spinning"));
    apic::start_timer();
    loop {
        apic::ticks();
        core::hint::spin_loop();
    }
}

fn echo() {
    serial::listen();
    line(format_args!("echoing"));
    let mut text = [0; LONGEST_LINE];
    loop {
        let mut length = 0;
        loop {
            match serial::read() {
                b'\r' | b'\n' if length == 0 => {}
                b'\r' | b'\n' => break,
                byte if length < LONGEST_LINE => {
                    text[length] = byte;
                    length += 1;
                }
                _ => {}
            }
        }
        match &text[..length] {
            b"quit" => return,
            bytes => line(format_args!("echo {}", bytes.escape_ascii())),
        }
    }
}
