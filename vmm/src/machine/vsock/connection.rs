//! One stream between a port of the guest and a client of the host, and who may send how much (virtio 1.3, 5.10.6.3).

use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

/// Bytes that the guest may send before the client has taken them.
pub(super) const BUFFER: u32 = 64 << 10;
/// The guest is told of room that came free in steps of this.
const STEP: u32 = BUFFER / 4;

/// A stream.
pub(super) struct Connection {
    pub(super) client: OwnedFd,
    /// Whether both ends have agreed.
    pub(super) open: bool,
    /// From the guest, not taken by the client yet.
    out: VecDeque<u8>,
    /// Bytes from the guest, in all; that the client took; and of which the guest knows that it took them.
    received: u32,
    pub(super) forwarded: u32,
    told: u32,
    /// Bytes for the guest, in all; the guest's buffer; and what it took out of it.
    sent: u32,
    pub(super) peer_buffer: u32,
    pub(super) peer_forwarded: u32,
    /// The client sends no more.
    client_done: bool,
    /// The guest sends no more, receives no more.
    pub(super) guest_sends_no_more: bool,
    pub(super) guest_receives_no_more: bool,
}

/// What a client has for the guest.
pub(super) enum Input {
    /// So many bytes.
    Bytes(usize),
    /// Nothing more, ever: said once.
    End,
    /// Nothing now, or none that the guest could take.
    Nothing,
}

impl Connection {
    /// A stream to `client`, not open yet.
    pub(super) fn new(client: OwnedFd) -> Self {
        Self {
            client,
            open: false,
            out: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            client_done: false,
            guest_sends_no_more: false,
            guest_receives_no_more: false,
        }
    }

    /// Bytes that the guest's buffer still takes.
    fn credit(&self) -> usize {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded)) as usize
    }

    /// Bytes that the guest may still send.
    pub(super) fn room(&self) -> u32 {
        BUFFER.saturating_sub(self.received.wrapping_sub(self.forwarded))
    }

    /// Whether something that the client sends could go to the guest.
    pub(super) fn listens(&self) -> bool {
        self.open && !self.client_done && !self.guest_receives_no_more && self.credit() > 0
    }

    /// Whether the client must take something first.
    pub(super) fn is_full(&self) -> bool {
        !self.out.is_empty()
    }

    /// Whether the guest should be told how much room there is; it counts as told.
    pub(super) fn owes_credit(&mut self) -> bool {
        let owes = self.forwarded.wrapping_sub(self.told) >= STEP;
        if owes {
            self.told = self.forwarded;
        }
        owes
    }

    /// A packet told the guest how much was forwarded.
    pub(super) fn has_told(&mut self) {
        self.told = self.forwarded;
    }

    /// Takes `data` from the guest, which has room for it, and passes on what the client takes.
    pub(super) fn push(&mut self, data: &[u8]) -> io::Result<()> {
        self.received = self.received.wrapping_add(data.len() as u32);
        self.out.extend(data);
        self.flush()
    }

    /// Passes on what the client takes.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match send(&self.client, self.out.as_slices().0, SendFlags::NOSIGNAL) {
                Ok(length) => {
                    self.out.drain(..length);
                    self.forwarded = self.forwarded.wrapping_add(length as u32);
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        if self.guest_sends_no_more {
            // A client that is gone needs no notice.
            let _ = shutdown(&self.client, Shutdown::Write);
        }
        Ok(())
    }

    /// Reads what the guest can take, into `buffer`.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        if !self.listens() {
            return Ok(Input::Nothing);
        }
        let most = self.credit().min(buffer.len());
        match recv(&self.client, &mut buffer[..most], RecvFlags::empty()) {
            Ok((0, _)) => {
                self.client_done = true;
                Ok(Input::End)
            }
            Ok((length, _)) => {
                self.sent = self.sent.wrapping_add(length as u32);
                Ok(Input::Bytes(length))
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(Input::Nothing),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the guest is through with it, and the client has everything.
    pub(super) fn is_over(&self) -> bool {
        self.guest_sends_no_more && self.guest_receives_no_more && self.out.is_empty()
    }
}
