//! ACPI tables of reduced hardware (ACPI 6.5, 4.1): no fixed registers, no PIT or 8042; what is there is a local APIC for
//! each processor, an I/O APIC, a PCI host bridge with ECAM, COM1, a clock chip, a power button, the VM generation id, and where
//! disks may come and go while the machine runs, slots for them.

use super::generation::{ADDRESS_NAME, COMPATIBLE};
use super::layout::{
    ACPI_TABLES, ECAM, ECAM_SIZE, GENERATION_ID, HOT_SLOT_FIRST, HOT_SLOTS, HOTPLUG_PORT, HOTPLUG_PORTS, IO_APIC,
    LOCAL_APIC, PCI_CONFIG_PORT, PCI_CONFIG_PORTS, PCI_WINDOW, PCI_WINDOW_SIZE, POWER_GSI, POWER_PORT, RTC_PORT,
    RTC_PORTS, SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS,
};
use super::memory::GuestRam;
use super::power::{EVENT_BUTTON, EVENT_GENERATION, EVENT_SLOTS, RESET_VALUE, SLEEP_TYPE_OFF};
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name, Notify, ONE, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

const OEM: [u8; 6] = *b"FEALTY";
const OEM_TABLE: [u8; 8] = *b"FEALTYVM";
const OEM_REVISION: u32 = 1;
/// FADT, IA-PC boot architecture: no VGA; and legacy devices, the serial port and the clock chip.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1;
const RSDP_SPACE: u64 = 64;
/// What a slot is told: look whether there is a device, or let go of it.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// The tables do not fit: there is a bug, or a processor too many.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the ACPI tables need {0} bytes, more than there is room for")]
pub struct AcpiError(usize);

/// Writes all tables for `processors` processors, the RSDP at [`ACPI_TABLES`]; `hotplug` says whether slots may be filled later.
pub(super) fn write(ram: &GuestRam, processors: u8, hotplug: bool) -> Result<(), AcpiError> {
    let tables = build(processors, hotplug);
    let room = (GENERATION_ID - ACPI_TABLES) as usize;
    let fits = tables.len() <= room && ram.write_slice(&tables, GuestAddress(ACPI_TABLES)).is_ok();
    fits.then_some(()).ok_or(AcpiError(tables.len()))
}

/// All tables as they lie in memory: RSDP, DSDT, FADT, MADT, MCFG, XSDT.
fn build(processors: u8, hotplug: bool) -> Vec<u8> {
    let mut out = vec![0; RSDP_SPACE as usize];
    let dsdt = append(&mut out, &dsdt(hotplug));
    let tables = [append(&mut out, &fadt(dsdt)), append(&mut out, &madt(processors)), append(&mut out, &mcfg())];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    tables.iter().for_each(|at| xsdt.add_entry(*at));
    let xsdt = append(&mut out, &xsdt);
    let mut rsdp = vec![];
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    out[..rsdp.len()].copy_from_slice(&rsdp);
    out
}

/// Appends a table at a multiple of 16 and gives its guest address.
fn append(out: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    out.resize(out.len().next_multiple_of(16), 0);
    let at = ACPI_TABLES + out.len() as u64;
    table.to_aml_bytes(out);
    at
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |at: u16| GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, at.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.sleep_control_reg = register(POWER_PORT);
    fadt.sleep_status_reg = register(POWER_PORT + 1);
    fadt.reset_reg = register(POWER_PORT + 2);
    fadt.reset_value = RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    fadt.finalize()
}

fn madt(processors: u8) -> impl Aml {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC as u32));
    for index in 0..processors {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC as u32, 0));
    madt
}

fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ECAM, 0, 0, 0);
    mcfg
}

fn dsdt(hotplug: bool) -> impl Aml {
    let mut body = vec![];
    for object in [host_bridge, ecam_reservation, serial, clock, power_button, generation, power_off] {
        object(&mut body);
    }
    if hotplug {
        slots(&mut body);
    }
    events(&mut body, hotplug);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt.update_checksum();
    Table(dsdt)
}

struct Table(Sdt);

impl Aml for Table {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

fn device(out: &mut Vec<u8>, name: &str, children: Vec<&dyn Aml>) {
    Scope::new("\\_SB_".into(), vec![&Device::new(name.into(), children)]).to_aml_bytes(out);
}

fn host_bridge(out: &mut Vec<u8>) {
    let window_end = (PCI_WINDOW + PCI_WINDOW_SIZE - 1) as u32;
    let memory =
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, PCI_WINDOW as u32, window_end, None);
    let buses = AddressSpace::new_bus_number(0_u16, 0_u16);
    let ports = IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, PCI_CONFIG_PORTS as u8);
    let resources: Vec<&dyn Aml> = vec![&buses, &ports, &memory];
    device(
        out,
        "PCI0",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    );
}

/// ECAM must belong to a motherboard resource, or Linux does not use it (PCI firmware 3.3, 4.1.2).
fn ecam_reservation(out: &mut Vec<u8>) {
    let memory = Memory32Fixed::new(true, ECAM as u32, ECAM_SIZE as u32);
    device(
        out,
        "MRES",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory])),
        ],
    );
}

fn serial(out: &mut Vec<u8>) {
    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORTS as u8);
    let interrupt = Interrupt::new(true, true, false, false, SERIAL_GSI);
    device(
        out,
        "COM1",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt, &ports])),
        ],
    );
}

/// Without an interrupt: it has no alarm.
fn clock(out: &mut Vec<u8>) {
    let ports = IO::new(RTC_PORT, RTC_PORT, 1, RTC_PORTS as u8);
    device(
        out,
        "RTC_",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
        ],
    );
}

fn power_button(out: &mut Vec<u8>) {
    device(out, "PWRB", vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &ZERO)]);
}

/// The VM generation id, by the document's object and ids. Its own id is nobody's standard.
fn generation(out: &mut Vec<u8>) {
    let compatible = Package::new(COMPATIBLE.iter().map(|id| id as &dyn Aml).collect());
    let (low, high) = (GENERATION_ID as u32, (GENERATION_ID >> 32) as u32);
    let address = Package::new(vec![&low, &high]);
    device(
        out,
        "VGEN",
        vec![
            &Name::new("_HID".into(), &"FEALTYVG"),
            &Name::new("_CID".into(), &compatible),
            &Name::new("_DDN".into(), &COMPATIBLE[0]),
            &Name::new(ADDRESS_NAME.into(), &address),
        ],
    );
}

/// The slots that may be filled and emptied while the machine runs: to each its device with the method by which it is ejected
/// (ACPI 6.5, 6.3.3), and a method that reads what is new, which clears it, and tells each slot (5.6.6: device check, or eject request).
fn slots(out: &mut Vec<u8>) {
    let length = HOTPLUG_PORTS as u8;
    let region = OpRegion::new("HPRG".into(), OpRegionSpace::SystemIO, &HOTPLUG_PORT, &length);
    let registers = [*b"HPIN", *b"HPRM", *b"HPEJ"].map(|name| FieldEntry::Named(name, 8));
    let (access, lock, update) = (FieldAccessType::Byte, FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes);
    let field = Field::new("HPRG".into(), access, lock, update, registers.into());
    let slots = (0..HOT_SLOTS as u8).map(|index| (HOT_SLOT_FIRST + index, 1_u8 << index));
    let (mut devices, mut steps) = (vec![], vec![]);
    for (slot, bit) in slots.clone() {
        let (address, register) = (u32::from(slot) << 16, Path::new("HPEJ"));
        let eject = Store::new(&register, &bit);
        Device::new(
            Path::new(&slot_name(slot)),
            vec![
                &Name::new("_ADR".into(), &address),
                &Name::new("_SUN".into(), &slot),
                &Method::new("_EJ0".into(), 1, true, vec![&eject]),
            ],
        )
        .to_aml_bytes(&mut devices);
    }
    for (register, value) in [("HPIN", DEVICE_CHECK), ("HPRM", EJECT_REQUEST)] {
        Store::new(&Local(0), &Path::new(register)).to_aml_bytes(&mut steps);
        for (slot, bit) in slots.clone() {
            And::new(&Local(1), &Local(0), &bit).to_aml_bytes(&mut steps);
            If::new(&Local(1), vec![&Notify::new(&Path::new(&slot_name(slot)), &value)]).to_aml_bytes(&mut steps);
        }
    }
    let (devices, steps) = (Encoded(devices), Encoded(steps));
    let look = Method::new("HPLK".into(), 0, true, vec![&steps]);
    Scope::new("\\_SB_.PCI0".into(), vec![&region, &field, &devices, &look]).to_aml_bytes(out);
}

fn slot_name(slot: u8) -> String {
    format!("SL{slot:02}")
}

/// Objects that are AML already.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The generic event device (ACPI 6.5, 5.6.9): its method reads the event register, which clears it, and tells each device.
fn events(out: &mut Vec<u8>, hotplug: bool) {
    let interrupt = Interrupt::new(true, true, false, false, POWER_GSI);
    let register = POWER_PORT + 3;
    let region = OpRegion::new("EVTR".into(), OpRegionSpace::SystemIO, &register, &ONE);
    let field = Field::new(
        "EVTR".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"EVTS", 8)],
    );
    let events = Path::new("EVTS");
    let read = Store::new(&Local(0), &events);
    let test_button = And::new(&Local(1), &Local(0), &EVENT_BUTTON);
    let button = Path::new("\\_SB_.PWRB");
    let tell_button = Notify::new(&button, &0x80_u8);
    let pressed = If::new(&Local(1), vec![&tell_button]);
    let test_generation = And::new(&Local(1), &Local(0), &EVENT_GENERATION);
    let generation = Path::new("\\_SB_.VGEN");
    let tell_generation = Notify::new(&generation, &0x80_u8);
    let renewed = If::new(&Local(1), vec![&tell_generation]);
    let test_slots = And::new(&Local(1), &Local(0), &EVENT_SLOTS);
    let look = MethodCall::new("\\_SB_.PCI0.HPLK".into(), vec![]);
    let changed = If::new(&Local(1), vec![&look]);
    let mut steps: Vec<&dyn Aml> = vec![&read, &test_button, &pressed, &test_generation, &renewed];
    if hotplug {
        steps.extend([&test_slots as &dyn Aml, &changed]);
    }
    let method = Method::new("_EVT".into(), 1, true, steps);
    device(
        out,
        "GED_",
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &region,
            &field,
            &method,
        ],
    );
}

fn power_off(out: &mut Vec<u8>) {
    let package = Package::new(vec![&SLEEP_TYPE_OFF, &ZERO, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &package).to_aml_bytes(out);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(tables: &[u8], address: u64) -> &[u8] {
        let at = (address - ACPI_TABLES) as usize;
        let length = u32::from_le_bytes(tables[at + 4..at + 8].try_into().expect("four bytes")) as usize;
        &tables[at..at + length]
    }

    fn quad(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    #[test]
    fn the_tables_lead_to_one_another() {
        let tables = build(4, false);
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((&tables[..8], sum(&tables[..20]), sum(&tables[..36])), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&tables, quad(&tables, 24));
        let entries: Vec<_> = xsdt[36..].chunks(8).map(|entry| table(&tables, quad(entry, 0))).collect();
        let names: Vec<_> = entries.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        let dsdt = table(&tables, quad(entries[0], 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        for table in entries.iter().chain([&xsdt, &dsdt]) {
            assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        }
        assert_eq!(entries[1].len(), 44 + 4 * 8 + 12);
        assert_eq!(quad(entries[2], 44), ECAM);
        assert!(tables.len() < 4096, "{}", tables.len());
        // Name, package of two, DWord, zero.
        let address = [&b"\x08ADDR\x12"[..], &[0x08, 2, 0x0c], &(GENERATION_ID as u32).to_le_bytes(), &[0]].concat();
        assert!(dsdt.windows(address.len()).any(|window| window == address), "{dsdt:02x?}");
    }

    #[test]
    fn slots_are_there_where_disks_may_come_and_go() {
        let found = |tables: &[u8], bytes: &[u8]| tables.windows(bytes.len()).filter(|window| *window == bytes).count();
        let (with, without) = (build(1, true), build(1, false));
        for slot in 24..32_u8 {
            let name = format!("SL{slot}");
            // Its device, and in the look at the registers two notifications.
            assert_eq!(found(&with, name.as_bytes()), 3, "{name}");
            // Name, DWord: the slot's number in the upper half. Name, Byte: the same for people.
            let address =
                [&b"\x08_ADR\x0c"[..], &(u32::from(slot) << 16).to_le_bytes(), b"\x08_SUN\x0a", &[slot]].concat();
            assert_eq!(found(&with, &address), 1, "{name}");
            let notify = |value: &[u8]| [b"\x86", name.as_bytes(), value].concat();
            assert_eq!((found(&with, &notify(b"\x01")), found(&with, &notify(b"\x0a\x03"))), (1, 1), "{name}");
        }
        assert_eq!((found(&with, b"_EJ0"), found(&without, b"_EJ0"), found(&without, b"HPLK")), (8, 0, 0));
    }

    /// ACPI 6.5, 5.2.12: a local APIC for each processor, by its id, and one I/O APIC.
    #[test]
    fn every_processor_has_its_local_apic() {
        for processors in 1..=16_u8 {
            let tables = build(processors, true);
            let xsdt = table(&tables, quad(&tables, 24));
            let madt =
                xsdt[36..].chunks(8).map(|entry| table(&tables, quad(entry, 0))).find(|t| t.starts_with(b"APIC"));
            let madt = madt.expect("a MADT");
            assert_eq!(madt[36..40], (LOCAL_APIC as u32).to_le_bytes());
            let (mut rest, mut found, mut io) = (&madt[44..], vec![], vec![]);
            while let [kind, length, ..] = rest {
                let entry;
                (entry, rest) = rest.split_at((*length).into());
                match (kind, entry) {
                    (0, &[_, _, uid, id, 1, 0, 0, 0]) => found.push((uid, id)),
                    (1, entry) => io.push(entry[4..12].to_vec()),
                    _ => panic!("an entry of kind {kind}: {entry:?}"),
                }
            }
            assert_eq!(found, (0..processors).map(|n| (n, n)).collect::<Vec<_>>());
            assert_eq!(io, [[(IO_APIC as u32).to_le_bytes(), [0; 4]].concat()]);
        }
    }

    #[test]
    fn there_is_room_for_all_processors() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("1 MiB");
        assert_eq!(write(&ram, 255, true), Ok(()));
    }
}
