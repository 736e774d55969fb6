//! Who lets vCPUs run: one word that each of them reads before it enters the guest, and a signal that brings it out.

use super::event::{Events, MachineEvent};
use super::sync::{lock, wait};
use super::thread::Task;
use super::vcpu::kick;
use crate::lease::LeaseGate;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// Shared by the vCPU threads, the devices that can end the machine, and its owner.
pub struct Control {
    /// Copy of `Crowd::want`, for a look without the lock.
    want: AtomicU8,
    crowd: Mutex<Crowd>,
    changed: Condvar,
    vcpus: Mutex<Vec<Task>>,
    events: Arc<Events>,
}

struct Crowd {
    want: u8,
    alive: usize,
    parked: usize,
}

impl Control {
    /// Without vCPUs yet; they will run.
    pub fn new(events: Arc<Events>) -> Self {
        let crowd = Crowd { want: RUN, alive: 0, parked: 0 };
        Self {
            want: AtomicU8::new(RUN),
            crowd: Mutex::new(crowd),
            changed: Condvar::new(),
            vcpus: Mutex::default(),
            events,
        }
    }

    /// Where the machine's end is told.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// Starts `count` vCPU threads with `spawn`. Until all have started, none can be signalled.
    pub fn begin<E>(&self, count: usize, spawn: impl FnMut(usize) -> Result<Task, E>) -> Result<(), E> {
        let mut vcpus = lock(&self.vcpus);
        lock(&self.crowd).alive = count;
        let started: Result<Vec<_>, _> = (0..count).map(spawn).collect();
        match started {
            Ok(tasks) => *vcpus = tasks,
            Err(error) => {
                drop(vcpus);
                self.set(STOP);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Asked by a vCPU's thread before each entry: true if it may enter.
    pub fn may_enter(&self, gate: &LeaseGate) -> bool {
        self.want.load(Ordering::SeqCst) == RUN && gate.may_run()
    }

    /// Parks a vCPU's thread until it may run; false if it must end. A closed gate keeps it parked until a
    /// [`resume`](Self::resume) finds the gate open.
    pub fn park(&self, gate: &LeaseGate) -> bool {
        let mut crowd = lock(&self.crowd);
        crowd.parked += 1;
        self.changed.notify_all();
        while crowd.want == PAUSE || crowd.want == RUN && !gate.may_run() {
            crowd = wait(&self.changed, crowd);
        }
        crowd.parked -= 1;
        crowd.want == RUN
    }

    /// A vCPU's thread ends.
    pub fn leave(&self) {
        lock(&self.crowd).alive -= 1;
        self.changed.notify_all();
    }

    /// Returns when no vCPU runs, and none will until [`resume`](Self::resume).
    pub fn pause(&self) {
        self.set(PAUSE);
        let mut crowd = lock(&self.crowd);
        while crowd.want == PAUSE && crowd.parked < crowd.alive {
            crowd = wait(&self.changed, crowd);
        }
    }

    /// Lets vCPUs run, as far as their gate does.
    pub fn resume(&self) {
        self.set(RUN);
    }

    /// Ends the machine with `event`: from now on no vCPU enters the guest. For any thread, a vCPU's included.
    pub fn end(&self, event: MachineEvent) {
        self.set(STOP);
        self.events.put(event);
    }

    /// Ends all vCPU threads; returns when they have ended.
    pub fn stop(&self) {
        self.set(STOP);
        let vcpus = std::mem::take(&mut *lock(&self.vcpus));
        vcpus.iter().for_each(Task::join);
    }

    /// Whether all vCPUs rest until somebody resumes them, or have ended.
    pub fn resting(&self) -> bool {
        let crowd = lock(&self.crowd);
        crowd.want != RUN && crowd.parked >= crowd.alive
    }

    /// Whether the machine ends or has ended.
    pub fn ends(&self) -> bool {
        self.want.load(Ordering::SeqCst) == STOP
    }

    /// Changes the word, wakes who is parked, and brings out who is in the guest. Nothing follows a stop.
    fn set(&self, want: u8) {
        {
            let mut crowd = lock(&self.crowd);
            if crowd.want == STOP {
                return;
            }
            crowd.want = want;
            self.want.store(want, Ordering::SeqCst);
            self.changed.notify_all();
        }
        if want != RUN {
            lock(&self.vcpus).iter().for_each(|vcpu| vcpu.with(kick::kick));
        }
    }
}
