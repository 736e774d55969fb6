//! Words about devices beside disks.

use crate::acpi::Acpi;
use crate::interrupts::sleep_forever;
use crate::pci::Device;
use crate::serial::line;
use crate::virtio::balloon::Balloon;
use crate::virtio::console::{self, Console};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;

use super::{CommandError, Guest, Hex};

impl Guest<'_> {
    pub(super) fn random(&mut self) -> Result<(), CommandError> {
        if self.rng.is_none() {
            self.rng = Some(Rng::start(self.ecam()?).ok_or(CommandError::NoDevice)??);
        }
        let mut bytes = [0; 32];
        let length = self.rng.as_ref().map_or(0, |rng| rng.read(&mut bytes));
        line(format_args!("rng {}", Hex(&bytes[..length])));
        Ok(())
    }

    pub(super) fn echo_frames(&self, count: u64) -> Result<(), CommandError> {
        let net = Net::start(self.ecam()?).ok_or(CommandError::NoDevice)??;
        line(format_args!("net up {}", Hex(&net.mac())));
        for _ in 0..count {
            let length = net.echo();
            line(format_args!("net echoed {length}"));
        }
        Ok(())
    }

    pub(super) fn echo_on_console(&mut self) -> Result<(), CommandError> {
        let console = self.console()?;
        console.write(b"hvc ready\n");
        let mut bytes = [0; console::LONGEST];
        loop {
            let length = console.read(&mut bytes);
            if bytes[..length].starts_with(b"quit") {
                break;
            }
            console.write(&bytes[..length]);
        }
        line(format_args!("hvc done"));
        Ok(())
    }

    pub(super) fn pour_on_console(&mut self) -> Result<(), CommandError> {
        self.console()?.pour(b"last words\n");
        line(format_args!("hvc poured"));
        Ok(())
    }

    fn console(&mut self) -> Result<&Console, CommandError> {
        let ecam = self.ecam()?;
        Ok(match &mut self.console {
            Some(console) => console,
            none => none.insert(Console::start(ecam).ok_or(CommandError::NoDevice)??),
        })
    }

    pub(super) fn use_balloon(&self) -> Result<(), CommandError> {
        let balloon = Balloon::start(self.ecam()?).ok_or(CommandError::NoDevice)??;
        line(format_args!("balloon target={}", balloon.target()));
        let kept = [balloon.inflate(), balloon.report()];
        line(format_args!("balloon kept {} {}", kept[0], kept[1]));
        Ok(())
    }

    pub(super) fn echo_on_vsock(&self) -> Result<(), CommandError> {
        let vsock = Vsock::start(self.ecam()?).ok_or(CommandError::NoDevice)??;
        line(format_args!("vsock cid={}", vsock.cid()));
        line(format_args!("vsock echoed {}", vsock.echo()));
        Ok(())
    }

    pub(super) fn say_panic(&self) -> Result<(), CommandError> {
        let device = Device::find(self.ecam()?, 0x1b36, 0x0011).next().ok_or(CommandError::NoDevice)?;
        device.enable();
        let register = device.bar(0, 0, 1).ok_or(CommandError::NoDevice)?;
        line(format_args!("saying panic"));
        register.write8(0, 1);
        sleep_forever()
    }

    pub(super) fn ecam(&self) -> Result<u64, CommandError> {
        Ok(Acpi::find(self.boot.rsdp)?.ecam()?)
    }
}
