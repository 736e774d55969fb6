//! Reports that wait for the provider: numbered, chained, bounded. When there is no room no operation is done.

use policy::report::{Report, ReportEvent, chain_start};
use policy::{CustomerId, Digest, InstanceNumber, VmId};
use std::collections::VecDeque;

/// Reports that wait at most.
pub const CAPACITY: usize = 256;

/// Room that operations leave for what happens by itself: leases, disks, the end.
const RESERVED: usize = 64;

/// The longest free text in a report, in bytes.
const TEXT: usize = 512;

/// Reports in the order in which they happened.
pub struct Outbox {
    next: u64,
    previous: Digest,
    waiting: VecDeque<Waiting>,
    /// What happened and found no room.
    lost: u64,
    /// The end is among them: nothing happens to an instance after it.
    ended: bool,
}

/// A report as it will be sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Waiting {
    /// The JSON bytes, which the next report's chain digest covers.
    pub bytes: Vec<u8>,
    /// When it happened, in milliseconds of CLOCK_BOOTTIME.
    pub since_ms: u64,
}

/// There is no room for another report.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("too many reports wait for the key provider; nothing is done until it takes them")]
pub struct OutboxFull;

impl Outbox {
    /// The outbox of a new instance.
    pub fn new(customer: &CustomerId, vm: &VmId, instance: InstanceNumber) -> Self {
        Self { next: 1, previous: chain_start(customer, vm, instance), waiting: VecDeque::new(), lost: 0, ended: false }
    }

    /// Whether an operation may be done: its report, and what follows from it, has room.
    pub fn room(&self) -> Result<(), OutboxFull> {
        if self.waiting.len() < CAPACITY - RESERVED { Ok(()) } else { Err(OutboxFull) }
    }

    /// Appends what happened at `boottime_ms`; what comes after the end, from a thread that has not heard of it, is dropped.
    pub fn put(&mut self, event: ReportEvent, boottime_ms: u64) {
        if self.ended {
            return;
        }
        if self.waiting.len() >= CAPACITY {
            // Nothing of this is an operation: those asked for room first.
            self.lost += 1;
            return;
        }
        self.ended = matches!(event, ReportEvent::Ended { .. });
        let report = Report { sequence: self.next, previous: self.previous, boottime_ms, event: bounded(event) };
        // The digest is that of the JSON as sent: this serialisation of these types can't fail.
        let bytes = serde_json::to_vec(&report).unwrap_or_default();
        self.next += 1;
        self.previous = Digest::of(&bytes);
        self.waiting.push_back(Waiting { bytes, since_ms: boottime_ms });
    }

    /// The oldest report that waits.
    pub fn first(&self) -> Option<&Waiting> {
        self.waiting.front()
    }

    /// The oldest was delivered.
    pub fn delivered(&mut self) {
        self.waiting.pop_front();
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Happenings that found no room.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

fn bounded(mut event: ReportEvent) -> ReportEvent {
    if let ReportEvent::Outcome { detail: text, .. }
    | ReportEvent::DiskIntegrity { reason: text, .. }
    | ReportEvent::Ended { detail: text, .. } = &mut event
    {
        let end = (0..=TEXT.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;
    use policy::report::EndReason;

    fn outbox() -> Outbox {
        let instance = InstanceNumber::try_from(7).expect("in range");
        Outbox::new(&"acme".parse().expect("label"), &"payroll".parse().expect("label"), instance)
    }

    #[test]
    fn reports_are_numbered_and_chained_without_gaps() {
        let mut outbox = outbox();
        let start = outbox.previous;
        for time in 0..5 {
            outbox.put(ReportEvent::Runs, time);
        }
        let (mut previous, mut sequence) = (start, 1);
        while let Some(waiting) = outbox.first() {
            let report: Report = serde_json::from_slice(&waiting.bytes).expect("JSON");
            assert_eq!((report.previous, report.sequence), (previous, sequence));
            previous = Digest::of(&waiting.bytes);
            sequence += 1;
            outbox.delivered();
        }
        assert_eq!(sequence, 6);
    }

    #[test]
    fn attack_45_when_reports_pile_up_no_operation_is_done_but_the_end_still_has_room() {
        let mut outbox = outbox();
        while outbox.room().is_ok() {
            outbox.put(ReportEvent::Runs, 0);
        }
        assert_eq!(outbox.len(), CAPACITY - RESERVED);
        outbox.put(ReportEvent::Ended { reason: EndReason::Failed, detail: String::new() }, 1);
        assert_eq!((outbox.len(), outbox.lost()), (CAPACITY - RESERVED + 1, 0));
        outbox.put(ReportEvent::Runs, 2);
        assert_eq!((outbox.len(), outbox.lost()), (CAPACITY - RESERVED + 1, 0), "nothing follows the end");
    }

    #[test]
    fn attack_45_what_finds_no_room_is_counted() {
        let mut outbox = outbox();
        for _ in 0..CAPACITY + 3 {
            outbox.put(ReportEvent::Quiesced, 2);
        }
        assert_eq!((outbox.len(), outbox.lost()), (CAPACITY, 3));
    }

    #[test]
    fn texts_are_cut_at_a_character() {
        let mut outbox = outbox();
        outbox.put(ReportEvent::Ended { reason: EndReason::Failed, detail: "ä".repeat(400) }, 0);
        let report: Report = serde_json::from_slice(&outbox.first().expect("it waits").bytes).expect("JSON");
        let ReportEvent::Ended { detail, .. } = report.event else { panic!("the end") };
        assert_eq!(detail.len(), 512);
    }
}
