//! The lease of a running VM, kept by the clock: quiesced before its end, keys wiped at its end, put back when the provider
//! releases them again.
//!
//! The watching thread decides and never waits. What may wait for vCPUs, a store or the provider (pausing, flushing, putting
//! keys back) is done by a second thread, the hands, in order; wiping keys is done at once, whatever the hands do.

use crate::helm::{Helm, Hold};
use crate::lease::{Due, LeaseClock, boottime_ms};
use crate::operations::Protected;
use crate::post::{Message, Post};
use crate::provider::Renewal;
use crate::steps::Steps;
use crate::threads::patiently;
use crate::volumes::Volumes;
use crate::watch::End;
use attest::flow::OpenedRelease;
use policy::lease::OnExpiry;
use policy::report::ReportEvent;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};

/// The lease of one VM.
pub struct Guard {
    clock: LeaseClock,
    helm: Arc<Helm>,
    volumes: Arc<Volumes>,
    protected: Arc<Protected>,
    hands: Sender<Work>,
    timer: OwnedFd,
    unreported_ms: u64,
    held_for_reports: bool,
}

/// What the hands do.
enum Work {
    /// Pause the machine, then flush and checkpoint.
    Quiesce,
    /// Put keys back if they are gone, and let the machine run.
    Back(Box<OpenedRelease>),
    /// Hold the machine, or let it go, for its reports.
    Reports(bool),
}

impl Guard {
    /// Guards the lease that `opened` brought; opens the gate. `opened`'s keys are not needed here.
    pub fn new(
        helm: Arc<Helm>,
        volumes: Arc<Volumes>,
        protected: Arc<Protected>,
        opened: &OpenedRelease,
        post: Post,
    ) -> Result<Self, crate::exit::Failure> {
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
                .map_err(|e| crate::exit::Failure::new(crate::exit::Exit::Host, format!("cannot make a timer: {e}")))?;
        let (hands, work) = channel();
        let own =
            Hands { helm: helm.clone(), volumes: volumes.clone(), protected: protected.clone(), post: post.clone() };
        crate::threads::spawn("lease", post, move || own.serve(&work))?;
        let mut guard = Self {
            clock: LeaseClock::new(opened.release.lease, opened.asked_ms),
            helm,
            volumes,
            protected,
            hands,
            timer,
            unreported_ms: u64::from(opened.release.unreported_seconds) * 1000,
            held_for_reports: false,
        };
        guard.lease_changed();
        Ok(guard)
    }

    /// Does what is due. Some end where the VM's life ends with its lease.
    pub fn look(&mut self, steps: Steps) -> Option<End> {
        let mut end = None;
        while let Some(due) = self.clock.due(boottime_ms()) {
            match due {
                Due::Quiesce => {
                    steps.step("lease-ends", "the VM pauses and its volumes are flushed");
                    self.work(Work::Quiesce);
                    self.protected.link.report(ReportEvent::Quiesced);
                }
                Due::Wipe => {
                    self.helm.gate().close();
                    self.volumes.wipe_keys();
                    self.protected.link.keys_wiped(true);
                    self.protected.link.report(ReportEvent::KeysWiped);
                    steps.step("keys-wiped", "the lease ended; the VM waits for the key provider");
                    if self.clock.terms().on_expiry == OnExpiry::PowerOff {
                        end =
                            Some(End::Lease("the lease ended without a renewal, and policy powers the VM off".into()));
                    }
                }
            }
        }
        self.look_at_reports(steps);
        self.arm();
        end
    }

    /// The machine stands still while its reports can't be delivered for longer than policy allows.
    fn look_at_reports(&mut self, steps: Steps) {
        let (_, oldest) = self.protected.link.waiting();
        let late = oldest.is_some_and(|since| boottime_ms().saturating_sub(since) >= self.unreported_ms);
        if late != self.held_for_reports {
            self.held_for_reports = late;
            let what =
                if late { "reports could not be delivered; the VM pauses" } else { "reports are delivered again" };
            steps.step("reports", what);
            self.work(Work::Reports(late));
        }
    }

    /// A renewal came. One that is over already is discarded.
    pub fn renewed(&mut self, renewal: Renewal, steps: Steps) {
        let opened = renewal.opened;
        let was_quiesced = self.clock.quiesce_ms() <= boottime_ms();
        if !self.clock.renew(opened.release.lease, opened.asked_ms, boottime_ms()) {
            steps.step("lease-late", "a renewal came after its own end and was discarded");
            return;
        }
        self.unreported_ms = u64::from(opened.release.unreported_seconds) * 1000;
        self.lease_changed();
        let detail = format!("{} s", opened.release.lease.seconds);
        steps.step(if was_quiesced { "keys-back" } else { "lease-renewed" }, &detail);
        self.work(Work::Back(Box::new(opened)));
    }

    /// The hands have quiesced the machine, or not.
    pub fn quiet(&mut self, result: Result<(), String>, steps: Steps) {
        match result {
            Ok(()) => steps.step("quiesced", "no vCPU runs, volumes are flushed"),
            Err(why) => steps.step("quiesced", &format!("no vCPU runs, but {why}")),
        }
    }

    fn lease_changed(&mut self) {
        self.helm.gate().open_until(self.clock.quiesce_ms(), self.clock.end_ms());
        self.protected.lease_end_ms.store(self.clock.end_ms(), Ordering::SeqCst);
        self.arm();
    }

    /// Sets the timer to the next moment at which something may be due, on the clock that counts while the host sleeps.
    fn arm(&self) {
        let (_, oldest) = self.protected.link.waiting();
        let reports = match (oldest, self.held_for_reports) {
            // The thread that delivers does not say when it did: looked at each second.
            (Some(_), true) => Some(boottime_ms().saturating_add(1000)),
            (Some(since), false) => Some(since.saturating_add(self.unreported_ms)),
            (None, _) => Some(boottime_ms().saturating_add(self.unreported_ms)),
        };
        let next = self.clock.next_ms().into_iter().chain(reports).min().unwrap_or(u64::MAX).max(1);
        let value = Timespec {
            tv_sec: i64::try_from(next / 1000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(next % 1000 * 1_000_000).unwrap_or(0),
        };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let set = Itimerspec { it_interval: zero, it_value: value };
        // Setting a timer again also makes its descriptor unreadable. Its arguments are in range, so it can't fail.
        let _ = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &set);
    }

    fn work(&self, work: Work) {
        // Hands that are gone have told the post.
        let _ = self.hands.send(work);
    }
}

impl AsFd for Guard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

struct Hands {
    helm: Arc<Helm>,
    volumes: Arc<Volumes>,
    protected: Arc<Protected>,
    post: Post,
}

impl Hands {
    fn serve(&self, work: &Receiver<Work>) {
        while let Ok(work) = work.recv() {
            match work {
                Work::Quiesce => {
                    self.hold(Hold::Lease);
                    self.post.put(Message::Quiet(self.volumes.rest()));
                }
                Work::Back(opened) => self.back(&opened),
                Work::Reports(true) => self.hold(Hold::Reports),
                Work::Reports(false) => drop(self.helm.release(Hold::Reports)),
            }
        }
    }

    /// Holds the machine. A disk whose store hangs is not quiet before that answers; what the others hold is durable all the same before the
    /// keys go.
    fn hold(&self, why: Hold) {
        let hold = || {
            self.helm.hold(why);
        };
        patiently(&hold, || drop(self.volumes.rest()));
    }

    fn back(&self, opened: &OpenedRelease) {
        let wiped = self.protected.link.are_keys_wiped();
        if wiped {
            // That lease is over as well, where a store held this up for so long: the next renewal brings the keys back.
            if !self.helm.gate().may_submit() {
                return;
            }
            if let Err(why) = self.volumes.put_back_keys(opened) {
                self.post.put(Message::Died(why));
                return;
            }
            self.protected.link.keys_wiped(false);
            self.protected.link.report(ReportEvent::KeysBack);
        }
        // The clock may have moved on meanwhile: then the keys go again, and the next renewal brings them back.
        if !self.helm.gate().may_submit() {
            self.volumes.wipe_keys();
            self.protected.link.keys_wiped(true);
            self.protected.link.report(ReportEvent::KeysWiped);
            return;
        }
        self.helm.release(Hold::Lease);
    }
}
