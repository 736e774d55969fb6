//! The socket driver (virtio 1.3, 5.10): takes one connection and sends back what comes.

use core::cell::UnsafeCell;

use crate::interrupts::Source;
use crate::pci::Device;

use super::queue::Queue;
use super::transport::{Transport, TransportError};

const PACKET: usize = 4096;
const HEADER: usize = 44;
const OP_AT: usize = 30;
const FLAGS_AT: usize = 32;
const BUFFER_AT: usize = 36;
const FORWARDED_AT: usize = 40;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

// Operations (5.10.6).
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const RESET: u8 = 3;
const SHUTDOWN: u8 = 4;
const DATA: u8 = 5;

#[repr(C, align(4096))]
struct Packet(UnsafeCell<[u8; PACKET]>);

// SAFETY: one processor, one thread: only the driver below touches them, and only while the device does not.
unsafe impl Sync for Packet {}

static QUEUES: [Queue; 3] = [const { Queue::new() }; 3];
static INPUT: Packet = Packet(UnsafeCell::new([0; PACKET]));
static OUTPUT: Packet = Packet(UnsafeCell::new([0; PACKET]));

/// The sockets.
pub struct Vsock {
    transport: Transport,
}

impl Vsock {
    /// Starts them; nothing where there are none. At most once.
    pub fn start(ecam: u64) -> Option<Result<Self, TransportError>> {
        let device = Device::find(ecam, 0x1af4, 0x1053).next()?;
        let started = Transport::start(device, 0, Source::Device, &QUEUES.each_ref());
        Some(started.map(|transport| Self { transport }))
    }

    /// The guest's address.
    pub fn cid(&self) -> u32 {
        self.transport.configuration.read32(0)
    }

    /// Takes the next connection, to whatever port, sends back what comes until the other end sends no more, and ends it; gives
    /// the bytes that came.
    pub fn echo(&self) -> usize {
        let mut echoed = 0;
        loop {
            let mut packet = [0; PACKET];
            let length = self.receive(&mut packet);
            let data = length.saturating_sub(HEADER);
            match packet[OP_AT] {
                REQUEST => self.send(&packet, RESPONSE, 0, echoed, 0),
                DATA => {
                    echoed += data;
                    self.send(&packet, DATA, 0, echoed, data);
                }
                SHUTDOWN => self.send(&packet, SHUTDOWN, 3, echoed, 0),
                RESET => return echoed,
                _ => {}
            }
        }
    }

    fn receive(&self, into: &mut [u8; PACKET]) -> usize {
        QUEUES[0].offer_one(0, (INPUT.0.get() as u64, PACKET as u32), true);
        self.transport.notify(RECEIVE);
        let length = loop {
            Source::Device.take();
            if let Some((_, length)) = QUEUES[0].finished_with_length() {
                break length;
            }
            Source::Device.sleep();
        };
        // SAFETY: the device is done with the buffer, and nobody else refers to it.
        *into = unsafe { INPUT.0.get().read_volatile() };
        (length as usize).min(PACKET)
    }

    /// Answers `packet`, with the first `data` bytes that it carries.
    fn send(&self, packet: &[u8; PACKET], op: u8, flags: u8, forwarded: usize, data: usize) {
        let mut answer = *packet;
        // Addresses and ports change places.
        answer[..8].copy_from_slice(&packet[8..16]);
        answer[8..16].copy_from_slice(&packet[..8]);
        answer[16..20].copy_from_slice(&packet[20..24]);
        answer[20..24].copy_from_slice(&packet[16..20]);
        answer[24..28].copy_from_slice(&(data as u32).to_le_bytes());
        answer[OP_AT] = op;
        answer[FLAGS_AT..FLAGS_AT + 4].copy_from_slice(&u32::from(flags).to_le_bytes());
        answer[BUFFER_AT..BUFFER_AT + 4].copy_from_slice(&((PACKET - HEADER) as u32).to_le_bytes());
        answer[FORWARDED_AT..HEADER].copy_from_slice(&(forwarded as u32).to_le_bytes());
        // SAFETY: nothing is being sent (this waits for its own), so the buffer is ours.
        unsafe { OUTPUT.0.get().write_volatile(answer) };
        QUEUES[1].offer_one(0, (OUTPUT.0.get() as u64, (HEADER + data) as u32), false);
        self.transport.notify(TRANSMIT);
        while QUEUES[1].finished().is_none() {
            Source::Device.sleep();
            Source::Device.take();
        }
    }
}
