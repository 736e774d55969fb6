//! A guest boots by each protocol, and ends each way.

mod machine;

use fealty_vmm::machine::{MachineEvent, Shape};
use machine::{Plan, images};
use std::fs::File;
use std::io::Write;

/// The ELF image without its PVH note, which is what makes it one for the Linux protocol.
fn without_note() -> File {
    let mut image = std::fs::read(&images().elf).expect("the guest");
    let (table, count) = (u64::from_le_bytes(image[32..40].try_into().expect("eight")) as usize, image[56]);
    for index in 0..usize::from(count) {
        let at = table + 56 * index;
        if image[at] == 4 {
            image[at] = 0;
        }
    }
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&image).expect("written");
    file
}

fn greets(plan: Plan) -> String {
    let guest = plan.boot();
    assert_eq!(guest.ends(), MachineEvent::PowerOff, "{}", guest.screen.text());
    let text = guest.screen.text();
    assert!(text.contains("hello"), "{text}");
    text.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn an_elf_image_boots_by_pvh() {
    assert!(greets(Plan::new("hello,poweroff")).starts_with("fealty-guest"));
}

#[test]
fn an_elf_image_boots_by_the_linux_protocol() {
    let plan = Plan { kernel: without_note(), ..Plan::new("hello,poweroff") };
    assert!(greets(plan).starts_with("fealty-guest"));
}

#[test]
fn a_bzimage_boots() {
    let plan = Plan { kernel: File::open(&images().bzimage).expect("the guest"), ..Plan::new("hello,poweroff") };
    assert!(greets(plan).starts_with("fealty-guest"));
}

#[test]
fn it_boots_with_four_processors_an_initrd_memory_above_the_hole_and_a_hotplug_window() {
    let mut initrd = tempfile::tempfile().expect("a file");
    initrd.write_all(&[1; 100_000]).expect("written");
    let shape = Shape { vcpus: 4, memory: 4 << 30, hotplug: 1 << 30 };
    greets(Plan { initrd: Some(initrd), shape, ..Plan::new("hello,poweroff") });
}

#[test]
fn a_guest_can_reset() {
    let guest = Plan::new("hello,reset").boot();
    assert_eq!(guest.ends(), MachineEvent::Reset);
}

#[test]
fn a_triple_fault_is_told_in_one_line_without_what_the_guest_computes_with() {
    let guest = Plan::new("panic").boot();
    let MachineEvent::Failed(why) = guest.ends() else { panic!("it goes on") };
    assert!(why.starts_with("vCPU 0: ") && why.contains(" rip=0x") && !why.contains('\n'), "{why}");
    assert!(!["rax=", "rbx=", "rdi=", "xmm"].iter().any(|register| why.contains(register)), "{why}");
}

#[test]
fn the_power_button_reaches_the_guest_each_time() {
    let guest = Plan::new("wait-button,wait-button,poweroff").boot();
    for presses in 1..=2 {
        // Once for each press: the interrupt, not a chance look at the register, wakes the guest.
        guest.shows("waiting for the button", presses);
        std::thread::sleep(std::time::Duration::from_millis(200));
        guest.running.power_button();
        guest.shows("button pressed", presses);
    }
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
}

#[test]
fn the_console_carries_both_ways() {
    let mut guest = Plan::new("echo,poweroff").boot();
    guest.sees("echoing");
    std::thread::sleep(std::time::Duration::from_millis(200));
    let line = "a line longer than the port holds at once: 0123456789 0123456789 0123456789";
    guest.types(&format!("{line}\n"));
    guest.sees(line);
    guest.types("quit\n");
    assert_eq!(guest.ends(), MachineEvent::PowerOff);
}
