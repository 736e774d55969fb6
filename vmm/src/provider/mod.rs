//! The thread that talks to the key provider: attestations, renewals, anchors, reports. It alone reads network bytes, and
//! everything else in the process speaks to it through a [`Link`].

mod asked;
mod contacts;
mod failure;
mod outbox;
mod talker;
mod timing;

pub use asked::{Asked, Denied};
pub use contacts::contacts;
pub use failure::failure;
pub use outbox::{CAPACITY, Outbox, OutboxFull};
pub use talker::Contacts;

use crate::exit::{Exit, Failure};
use crate::lease::boottime_ms;
use crate::post::Post;
use crate::steps::Steps;
use asked::Stage;
use attest::flow::{Established, OpenedRelease};
use policy::operation::OperationRequest;
use policy::report::{EndReason, ReportEvent};
use policy::{CustomerId, InstanceNumber, LeaseTerms, VmId, VolumeAnchor};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// Milliseconds that anybody waits for an anchor to be kept before it is asked for again.
const ANCHOR_MS: u64 = 45_000;

/// The same for one that is asked for when there is no time (any more): a provider that is well answers in less.
const LAST_ANCHOR_MS: u64 = 1_000;

/// How often whoever waits for an anchor looks whether there is time still.
const LOOK: Duration = Duration::from_millis(100);

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
    /// Nobody answered, and there is no time to try again.
    GivenUp(String),
    /// It won't be kept.
    Refused(String),
}

/// What the thread is asked to do.
enum Job {
    /// Attest for an operation, and answer with what was released.
    Attest(OperationRequest, Arc<Stage>, Sender<Result<OpenedRelease, Denied>>),
    /// Speak for this instance from now on.
    SpeakFor(InstanceNumber),
    /// Keep a lease that was asked for then, in milliseconds of CLOCK_BOOTTIME.
    KeepLease(LeaseTerms, u64),
    /// Hold later releases against what was started.
    Establish(Box<Established>),
    /// Make an anchor durable, while it is waited for.
    Anchor { anchor: VolumeAnchor, closed: bool, waited_for: Weak<()>, answer: Sender<AnchorAnswer> },
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
    /// Until when anchors are waited for, in milliseconds of CLOCK_BOOTTIME.
    hurry_ms: AtomicU64,
    /// Since when the VM is to stand still, in milliseconds of CLOCK_BOOTTIME.
    still_ms: AtomicU64,
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
        let shared = Arc::new(Shared {
            outbox: Mutex::new(None),
            wiped: AtomicBool::new(false),
            hurry_ms: AtomicU64::new(u64::MAX),
            still_ms: AtomicU64::new(u64::MAX),
        });
        let ours = shared.clone();
        crate::threads::spawn("provider", post.clone(), move || talker::run(contacts, steps, inbox, &ours, &post))?;
        Ok(Self { jobs, shared })
    }

    /// Attests for `request` and waits for what is released.
    pub fn attest(&self, request: OperationRequest) -> Result<OpenedRelease, Failure> {
        self.ask(request)?.wait(|| None).map_err(|denied| denied.failure)
    }

    /// Has the thread attest for `request`.
    pub fn ask(&self, request: OperationRequest) -> Result<Asked, Failure> {
        let (answer, wait) = channel();
        let stage = Arc::new(Stage::default());
        self.jobs.send(Job::Attest(request, stage.clone(), answer)).map_err(|_| gone())?;
        Ok(Asked::new(wait, stage))
    }

    /// From now on reports and anchors are those of this instance.
    pub fn speak_for(&self, customer: &CustomerId, vm: &VmId, instance: InstanceNumber) {
        *self.shared.outbox() = Some(Outbox::new(customer, vm, instance));
        // A thread that is gone has said so to the watching thread.
        let _ = self.jobs.send(Job::SpeakFor(instance));
    }

    /// From now on the lease of what was released is renewed.
    pub fn keep_lease(&self, opened: &OpenedRelease) {
        let _ = self.jobs.send(Job::KeepLease(opened.release.lease, opened.asked_ms));
    }

    /// From now on releases must fit what was started. Without this, there are none.
    pub fn establish(&self, established: Established) {
        let _ = self.jobs.send(Job::Establish(Box::new(established)));
    }

    /// Makes `anchor` durable at the provider: returns when it is, or why it is not.
    pub fn anchor(&self, anchor: VolumeAnchor, closed: bool) -> AnchorAnswer {
        let (answer, wait) = channel();
        let waiting = Arc::new(());
        let waited_for = Arc::downgrade(&waiting);
        if self.jobs.send(Job::Anchor { anchor, closed, waited_for, answer }).is_err() {
            return AnchorAnswer::Refused(gone().message);
        }
        let asked_ms = boottime_ms();
        loop {
            let answer = wait.recv_timeout(LOOK);
            let (now_ms, hurry_ms) = (boottime_ms(), self.shared.hurry_ms.load(Ordering::SeqCst));
            match answer {
                Ok(AnchorAnswer::Away(why)) if now_ms >= hurry_ms => return AnchorAnswer::GivenUp(why),
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Disconnected) => return AnchorAnswer::Refused(gone().message),
                Err(RecvTimeoutError::Timeout) if now_ms >= hurry_ms.max(asked_ms.saturating_add(LAST_ANCHOR_MS)) => {
                    return AnchorAnswer::GivenUp("no answer, and the VM ends".into());
                }
                // Behind one that was asked for before, a FLUSH may wait. Others are waited for as ever: volumes that rest are anchored too.
                Err(RecvTimeoutError::Timeout)
                    if self.shared.still_ms.load(Ordering::SeqCst) != u64::MAX
                        && asked_ms < self.shared.still_ms.load(Ordering::SeqCst).saturating_add(LAST_ANCHOR_MS)
                        && now_ms >= asked_ms.saturating_add(LAST_ANCHOR_MS) =>
                {
                    return AnchorAnswer::Away("no answer, and the VM is to stand still".into());
                }
                Err(RecvTimeoutError::Timeout) if now_ms >= asked_ms.saturating_add(ANCHOR_MS) => {
                    return AnchorAnswer::Away("no answer in time".into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// The VM ends: anchors are waited for so long from now on, all of them together, and each for a moment.
    pub fn hurry(&self, patience: Duration) {
        let end_ms = boottime_ms().saturating_add(u64::try_from(patience.as_millis()).unwrap_or(u64::MAX));
        self.shared.hurry_ms.fetch_min(end_ms, Ordering::SeqCst);
    }

    /// Whether the VM is to stand still: whoever waits for an anchor now waits for a moment only, and asks again later.
    pub fn stand_still(&self, still: bool) {
        self.shared.still_ms.store(if still { boottime_ms() } else { u64::MAX }, Ordering::SeqCst);
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
