//! What the talking thread does: one thing at a time, what others wait for first.

use super::asked::{Denied, Following, Stage};
use super::timing::{Backoff, jitter};
use super::{AnchorAnswer, Job, Renewal, Shared};
use crate::exit::{Exit, Failure, chain};
use crate::lease::boottime_ms;
use crate::post::{Message, Post};
use crate::sandbox::{Filter, close_thread};
use crate::steps::Steps;
use attest::client::{ClientError, ProviderClient};
use attest::flow::{Attester, OpenedRelease, Step};
use attest::protocol::{AnchorUpdate, ProblemType};
use policy::operation::OperationRequest;
use policy::{InstanceNumber, Operation, VolumeAnchor};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How often a client thread that has nothing to do looks at the clock, which runs on while the host sleeps.
const LOOK: Duration = Duration::from_secs(60);

/// Who is to be talked to, and as whom.
pub struct Contacts {
    /// Makes the attester; called in the thread, before its sandbox closes.
    pub attester: Box<dyn FnOnce() -> Result<Attester, Failure> + Send>,
}

/// The thread.
pub(super) fn run(contacts: Contacts, steps: Steps, jobs: Receiver<Job>, shared: &Shared, post: &Post) {
    let ready = (contacts.attester)().and_then(|attester| {
        close_thread(Filter::Provider).map_err(|e| Failure::of(Exit::Host, &e))?;
        Ok(attester)
    });
    match ready {
        Ok(attester) => {
            let talker = Talker {
                attester,
                steps,
                shared,
                post,
                instance: None,
                renew_at: u64::MAX,
                renewals: Backoff::for_reports(),
                report_at: u64::MAX,
                reports: Backoff::for_reports(),
                told: String::new(),
            };
            talker.serve(&jobs);
        }
        Err(failure) => refuse_all(&jobs, &failure),
    }
}

/// There is nobody to talk to: everybody is told why.
fn refuse_all(jobs: &Receiver<Job>, failure: &Failure) {
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Attest(_, _, answer) => {
                let _ = answer.send(Err(Failure::new(failure.exit, &failure.message).into()));
            }
            Job::Anchor { answer, .. } => {
                let _ = answer.send(AnchorAnswer::Refused(failure.message.clone()));
            }
            Job::Farewell(_, answer) => {
                let _ = answer.send(false);
                return;
            }
            Job::SpeakFor(_) | Job::KeepLease(..) | Job::Establish(_) | Job::Reports => {}
        }
    }
}

struct Talker<'t> {
    attester: Attester,
    steps: Steps,
    shared: &'t Shared,
    post: &'t Post,
    /// Whom it speaks for.
    instance: Option<InstanceNumber>,
    /// Boot-time milliseconds; never is `u64::MAX`.
    renew_at: u64,
    renewals: Backoff,
    report_at: u64,
    reports: Backoff,
    /// The last complaint, so that it is told once and not at each try.
    told: String,
}

impl Talker<'_> {
    fn serve(mut self, jobs: &Receiver<Job>) {
        let mut idle = true;
        loop {
            let now = boottime_ms();
            // The lease first; and of reports that wait one at a time, so that a slow provider keeps nobody from lease and anchors.
            if self.renew_at <= now {
                self.renew();
            } else if self.report_at <= now && (idle || !self.hurries()) {
                self.deliver();
            }
            // Then what takes no time, and one thing that does. Of a VM that ends these are its last anchors, for which there is less time than
            // for its reports.
            idle = loop {
                let due = self.report_at.min(self.renew_at).saturating_sub(boottime_ms());
                match jobs.recv_timeout(Duration::from_millis(due).min(LOOK)) {
                    Ok(Job::SpeakFor(instance)) => self.instance = Some(instance),
                    Ok(Job::KeepLease(terms, asked_ms)) => {
                        self.renewals = Backoff::for_lease(&terms);
                        self.renew_at = asked_ms.saturating_add(terms.renew_ms());
                    }
                    Ok(Job::Establish(established)) => self.attester.establish(*established),
                    Ok(Job::Reports) => self.report_at = self.report_at.min(boottime_ms()),
                    // Given up meanwhile: it would only keep others waiting.
                    Ok(Job::Anchor { waited_for, .. }) if waited_for.strong_count() == 0 => {}
                    Ok(Job::Anchor { anchor, closed, answer, .. }) => {
                        let _ = answer.send(self.anchor(anchor, closed));
                        break false;
                    }
                    Ok(Job::Attest(request, stage, answer)) => {
                        // Who asked may have given up: then what came is dropped, and with it wiped.
                        let _ = answer.send(self.attest(&request, &stage));
                        break false;
                    }
                    Ok(Job::Farewell(limit, answer)) => {
                        let _ = answer.send(self.farewell(limit));
                        return;
                    }
                    Err(RecvTimeoutError::Timeout) => break true,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            };
        }
    }

    fn attest(&mut self, request: &OperationRequest, stage: &Stage) -> Result<OpenedRelease, Denied> {
        let following = &mut Following { steps: self.steps, stage };
        let opened = self.attester.attest(request, following);
        opened.map_err(|error| Denied { failure: super::failure(&error), instance: self.attester.released() })
    }

    /// Whether the VM ends.
    fn hurries(&self) -> bool {
        self.shared.hurry_ms.load(Ordering::SeqCst) != u64::MAX
    }

    fn renew(&mut self) {
        if self.hurries() {
            // The VM ends, with the lease that it has: whoever starts it elsewhere need not wait for another one's end.
            self.renew_at = u64::MAX;
            return;
        }
        let wiped = self.shared.wiped.load(Ordering::SeqCst);
        let operation = if wiped { Operation::ResumeKeys } else { Operation::Renew };
        match self.attester.attest(&OperationRequest::plain(operation), &mut |_: Step| {}) {
            Ok(opened) => {
                let (terms, asked_ms) = (opened.release.lease, opened.asked_ms);
                let late = asked_ms.saturating_add(terms.quiesce_ms()) <= boottime_ms();
                self.renewals = Backoff::for_lease(&terms);
                self.told.clear();
                if late {
                    // It came when it was over: asked again at once, with the usual pause between.
                    self.renew_at = boottime_ms() + self.renewals.next(jitter());
                    return;
                }
                self.renew_at = asked_ms.saturating_add(terms.renew_ms());
                self.post.put(Message::Renewed(Box::new(Renewal { opened })));
            }
            Err(error) => {
                let failure = super::failure(&error);
                if error.problem() == Some(ProblemType::OldInstance) {
                    self.superseded(&failure.message);
                    return;
                }
                self.renew_at = boottime_ms() + self.renewals.next(jitter());
                self.complain("lease not renewed", &failure.message);
            }
        }
    }

    fn superseded(&mut self, why: &str) {
        self.renew_at = u64::MAX;
        self.report_at = u64::MAX;
        self.post.put(Message::Superseded(why.to_owned()));
    }

    fn complain(&mut self, step: &str, message: &str) {
        if self.told != message {
            self.steps.step(step, message);
            message.clone_into(&mut self.told);
        }
    }

    /// Delivers the oldest report, if any; when the next try is due, `report_at` says.
    fn deliver(&mut self) {
        self.report_at = u64::MAX;
        let Some(number) = self.instance else { return };
        let first = self.shared.outbox().as_ref().and_then(|o| o.first().cloned());
        let Some(report) = first else { return };
        match self.client().report(number, &report.bytes) {
            Ok(()) => {
                self.reports.reset();
                if let Some(outbox) = self.shared.outbox().as_mut() {
                    outbox.delivered();
                    if !outbox.is_empty() {
                        self.report_at = 0;
                    }
                }
            }
            Err(error) if error.problem() == Some(ProblemType::OldInstance) => self.superseded(&chain(&error)),
            Err(error) => {
                self.report_at = boottime_ms() + self.reports.next(jitter());
                self.complain("report not delivered", &chain(&error));
            }
        }
    }

    fn anchor(&mut self, anchor: VolumeAnchor, closed: bool) -> AnchorAnswer {
        let Some(number) = self.instance else {
            return AnchorAnswer::Refused("there is no instance that holds the volume".into());
        };
        match self.client().anchor(number, &AnchorUpdate { anchor, closed }) {
            Ok(()) => AnchorAnswer::Kept,
            Err(error) if matches!(error.problem(), Some(ProblemType::Unavailable | ProblemType::TooMuch)) => {
                AnchorAnswer::Away(chain(&error))
            }
            Err(error @ ClientError::Refused(_)) => AnchorAnswer::Refused(chain(&error)),
            Err(error) => AnchorAnswer::Away(chain(&error)),
        }
    }

    /// Last words: tried until they are delivered or the time is over.
    fn farewell(mut self, limit: Duration) -> bool {
        let end = boottime_ms().saturating_add(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
        loop {
            self.deliver();
            if self.shared.outbox().as_ref().is_none_or(super::Outbox::is_empty) {
                return true;
            }
            let pause = self.report_at.saturating_sub(boottime_ms());
            if self.report_at == u64::MAX || pause > 0 && boottime_ms().saturating_add(pause) > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(pause));
        }
    }

    fn client(&mut self) -> &mut ProviderClient {
        self.attester.provider()
    }
}
