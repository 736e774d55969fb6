//! The thread that talks to the key provider: attestations, renewals, anchors, reports. It alone reads network bytes, and
//! everything else in the process speaks to it through a [`Link`].

mod contacts;
mod failure;
mod outbox;
mod talker;
mod timing;

pub use contacts::contacts;
pub use failure::failure;
pub use outbox::{CAPACITY, Outbox, OutboxFull};
pub use talker::Contacts;

use crate::exit::{Exit, Failure};
use crate::lease::boottime_ms;
use crate::post::Post;
use crate::steps::Steps;
use attest::flow::{Established, OpenedRelease};
use policy::operation::OperationRequest;
use policy::report::{EndReason, ReportEvent};
use policy::{CustomerId, VmId, VolumeAnchor};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long anybody waits for an anchor to be kept before it counts as refused.
const ANCHOR_WAIT: Duration = Duration::from_secs(45);

/// How long the end of a VM waits for its last words to be delivered.
const FAREWELL: Duration = Duration::from_secs(10);

/// Keys released again under a new lease.
pub struct Renewal {
    /// What came, verified.
    pub opened: OpenedRelease,
}

/// What became of an anchor.
pub enum AnchorAnswer {
    /// The provider has it durably.
    Kept,
    /// Nobody answered; it may be tried again.
    Away(String),
    /// It won't be kept.
    Refused(String),
}

/// What the thread is asked to do.
enum Job {
    /// Attest for an operation, and answer with what was released.
    Attest(OperationRequest, Sender<Result<OpenedRelease, Failure>>),
    /// Keep the lease of this instance from now on.
    KeepLease(Box<talker::Instance>),
    /// Hold later releases against what was started.
    Establish(Box<Established>),
    /// Make an anchor durable.
    Anchor { anchor: VolumeAnchor, closed: bool, answer: Sender<AnchorAnswer> },
    /// There are reports.
    Reports,
    /// Deliver all reports until this long from now, then end.
    Farewell(Duration, Sender<bool>),
}

/// What the thread and those who speak to it share.
struct Shared {
    outbox: Mutex<Option<Outbox>>,
    /// Whether keys were wiped, so that the next attestation asks for them back.
    wiped: AtomicBool,
}

impl Shared {
    fn outbox(&self) -> MutexGuard<'_, Option<Outbox>> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to the thread. Clones lead to the same one.
#[derive(Clone)]
pub struct Link {
    jobs: Sender<Job>,
    shared: Arc<Shared>,
}

impl Link {
    /// Starts the thread. It prepares its client, reads what names need, waits for the registration, closes its sandbox, and
    /// waits for work.
    pub fn start(contacts: Contacts, steps: Steps, post: Post) -> Result<Self, Failure> {
        let (jobs, inbox): (_, Receiver<Job>) = channel();
        let shared = Arc::new(Shared { outbox: Mutex::new(None), wiped: AtomicBool::new(false) });
        let ours = shared.clone();
        crate::threads::spawn("provider", post.clone(), move || talker::run(contacts, steps, inbox, &ours, &post))?;
        Ok(Self { jobs, shared })
    }

    /// Attests for `request` and waits for what is released.
    pub fn attest(&self, request: OperationRequest) -> Result<OpenedRelease, Failure> {
        self.begin(request)?.recv().map_err(|_| gone())?
    }

    /// Has the thread attest for `request`; what is released comes through the channel. A channel that ends without it is a
    /// thread that died.
    pub fn begin(&self, request: OperationRequest) -> Result<Receiver<Result<OpenedRelease, Failure>>, Failure> {
        let (answer, wait) = channel();
        self.jobs.send(Job::Attest(request, answer)).map_err(|_| gone())?;
        Ok(wait)
    }

    /// From now on reports are numbered for this instance and its lease is renewed.
    pub fn keep(&self, customer: &CustomerId, vm: &VmId, opened: &OpenedRelease) {
        *self.shared.outbox() = Some(Outbox::new(customer, vm, opened.release.instance));
        let instance = talker::Instance::of(opened);
        // A thread that is gone has said so to the watching thread.
        let _ = self.jobs.send(Job::KeepLease(Box::new(instance)));
    }

    /// From now on releases must fit what was started. Without this, there are none.
    pub fn establish(&self, established: Established) {
        let _ = self.jobs.send(Job::Establish(Box::new(established)));
    }

    /// Makes `anchor` durable at the provider: returns when it is, or why it is not.
    pub fn anchor(&self, anchor: VolumeAnchor, closed: bool) -> AnchorAnswer {
        let (answer, wait) = channel();
        if self.jobs.send(Job::Anchor { anchor, closed, answer }).is_err() {
            return AnchorAnswer::Refused(gone().message);
        }
        wait.recv_timeout(ANCHOR_WAIT).unwrap_or_else(|_| AnchorAnswer::Away("no answer in time".into()))
    }

    /// Whether an operation may be done: there is room for its report.
    pub fn room(&self) -> Result<(), OutboxFull> {
        self.shared.outbox().as_ref().map_or(Ok(()), Outbox::room)
    }

    /// Reports what happened.
    pub fn report(&self, event: ReportEvent) {
        if let Some(outbox) = self.shared.outbox().as_mut() {
            outbox.put(event, boottime_ms());
        }
        let _ = self.jobs.send(Job::Reports);
    }

    /// How many reports wait, and the boot-time milliseconds of the oldest.
    pub fn waiting(&self) -> (usize, Option<u64>) {
        let outbox = self.shared.outbox();
        outbox.as_ref().map_or((0, None), |o| (o.len(), o.first().map(|r| r.since_ms)))
    }

    /// Whether the keys are gone, so that they must be asked for and not only be renewed.
    pub fn keys_wiped(&self, wiped: bool) {
        self.shared.wiped.store(wiped, Ordering::SeqCst);
    }

    /// Whether the keys are gone.
    pub fn are_keys_wiped(&self) -> bool {
        self.shared.wiped.load(Ordering::SeqCst)
    }

    /// Says the instance's last word, and waits (bounded) until all reports are delivered: false where they were not.
    pub fn end(&self, reason: EndReason, detail: &str) -> bool {
        self.report(ReportEvent::Ended { reason, detail: detail.to_owned() });
        let (answer, wait) = channel();
        self.jobs.send(Job::Farewell(FAREWELL, answer)).is_ok() && wait.recv_timeout(FAREWELL * 3).unwrap_or(false)
    }
}

/// What is said where the thread has died.
pub fn gone() -> Failure {
    Failure::new(Exit::Internal, "the thread that talks to the key provider is gone")
}
