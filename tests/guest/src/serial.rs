//! The first serial port, a 16550 at 0x3f8.

use core::fmt::{self, Write};

use crate::apic;
use crate::interrupts::Source;
use crate::port;

const BASE: u16 = 0x3f8;
const IRQ: u8 = 4;

const DATA: u16 = BASE;
const INTERRUPTS: u16 = BASE + 1;
const FIFO: u16 = BASE + 2;
const MODEM: u16 = BASE + 4;
const STATUS: u16 = BASE + 5;

const STATUS_INPUT: u8 = 1;
const STATUS_EMPTY: u8 = 1 << 5;
/// Bytes that the transmit FIFO takes when it is empty.
const FIFO_LENGTH: usize = 16;

/// Turns on the FIFO, so that sixteen bytes go out for one look at the status.
pub fn init() {
    port::write8(FIFO, 0x01);
}

/// Prints one line.
pub fn line(text: fmt::Arguments) {
    let mut out = Line { bytes: [0; FIFO_LENGTH], length: 0 };
    // Writing to the port can't fail.
    let _ = out.write_fmt(text);
    let _ = out.write_str("\r\n");
    out.send();
}

/// Lets input interrupt.
pub fn listen() {
    apic::route(IRQ, Source::Serial);
    port::write8(MODEM, 0x0b); // ready, and OUT2, which lets the interrupt out of a PC's port
    port::write8(INTERRUPTS, 0x01);
}

/// The next byte of input, sleeping until there is one. [`listen`] first.
pub fn read() -> u8 {
    loop {
        Source::Serial.take();
        if port::read8(STATUS) & STATUS_INPUT != 0 {
            return port::read8(DATA);
        }
        Source::Serial.sleep();
    }
}

/// Collects what one filling of the FIFO takes.
struct Line {
    bytes: [u8; FIFO_LENGTH],
    length: usize,
}

impl Line {
    fn send(&mut self) {
        while port::read8(STATUS) & STATUS_EMPTY == 0 {
            core::hint::spin_loop();
        }
        for &byte in &self.bytes[..self.length] {
            port::write8(DATA, byte);
        }
        self.length = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            self.bytes[self.length] = byte;
            self.length += 1;
            if self.length == FIFO_LENGTH {
                self.send();
            }
        }
        Ok(())
    }
}
